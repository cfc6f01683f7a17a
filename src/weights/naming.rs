//! Who wrote a checkpoint: the names of each family, mapped to one set of slots and back.
//!
//! A family is a table. Reading a file turns its names into slots; a missing parameter is reported by turning its slot
//! back into the name the file would have used.

mod stems;

use std::collections::{BTreeMap, BTreeSet};

use super::{Checkpoint, reducers::is_reducer, text::shown};
use crate::{Error, Result};

/// The naming a checkpoint follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// timm's `VisionTransformer`; DeiT, DeiT III and EViT use the same names.
    Timm,
    /// The official DINOv2, a dialect of timm's.
    Dinov2,
    /// The official LV-ViT (token labeling), a dialect of timm's.
    LvVit,
    /// The official T2T-ViT, a dialect of timm's.
    T2tVit,
    /// Hugging Face's ViT and DeiT.
    HuggingFaceVit,
    /// Hugging Face's DINOv2, with and without registers.
    HuggingFaceDinov2,
    /// The visual tower of Hugging Face's CLIP.
    HuggingFaceClip,
    /// The visual tower of OpenAI's CLIP and of `open_clip`.
    OpenClip,
}

impl Family {
    /// What `foveate info` and messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Timm => "timm VisionTransformer",
            Self::Dinov2 => "official DINOv2",
            Self::LvVit => "official LV-ViT",
            Self::T2tVit => "official T2T-ViT",
            Self::HuggingFaceVit => "Hugging Face ViT/DeiT",
            Self::HuggingFaceDinov2 => "Hugging Face DINOv2",
            Self::HuggingFaceClip => "Hugging Face CLIP (visual tower)",
            Self::OpenClip => "OpenAI CLIP (visual tower)",
        }
    }

    /// Whether this is a visual tower of CLIP, whose head projects instead of classifying.
    pub fn is_clip(self) -> bool {
        matches!(self, Self::HuggingFaceClip | Self::OpenClip)
    }
}

/// Which tensor of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Weight,
    Bias,
}

/// One parameter in this crate's naming, which is timm's: tokens, position tables and LayerScale vectors are `Weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Slot {
    pub(super) block: Option<usize>,
    pub(super) layer: &'static str,
    pub(super) part: Part,
}

/// One row of a family's table.
struct Row {
    theirs: &'static str,
    ours: &'static str,
    form: Form,
    /// Stands outside the body's prefix: `classifier` beside `vit.`.
    top: bool,
}

/// What `theirs` in a [`Row`] stands for.
enum Form {
    /// A layer: `theirs.weight` and `theirs.bias`.
    Layer,
    /// One tensor of that very name.
    Tensor(Part),
}

const fn layer(theirs: &'static str, ours: &'static str) -> Row {
    Row { theirs, ours, form: Form::Layer, top: false }
}
const fn top(theirs: &'static str, ours: &'static str) -> Row {
    Row { theirs, ours, form: Form::Layer, top: true }
}
const fn tensor(theirs: &'static str, ours: &'static str) -> Row {
    Row { theirs, ours, form: Form::Tensor(Part::Weight), top: false }
}
const fn tensor_bias(theirs: &'static str, ours: &'static str) -> Row {
    Row { theirs, ours, form: Form::Tensor(Part::Bias), top: false }
}

/// The names of one family.
struct Naming {
    family: Family,
    /// In front of the body's names, in some files.
    prefixes: &'static [&'static str],
    /// The body is never without its prefix (names outside it belong to something else).
    prefix_required: bool,
    /// In front of a block's number.
    blocks: &'static str,
    root: &'static [Row],
    /// More of the same, of stems that some dialects have.
    stems: &'static [Row],
    block: &'static [Row],
    /// Not needed for inference; a final dot means everything below.
    ignored: &'static [&'static str],
}

/// What data-parallel training, compilation and wrappers put in front of every name.
const WRAPPERS: [&str; 6] = ["module.", "model.", "_orig_mod.", "clip.", "state_dict_ema.", "state_dict."];

