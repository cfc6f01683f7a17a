//! Masks of sparse training in a checkpoint (SViTE, S2ViTE): `mask/NAME` beside a parameter NAME, `blocks.{i}.heads` and
//! `blocks.{i}.neurons` of whole heads and neurons.
//!
//! Masked weights become zero. Masked heads and neurons are cut off, which changes no output: a neuron's column of the MLP's
//! second layer is zero; a head without weights has its biases for queries, keys and values of every token, so it puts out its
//! value bias whatever the attention, and what the projection makes of that is folded into the projection's bias.

use std::collections::{BTreeMap, BTreeSet};

use super::{Checkpoint, text::shape};
use crate::{
    Result, Tensor,
    backend::Linear,
    model::{BlockParams, BlockSize, VitConfig, VitParams},
};

/// The masks of a file.
#[derive(Debug, Default)]
pub(super) struct Masks {
    /// By the parameter's name in the file.
    weights: BTreeMap<String, Vec<bool>>,
    heads: BTreeMap<usize, Vec<bool>>,
    neurons: BTreeMap<usize, Vec<bool>>,
}

impl Masks {
    /// Takes the masks out of a checkpoint: they, and the rest of it.
    ///
    /// # Errors
    /// When a mask is none, masks something that is not there, or masks it twice.
    pub(super) fn take(checkpoint: &Checkpoint) -> Result<(Self, Checkpoint)> {
        let mut masks = Self::default();
        let mut taken = BTreeSet::new();
        for name in checkpoint.names() {
            if let Some(parameter) = name.strip_prefix("mask/") {
                if checkpoint.shape(parameter) != checkpoint.shape(name) {
                    let what = match checkpoint.shape(parameter) {
                        None => format!("masks `{parameter}`, which is not there; name masks mask/PARAMETER"),
                        Some(masked) => {
                            format!("does not have the shape of what it masks, {}", shape(masked))
                        }
                    };
                    return Err(checkpoint.error(name, what));
                }
                masks.weights.insert(parameter.to_owned(), checkpoint.mask(name)?);
            } else if let Some((block, what)) = structured(name) {
                let masked = if what == "heads" { &mut masks.heads } else { &mut masks.neurons };
                if masked.insert(block, checkpoint.mask(name)?).is_some() {
                    return Err(checkpoint.error(name, format!("masks the {what} of block {block} again")));
                }
            } else {
                continue;
            }
            taken.insert(name.to_owned());
        }
        let rest = if taken.is_empty() { checkpoint.clone() } else { checkpoint.without(&taken) };
        Ok((masks, rest))
    }

    /// Makes the masked values of parameter `name` zero.
    pub(super) fn apply(&self, name: &str, tensor: &mut Tensor) {
        let Some(mask) = self.weights.get(name) else { return };
        tensor.data_mut().iter_mut().zip(mask).filter(|(_, there)| !**there).for_each(|(v, _)| *v = 0.0);
    }

    /// Cuts masked heads and neurons off. One of each is left to every block, without weights if need be; heads and neurons
    /// that a LayerNorm looks at together are not cut off but only without weights.
    ///
    /// # Errors
    /// When a mask belongs to no block or has another length than the block has heads or neurons.
    pub(super) fn compact(
        &self,
        checkpoint: &Checkpoint,
        config: &mut VitConfig,
        params: &mut VitParams<Tensor>,
    ) -> Result<()> {
        if self.heads.is_empty() && self.neurons.is_empty() {
            return Ok(());
        }
        let (depth, all) = (config.depth, BlockSize { heads: config.heads, hidden: config.hidden });
        for (masks, what, expected) in
            [(&self.heads, "heads", all.heads), (&self.neurons, "neurons", all.hidden)]
        {
            for (block, mask) in masks {
                let name = format!("blocks.{block}.{what}");
                if *block >= depth {
                    return Err(checkpoint
                        .error(&name, format!("masks a block that is not there; there are {depth}")));
                }
                if mask.len() != expected {
                    let found = mask.len();
                    return Err(
                        checkpoint.error(&name, format!("masks {found} {what}; the block has {expected}"))
                    );
                }
            }
        }
        let (head_dim, gates) = (config.head_dim(), config.gates());
        for (i, block) in params.blocks.iter_mut().enumerate() {
            let mut size = all;
            if let Some(mask) = self.heads.get(&i) {
                size.heads = cut_heads(block, mask, head_dim)?;
            }
            if let Some(mask) = self.neurons.get(&i) {
                size.hidden = cut_neurons(block, mask, gates)?;
            }
            config.compact.push(size);
        }
        if config.compact.iter().all(|&size| size == all) {
            config.compact.clear();
        }
        Ok(())
    }
}

/// Block and kind of a mask of heads or neurons.
fn structured(name: &str) -> Option<(usize, &str)> {
    let at = name.find("blocks.").filter(|&at| at == 0 || name[..at].ends_with('.'))?;
    let (block, what) = name[at..].strip_prefix("blocks.")?.split_once('.')?;
    (what == "heads" || what == "neurons").then_some(())?;
    Some((block.parse().ok()?, what))
}

