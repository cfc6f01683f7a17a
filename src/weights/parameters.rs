//! Parameters out of a checkpoint whose names are understood: shapes first, then values.

use std::collections::BTreeSet;

use super::{
    Checkpoint,
    masks::Masks,
    naming::{Names, Part, Slot},
    reducers,
    text::shape,
};
use crate::{
    Error, Result, Tensor,
    backend::{Linear, Norm},
    model::{BlockParams, PoolParams, Stem, VitParams},
};

/// What the shapes alone tell about a model.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each says whether a tensor is there, independently of the others"
)]
pub(super) struct Skeleton {
    pub(super) width: usize,
    pub(super) depth: usize,
    pub(super) hidden: usize,
    /// The MLP's first layer has two halves, one of which gates the other.
    pub(super) gated: bool,
    pub(super) channels: usize,
    pub(super) patch: [usize; 2],
    pub(super) stem: Stem,
    pub(super) class_token: bool,
    pub(super) distillation_token: bool,
    pub(super) registers: usize,
    /// Rows of the position table.
    pub(super) positions: usize,
    /// Width of a head, where queries or keys are normalised per head.
    pub(super) head_dim: Option<usize>,
    /// Outputs and inputs of the head.
    pub(super) head: Option<[usize; 2]>,
    pub(super) norm_pre: bool,
    pub(super) fc_norm: bool,
    pub(super) attn_pool: bool,
    pub(super) aux_head: bool,
}

/// Hands out the tensors of a checkpoint by slot, and knows which ones nobody asked for.
pub(super) struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    names: &'a Names,
    masks: &'a Masks,
    /// Layers and parts that some block has: then every block must have them.
    common: BTreeSet<(&'static str, Part)>,
    taken: BTreeSet<Slot>,
}

pub(super) const fn root(layer: &'static str) -> Slot {
    Slot { block: None, layer, part: Part::Weight }
}

const fn block(number: usize, layer: &'static str) -> Slot {
    Slot { block: Some(number), layer, part: Part::Weight }
}

