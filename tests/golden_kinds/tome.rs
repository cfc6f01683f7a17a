use std::collections::BTreeSet;

use foveate::{
    Reduction, SourceMap, Tensor, TokenPlan,
    backend::{
        Attraction, Backend, Epilogue, Heads, Linear, Matching, Metric, Pooling, ScoreRequest, Weighting,
    },
    reduction::{Host, Schedule, Tome, token_counts},
    reference::matching::{Matches, attractions, match_every_kth, match_scores, metric_rows},
};
use serde_json::Value;

use super::{Array, Check, File, Tolerance, images, int, load, record, text};
use crate::Golden;

fn matching<'a>(
    metric: Metric<'a, Tensor>,
    sizes: Option<&'a Tensor>,
    special: usize,
    merges: usize,
) -> Matching<'a, Tensor> {
    Matching {
        metric,
        attraction: Attraction::Cosine,
        weighting: Weighting::Size(sizes),
        special,
        merges,
        both_ways: false,
    }
}

/// Best scores, partners and the three index lists, under `prefix`.
fn compare_matches(
    file: &File,
    prefix: &str,
    suffix: &str,
    image: usize,
    special: usize,
    m: &Matches,
    check: &mut Check,
) {
    let name = |what: &str| format!("{prefix}{what}{suffix}");
    if let Some(want) = file.get(&name("node_max")) {
        let want = Array {
            shape: vec![m.best.len()],
            values: want.row(image).iter().map(|&v| f64::from(v)).collect(),
        };
        check.close(&name("node_max"), &m.best, &want, Tolerance::Absolute(2e-6));
    }
    if let Some(want) = file.get(&name("node_idx")) {
        let skip = special.div_ceil(2);
        check.same(&name("node_idx"), &m.best_in_b[skip..].to_vec(), &want.indices(image)[skip..].to_vec());
    }
    check.same(&name("unm_idx"), &m.kept, &file.array(&name("unm_idx")).indices(image));
    let want: BTreeSet<(usize, usize)> = file
        .array(&name("src_idx"))
        .indices(image)
        .into_iter()
        .zip(file.array(&name("dst_idx")).indices(image))
        .collect();
    check.same(&name("src->dst"), &m.merged.iter().copied().collect(), &want);
}

fn uniform(groups: &[Vec<Vec<usize>>], tokens: usize, weight: impl Fn(usize) -> f32) -> TokenPlan {
    let weighed: Vec<Vec<Vec<(usize, f32)>>> = groups
        .iter()
        .map(|image| image.iter().map(|g| g.iter().map(|&t| (t, weight(g.len()))).collect()).collect())
        .collect();
    TokenPlan::from_groups(tokens, &weighed).unwrap()
}

pub(crate) fn ops(file: &File, check: &mut Check) {
    for case in file.config["cases"].as_array().unwrap() {
        match case["kind"].as_str() {
            Some("chain") => chain(file, case, check),
            Some("kth") => every_kth(file, case, check),
            _ => single(file, case, check),
        }
    }
}

fn special(case: &Value) -> usize {
    ["class_token", "distill_token"].iter().filter(|key| case[**key].as_bool() == Some(true)).count()
}

