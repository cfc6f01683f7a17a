//! Multiply-adds of AFFNets.

use crate::model::affnet::{AffNetConfig, Bottleneck, GROUPS};

/// How figures for AFFNets are counted. Both count a multiply-add of a convolution or an affine layer once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GridConvention {
    /// What the official code prints ("theoretical MACs", and the paper's FLOPs): a filter is `5·N·floor(ln N)·C` for both
    /// transforms, with the natural logarithm, and `4·N·C·S` for its two complex layers, half of the bins at four real
    /// products each; norms and the filters' elementwise work are free.
    Theoretical,
    /// fvcore: a filter is the eight real products a bin that its code runs, `8·C·S·H·(W/2 + 1)`; the transforms are free;
    /// batch norms are two per element, the other norms five.
    Fvcore,
}

/// Counts of a part of an AFFNet, per image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GridMacs {
    /// Convolutions and affine layers.
    pub products: u64,
    /// Elements behind a convolution, which a batch norm normalises where it is not folded.
    pub batch_normalised: u64,
    /// Elements that pass another norm.
    pub normalised: u64,
    /// Products of the filters' layers.
    pub filters: u64,
    /// The filters as [`GridConvention::Theoretical`] has them, transforms included.
    pub filters_theoretical: u64,
}

impl GridMacs {
    /// The sum that the official code or fvcore would print.
    pub fn total(&self, convention: GridConvention) -> u64 {
        match convention {
            GridConvention::Theoretical => self.products + self.filters_theoretical,
            GridConvention::Fvcore => {
                self.products + self.filters + 2 * self.batch_normalised + 5 * self.normalised
            }
        }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            products: self.products + other.products,
            batch_normalised: self.batch_normalised + other.batch_normalised,
            normalised: self.normalised + other.normalised,
            filters: self.filters + other.filters,
            filters_theoretical: self.filters_theoretical + other.filters_theoretical,
        }
    }

    fn convolution(products_a_position: usize, outputs: usize, positions: usize) -> Self {
        Self {
            products: (products_a_position * positions) as u64,
            batch_normalised: (outputs * positions) as u64,
            ..Self::default()
        }
    }

    fn bottleneck(layer: Bottleneck, before: usize, after: usize) -> Self {
        let Bottleneck { inputs, hidden, outputs, .. } = layer;
        Self::convolution(inputs * hidden, hidden, before)
            .plus(Self::convolution(9 * hidden, hidden, after))
            .plus(Self::convolution(hidden * outputs, outputs, after))
    }

    fn norm(elements: usize) -> Self {
        Self { normalised: elements as u64, ..Self::default() }
    }

    fn filter([height, width]: [usize; 2], channels: usize) -> Self {
        let (n, group) = (height * width, channels / GROUPS);
        let logarithm = (n as f64).ln() as u64;
        Self {
            filters: (8 * channels * group * height * (width / 2 + 1)) as u64,
            filters_theoretical: 5 * n as u64 * logarithm * channels as u64
                + (4 * n * channels * group) as u64,
            ..Self::default()
        }
    }

    /// The parts that [`GridMacs::of`] tells apart.
    pub const PARTS: usize = 7;

    /// Counts one image through an AFFNet: the first convolution, `layer_1` to `layer_5`, and what follows the last.
    pub fn of(config: &AffNetConfig) -> [(&'static str, Self); Self::PARTS] {
        let grids = config.grids();
        let positions = grids.map(|[height, width]| height * width);
        let stem = Self::convolution(9 * config.channels * config.stem, config.stem, positions[0]);
        let mut parts = [Self::default(); 5];
        for (at, layers) in config.bottlenecks.iter().enumerate() {
            for &layer in layers {
                // The first layer that halves the grid stands where the grid changes.
                let before = if layer.stride == 2 { positions[at] } else { positions[at + 1] };
                parts[at] = parts[at].plus(Self::bottleneck(layer, before, positions[at + 1]));
            }
        }
        for (at, stage) in config.stages.iter().enumerate() {
            let (grid, before, n) = (grids[at + 3], positions[at + 2], positions[at + 3]);
            let c = stage.down.outputs;
            let mlp = Bottleneck { inputs: c, hidden: stage.hidden, outputs: c, stride: 1 };
            let block = Self::norm(2 * n * c).plus(Self::bottleneck(mlp, n, n)).plus(Self::filter(grid, c));
            let mut sum = Self::bottleneck(stage.down, before, n).plus(Self::norm(n * c));
            for _ in 0..stage.blocks {
                sum = sum.plus(block);
            }
            sum = sum.plus(Self::convolution(c * c, c, n));
            if stage.fuse {
                sum = sum.plus(Self::convolution(2 * c * c, c, n));
            }
            parts[at + 2] = sum;
        }
        let head = Self::convolution(config.width() * config.features, config.features, positions[5])
            .plus(Self { products: (config.features * config.classes) as u64, ..Self::default() });
        let [one, two, three, four, five] = parts;
        [
            ("conv_1", stem),
            ("layer_1", one),
            ("layer_2", two),
            ("layer_3", three),
            ("layer_4", four),
            ("layer_5", five),
            ("head", head),
        ]
    }

    /// Everything added up.
    pub fn sum(config: &AffNetConfig) -> Self {
        Self::of(config).iter().fold(Self::default(), |sum, (_, part)| sum.plus(*part))
    }
}
