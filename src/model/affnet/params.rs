//! The parameters of an AFFNet. Batch norms are folded into the convolutions before them.

use super::AffNetConfig;
use crate::{
    Error, Result, Tensor,
    backend::{Convolution, Depthwise, Frequency, Linear, Norm},
    model::{
        affnet::{Bottleneck, GROUPS},
        map::TryMap,
    },
};

/// The parameters of an inverted residual. The first layer's activation is the depthwise convolution's `before`.
#[derive(Clone, Debug)]
pub struct BottleneckParams<T> {
    /// 1x1 up.
    pub expand: Linear<T>,
    /// 3x3, with the activation before it and the one after.
    pub depthwise: Depthwise<T>,
    /// 1x1 down, without activation.
    pub reduce: Linear<T>,
    /// Whether the input is added to the output.
    pub residual: bool,
}

/// The parameters of one block: channels are mixed before positions.
#[derive(Clone, Debug)]
pub struct AffLayerParams<T> {
    /// Before the inverted residual.
    pub norm1: Norm<T>,
    /// The inverted residual.
    pub mlp: BottleneckParams<T>,
    /// Before the filter.
    pub norm2: Norm<T>,
    /// The filter.
    pub filter: Frequency<T>,
}

/// The parameters of a stage's body (the official code's `AFFBlock`).
#[derive(Clone, Debug)]
pub struct AffBlockParams<T> {
    /// The blocks.
    pub layers: Vec<AffLayerParams<T>>,
    /// After them.
    pub norm: Norm<T>,
    /// 1x1 after that, without activation.
    pub proj: Linear<T>,
    /// 1x1 over the stage's input and `proj`'s result, one layer for each of the two; the first has the bias.
    pub fusion: Option<[Linear<T>; 2]>,
}

/// The parameters of an AFFNet.
#[derive(Clone, Debug)]
pub struct AffNetParams<T> {
    /// The first convolution.
    pub stem: Convolution<T>,
    /// `layer_1` and `layer_2`.
    pub bottlenecks: [Vec<BottleneckParams<T>>; 2],
    /// `layer_3` to `layer_5`: what halves the grid, and the body.
    pub stages: Vec<(BottleneckParams<T>, AffBlockParams<T>)>,
    /// 1x1 before the mean.
    pub expand: Linear<T>,
    /// The classifier.
    pub head: Linear<T>,
}

impl<T, U> TryMap<T, U> for Convolution<T> {
    type Mapped = Convolution<U>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Convolution<U>> {
        let Self { weight, bias, stride, activation } = self;
        Ok(Convolution { weight: f(weight)?, bias: f(bias)?, stride, activation })
    }
}

impl<T, U> TryMap<T, U> for Depthwise<T> {
    type Mapped = Depthwise<U>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Depthwise<U>> {
        let Self { weight, bias, stride, before, activation } = self;
        Ok(Depthwise { weight: f(weight)?, bias: f(bias)?, stride, before, activation })
    }
}

impl<T, U> TryMap<T, U> for Frequency<T> {
    type Mapped = Frequency<U>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Frequency<U>> {
        let Self { w1, b1, w2, b2, activation, threshold } = self;
        Ok(Frequency { w1: f(w1)?, b1: f(b1)?, w2: f(w2)?, b2: f(b2)?, activation, threshold })
    }
}

impl<T, U> TryMap<T, U> for BottleneckParams<T> {
    type Mapped = BottleneckParams<U>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<BottleneckParams<U>> {
        Ok(BottleneckParams {
            expand: self.expand.try_map(f)?,
            depthwise: self.depthwise.try_map(f)?,
            reduce: self.reduce.try_map(f)?,
            residual: self.residual,
        })
    }
}

impl<T, U> TryMap<T, U> for AffLayerParams<T> {
    type Mapped = AffLayerParams<U>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<AffLayerParams<U>> {
        Ok(AffLayerParams {
            norm1: self.norm1.try_map(f)?,
            mlp: self.mlp.try_map(f)?,
            norm2: self.norm2.try_map(f)?,
            filter: self.filter.try_map(f)?,
        })
    }
}

impl<T> AffBlockParams<T> {
    /// The same parameters over the tensors that `f` makes of these.
    ///
    /// # Errors
    /// The first one that `f` returns.
    pub fn try_map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<AffBlockParams<U>> {
        let Self { layers, norm, proj, fusion } = self;
        let fusion = match fusion {
            Some([input, result]) => Some([input.try_map(f)?, result.try_map(f)?]),
            None => None,
        };
        Ok(AffBlockParams {
            layers: layers.into_iter().map(|layer| layer.try_map(f)).collect::<Result<_>>()?,
            norm: norm.try_map(f)?,
            proj: proj.try_map(f)?,
            fusion,
        })
    }
}

impl<T> AffNetParams<T> {
    /// The same parameters over the tensors that `f` makes of these.
    ///
    /// # Errors
    /// The first one that `f` returns.
    pub fn try_map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<AffNetParams<U>> {
        let mut all = |layers: Vec<BottleneckParams<T>>| -> Result<Vec<_>> {
            layers.into_iter().map(|layer| layer.try_map(f)).collect()
        };
        let [one, two] = self.bottlenecks;
        let bottlenecks = [all(one)?, all(two)?];
        let stages = self.stages.into_iter().map(|(down, body)| Ok((down.try_map(f)?, body.try_map(f)?)));
        Ok(AffNetParams {
            bottlenecks,
            stages: stages.collect::<Result<_>>()?,
            stem: self.stem.try_map(f)?,
            expand: self.expand.try_map(f)?,
            head: self.head.try_map(f)?,
        })
    }
}