const FAMILIES: [Naming; 5] = [
    Naming {
        family: Family::Timm,
        prefixes: &[],
        prefix_required: false,
        blocks: "blocks.",
        root: &[
            tensor("cls_token", "cls_token"),
            tensor("dist_token", "dist_token"),
            tensor("reg_token", "reg_token"),
            tensor("register_tokens", "reg_token"),
            tensor("pos_embed", "pos_embed"),
            layer("patch_embed.proj", "patch_embed.proj"),
            layer("norm_pre", "norm_pre"),
            layer("norm", "norm"),
            tensor("attn_pool.latent", "attn_pool.latent"),
            layer("attn_pool.q", "attn_pool.q"),
            layer("attn_pool.kv", "attn_pool.kv"),
            layer("attn_pool.q_norm", "attn_pool.q_norm"),
            layer("attn_pool.k_norm", "attn_pool.k_norm"),
            layer("attn_pool.proj", "attn_pool.proj"),
            layer("attn_pool.norm", "attn_pool.norm"),
            layer("attn_pool.mlp.fc1", "attn_pool.mlp.fc1"),
            layer("attn_pool.mlp.fc2", "attn_pool.mlp.fc2"),
            layer("fc_norm", "fc_norm"),
            layer("head", "head"),
            layer("head_dist", "head_dist"),
        ],
        stems: stems::ROWS,
        block: &[
            layer("norm1", "norm1"),
            layer("attn.qkv", "attn.qkv"),
            layer("attn.q_norm", "attn.q_norm"),
            layer("attn.k_norm", "attn.k_norm"),
            layer("attn.norm", "attn.norm"),
            layer("attn.proj", "attn.proj"),
            tensor("ls1.gamma", "ls1"),
            tensor("gamma_1", "ls1"),
            tensor("layer_scale1.lambda1", "ls1"),
            layer("norm2", "norm2"),
            layer("mlp.fc1", "mlp.fc1"),
            layer("mlp.w12", "mlp.fc1"),
            layer("mlp.fc1_g", "mlp.fc1_g"),
            layer("mlp.fc1_x", "mlp.fc1_x"),
            layer("mlp.norm", "mlp.norm"),
            layer("mlp.fc2", "mlp.fc2"),
            layer("mlp.w3", "mlp.fc2"),
            tensor("ls2.gamma", "ls2"),
            tensor("gamma_2", "ls2"),
            tensor("layer_scale2.lambda1", "ls2"),
        ],
        ignored: &["mask_token"],
    },
    Naming {
        family: Family::HuggingFaceVit,
        prefixes: &["vit.", "deit."],
        prefix_required: false,
        blocks: "encoder.layer.",
        root: &[
            tensor("embeddings.cls_token", "cls_token"),
            tensor("embeddings.distillation_token", "dist_token"),
            tensor("embeddings.position_embeddings", "pos_embed"),
            layer("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            layer("layernorm", "norm"),
            top("classifier", "head"),
            top("cls_classifier", "head"),
            top("distillation_classifier", "head_dist"),
        ],
        stems: &[],
        block: &[
            layer("layernorm_before", "norm1"),
            layer("attention.attention.query", "attn.q"),
            layer("attention.attention.key", "attn.k"),
            layer("attention.attention.value", "attn.v"),
            layer("attention.output.dense", "attn.proj"),
            layer("layernorm_after", "norm2"),
            layer("intermediate.dense", "mlp.fc1"),
            layer("output.dense", "mlp.fc2"),
        ],
        ignored: &["embeddings.mask_token", "pooler."],
    },
    Naming {
        family: Family::HuggingFaceDinov2,
        prefixes: &["dinov2_with_registers.", "dinov2."],
        prefix_required: false,
        blocks: "encoder.layer.",
        root: &[
            tensor("embeddings.cls_token", "cls_token"),
            tensor("embeddings.register_tokens", "reg_token"),
            tensor("embeddings.position_embeddings", "pos_embed"),
            layer("embeddings.patch_embeddings.projection", "patch_embed.proj"),
            layer("layernorm", "norm"),
            top("classifier", "head"),
        ],
        stems: &[],
        block: &[
            layer("norm1", "norm1"),
            layer("attention.attention.query", "attn.q"),
            layer("attention.attention.key", "attn.k"),
            layer("attention.attention.value", "attn.v"),
            layer("attention.output.dense", "attn.proj"),
            tensor("layer_scale1.lambda1", "ls1"),
            layer("norm2", "norm2"),
            layer("mlp.fc1", "mlp.fc1"),
            layer("mlp.weights_in", "mlp.fc1"),
            layer("mlp.fc2", "mlp.fc2"),
            layer("mlp.weights_out", "mlp.fc2"),
            tensor("layer_scale2.lambda1", "ls2"),
        ],
        ignored: &["embeddings.mask_token"],
    },
    Naming {
        family: Family::HuggingFaceClip,
        prefixes: &["vision_model."],
        prefix_required: false,
        blocks: "encoder.layers.",
        root: &[
            tensor("embeddings.class_embedding", "cls_token"),
            layer("embeddings.patch_embedding", "patch_embed.proj"),
            layer("embeddings.position_embedding", "pos_embed"),
            layer("pre_layrnorm", "norm_pre"),
            layer("post_layernorm", "norm"),
            top("visual_projection", "head"),
        ],
        stems: &[],
        block: &[
            layer("layer_norm1", "norm1"),
            layer("self_attn.q_proj", "attn.q"),
            layer("self_attn.k_proj", "attn.k"),
            layer("self_attn.v_proj", "attn.v"),
            layer("self_attn.out_proj", "attn.proj"),
            layer("layer_norm2", "norm2"),
            layer("mlp.fc1", "mlp.fc1"),
            layer("mlp.fc2", "mlp.fc2"),
        ],
        ignored: &["embeddings.position_ids", "text_model.", "text_projection.", "logit_scale"],
    },
    Naming {
        family: Family::OpenClip,
        prefixes: &["visual."],
        // Without the prefix, `transformer.resblocks` is the text tower.
        prefix_required: true,
        blocks: "transformer.resblocks.",
        root: &[
            tensor("class_embedding", "cls_token"),
            tensor("positional_embedding", "pos_embed"),
            layer("conv1", "patch_embed.proj"),
            layer("ln_pre", "norm_pre"),
            layer("ln_post", "norm"),
            // Stored transposed, (C, outputs), which is why it does not share `head`.
            tensor("proj", "proj_transposed"),
        ],
        stems: &[],
        block: &[
            layer("ln_1", "norm1"),
            tensor("attn.in_proj_weight", "attn.qkv"),
            tensor_bias("attn.in_proj_bias", "attn.qkv"),
            layer("attn.out_proj", "attn.proj"),
            tensor("ls_1.gamma", "ls1"),
            layer("ln_2", "norm2"),
            layer("mlp.c_fc", "mlp.fc1"),
            layer("mlp.c_proj", "mlp.fc2"),
            tensor("ls_2.gamma", "ls2"),
        ],
        ignored: &[
            "transformer.",
            "token_embedding.",
            "positional_embedding",
            "ln_final.",
            "text_projection",
            "logit_scale",
            "input_resolution",
            "context_length",
            "vocab_size",
        ],
    },
];

/// Components of names that tell of an architecture this crate does not compute.
const UNSUPPORTED: [(&str, &str); 19] = [
    ("probe", "attention pooling"),
    ("rel_pos", "relative position biases"),
    ("relative_position", "relative position biases"),
    ("rope", "rotary positions"),
    ("freqs", "rotary positions"),
    ("q_bias", "BEiT's separate query and value biases"),
    ("v_bias", "BEiT's separate query and value biases"),
    ("pre_logits", "a representation layer before the head"),
    ("backbone", "a convolutional backbone before the blocks"),
    ("conv1", "a convolutional stem"),
    ("conv2", "a convolutional stem"),
    ("stem", "a convolutional stem"),
    ("tokens_to_token", "a tokens-to-token module that is neither a transformer nor a performer"),
    ("blocks_token_only", "CaiT's class attention"),
    ("attns", "parallel attention"),
    ("lambda_q1", "differential attention"),
    ("gating_param", "ConViT's gated attention"),
    ("decoder", "a decoder (keep the encoder only)"),
    ("lora_A", "unmerged LoRA adapters (merge them first)"),
];

impl Row {
    /// Which part of this row `name` is, free of prefixes and block numbers.
    fn part(&self, name: &str) -> Option<Part> {
        match (&self.form, name.strip_prefix(self.theirs)?) {
            (Form::Tensor(part), "") => Some(*part),
            (Form::Layer, ".weight") => Some(Part::Weight),
            (Form::Layer, ".bias") => Some(Part::Bias),
            _ => None,
        }
    }

    /// The name of a part, if this row has it.
    fn name(&self, part: Part) -> Option<String> {
        match (&self.form, part) {
            (Form::Layer, Part::Weight) => Some(format!("{}.weight", self.theirs)),
            (Form::Layer, Part::Bias) => Some(format!("{}.bias", self.theirs)),
            (Form::Tensor(own), _) => (*own == part).then(|| self.theirs.to_owned()),
        }
    }
}

/// What one name of a file means in one naming.
enum Meaning {
    Known(Known),
    /// A reduction method's parameter, by its name without wrappers.
    Reducer(String),
    Ignored,
    /// Ignored, whatever the dialect.
    Counter,
    Unknown,
}

/// A name with a slot.
struct Known {
    slot: Slot,
    row: &'static str,
    wrapper: String,
    prefix: &'static str,
    /// DINOv2's block chunks: `blocks.chunk.block`.
    chunk: Option<usize>,
}

impl Naming {
    fn meaning(&self, full: &str) -> Meaning {
        let mut name = full;
        while let Some(rest) = WRAPPERS.iter().find_map(|wrapper| name.strip_prefix(wrapper)) {
            name = rest;
        }
        let wrapper = &full[..full.len() - name.len()];
        if self.family == Family::Timm && is_reducer(name) {
            return Meaning::Reducer(name.to_owned());
        }
        let prefix = self.prefixes.iter().find(|prefix| name.starts_with(**prefix)).copied().unwrap_or("");
        let body = &name[prefix.len()..];
        let in_body = !(self.prefix_required && prefix.is_empty());
        let known = |block, chunk, row: &'static Row, part| {
            let slot = Slot { block, layer: row.ours, part };
            Meaning::Known(Known { slot, row: row.theirs, wrapper: wrapper.to_owned(), prefix, chunk })
        };
        let numbered = body.strip_prefix(self.blocks).filter(|_| in_body).and_then(number);
        if let Some((first, rest)) = numbered {
            // The block's number counts from the model's start also where a chunk's number stands before it.
            let (block, chunk, rest) = match number(rest) {
                Some((second, rest)) if self.family == Family::Timm => (second, Some(first), rest),
                _ => (first, None, rest),
            };
            if let Some((row, part)) = find(self.block, rest) {
                return known(Some(block), chunk, row, part);
            }
        }
        let found = find(self.root, body).or_else(|| find(self.stems, body));
        if let Some((row, part)) = found.filter(|(row, _)| in_body || row.top) {
            return known(None, None, row, part);
        }
        if !self.stems.is_empty() && stems::is_counter(name) {
            return Meaning::Counter;
        }
        let ignored = |pattern: &&str| {
            [name, body].iter().any(|n| n == pattern || (pattern.ends_with('.') && n.starts_with(*pattern)))
        };
        if self.ignored.iter().any(ignored) { Meaning::Ignored } else { Meaning::Unknown }
    }
}

