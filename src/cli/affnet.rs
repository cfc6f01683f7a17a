//! What the subcommands do with an AFFNet: it classifies, and has no tokens.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use foveate::{
    Reduction, Tensor,
    macs::{GridConvention, GridMacs},
    model::{AffNet, AffNetConfig, affnet::AffNetParams},
    reduction::Backbone,
    weights::{Checkpoint, LoadedAffNet, Overrides, is_affnet, load_affnet},
};
use serde_json::{Value, json};

use super::{
    classify,
    device::{Runner, on_device},
    failure::Failure,
    info::{storage, stored},
    passes::{Wanted, through_grid},
    progress::Progress,
    report::{Align, Table, quantity, thousands, write_json},
};

/// An AFFNet's checkpoint, read.
pub(crate) struct Opened {
    file: String,
    checkpoint: Checkpoint,
    loaded: LoadedAffNet,
}

/// Opens a checkpoint; nothing where it is not an AFFNet's.
pub(crate) fn open(weights: &Path, overrides: &Overrides) -> Result<Option<Opened>, Failure> {
    let checkpoint = Checkpoint::open(weights)?;
    if !is_affnet(&checkpoint) {
        return Ok(None);
    }
    let progress = Progress::spinner("reading the weights");
    let loaded = load_affnet(&checkpoint, overrides)?;
    progress.finish();
    Ok(Some(Opened { file: weights.display().to_string(), checkpoint, loaded }))
}

/// Refuses what reduces tokens.
pub(crate) fn refuse(name: &str, reduction: &Reduction) -> Result<(), Failure> {
    reduction.check_on(&Backbone::Grid).map_err(|error| Failure::Input(format!("{name}: {error}")))
}

impl Opened {
    /// Its name, its numbers and its parameters.
    pub(crate) fn model(self) -> (String, AffNetConfig, AffNetParams<Tensor>) {
        (self.file, self.loaded.config, self.loaded.params)
    }

    /// `foveate classify`.
    pub(crate) fn classify(
        self,
        arguments: &classify::Arguments,
        reduction: &Reduction,
        paths: &[PathBuf],
    ) -> Result<(), Failure> {
        refuse(&self.file, reduction)?;
        on_device!(arguments.device(), None, |backend| self.classify_on(arguments, paths, backend))
    }

    fn classify_on<B: Runner>(
        self,
        arguments: &classify::Arguments,
        paths: &[PathBuf],
        backend: B,
    ) -> Result<(), Failure> {
        let LoadedAffNet { config, params, .. } = self.loaded;
        let model = AffNet::new(backend, config, params)?;
        let config = model.config();
        let task = classify::Task {
            file: &self.file,
            classes: config.classes,
            labels: config.labels.as_deref(),
            transform: &config.transform,
            image: config.image,
            tokens: Vec::new(),
        };
        classify::with(arguments, &Reduction::None, paths, &task, |batches, each| {
            through_grid(&model, Wanted::Logits, batches, |names, pass| each(names, &pass.logits))
        })
    }

    /// `foveate info`.
    pub(crate) fn info(&self, methods: &[Reduction], as_json: bool) -> Result<(), Failure> {
        methods.iter().try_for_each(|method| refuse(&self.file, method))?;
        if as_json { write_json(&self.json()?) } else { self.text(&mut io::stdout().lock()) }
    }

    /// Values of all parameters, with batch norms folded in.
    fn parameters(&self) -> Result<u64, Failure> {
        let mut values = 0;
        let mut count = |tensor: Tensor| {
            values += tensor.data().len() as u64;
            Ok(tensor)
        };
        self.loaded.params.clone().try_map(&mut count)?;
        Ok(values)
    }

    fn text(&self, out: &mut dyn Write) -> Result<(), Failure> {
        let config = &self.loaded.config;
        let [values, bytes] = stored(&self.checkpoint);
        writeln!(out, "{}", self.file)?;
        writeln!(
            out,
            "official AFFNet: {} parameters with batch norms folded in; the file holds {} as {}, {:.1} MB",
            thousands(self.parameters()?),
            thousands(values),
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
        let columns = [("part", Align::Left), ("grid", Align::Left), ("MACs", Align::Right)];
        let mut table = Table::new(columns);
        let grids = config.grids();
        for (at, (name, macs)) in GridMacs::of(config).into_iter().enumerate() {
            let [rows, columns] = grids[at.min(grids.len() - 1)];
            let total = macs.total(GridConvention::Theoretical);
            table.row([name.to_owned(), format!("{rows}x{columns}"), quantity(total)]);
        }
        table.write(out)?;
        writeln!(out)?;
        let sum = GridMacs::sum(config);
        let [theoretical, fvcore] =
            [GridConvention::Theoretical, GridConvention::Fvcore].map(|convention| sum.total(convention));
        writeln!(
            out,
            "MACs     {} ({}) as the official code counts, {} as fvcore does",
            quantity(theoretical),
            thousands(theoretical),
            quantity(fvcore)
        )?;
        Ok(out.flush()?)
    }

    fn json(&self) -> Result<Value, Failure> {
        let config = &self.loaded.config;
        let [values, bytes] = stored(&self.checkpoint);
        let settings = self.loaded.provenance.iter();
        let settings: Vec<Value> =
            settings.map(|e| json!({"name": e.field, "value": e.value, "source": e.source})).collect();
        let macs = |macs: GridMacs| {
            json!({
                "theoretical": macs.total(GridConvention::Theoretical),
                "fvcore": macs.total(GridConvention::Fvcore),
            })
        };
        let grids = config.grids();
        let parts = GridMacs::of(config).into_iter().enumerate().map(|(at, (name, part))| {
            json!({"name": name, "grid": grids[at.min(grids.len() - 1)], "macs": macs(part)})
        });
        let widths = config.bottlenecks.iter().filter_map(|layers| layers.last());
        let widths = widths.chain(config.stages.iter().map(|stage| &stage.down)).map(|layer| layer.outputs);
        Ok(json!({
            "command": "info",
            "version": env!("CARGO_PKG_VERSION"),
            "file": self.file,
            "family": "official AFFNet",
            "parameters": self.parameters()?,
            "file_parameters": values,
            "file_bytes": bytes,
            "storage": storage(&self.checkpoint),
            "model": {
                "image": config.image,
                "channels": config.channels,
                "stem": config.stem,
                "widths": widths.collect::<Vec<_>>(),
                "filters": config.stages.each_ref().map(|stage| stage.blocks),
                "features": config.features,
                "activation": config.activation.name(),
                "norm": config.norm.name(),
                "norm_eps": config.norm_eps,
                "shrinkage": config.threshold,
                "classes": config.classes,
            },
            "settings": settings,
            "parts": parts.collect::<Vec<_>>(),
            "macs": macs(GridMacs::sum(config)),
            "transform": {
                "crop_pct": config.transform.crop_pct,
                "interpolation": config.transform.interpolation.name(),
                "mean": config.transform.mean,
                "std": config.transform.std,
            },
            "labels": config.labels,
            "metadata": self.checkpoint.metadata(),
            "reductions": [],
        }))
    }
}
