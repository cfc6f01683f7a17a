//! `foveate info`: what a checkpoint is, and where each number came from.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::PathBuf,
};

use clap::Args;
use foveate::{
    Reduction,
    macs::{Convention, Densities, ModelMacs},
    model::VitConfig,
    reduction::Method,
    weights::{Checkpoint, ConfigFile, LoadedVit, load_vit},
};
use serde_json::{Value, json};

use super::{
    affnet,
    failure::Failure,
    options::{ModelSettings, reductions},
    progress::Progress,
    report::{Align, Table, percent, quantity, thousands, token_path, write_json},
    traffic::Parameters,
};

const EXAMPLES: &str = "\
Examples:
  foveate info deit_small.safetensors
  foveate info dinov2_small.safetensors --image-size 224 -r tome:r=13 -r evit:keep=0.7
  foveate info deit_small.safetensors --json | jq .macs

MACs are multiply-adds per image as fvcore counts them (ToMe, MCTF); the JSON also has torchprofile's (EViT).

JSON: command, version, file, family, parameters, file_parameters, file_bytes, storage, model: {image, patch, stem, \
channels, width, depth, heads, hidden, activation, norm_eps, class_token, distillation_token, registers, readout, classes}, \
settings: [{name, value, source}], grid, special_tokens, tokens, macs: {fvcore, torchprofile}, transform: {crop_pct, \
interpolation, mean, std}, sparsity (of a model with holes): {density, macs, blocks: [{density, heads, neurons}]}, labels, metadata, reductions: [{reduction, tokens, macs: {fvcore, torchprofile}, macs_share}]. Of an \
AFFNet: model: {image, channels, stem, widths, filters, features, activation, norm, norm_eps, shrinkage, classes}, parts: \
[{name, grid, macs}], macs: {theoretical, fvcore}, and nothing about tokens.";

/// Show what a checkpoint is: architecture, numbers and where they came from, cost.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// Checkpoint in safetensors form; a config.json beside it is read too
    #[arg(value_name = "FILE")]
    weights: PathBuf,
    /// Also show what a reduction such as tome:r=13 would do (repeatable; see 'foveate --help')
    #[arg(short, long, value_name = "SPEC")]
    reduce: Vec<String>,
    /// Print JSON and nothing else
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    settings: ModelSettings,
}

/// What was found out.
struct Findings {
    file: String,
    checkpoint: Checkpoint,
    loaded: LoadedVit,
    parameters: u64,
    methods: Vec<Reduction>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let methods = reductions(&arguments.reduce)?;
    let overrides = arguments.settings.overrides()?;
    if let Some(affnet) = affnet::open(&arguments.weights, &overrides)? {
        return affnet.info(&methods, arguments.json);
    }
    let progress = Progress::spinner("reading the weights");
    let checkpoint = Checkpoint::open(&arguments.weights)?;
    let config = ConfigFile::beside(&arguments.weights)?;
    let loaded = load_vit(&checkpoint, config.as_ref(), &overrides)?;
    progress.finish();
    for method in &methods {
        method.check(&loaded.params.host(&loaded.config))?;
    }
    let parameters = Parameters::of(&loaded.params).total();
    let file = arguments.weights.display().to_string();
    let findings = Findings { file, checkpoint, loaded, parameters, methods };
    if arguments.json { write_json(&findings.json()) } else { findings.text(&mut io::stdout().lock()) }
}

/// The storage types of a file's tensors.
pub(crate) fn storage(checkpoint: &Checkpoint) -> Vec<String> {
    let types: BTreeSet<String> = checkpoint.names().filter_map(|name| checkpoint.dtype(name)).collect();
    types.into_iter().collect()
}

/// Values and bytes of a file's tensors.
pub(crate) fn stored(checkpoint: &Checkpoint) -> [u64; 2] {
    let shapes = checkpoint.names().filter_map(|name| checkpoint.shape(name));
    let values = shapes.map(|shape| shape.iter().product::<usize>() as u64).sum();
    let bytes = checkpoint.names().filter_map(|name| checkpoint.size_bytes(name));
    [values, bytes.sum::<usize>() as u64]
}

impl Findings {
    fn config(&self) -> &VitConfig {
        &self.loaded.config
    }

    fn macs(&self, method: &Reduction) -> ModelMacs {
        ModelMacs::of_host(self.config(), &self.loaded.params.host(self.config()), method)
    }

    /// The densities of a model with holes, or of one that has been cut down.
    fn sparse(&self) -> Option<Densities> {
        // Half precision makes zeros of a few weights that nobody masked.
        const WHOLE: f64 = 0.99;
        let densities = Densities::of(self.config(), &self.loaded.params);
        (densities.total(self.config()) < WHOLE).then_some(densities)
    }

