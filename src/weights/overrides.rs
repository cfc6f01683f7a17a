//! What the caller knows better than the files.

use super::text::shown;
use crate::{
    Error, Result,
    backend::NormOver,
    image::Interpolation,
    model::{Activation, Readout},
};

/// Largest image side accepted, in pixels, and most patches: beyond both, tables would not fit memory.
pub(super) const LARGEST_SIDE: usize = 1 << 14;
/// Most patches accepted.
pub(super) const MOST_PATCHES: usize = 1 << 16;

/// The keys of [`Overrides::set`], for messages and `--help`.
const KEYS: &str = "heads, image, norm_eps, activation, readout, mean, std, crop_pct, interpolation, position_antialias, skip_lam, norm, shrinkage";

/// Numbers that outrank everything the checkpoint and its configuration say.
///
/// # Examples
/// ```
/// use foveate::weights::Overrides;
/// let mut overrides = Overrides::default();
/// overrides.set("heads=6")?;
/// overrides.set("image=384x512")?; // height x width
/// assert_eq!(overrides.heads, Some(6));
/// assert_eq!(overrides.image, Some([384, 512]));
/// assert!(overrides.set("head=6").unwrap_err().to_string().contains("heads, image"));
/// # Ok::<(), foveate::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Overrides {
    /// Attention heads.
    pub heads: Option<usize>,
    /// Input height and width in pixels; the position table is resampled to fit.
    pub image: Option<[usize; 2]>,
    /// LayerNorm's epsilon.
    pub norm_eps: Option<f32>,
    /// The MLP's nonlinearity.
    pub activation: Option<Activation>,
    /// What the head reads.
    pub readout: Option<Readout>,
    /// Subtracted per channel, one value for all or one each.
    pub mean: Option<Vec<f32>>,
    /// Divided by, per channel, one value for all or one each.
    pub std: Option<Vec<f32>>,
    /// Share of the resized short side that the crop covers.
    pub crop_pct: Option<f64>,
    /// The filter that resizes pictures.
    pub interpolation: Option<Interpolation>,
    /// Resample positions with (true) or without (false) antialiasing instead of the family's way.
    pub position_antialias: Option<bool>,
    /// What an LV-ViT divides its residuals by (the official code's `skip_lam`).
    pub skip_lam: Option<f32>,
    /// The norms of an AFFNet's blocks.
    pub norm: Option<NormOver>,
    /// The soft shrinkage of an AFFNet's filters.
    pub shrinkage: Option<f32>,
}

impl Overrides {
    /// Sets one value from text of the form `key=value`.
    ///
    /// Images are `224` or `224x320` (height, width), lists are separated by commas, readouts are `class`, `mean`,
    /// `class_and_mean`, `attention` and `class_and_aux` (`pool` is another name of the key), flags are `true` and `false`.
    ///
    /// # Errors
    /// [`Error::Model`] when the key is unknown (the message lists the keys) or the value cannot be used.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let Some((key, value)) = assignment.split_once('=') else {
            return Err(Error::model(format!(
                "setting `{}` has no value; write key=value with one of {KEYS}",
                shown(assignment)
            )));
        };
        let (key, value) = (key.trim(), value.trim());
        let wrong =
            |expected: &str| Error::model(format!("setting `{key}`: `{}` is not {expected}", shown(value)));
        let channels = || -> Option<Vec<f32>> {
            let values: Vec<f32> = value.split(',').map(|v| v.trim().parse().ok()).collect::<Option<_>>()?;
            (values.len() <= 4 && values.iter().all(|v| v.is_finite())).then_some(values)
        };
        match key {
            "heads" => {
                let heads = value.parse().ok().filter(|heads| (1..=1024).contains(heads));
                self.heads = Some(heads.ok_or_else(|| wrong("a whole number from 1 to 1024"))?);
            }
            "image" => {
                let sides = image(value).filter(|sides| sides.iter().all(|s| (1..=LARGEST_SIDE).contains(s)));
                let expected =
                    format!("a size such as 224 or 224x320 (height x width, at most {LARGEST_SIDE})");
                self.image = Some(sides.ok_or_else(|| wrong(&expected))?);
            }
            "norm_eps" => {
                let eps = value.parse().ok().filter(|eps: &f32| eps.is_finite() && *eps > 0.0);
                self.norm_eps = Some(eps.ok_or_else(|| wrong("a positive number such as 1e-6"))?);
            }
            "activation" => {
                let known = Activation::parse(value);
                self.activation =
                    Some(known.map_err(|_| wrong("gelu, gelu_tanh, quick_gelu, silu, relu or swiglu"))?);
            }
            "readout" | "pool" => {
                let known = Readout::parse(value);
                self.readout = Some(
                    known.ok_or_else(|| wrong("class, mean, class_and_mean, attention or class_and_aux"))?,
                );
            }
            "mean" => {
                self.mean = Some(channels().ok_or_else(|| wrong("1 to 4 numbers separated by commas"))?);
            }
            "std" => {
                let values = channels().filter(|values| values.iter().all(|&v| v > 0.0));
                self.std = Some(values.ok_or_else(|| wrong("1 to 4 positive numbers separated by commas"))?);
            }
            "crop_pct" => {
                let share = value.parse().ok().filter(|share| *share > 0.0 && *share <= 1.0);
                self.crop_pct = Some(share.ok_or_else(|| wrong("a number above 0 and at most 1"))?);
            }
            "interpolation" => {
                let known = interpolation(value);
                self.interpolation = Some(known.ok_or_else(|| wrong("bilinear or bicubic"))?);
            }
            "position_antialias" => {
                self.position_antialias = Some(value.parse().map_err(|_| wrong("true or false"))?);
            }
            "skip_lam" => {
                let skip = value.parse().ok().filter(|skip: &f32| skip.is_finite() && *skip > 0.0);
                self.skip_lam = Some(skip.ok_or_else(|| wrong("a positive number such as 2"))?);
            }
            "norm" => {
                let known = NormOver::parse(value);
                self.norm = Some(known.ok_or_else(|| wrong("layer_norm_2d, layer_norm or batch_norm"))?);
            }
            "shrinkage" => {
                let lambda = value.parse().ok().filter(|lambda: &f32| lambda.is_finite() && *lambda >= 0.0);
                self.shrinkage = Some(lambda.ok_or_else(|| wrong("a number from 0 on such as 0.01"))?);
            }
            _ => {
                return Err(Error::model(format!("setting `{}` is unknown; use one of {KEYS}", shown(key))));
            }
        }
        Ok(())
    }
}

