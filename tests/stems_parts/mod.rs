//! Small checkpoints of models with stems, under their official names.

use std::{collections::HashMap, fs};

use safetensors::{Dtype, tensor::TensorView};

/// Of the blocks.
pub(crate) const WIDTH: usize = 64;

/// What both models have behind their stems: two blocks on a grid of 4 x 4.
fn shapes() -> Vec<(String, Vec<usize>)> {
    let mut all = vec![
        ("cls_token".to_owned(), vec![1, 1, WIDTH]),
        ("pos_embed".to_owned(), vec![1, 17, WIDTH]),
        ("head.weight".to_owned(), vec![5, WIDTH]),
        ("head.bias".to_owned(), vec![5]),
    ];
    let mut norms = vec!["norm".to_owned()];
    for i in 0..2 {
        let mut layer = |name: &str, rows: usize, columns: usize, bias: bool| {
            all.push((format!("blocks.{i}.{name}.weight"), vec![rows, columns]));
            if bias {
                all.push((format!("blocks.{i}.{name}.bias"), vec![rows]));
            }
        };
        layer("attn.qkv", 3 * WIDTH, WIDTH, false);
        layer("attn.proj", WIDTH, WIDTH, true);
        layer("mlp.fc1", 2 * WIDTH, WIDTH, true);
        layer("mlp.fc2", WIDTH, 2 * WIDTH, true);
        norms.extend([format!("blocks.{i}.norm1"), format!("blocks.{i}.norm2")]);
    }
    for norm in norms {
        all.extend([(format!("{norm}.weight"), vec![WIDTH]), (format!("{norm}.bias"), vec![WIDTH])]);
    }
    all
}

/// An LV-ViT: `--set skip_lam=2`.
pub(crate) fn lvvit() -> Vec<(String, Vec<usize>)> {
    let mut all = shapes();
    let mut put = |name: &str, shape: &[usize]| all.push((name.to_owned(), shape.to_vec()));
    for (i, (inputs, kernel)) in [(3, 7), (8, 3), (8, 3)].into_iter().enumerate() {
        put(&format!("patch_embed.conv{}.weight", i + 1), &[8, inputs, kernel, kernel]);
        for part in ["weight", "bias", "running_mean", "running_var"] {
            put(&format!("patch_embed.bn{}.{part}", i + 1), &[8]);
        }
    }
    put("patch_embed.proj.weight", &[WIDTH, 8, 4, 4]);
    put("patch_embed.proj.bias", &[WIDTH]);
    put("aux_head.weight", &[5, WIDTH]);
    put("aux_head.bias", &[5]);
    all
}

/// A T2T-ViT with performers; on images of 64 pixels its grid is 4 x 4.
pub(crate) fn t2t() -> Vec<(String, Vec<usize>)> {
    let mut all = shapes();
    all.retain(|(name, _)| name != "pos_embed");
    let mut put = |name: &str, shape: &[usize]| all.push((name.to_owned(), shape.to_vec()));
    put("pos_embed", &[1, 5, WIDTH]);
    for (stage, inputs) in [(1, 147), (2, 144)] {
        let name = |part: &str| format!("tokens_to_token.attention{stage}.{part}");
        for (norm, width) in [("norm1", inputs), ("norm2", 16)] {
            put(&name(&format!("{norm}.weight")), &[width]);
            put(&name(&format!("{norm}.bias")), &[width]);
        }
        for (layer, rows, columns) in
            [("kqv", 48, inputs), ("proj", 16, 16), ("mlp.0", 16, 16), ("mlp.2", 16, 16)]
        {
            put(&name(&format!("{layer}.weight")), &[rows, columns]);
            put(&name(&format!("{layer}.bias")), &[rows]);
        }
        put(&name("w"), &[8, 16]);
    }
    put("tokens_to_token.project.weight", &[WIDTH, 144]);
    put("tokens_to_token.project.bias", &[WIDTH]);
    all
}

/// Writes tensors of these shapes: small values, positive where they are variances.
pub(crate) fn write(path: &str, shapes: &[(String, Vec<usize>)]) {
    let mut state = 1_u32;
    let bytes: Vec<Vec<u8>> = shapes
        .iter()
        .map(|(name, shape)| {
            let around = if name.ends_with("running_var") || name.contains("norm") { 1.0 } else { 0.0 };
            let mut value = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                around + (f32::from((state >> 16) as u16) / 65536.0 - 0.5) * 0.25
            };
            (0..shape.iter().product()).flat_map(|_| value().to_le_bytes()).collect()
        })
        .collect();
    let views = shapes.iter().zip(&bytes).map(|((name, shape), bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    let none: Option<HashMap<String, String>> = None;
    fs::write(path, safetensors::serialize(views, none).unwrap()).unwrap();
}