    fn text(&self, out: &mut dyn Write) -> Result<(), Failure> {
        let config = self.config();
        let [stored, bytes] = stored(&self.checkpoint);
        writeln!(out, "{}", self.file)?;
        writeln!(
            out,
            "{}: {} parameters at this input size; the file holds {} as {}, {:.1} MB",
            self.loaded.family.name(),
            thousands(self.parameters),
            thousands(stored),
            storage(&self.checkpoint).join(", "),
            bytes as f64 / 1e6
        )?;
        writeln!(out)?;
        let mut table = Table::new([("number", Align::Left), ("value", Align::Left), ("from", Align::Left)]);
        for entry in &self.loaded.provenance {
            table.row([entry.field.to_owned(), entry.value.clone(), entry.source.clone()]);
        }
        table.write(out)?;
        writeln!(out)?;
        let [rows, columns] = config.grid();
        let special = match config.special_tokens() {
            0 => String::new(),
            1 => " and 1 special token".to_owned(),
            n => format!(" and {n} special tokens"),
        };
        writeln!(out, "tokens   {}: {rows}x{columns} patches{special}", config.tokens())?;
        let dense = self.macs(&Reduction::None).sum().total(Convention::Fvcore);
        writeln!(out, "MACs     {} ({})", quantity(dense), thousands(dense))?;
        if let Some(sparse) = self.sparse() {
            let (left, macs) = (sparse.total(config), sparse.macs(config, config.tokens()) as u64);
            writeln!(
                out,
                "density  {} of the weights; {} MACs without the others",
                percent(left),
                quantity(macs)
            )?;
            writeln!(out)?;
            let columns = ["block", "density", "heads", "neurons"].map(|name| (name, Align::Right));
            let mut table = Table::new(columns);
            for layer in 0..config.depth {
                let size = config.block(layer);
                let heads = format!("{} of {}", size.heads, config.heads);
                let neurons = format!("{} of {}", size.hidden, config.hidden);
                table.row([layer.to_string(), percent(sparse.block(config, layer)), heads, neurons]);
            }
            table.write(out)?;
        }
        if let Some(labels) = &config.labels {
            let shown = labels.iter().take(10).map(String::as_str).collect::<Vec<_>>().join(", ");
            writeln!(out, "labels   {shown}{}", if labels.len() > 10 { ", ..." } else { "" })?;
        }
        if !self.methods.is_empty() {
            writeln!(out)?;
            let columns = [
                ("reduction", Align::Left),
                ("tokens", Align::Left),
                ("MACs", Align::Right),
                ("of dense", Align::Right),
            ];
            let mut table = Table::new(columns);
            for method in &self.methods {
                let macs = self.macs(method);
                let total = macs.sum().total(Convention::Fvcore);
                table.row([
                    method.to_string(),
                    token_path(&macs.token_counts),
                    quantity(total),
                    percent(total as f64 / dense as f64),
                ]);
            }
            table.write(out)?;
        }
        Ok(out.flush()?)
    }

    fn json(&self) -> Value {
        let config = self.config();
        let [stored, bytes] = stored(&self.checkpoint);
        let dense = self.macs(&Reduction::None).sum();
        let settings = self.loaded.provenance.iter();
        let settings: Vec<Value> =
            settings.map(|e| json!({"name": e.field, "value": e.value, "source": e.source})).collect();
        let reductions: Vec<Value> = self.methods.iter().map(|method| self.reduction_json(method)).collect();
        json!({
            "command": "info",
            "version": env!("CARGO_PKG_VERSION"),
            "file": self.file,
            "family": self.loaded.family.name(),
            "parameters": self.parameters,
            "file_parameters": stored,
            "file_bytes": bytes,
            "storage": storage(&self.checkpoint),
            "model": model_json(config),
            "settings": settings,
            "grid": config.grid(),
            "special_tokens": config.special_tokens(),
            "tokens": config.tokens(),
            "macs": {
                "fvcore": dense.total(Convention::Fvcore),
                "torchprofile": dense.total(Convention::Torchprofile),
            },
            "transform": {
                "crop_pct": config.transform.crop_pct,
                "interpolation": config.transform.interpolation.name(),
                "mean": config.transform.mean,
                "std": config.transform.std,
            },
            "sparsity": self.sparsity_json(),
            "labels": config.labels,
            "metadata": self.checkpoint.metadata(),
            "reductions": reductions,
        })
    }

    fn sparsity_json(&self) -> Value {
        let config = self.config();
        let Some(sparse) = self.sparse() else { return Value::Null };
        let blocks = (0..config.depth).map(|layer| {
            let size = config.block(layer);
            json!({"density": sparse.block(config, layer), "heads": size.heads, "neurons": size.hidden})
        });
        json!({
            "density": sparse.total(config),
            "macs": sparse.macs(config, config.tokens()),
            "blocks": blocks.collect::<Vec<_>>(),
        })
    }

    fn reduction_json(&self, method: &Reduction) -> Value {
        let (macs, dense) = (self.macs(method), self.macs(&Reduction::None));
        let [total, dense] = [&macs, &dense].map(|macs| macs.sum().total(Convention::Fvcore));
        json!({
            "reduction": method.to_string(),
            "tokens": macs.token_counts,
            "macs": {"fvcore": total, "torchprofile": macs.sum().total(Convention::Torchprofile)},
            "macs_share": total as f64 / dense as f64,
        })
    }
}

/// The numbers of a model.
pub(crate) fn model_json(config: &VitConfig) -> Value {
    json!({
        "image": config.image,
        "patch": config.patch,
        "stem": config.stem.name(),
        "channels": config.channels,
        "width": config.width,
        "depth": config.depth,
        "heads": config.heads,
        "hidden": config.hidden,
        "activation": config.activation.name(),
        "norm_eps": config.norm_eps,
        "class_token": config.class_token,
        "distillation_token": config.distillation_token,
        "registers": config.registers,
        "readout": config.readout.name(),
        "classes": config.classes,
    })
}
