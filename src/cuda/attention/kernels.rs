//! Which kernel takes what, and the shared memory it needs.

use crate::{
    Error, Result,
    cuda::{
        DType,
        image::{Kernel, Module},
        select::permit,
    },
};

use super::OP;

/// The head dimension of the kernels that hold all keys.
const RESIDENT_DIM: usize = 64;

/// Instantiations of kernels/attention.cu: tiles of 16 keys that fit, the most warps of a block.
const RESIDENT: [(usize, u32); 6] = [(4, 4), (8, 4), (10, 5), (12, 6), (13, 7), (17, 6)];

/// The most tiles of 16 keys with which a block adds up received attention.
const RECEIVED_PAIRS: usize = 13;

/// The most query tiles of a block: its shared memory must fit 99 KiB beside 272 keys.
const MOST_BLOCK_TILES: usize = 13;

/// Head dimensions of `kernels/attention_stream.cu`.
const STREAM_DIMS: [usize; 8] = [32, 40, 48, 64, 72, 80, 96, 128];

/// Widths of `kernels/attention_f32.cu`; a head dimension takes the next.
const F32_WIDTHS: [usize; 4] = [32, 64, 96, 128];

/// Shared memory of [`super::attention_folded`].
pub(super) const FOLD_BYTES: usize = 96 * 1024;

/// How the attention of a shape is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// All keys resident: an index into [`RESIDENT`].
    Resident(usize),
    /// Keys streamed.
    Stream,
}

impl Pass {
    pub(super) fn of(dtype: DType, tokens: usize, head_dim: usize) -> Result<Self> {
        if dtype == DType::F32 {
            let most = F32_WIDTHS[F32_WIDTHS.len() - 1];
            if head_dim == 0 || head_dim > most || !head_dim.is_multiple_of(8) {
                return Err(Error::argument(
                    OP,
                    format!("heads have {head_dim} values, the f32 kernels take multiples of 8 up to {most}"),
                ));
            }
            return Ok(Self::Stream);
        }
        if head_dim == RESIDENT_DIM
            && let Some(at) = RESIDENT.iter().position(|&(pairs, _)| tokens <= pairs * 16)
        {
            return Ok(Self::Resident(at));
        }
        if STREAM_DIMS.contains(&head_dim) {
            return Ok(Self::Stream);
        }
        Err(Error::argument(
            OP,
            format!(
                "heads have {head_dim} values, the {dtype} kernels take {STREAM_DIMS:?}; compute it in f32"
            ),
        ))
    }

    pub(super) fn hands_out_class_rows(self) -> bool {
        matches!(self, Self::Resident(_))
    }

    pub(super) fn hands_out_received(self) -> bool {
        matches!(self, Self::Resident(at) if RESIDENT[at].0 <= RECEIVED_PAIRS)
    }
}

/// Query tiles and warps of a block that holds all keys: as few blocks as possible with `blocks_wanted` = 1, else about that
/// many for `maps` heads, but not so few queries a block that copying keys is most of the work.
pub(super) fn resident_block(at: usize, tokens: usize, maps: usize, blocks_wanted: usize) -> (usize, u32) {
    const LEAST_TILES: usize = 4;
    let most_warps = RESIDENT[at].1 as usize;
    let tiles = tokens.div_ceil(16);
    let mut splits = tiles.div_ceil(MOST_BLOCK_TILES);
    while maps * splits < blocks_wanted
        && tiles.div_ceil(splits + 1) >= LEAST_TILES.min(tiles)
        && splits < tiles
    {
        splits += 1;
    }
    let block_tiles = tiles.div_ceil(splits);
    let rounds = block_tiles.div_ceil(most_warps);
    (block_tiles, block_tiles.div_ceil(rounds) as u32)
}

/// Dynamic shared memory of a block that holds all keys.
pub(super) fn resident_bytes(tokens: usize, block_tiles: usize) -> usize {
    let row = RESIDENT_DIM * 2;
    (block_tiles * 16 + 2 * tokens.next_multiple_of(16)) * row
}

