//! The parameters of reduction methods that come with some of their own, in the names of their official code.

use std::collections::{BTreeMap, BTreeSet};

use super::{Checkpoint, text::shape};
use crate::{
    Result, Tensor,
    backend::{Linear, Norm, Predictor},
    model::Reducers,
    reduction::SCALES,
};

/// Beginnings of the names that belong to reduction methods.
const PREFIXES: [&str; 3] = ["score_predictor.", "gumbel.", "msf."];

/// PyTorch's default, which the predictors' LayerNorm has whatever the model's.
const PREDICTOR_EPS: f32 = 1e-5;

/// Whether a name, free of wrappers, is that of a reduction method's parameter.
pub(super) fn is_reducer(name: &str) -> bool {
    PREFIXES.iter().any(|prefix| name.starts_with(prefix)) || layer_selector(name).is_some()
}

/// The block of a selector in an attention, `blocks.{i}.attn.gumbel.*`.
fn layer_selector(name: &str) -> Option<usize> {
    let (block, rest) = name.strip_prefix("blocks.")?.split_once('.')?;
    rest.strip_prefix("attn.gumbel.").and_then(|_| block.parse().ok())
}

/// The reduction methods' tensors of a checkpoint that nobody has asked for yet, by their names without wrappers.
struct Tensors<'a> {
    checkpoint: &'a Checkpoint,
    left: BTreeMap<&'a str, &'a str>,
}

impl Tensors<'_> {
    fn take(&mut self, name: &str, expected: &[usize]) -> Result<Tensor> {
        let Some(full) = self.left.remove(name) else {
            return Err(self.checkpoint.error(name, format!("missing; expected shape {}", shape(expected))));
        };
        let tensor = self.checkpoint.tensor(full)?;
        if tensor.shape() == expected {
            return Ok(tensor);
        }
        let what = format!("has shape {}; expected {}", shape(tensor.shape()), shape(expected));
        Err(self.checkpoint.error(full, what))
    }

    fn linear(&mut self, name: &str, outputs: usize, inputs: usize) -> Result<Linear<Tensor>> {
        Ok(Linear {
            weight: self.take(&format!("{name}.weight"), &[outputs, inputs])?,
            bias: Some(self.take(&format!("{name}.bias"), &[outputs])?),
        })
    }

    /// `score_predictor.{p}.*` of DynamicViT's official code, for a model of width `c`.
    fn predictor(&mut self, p: usize, c: usize) -> Result<Predictor<Tensor>> {
        let name = |part: &str| format!("score_predictor.{p}.{part}");
        Ok(Predictor {
            norm: Norm {
                weight: self.take(&name("in_conv.0.weight"), &[c])?,
                bias: Some(self.take(&name("in_conv.0.bias"), &[c])?),
                eps: PREDICTOR_EPS,
            },
            hidden: self.linear(&name("in_conv.1"), c, c)?,
            first: self.linear(&name("out_conv.0"), c / 2, c)?,
            second: self.linear(&name("out_conv.2"), c / 4, c / 2)?,
            last: self.linear(&name("out_conv.4"), 2, c / 4)?,
        })
    }
}

/// Reads the parameters `names` (without and with wrappers) for a model of width `width`.
///
/// # Errors
/// When one is missing, of another shape, or belongs to no method.
pub(super) fn read<'a>(
    checkpoint: &'a Checkpoint,
    names: impl Iterator<Item = (&'a str, &'a str)>,
    width: usize,
    depth: usize,
) -> Result<Reducers<Tensor>> {
    let mut tensors = Tensors { checkpoint, left: names.collect() };
    let number = |name: &str| name.strip_prefix("score_predictor.")?.split('.').next()?.parse::<usize>().ok();
    let mut predictors = Vec::new();
    while tensors.left.keys().filter_map(|name| number(name)).any(|p| p >= predictors.len()) {
        // A number that is left out is found missing here: predictors count from 0.
        predictors.push(tensors.predictor(predictors.len(), width)?);
    }
    let has = |tensors: &Tensors<'_>, prefix: &str| tensors.left.keys().any(|name| name.starts_with(prefix));
    let selector = has(&tensors, "gumbel.").then(|| tensors.linear("gumbel", 1, width)).transpose()?;
    let mut layer_selectors = Vec::new();
    if tensors.left.keys().any(|name| layer_selector(name).is_some()) {
        for block in 0..depth {
            layer_selectors.push(tensors.linear(&format!("blocks.{block}.attn.gumbel"), 1, width)?);
        }
    }
    let scale = |name: &str| name.strip_prefix("msf.")?.split('.').next()?.parse::<usize>().ok();
    let scales: BTreeSet<usize> = tensors.left.keys().filter_map(|name| scale(name)).collect();
    let mut projections = Vec::new();
    for scale in scales {
        if !SCALES.contains(&scale) {
            let name = tensors.left.values().find(|full| full.contains(&format!("msf.{scale}.")));
            let what = "is for windows of no scale that there is; scales go from 2 to 63";
            return Err(checkpoint.error(name.unwrap_or(&"msf"), what));
        }
        projections.push((scale, tensors.linear(&format!("msf.{scale}"), width, width)?));
    }
    match tensors.left.first_key_value() {
        Some((_, full)) => Err(checkpoint.error(full, "extra tensor, not part of a reduction method")),
        None => Ok(Reducers { predictors, selector, layer_selectors, projections }),
    }
}
