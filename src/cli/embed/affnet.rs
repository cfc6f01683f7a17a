//! `foveate embed` of an AFFNet: its last feature map, and what its classifier reads.

use std::path::PathBuf;

use foveate::{Images, Reduction, model::AffNet};

use super::{
    Arguments, Task,
    file::{Part, Values},
    write,
};
use crate::cli::{
    affnet::{Opened, refuse},
    device::{Runner, on_device},
    failure::Failure,
    passes::one_by_one,
};

pub(super) fn run(
    arguments: &Arguments,
    reduction: &Reduction,
    paths: &[PathBuf],
    opened: Opened,
) -> Result<(), Failure> {
    let (name, config, params) = opened.model();
    refuse(&name, reduction)?;
    if arguments.unmerge {
        return Err(Failure::Input(format!(
            "{name}: --unmerge: an AFFNet has no tokens to spread; leave it out, its map is on its grid"
        )));
    }
    on_device!(arguments.device, None, |backend| {
        run_on(arguments, reduction, paths, &AffNet::new(backend, config, params)?)
    })
}

fn run_on<B: Runner>(
    arguments: &Arguments,
    reduction: &Reduction,
    paths: &[PathBuf],
    model: &AffNet<B>,
) -> Result<(), Failure> {
    let (config, backend) = (model.config(), model.backend());
    let grids = config.grids();
    let grid = grids[grids.len() - 1];
    let map = vec![grid[0], grid[1], config.width()];
    let task = Task {
        reduction,
        tokens: Vec::new(),
        grid,
        parts: vec![Part::new("map", map), Part::new("features", vec![config.features])],
        input: (&config.transform, config.image),
    };
    let infer = |images: &Images| {
        let output = model.forward(images)?;
        Ok([backend.download(&output.map)?, backend.download(&output.features)?])
    };
    write(arguments, paths, &task, |batches, each| {
        one_by_one(batches, infer, |names, [map, features]| {
            each(names, &|part| {
                let tensor = if part.name == "map" { &map } else { &features };
                Ok(Values::Floats(tensor.data().to_vec()))
            })
        })
    })
}
