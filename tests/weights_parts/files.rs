//! Files that are not what they should be.

use foveate::{Error, image::Interpolation, weights::load_vit_file};

use super::*;

/// One tensor, `t`, of this type, shape and range, over `data` bytes.
fn single(dtype: &str, shape: &str, offsets: &str, data: usize) -> Vec<u8> {
    let header = format!(r#"{{"t":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#);
    assemble(&header, &vec![0; data])
}

fn open(bytes: Vec<u8>) -> Result<Checkpoint, Error> {
    Checkpoint::from_bytes("bad.safetensors", bytes)
}

#[test]
fn files_that_are_no_checkpoints() {
    let good = bytes(&timm());
    fails(open(Vec::new()), &["bad.safetensors: is empty"]);
    fails(open(vec![1, 2, 3]), &["3 bytes long"]);
    fails(open(good[..100].to_vec()), &["cut off", "header"]);
    fails(open(good[..good.len() - 1].to_vec()), &["tensor `", "beyond", "cut off"]);
    fails(open([&good[..], b"x"].concat()), &["1 bytes after its last tensor"]);
    fails(
        open([&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        &["claims a header of 18446744073709551615 bytes"],
    );
    fails(open([&(1_u64 << 30).to_le_bytes()[..], b"{}"].concat()), &["claims a header"]);
    fails(open(assemble("[]", b"")), &["damaged header"]);
    fails(open(assemble("{\"a\": ", b"")), &["damaged header"]);
    fails(open([&4_u64.to_le_bytes()[..], b"{\xff\xfe}"].concat()), &["not UTF-8"]);
    fails(open(single("F32", "[2]", "[0,7]", 8)), &["tensor `t`", "8 bytes", "0..7"]);
    fails(open(single("F32", "[2]", "[8,16]", 16)), &["tensor `t`", "gap"]);
    fails(open(single("F32", "[2]", "[0,8]", 4)), &["tensor `t`", "beyond the 4 bytes"]);
    fails(open(single("F32", "[2]", "[8,0]", 8)), &["tensor `t`"]);
    fails(open(single("F32", "[4294967296,4294967296]", "[0,0]", 0)), &["tensor `t`", "impossible"]);
    fails(open(single("F32", "[-1]", "[0,4]", 4)), &["tensor `t`", "whole numbers"]);
    fails(open(single("F99", "[1]", "[0,4]", 4)), &["tensor `t`", "F99", "unknown"]);
    fails(open(single("F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]", 4)), &["tensor `t`", "9 axes"]);
    let pair = r#"{"dtype":"U8","shape":[2],"data_offsets":[0,2]}"#;
    fails(open(assemble(&format!(r#"{{"a":{pair},"b":{pair}}}"#), &[0; 2])), &["tensor `b`", "overlap"]);
    fails(
        open(assemble(&format!(r#"{{"a":{pair},"a":{pair}}}"#), &[0; 2])),
        &["tensor `a`", "described twice"],
    );
    fails(open(assemble(r#"{"a\nb":1}"#, b"")), &["a\\nb"]);
    for (start, word) in [
        (&b"PK\x03\x04 archive of tensors"[..], "PyTorch"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00", "convert it to safetensors"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"{\"metadata\": {}}", "JSON"),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "GGUF"),
    ] {
        fails(open(start.to_vec()), &[word]);
    }
}

#[test]
fn paths_that_are_no_files() {
    let directory = std::env::temp_dir().join(format!("foveate-weights-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let overrides = set(&["heads=2"]);
    let path = directory.join("model.safetensors");
    fails(Checkpoint::open(&directory), &["is a directory"]);
    fails(Checkpoint::open(&path), &["model.safetensors"]);
    std::fs::write(&path, b"").unwrap();
    fails(Checkpoint::open(&path), &["is empty"]);
    std::fs::write(&path, bytes(&timm())).unwrap();
    assert_eq!(load_vit_file(&path, &overrides).unwrap().config.transform.crop_pct, 0.9);
    let preprocessor = r#"{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.5, 1], "size": {"shortest_edge": 16},
        "crop_size": {"height": 12, "width": 12}, "resample": 2}"#;
    std::fs::write(directory.join("preprocessor_config.json"), preprocessor).unwrap();
    let transform = load_vit_file(&path, &overrides).unwrap().config.transform;
    assert_eq!((transform.crop_pct, transform.interpolation), (0.75, Interpolation::Bilinear));
    assert_eq!((&transform.mean[..], &transform.std[..]), (&[0.5; 3][..], &[0.25, 0.5, 1.0][..]));
    std::fs::write(directory.join("config.json"), r#"{"num_attention_heads": 8}"#).unwrap();
    assert_eq!(load_vit_file(&path, &Overrides::default()).unwrap().config.heads, 8);
    std::fs::write(directory.join("config.json"), "{").unwrap();
    fails(load_vit_file(&path, &overrides), &["config.json: is not valid JSON"]);
    std::fs::remove_dir_all(&directory).unwrap();
}
