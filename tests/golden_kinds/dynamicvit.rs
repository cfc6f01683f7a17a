use foveate::{
    Tensor, TokenPlan,
    backend::{Backend, Linear, Norm, Pooling, Predictor, Select},
    reduction::{DynamicVit, Keep},
    reference,
};
use serde_json::Value;

use super::{Check, File, Tolerance, images, int, load, loaded, record, text};

/// The predictor whose tensors begin with `prefix`.
fn predictor(file: &File, prefix: &str) -> Predictor<Tensor> {
    let tensor = |name: &str| file.tensor(&format!("{prefix}{name}"));
    let layer = |name: &str| Linear {
        weight: tensor(&format!("{name}.weight")),
        bias: Some(tensor(&format!("{name}.bias"))),
    };
    Predictor {
        norm: Norm {
            weight: tensor("in_conv.0.weight"),
            bias: Some(tensor("in_conv.0.bias")),
            eps: file.config["predictor_ln_eps"].as_f64().unwrap() as f32,
        },
        hidden: layer("in_conv.1"),
        first: layer("out_conv.0"),
        second: layer("out_conv.2"),
        last: layer("out_conv.4"),
    }
}

/// Entry 0 of (B, N, 2) log-probabilities.
fn keep_column(log_prob: &super::Array) -> super::Array {
    let values = log_prob.values.iter().copied().step_by(2).collect();
    super::Array { shape: log_prob.shape[..2].to_vec(), values }
}

/// The kept patches of a plan of an image, in output order, as patch numbers.
fn kept(plan: &TokenPlan, image: usize, special: usize) -> Vec<usize> {
    (special..plan.tokens_out()).map(|at| plan.group(image, at).0[0] as usize - special).collect()
}

pub(crate) fn predictors(file: &File, check: &mut Check) {
    let backend = crate::backend();
    for case in file.config["cases"].as_array().unwrap() {
        let p = text(case, "prefix");
        let name = |what: &str| format!("{p}{what}");
        let predictor = predictor(file, &name("w/"));
        let x = file.tensor(&name("x"));
        let policy = file.array(&name("policy")).sizes();
        // A policy of zeros and ones is training's: the operation has none, the reference has.
        let scores = match text(case, "policy") {
            "ones" => backend.keep_scores(&x, &predictor, 0).unwrap(),
            _ => reference::predictor::keep_scores(&x, &predictor, 0, Some(&policy)).unwrap(),
        };
        let want = keep_column(file.array(&name("log_prob")));
        check.close(&name("log_prob"), scores.data(), &want, Tolerance::Scaled(1e-5));
        let keep = DynamicVit::count(case["ratio"].as_f64().unwrap(), x.dim(1));
        check.same(&name("kept"), &keep, &int(case, "kept"));
        let select = Select { class_scores: &scores, special: 0, keep, fuse: false };
        let plan = backend.select(&select).unwrap();
        for image in 0..plan.batch() {
            let want = file.array(&name("idx")).indices(image);
            check.same(&name("idx"), &kept(&plan, image, 0), &want);
        }
        let gathered = backend.merge(&x, None, &plan, Pooling::Weighted, None).unwrap().tokens;
        let want = file.array(&name("gathered"));
        check.close(&name("gathered"), gathered.data(), want, Tolerance::Absolute(1e-30));
    }
}

fn method(schedule: &Value) -> DynamicVit {
    let list = |key: &str| schedule[key].as_array().unwrap().iter();
    DynamicVit {
        keep: Keep::PerBlock(list("token_ratio").map(|r| r.as_f64().unwrap()).collect()),
        layers: Some(list("pruning_loc").map(|l| l.as_u64().unwrap() as usize).collect()),
    }
}

pub(crate) fn model(file: &File, check: &mut Check) {
    let settings = [
        format!("heads={}", file.int("heads")),
        format!("image={}", file.int("img")),
        format!("norm_eps={}", file.config["ln_eps"]),
    ];
    schedules(file, check, &settings);
}

pub(crate) fn lvvit(file: &File, check: &mut Check) {
    schedules(file, check, &super::stems::lvvit_settings(file));
}

fn schedules(file: &File, check: &mut Check, settings: &[String]) {
    let vit = load(&file.path, "w/", settings);
    let predictors = loaded(&file.path, "w/", settings).params.reducers.predictors;
    let backend = crate::backend();
    let scaled = Tolerance::Scaled(2e-5);
    for schedule in file.config["schedules"].as_array().unwrap() {
        let p = text(schedule, "prefix");
        let (output, record) = record(&vit, &images(file.array("x")), &method(schedule));
        let cuts = schedule["cuts"].as_array().unwrap();
        let layers: Vec<usize> = cuts.iter().map(|cut| int(cut, "before_block")).collect();
        check.same(&format!("{p}cuts"), &record.steps.iter().map(|step| step.layer).collect(), &layers);
        for (at, step) in record.steps.iter().enumerate() {
            let name = |what: &str| format!("{p}pred.{at}.{what}");
            let special = vit.host().special;
            let scores = backend.keep_scores(&step.tokens_in, &predictors[at], special).unwrap();
            let scores: Vec<f32> =
                scores.data().chunks(scores.width()).flat_map(|row| row[special..].to_vec()).collect();
            check.close(&name("log_prob"), &scores, &keep_column(file.array(&name("log_prob"))), scaled);
            for image in 0..step.plan.batch() {
                let want = file.array(&name("idx")).indices(image);
                check.same(&name("idx"), &kept(&step.plan, image, special), &want);
            }
            check.close(&name("block_in"), step.tokens.data(), file.array(&name("block_in")), scaled);
        }
        let last = record.blocks.last().unwrap();
        check.close(&format!("{p}last_block"), last.data(), file.array(&format!("{p}last_block")), scaled);
        let logits = output.logits.unwrap();
        check.close(&format!("{p}logits"), logits.data(), file.array(&format!("{p}logits")), scaled);
    }
}
