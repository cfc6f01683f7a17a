//! The masks of sparse training, bit for bit. Not a module of mod.rs: the device has tests of its own for these operations.

use foveate::{
    connectivity::{DeathRate, erk_densities},
    reference::connectivity::{
        HeadScores, drop_and_grow as update, drop_smallest, head_scores, neuron_scores, update_heads,
        update_neurons,
    },
};
use serde_json::Value;

use crate::golden_kinds::{Array, Check, File, Tolerance, int};

fn bits(array: &Array) -> Vec<u8> {
    array.values.iter().map(|&v| v as u8).collect()
}

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key}"))
}

fn layers(file: &File) -> impl Iterator<Item = (&String, &Value)> {
    file.config["layers"].as_object().expect("layers").iter()
}

pub(crate) fn densities(file: &File, check: &mut Check) {
    let extents = |layer: &Value| -> Vec<usize> {
        layer["shape"].as_array().unwrap().iter().map(|e| e.as_u64().unwrap() as usize).collect()
    };
    for case in file.config["cases"].as_array().unwrap() {
        let (mut names, mut shapes) = (Vec::new(), Vec::new());
        for (name, layer) in case["layers"].as_object().unwrap() {
            // Layers of all blocks equal those of block 0.
            let copies = if name.starts_with("blocks.0.") { int(case, "depth") } else { 1 };
            names.extend(std::iter::repeat_n(name, copies));
            shapes.extend(std::iter::repeat_n(extents(layer), copies));
        }
        let shapes: Vec<&[usize]> = shapes.iter().map(Vec::as_slice).collect();
        let got = erk_densities(&shapes, number(case, "density")).unwrap();
        for (name, got) in names.iter().zip(got) {
            let error = (got - number(&case["layers"][name.as_str()], "density")).abs();
            check.compared += 1;
            check.worst = check.worst.max(error / 1e-9);
            if error.is_nan() || error > 1e-9 {
                check.fail(format!("{name} at {}: off by {error:e}", case["density"]));
            }
        }
    }
}

pub(crate) fn drop_and_grow(file: &File, check: &mut Check) {
    let rate = number(&file.config, "death_rate");
    let schedule = DeathRate::new(number(&file.config, "death_rate_init"), file.int("T_max")).unwrap();
    let off = (schedule.at(file.int("steps_done")) - rate).abs();
    if off > 1e-12 {
        check.fail(format!("death rate: off by {off:e}"));
    }
    for (name, layer) in layers(file) {
        let array = |part: &str| file.array(&format!("{name}/{part}"));
        let (mut weight, gradient) = (array("weight").floats(), array("grad").floats());
        let mut mask = bits(array("mask"));
        let survivors = drop_smallest(&weight, &mask, rate).unwrap();
        check.same(&format!("{name}: mask_drop"), &survivors.mask, &bits(array("mask_drop")));
        let done = update(&mut weight, &gradient, &mut mask, rate).unwrap();
        check.same(&format!("{name}: mask_new"), &mask, &bits(array("mask_new")));
        let counts = (done.active, done.asked, done.dropped);
        let want = (int(layer, "nonzeros"), int(layer, "n_remove"), int(layer, "n_grown"));
        check.same(&format!("{name}: counts"), &counts, &want);
        check.same(&format!("{name}: weight_new"), &weight, &array("weight_new").floats());
    }
}

pub(crate) fn structured(file: &File, check: &mut Check) {
    let rate = number(&file.config, "death_rate");
    for (block, _) in layers(file) {
        let array = |part: &str| file.array(&format!("{block}.{part}"));
        let HeadScores { importance, call } =
            head_scores(&array("head_out").tensor(), &array("head_out_grad").tensor()).unwrap();
        check.close("grad_scores", &importance, array("grad_scores"), Tolerance::Scaled(1e-5));
        check.close("grad_norm", &call, array("grad_norm"), Tolerance::Scaled(1e-5));
        let heads = update_heads(&HeadScores { importance, call }, &bits(array("heads")), rate).unwrap();
        check.same(&format!("{block}: heads"), &heads, &bits(array("heads_new")));
        let scores = |suffix: &str| {
            let [fc1, fc2] = ["fc1", "fc2"].map(|l| array(&format!("mlp.{l}.weight{suffix}")).tensor());
            neuron_scores(&fc1, &fc2).unwrap()
        };
        let neurons = update_neurons(&scores(""), &scores(".grad"), &bits(array("neurons")), rate).unwrap();
        check.same(&format!("{block}: neurons"), &neurons, &bits(array("neurons_new")));
    }
}
