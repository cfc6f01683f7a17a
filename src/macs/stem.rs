//! Multiply-adds of what comes before the patch projection.

use super::Macs;
use crate::model::{Stem, TokensAttention, VitConfig};

/// The counts of a stem, without its last projection. A stem that finds no place for a window costs nothing: no model has it.
pub(super) fn of(config: &VitConfig) -> Macs {
    let Ok((steps, _)) = config.stem_grids() else { return Macs::default() };
    let places = |at: usize| steps.get(at).map_or(0, |(_, [height, width])| (height * width) as u64);
    match config.stem {
        Stem::Patches => Macs::default(),
        Stem::Convolutions { filters } => {
            // A window's places are the grid that the next one moves over.
            let (f, channels) = (filters as u64, config.channels as u64);
            let products = [(places(1), 49 * channels), (places(2), 9 * f), (places(3), 9 * f)];
            Macs {
                linear: products.iter().map(|(places, inputs)| places * inputs * f).sum(),
                batch_normalised: products.iter().map(|(places, _)| places * f).sum(),
                ..Macs::default()
            }
        }
        Stem::TokensToToken { width, attention } => {
            let t = width as u64;
            let inputs = config.stage_inputs(width).map(|inputs| inputs as u64);
            let stages = [(places(1), inputs[0]), (places(2), inputs[1])];
            let attended = |n: u64| match attention {
                TokensAttention::Transformer => 2 * n * n * t,
                // Features of keys and queries, what they are divided by, sums and their use.
                TokensAttention::Performer { features } => features as u64 * n * (4 * t + 1),
            };
            let softmax = |n: u64| if attention == TokensAttention::Transformer { n * n } else { 0 };
            Macs {
                linear: stages.iter().map(|(n, inputs)| n * (3 * t * inputs + 3 * t * t)).sum(),
                attention: stages.iter().map(|(n, _)| attended(*n)).sum(),
                normalised: stages.iter().map(|(n, inputs)| n * (inputs + t)).sum(),
                softmax: stages.iter().map(|(n, _)| softmax(*n)).sum(),
                ..Macs::default()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        Reduction,
        macs::{Convention, ModelMacs},
        model::{Readout, VitConfig, arch},
    };

    #[track_caller]
    fn counted(arch: &str, spec: &str, published: f64) {
        let reduction: Reduction = spec.parse().unwrap();
        let macs = ModelMacs::of(&arch::config(arch).unwrap(), &reduction).sum();
        let giga = macs.total(Convention::Fvcore) as f64 / 1e9;
        assert_eq!(format!("{giga:.2}"), format!("{published:.2}"), "{arch} with {spec}: {giga}");
    }

    /// fvcore on the official classes.
    #[test]
    fn lv_vit_counts_are_the_measured_ones() {
        for (arch, published) in [("lvvit_t", 2.88), ("lvvit_s", 6.57), ("lvvit_m", 12.70)] {
            counted(arch, "none", published);
        }
    }

    #[test]
    fn t2t_vit_counts_are_the_measured_ones() {
        for (arch, published) in [
            ("t2t_vit_7", 1.16),
            ("t2t_vit_10", 1.53),
            ("t2t_vit_12", 1.77),
            ("t2t_vit_14", 4.80),
            ("t2t_vit_19", 8.50),
            ("t2t_vit_24", 13.69),
            ("t2t_vit_t_14", 6.11),
            ("t2t_vit_t_19", 9.81),
            ("t2t_vit_t_24", 15.00),
        ] {
            counted(arch, "none", published);
        }
    }

    /// MCTF's closed form, for which its paper prints 4.9, 4.2 and 3.6: products and similarities, read out by the class token
    /// alone. As fvcore counts the whole model, norms and auxiliary head come on top: 4.96, 4.17 and 3.58.
    #[test]
    fn mctf_counts_on_lv_vit_are_those_of_its_formula() {
        let whole = arch::config("lvvit_s").unwrap();
        let class = VitConfig { readout: Readout::Class, ..whole };
        for (r, formula, all) in [(8, 4.91, 4.96), (12, 4.14, 4.17), (16, 3.57, 3.58)] {
            let reduction: Reduction = format!("mctf:r={r}").parse().unwrap();
            let sum = ModelMacs::of(&class, &reduction).sum();
            let giga = (sum.linear + sum.attention + sum.matching) as f64 / 1e9;
            assert_eq!(format!("{giga:.2}"), format!("{formula:.2}"), "r={r}: {giga}");
            counted("lvvit_s", &format!("mctf:r={r}"), all);
        }
    }
}
