//! T2T-ViT's stages before the blocks: tokens of overlapping windows attend to each other and become narrower.

use super::{Activation, TokensAttention, Vit, map::TryMap};
use crate::{
    Error, Result, Tensor,
    backend::{Backend, Epilogue, Heads, Linear, Norm, ScoreRequest},
};

/// One stage: what windows see, I values, becomes tokens of T values.
#[derive(Clone, Debug)]
pub struct StageParams<T> {
    /// LayerNorm of the inputs, (I). The first stage's inputs are in the order of
    /// [`Backend::unfold_images`], the second's in that of
    /// [`Backend::unfold`]; so for `packed`.
    pub norm1: Norm<T>,
    /// Queries, keys and values, (3T, I), in this order; with random features keys, queries and values.
    pub packed: Linear<T>,
    /// The random features of a performer, (m, T), in `f32` whatever the type of the other weights.
    pub features: Option<T>,
    /// Output projection of the attention, (T, T).
    pub proj: Linear<T>,
    /// LayerNorm before the MLP, (T).
    pub norm2: Norm<T>,
    /// First layer of the MLP, (T, T).
    pub fc1: Linear<T>,
    /// Second layer of the MLP, (T, T).
    pub fc2: Linear<T>,
}

impl<T> StageParams<T> {
    pub(super) fn try_map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<StageParams<U>> {
        Ok(StageParams {
            norm1: self.norm1.try_map(f)?,
            packed: self.packed.try_map(f)?,
            features: self.features.map(&mut *f).transpose()?,
            proj: self.proj.try_map(f)?,
            norm2: self.norm2.try_map(f)?,
            fc1: self.fc1.try_map(f)?,
            fc2: self.fc2.try_map(f)?,
        })
    }

    pub(super) fn tensors(&self) -> impl Iterator<Item = &T> {
        let norms = [&self.norm1, &self.norm2].into_iter();
        let layers = [&self.packed, &self.proj, &self.fc1, &self.fc2].into_iter();
        norms
            .flat_map(|norm| std::iter::once(&norm.weight).chain(&norm.bias))
            .chain(layers.flat_map(|layer| std::iter::once(&layer.weight).chain(&layer.bias)))
            .chain(&self.features)
    }
}

impl StageParams<Tensor> {
    /// Checks every shape against the numbers.
    pub(super) fn check(
        &self,
        number: usize,
        inputs: usize,
        width: usize,
        attention: TokensAttention,
        linear: impl Fn(&str, &Linear<Tensor>, usize, usize) -> Result<()>,
    ) -> Result<()> {
        let name = |part: &str| format!("stem.{number}.{part}");
        let expect = |part: &str, tensor: &Tensor, shape: &[usize]| {
            if tensor.shape() == shape {
                return Ok(());
            }
            let found = tensor.shape();
            Err(Error::model(format!(
                "parameter {} has shape {found:?}, the numbers say {shape:?}",
                name(part)
            )))
        };
        for (part, norm, width) in [("norm1", &self.norm1, inputs), ("norm2", &self.norm2, width)] {
            for tensor in std::iter::once(&norm.weight).chain(&norm.bias) {
                expect(part, tensor, &[width])?;
            }
        }
        linear(&name("packed"), &self.packed, 3 * width, inputs)?;
        for (part, layer) in [("proj", &self.proj), ("fc1", &self.fc1), ("fc2", &self.fc2)] {
            linear(&name(part), layer, width, width)?;
        }
        match (&self.features, attention) {
            (None, TokensAttention::Transformer) => Ok(()),
            (Some(w), TokensAttention::Performer { features }) => expect("features", w, &[features, width]),
            _ => Err(Error::model(format!("parameter {} is there for a performer only", name("features")))),
        }
    }
}

impl<B: Backend> Vit<B> {
    /// The tokens (B, N, T) that a stage makes of rows (B, N, I). The values take the part of a residual: the widths differ.
    pub(super) fn stage(&self, rows: B::Tensor, stage: &StageParams<B::Tensor>) -> Result<B::Tensor> {
        let backend = self.backend();
        let inputs = backend.shape(&rows).last().copied().unwrap_or(1);
        let normed = backend.layer_norm(&rows, &stage.norm1)?;
        // What is not needed any more makes room at once, here and below.
        drop(rows);
        let packed = backend.linear(&normed, stage.packed.all(), Epilogue::None)?;
        drop(normed);
        let width = backend.shape(&packed).last().copied().unwrap_or(0) / 3;
        let values = backend.columns(&packed, 2 * width..3 * width)?;
        let context = if let Some(features) = &stage.features {
            backend.performer(&packed, features)?
        } else {
            // The inputs' width, not the heads'.
            let scale = (inputs as f64).powf(-0.5) as f32;
            let heads = Heads { packed: &packed, heads: 1, head_dim: width, scale, sizes: None };
            backend.attention(&heads, ScoreRequest::default())?.0
        };
        drop(packed);
        let tokens = backend.linear(&context, stage.proj.all(), Epilogue::AddTo(values))?;
        drop(context);
        let normed = backend.layer_norm(&tokens, &stage.norm2)?;
        let hidden = backend.linear(&normed, stage.fc1.all(), Epilogue::Activation(Activation::Gelu))?;
        drop(normed);
        backend.linear(&hidden, stage.fc2.all(), Epilogue::AddTo(tokens))
    }
}
