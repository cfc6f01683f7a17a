//! The numbers of an AFFNet.

use crate::{
    Error, Result,
    backend::NormOver,
    image::{Interpolation, Transform},
    model::Activation,
};

/// Groups of the frequency filter, fixed in every published configuration.
pub const GROUPS: usize = 8;

/// An inverted residual (`MobileNetV2`): 1x1 up, 3x3 depthwise, 1x1 down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bottleneck {
    /// Channels in.
    pub inputs: usize,
    /// Channels between.
    pub hidden: usize,
    /// Channels out.
    pub outputs: usize,
    /// Of the depthwise convolution, 1 or 2.
    pub stride: usize,
}

impl Bottleneck {
    /// Whether the input is added to the output.
    pub fn residual(&self) -> bool {
        self.stride == 1 && self.inputs == self.outputs
    }
}

/// A stage with frequency filters: `layer_3` to `layer_5`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AffStage {
    /// The inverted residual that halves the grid.
    pub down: Bottleneck,
    /// Blocks of norm, inverted residual, norm and filter.
    pub blocks: usize,
    /// Channels between in the blocks' inverted residuals.
    pub hidden: usize,
    /// Whether the stage's input is fused with its result.
    pub fuse: bool,
}

/// The numbers of an AFFNet (arXiv 2307.14008).
#[derive(Clone, Debug, PartialEq)]
pub struct AffNetConfig {
    /// Input height and width in pixels: any, 256 as published.
    pub image: [usize; 2],
    /// Input channels: 3 or 1.
    pub channels: usize,
    /// Channels of the first convolution.
    pub stem: usize,
    /// `layer_1` and `layer_2`.
    pub bottlenecks: [Vec<Bottleneck>; 2],
    /// `layer_3` to `layer_5`.
    pub stages: [AffStage; 3],
    /// Channels before the mean: what the classifier reads.
    pub features: usize,
    /// Outputs of the classifier.
    pub classes: usize,
    /// The nonlinearity everywhere, in the filters too: [`Activation::Silu`] or [`Activation::Relu`].
    pub activation: Activation,
    /// The norms of the blocks and of the stages.
    pub norm: NormOver,
    /// Their epsilon.
    pub norm_eps: f32,
    /// λ of the filters' soft shrinkage.
    pub threshold: f32,
    /// How image files become inputs.
    pub transform: Transform,
    /// Class names, if the checkpoint brings them.
    pub labels: Option<Vec<String>>,
}

/// (name, first width's expansion, widths of `layer_1` to `layer_5`).
const NAMES: [(&str, usize, [usize; 5]); 3] = [
    ("affnet_et", 2, [32, 48, 64, 104, 144]),
    ("affnet_t", 4, [32, 48, 96, 160, 192]),
    ("affnet_s", 4, [32, 64, 128, 256, 320]),
];

/// The names that [`AffNetConfig::published`] knows.
pub fn names() -> impl Iterator<Item = &'static str> {
    NAMES.iter().map(|entry| entry.0)
}

impl AffNetConfig {
    /// The numbers of a published architecture: `affnet_et`, `affnet_t` or `affnet_s`.
    ///
    /// # Errors
    /// When nothing is called `name`; the error lists the names.
    pub fn published(name: &str) -> Result<Self> {
        let Some(&(_, expand, widths)) = NAMES.iter().find(|entry| entry.0 == name) else {
            let known = names().collect::<Vec<_>>().join(", ");
            return Err(Error::model(format!("architecture `{name}` is unknown; known are {known}")));
        };
        let stem = 16;
        let bottleneck = |inputs: usize, outputs, stride| Bottleneck {
            inputs,
            hidden: divisible(inputs * expand),
            outputs,
            stride,
        };
        let [one, two, three, four, five] = widths;
        let stage = |inputs, outputs, blocks| AffStage {
            down: bottleneck(inputs, outputs, 2),
            blocks,
            hidden: divisible(2 * outputs),
            fuse: true,
        };
        Ok(Self {
            image: [256; 2],
            channels: 3,
            stem,
            bottlenecks: [
                vec![bottleneck(stem, one, 1)],
                vec![bottleneck(one, two, 2), bottleneck(two, two, 1), bottleneck(two, two, 1)],
            ],
            stages: [stage(two, three, 2), stage(three, four, 4), stage(four, five, 3)],
            features: (4 * five).min(960),
            classes: 1000,
            activation: Activation::Silu,
            norm: NormOver::Image,
            norm_eps: 1e-5,
            threshold: 0.01,
            transform: transform(),
            labels: None,
        })
    }

