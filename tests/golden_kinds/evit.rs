use foveate::{
    Tensor, TokenPlan,
    backend::{Backend, Epilogue, Heads, Linear, Norm, Pooling, ScoreRequest, Select},
    model::Vit,
    reduction::{DynamicVit, Evit, Keep},
};
use serde_json::Value;

use super::{Check, File, Tolerance, head_mean, images, int, load, record, text};
use crate::Golden;

/// The kept tokens of a plan, in output order, as patch numbers.
fn kept(plan: &TokenPlan, image: usize, special: usize, count: usize) -> Vec<usize> {
    (special..special + count).map(|at| plan.group(image, at).0[0] as usize - special).collect()
}

fn without_class(scores: &Tensor) -> Vec<f32> {
    let n = scores.dim(2);
    head_mean(scores).chunks(n).flat_map(|row| row[1..].to_vec()).collect()
}

pub(crate) fn ops(file: &File, check: &mut Check) {
    let backend = crate::backend();
    let eps = file.config["ln_eps"].as_f64().unwrap() as f32;
    let scaled = Tolerance::Scaled(1e-5);
    for case in file.config["cases"].as_array().unwrap() {
        let p = text(case, "prefix");
        let tensor = |name: &str| file.tensor(&format!("{p}{name}"));
        let layer = |name: &str| Linear {
            weight: tensor(&format!("w/{name}.weight")),
            bias: Some(tensor(&format!("w/{name}.bias"))),
        };
        let norm = Norm { weight: tensor("w/norm1.weight"), bias: Some(tensor("w/norm1.bias")), eps };
        let (x, heads, head_dim) = (tensor("x"), int(case, "heads"), int(case, "head_dim"));
        let n = x.dim(1) - 1;
        let normed = backend.layer_norm(&x, &norm).unwrap();
        let qkv = backend.linear(&normed, layer("attn.qkv").all(), Epilogue::None).unwrap();
        check.close(&format!("{p}qkv"), qkv.data(), file.array(&format!("{p}qkv")), scaled);
        let view = Heads { packed: &qkv, heads, head_dim, scale: (head_dim as f32).powf(-0.5), sizes: None };
        let request = ScoreRequest { class: true, received: false };
        let (context, scores) = backend.attention(&view, request).unwrap();
        let class = scores.class.unwrap();
        check.close(
            &format!("{p}cls_attn_heads"),
            class.data(),
            file.array(&format!("{p}cls_attn_heads")),
            scaled,
        );
        if let Some(want) = file.get(&format!("{p}cls_attn")) {
            check.close(&format!("{p}cls_attn"), &without_class(&class), want, scaled);
        }
        let out = backend.linear(&context, layer("attn.proj").all(), Epilogue::None).unwrap();
        if let Some(want) = file.get(&format!("{p}attn_out")) {
            check.close(&format!("{p}attn_out"), out.data(), want, scaled);
        }
        let after = backend.linear(&context, layer("attn.proj").all(), Epilogue::AddTo(x)).unwrap();
        if let Some(want) = file.get(&format!("{p}x_after_attn")) {
            check.close(&format!("{p}x_after_attn"), after.data(), want, scaled);
        }
        let keep = match case["tokens"].as_u64() {
            Some(tokens) => tokens as usize,
            None => Evit::count(case["keep_rate"].as_f64().unwrap(), n),
        };
        check.same(&format!("{p}kept"), &keep, &int(case, "kept"));
        let mut pre_mlp = after.clone();
        if keep < n {
            let fuse = case["fuse_token"].as_bool().unwrap();
            let select = Select { class_scores: &class, special: 1, keep, fuse };
            let plan = backend.select(&select).unwrap();
            for image in 0..plan.batch() {
                check.same(
                    &format!("{p}idx"),
                    &kept(&plan, image, 1, keep),
                    &file.array(&format!("{p}idx")).indices(image),
                );
                if fuse {
                    let rest: Vec<usize> =
                        plan.group(image, keep + 1).0.iter().map(|&t| t as usize - 1).collect();
                    check.same(&format!("{p}compl"), &rest, &file.array(&format!("{p}compl")).indices(image));
                }
            }
            pre_mlp = backend.merge(&after, None, &plan, Pooling::Weighted, None).unwrap().tokens;
            // Kept tokens are copies.
            for image in 0..plan.batch() {
                for (at, patch) in kept(&plan, image, 1, keep).into_iter().enumerate() {
                    let width = after.width();
                    let (to, from) =
                        (&pre_mlp.item(image)[(at + 1) * width..], &after.item(image)[(patch + 1) * width..]);
                    check.same(&format!("{p}copied rows"), &to[..width].to_vec(), &from[..width].to_vec());
                }
            }
            if let Some(want) = file.get(&format!("{p}extra_token")) {
                let fused = backend.tokens(&pre_mlp, keep + 1..keep + 2).unwrap();
                check.close(&format!("{p}extra_token"), fused.data(), want, scaled);
            }
        }
        check.close(&format!("{p}pre_mlp"), pre_mlp.data(), file.array(&format!("{p}pre_mlp")), scaled);
    }
}

