//! `foveate embed` of an AFFNet: its last feature map, and what its classifier reads.

use std::path::PathBuf;

use foveate::{Reduction, model::AffNet};

use super::{
    Arguments, Task,
    file::{Part, Values},
    write,
};
use crate::cli::{
    affnet::{Opened, refuse},
    device::{Runner, on_device},
    failure::Failure,
    passes::{Wanted, through_grid},
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
    let config = model.config();
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
    write(arguments, paths, &task, |batches, each| {
        through_grid(model, Wanted::Everything, batches, |names, pass| {
            let Some([map, features]) = pass.details else { return Ok(()) };
            each(names, &|part| {
                let tensor = if part.name == "map" { &map } else { &features };
                Ok(Values::Floats(tensor.data().to_vec()))
            })
        })
    })
}