    /// The grids of the feature maps: after the first convolution and after `layer_1` to `layer_5`.
    pub fn grids(&self) -> [[usize; 2]; 6] {
        let halved = |grid: [usize; 2]| grid.map(|side| side.div_ceil(2));
        let first = halved(self.image);
        let after = |grid, layers: &[Bottleneck]| {
            layers.iter().filter(|layer| layer.stride == 2).fold(grid, |grid, _| halved(grid))
        };
        let one = after(first, &self.bottlenecks[0]);
        let two = after(one, &self.bottlenecks[1]);
        let stages = self.stages.each_ref().map(|stage| [stage.down]);
        let three = after(two, &stages[0]);
        let four = after(three, &stages[1]);
        [first, one, two, three, four, after(four, &stages[2])]
    }

    /// Channels of `layer_5`.
    pub fn width(&self) -> usize {
        self.stages[2].down.outputs
    }

    /// Whether the numbers agree with each other.
    ///
    /// # Errors
    /// Names the first number that is impossible and the remedy.
    pub fn check(&self) -> Result<()> {
        let fail = |what: String| Err(Error::model(what));
        if self.image.contains(&0) {
            return fail(format!("an image of {}x{} pixels is empty", self.image[0], self.image[1]));
        }
        if self.channels != 1 && self.channels != 3 {
            return fail(format!(
                "{} input channels; only grey (1) and RGB (3) images can be read",
                self.channels
            ));
        }
        if !matches!(self.activation, Activation::Silu | Activation::Relu) {
            return fail(format!(
                "activation {}; an AFFNet has silu or relu, in its filters too",
                self.activation.name()
            ));
        }
        let layers = self.bottlenecks.iter().flatten().copied();
        let mut width = self.stem;
        for layer in layers.chain(self.stages.iter().map(|stage| stage.down)) {
            let Bottleneck { inputs, hidden, outputs, stride } = layer;
            if inputs != width || hidden == 0 || outputs == 0 || !matches!(stride, 1 | 2) {
                return fail(format!("an inverted residual {layer:?} follows a layer of {width} channels"));
            }
            width = outputs;
        }
        for stage in &self.stages {
            let width = stage.down.outputs;
            if !width.is_multiple_of(GROUPS) {
                return fail(format!("{width} channels are not {GROUPS} groups for the frequency filter"));
            }
            if stage.hidden == 0 {
                return fail("the blocks' inverted residuals have 0 channels between".to_owned());
            }
        }
        if self.stem == 0 || self.features == 0 || self.classes == 0 {
            return fail(format!(
                "a model of {} first channels, {} features and {} classes computes nothing",
                self.stem, self.features, self.classes
            ));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0) {
            return fail(format!("the norms' epsilon {} must be a positive number", self.norm_eps));
        }
        if !(self.threshold.is_finite() && self.threshold >= 0.0) {
            return fail(format!("the shrinkage {} must be a number from 0 on", self.threshold));
        }
        Ok(())
    }
}

/// To the nearest multiple of 8, and never below 0.9 of `channels`.
fn divisible(channels: usize) -> usize {
    let nearest = ((channels + 4) / 8 * 8).max(8);
    if nearest * 10 < channels * 9 { nearest + 8 } else { nearest }
}

/// RGB over 255 and nothing else. That the short side becomes 288 of which 256 are cut out, with a bilinear filter, is what the
/// configurations of `CVNets` say; AFFNet's own configuration is not published with its code.
pub(crate) fn transform() -> Transform {
    Transform {
        crop_pct: 256.0 / 288.0,
        interpolation: Interpolation::Bilinear,
        mean: vec![0.0; 3],
        std: vec![1.0; 3],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_rounded_as_mobilenet_rounds_them() {
        assert_eq!([1, 8, 11, 12, 20, 100].map(divisible), [8, 8, 16, 16, 24, 104]);
    }

    #[test]
    fn sides_are_halved_upwards() {
        let config = AffNetConfig { image: [225, 224], ..AffNetConfig::published("affnet_et").unwrap() };
        assert_eq!(config.grids(), [[113, 112], [113, 112], [57, 56], [29, 28], [15, 14], [8, 7]]);
        config.check().unwrap();
    }

    #[test]
    fn numbers_that_contradict_each_other_are_named() {
        let good = AffNetConfig::published("affnet_s").unwrap();
        let message = |change: fn(&mut AffNetConfig)| {
            let mut config = good.clone();
            change(&mut config);
            config.check().unwrap_err().to_string()
        };
        assert!(message(|c| c.activation = Activation::Gelu).contains("silu or relu"));
        assert!(message(|c| c.stages[1].down.inputs = 5).contains("follows a layer of 128 channels"));
        assert!(message(|c| c.stages[2].down.outputs = 100).contains("100 channels are not 8 groups"));
        assert!(message(|c| c.threshold = f32::NAN).contains("shrinkage NaN"));
        assert!(message(|c| c.image = [0, 5]).contains("0x5 pixels is empty"));
        assert!(AffNetConfig::published("affnet").unwrap_err().to_string().contains("affnet_et, affnet_t"));
    }
}
