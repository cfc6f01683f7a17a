use std::collections::BTreeSet;

use foveate::{
    Reduction, Tensor,
    backend::{Attraction, Backend, Matching, Metric, Pooling, Weighting},
    reduction::{Amount, Host, LookAhead, Mctf, MctfPooling, token_counts},
    reference::{
        attention::fold_map,
        matching::{Matches, attractions, match_scores},
    },
};
use serde_json::Value;

use super::{Array, Check, File, Tolerance, images, int, record, text, tome};

/// The method that a case's or a model's configuration describes.
fn method(config: &Value) -> Mctf {
    let number = |key: &str| config[key].as_f64().unwrap();
    let share = number("r");
    Mctf {
        amount: if share < 1.0 { Amount::Share(share) } else { Amount::Count(share as usize) },
        layers: config["activate_layer"]
            .as_array()
            .map(|layers| layers.iter().map(|l| l.as_u64().unwrap() as usize).collect()),
        look_ahead: match config["one_step_ahead"].as_u64() {
            Some(0) => LookAhead::Off,
            Some(2) => LookAhead::Precise,
            _ => LookAhead::Reuse,
        },
        temperatures: if config["tau_sim"].is_null() {
            [1.0, 20.0, 40.0]
        } else {
            [number("tau_sim"), number("tau_info"), number("tau_size")]
        },
        both_ways: config["bidirection"].as_u64() != Some(0),
        pooling: match config["pooling_type"].as_u64() {
            Some(0) => MctfPooling::Size,
            Some(2) => MctfPooling::Max,
            Some(3) => MctfPooling::Mean,
            _ => MctfPooling::Attention,
        },
        proportional: config["prop_attn"].as_u64() != Some(0),
    }
}

fn matching<'a>(
    mctf: &Mctf,
    x: &'a Tensor,
    received: &'a Tensor,
    sizes: Option<&'a Tensor>,
    special: usize,
    merges: usize,
) -> Matching<'a, Tensor> {
    let [similarity, informativeness, size] = mctf.temperatures;
    Matching {
        metric: Metric::Rows(x),
        attraction: Attraction::MultiCriteria {
            tau_similarity: similarity,
            informativeness: (received, informativeness),
            size: (sizes, size),
        },
        weighting: match mctf.pooling {
            MctfPooling::Size => Weighting::Size(sizes),
            MctfPooling::Attention => Weighting::SizeAndReceived(sizes, received),
            MctfPooling::Max | MctfPooling::Mean => Weighting::Uniform,
        },
        special,
        merges,
        both_ways: mctf.both_ways,
    }
}

/// Both phases' scores and index lists, under `prefix`.
fn compare_matches(file: &File, prefix: &str, image: usize, special: usize, m: &Matches, check: &mut Check) {
    let name = |what: &str| format!("{prefix}{what}");
    let row = |what: &str| file.get(&name(what)).map(|array| array.row(image));
    let as_array =
        |row: Vec<f32>| Array { shape: vec![row.len()], values: row.into_iter().map(f64::from).collect() };
    let indices = |what: &str| file.get(&name(what)).map(|array| array.indices(image)).unwrap_or_default();
    let pairs = |a: &str, b: &str| indices(a).into_iter().zip(indices(b)).collect::<BTreeSet<_>>();
    if let Some(want) = row("node_max") {
        check.close(&name("node_max"), &m.best, &as_array(want), Tolerance::Absolute(2e-6));
    }
    let skip = special.div_ceil(2);
    if file.get(&name("node_idx")).is_some() {
        check.same(&name("node_idx"), &m.best_in_b[skip..].to_vec(), &indices("node_idx")[skip..].to_vec());
    }
    check.same(&name("unm_idx"), &m.kept, &indices("unm_idx"));
    check.same(&name("src->dst"), &m.merged.iter().copied().collect(), &pairs("src_idx", "dst_idx"));
    if let Some(back) = &m.back {
        if let Some(want) = row("node_max2") {
            check.close(&name("node_max2"), &back.best, &as_array(want), Tolerance::Absolute(2e-6));
        }
        if file.get(&name("node_idx2")).is_some() {
            check.same(&name("node_idx2"), &back.best_in_kept, &indices("node_idx2"));
        }
        check.same(&name("unm_idx2"), &back.kept, &indices("unm_idx2"));
        check.same(
            &name("src2->dst2"),
            &back.merged.iter().copied().collect(),
            &pairs("src_idx2", "dst_idx2"),
        );
    }
}

