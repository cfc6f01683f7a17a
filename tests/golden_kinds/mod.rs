//! Reading golden files and comparing with them.

pub(crate) mod affnet;
pub(crate) mod cluster;
pub(crate) mod dynamicvit;
pub(crate) mod evit;
pub(crate) mod harness;
pub(crate) mod mctf;
pub(crate) mod stems;
pub(crate) mod svite;
pub(crate) mod tome;
pub(crate) mod vit;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use crate::Golden;
use foveate::{
    Images, Pixels, Tensor, TokenPlan,
    backend::Merged,
    model::{Observer, Output, Vit},
    reduction::{Evidence, Method},
    weights::{Checkpoint, LoadedVit, Overrides, load_vit},
};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// One golden file: its configuration and all its tensors.
pub(crate) struct File {
    pub(crate) path: PathBuf,
    pub(crate) config: Value,
    tensors: HashMap<String, Array>,
}

/// A tensor of any golden type, widened.
pub(crate) struct Array {
    pub(crate) shape: Vec<usize>,
    pub(crate) values: Vec<f64>,
}

impl Array {
    pub(crate) fn tensor(&self) -> Tensor {
        Tensor::new(&self.shape, self.floats()).unwrap()
    }

    /// (B, N, 1) sizes as (B, N).
    pub(crate) fn sizes(&self) -> Tensor {
        Tensor::new(&self.shape[..2], self.floats()).unwrap()
    }

    pub(crate) fn floats(&self) -> Vec<f32> {
        self.values.iter().map(|&v| v as f32).collect()
    }

    /// Row `row` as indices.
    pub(crate) fn indices(&self, row: usize) -> Vec<usize> {
        let width = self.shape.last().copied().unwrap_or(1);
        self.values[row * width..(row + 1) * width].iter().map(|&v| v as usize).collect()
    }

    pub(crate) fn row(&self, row: usize) -> Vec<f32> {
        let width = self.values.len() / self.shape[0];
        self.values[row * width..(row + 1) * width].iter().map(|&v| v as f32).collect()
    }
}

impl File {
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
        if path.extension().is_some_and(|e| e == "json") {
            let config = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
            return Ok(Self { path: path.to_owned(), config, tensors: HashMap::new() });
        }
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|e| e.to_string())?;
        let config =
            metadata.metadata().as_ref().and_then(|m| m.get("config")).ok_or("no config metadata")?;
        let config = serde_json::from_str(config).map_err(|e| e.to_string())?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| e.to_string())?;
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let values = widen(view.dtype(), view.data());
            (name, Array { shape: view.shape().to_vec(), values })
        });
        let tensors = tensors.collect();
        Ok(Self { path: path.to_owned(), config, tensors })
    }

    /// `config.kind`; the JSON lists of schedules and densities carry their kind in their names.
    pub(crate) fn kind(&self) -> String {
        if let Some(kind) = self.config.get("kind").and_then(Value::as_str) {
            return kind.to_owned();
        }
        let stem = self.path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        stem.trim_start_matches("svite_").to_owned()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Array> {
        self.tensors.get(name)
    }

    pub(crate) fn array(&self, name: &str) -> &Array {
        self.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.path.display()))
    }

    pub(crate) fn tensor(&self, name: &str) -> Tensor {
        self.array(name).tensor()
    }

    pub(crate) fn int(&self, key: &str) -> usize {
        int(&self.config, key)
    }
}

pub(crate) fn int(value: &Value, key: &str) -> usize {
    value[key].as_u64().unwrap_or_else(|| panic!("no number {key}")) as usize
}

pub(crate) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("no text {key}"))
}

fn widen(dtype: Dtype, bytes: &[u8]) -> Vec<f64> {
    match dtype {
        Dtype::F64 => bytes.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b)).collect(),
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|&b| half::f16::from_le_bytes(b).to_f64()).collect(),
        Dtype::I64 => bytes.as_chunks().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect(),
        Dtype::I32 => bytes.as_chunks().0.iter().map(|&b| f64::from(i32::from_le_bytes(b))).collect(),
        Dtype::U8 => bytes.iter().map(|&b| f64::from(b)).collect(),
        other => panic!("golden files hold no {other:?}"),
    }
}

/// What comparing a file has shown so far.
#[derive(Default)]
pub(crate) struct Check {
    /// Largest error over its tolerance.
    pub(crate) worst: f64,
    pub(crate) compared: usize,
    indices: Option<bool>,
    pub(crate) failures: Vec<String>,
}

/// How a tolerance is meant.
#[derive(Clone, Copy)]
pub(crate) enum Tolerance {
    Absolute(f64),
    /// Times the largest magnitude expected, at least 1.
    Scaled(f64),
}

impl Check {
    pub(crate) fn fail(&mut self, what: String) {
        self.failures.push(what);
    }

