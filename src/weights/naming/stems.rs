//! The names of what LV-ViT adds to timm's, all in front of the blocks or behind them.

use super::{Row, layer, tensor};

pub(super) const ROWS: &[Row] = &[
    layer("patch_embed.conv1", "stem.conv1"),
    layer("patch_embed.conv2", "stem.conv2"),
    layer("patch_embed.conv3", "stem.conv3"),
    layer("patch_embed.bn1", "stem.bn1"),
    tensor("patch_embed.bn1.running_mean", "stem.bn1.mean"),
    tensor("patch_embed.bn1.running_var", "stem.bn1.variance"),
    layer("patch_embed.bn2", "stem.bn2"),
    tensor("patch_embed.bn2.running_mean", "stem.bn2.mean"),
    tensor("patch_embed.bn2.running_var", "stem.bn2.variance"),
    layer("patch_embed.bn3", "stem.bn3"),
    tensor("patch_embed.bn3.running_mean", "stem.bn3.mean"),
    tensor("patch_embed.bn3.running_var", "stem.bn3.variance"),
    layer("aux_head", "aux_head"),
];

/// Counts of batches seen, which nothing depends on.
pub(super) fn is_counter(name: &str) -> bool {
    name.ends_with(".num_batches_tracked")
}
