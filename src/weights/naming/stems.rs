//! The names of what LV-ViT and T2T-ViT add to timm's, all in front of the blocks or behind them.

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
    layer("tokens_to_token.attention1.norm1", "t2t.1.norm1"),
    layer("tokens_to_token.attention1.attn.qkv", "t2t.1.qkv"),
    layer("tokens_to_token.attention1.attn.proj", "t2t.1.proj"),
    layer("tokens_to_token.attention1.norm2", "t2t.1.norm2"),
    layer("tokens_to_token.attention1.mlp.fc1", "t2t.1.fc1"),
    layer("tokens_to_token.attention1.mlp.fc2", "t2t.1.fc2"),
    layer("tokens_to_token.attention1.kqv", "t2t.1.kqv"),
    layer("tokens_to_token.attention1.proj", "t2t.1.proj"),
    layer("tokens_to_token.attention1.mlp.0", "t2t.1.fc1"),
    layer("tokens_to_token.attention1.mlp.2", "t2t.1.fc2"),
    tensor("tokens_to_token.attention1.w", "t2t.1.w"),
    layer("tokens_to_token.attention2.norm1", "t2t.2.norm1"),
    layer("tokens_to_token.attention2.attn.qkv", "t2t.2.qkv"),
    layer("tokens_to_token.attention2.attn.proj", "t2t.2.proj"),
    layer("tokens_to_token.attention2.norm2", "t2t.2.norm2"),
    layer("tokens_to_token.attention2.mlp.fc1", "t2t.2.fc1"),
    layer("tokens_to_token.attention2.mlp.fc2", "t2t.2.fc2"),
    layer("tokens_to_token.attention2.kqv", "t2t.2.kqv"),
    layer("tokens_to_token.attention2.proj", "t2t.2.proj"),
    layer("tokens_to_token.attention2.mlp.0", "t2t.2.fc1"),
    layer("tokens_to_token.attention2.mlp.2", "t2t.2.fc2"),
    tensor("tokens_to_token.attention2.w", "t2t.2.w"),
    layer("tokens_to_token.project", "t2t.project"),
];

/// Counts of batches seen, which nothing depends on.
pub(super) fn is_counter(name: &str) -> bool {
    name.ends_with(".num_batches_tracked")
}
