//! The stems of LV-ViT and T2T-ViT out of a checkpoint.

use super::{
    batch_norm,
    parameters::{Reader, Skeleton, bias_of, root},
};
use crate::{
    Result, Tensor,
    backend::{Linear, Norm},
    model::{SPLIT_PATCH, StageParams, Stem, StemParams, TokensAttention},
};

/// The slots of a stage of T2T-ViT.
struct Stage {
    norm1: &'static str,
    qkv: &'static str,
    kqv: &'static str,
    w: &'static str,
    proj: &'static str,
    norm2: &'static str,
    fc1: &'static str,
    fc2: &'static str,
}

const STAGES: [Stage; 2] = [
    Stage {
        norm1: "t2t.1.norm1",
        qkv: "t2t.1.qkv",
        kqv: "t2t.1.kqv",
        w: "t2t.1.w",
        proj: "t2t.1.proj",
        norm2: "t2t.1.norm2",
        fc1: "t2t.1.fc1",
        fc2: "t2t.1.fc2",
    },
    Stage {
        norm1: "t2t.2.norm1",
        qkv: "t2t.2.qkv",
        kqv: "t2t.2.kqv",
        w: "t2t.2.w",
        proj: "t2t.2.proj",
        norm2: "t2t.2.norm2",
        fc1: "t2t.2.fc1",
        fc2: "t2t.2.fc2",
    },
];

/// Values of a channel that T2T-ViT's first window sees, and the others.
const FIRST_TAPS: usize = 49;
const SPLIT_TAPS: usize = 9;

