//! Parameters for counting and measuring without a checkpoint.

use super::{
    AffBlockParams, AffLayerParams, AffNetConfig, AffNetParams, Bottleneck, BottleneckParams, GROUPS,
};
use crate::{
    Tensor,
    backend::{Convolution, Depthwise, Frequency, Linear, Norm},
};

/// Random parameters of the right shapes and of a sane scale: what a model costs does not depend on what it knows. The same
/// `seed` gives the same parameters.
pub fn random_params(config: &AffNetConfig, seed: u64) -> AffNetParams<Tensor> {
    let mut random = Random { state: seed ^ 0x9E37_79B9_7F4A_7C15, config };
    let stem_inputs = 9 * config.channels;
    let stem = Convolution {
        weight: random.tensor(&[stem_inputs, config.stem], scale(stem_inputs)),
        bias: Tensor::zeros(&[config.stem]),
        stride: 2,
        activation: Some(config.activation),
    };
    let bottlenecks = config
        .bottlenecks
        .each_ref()
        .map(|layers| layers.iter().map(|&layer| random.bottleneck(layer)).collect());
    let stages = config.stages.iter().map(|stage| {
        let down = random.bottleneck(stage.down);
        let width = stage.down.outputs;
        let layers = (0..stage.blocks).map(|_| random.layer(width, stage.hidden)).collect();
        let body = AffBlockParams {
            layers,
            norm: random.norm(width),
            proj: random.linear(width, width),
            fusion: stage.fuse.then(|| {
                let [first, second] = [random.linear(width, width), random.linear(width, width)];
                [first, Linear { bias: None, ..second }]
            }),
        };
        (down, body)
    });
    let stages = stages.collect();
    AffNetParams {
        stem,
        bottlenecks,
        stages,
        expand: random.linear(config.features, config.width()),
        head: random.linear(config.classes, config.features),
    }
}

struct Random<'a> {
    state: u64,
    config: &'a AffNetConfig,
}

/// What keeps the size of what passes a layer of so many inputs.
fn scale(inputs: usize) -> f32 {
    (inputs as f32).powf(-0.5)
}

impl Random<'_> {
    fn uniform(&mut self) -> f32 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 40) as f32 / (1_u32 << 24) as f32 - 0.5
    }

    /// Sums of uniform numbers are normal enough here.
    fn tensor(&mut self, shape: &[usize], scale: f32) -> Tensor {
        let mut tensor = Tensor::zeros(shape);
        for value in tensor.data_mut() {
            *value = scale * (self.uniform() + self.uniform() + self.uniform()) * 2.0;
        }
        tensor
    }

    fn linear(&mut self, outputs: usize, inputs: usize) -> Linear<Tensor> {
        Linear {
            weight: self.tensor(&[outputs, inputs], scale(inputs)),
            bias: Some(self.tensor(&[outputs], 0.1)),
        }
    }

    fn norm(&mut self, width: usize) -> Norm<Tensor> {
        let mut weight = self.tensor(&[width], 0.1);
        weight.data_mut().iter_mut().for_each(|value| *value += 1.0);
        Norm { weight, bias: Some(self.tensor(&[width], 0.1)), eps: self.config.norm_eps }
    }

    fn bottleneck(&mut self, layer: Bottleneck) -> BottleneckParams<Tensor> {
        BottleneckParams {
            expand: self.linear(layer.hidden, layer.inputs),
            depthwise: Depthwise {
                weight: self.tensor(&[9, layer.hidden], scale(9)),
                bias: self.tensor(&[layer.hidden], 0.1),
                stride: layer.stride,
                before: Some(self.config.activation),
                activation: Some(self.config.activation),
            },
            reduce: self.linear(layer.outputs, layer.hidden),
            residual: layer.residual(),
        }
    }

    fn layer(&mut self, width: usize, hidden: usize) -> AffLayerParams<Tensor> {
        let s = width / GROUPS;
        let numbers = Bottleneck { inputs: width, hidden, outputs: width, stride: 1 };
        AffLayerParams {
            norm1: self.norm(width),
            mlp: self.bottleneck(numbers),
            norm2: self.norm(width),
            filter: Frequency {
                w1: self.tensor(&[2, GROUPS, s, s], scale(2 * s)),
                b1: self.tensor(&[2, GROUPS, s], 0.1),
                w2: self.tensor(&[2, GROUPS, s, s], scale(2 * s)),
                b2: self.tensor(&[2, GROUPS, s], 0.1),
                activation: self.config.activation,
                threshold: self.config.threshold,
            },
        }
    }
}