/// The row and part called `name`.
fn find(rows: &'static [Row], name: &str) -> Option<(&'static Row, Part)> {
    rows.iter().find_map(|row| Some((row, row.part(name)?)))
}

/// The whole number before the first dot of `name` (in its only spelling) and what follows the dot.
fn number(name: &str) -> Option<(usize, &str)> {
    let (digits, rest) = name.split_once('.')?;
    let number: usize = digits.parse().ok()?;
    (number.to_string() == digits).then_some((number, rest))
}

/// The slots of a file.
#[derive(Debug)]
pub(super) struct Names {
    pub(super) family: Family,
    /// Every known name, by slot.
    slots: BTreeMap<Slot, String>,
    /// Reduction methods' parameters: names without wrappers, and the file's.
    reducers: BTreeMap<String, String>,
    /// Rows that the file uses: a slot may have several names, and a missing one is reported under the file's own.
    rows: BTreeSet<&'static str>,
    wrapper: String,
    prefix: &'static str,
    /// Chunk of each block.
    chunks: BTreeMap<usize, usize>,
}

impl Names {
    /// Finds the family that knows most of the checkpoint's names.
    ///
    /// # Errors
    /// When no family knows them, when a name is not part of the family or belongs to something unsupported, and when
    /// two names are the same parameter.
    pub(super) fn of(checkpoint: &Checkpoint) -> Result<Self> {
        let count = |naming: &&Naming| {
            checkpoint.names().filter(|name| matches!(naming.meaning(name), Meaning::Known(_))).count()
        };
        // The first of equals: timm's, the most common one.
        let mut best = (0, &FAMILIES[0]);
        for naming in &FAMILIES {
            let known = count(&naming);
            if known > best.0 {
                best = (known, naming);
            }
        }
        let (known, naming) = best;
        let total = checkpoint.names().len();
        let mut names = Self {
            family: naming.family,
            slots: BTreeMap::new(),
            reducers: BTreeMap::new(),
            rows: BTreeSet::new(),
            wrapper: String::new(),
            prefix: "",
            chunks: BTreeMap::new(),
        };
        let (mut official, mut labelled, mut tokens_to_token) = (false, false, false);
        let mut unknown = None;
        for name in checkpoint.names() {
            match naming.meaning(name) {
                Meaning::Known(known) => {
                    official |= ["register_tokens", "mlp.w12"].contains(&known.row) || known.chunk.is_some();
                    labelled |= ["stem.conv1", "aux_head"].contains(&known.slot.layer);
                    tokens_to_token |= known.slot.layer.starts_with("t2t.");
                    names.insert(checkpoint, name, known)?;
                }
                Meaning::Reducer(short) => {
                    if let Some(other) = names.reducers.insert(short, name.to_owned()) {
                        let what =
                            format!("is the same parameter as `{}`; remove one of them", shown(&other));
                        return Err(checkpoint.error(name, what));
                    }
                }
                Meaning::Counter => {}
                Meaning::Ignored => official |= naming.family == Family::Timm,
                Meaning::Unknown => {
                    let reason = unsupported(name);
                    if let Some(reason) = reason.filter(|_| known > 0) {
                        return Err(checkpoint.error(name, format!("{reason} not supported")));
                    }
                    unknown = unknown.or(Some(name));
                }
            }
        }
        if known == 0 || names.patch().is_none() && known < total / 2 {
            let example = unknown.map(|name| format!(" (such as `{}`)", shown(name))).unwrap_or_default();
            let families: Vec<_> = FAMILIES.iter().map(|naming| naming.family.name()).collect();
            return Err(Error::file(
                checkpoint.file(),
                format!(
                    "is not a vision transformer this crate knows: {known} of its {total} tensors{example} have known \
                     names; readable are {}",
                    families.join(", ")
                ),
            ));
        }
        if tokens_to_token {
            names.family = Family::T2tVit;
        } else if labelled {
            names.family = Family::LvVit;
        } else if official {
            names.family = Family::Dinov2;
        }
        if let Some(name) = unknown {
            return Err(checkpoint.error(name, names.extra()));
        }
        Ok(names)
    }