impl Reader<'_> {
    /// Which stem the names tell of, the side of its patches, and the image's channels.
    pub(super) fn stem(&self) -> Result<(Stem, [usize; 2], usize)> {
        if self.has(root("stem.conv1")) {
            let [filters, channels, ..] =
                self.extents::<4>(root("stem.conv1"), "(filters, channels, 7, 7)")?;
            let [_, _, height, width] =
                self.extents(root("patch_embed.proj"), "(C, filters, half of the patch, half of the patch)")?;
            return Ok((Stem::Convolutions { filters }, [2 * height, 2 * width], channels));
        }
        let [first, second] = &STAGES;
        if [first, second].iter().any(|stage| self.has(root(stage.norm1))) || self.has(root("t2t.project")) {
            let [inputs] = self.extents(root(first.norm1), "(49 · channels)")?;
            let [width, _] = self.extents(root(first.proj), "(T, T)")?;
            if !inputs.is_multiple_of(FIRST_TAPS) {
                let what = format!("holds {inputs} values, which are no windows of 7x7 pixels");
                return Err(self.error_at(root(first.norm1), what));
            }
            let attention = if self.has(root(first.kqv)) || self.has(root(first.w)) {
                let [features, _] = self.extents(root(first.w), "(random features, T)")?;
                TokensAttention::Performer { features }
            } else {
                TokensAttention::Transformer
            };
            let stem = Stem::TokensToToken { width, attention };
            return Ok((stem, [SPLIT_PATCH; 2], inputs / FIRST_TAPS));
        }
        let [_, channels, height, width] =
            self.extents(root("patch_embed.proj"), "(C, channels, patch height, patch width)")?;
        Ok((Stem::Patches, [height, width], channels))
    }

    /// The stem and the projection behind it.
    pub(super) fn read_stem(
        &mut self,
        s: &Skeleton,
        eps: f32,
    ) -> Result<(StemParams<Tensor>, Linear<Tensor>)> {
        let [height, width] = s.patch;
        match s.stem {
            Stem::Patches => {
                let patch = self.projection(s, s.channels, [height, width])?;
                let columns = s.channels * height * width;
                let weight = patch.weight.reshape(&[s.width, columns])?;
                Ok((StemParams::Patches, Linear { weight, ..patch }))
            }
            Stem::Convolutions { filters } => {
                let first = self.convolution(["stem.conv1", "stem.bn1"], [filters, s.channels, 7, 7])?;
                let first = Linear { weight: first.weight.reshape(&[filters, 49 * s.channels])?, ..first };
                let between = [filters, filters, 3, 3];
                let second = self.convolution(["stem.conv2", "stem.bn2"], between)?;
                let third = self.convolution(["stem.conv3", "stem.bn3"], between)?;
                let patch = self.projection(s, filters, [height / 2, width / 2])?;
                let stem = StemParams::Convolutions([first, taps_first(&second)?, taps_first(&third)?]);
                Ok((stem, taps_first(&patch)?))
            }
            Stem::TokensToToken { width, attention } => {
                let inputs = [FIRST_TAPS * s.channels, SPLIT_TAPS * width];
                let first = self.stage(&STAGES[0], inputs[0], width, attention, eps)?;
                let second = self.stage(&STAGES[1], inputs[1], width, attention, eps)?;
                // The pixels' rows keep their order; tokens are unfolded channels last.
                let second = StageParams {
                    norm1: Norm {
                        weight: channels_last(&second.norm1.weight, width)?,
                        bias: second.norm1.bias.map(|bias| channels_last(&bias, width)).transpose()?,
                        eps,
                    },
                    packed: Linear { weight: channels_last(&second.packed.weight, width)?, ..second.packed },
                    ..second
                };
                let project = self.linear(root("t2t.project"), s.width, SPLIT_TAPS * width)?;
                let project = Linear { weight: channels_last(&project.weight, width)?, ..project };
                Ok((StemParams::TokensToToken(Box::new([first, second])), project))
            }
        }
    }

    fn stage(
        &mut self,
        stage: &Stage,
        inputs: usize,
        width: usize,
        attention: TokensAttention,
        eps: f32,
    ) -> Result<StageParams<Tensor>> {
        let (packed, features) = match attention {
            TokensAttention::Transformer => (stage.qkv, None),
            TokensAttention::Performer { features } => {
                (stage.kqv, Some(self.take(root(stage.w), &[features, width])?))
            }
        };
        Ok(StageParams {
            norm1: self.norm(root(stage.norm1), inputs, eps)?,
            packed: self.linear(root(packed), 3 * width, inputs)?,
            features,
            proj: self.linear(root(stage.proj), width, width)?,
            norm2: self.norm(root(stage.norm2), width, eps)?,
            fc1: self.linear(root(stage.fc1), width, width)?,
            fc2: self.linear(root(stage.fc2), width, width)?,
        })
    }

    fn projection(
        &mut self,
        s: &Skeleton,
        channels: usize,
        [height, width]: [usize; 2],
    ) -> Result<Linear<Tensor>> {
        let weight = self.take(root("patch_embed.proj"), &[s.width, channels, height, width])?;
        let bias = bias_of(root("patch_embed.proj"));
        let bias = if self.has(bias) { Some(self.take(bias, &[s.width])?) } else { None };
        Ok(Linear { weight, bias })
    }

    /// A convolution and the batch norm behind it, as one layer.
    fn convolution(
        &mut self,
        [convolution, norm]: [&'static str; 2],
        shape: [usize; 4],
    ) -> Result<Linear<Tensor>> {
        let outputs = [shape[0]];
        let weight = self.take(root(convolution), &shape)?;
        let [mean, variance] = match norm {
            "stem.bn1" => ["stem.bn1.mean", "stem.bn1.variance"],
            "stem.bn2" => ["stem.bn2.mean", "stem.bn2.variance"],
            _ => ["stem.bn3.mean", "stem.bn3.variance"],
        };
        let parts = [
            self.take(root(norm), &outputs)?,
            self.take(bias_of(root(norm)), &outputs)?,
            self.take(root(mean), &outputs)?,
            self.take(root(variance), &outputs)?,
        ];
        let scale_and_shift = batch_norm::scale_and_shift(&parts).map_err(|negative| {
            self.error_at(root(variance), format!("holds {negative}; a variance is at least 0"))
        })?;
        let (weight, bias) = batch_norm::fold(weight, &scale_and_shift)?;
        Ok(Linear { weight, bias: Some(bias) })
    }
}

/// Rows of (channels, taps) as rows of (taps, channels).
fn channels_last(tensor: &Tensor, channels: usize) -> Result<Tensor> {
    let row = tensor.width();
    let taps = row / channels;
    let rows = tensor.data().chunks(row);
    let values = rows.flat_map(|row| (0..row.len()).map(|at| row[at % channels * taps + at / channels]));
    Tensor::new(tensor.shape(), values.collect())
}

/// A convolution (outputs, inputs, height, width) as a matrix (outputs, height · width · inputs).
pub(super) fn taps_first(layer: &Linear<Tensor>) -> Result<Linear<Tensor>> {
    let [outputs, inputs] = [0, 1].map(|axis| layer.weight.dim(axis));
    let taps = layer.weight.dim(2) * layer.weight.dim(3);
    let row = |o: usize| {
        let row = layer.weight.item(o);
        (0..taps * inputs).map(move |at| row[at % inputs * taps + at / inputs])
    };
    let weight = Tensor::new(&[outputs, taps * inputs], (0..outputs).flat_map(row).collect())?;
    Ok(Linear { weight, bias: layer.bias.clone() })
}
