//! Masks of sparse training in a checkpoint.

use foveate::{
    Images, Pixels, Reduction, Tensor,
    model::{BlockSize, Vit},
    reference::Reference,
};

use super::*;

fn mask(tensors: &mut Tensors, name: &str, bits: &[f32]) {
    tensors.insert(name.into(), (vec![bits.len()], bits.to_vec()));
}

fn logits(tensors: &Tensors) -> Tensor {
    let loaded = load(tensors, &["heads=2"]).unwrap();
    let vit = Vit::new(Reference::new(), loaded.config, loaded.params).unwrap();
    let pixels = values("pixels", 2 * 3 * 144);
    let images = Images::new([2, 3, 12, 12], Pixels::F32(pixels)).unwrap();
    vit.forward(&images, &Reduction::None).unwrap().logits.unwrap()
}

#[track_caller]
fn close(a: &Tensor, b: &Tensor) {
    for (a, b) in a.data().iter().zip(b.data()) {
        assert!((a - b).abs() <= 2e-6, "{a} and {b}");
    }
}

/// Zeros in the place of heads' and neurons' weights, biases as they are.
fn zeroed(tensors: &Tensors, block: usize, heads: &[f32], neurons: &[f32]) -> Tensors {
    let mut out = tensors.clone();
    let head_dim = WIDTH / heads.len();
    let qkv = &mut out.get_mut(&format!("blocks.{block}.attn.qkv.weight")).unwrap().1;
    for (at, value) in qkv.iter_mut().enumerate() {
        *value *= heads[at / WIDTH % WIDTH / head_dim];
    }
    let fc1 = &mut out.get_mut(&format!("blocks.{block}.mlp.fc1.weight")).unwrap().1;
    fc1.iter_mut().enumerate().for_each(|(at, value)| *value *= neurons[at / WIDTH]);
    let fc2 = &mut out.get_mut(&format!("blocks.{block}.mlp.fc2.weight")).unwrap().1;
    fc2.iter_mut().enumerate().for_each(|(at, value)| *value *= neurons[at % HIDDEN]);
    out
}

#[test]
fn what_is_cut_off_changes_no_logit() {
    let plain = timm();
    let (one, none, all) = ([0.0, 1.0], [0.0; 2], [1.0; 2]);
    let some: Vec<f32> = (0..HIDDEN).map(|j| f32::from(u8::from(j % 3 != 1))).collect();
    // A block that loses everything keeps one of each, without weights.
    for (heads, neurons, left) in
        [(one, some.clone(), [1, 21]), (none, vec![0.0; HIDDEN], [1, 1]), (all, some, [2, 21])]
    {
        let mut masked = plain.clone();
        mask(&mut masked, "blocks.1.heads", &heads);
        mask(&mut masked, "blocks.1.neurons", &neurons);
        let config = load(&masked, &["heads=2"]).unwrap().config;
        let whole = BlockSize { heads: 2, hidden: HIDDEN };
        assert_eq!(config.compact, [whole, BlockSize { heads: left[0], hidden: left[1] }]);
        close(&logits(&masked), &logits(&zeroed(&plain, 1, &heads, &neurons)));
    }
    let mut whole = plain.clone();
    mask(&mut whole, "blocks.0.heads", &all);
    assert!(load(&whole, &["heads=2"]).unwrap().config.compact.is_empty());
    close(&logits(&whole), &logits(&plain));
}

#[test]
fn what_a_layer_norm_looks_at_is_not_cut_off() {
    let mut plain = timm();
    for i in 0..DEPTH {
        put_norm(&mut plain, &format!("blocks.{i}.attn.norm"), WIDTH);
        put_norm(&mut plain, &format!("blocks.{i}.mlp.norm"), HIDDEN);
    }
    let (heads, neurons) = ([1.0, 0.0], vec![0.0; HIDDEN]);
    let mut masked = plain.clone();
    mask(&mut masked, "blocks.0.heads", &heads);
    mask(&mut masked, "blocks.0.neurons", &neurons);
    assert!(load(&masked, &["heads=2"]).unwrap().config.compact.is_empty());
    assert_eq!(logits(&masked), logits(&zeroed(&plain, 0, &heads, &neurons)));
}

#[test]
fn masked_weights_are_zero_in_any_wrapper() {
    let bits: Vec<f32> = (0..CLASSES * WIDTH).map(|at| f32::from(u8::from(at % 2 == 0))).collect();
    let mut masked = timm();
    masked.insert("mask/head.weight".into(), (vec![CLASSES, WIDTH], bits));
    let wrapped = with_prefix(&masked, "module.", "mask/");
    let wrapped = renamed(&wrapped, &[("mask/", "mask/module.")]);
    for tensors in [masked, wrapped] {
        let head = load(&tensors, &["heads=2"]).unwrap().params.head.unwrap();
        let odd = head.weight.data().iter().skip(1).step_by(2);
        assert!(odd.clone().all(|&v| v == 0.0) && head.weight.data()[0] != 0.0);
    }
}

#[test]
fn wrong_masks_are_named() {
    let with = |name: &str, shape: &[usize], bit: f32| {
        let mut tensors = timm();
        tensors.insert(name.into(), (shape.to_vec(), vec![bit; shape.iter().product()]));
        load(&tensors, &["heads=2"])
    };
    fails(with("mask/nothing", &[2], 1.0), &["mask/nothing", "masks `nothing`, which is not there"]);
    fails(with("mask/head.weight", &[2], 1.0), &["mask/head.weight", "shape of what it masks, (5, 16)"]);
    fails(with("mask/head.bias", &[5], 0.5), &["mask/head.bias", "holds 0.5; a mask holds 0 and 1"]);
    fails(with("blocks.0.heads", &[3], 1.0), &["blocks.0.heads", "masks 3 heads; the block has 2"]);
    fails(with("blocks.0.neurons", &[3], 1.0), &["masks 3 neurons; the block has 32"]);
    fails(with("blocks.7.heads", &[2], 1.0), &["blocks.7.heads", "not there; there are 2"]);
}