fn single(file: &File, case: &Value, check: &mut Check) {
    let (p, special, tokens) = (format!("{}.", text(case, "name")), special(case), int(case, "N"));
    let x = file.tensor(&format!("{p}x"));
    let metric = file.tensor(&format!("{p}metric"));
    let sizes = file.get(&format!("{p}size_in")).map(Array::sizes);
    let tome = Tome { schedule: Schedule::List(vec![int(case, "r")]), proportional: true };
    let host =
        Host { depth: 1, special, class_token: special > 0, width: x.width(), heads: 1, ..Host::default() };
    let out = token_counts(&tome, tokens, &host)[1];
    check.same(&format!("{p}n_out"), &out, &int(case, "n_out"));
    if case["noop"].as_bool() == Some(true) {
        return;
    }
    let backend = crate::backend();
    let matching = matching(Metric::Rows(&metric), sizes.as_ref(), special, tokens - out);
    let mut groups = Vec::new();
    for image in 0..x.dim(0) {
        let scores = attractions(&matching, image).unwrap();
        if let Some(want) = file.get(&format!("{p}scores")) {
            // Special tokens are masked in the file; here they are left out of every comparison.
            let (nb, want) = (tokens / 2, want.row(image));
            let pairs =
                scores.iter().zip(&want).filter(|(_, w)| w.is_finite()).map(|(&s, &w)| (s, f64::from(w)));
            let (got, values): (Vec<f32>, Vec<f64>) = pairs.unzip();
            check.same(&format!("{p}masked"), &(want.len() - got.len() >= special.min(1) * nb), &true);
            check.close(
                &format!("{p}scores"),
                &got,
                &Array { shape: vec![got.len()], values },
                Tolerance::Absolute(1e-6),
            );
        }
        let matches = match_scores(&scores, tokens, special, tokens - out, false).unwrap();
        compare_matches(file, &p, "", image, special, &matches, check);
        groups.push(matches.groups(tokens, special));
    }
    let plan = backend.matching(&matching).unwrap();
    let merged = backend.merge(&x, sizes.as_ref(), &plan, Pooling::Weighted, None).unwrap();
    let tokens_tolerance = Tolerance::Absolute(5e-6);
    check.close(
        &format!("{p}x_out"),
        merged.tokens.data(),
        file.array(&format!("{p}x_out")),
        tokens_tolerance,
    );
    check.close(
        &format!("{p}size_out"),
        merged.sizes.data(),
        file.array(&format!("{p}size_out")),
        Tolerance::Absolute(1e-30),
    );
    let of_mode = |plan: &TokenPlan, pooling| backend.merge(&x, None, plan, pooling, None).unwrap().tokens;
    let modes = [
        ("merge_mean", of_mode(&uniform(&groups, tokens, |n| 1.0 / n as f32), Pooling::Weighted), 5e-6),
        ("merge_sum", of_mode(&uniform(&groups, tokens, |_| 1.0), Pooling::Weighted), 5e-6),
        ("merge_amax", of_mode(&plan, Pooling::Max), 1e-30),
    ];
    for (mode, got, limit) in modes {
        if let Some(want) = file.get(&format!("{p}{mode}")) {
            check.close(&format!("{p}{mode}"), got.data(), want, Tolerance::Absolute(limit));
        }
    }
    for image in 0..x.dim(0) {
        let map: Vec<usize> = plan.group_of(image).iter().map(|&g| g as usize).collect();
        if let Some(want) = file.get(&format!("{p}source_map")) {
            check.same(&format!("{p}source_map"), &map, &want.indices(image));
        }
        if let Some(want) = file.get(&format!("{p}source")) {
            let got: Vec<f32> =
                (0..out).flat_map(|g| map.iter().map(move |&m| f32::from(u8::from(m == g)))).collect();
            check.same(&format!("{p}source"), &got, &want.row(image));
        }
    }
    if let Some(want) = file.get(&format!("{p}unmerged")) {
        let got = backend.unmerge(&merged.tokens, &plan).unwrap();
        check.close(&format!("{p}unmerged"), got.data(), want, tokens_tolerance);
    }
}