    pub(crate) fn indices(&self) -> &'static str {
        match self.indices {
            None => "-",
            Some(true) => "exact",
            Some(false) => "DIFFER",
        }
    }

    pub(crate) fn close(&mut self, what: &str, got: &[f32], want: &Array, tolerance: Tolerance) {
        self.compared += 1;
        if got.len() != want.values.len() {
            return self.fail(format!("{what}: {} values, expected {:?}", got.len(), want.shape));
        }
        let limit = match tolerance {
            Tolerance::Absolute(limit) => limit,
            Tolerance::Scaled(limit) => {
                limit * want.values.iter().filter(|v| v.is_finite()).fold(1.0, |m: f64, v| m.max(v.abs()))
            }
        };
        let mut worst = (0.0, 0);
        for (at, (&got, &want)) in got.iter().zip(&want.values).enumerate() {
            let got = f64::from(got);
            let error = if got == want { 0.0 } else { (got - want).abs() };
            if error > worst.0 || error.is_nan() {
                worst = (error, at);
            }
        }
        self.worst = self.worst.max(worst.0 / limit);
        if worst.0 > limit || worst.0.is_nan() {
            let at = worst.1;
            self.fail(format!("{what}[{at}]: {} instead of {}, limit {limit:e}", got[at], want.values[at]));
        }
    }

    pub(crate) fn same<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, got: &T, want: &T) {
        self.compared += 1;
        let same = got == want;
        self.indices = Some(self.indices.unwrap_or(true) && same);
        if !same {
            let text = |value: &T| format!("{value:?}").chars().take(160).collect::<String>();
            self.fail(format!("{what}: {} instead of {}", text(got), text(want)));
        }
    }
}

/// The Vit of a golden configuration, from tensors under `prefix` of `file`.
pub(crate) fn load(path: &Path, prefix: &str, settings: &[String]) -> Vit<Golden> {
    let loaded = loaded(path, prefix, settings);
    Vit::new(crate::backend(), loaded.config, loaded.params).unwrap()
}

/// What that Vit is made of.
pub(crate) fn loaded(path: &Path, prefix: &str, settings: &[String]) -> LoadedVit {
    let checkpoint = Checkpoint::open(path).unwrap();
    let checkpoint = if prefix.is_empty() { checkpoint } else { checkpoint.with_prefix(prefix) };
    let mut overrides = Overrides::default();
    for setting in settings {
        overrides.set(setting).unwrap();
    }
    load_vit(&checkpoint, None, &overrides).unwrap()
}

pub(crate) fn images(array: &Array) -> Images {
    let shape = <[usize; 4]>::try_from(array.shape.as_slice()).unwrap();
    Images::new(shape, Pixels::F32(array.floats())).unwrap()
}

/// Everything a model run lets one see.
#[derive(Default)]
pub(crate) struct Record {
    pub(crate) stages: Vec<Tensor>,
    pub(crate) embedded: Option<Tensor>,
    pub(crate) blocks: Vec<Tensor>,
    pub(crate) steps: Vec<Recorded>,
}

pub(crate) struct Recorded {
    pub(crate) layer: usize,
    pub(crate) class_scores: Option<Tensor>,
    pub(crate) received: Option<Tensor>,
    pub(crate) packed: Option<Tensor>,
    pub(crate) tokens_in: Tensor,
    pub(crate) sizes_in: Option<Tensor>,
    pub(crate) plan: TokenPlan,
    pub(crate) tokens: Tensor,
    pub(crate) sizes: Tensor,
}

impl Observer<Golden> for Record {
    fn stage(&mut self, _stage: usize, tokens: &Tensor) {
        self.stages.push(tokens.clone());
    }

    fn embedded(&mut self, tokens: &Tensor) {
        self.embedded = Some(tokens.clone());
    }

    fn reduced(&mut self, evidence: &Evidence<'_, Golden>, plan: &TokenPlan, merged: &Merged<Tensor>) {
        self.steps.push(Recorded {
            layer: evidence.layer,
            class_scores: evidence.scores.class.clone(),
            received: evidence.scores.received.clone(),
            packed: evidence.heads.as_ref().map(|heads| heads.packed.clone()),
            tokens_in: evidence.tokens.clone(),
            sizes_in: evidence.sizes.cloned(),
            plan: plan.clone(),
            tokens: merged.tokens.clone(),
            sizes: merged.sizes.clone(),
        });
    }

    fn block(&mut self, _layer: usize, tokens: &Tensor) {
        self.blocks.push(tokens.clone());
    }
}

pub(crate) fn record(vit: &Vit<Golden>, images: &Images, method: &impl Method) -> (Output<Golden>, Record) {
    let mut record = Record::default();
    let output = vit.forward_observed(images, method, &mut record).unwrap();
    (output, record)
}

/// (B, H, N) averaged over heads.
pub(crate) fn head_mean(scores: &Tensor) -> Vec<f32> {
    let (batch, heads, n) = (scores.dim(0), scores.dim(1), scores.dim(2));
    let mean = |b: usize, t: usize| {
        (0..heads).map(|h| scores.data()[(b * heads + h) * n + t]).sum::<f32>() / heads as f32
    };
    (0..batch).flat_map(|b| (0..n).map(move |t| (b, t))).map(|(b, t)| mean(b, t)).collect()
}
