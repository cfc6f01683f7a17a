//! BAT and MSTM: reference tensors of this project's own specification, for neither has published code.

use foveate::{
    Tensor, TokenPlan,
    backend::{Backend, Cluster, Epilogue, Inattentive, Linear, Pooling},
    model::Vit,
    reduction::{Bat, Keep, Method, Mstm},
    reference::cluster::{Decision, decide},
};
use serde_json::Value;

use super::{Check, File, Record, Tolerance, head_mean, images, int, load, loaded, record, text};
use crate::Golden;

/// (B, N) scores of the patches as (B, 1, 1 + N) of all tokens: the class token's own has no part in anything.
fn class_scores(patches: &Tensor) -> Tensor {
    let (batch, n) = (patches.dim(0), patches.dim(1));
    let rows = (0..batch).flat_map(|image| std::iter::once(0.0).chain(patches.item(image).iter().copied()));
    Tensor::new(&[batch, 1, n + 1], rows.collect()).unwrap()
}

/// Tokens as patch numbers.
fn patches(tokens: &[usize]) -> Vec<usize> {
    tokens.iter().map(|token| token - 1).collect()
}

fn groups(plan: &TokenPlan, image: usize) -> Vec<Vec<usize>> {
    let members = |token: usize| plan.group(image, token).0.iter().map(|&member| member as usize).collect();
    (0..plan.tokens_out()).map(members).collect()
}

/// Indices that the file has; absent tensors are empty ones.
fn same_indices(file: &File, check: &mut Check, name: &str, image: usize, got: &[usize]) {
    let want = file.get(name).map_or_else(Vec::new, |array| array.indices(image));
    check.same(name, &got.to_vec(), &want);
}

/// Every decision of BAT's that a file has under `prefix`, for one image.
fn compare_bat(file: &File, check: &mut Check, prefix: &str, image: usize, decision: &Decision) {
    let name = |what: &str| format!("{prefix}{what}");
    let mut indices = |what: &str, got: &[usize]| same_indices(file, check, &name(what), image, got);
    indices("att", &patches(&decision.attentive));
    indices("ina", &patches(&decision.rest));
    let column = |of: fn(&(usize, usize, f32)) -> usize| decision.merged.iter().map(of).collect::<Vec<_>>();
    indices("merged_src", &column(|pair| pair.0));
    indices("merged_dst", &column(|pair| pair.1));
    let gone = column(|pair| pair.0);
    let stay: Vec<usize> = (0..decision.attentive.len()).filter(|rank| !gone.contains(rank)).collect();
    indices("att_survivors", &stay);
    indices("centers", &decision.centres);
    indices("assign", &decision.clusters);
    for (what, got) in [("rho", &decision.density), ("delta", &decision.delta), ("gamma", &decision.gamma)] {
        if let Some(want) = file.get(&name(what)) {
            let row = want.row(image).iter().map(|&v| f64::from(v)).collect();
            let want = super::Array { shape: vec![want.shape[1]], values: row };
            check.close(&name(what), got, &want, Tolerance::Scaled(1e-5));
        }
    }
}

pub(crate) fn bat_ops(file: &File, check: &mut Check) {
    let backend = crate::backend();
    for case in file.config["cases"].as_array().unwrap() {
        let p = text(case, "prefix");
        let x = file.tensor(&format!("{p}x"));
        let scores = class_scores(&file.tensor(&format!("{p}cls_attn")));
        let cluster = Cluster {
            tokens: &x,
            class_scores: &scores,
            special: 1,
            keep: int(case, "K"),
            inattentive: Inattentive::Peaks {
                pairs: int(case, "P"),
                clusters: int(case, "Kc"),
                neighbours: int(case, "knn"),
            },
        };
        let plan = backend.cluster(&cluster).unwrap();
        check.same(&format!("{p}n_out"), &(plan.tokens_out() - 1), &int(case, "n_out"));
        for image in 0..x.dim(0) {
            let decision = decide(&cluster, image).unwrap();
            compare_bat(file, check, p, image, &decision);
            check.same(&format!("{p}groups"), &groups(&plan, image), &decision.groups(1));
        }
        let out = backend.merge(&x, None, &plan, Pooling::Weighted, None).unwrap().tokens;
        check.close(&format!("{p}out"), out.data(), file.array(&format!("{p}out")), Tolerance::Scaled(1e-5));
    }
}

