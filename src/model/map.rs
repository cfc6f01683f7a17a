//! Parameters over one kind of tensor become parameters over another: from the host to a device.

use super::{BlockParams, PoolParams, Reducers, VitParams};
use crate::{
    Result,
    backend::{Linear, Norm, Predictor},
};

/// Applies `f` to every tensor.
pub(crate) trait TryMap<T, U> {
    type Mapped;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Self::Mapped>;
}

impl<T, U> TryMap<T, U> for Linear<T> {
    type Mapped = Linear<U>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Linear<U>> {
        Ok(Linear { weight: f(self.weight)?, bias: self.bias.map(&mut *f).transpose()? })
    }
}

impl<T, U> TryMap<T, U> for Norm<T> {
    type Mapped = Norm<U>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Norm<U>> {
        Ok(Norm { weight: f(self.weight)?, bias: self.bias.map(&mut *f).transpose()?, eps: self.eps })
    }
}

impl<T, U, P: TryMap<T, U>> TryMap<T, U> for Option<P> {
    type Mapped = Option<P::Mapped>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Self::Mapped> {
        self.map(|part| part.try_map(f)).transpose()
    }
}

impl<T> BlockParams<T> {
    fn try_map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<BlockParams<U>> {
        Ok(BlockParams {
            norm1: self.norm1.try_map(f)?,
            qkv: self.qkv.try_map(f)?,
            q_norm: self.q_norm.try_map(f)?,
            k_norm: self.k_norm.try_map(f)?,
            attn_norm: self.attn_norm.try_map(f)?,
            proj: self.proj.try_map(f)?,
            norm2: self.norm2.try_map(f)?,
            fc1: self.fc1.try_map(f)?,
            mlp_norm: self.mlp_norm.try_map(f)?,
            fc2: self.fc2.try_map(f)?,
        })
    }
}

impl<T, U> TryMap<T, U> for PoolParams<T> {
    type Mapped = PoolParams<U>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<PoolParams<U>> {
        Ok(PoolParams {
            latent: f(self.latent)?,
            qkv: self.qkv.try_map(f)?,
            q_norm: self.q_norm.try_map(f)?,
            k_norm: self.k_norm.try_map(f)?,
            proj: self.proj.try_map(f)?,
            norm: self.norm.try_map(f)?,
            fc1: self.fc1.try_map(f)?,
            fc2: self.fc2.try_map(f)?,
        })
    }
}

impl<T, U> TryMap<T, U> for Predictor<T> {
    type Mapped = Predictor<U>;
    fn try_map(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Predictor<U>> {
        Ok(Predictor {
            norm: self.norm.try_map(f)?,
            hidden: self.hidden.try_map(f)?,
            first: self.first.try_map(f)?,
            second: self.second.try_map(f)?,
            last: self.last.try_map(f)?,
        })
    }
}

impl<T> Reducers<T> {
    /// The same parameters over the tensors that `f` makes of these.
    ///
    /// # Errors
    /// The first one that `f` returns.
    pub fn try_map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<Reducers<U>> {
        let predictors = self.predictors.into_iter().map(|predictor| predictor.try_map(f));
        let predictors = predictors.collect::<Result<_>>()?;
        let selector = self.selector.try_map(f)?;
        let layer_selectors = self.layer_selectors.into_iter().map(|selector| selector.try_map(f));
        let layer_selectors = layer_selectors.collect::<Result<_>>()?;
        let projections = self.projections.into_iter();
        let projections = projections.map(|(scale, projection)| Ok((scale, projection.try_map(f)?)));
        Ok(Reducers {
            predictors,
            selector,
            layer_selectors,
            projections: projections.collect::<Result<_>>()?,
        })
    }
}

impl<T> VitParams<T> {
    /// The same parameters over the tensors that `f` makes of these.
    ///
    /// # Errors
    /// The first one that `f` returns.
    pub fn try_map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<VitParams<U>> {
        Ok(VitParams {
            stem: self.stem.try_map(f)?,
            patch: self.patch.try_map(f)?,
            prefix: self.prefix.map(&mut *f).transpose()?,
            position: self.position.map(&mut *f).transpose()?,
            norm_pre: self.norm_pre.try_map(f)?,
            blocks: self.blocks.into_iter().map(|block| block.try_map(f)).collect::<Result<_>>()?,
            norm: self.norm.try_map(f)?,
            attn_pool: self.attn_pool.try_map(f)?,
            fc_norm: self.fc_norm.try_map(f)?,
            head: self.head.try_map(f)?,
            head_dist: self.head_dist.try_map(f)?,
            aux_head: self.aux_head.try_map(f)?,
            reducers: self.reducers.try_map(f)?,
        })
    }
}