/// `224` or `224x320`.
fn image(value: &str) -> Option<[usize; 2]> {
    let (height, width) = value.split_once('x').unwrap_or((value, value));
    Some([height.trim().parse().ok()?, width.trim().parse().ok()?])
}

/// The filter that configurations call `name`.
pub(super) fn interpolation(name: &str) -> Option<Interpolation> {
    match name {
        "bilinear" => Some(Interpolation::Bilinear),
        "bicubic" => Some(Interpolation::Bicubic),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_is_understood() {
        let mut o = Overrides::default();
        for text in [
            "heads=3",
            "image = 32x48",
            "norm_eps=1e-5",
            "activation=quick_gelu",
            "pool=mean",
            "mean=0.5,0.25, 0.125",
            "std=1",
            "crop_pct=0.875",
            "interpolation=bilinear",
            "position_antialias=true",
            "skip_lam=2",
            "norm=layer_norm",
            "shrinkage=0.05",
        ] {
            o.set(text).unwrap();
        }
        let expected = Overrides {
            heads: Some(3),
            image: Some([32, 48]),
            norm_eps: Some(1e-5),
            activation: Some(Activation::QuickGelu),
            readout: Some(Readout::Mean),
            mean: Some(vec![0.5, 0.25, 0.125]),
            std: Some(vec![1.0]),
            crop_pct: Some(0.875),
            interpolation: Some(Interpolation::Bilinear),
            position_antialias: Some(true),
            skip_lam: Some(2.0),
            norm: Some(NormOver::Position),
            shrinkage: Some(0.05),
        };
        assert_eq!(o, expected);
        // The message's list and the match stay together.
        for key in KEYS.split(", ") {
            let message = Overrides::default().set(&format!("{key}=@")).unwrap_err().to_string();
            assert!(message.contains("is not"), "{message}");
        }
    }

    #[test]
    fn wrong_values_change_nothing_and_say_what_is_expected() {
        for text in [
            "heads",
            "heads=",
            "heads=0",
            "heads=-1",
            "heads=1e3",
            "image=0",
            "image=x",
            "image=99999999",
            "image=1x2x3",
            "norm_eps=0",
            "norm_eps=nan",
            "norm_eps=inf",
            "activation=tanh",
            "readout=max",
            "mean=",
            "mean=1,2,3,4,5",
            "mean=nan",
            "std=0",
            "std=-1",
            "crop_pct=0",
            "crop_pct=1.5",
            "crop_pct=NaN",
            "interpolation=lanczos",
            "position_antialias=1",
            "skip_lam=0",
            "norm=rms",
            "shrinkage=-1",
            "Heads=3",
            "=3",
            "",
        ] {
            let mut o = Overrides::default();
            let message = o.set(text).unwrap_err().to_string();
            assert!(message.starts_with("setting `") && !message.contains('\n'), "{message}");
            assert_eq!(o, Overrides::default(), "{text}");
        }
    }
}
