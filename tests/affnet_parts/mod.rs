//! A small AFFNet's checkpoint under the official names.

use std::collections::BTreeMap;

use safetensors::{Dtype, tensor::TensorView};

/// Tensors by name.
pub(crate) type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Classes of the model.
pub(crate) const CLASSES: usize = 10;

/// Every tensor of a network of 8 first channels, widths 16, 16, 24, 32 and 40 and one filter a stage.
pub(crate) fn tensors() -> Tensors {
    let mut tensors = Tensors::new();
    let mut seed = 0x9E37_79B9_7F4A_7C15_u64;
    let mut value = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    };
    let mut put = |name: String, shape: &[usize], scale: f32, offset: f32| {
        let values = (0..shape.iter().product()).map(|_| offset + scale * value()).collect();
        tensors.insert(name, (shape.to_vec(), values));
    };
    let mut convolution = |name: &str, outputs: usize, inputs: usize, kernel: usize| {
        let scale = ((inputs * kernel * kernel) as f32).powf(-0.5);
        put(format!("{name}.block.conv.weight"), &[outputs, inputs, kernel, kernel], scale, 0.0);
        for (part, scale, offset) in
            [("weight", 0.1, 1.0), ("bias", 0.1, 0.0), ("running_mean", 0.1, 0.0), ("running_var", 0.1, 1.0)]
        {
            put(format!("{name}.block.norm.{part}"), &[outputs], scale, offset);
        }
        put(format!("{name}.block.norm.num_batches_tracked"), &[], 0.0, 7.0);
    };
    let mut bottleneck = |name: &str, inputs: usize, outputs: usize| {
        convolution(&format!("{name}.block.exp_1x1"), 2 * inputs, inputs, 1);
        convolution(&format!("{name}.block.conv_3x3"), 2 * inputs, 1, 3);
        convolution(&format!("{name}.block.red_1x1"), outputs, 2 * inputs, 1);
    };
    bottleneck("layer_1.0", 8, 16);
    bottleneck("layer_2.0", 16, 16);
    bottleneck("layer_2.1", 16, 16);
    for (layer, inputs, width) in [(3, 16, 24), (4, 24, 32), (5, 32, 40)] {
        bottleneck(&format!("layer_{layer}.0"), inputs, width);
        bottleneck(&format!("layer_{layer}.1.global_rep.0.mlp"), width, width);
    }
    convolution("conv_1", 8, 3, 3);
    convolution("conv_1x1_exp", 48, 40, 1);
    for (layer, width) in [(3, 24), (4, 32), (5, 40)] {
        let name = |part: &str| format!("layer_{layer}.1.{part}");
        convolution(&name("conv_proj"), width, width, 1);
        convolution(&name("fusion"), width, 2 * width, 1);
    }
    for (layer, width) in [(3, 24), (4, 32), (5, 40)] {
        let (name, s) = (|part: &str| format!("layer_{layer}.1.global_rep.{part}"), width / 8);
        for norm in ["0.norm1", "0.norm2", "1"] {
            put(name(&format!("{norm}.weight")), &[width], 0.1, 1.0);
            put(name(&format!("{norm}.bias")), &[width], 0.1, 0.0);
        }
        for part in ["1", "2"] {
            put(name(&format!("0.filter.w{part}")), &[2, 8, s, s], 0.4, 0.0);
            put(name(&format!("0.filter.b{part}")), &[2, 8, s], 0.1, 0.0);
        }
    }
    put("classifier.fc.weight".to_owned(), &[CLASSES, 48], 0.3, 0.0);
    put("classifier.fc.bias".to_owned(), &[CLASSES], 0.1, 0.0);
    tensors
}

/// The file of these tensors.
pub(crate) fn file(tensors: &Tensors) -> Vec<u8> {
    let bytes: Vec<(&String, &Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, (shape, values))| {
            (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, bytes)| (*name, TensorView::new(Dtype::F32, (*shape).clone(), bytes).unwrap()));
    safetensors::serialize(views, None).unwrap()
}