/// Checks shapes against the numbers.
pub(super) struct Checker;

impl Checker {
    fn expect(name: &str, tensor: &Tensor, shape: &[usize]) -> Result<()> {
        if tensor.shape() == shape {
            return Ok(());
        }
        Err(Error::model(format!(
            "parameter {name} has shape {:?}, the numbers say {shape:?}",
            tensor.shape()
        )))
    }

    fn linear(name: &str, layer: &Linear<Tensor>, outputs: usize, inputs: usize) -> Result<()> {
        Self::expect(name, &layer.weight, &[outputs, inputs])?;
        layer.bias.as_ref().map_or(Ok(()), |bias| Self::expect(name, bias, &[outputs]))
    }

    fn norm(name: &str, norm: &Norm<Tensor>, width: usize) -> Result<()> {
        Self::expect(name, &norm.weight, &[width])?;
        norm.bias.as_ref().map_or(Ok(()), |bias| Self::expect(name, bias, &[width]))
    }

    fn bottleneck(name: &str, params: &BottleneckParams<Tensor>, numbers: Bottleneck) -> Result<()> {
        let Bottleneck { inputs, hidden, outputs, stride } = numbers;
        Self::linear(&format!("{name}.exp_1x1"), &params.expand, hidden, inputs)?;
        Self::expect(&format!("{name}.conv_3x3"), &params.depthwise.weight, &[9, hidden])?;
        Self::expect(&format!("{name}.conv_3x3"), &params.depthwise.bias, &[hidden])?;
        Self::linear(&format!("{name}.red_1x1"), &params.reduce, outputs, hidden)?;
        if params.depthwise.stride != stride || params.residual != numbers.residual() {
            return Err(Error::model(format!("{name} has another stride or residual than the numbers say")));
        }
        Ok(())
    }

    pub(super) fn check(config: &AffNetConfig, params: &AffNetParams<Tensor>) -> Result<()> {
        Self::expect("conv_1", &params.stem.weight, &[9 * config.channels, config.stem])?;
        Self::expect("conv_1", &params.stem.bias, &[config.stem])?;
        for (at, (layers, numbers)) in params.bottlenecks.iter().zip(&config.bottlenecks).enumerate() {
            if layers.len() != numbers.len() {
                return Err(Error::model(format!(
                    "layer_{} has {} inverted residuals, the numbers say {}",
                    at + 1,
                    layers.len(),
                    numbers.len()
                )));
            }
            for (i, (layer, &numbers)) in layers.iter().zip(numbers).enumerate() {
                Self::bottleneck(&format!("layer_{}.{i}", at + 1), layer, numbers)?;
            }
        }
        if params.stages.len() != config.stages.len() {
            return Err(Error::model(format!("{} stages with filters, expected 3", params.stages.len())));
        }
        for (at, ((down, body), stage)) in params.stages.iter().zip(&config.stages).enumerate() {
            let name = format!("layer_{}", at + 3);
            Self::bottleneck(&format!("{name}.0"), down, stage.down)?;
            if body.layers.len() != stage.blocks || body.fusion.is_some() != stage.fuse {
                return Err(Error::model(format!(
                    "{name} has {} blocks and {} fusion, the numbers say {} and {}",
                    body.layers.len(),
                    if body.fusion.is_some() { "a" } else { "no" },
                    stage.blocks,
                    if stage.fuse { "a fusion" } else { "none" }
                )));
            }
            let width = stage.down.outputs;
            Self::body(&name, body, width, stage.hidden)?;
        }
        Self::linear("conv_1x1_exp", &params.expand, config.features, config.width())?;
        Self::linear("classifier", &params.head, config.classes, config.features)
    }

    fn body(name: &str, body: &AffBlockParams<Tensor>, width: usize, hidden: usize) -> Result<()> {
        let s = width / GROUPS;
        for (i, layer) in body.layers.iter().enumerate() {
            let name = |part: &str| format!("{name}.1.global_rep.{i}.{part}");
            Self::norm(&name("norm1"), &layer.norm1, width)?;
            Self::norm(&name("norm2"), &layer.norm2, width)?;
            let numbers = Bottleneck { inputs: width, hidden, outputs: width, stride: 1 };
            Self::bottleneck(&name("mlp"), &layer.mlp, numbers)?;
            let filter = &layer.filter;
            for (part, tensor) in [("filter.w1", &filter.w1), ("filter.w2", &filter.w2)] {
                Self::expect(&name(part), tensor, &[2, GROUPS, s, s])?;
            }
            for (part, tensor) in [("filter.b1", &filter.b1), ("filter.b2", &filter.b2)] {
                Self::expect(&name(part), tensor, &[2, GROUPS, s])?;
            }
        }
        Self::norm(&format!("{name}.1.global_rep.{}", body.layers.len()), &body.norm, width)?;
        Self::linear(&format!("{name}.1.conv_proj"), &body.proj, width, width)?;
        for layer in body.fusion.iter().flatten() {
            Self::linear(&format!("{name}.1.fusion"), layer, width, width)?;
        }
        Ok(())
    }
}
