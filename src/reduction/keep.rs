//! Shares of the tokens that blocks keep: what EViT, BAT and MSTM are told alike.

use std::fmt;

use super::{Host, quarter_blocks, spec, unsuitable};
use crate::Result;

/// Which share of the tokens a block keeps.
#[derive(Clone, Debug, PartialEq)]
pub enum Keep {
    /// This share in the reducing blocks.
    Rate(f64),
    /// One share per block; 1 (or a missing entry) reduces nothing there.
    PerBlock(Vec<f64>),
}

impl Keep {
    /// Tokens kept of `n` at a share: the ceiling of the product, both in double precision.
    pub(super) fn count(share: f64, n: usize) -> usize {
        ((share * n as f64).ceil() as usize).min(n)
    }

    /// `keep=...`, and the `layers=...` that a single share applies to.
    pub(super) fn from_fields(fields: &mut spec::Fields<'_>) -> Result<(Option<Self>, Option<Vec<usize>>)> {
        let rate = |v: &str| v.parse().ok().filter(|&k: &f64| k > 0.0 && k <= 1.0);
        let keep =
            fields.read("keep", "a share above 0 and up to 1, or one per block such as [1,0.7,1]", |v| {
                match spec::list(v) {
                    Some(items) => {
                        items.into_iter().map(rate).collect::<Option<Vec<_>>>().map(Self::PerBlock)
                    }
                    None => rate(v).map(Self::Rate),
                }
            })?;
        let layers = fields.layers()?;
        if matches!(keep, Some(Self::PerBlock(_))) && layers.is_some() {
            return Err(fields.error("keep=[...] says what each block does already: leave layers out"));
        }
        Ok((keep, layers))
    }

    /// The share that block `layer` keeps; a single share holds in `layers`, by default at a quarter, half and three quarters
    /// of the depth.
    pub(super) fn share(&self, layers: Option<&[usize]>, layer: usize, depth: usize) -> f64 {
        match self {
            Self::PerBlock(rates) => rates.get(layer).copied().unwrap_or(1.0),
            &Self::Rate(rate) => {
                let reduces = match layers {
                    Some(layers) => layers.contains(&layer),
                    None => quarter_blocks(depth).contains(&layer),
                };
                if reduces { rate } else { 1.0 }
            }
        }
    }

    /// Refuses hosts without a class token, shares that are none, and blocks that do not exist; `listed` is how many blocks a
    /// list of the method's own names.
    pub(super) fn check(
        &self,
        method: &dyn fmt::Display,
        layers: Option<&[usize]>,
        listed: usize,
        host: &Host,
    ) -> Result<()> {
        if !host.class_token {
            return Err(unsuitable(
                method,
                "needs a class token to score the patches, and the model has none",
            ));
        }
        let shares = match self {
            Self::Rate(rate) => std::slice::from_ref(rate),
            Self::PerBlock(rates) => rates,
        };
        if let Some(share) = shares.iter().find(|&&share| !(share > 0.0 && share <= 1.0)) {
            return Err(unsuitable(method, format!("keeps a share of {share}; use one above 0 and up to 1")));
        }
        let in_shares = if let Self::PerBlock(rates) = self { rates.len() } else { 0 };
        let last_listed = listed.max(in_shares).checked_sub(1);
        let named = layers.into_iter().flatten().copied().chain(last_listed);
        match named.max().filter(|&layer| layer >= host.depth) {
            Some(layer) => Err(unsuitable(
                method,
                format!("block {layer} does not exist, the model has {}: blocks count from 0", host.depth),
            )),
            None => Ok(()),
        }
    }

    /// `keep=...` as it is written.
    pub(super) fn written(&self) -> String {
        match self {
            Self::Rate(rate) => format!("keep={rate}"),
            Self::PerBlock(rates) => {
                let items: Vec<_> = rates.iter().map(ToString::to_string).collect();
                format!("keep=[{}]", items.join(","))
            }
        }
    }
}