/// The indices of what is kept: one at least, all where `together`.
fn kept(mask: &[bool], together: bool) -> Vec<usize> {
    let all = 0..mask.len();
    let kept: Vec<usize> = all.clone().filter(|&at| mask[at] || together).collect();
    if kept.is_empty() { all.take(1).collect() } else { kept }
}

/// The rows `rows` of a layer's outputs.
fn outputs(layer: &Linear<Tensor>, rows: &[usize]) -> Result<Linear<Tensor>> {
    let pick = |tensor: &Tensor, width: usize| {
        rows.iter().flat_map(|&row| &tensor.data()[row * width..(row + 1) * width]).copied().collect()
    };
    let inputs = layer.weight.width();
    let bias = layer.bias.as_ref().map(|bias| Tensor::new(&[rows.len()], pick(bias, 1))).transpose()?;
    Ok(Linear { weight: Tensor::new(&[rows.len(), inputs], pick(&layer.weight, inputs))?, bias })
}

/// The columns `columns` of a layer's inputs.
fn inputs(layer: &Linear<Tensor>, columns: &[usize]) -> Result<Linear<Tensor>> {
    let rows = layer.weight.data().chunks_exact(layer.weight.width());
    let values = rows.flat_map(|row| columns.iter().map(|&column| row[column])).collect();
    let weight = Tensor::new(&[layer.weight.dim(0), columns.len()], values)?;
    Ok(Linear { weight, bias: layer.bias.clone() })
}

/// Makes rows of a layer's weight zero; its bias stays.
fn zero_rows(layer: &mut Linear<Tensor>, rows: impl Iterator<Item = usize>) {
    let width = layer.weight.width();
    rows.for_each(|row| layer.weight.data_mut()[row * width..(row + 1) * width].fill(0.0));
}

/// Returns how many heads are left.
fn cut_heads(block: &mut BlockParams<Tensor>, mask: &[bool], head_dim: usize) -> Result<usize> {
    let heads = mask.len();
    let rows = |head: usize| head * head_dim..(head + 1) * head_dim;
    let dead = || (0..heads).filter(|&head| !mask[head]);
    for part in 0..3 {
        zero_rows(&mut block.qkv, dead().flat_map(rows).map(|row| part * heads * head_dim + row));
    }
    let kept = kept(mask, block.attn_norm.is_some());
    let cut: Vec<usize> = dead().filter(|head| !kept.contains(head)).flat_map(rows).collect();
    let kept_columns: Vec<usize> = kept.iter().flat_map(|&head| rows(head)).collect();
    if let Some(bias) = &block.qkv.bias {
        // What a dead head puts out for every token.
        let value = &bias.data()[2 * heads * head_dim..];
        let width = block.proj.weight.width();
        let outputs = block.proj.weight.dim(0);
        let folded = block.proj.bias.get_or_insert_with(|| Tensor::zeros(&[outputs]));
        for (sum, row) in folded.data_mut().iter_mut().zip(block.proj.weight.data().chunks_exact(width)) {
            let extra: f64 =
                cut.iter().map(|&column| f64::from(row[column]) * f64::from(value[column])).sum();
            *sum = (f64::from(*sum) + extra) as f32;
        }
    }
    let parts = 0..3_usize;
    let kept_rows: Vec<usize> =
        parts.flat_map(|part| kept_columns.iter().map(move |&row| part * heads * head_dim + row)).collect();
    block.qkv = outputs(&block.qkv, &kept_rows)?;
    block.proj = inputs(&block.proj, &kept_columns)?;
    Ok(kept.len())
}

/// Returns how many neurons are left.
fn cut_neurons(block: &mut BlockParams<Tensor>, mask: &[bool], gates: usize) -> Result<usize> {
    let neurons = mask.len();
    let dead = || (0..neurons).filter(|&neuron| !mask[neuron]);
    for gate in 0..gates {
        zero_rows(&mut block.fc1, dead().map(|neuron| gate * neurons + neuron));
    }
    let width = block.fc2.weight.width();
    for row in block.fc2.weight.data_mut().chunks_exact_mut(width) {
        dead().for_each(|neuron| row[neuron] = 0.0);
    }
    let kept = kept(mask, block.mlp_norm.is_some());
    let rows: Vec<usize> =
        (0..gates).flat_map(|gate| kept.iter().map(move |&neuron| gate * neurons + neuron)).collect();
    block.fc1 = outputs(&block.fc1, &rows)?;
    block.fc2 = inputs(&block.fc2, &kept)?;
    Ok(kept.len())
}

impl Checkpoint {
    /// The values of a mask: 0 or 1, stored as BOOL, U8 or a type of parameters.
    fn mask(&self, name: &str) -> Result<Vec<bool>> {
        let bit = |value: f32| match value {
            0.0 => Ok(false),
            1.0 => Ok(true),
            other => Err(self.error(name, format!("holds {other}; a mask holds 0 and 1"))),
        };
        match self.bytes(name) {
            Some(bytes) => bytes.iter().map(|&byte| bit(f32::from(byte))).collect(),
            None => self.tensor(name)?.data().iter().map(|&value| bit(value)).collect(),
        }
    }
}
