//! Files that other programs wrote: golden data of the methods' official code, and models.

use std::path::PathBuf;

use foveate::{
    Tensor,
    weights::{Family, PositionResampling, load_vit_file},
};

use super::*;

/// A file of the golden data or the models, if they lie beside this checkout.
fn shared(path: &str) -> Option<PathBuf> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    if !path.is_file() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

/// `|a - b| <= tolerance · max(1, max |b|)`, with the place of the largest difference in the message.
#[track_caller]
fn close(found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(1.0_f32, |m, v| m.max(v.abs()));
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).enumerate();
    let (at, worst) = differences.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap();
    assert!(worst <= tolerance * scale, "at {at}: {} instead of {}", found[at], expected[at]);
}

#[test]
fn state_dicts_of_timm() {
    for (name, heads, width, depth, tokens) in
        [("a", "heads=3", 96, 4, 65), ("b", "heads=3", 192, 3, 65), ("d", "heads=4", 64, 4, 66)]
    {
        let Some(path) = shared(&format!("golden/tm_vit_{name}_weights.safetensors")) else { return };
        let loaded = load_vit_file(&path, &set(&[heads])).unwrap();
        let c = &loaded.config;
        assert_eq!((c.width, c.depth, c.tokens(), c.image, c.classes), (width, depth, tokens, [64, 64], 10));
        assert_eq!((c.distillation_token, loaded.params.head_dist.is_some()), (name == "d", name == "d"));
        let file = Checkpoint::open(&path).unwrap();
        let fc1 = file.tensor("blocks.2.mlp.fc1.weight").unwrap();
        assert_eq!(loaded.params.blocks[2].fc1.weight, fc1);
        assert_eq!(file.dtype("norm.weight").as_deref(), Some("F16"));
    }
}

#[test]
fn weights_inside_golden_files() {
    for (file, heads, special, classes, family) in [
        ("deit_distilled_tiny", "heads=3", 2, 10, Family::Timm),
        ("dinov2_reg_tiny", "heads=3", 5, 0, Family::Dinov2),
        ("evit_model_a", "heads=2", 1, 10, Family::Timm),
    ] {
        let Some(path) = shared(&format!("golden/{file}.safetensors")) else { return };
        let all = Checkpoint::open(&path).unwrap();
        let weights = all.with_prefix("w/");
        assert!(weights.contains("cls_token") && !weights.contains("x") && all.contains("x"));
        let loaded = load_vit(&weights, None, &set(&[heads])).unwrap();
        assert_eq!((loaded.config.special_tokens(), loaded.config.classes), (special, classes), "{file}");
        assert_eq!(loaded.family, family);
        // Errors name the tensor as the file does.
        fails(weights.tensor("nothing"), &[file, "`w/nothing`: missing"]);
        // Read without the view, the activations are in the way.
        fails(load_vit(&all, None, &set(&[heads])), &[file]);
    }
    // What enters block 0 is the patch projection plus the positions, so the special rows are known exactly.
    let Some(path) = shared("golden/dinov2_reg_tiny.safetensors") else { return };
    let all = Checkpoint::open(&path).unwrap();
    let loaded = load_vit(&all.with_prefix("w/"), None, &set(&["heads=3"])).unwrap();
    let tokens = all.tensor("act/tokens").unwrap();
    close(loaded.params.prefix.unwrap().data(), &tokens.item(0)[..5 * 48], 1e-6);
}

/// The positions of the special tokens that have some, and of the patches, as the official code adds them.
fn positions(weights: &Checkpoint, loaded: &LoadedVit) -> Vec<f32> {
    let class: &Tensor = &weights.tensor("cls_token").unwrap();
    let prefix = loaded.params.prefix.as_ref().unwrap().item(0);
    let row = prefix.iter().zip(class.data()).map(|(sum, token)| sum - token);
    row.chain(loaded.params.position.as_ref().unwrap().data().iter().copied()).collect()
}

#[test]
fn position_tables_resampled_as_the_official_code_does() {
    if let Some(path) = shared("golden/evit_posresize.safetensors") {
        let all = Checkpoint::open(path).unwrap();
        let weights = all.with_prefix("w/");
        let loaded = load_vit(&weights, None, &set(&["heads=2", "image=48"])).unwrap();
        close(&positions(&weights, &loaded), all.tensor("pos_embed_resized").unwrap().data(), 1e-6);
        // The test can fail: the other filter is another table.
        let other = set(&["heads=2", "image=48", "position_antialias=true"]);
        let other = load_vit(&weights, None, &other).unwrap();
        let difference = |a: &LoadedVit, b: &LoadedVit| {
            let (a, b) = (a.params.position.as_ref().unwrap(), b.params.position.as_ref().unwrap());
            a.data().iter().zip(b.data()).fold(0.0_f32, |m, (a, b)| m.max((a - b).abs()))
        };
        assert!(difference(&loaded, &other) > 1e-3);
    }
    if let Some(path) = shared("golden/dinov2_reg_resized.safetensors") {
        let all = Checkpoint::open(path).unwrap();
        let weights = all.with_prefix("w/");
        let loaded = load_vit(&weights, None, &set(&["heads=2", "image=56x42"])).unwrap();
        assert_eq!(loaded.config.grid(), [8, 6]);
        close(&positions(&weights, &loaded), all.tensor("act/pos_embed_used").unwrap().data(), 2e-5);
        let how = loaded.provenance.iter().find(|p| p.field == "positions").unwrap();
        assert!(how.value.contains(PositionResampling::Antialiased.name()), "{}", how.value);
    }
}

#[test]
fn models() {
    if let Some(path) = shared("models/fashion_deit_p4_f16.safetensors") {
        let loaded = load_vit_file(path, &Overrides::default()).unwrap();
        let c = &loaded.config;
        assert_eq!((c.channels, c.tokens(), c.heads, c.classes), (1, 50, 2, 10));
        assert_eq!(c.labels.as_ref().unwrap()[9], "Ankle boot");
        assert!((c.transform.mean[0] - 0.283_366_6).abs() < 1e-6 && c.transform.crop_pct == 1.0);
    }
    if let Some(path) = shared("models/vit_small_patch14_dinov2_focus_f16.safetensors") {
        let loaded = load_vit_file(&path, &Overrides::default()).unwrap();
        assert_eq!((loaded.config.image, loaded.config.heads, loaded.config.tokens()), ([518, 518], 6, 1370));
        let small = load_vit_file(&path, &set(&["image=224"])).unwrap();
        assert_eq!((small.config.tokens(), small.params.position.unwrap().shape()), (257, &[256, 384][..]));
    }
}