    fn insert(&mut self, checkpoint: &Checkpoint, name: &str, known: Known) -> Result<()> {
        if let Some(other) = self.slots.insert(known.slot, name.to_owned()) {
            let what = format!("is the same parameter as `{}`; remove one of them", shown(&other));
            return Err(checkpoint.error(name, what));
        }
        self.rows.insert(known.row);
        self.wrapper = known.wrapper;
        if !known.prefix.is_empty() {
            self.prefix = known.prefix;
        }
        if let (Some(block), Some(chunk)) = (known.slot.block, known.chunk) {
            self.chunks.insert(block, chunk);
        }
        Ok(())
    }

    /// What is said about a tensor nobody asked for.
    pub(super) fn extra(&self) -> String {
        format!("extra tensor, not part of a {} model", self.family.name())
    }

    /// The file's name of the patch projection.
    fn patch(&self) -> Option<&str> {
        self.get(Slot { block: None, layer: "patch_embed.proj", part: Part::Weight })
    }

    /// The file's name of a slot.
    pub(super) fn get(&self, slot: Slot) -> Option<&str> {
        self.slots.get(&slot).map(String::as_str)
    }

    /// The reduction methods' parameters: names without wrappers, and the file's.
    pub(super) fn reducers(&self) -> impl Iterator<Item = (&str, &str)> {
        self.reducers.iter().map(|(short, name)| (short.as_str(), name.as_str()))
    }

