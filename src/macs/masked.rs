//! Multiply-adds of models with holes, as the paper of `SViTE` counts them (arXiv 2106.04533).

use crate::{
    Result, Tensor,
    backend::Linear,
    connectivity::erk_densities,
    model::{VitConfig, VitParams},
};

/// Which share of a model's weights is there, layer by layer, of those that sparse training masks: patch projection, the four
/// layers of each block, head. Of layers that were cut down, the share of what they were before.
#[derive(Clone, Debug, PartialEq)]
pub struct Densities {
    /// The patch projection.
    pub patch: f64,
    /// Queries, keys and values; projection; both layers of the MLP.
    pub blocks: Vec<[f64; 4]>,
    /// The head; 1 without one.
    pub head: f64,
}

impl Densities {
    /// What sparse training at `density` begins with ([`erk_densities`]), and keeps.
    ///
    /// # Errors
    /// When `density` is not above 0 and at most 1, or the model computes nothing.
    pub fn erk(config: &VitConfig, density: f64) -> Result<Self> {
        let [height, width] = config.patch;
        let mut shapes = vec![vec![config.width, config.channels, height, width]];
        for _ in 0..config.depth {
            shapes.extend(block_shapes(config).map(|shape| shape.to_vec()));
        }
        if config.classes > 0 {
            shapes.push(vec![config.classes, config.width]);
        }
        let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
        let all = erk_densities(&shapes, density)?;
        let (blocks, _) = all[1..].as_chunks();
        let blocks = blocks[..config.depth].to_vec();
        Ok(Self { patch: all[0], blocks, head: all.get(1 + 4 * config.depth).copied().unwrap_or(1.0) })
    }

    /// What is not zero in a model's parameters.
    pub fn of(config: &VitConfig, params: &VitParams<Tensor>) -> Self {
        let share = |layer: &Linear<Tensor>, [rows, columns]: [usize; 2]| {
            let there = layer.weight.data().iter().filter(|&&v| v != 0.0).count();
            there as f64 / (rows * columns).max(1) as f64
        };
        let own = |layer: &Linear<Tensor>| share(layer, [layer.weight.dim(0), layer.weight.width()]);
        let [qkv, proj, fc1, fc2] = block_shapes(config);
        let blocks = params.blocks.iter().map(|block| {
            [share(&block.qkv, qkv), share(&block.proj, proj), share(&block.fc1, fc1), share(&block.fc2, fc2)]
        });
        let (patch, blocks) = (own(&params.patch), blocks.collect());
        Self { patch, blocks, head: params.head.as_ref().map_or(1.0, own) }
    }

    /// The share of all these weights that is there.
    pub fn total(&self, config: &VitConfig) -> f64 {
        self.sum(config, 1.0, 1.0) / Self::dense(config).sum(config, 1.0, 1.0)
    }

    /// The share of block `layer`'s.
    pub fn block(&self, config: &VitConfig, layer: usize) -> f64 {
        let sizes = block_shapes(config).map(|[rows, columns]| (rows * columns) as f64);
        let there: f64 = self.blocks[layer].iter().zip(sizes).map(|(density, size)| density * size).sum();
        there / sizes.iter().sum::<f64>()
    }

    /// Multiply-adds of one image with `tokens` tokens in all blocks, those with absent weights left out: the paper's count.
    /// Attention has its products at full width; it takes dedicated hardware to come near this number where single weights are
    /// absent.
    pub fn macs(&self, config: &VitConfig, tokens: usize) -> f64 {
        let [rows, columns] = config.grid();
        let n = tokens as f64;
        let products = (config.depth * 2 * config.width) as f64 * n * n;
        products + self.sum(config, (rows * columns) as f64, n)
    }

    fn dense(config: &VitConfig) -> Self {
        Self { patch: 1.0, blocks: vec![[1.0; 4]; config.depth], head: 1.0 }
    }

    /// The weights that are there, each as often as a row passes it: `patch` rows, `block` rows, one of the head.
    fn sum(&self, config: &VitConfig, patch: f64, block: f64) -> f64 {
        let pixels = config.channels * config.patch[0] * config.patch[1];
        let sizes = block_shapes(config).map(|[rows, columns]| (rows * columns) as f64);
        let blocks = self.blocks.iter().flat_map(|layers| layers.iter().zip(sizes));
        patch * self.patch * (config.width * pixels) as f64
            + block * blocks.map(|(density, size)| density * size).sum::<f64>()
            + self.head * (config.classes * config.width) as f64
    }
}

/// The shapes of a whole block's layers.
fn block_shapes(config: &VitConfig) -> [[usize; 2]; 4] {
    let (c, hidden) = (config.width, config.hidden);
    [[3 * c, c], [c, c], [config.fc1_rows(), c], [c, hidden]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::arch;

    #[test]
    fn holes_are_counted_in_what_was_there_before() {
        let config = arch::config("s2vite_tiny").unwrap();
        let params = arch::random_params(&config, 1);
        let densities = Densities::of(&config, &params);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-3, "{a} {b}");
        near(densities.blocks[3][0], 2.0 / 3.0);
        near(densities.blocks[3][2], 537.0 / 768.0);
        near(densities.patch, 1.0);
        near(densities.block(&config, 3), (4.0 * 2.0 / 3.0 + 8.0 * 537.0 / 768.0) / 12.0);
        let whole = arch::config("deit_tiny").unwrap();
        for density in [0.05, 0.6, 1.0] {
            let total = Densities::erk(&whole, density).unwrap().total(&whole);
            assert!((total - density).abs() < 1e-12, "{total}");
        }
    }
}