impl<'a> Reader<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, names: &'a Names, masks: &'a Masks) -> Self {
        let in_blocks = names.slots().filter(|(slot, _)| slot.block.is_some());
        let common = in_blocks.map(|(slot, _)| (slot.layer, slot.part)).collect();
        Self { checkpoint, names, masks, common, taken: BTreeSet::new() }
    }

    /// Reads the model's numbers off the shapes.
    ///
    /// # Errors
    /// When a tensor that shows one is missing or of a shape that shows nothing.
    pub(super) fn skeleton(&self) -> Result<Skeleton> {
        let [width] = self.extents(block(0, "norm1"), "(C)")?;
        let (stem, patch, channels) = self.stem()?;
        let [_, hidden] = self.extents(block(0, "mlp.fc2"), "(C, hidden)")?;
        let gated = self.common.contains(&("mlp.fc1_g", Part::Weight)) || {
            let [rows, _] = self.extents(block(0, "mlp.fc1"), "(hidden, C)")?;
            rows == 2 * hidden
        };
        let head_dim = ["attn.q_norm", "attn.k_norm"]
            .into_iter()
            .find(|layer| self.common.contains(&(*layer, Part::Weight)))
            .map(|layer| self.extents::<1>(block(0, layer), "(D)"))
            .transpose()?
            .map(|[extent]| extent);
        let head = if self.has(root("proj_transposed")) {
            let [inputs, outputs] = self.extents(root("proj_transposed"), "(C, outputs)")?;
            Some([outputs, inputs])
        } else if self.has(root("head")) || self.has(bias_of(root("head"))) {
            Some(self.extents(root("head"), "(classes, C)")?)
        } else {
            None
        };
        let registers = if self.has(root("reg_token")) {
            self.listed(root("reg_token"), "(1, registers, C)")?
        } else {
            0
        };
        let positions = self.listed(root("pos_embed"), "(1, rows, C)")?;
        let last = self.names.slots().filter_map(|(slot, _)| slot.block).max().unwrap_or(0);
        Ok(Skeleton {
            width,
            depth: last + 1,
            hidden,
            gated,
            channels,
            patch,
            stem,
            class_token: self.has(root("cls_token")),
            distillation_token: self.has(root("dist_token")),
            registers,
            positions,
            head_dim,
            head,
            norm_pre: self.has(root("norm_pre")),
            fc_norm: self.has(root("fc_norm")),
            attn_pool: self.has(root("attn_pool.latent")),
            aux_head: self.has(root("aux_head")),
        })
    }

    pub(super) fn has(&self, slot: Slot) -> bool {
        self.names.get(slot).is_some()
    }

    /// The shape of a tensor that must be there; `expected` is what is said when it is not.
    fn shape(&self, slot: Slot, expected: &str) -> Result<&'a [usize]> {
        let found = self.names.get(slot).and_then(|name| self.checkpoint.shape(name));
        found.ok_or_else(|| {
            self.checkpoint.error(&self.names.would_be(slot), format!("missing; expected shape {expected}"))
        })
    }

    /// The same with a given number of axes, none of them empty.
    pub(super) fn extents<const N: usize>(&self, slot: Slot, expected: &str) -> Result<[usize; N]> {
        let found: Option<[usize; N]> = self.shape(slot, expected)?.try_into().ok();
        found.filter(|extents| !extents.contains(&0)).ok_or_else(|| self.misshapen(slot, expected))
    }

    /// The number of rows of a list of tokens, (1, rows, C) or (rows, C), none of them empty.
    fn listed(&self, slot: Slot, expected: &str) -> Result<usize> {
        match *self.shape(slot, expected)? {
            [rows, width] | [1, rows, width] if rows > 0 && width > 0 => Ok(rows),
            _ => Err(self.misshapen(slot, expected)),
        }
    }

    /// An error about a tensor that is there.
    pub(super) fn error_at(&self, slot: Slot, what: String) -> Error {
        self.checkpoint.error(self.names.get(slot).unwrap_or(slot.layer), what)
    }

    fn misshapen(&self, slot: Slot, expected: &str) -> Error {
        let name = self.names.get(slot).unwrap_or(slot.layer);
        let found = self.checkpoint.shape(name).unwrap_or_default();
        self.checkpoint.error(name, format!("has shape {}; expected {expected}", shape(found)))
    }

    /// Reads a tensor of the shape `expected`; axes of extent 1 at the front do not matter.
    pub(super) fn take(&mut self, slot: Slot, expected: &[usize]) -> Result<Tensor> {
        let found = self.shape(slot, &shape(expected))?;
        let ones = |extents: &[usize]| extents.iter().take_while(|&&extent| extent == 1).count();
        let same = found == expected || found[ones(found)..] == expected[ones(expected)..];
        if !same {
            return Err(self.misshapen(slot, &shape(expected)));
        }
        let Some(name) = self.names.get(slot) else {
            // `shape` has found it.
            return Err(self.checkpoint.error(slot.layer, "missing"));
        };
        self.taken.insert(slot);
        let mut tensor = self.checkpoint.tensor(name)?;
        self.masks.apply(name, &mut tensor);
        tensor.reshape(expected)
    }

    /// Whether a part of a layer belongs to the model: a block's when any block has it.
    fn belongs(&self, slot: Slot) -> bool {
        if slot.block.is_some() { self.common.contains(&(slot.layer, slot.part)) } else { self.has(slot) }
    }

    pub(super) fn linear(&mut self, slot: Slot, rows: usize, columns: usize) -> Result<Linear<Tensor>> {
        let weight = self.take(slot, &[rows, columns])?;
        let bias = bias_of(slot);
        let bias = if self.belongs(bias) { Some(self.take(bias, &[rows])?) } else { None };
        Ok(Linear { weight, bias })
    }

    /// A LayerNorm. Its bias must be there: the norms without one that occur in practice are `RMSNorm`s.
    pub(super) fn norm(&mut self, slot: Slot, width: usize, eps: f32) -> Result<Norm<Tensor>> {
        let weight = self.take(slot, &[width])?;
        if !self.has(bias_of(slot)) && !self.belongs(bias_of(slot)) {
            let what =
                format!("missing; expected shape ({width}); norms without bias (RMSNorm) are not supported");
            return Err(self.checkpoint.error(&self.names.would_be(bias_of(slot)), what));
        }
        Ok(Norm { weight, bias: Some(self.take(bias_of(slot), &[width])?), eps })
    }

    fn optional_norm(&mut self, slot: Slot, width: usize, eps: f32) -> Result<Option<Norm<Tensor>>> {
        if !self.belongs(slot) && !self.belongs(bias_of(slot)) {
            return Ok(None);
        }
        self.norm(slot, width, eps).map(Some)
    }

    /// Layers that a file keeps apart, stacked: their outputs one after the other.
    fn stacked(&mut self, slots: &[Slot], rows: usize, columns: usize) -> Result<Linear<Tensor>> {
        let parts: Vec<_> =
            slots.iter().map(|&slot| self.linear(slot, rows, columns)).collect::<Result<_>>()?;
        stack(&parts)
    }

    /// Multiplies a layer's outputs by the block's LayerScale, if it has one.
    fn scaled(&mut self, mut layer: Linear<Tensor>, scale: Slot) -> Result<Linear<Tensor>> {
        if !self.belongs(scale) {
            return Ok(layer);
        }
        let scale = self.take(scale, &[layer.weight.dim(0)])?;
        let columns = layer.weight.width();
        for (row, factor) in layer.weight.data_mut().chunks_exact_mut(columns).zip(scale.data()) {
            for v in row {
                *v *= factor;
            }
        }
        if let Some(bias) = &mut layer.bias {
            bias.data_mut().iter_mut().zip(scale.data()).for_each(|(v, factor)| *v *= factor);
        }
        Ok(layer)
    }

    fn block(
        &mut self,
        i: usize,
        s: &Skeleton,
        heads: usize,
        eps: f32,
        skip: f32,
    ) -> Result<BlockParams<Tensor>> {
        let (c, head_dim) = (s.width, s.width / heads);
        let norm1 = self.norm(block(i, "norm1"), c, eps)?;
        let qkv = if self.belongs(block(i, "attn.q")) {
            self.stacked(&["attn.q", "attn.k", "attn.v"].map(|layer| block(i, layer)), c, c)?
        } else {
            self.linear(block(i, "attn.qkv"), 3 * c, c)?
        };
        let q_norm = self.optional_norm(block(i, "attn.q_norm"), head_dim, eps)?;
        let k_norm = self.optional_norm(block(i, "attn.k_norm"), head_dim, eps)?;
        let attn_norm = self.optional_norm(block(i, "attn.norm"), c, eps)?;
        let proj = self.linear(block(i, "attn.proj"), c, c)?;
        let proj = divided(self.scaled(proj, block(i, "ls1"))?, skip);
        let norm2 = self.norm(block(i, "norm2"), c, eps)?;
        let fc1 = if self.belongs(block(i, "mlp.fc1_g")) {
            self.stacked(&[block(i, "mlp.fc1_g"), block(i, "mlp.fc1_x")], s.hidden, c)?
        } else {
            self.linear(block(i, "mlp.fc1"), if s.gated { 2 * s.hidden } else { s.hidden }, c)?
        };
        let mlp_norm = self.optional_norm(block(i, "mlp.norm"), s.hidden, eps)?;
        let fc2 = self.linear(block(i, "mlp.fc2"), c, s.hidden)?;
        let fc2 = divided(self.scaled(fc2, block(i, "ls2"))?, skip);
        Ok(BlockParams { norm1, qkv, q_norm, k_norm, attn_norm, proj, norm2, fc1, mlp_norm, fc2 })
    }

    /// timm's attention pooling: the query's layer and the keys' and values' are stacked.
    fn attn_pool(&mut self, s: &Skeleton, heads: usize, eps: f32) -> Result<Option<PoolParams<Tensor>>> {
        let (c, head_dim) = (s.width, s.width / heads);
        if !s.attn_pool {
            return Ok(None);
        }
        let latent = self.take(root("attn_pool.latent"), &[1, c])?;
        let query = self.linear(root("attn_pool.q"), c, c)?;
        let rest = self.linear(root("attn_pool.kv"), 2 * c, c)?;
        Ok(Some(PoolParams {
            latent,
            qkv: stack(&[query, rest])?,
            q_norm: self.optional_norm(root("attn_pool.q_norm"), head_dim, eps)?,
            k_norm: self.optional_norm(root("attn_pool.k_norm"), head_dim, eps)?,
            proj: self.linear(root("attn_pool.proj"), c, c)?,
            norm: self.optional_norm(root("attn_pool.norm"), c, eps)?,
            fc1: self.linear(root("attn_pool.mlp.fc1"), if s.gated { 2 * s.hidden } else { s.hidden }, c)?,
            fc2: self.linear(root("attn_pool.mlp.fc2"), c, s.hidden)?,
        }))
    }

    /// Reads all parameters. `prefix` holds the special tokens and `position` the whole table as stored: (special, C)
    /// and (rows, C). What the blocks' layers add to the residual stream is divided by `skip`.
    ///
    /// # Errors
    /// When a tensor is missing, misshapen, unreadable, or not asked for by anything.
    pub(super) fn parameters(
        mut self,
        s: &Skeleton,
        heads: usize,
        eps: f32,
        skip: f32,
    ) -> Result<VitParams<Tensor>> {
        let c = s.width;
        // Not `with_capacity`: a number in a name is no reason to allocate. The first missing block ends the loop.
        let mut blocks = Vec::new();
        for i in 0..s.depth {
            blocks.push(self.block(i, s, heads, eps, skip)?);
        }
        let (stem, patch) = self.read_stem(s, eps)?;

        let mut special = Vec::new();
        let tokens = [("cls_token", 1), ("dist_token", 1), ("reg_token", s.registers)];
        for (token, count) in tokens {
            if self.has(root(token)) {
                special.extend(self.take(root(token), &[1, count, c])?.into_data());
            }
        }
        let prefix = match special.len() / c {
            0 => None,
            n => Some(Tensor::new(&[n, c], special)?),
        };
        let position = Some(self.take(root("pos_embed"), &[1, s.positions, c])?.reshape(&[s.positions, c])?);

        let norm_pre = self.optional_norm(root("norm_pre"), c, eps)?;
        let fc_norm = self.optional_norm(root("fc_norm"), c, eps)?;
        // One of the two must be there: no known model reads the residual stream as it is.
        let norm = if fc_norm.is_some() {
            self.optional_norm(root("norm"), c, eps)?
        } else {
            Some(self.norm(root("norm"), c, eps)?)
        };
        let attn_pool = self.attn_pool(s, heads, eps)?;
        let head = match s.head {
            None => None,
            Some([outputs, inputs]) if self.has(root("proj_transposed")) => {
                let stored = self.take(root("proj_transposed"), &[inputs, outputs])?;
                let at = |i: usize| stored.data()[(i % inputs) * outputs + i / inputs];
                let weight = Tensor::new(&[outputs, inputs], (0..outputs * inputs).map(at).collect())?;
                Some(Linear { weight, bias: None })
            }
            Some([outputs, inputs]) => Some(self.linear(root("head"), outputs, inputs)?),
        };
        let head_dist = if s.distillation_token && self.has(root("head_dist")) {
            let outputs = s.head.map_or(0, |[outputs, _]| outputs);
            Some(self.linear(root("head_dist"), outputs, c)?)
        } else {
            None
        };
        let aux_head = if s.aux_head {
            let outputs = s.head.map_or(0, |[outputs, _]| outputs);
            // Its maximum counts half.
            Some(divided(self.linear(root("aux_head"), outputs, c)?, 2.0))
        } else {
            None
        };
        if let Some((_, name)) = self.names.slots().find(|(slot, _)| !self.taken.contains(slot)) {
            return Err(self.checkpoint.error(name, self.names.extra()));
        }
        let reducers = reducers::read(self.checkpoint, self.names.reducers(), c, s.depth)?;
        Ok(VitParams {
            stem,
            patch,
            prefix,
            position,
            norm_pre,
            blocks,
            norm,
            attn_pool,
            fc_norm,
            head,
            head_dist,
            aux_head,
            reducers,
        })
    }
}