    /// All slots of the file.
    pub(super) fn slots(&self) -> impl Iterator<Item = (Slot, &str)> {
        self.slots.iter().map(|(&slot, name)| (slot, name.as_str()))
    }

    /// The name a slot that is not there would have in this file.
    pub(super) fn would_be(&self, slot: Slot) -> String {
        let dialect = matches!(self.family, Family::Dinov2 | Family::LvVit | Family::T2tVit);
        let family = if dialect { Family::Timm } else { self.family };
        let row_and_name = FAMILIES.iter().find(|naming| naming.family == family).and_then(|naming| {
            let rows = if slot.block.is_some() { [naming.block, &[]] } else { [naming.root, naming.stems] };
            let candidates = || rows.into_iter().flatten().filter(|row| row.ours == slot.layer);
            let row =
                candidates().find(|row| self.rows.contains(row.theirs)).or_else(|| candidates().next())?;
            Some((naming, row, row.name(slot.part)?))
        });
        let Some((naming, row, name)) = row_and_name else {
            // A slot the family has no name for; its own name says what is meant.
            return slot.layer.to_owned();
        };
        let prefix = if row.top { "" } else { self.prefix };
        let wrapper = &self.wrapper;
        match slot.block {
            None => format!("{wrapper}{prefix}{name}"),
            Some(block) => {
                let chunk = self.chunks.range(..=block).next_back().map(|(_, chunk)| format!("{chunk}."));
                format!("{wrapper}{prefix}{}{}{block}.{name}", naming.blocks, chunk.unwrap_or_default())
            }
        }
    }
}