/// Dynamic shared memory of a streaming kernel, and of the one that computes scores.
pub(super) fn stream_bytes(dtype: DType, head_dim: usize) -> [usize; 2] {
    if dtype == DType::F32 {
        let row = (f32_width(head_dim) + 4) * 4;
        return [(64 + 32 + 32) * row + 64 * 36 * 4, (64 + 32) * row];
    }
    // Rows are an odd number of 16-byte pieces apart.
    let row = ((2 * head_dim.div_ceil(16)) | 1) * 16;
    [3 * 64 * row, 2 * 64 * row]
}

fn f32_width(head_dim: usize) -> usize {
    F32_WIDTHS.into_iter().find(|&width| head_dim <= width).unwrap_or(F32_WIDTHS[F32_WIDTHS.len() - 1])
}

/// The kernels of one storage type.
#[derive(Debug)]
struct Streams {
    dtype: DType,
    widths: &'static [usize],
    stream: Vec<Kernel>,
    scores: Vec<Kernel>,
    resident: Vec<Kernel>,
    fold: Kernel,
}

/// All attention kernels.
#[derive(Debug)]
pub(in crate::cuda) struct AttentionKernels(Vec<Streams>);

impl AttentionKernels {
    /// `load` gives a module of kernels/ by its name.
    pub(in crate::cuda) fn load(load: impl Fn(&'static str) -> Result<Module>) -> Result<Self> {
        let (resident, stream, exact, fold) =
            (load("attention")?, load("attention_stream")?, load("attention_f32")?, load("attention_fold")?);
        let of = |dtype: DType| {
            let (module, widths): (_, &'static [usize]) =
                if dtype == DType::F32 { (&exact, &F32_WIDTHS) } else { (&stream, &STREAM_DIMS) };
            let all = |kind: &str| -> Result<Vec<Kernel>> {
                widths
                    .iter()
                    .map(|width| module.kernel(format!("fv_attention_{kind}_{dtype}_{width}")))
                    .collect()
            };
            let pairs = if dtype == DType::F32 { &RESIDENT[..0] } else { &RESIDENT[..] };
            let resident = pairs
                .iter()
                .map(|(pairs, _)| resident.kernel(format!("fv_attention_resident_{dtype}_{pairs}")));
            Ok(Streams {
                dtype,
                widths,
                stream: all("stream")?,
                scores: all("scores")?,
                resident: resident.collect::<Result<_>>()?,
                fold: fold.kernel(format!("fv_attention_fold_{dtype}"))?,
            })
        };
        Ok(Self(DType::ALL.into_iter().map(of).collect::<Result<_>>()?))
    }

    fn of(&self, dtype: DType) -> &Streams {
        let at = DType::ALL.iter().position(|&other| other == dtype).unwrap_or_default();
        &self.0[at]
    }

    pub(super) fn resident(&self, dtype: DType, at: usize) -> &Kernel {
        &self.of(dtype).resident[at]
    }

    /// The streaming kernel and the one for scores. `Pass::of` has checked that there is one.
    pub(super) fn stream(&self, dtype: DType, head_dim: usize) -> [&Kernel; 2] {
        let of = self.of(dtype);
        let at = of.widths.iter().position(|&width| head_dim <= width).unwrap_or(of.widths.len() - 1);
        [&of.stream[at], &of.scores[at]]
    }

    pub(super) fn fold(&self, dtype: DType) -> &Kernel {
        &self.of(dtype).fold
    }
}

/// Lets the kernels that need it have more than 48 KiB of dynamic shared memory.
pub(in crate::cuda) fn permit_shared_memory(
    kernels: &AttentionKernels,
    device: &str,
    limit: i32,
) -> Result<()> {
    for of in &kernels.0 {
        for (at, kernel) in of.resident.iter().enumerate() {
            let tokens = RESIDENT[at].0 * 16;
            // The largest block over all numbers of tokens that come here.
            let (tiles, _) = resident_block(at, tokens, 1, 1);
            permit(kernel, resident_bytes(tokens, tiles), device, limit)?;
        }
        for (at, &width) in of.widths.iter().enumerate() {
            let [stream, scores] = stream_bytes(of.dtype, width);
            permit(&of.stream[at], stream, device, limit)?;
            permit(&of.scores[at], scores, device, limit)?;
        }
        permit(&of.fold, FOLD_BYTES, device, limit)?;
    }
    Ok(())
}

/// The narrowest heads that there are kernels for and that `head_dim` values fill to three quarters at least; `head_dim` where
/// there are none. Zeros behind a head's values change nothing but the work.
pub(in crate::cuda) fn widened(dtype: DType, head_dim: usize) -> usize {
    let fits = |&wide: &usize| Pass::of(dtype, 1, wide).is_ok();
    (head_dim..=head_dim.saturating_mul(4) / 3).find(fits).unwrap_or(head_dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_filled_up_to_the_next_kernel_where_that_costs_at_most_a_third() {
        let widened = |head_dim| DType::ALL.map(|dtype| widened(dtype, head_dim));
        assert_eq!(widened(64), [64; 3]);
        assert_eq!(widened(60), [64; 3], "LV-ViT-T");
        assert_eq!(widened(12), [16, 12, 12]);
        assert_eq!(widened(56), [56, 64, 64]);
        assert_eq!(widened(4), [4; 3]);
        assert_eq!([widened(0), widened(129), widened(usize::MAX)], [[0; 3], [129; 3], [usize::MAX; 3]]);
    }

    #[test]
    fn the_narrowest_kernel_that_holds_the_keys_is_taken() {
        for tokens in 1..=272 {
            let Ok(Pass::Resident(at)) = Pass::of(DType::F16, tokens, 64) else {
                panic!("{tokens} are streamed")
            };
            assert!(tokens <= RESIDENT[at].0 * 16 && (at == 0 || tokens > RESIDENT[at - 1].0 * 16));
        }
        assert_eq!(Pass::of(DType::Bf16, 273, 64).unwrap(), Pass::Stream);
        assert_eq!(Pass::of(DType::F16, 50, 72).unwrap(), Pass::Stream);
        assert_eq!(Pass::of(DType::F32, 50, 24).unwrap(), Pass::Stream);
        assert!(Pass::of(DType::F16, 50, 56).unwrap_err().to_string().contains("compute it in f32"));
        assert!(Pass::of(DType::F32, 50, 20).is_err() && Pass::of(DType::F32, 50, 136).is_err());
    }

    #[test]
    fn every_query_has_a_warp_and_every_block_fits() {
        for tokens in 1..=272 {
            let Ok(Pass::Resident(at)) = Pass::of(DType::F16, tokens, 64) else {
                panic!("{tokens} are streamed")
            };
            for (maps, wanted) in [(1, 1), (6, 108), (64, 108), (384, 132), (1, 1000)] {
                let (tiles, warps) = resident_block(at, tokens, maps, wanted);
                assert!((1..=RESIDENT[at].1).contains(&warps), "{tokens}: {warps} warps");
                assert!(resident_bytes(tokens, tiles) <= 99 * 1024, "{tokens}: {tiles} tiles");
                // Every warp has a tile: it would miss a barrier without.
                assert!(warps as usize <= tiles);
                if wanted == 1 && tokens <= RECEIVED_PAIRS * 16 {
                    assert_eq!(tiles, tokens.div_ceil(16), "{tokens}: one block a head");
                }
            }
        }
        // DeiT at 224: one head a block, two tiles a warp.
        assert_eq!(resident_block(4, 197, 384, 108), (13, 7));
        assert_eq!(resident_block(4, 197, 6, 108), (4, 4));
    }
}
