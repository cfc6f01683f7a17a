//! The feed-forward network of a block.

use super::{Backend, Epilogue, Linear, Norm};
use crate::{Result, model::Activation};

/// The feed-forward network of a block: LayerNorm, a layer with an activation, a layer back to the width.
#[derive(Debug)]
pub struct Mlp<'a, T> {
    /// The LayerNorm before it.
    pub norm: &'a Norm<T>,
    /// (hidden, C), or (2·hidden, C) for [`Activation::SwiGlu`].
    pub fc1: &'a Linear<T>,
    /// After the first layer.
    pub activation: Activation,
    /// Between activation and second layer, where a model has one.
    pub inner_norm: Option<&'a Norm<T>>,
    /// (C, hidden).
    pub fc2: &'a Linear<T>,
}

impl<T> Mlp<'_, T> {
    /// [`Backend::mlp`] by the operations it consists of.
    ///
    /// # Errors
    /// Those of the operations.
    pub fn composed<B: Backend<Tensor = T> + ?Sized>(
        &self,
        backend: &B,
        tokens: T,
        normed: Option<T>,
    ) -> Result<T> {
        let normed = match normed {
            Some(normed) => normed,
            None => backend.layer_norm(&tokens, self.norm)?,
        };
        let mut hidden = backend.linear(&normed, self.fc1.all(), Epilogue::Activation(self.activation))?;
        // What is not needed any more makes room at once.
        drop(normed);
        if let Some(norm) = self.inner_norm {
            hidden = backend.layer_norm(&hidden, norm)?;
        }
        backend.linear(&hidden, self.fc2.all(), Epilogue::AddTo(tokens))
    }
}