/// What a file has of MSTM's decisions under `prefix`, for one image.
fn compare_mstm(file: &File, check: &mut Check, prefix: &str, image: usize, decision: &Decision) {
    let mut indices =
        |what: &str, got: &[usize]| same_indices(file, check, &format!("{prefix}{what}"), image, got);
    indices("cru", &patches(&decision.attentive));
    indices("non", &patches(&decision.rest));
    indices("target", &decision.targets.iter().map(|target| target.0).collect::<Vec<_>>());
}

pub(crate) fn mstm_ops(file: &File, check: &mut Check) {
    let backend = crate::backend();
    for case in file.config["reduce_cases"].as_array().unwrap() {
        let p = text(case, "prefix");
        let x = file.tensor(&format!("{p}x"));
        let scores = class_scores(&file.tensor(&format!("{p}cls_attn")));
        let keep = int(case, "K");
        let cluster =
            Cluster { tokens: &x, class_scores: &scores, special: 1, keep, inattentive: Inattentive::Join };
        let plan = backend.cluster(&cluster).unwrap();
        for image in 0..x.dim(0) {
            let decision = decide(&cluster, image).unwrap();
            compare_mstm(file, check, p, image, &decision);
            check.same(&format!("{p}groups"), &groups(&plan, image), &decision.groups(1));
            // The similarity of each pair that is joined.
            if let Some(sim) = file.get(&format!("{p}sim")) {
                let all = sim.row(image);
                let best = decision.targets.iter().enumerate().map(|(at, target)| all[at * keep + target.0]);
                let want = super::Array {
                    shape: vec![decision.targets.len()],
                    values: best.map(f64::from).collect(),
                };
                let got: Vec<f32> = decision.targets.iter().map(|target| target.1).collect();
                check.close(&format!("{p}sim"), &got, &want, Tolerance::Scaled(1e-5));
            }
        }
        let out = backend.merge(&x, None, &plan, Pooling::Weighted, None).unwrap().tokens;
        check.close(&format!("{p}out"), out.data(), file.array(&format!("{p}out")), Tolerance::Scaled(1e-5));
    }
    for case in file.config["fuse_cases"].as_array().unwrap() {
        let p = text(case, "prefix");
        let x = file.tensor(&format!("{p}x"));
        let grid = [int(case, "grid"); 2];
        let mut fused = x.clone();
        for scale in case["scales"].as_array().unwrap() {
            let scale = scale.as_u64().unwrap() as usize;
            let mut coarse = backend.pool_windows(&x, 1, grid, scale).unwrap();
            if case["weights"].as_bool().unwrap() {
                let part = |part: &str| file.tensor(&format!("{p}w/msf.{scale}.{part}"));
                let layer = Linear { weight: part("weight"), bias: Some(part("bias")) };
                coarse = backend.linear(&coarse, layer.all(), Epilogue::None).unwrap();
            }
            fused = backend.add_windows(fused, &coarse, 1, grid, scale).unwrap();
        }
        let want = file.array(&format!("{p}out"));
        check.close(&format!("{p}out"), fused.data(), want, Tolerance::Scaled(1e-5));
    }
}

fn settings(file: &File) -> [String; 3] {
    [
        format!("heads={}", file.int("heads")),
        format!("image={}", file.int("img")),
        format!("norm_eps={}", file.config["ln_eps"]),
    ]
}

/// A share for each block, 1 where nothing is reduced.
fn shares(file: &File, schedule: &Value) -> Keep {
    let mut shares = vec![1.0; file.int("depth")];
    let layers = schedule["layers"].as_array().unwrap().iter().map(|l| l.as_u64().unwrap() as usize);
    for (layer, rate) in layers.zip(schedule["keep_rate"].as_array().unwrap()) {
        shares[layer] = rate.as_f64().unwrap();
    }
    Keep::PerBlock(shares)
}

fn numbers(schedule: &Value, key: &str) -> Vec<usize> {
    schedule[key].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect()
}