/// Why a name cannot be read, when it tells.
fn unsupported(name: &str) -> Option<String> {
    let found = |pattern: &str| name.split('.').any(|component| component.starts_with(pattern));
    UNSUPPORTED
        .iter()
        .find(|(pattern, _)| found(pattern))
        .map(|(_, what)| format!("part of {what}, which is"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot_of(family: Family, name: &str) -> Option<(Option<usize>, &'static str, Part)> {
        let naming = FAMILIES.iter().find(|naming| naming.family == family).unwrap();
        match naming.meaning(name) {
            Meaning::Known(known) => Some((known.slot.block, known.slot.layer, known.slot.part)),
            _ => None,
        }
    }

    #[test]
    fn names_with_wrappers_prefixes_and_chunks() {
        use Part::{Bias, Weight};
        let timm = |name| slot_of(Family::Timm, name);
        assert_eq!(timm("module._orig_mod.blocks.3.norm1.bias"), Some((Some(3), "norm1", Bias)));
        assert_eq!(timm("blocks.0.7.attn.qkv.weight"), Some((Some(7), "attn.qkv", Weight)));
        assert_eq!(timm("blocks.2.gamma_1"), Some((Some(2), "ls1", Weight)));
        assert_eq!(timm("cls_token"), Some((None, "cls_token", Weight)));
        for name in ["blocks.03.norm1.bias", "blocks.-1.norm1.bias", "blocks.3.norm1", "cls_token.weight", ""]
        {
            assert_eq!(timm(name), None, "{name}");
        }
        assert_eq!(timm("blocks.99999999999999999999.norm1.bias"), None);
        let vit = |name| slot_of(Family::HuggingFaceVit, name);
        let query = Some((Some(1), "attn.q", Weight));
        assert_eq!(vit("deit.encoder.layer.1.attention.attention.query.weight"), query);
        assert_eq!(vit("encoder.layer.1.attention.attention.query.weight"), query);
        let clip = |name| slot_of(Family::OpenClip, name);
        assert_eq!(
            clip("visual.transformer.resblocks.1.attn.in_proj_bias"),
            Some((Some(1), "attn.qkv", Bias))
        );
        assert_eq!(clip("transformer.resblocks.1.attn.in_proj_bias"), None);
    }

    #[test]
    fn every_row_of_every_family_reads_its_own_name() {
        for naming in &FAMILIES {
            for (rows, block) in [(naming.root, None), (naming.stems, None), (naming.block, Some(5))] {
                for row in rows {
                    for part in [Part::Weight, Part::Bias] {
                        let Some(name) = row.name(part) else { continue };
                        let prefix =
                            if row.top { "" } else { naming.prefixes.first().copied().unwrap_or_default() };
                        let blocks = block.map(|i| format!("{}{i}.", naming.blocks)).unwrap_or_default();
                        let name = format!("{prefix}{blocks}{name}");
                        assert_eq!(slot_of(naming.family, &name), Some((block, row.ours, part)), "{name}");
                    }
                }
            }
        }
    }
}
