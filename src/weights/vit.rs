//! A plain vision transformer out of a checkpoint.

use std::path::Path;

use super::{
    Checkpoint, ConfigFile, Family, Overrides, is_affnet,
    masks::Masks,
    naming::Names,
    parameters::Reader,
    position::resample_positions,
    settings::{Positions, Settings},
};
use crate::{
    Error, Result, Tensor,
    backend::Backend,
    model::{BlockSize, Readout, Vit, VitConfig, VitParams},
};

/// Where one number of a model came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provenance {
    /// The number, in one or two words.
    pub field: &'static str,
    /// Its value, as text.
    pub value: String,
    /// What decided: `override`, a key of a configuration, the shapes, the family's default, ...
    pub source: String,
}

/// A model as read: its numbers, its parameters, and how they were found out.
#[derive(Clone, Debug)]
pub struct LoadedVit {
    /// The numbers.
    pub config: VitConfig,
    /// The parameters, in host memory.
    pub params: VitParams<Tensor>,
    /// Who wrote the file, by its names.
    pub family: Family,
    /// Where each number came from, in the order in which `foveate info` shows them.
    pub provenance: Vec<Provenance>,
}

impl LoadedVit {
    /// The model on a backend.
    ///
    /// # Errors
    /// Those of moving the parameters there.
    pub fn build<B: Backend>(self, backend: B) -> Result<Vit<B>> {
        Vit::new(backend, self.config, self.params)
    }
}

/// Reads a plain vision transformer: timm's ViT, DeiT and DINOv2, the official DINOv2, LV-ViT and T2T-ViT, Hugging Face's ViT, DeiT, DINOv2
/// and CLIP (visual tower), OpenAI's CLIP (visual tower).
///
/// Names and shapes tell the architecture; an override outranks `config`, which outranks the checkpoint's metadata,
/// which outranks shapes and the family's defaults. Separate queries, keys and values are stacked, LayerScale, batch norms and what
/// LV-ViT divides its residuals by are folded into the layers they scale, masks of sparse training (`mask/NAME`, `blocks.{i}.heads`,
/// `blocks.{i}.neurons`) make weights zero and cut heads and neurons off (reduction methods then see those that are left), special
/// tokens carry their own positions, and the patches' positions are resampled to the
/// configured image size.
///
/// # Errors
/// [`crate::Error::Weights`] when a tensor is missing, misshapen, superfluous or unreadable, and when it belongs to
/// something unsupported; [`crate::Error::File`] when the configuration is malformed or contradicts the weights, and
/// when a number is needed that nothing tells (the message says which override supplies it).
///
/// # Examples
/// ```
/// use foveate::weights::{Checkpoint, Overrides, load_vit};
/// let nothing = Checkpoint::from_bytes("none.safetensors", b"\x02\0\0\0\0\0\0\0{}".to_vec())?;
/// let error = load_vit(&nothing, None, &Overrides::default()).unwrap_err();
/// assert!(error.to_string().starts_with("none.safetensors: is not a vision transformer this crate knows"));
/// # Ok::<(), foveate::Error>(())
/// ```
pub fn load_vit(
    checkpoint: &Checkpoint,
    config: Option<&ConfigFile>,
    overrides: &Overrides,
) -> Result<LoadedVit> {
    if is_affnet(checkpoint) {
        return Err(Error::file(
            checkpoint.file(),
            "is an AFFNet, which has no tokens to look at or to reduce; `foveate classify` and `foveate info` take it, \
             `load_affnet` reads it",
        ));
    }
    let (masks, checkpoint) = &Masks::take(checkpoint)?;
    let names = Names::of(checkpoint)?;
    let reader = Reader::new(checkpoint, &names, masks);
    let skeleton = reader.skeleton()?;
    let Settings { mut config, positions, skip, mut provenance } =
        Settings::resolve(checkpoint, names.family, &skeleton, config, overrides)?;
    let mut params = reader.parameters(&skeleton, config.heads, config.norm_eps, skip)?;
    if config.readout != Readout::ClassAndAux {
        params.aux_head = None;
    }
    place(&mut params, &positions, config.grid())?;
    masks.compact(checkpoint, &mut config, &mut params)?;
    provenance.extend(kept(&config));
    Ok(LoadedVit { config, params, family: names.family, provenance })
}

/// Opens `path` with the configuration that lies beside it and reads the model in it.
///
/// # Errors
/// As [`Checkpoint::open`], [`ConfigFile::beside`] and [`load_vit`].
pub fn load_vit_file(path: impl AsRef<Path>, overrides: &Overrides) -> Result<LoadedVit> {
    let checkpoint = Checkpoint::open(&path)?;
    load_vit(&checkpoint, ConfigFile::beside(&path)?.as_ref(), overrides)
}

/// What each block has left of its heads and neurons, where some were cut off.
fn kept(config: &VitConfig) -> Vec<Provenance> {
    let note = |field, size: fn(&BlockSize) -> usize, all: usize, masks: &str| {
        let each = config.compact.iter().map(|block| size(block).to_string()).collect::<Vec<_>>();
        let value = format!("{} of {all}", each.join(" "));
        (!each.is_empty()).then(|| Provenance { field, value, source: format!("blocks.*.{masks}") })
    };
    let heads = note("heads kept", |block| block.heads, config.heads, "heads");
    heads.into_iter().chain(note("neurons kept", |block| block.hidden, config.hidden, "neurons")).collect()
}

/// Turns the stored position table into the patches' positions at `grid`, and adds its leading rows to the special
/// tokens they belong to.
fn place(params: &mut VitParams<Tensor>, positions: &Positions, grid: [usize; 2]) -> Result<()> {
    let Some(table) = params.position.take() else { return Ok(()) };
    let width = table.width();
    let (special, patches) = table.data().split_at(positions.special * width);
    if let Some(prefix) = &mut params.prefix {
        // Special tokens without a row of their own (registers) come after those with one.
        prefix.data_mut().iter_mut().zip(special).for_each(|(token, position)| *token += position);
    }
    let stored = Tensor::new(&[patches.len() / width, width], patches.to_vec())?;
    params.position = Some(resample_positions(&stored, positions.grid, grid, positions.mode)?);
    Ok(())
}