/// Runs a schedule and compares what every one has.
fn run_schedule(
    file: &File,
    vit: &Vit<Golden>,
    schedule: &Value,
    method: &impl Method,
    check: &mut Check,
) -> Record {
    let scaled = Tolerance::Scaled(2e-5);
    let p = text(schedule, "prefix");
    let (output, record) = record(vit, &images(file.array("x")), method);
    let reducing = schedule["reducing_layers"].as_array().unwrap();
    let layers: Vec<usize> = reducing.iter().map(|r| int(r, "layer")).collect();
    check.same(&format!("{p}layers"), &record.steps.iter().map(|step| step.layer).collect(), &layers);
    for (step, reducing) in record.steps.iter().zip(reducing) {
        let name = |what: &str| format!("{p}blocks.{}.{what}", step.layer);
        check.same(&name("n_out"), &(step.tokens.dim(1) - 1), &int(reducing, "n_out"));
        let scores = step.class_scores.as_ref().unwrap();
        let attention: Vec<f32> =
            head_mean(scores).chunks(scores.width()).flat_map(|row| row[1..].to_vec()).collect();
        check.close(&name("cls_attn"), &attention, file.array(&name("cls_attn")), scaled);
        check.close(&name("pre_mlp"), step.tokens.data(), file.array(&name("pre_mlp")), scaled);
    }
    let last = record.blocks.last().unwrap();
    check.close(&format!("{p}last_block"), last.data(), file.array(&format!("{p}last_block")), scaled);
    let logits = output.logits.unwrap();
    check.close(&format!("{p}logits"), logits.data(), file.array(&format!("{p}logits")), scaled);
    record
}

/// The decisions of a step, made again on what the method saw, and that they are the plan's.
fn decisions(
    step: &super::Recorded,
    inattentive: Inattentive,
    keep: usize,
    check: &mut Check,
) -> Vec<Decision> {
    let cluster = Cluster {
        tokens: &step.tokens_in,
        class_scores: step.class_scores.as_ref().unwrap(),
        special: 1,
        keep,
        inattentive,
    };
    let decisions: Vec<_> = (0..step.plan.batch()).map(|image| decide(&cluster, image).unwrap()).collect();
    for (image, decision) in decisions.iter().enumerate() {
        check.same("groups", &groups(&step.plan, image), &decision.groups(1));
    }
    decisions
}

pub(crate) fn bat_model(file: &File, check: &mut Check) {
    let vit = load(&file.path, "w/", &settings(file));
    for schedule in file.config["schedules"].as_array().unwrap() {
        let (pairs, clusters) = (numbers(schedule, "pairs"), numbers(schedule, "clusters"));
        let neighbours = schedule["knn"].as_u64().unwrap_or(0) as usize;
        let method = Bat {
            keep: shares(file, schedule),
            layers: None,
            pairs: Some(pairs.clone()),
            clusters: Some(clusters.clone()),
            neighbours,
        };
        let record = run_schedule(file, &vit, schedule, &method, check);
        for (at, step) in record.steps.iter().enumerate() {
            let p = format!("{}blocks.{}.", text(schedule, "prefix"), step.layer);
            let keep = file.array(&format!("{p}att")).shape[1];
            let (pairs, clusters) = (pairs[at], clusters[at]);
            let inattentive = Inattentive::Peaks { pairs, clusters, neighbours };
            for (image, decision) in decisions(step, inattentive, keep, check).iter().enumerate() {
                compare_bat(file, check, &p, image, decision);
            }
        }
    }
}

pub(crate) fn mstm_model(file: &File, check: &mut Check) {
    let vit = load(&file.path, "w/", &settings(file));
    let weights = loaded(&file.path, "w/", &settings(file)).params.reducers;
    for schedule in file.config["schedules"].as_array().unwrap() {
        let p = text(schedule, "prefix");
        let method = Mstm { keep: shares(file, schedule), layers: None, scales: numbers(schedule, "scales") };
        let record = run_schedule(file, &vit, schedule, &method, check);
        if let Some(want) = file.get(&format!("{p}msf_out")) {
            let first = record.steps[0].layer;
            let before = &record.blocks[first - 1];
            let fused = method.prepare(&crate::backend(), first, before, &vit.host(), &weights).unwrap();
            check.close(&format!("{p}msf_out"), fused.unwrap().data(), want, Tolerance::Scaled(2e-5));
        }
        for step in &record.steps {
            let keep = step.tokens.dim(1) - 1;
            for (image, decision) in decisions(step, Inattentive::Join, keep, check).iter().enumerate() {
                compare_mstm(file, check, &format!("{p}blocks.{}.", step.layer), image, decision);
            }
        }
    }
}