fn chain(file: &File, case: &Value, check: &mut Check) {
    let (p, special) = (format!("{}.", text(case, "name")), special(case));
    let mut x = file.tensor(&format!("{p}x"));
    let mut sizes: Option<Tensor> = None;
    let list: Vec<usize> =
        case["r"].as_array().unwrap().iter().map(|r| r.as_u64().unwrap() as usize).collect();
    let host = Host {
        depth: list.len(),
        special,
        class_token: special > 0,
        width: x.width(),
        heads: 1,
        ..Host::default()
    };
    let tome = Tome { schedule: Schedule::List(list.clone()), proportional: true };
    let counts = token_counts(&tome, int(case, "N"), &host);
    let want: Vec<usize> =
        case["token_counts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
    check.same(&format!("{p}token_counts"), &counts, &want);
    let backend = crate::backend();
    let mut map = SourceMap::identity(x.dim(0), counts[0]);
    for step in 0..list.len() {
        let merges = counts[step] - counts[step + 1];
        if merges > 0 {
            let metric = file.tensor(&format!("{p}metric{step}"));
            let matching = matching(Metric::Rows(&metric), sizes.as_ref(), special, merges);
            for image in 0..x.dim(0) {
                let scores = attractions(&matching, image).unwrap();
                let matches = match_scores(&scores, counts[step], special, merges, false).unwrap();
                compare_matches(file, &p, &step.to_string(), image, special, &matches, check);
            }
            let plan = backend.matching(&matching).unwrap();
            let merged = backend.merge(&x, sizes.as_ref(), &plan, Pooling::Weighted, None).unwrap();
            map.apply(&plan).unwrap();
            (x, sizes) = (merged.tokens, Some(merged.sizes));
        }
        check.close(
            &format!("{p}x{step}_out"),
            x.data(),
            file.array(&format!("{p}x{step}_out")),
            Tolerance::Absolute(5e-6),
        );
        if let Some(sizes) = &sizes {
            let want = file.array(&format!("{p}size{step}_out"));
            check.close(&format!("{p}size{step}_out"), sizes.data(), want, Tolerance::Absolute(1e-30));
        }
        if let Some(want) = file.get(&format!("{p}source_map{step}")) {
            for image in 0..x.dim(0) {
                let got: Vec<usize> = map.groups(image).iter().map(|&g| g as usize).collect();
                check.same(&format!("{p}source_map{step}"), &got, &want.indices(image));
            }
        }
    }
}

fn every_kth(file: &File, case: &Value, check: &mut Check) {
    let (p, tokens, k) = (format!("{}.", text(case, "name")), int(case, "N"), int(case, "k"));
    let (x, metric) = (file.tensor(&format!("{p}x")), file.array(&format!("{p}metric")));
    let groups: Vec<_> =
        (0..x.dim(0)).map(|image| match_every_kth(&metric.row(image), tokens, k).unwrap()).collect();
    for (image, groups) in groups.iter().enumerate() {
        let sources = (0..tokens / k * k).filter(|t| t % k != k - 1);
        let got: Vec<usize> = sources.map(|t| groups.iter().position(|g| g.contains(&t)).unwrap()).collect();
        check.same(&format!("{p}dst_idx"), &got, &file.array(&format!("{p}dst_idx")).indices(image));
    }
    let backend = crate::backend();
    let plan = uniform(&groups, tokens, |n| 1.0 / n as f32);
    let merged = backend.merge(&x, None, &plan, Pooling::Weighted, None).unwrap();
    for name in ["x_out", "merge_mean"] {
        check.close(
            &format!("{p}{name}"),
            merged.tokens.data(),
            file.array(&format!("{p}{name}")),
            Tolerance::Absolute(5e-6),
        );
    }
    check.close(
        &format!("{p}size_out"),
        merged.sizes.data(),
        file.array(&format!("{p}size_out")),
        Tolerance::Absolute(1e-30),
    );
    // The official un-merge leaves the dropped tail out.
    let spread =
        backend.unmerge(&merged.tokens, &plan).and_then(|x| backend.tokens(&x, 0..tokens / k * k)).unwrap();
    check.close(
        &format!("{p}unmerged"),
        spread.data(),
        file.array(&format!("{p}unmerged")),
        Tolerance::Absolute(5e-6),
    );
}

pub(crate) fn attention(file: &File, check: &mut Check) {
    let backend = crate::backend();
    for case in file.config["cases"].as_array().unwrap() {
        let p = format!("{}.", text(case, "name"));
        let tensor = |name: &str| file.tensor(&format!("{p}{name}"));
        let layer = |name: &str| Linear {
            weight: tensor(&format!("{name}.weight")),
            bias: Some(tensor(&format!("{name}.bias"))),
        };
        let (heads, head_dim) = (int(case, "heads"), int(case, "head_dim"));
        let sizes = file.get(&format!("{p}size")).map(Array::sizes);
        let qkv = backend.linear(&tensor("x"), layer("qkv").all(), Epilogue::None).unwrap();
        let view = Heads {
            packed: &qkv,
            heads,
            head_dim,
            scale: case["scale"].as_f64().unwrap() as f32,
            sizes: sizes.as_ref(),
        };
        let request = ScoreRequest { class: true, received: true };
        let (context, scores) = backend.attention(&view, request).unwrap();
        let out = backend.linear(&context, layer("proj").all(), Epilogue::None).unwrap();
        let (class, received) = (scores.class.unwrap(), scores.received.unwrap());
        let metric: Vec<f32> =
            (0..qkv.dim(0)).flat_map(|image| metric_rows(&Metric::Keys(&view), image).0).collect();
        let mut compare = |name: &str, got: &[f32], limit: f64| {
            if let Some(want) = file.get(&format!("{p}{name}")) {
                check.close(&format!("{p}{name}"), got, want, Tolerance::Absolute(limit));
            }
        };
        compare("qkv", qkv.data(), 1e-5);
        compare("ctx", context.data(), 1e-5);
        compare("out", out.data(), 1e-5);
        compare("metric", &metric, 1e-5);
        compare("cls_attn", class.data(), 2e-6);
        compare("cls_attn_head_mean", &super::head_mean(&class), 2e-6);
        compare("key_mean_attn", &super::head_mean(&received), 2e-6);
        // The scores alone, from queries and keys without values, must be the same scores.
        let width = heads * head_dim;
        let qk = backend.linear(&tensor("x"), layer("qkv").rows(0..2 * width), Epilogue::None).unwrap();
        let alone = backend.attention_scores(&Heads { packed: &qk, ..view }, request).unwrap();
        compare("cls_attn", alone.class.unwrap().data(), 2e-6);
        compare("key_mean_attn", &super::head_mean(&alone.received.unwrap()), 2e-6);
    }
}

pub(crate) fn schedules(file: &File, check: &mut Check) {
    for case in file.config["cases"].as_array().unwrap() {
        let r = &case["r"];
        let schedule = if let Some(pair) = r["pair"].as_array() {
            Schedule::Inflected {
                r: pair[0].as_u64().unwrap() as usize,
                inflection: pair[1].as_f64().unwrap(),
            }
        } else if let Some(list) = r.as_array() {
            Schedule::List(list.iter().map(|r| r.as_u64().unwrap() as usize).collect())
        } else {
            Schedule::Inflected { r: r.as_u64().unwrap() as usize, inflection: 0.0 }
        };
        let depth = int(case, "num_layers");
        let numbers = |key: &str| -> Vec<usize> {
            case[key].as_array().unwrap().iter().map(|n| n.as_f64().unwrap() as usize).collect()
        };
        let mut want = numbers("r_list");
        want.truncate(depth);
        check.same(&format!("r_list of {r}"), &schedule.per_block(depth), &want);
        let special = special(case);
        let host = Host { depth, special, class_token: special > 0, width: 64, heads: 1, ..Host::default() };
        let tome = Tome { schedule, proportional: true };
        let got = token_counts(&tome, int(case, "tokens"), &host);
        check.same(&format!("token_counts of {r}"), &got, &numbers("token_counts"));
        let printed = Reduction::Tome(tome).to_string();
        check.same(&printed, &printed.parse::<Reduction>().unwrap().to_string(), &printed);
    }
}

/// The weights a model file names, loaded with its numbers.
pub(crate) fn host_model(file: &File) -> foveate::model::Vit<Golden> {
    let model = &file.config["model"];
    let path = file.path.with_file_name(text(&file.config, "weights"));
    load(&path, "", &[format!("heads={}", int(model, "heads")), format!("norm_eps={}", model["ln_eps"])])
}

/// Blocks, logits and source map: the same for every method of this family.
pub(crate) fn compare_model(
    file: &File,
    output: &foveate::model::Output<Golden>,
    record: &super::Record,
    check: &mut Check,
) {
    let blocks = Tolerance::Absolute(5e-5);
    for (layer, tokens) in record.blocks.iter().enumerate() {
        if let Some(want) = file.get(&format!("block{layer}.out")) {
            check.close(&format!("block{layer}.out"), tokens.data(), want, blocks);
        }
    }
    let logits = output.logits.as_ref().unwrap();
    check.close("logits", logits.data(), file.array("logits"), Tolerance::Absolute(2e-5));
    check.close("logits_f64", logits.data(), file.array("logits_f64"), Tolerance::Absolute(2e-5));
    if let Some(want) = file.get("norm_cls") {
        check.close("norm_cls", output.features.data(), want, blocks);
    }
    if let (Some(want), Some(sizes)) = (file.get("size"), &output.sizes) {
        check.close("size", sizes.data(), want, Tolerance::Absolute(1e-30));
    }
    if let Some(want) = file.get("source_map") {
        let map = output.source_map(&crate::backend()).unwrap();
        for image in 0..map.batch() {
            let got: Vec<usize> = map.groups(image).iter().map(|&g| g as usize).collect();
            check.same("source_map", &got, &want.indices(image));
            if let Some(source) = file.get("source") {
                let rows =
                    (0..map.tokens_out()).flat_map(|g| got.iter().map(move |&m| f32::from(u8::from(m == g))));
                check.same("source", &rows.collect::<Vec<f32>>(), &source.row(image));
            }
        }
    }
}

pub(crate) fn model(file: &File, check: &mut Check) {
    let vit = host_model(file);
    let host = vit.host();
    let list: Vec<usize> =
        file.config["r_list"].as_array().unwrap().iter().map(|r| r.as_f64().unwrap() as usize).collect();
    let proportional = file.config["prop_attn"].as_bool().unwrap();
    let tome = Tome { schedule: Schedule::List(list), proportional };
    let (output, record) = record(&vit, &images(file.array("images")), &tome);
    let want: Vec<usize> = file.config["token_counts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_u64().unwrap() as usize)
        .collect();
    check.same("token_counts", &output.token_counts, &want);
    for step in &record.steps {
        let heads = Heads {
            packed: step.packed.as_ref().unwrap(),
            heads: host.heads,
            head_dim: host.width / host.heads,
            scale: 1.0,
            sizes: None,
        };
        let count = step.tokens_in.dim(1);
        let matching = matching(Metric::Keys(&heads), None, host.special, count - step.tokens.dim(1));
        for image in 0..step.tokens.dim(0) {
            let scores = attractions(&matching, image).unwrap();
            let matches = match_scores(&scores, count, host.special, matching.merges, false).unwrap();
            compare_matches(file, &format!("block{}.", step.layer), "", image, host.special, &matches, check);
        }
        let want = file.array(&format!("block{}.size", step.layer));
        check.close("size", step.sizes.data(), want, Tolerance::Absolute(1e-30));
    }
    compare_model(file, &output, &record, check);
}