pub(crate) fn ops(file: &File, check: &mut Check) {
    let backend = crate::backend();
    for case in file.config["cases"].as_array().unwrap() {
        let p = format!("{}.", text(case, "name"));
        let (tokens, special, mctf) = (int(case, "N"), int(case, "num_protected"), method(case));
        let merges = mctf.merges(tokens, special);
        check.same(&format!("{p}n_out"), &(tokens - merges), &int(case, "n_out"));
        if case["noop"].as_bool() == Some(true) {
            continue;
        }
        let (x, map) = (file.tensor(&format!("{p}x")), file.tensor(&format!("{p}attn")));
        let sizes = file.get(&format!("{p}size_in")).map(Array::sizes);
        let (batch, heads) = (map.dim(0), map.dim(1));
        let mut received = Tensor::zeros(&[batch, heads, tokens]);
        for (row, out) in received.data_mut().chunks_mut(tokens).enumerate() {
            let map = &map.data()[row * tokens * tokens..(row + 1) * tokens * tokens];
            for (key, out) in out.iter_mut().enumerate() {
                *out = map.iter().skip(key).step_by(tokens).sum::<f32>() / tokens as f32;
            }
        }
        let matching = |mctf: &Mctf| matching(mctf, &x, &received, sizes.as_ref(), special, merges);
        // Each factor alone, by switching the other criteria off.
        let alone = |temperatures| attractions_of(&matching(&Mctf { temperatures, ..mctf.clone() }), batch);
        let [similarity, informativeness, size] = mctf.temperatures;
        for (name, temperatures) in [
            ("scores", mctf.temperatures),
            ("W_sim", [similarity, 0.0, 0.0]),
            ("W_info", [0.0, informativeness, 0.0]),
            ("W_size", [0.0, 0.0, size]),
        ] {
            if let Some(want) = file.get(&format!("{p}{name}")) {
                let scores = alone(temperatures);
                let pairs = scores.iter().zip(&want.values).filter(|(_, w)| w.is_finite());
                let (got, values): (Vec<f32>, Vec<f64>) = pairs.map(|(&s, &w)| (s, w)).unzip();
                let want = Array { shape: vec![values.len()], values };
                check.close(&format!("{p}{name}"), &got, &want, Tolerance::Absolute(1e-6));
            }
        }
        let args = matching(&mctf);
        for image in 0..batch {
            let scores = attractions(&args, image).unwrap();
            let matches = match_scores(&scores, tokens, special, merges, mctf.both_ways).unwrap();
            compare_matches(file, &p, image, special, &matches, check);
        }
        let plan = backend.matching(&args).unwrap();
        let pooling = if mctf.pooling == MctfPooling::Max { Pooling::Max } else { Pooling::Weighted };
        let merged = backend.merge(&x, sizes.as_ref(), &plan, pooling, None).unwrap();
        let out = Tolerance::Absolute(5e-6);
        check.close(&format!("{p}x_out"), merged.tokens.data(), file.array(&format!("{p}x_out")), out);
        let size_out = file.array(&format!("{p}size_out"));
        check.close(&format!("{p}size_out"), merged.sizes.data(), size_out, Tolerance::Absolute(1e-30));
        if let Some(want) = file.get(&format!("{p}attn_out")) {
            let fold = |image| fold_map(map.item(image), &plan, image, pooling).unwrap();
            let got: Vec<f32> = (0..batch).flat_map(fold).collect();
            check.close(&format!("{p}attn_out"), &got, want, out);
        }
        for image in 0..batch {
            let got: Vec<usize> = plan.group_of(image).iter().map(|&g| g as usize).collect();
            check.same(
                &format!("{p}source_map"),
                &got,
                &file.array(&format!("{p}source_map")).indices(image),
            );
        }
    }
}

fn attractions_of(matching: &Matching<'_, Tensor>, batch: usize) -> Vec<f32> {
    (0..batch).flat_map(|image| attractions(matching, image).unwrap()).collect()
}

pub(crate) fn schedules(file: &File, check: &mut Check) {
    for case in file.config["cases"].as_array().unwrap() {
        let mctf = method(case);
        let host = Host {
            depth: int(case, "num_layers"),
            special: 1,
            class_token: true,
            width: 64,
            heads: 1,
            ..Host::default()
        };
        let got = token_counts(&mctf, int(case, "tokens"), &host);
        let want: Vec<usize> =
            case["token_counts"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap() as usize).collect();
        check.same(&format!("token_counts of {mctf}"), &got, &want);
        let printed = mctf.to_string();
        check.same(&printed, &printed.parse::<Reduction>().unwrap(), &Reduction::Mctf(mctf));
    }
}

pub(crate) fn model(file: &File, check: &mut Check) {
    let vit = tome::host_model(file);
    let special = vit.host().special;
    let mctf = method(&file.config);
    let (output, record) = record(&vit, &images(file.array("images")), &mctf);
    let want: Vec<usize> = file.config["token_counts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_u64().unwrap() as usize)
        .collect();
    check.same("token_counts", &output.token_counts, &want);
    for step in &record.steps {
        let (before, after) = (step.tokens_in.dim(1), step.tokens.dim(1));
        let received = step.received.as_ref().unwrap();
        let args =
            matching(&mctf, &step.tokens_in, received, step.sizes_in.as_ref(), special, before - after);
        for image in 0..step.tokens.dim(0) {
            let scores = attractions(&args, image).unwrap();
            let matches = match_scores(&scores, before, special, before - after, mctf.both_ways).unwrap();
            compare_matches(file, &format!("block{}.", step.layer), image, special, &matches, check);
        }
        let want = file.array(&format!("block{}.size", step.layer));
        check.close("size", step.sizes.data(), want, Tolerance::Absolute(1e-30));
    }
    tome::compare_model(file, &output, &record, check);
}