/// A layer whose outputs are divided by `by`.
fn divided(mut layer: Linear<Tensor>, by: f32) -> Linear<Tensor> {
    for tensor in std::iter::once(&mut layer.weight).chain(&mut layer.bias) {
        tensor.data_mut().iter_mut().for_each(|value| *value /= by);
    }
    layer
}

/// Layers of the same inputs as one: their outputs one after the other. A layer without bias beside one with bias adds
/// nothing.
fn stack(layers: &[Linear<Tensor>]) -> Result<Linear<Tensor>> {
    let rows: usize = layers.iter().map(|layer| layer.weight.dim(0)).sum();
    let columns = layers.first().map_or(0, |layer| layer.weight.width());
    let weight = layers.iter().flat_map(|layer| layer.weight.data()).copied().collect();
    let bias = layers.iter().any(|layer| layer.bias.is_some()).then(|| {
        let bias = |layer: &Linear<Tensor>| match &layer.bias {
            Some(bias) => bias.data().to_vec(),
            None => vec![0.0; layer.weight.dim(0)],
        };
        layers.iter().flat_map(bias).collect()
    });
    Ok(Linear {
        weight: Tensor::new(&[rows, columns], weight)?,
        bias: bias.map(|bias| Tensor::new(&[rows], bias)).transpose()?,
    })
}

pub(super) const fn bias_of(slot: Slot) -> Slot {
    Slot { part: Part::Bias, ..slot }
}
