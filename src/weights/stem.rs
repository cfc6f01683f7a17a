//! LV-ViT's stem out of a checkpoint.

use super::{
    batch_norm,
    parameters::{Reader, Skeleton, bias_of, root},
};
use crate::{
    Result, Tensor,
    backend::Linear,
    model::{Stem, StemParams},
};

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
        let [_, channels, height, width] =
            self.extents(root("patch_embed.proj"), "(C, channels, patch height, patch width)")?;
        Ok((Stem::Patches, [height, width], channels))
    }

    /// The stem and the projection behind it.
    pub(super) fn read_stem(&mut self, s: &Skeleton) -> Result<(StemParams<Tensor>, Linear<Tensor>)> {
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
        }
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