fn host_model(file: &File, image: usize) -> Vit<Golden> {
    let settings = [
        format!("heads={}", file.int("heads")),
        format!("image={image}"),
        format!("norm_eps={}", file.config["ln_eps"]),
    ];
    load(&file.path, "w/", &settings)
}

fn method(schedule: &Value) -> Evit {
    let rates = schedule["keep_rate"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap()).collect();
    let counts = schedule["tokens"].as_array();
    Evit {
        keep: Keep::PerBlock(rates),
        layers: None,
        tokens: counts.map_or_else(Vec::new, |c| c.iter().map(|n| n.as_u64().map(|n| n as usize)).collect()),
        fuse: schedule["fuse_token"].as_bool().unwrap(),
    }
}

fn run_schedule(file: &File, vit: &Vit<Golden>, schedule: &Value, check: &mut Check) -> super::Record {
    let scaled = Tolerance::Scaled(2e-5);
    let p = text(schedule, "prefix");
    let (output, record) = record(vit, &images(file.array("x")), &method(schedule));
    let reducing = schedule["reducing_layers"].as_array().unwrap();
    let layers: Vec<usize> = reducing.iter().map(|r| int(r, "layer")).collect();
    check.same(&format!("{p}reducing layers"), &record.steps.iter().map(|s| s.layer).collect(), &layers);
    for (step, reducing) in record.steps.iter().zip(reducing) {
        let name = |what: &str| format!("{p}blocks.{}.{what}", step.layer);
        check.same(&name("n_out"), &(step.tokens.dim(1) - 1), &int(reducing, "n_out"));
        if let Some(want) = file.get(&name("cls_attn")) {
            check.close(&name("cls_attn"), &without_class(step.class_scores.as_ref().unwrap()), want, scaled);
        }
        for image in 0..step.plan.batch() {
            let want = file.array(&name("idx")).indices(image);
            check.same(&name("idx"), &kept(&step.plan, image, 1, want.len()), &want);
        }
        if let Some(want) = file.get(&name("pre_mlp")) {
            check.close(&name("pre_mlp"), step.tokens.data(), want, scaled);
        }
    }
    if let Some(want) = file.get(&format!("{p}last_block")) {
        check.close(&format!("{p}last_block"), record.blocks.last().unwrap().data(), want, scaled);
    }
    check.close(
        &format!("{p}logits"),
        output.logits.unwrap().data(),
        file.array(&format!("{p}logits")),
        scaled,
    );
    record
}

pub(crate) fn model(file: &File, check: &mut Check) {
    let vit = host_model(file, file.int("img"));
    for schedule in file.config["schedules"].as_array().unwrap() {
        run_schedule(file, &vit, schedule, check);
    }
}

pub(crate) fn position_resize(file: &File, check: &mut Check) {
    let vit = host_model(file, file.int("input_size"));
    for schedule in file.config["schedules"].as_array().unwrap() {
        let record = run_schedule(file, &vit, schedule, check);
        let entering = record.embedded.unwrap();
        check.close("block0_in", entering.data(), file.array("block0_in"), Tolerance::Scaled(2e-5));
    }
    // The table itself: what the embedding of a black image with zero patch projection would be, read off the loader.
    let checkpoint = foveate::weights::Checkpoint::open(&file.path).unwrap().with_prefix("w/");
    let mut overrides = foveate::weights::Overrides::default();
    overrides.set(&format!("heads={}", file.int("heads"))).unwrap();
    overrides.set(&format!("image={}", file.int("input_size"))).unwrap();
    let loaded = foveate::weights::load_vit(&checkpoint, None, &overrides).unwrap();
    let want = file.array("pos_embed_resized");
    let class = file.tensor("w/cls_token");
    let mut got: Vec<f32> =
        loaded.params.prefix.unwrap().data().iter().zip(class.data()).map(|(a, b)| a - b).collect();
    got.extend(loaded.params.position.unwrap().data());
    check.close("pos_embed_resized", &got, want, Tolerance::Absolute(1e-6));
}

pub(crate) fn counts(file: &File, check: &mut Check) {
    let column = |name: &str| &file.array(name).values;
    let rows = column("keep_rate_f64").iter().zip(column("n"));
    let got: Vec<usize> = rows.map(|(&rate, &n)| Evit::count(rate, n as usize)).collect();
    check.same("evit_count", &got, &column("evit_count").iter().map(|&n| n as usize).collect());
    let rows = column("keep_rate_f64").iter().zip(column("n"));
    let got: Vec<usize> = rows.map(|(&rate, &n)| DynamicVit::count(rate, n as usize)).collect();
    check.same("dynamicvit_count", &got, &column("dynamicvit_count").iter().map(|&n| n as usize).collect());
}
