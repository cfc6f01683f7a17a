//! Small checkpoints, written by hand.

mod configs;
mod files;
mod masks;
mod models;
mod noise;
mod real;
mod stems;

use std::collections::BTreeMap;

use foveate::{
    Error,
    weights::{Checkpoint, ConfigFile, LoadedVit, Overrides, load_vit},
};

const WIDTH: usize = 16;
const DEPTH: usize = 2;
const HIDDEN: usize = 32;
const PATCH: usize = 4;
const GRID: usize = 3;
const CLASSES: usize = 5;

/// Names, shapes and values: a checkpoint before it is a file.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// Values that differ from each other and depend on the name only.
fn values(name: &str, count: usize) -> Vec<f32> {
    let mut state = name.bytes().fold(0xcbf2_9ce4_u32, |h, b| (h ^ u32::from(b)).wrapping_mul(0x0100_0193));
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from((state >> 16) as u16) / 65536.0 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn put(tensors: &mut Tensors, name: &str, shape: &[usize]) {
    tensors.insert(name.into(), (shape.to_vec(), values(name, shape.iter().product())));
}

fn put_layer(tensors: &mut Tensors, name: &str, rows: usize, columns: usize) {
    put(tensors, &format!("{name}.weight"), &[rows, columns]);
    put(tensors, &format!("{name}.bias"), &[rows]);
}

fn put_norm(tensors: &mut Tensors, name: &str, width: usize) {
    put(tensors, &format!("{name}.weight"), &[width]);
    put(tensors, &format!("{name}.bias"), &[width]);
}

/// A small ViT in timm's names.
fn timm() -> Tensors {
    let mut t = Tensors::new();
    put(&mut t, "cls_token", &[1, 1, WIDTH]);
    put(&mut t, "pos_embed", &[1, GRID * GRID + 1, WIDTH]);
    put(&mut t, "patch_embed.proj.weight", &[WIDTH, 3, PATCH, PATCH]);
    put(&mut t, "patch_embed.proj.bias", &[WIDTH]);
    for i in 0..DEPTH {
        put_norm(&mut t, &format!("blocks.{i}.norm1"), WIDTH);
        put_layer(&mut t, &format!("blocks.{i}.attn.qkv"), 3 * WIDTH, WIDTH);
        put_layer(&mut t, &format!("blocks.{i}.attn.proj"), WIDTH, WIDTH);
        put_norm(&mut t, &format!("blocks.{i}.norm2"), WIDTH);
        put_layer(&mut t, &format!("blocks.{i}.mlp.fc1"), HIDDEN, WIDTH);
        put_layer(&mut t, &format!("blocks.{i}.mlp.fc2"), WIDTH, HIDDEN);
    }
    put_norm(&mut t, "norm", WIDTH);
    put_layer(&mut t, "head", CLASSES, WIDTH);
    t
}

fn put_layer_scale(t: &mut Tensors) {
    for i in 0..DEPTH {
        put(t, &format!("blocks.{i}.ls1.gamma"), &[WIDTH]);
        put(t, &format!("blocks.{i}.ls2.gamma"), &[WIDTH]);
    }
}

/// Renames by the first pair whose left side occurs in a name.
fn renamed(tensors: &Tensors, pairs: &[(&str, &str)]) -> Tensors {
    let rename = |name: &str| {
        let mut name = name.to_owned();
        for (old, new) in pairs {
            name = name.replace(old, new);
        }
        name
    };
    tensors.iter().map(|(name, tensor)| (rename(name), tensor.clone())).collect()
}

/// Cuts packed queries, keys and values apart.
fn split(tensors: &Tensors) -> Tensors {
    let mut out = Tensors::new();
    for (name, (shape, data)) in tensors {
        if !name.contains("attn.qkv") {
            out.insert(name.clone(), (shape.clone(), data.clone()));
            continue;
        }
        for (part, chunk) in ["query", "key", "value"].iter().zip(data.chunks(data.len() / 3)) {
            let mut shape = shape.clone();
            shape[0] /= 3;
            out.insert(name.replace("attn.qkv", &format!("attn.{part}")), (shape, chunk.to_vec()));
        }
    }
    out
}

/// The bytes of a safetensors file.
fn bytes(tensors: &Tensors) -> Vec<u8> {
    let mut data = Vec::new();
    let mut header = serde_json::Map::new();
    for (name, (shape, values)) in tensors {
        let start = data.len();
        data.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        let info = serde_json::json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), info);
    }
    assemble(&serde_json::Value::Object(header).to_string(), &data)
}

fn assemble(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
    out
}

fn checkpoint(tensors: &Tensors) -> Checkpoint {
    Checkpoint::from_bytes("tiny.safetensors", bytes(tensors)).unwrap()
}

fn set(settings: &[&str]) -> Overrides {
    let mut overrides = Overrides::default();
    for setting in settings {
        overrides.set(setting).unwrap();
    }
    overrides
}

fn load(tensors: &Tensors, settings: &[&str]) -> Result<LoadedVit, Error> {
    load_vit(&checkpoint(tensors), None, &set(settings))
}

fn load_with(tensors: &Tensors, config: &str, settings: &[&str]) -> Result<LoadedVit, Error> {
    load_vit(&checkpoint(tensors), Some(&ConfigFile::from_json("config.json", config)?), &set(settings))
}

/// The error's text, after checking that it is one line of bearable length.
#[track_caller]
fn message<T>(result: Result<T, Error>) -> String {
    let Err(error) = result else { panic!("this should have failed") };
    let text = error.to_string();
    assert!(!text.contains('\n') && text.len() < 600, "{text}");
    text
}

#[track_caller]
fn fails<T>(result: Result<T, Error>, parts: &[&str]) {
    let text = message(result);
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
}

/// All parameters as text: equal text means equal bits, zeros' signs aside.
fn text(loaded: &LoadedVit) -> String {
    format!("{:?}", loaded.params)
}

const TO_HF: [(&str, &str); 10] = [
    ("cls_token", "embeddings.cls_token"),
    ("dist_token", "embeddings.distillation_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
    ("attn.proj", "attention.output.dense"),
    ("attn.query", "attention.attention.query"),
    ("attn.key", "attention.attention.key"),
    ("attn.value", "attention.attention.value"),
    ("blocks.", "encoder.layer."),
    ("head_dist", "distillation_classifier"),
];

fn hugging_face_vit(tensors: &Tensors) -> Tensors {
    let common = renamed(&split(tensors), &TO_HF);
    renamed(
        &common,
        &[
            ("head", "classifier"),
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("mlp.fc1", "intermediate.dense"),
            ("mlp.fc2", "output.dense"),
            ("norm.", "layernorm."),
        ],
    )
}

fn hugging_face_dinov2(tensors: &Tensors) -> Tensors {
    let common = renamed(&split(tensors), &TO_HF);
    renamed(
        &common,
        &[
            ("reg_token", "embeddings.register_tokens"),
            ("head", "classifier"),
            ("ls1.gamma", "layer_scale1.lambda1"),
            ("ls2.gamma", "layer_scale2.lambda1"),
            ("norm.", "layernorm."),
        ],
    )
}

fn with_prefix(tensors: &Tensors, prefix: &str, except: &str) -> Tensors {
    let name = |name: &String| if name.contains(except) { name.clone() } else { format!("{prefix}{name}") };
    tensors.iter().map(|(n, tensor)| (name(n), tensor.clone())).collect()
}
