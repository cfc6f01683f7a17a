//! The golden files of the official code, through the kernels: whole source maps, exactly.

use std::collections::HashMap;

use cudarc::driver::CudaSlice;
use foveate::{
    cuda::{
        Strided,
        matching::{Attraction, Matching, MatchingWorkspace, Metric, Weighting},
    },
    reduction::{Amount, Host, LookAhead, Mctf, MctfPooling, Schedule, Tome, token_counts},
};
use foveate_device_tests::Turn;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use super::launched;

/// A golden file: its cases and its tensors, widened.
pub(crate) struct File {
    pub(crate) cases: Vec<Value>,
    tensors: HashMap<String, (Vec<usize>, Vec<f64>)>,
}

impl File {
    pub(crate) fn open(name: &str) -> Self {
        let path = format!("{}/../golden/{name}", env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
        let config: Value = serde_json::from_str(&metadata.metadata().as_ref().unwrap()["config"]).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let widen = |dtype, bytes: &[u8]| -> Vec<f64> {
            match dtype {
                Dtype::F32 => {
                    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()).into()).collect()
                }
                Dtype::I32 => {
                    bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()).into()).collect()
                }
                _ => Vec::new(),
            }
        };
        let tensors = file
            .tensors()
            .into_iter()
            .map(|(name, view)| (name, (view.shape().to_vec(), widen(view.dtype(), view.data()))))
            .collect();
        Self { cases: config["cases"].as_array().unwrap().clone(), tensors }
    }

    fn get(&self, name: &str) -> Option<(&[usize], Vec<f32>)> {
        self.tensors
            .get(name)
            .map(|(shape, values)| (shape.as_slice(), values.iter().map(|&v| v as f32).collect()))
    }

    fn array(&self, name: &str) -> (&[usize], Vec<f32>) {
        self.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    fn indices(&self, name: &str) -> Vec<i32> {
        self.array(name).1.iter().map(|&v| v as i32).collect()
    }
}

fn number(case: &Value, key: &str) -> usize {
    case[key].as_u64().unwrap_or_else(|| panic!("no number {key}")) as usize
}

fn three(shape: &[usize]) -> [usize; 3] {
    shape.try_into().unwrap()
}

/// One merging step of ToMe on rows that the file calls the metric.
fn tome_step(
    turn: &Turn,
    file: &File,
    metric: &str,
    sizes: Option<&[f32]>,
    special: usize,
    out: usize,
) -> Vec<i32> {
    let (shape, metric) = file.array(metric);
    let (shape, metric): (_, CudaSlice<f32>) = (three(shape), turn.upload(&metric));
    let sizes: Option<CudaSlice<f32>> = sizes.map(|sizes| turn.upload(sizes));
    let matching = Matching {
        metric: Metric::Rows(Strided::new(metric.as_view(), shape)),
        attraction: Attraction::Cosine,
        weighting: Weighting::Size(sizes.as_ref().map(CudaSlice::as_view)),
        special,
        merges: shape[1] - out,
        both_ways: false,
    };
    let mut workspace = MatchingWorkspace::new(&turn.stream, shape[0], shape[1]).unwrap();
    launched(turn, &matching, &mut workspace, shape[0], shape[1]).1
}

/// Every case of `tome_ops`; how many there were.
pub(crate) fn tome(turn: &Turn) -> usize {
    let file = File::open("tome_ops.safetensors");
    let mut checked = 0;
    for case in &file.cases {
        let (prefix, kind) = (case["name"].as_str().unwrap(), case["kind"].as_str());
        if kind == Some("kth") || case["noop"].as_bool() == Some(true) {
            continue;
        }
        let special =
            ["class_token", "distill_token"].iter().filter(|key| case[**key].as_bool() == Some(true)).count();
        let chain = kind == Some("chain");
        let list: Vec<usize> = if chain {
            case["r"].as_array().unwrap().iter().map(|r| r.as_u64().unwrap() as usize).collect()
        } else {
            vec![number(case, "r")]
        };
        let host = Host {
            depth: list.len(),
            special,
            class_token: special > 0,
            width: 1,
            heads: 1,
            ..Host::default()
        };
        let method = Tome { schedule: Schedule::List(list.clone()), proportional: true };
        let counts = token_counts(&method, number(case, "N"), &host);
        let name = |what: &str, step: usize| {
            if chain { format!("{prefix}.{what}{step}") } else { format!("{prefix}.{what}") }
        };
        let batch = file.array(&name("metric", 0)).0[0];
        // Of each token that the chain began with.
        let mut map: Vec<i32> = (0..batch).flat_map(|_| 0..counts[0] as i32).collect();
        for step in 0..list.len() {
            if counts[step] == counts[step + 1] {
                continue;
            }
            let sizes = if !chain {
                file.get(&format!("{prefix}.size_in")).map(|(_, sizes)| sizes)
            } else if step > 0 {
                file.get(&format!("{prefix}.size{}_out", step - 1)).map(|(_, sizes)| sizes)
            } else {
                None
            };
            let groups =
                tome_step(turn, &file, &name("metric", step), sizes.as_deref(), special, counts[step + 1]);
            for (at, group) in map.iter_mut().enumerate() {
                *group = groups[at / counts[0] * counts[step] + *group as usize];
            }
            let map_name =
                if chain { format!("{prefix}.source_map{step}") } else { format!("{prefix}.source_map") };
            assert_eq!(map, file.indices(&map_name), "{map_name}");
            checked += 1;
        }
    }
    checked
}

fn mctf_method(case: &Value) -> Mctf {
    let number = |key: &str| case[key].as_f64().unwrap();
    let share = number("r");
    Mctf {
        amount: if share < 1.0 { Amount::Share(share) } else { Amount::Count(share as usize) },
        layers: None,
        look_ahead: LookAhead::Reuse,
        temperatures: [number("tau_sim"), number("tau_info"), number("tau_size")],
        both_ways: case["bidirection"].as_u64() != Some(0),
        pooling: MctfPooling::Attention,
        proportional: true,
    }
}

/// Every case of `mctf_ops`; how many there were.
pub(crate) fn mctf(turn: &Turn) -> usize {
    let file = File::open("mctf_ops.safetensors");
    let mut checked = 0;
    for case in &file.cases {
        if case["noop"].as_bool() == Some(true) {
            continue;
        }
        let prefix = case["name"].as_str().unwrap();
        let (tokens, special, method) = (number(case, "N"), number(case, "num_protected"), mctf_method(case));
        let merges = method.merges(tokens, special);
        let (shape, x) = file.array(&format!("{prefix}.x"));
        let (map_shape, map) = file.array(&format!("{prefix}.attn"));
        let (batch, heads) = (map_shape[0], map_shape[1]);
        let mut received = vec![0.0; batch * heads * tokens];
        for (row, out) in received.chunks_mut(tokens).enumerate() {
            let map = &map[row * tokens * tokens..(row + 1) * tokens * tokens];
            for (key, out) in out.iter_mut().enumerate() {
                *out = map.iter().skip(key).step_by(tokens).sum::<f32>() / tokens as f32;
            }
        }
        let (x, received): (CudaSlice<f32>, CudaSlice<f32>) = (turn.upload(&x), turn.upload(&received));
        let sizes: Option<CudaSlice<f32>> =
            file.get(&format!("{prefix}.size_in")).map(|(_, sizes)| turn.upload(&sizes));
        let sizes = || sizes.as_ref().map(CudaSlice::as_view);
        let scores = || Strided::new(received.as_view(), [batch, heads, tokens]);
        let [similarity, informativeness, size] = method.temperatures;
        let matching = Matching {
            metric: Metric::Rows(Strided::new(x.as_view(), three(shape))),
            attraction: Attraction::MultiCriteria {
                tau_similarity: similarity,
                informativeness: (scores(), informativeness),
                size: (sizes(), size),
            },
            weighting: Weighting::SizeAndReceived(sizes(), scores()),
            special,
            merges,
            both_ways: method.both_ways,
        };
        let mut workspace = MatchingWorkspace::new(&turn.stream, batch, tokens).unwrap();
        let (_, groups) = launched(turn, &matching, &mut workspace, batch, tokens);
        assert_eq!(groups, file.indices(&format!("{prefix}.source_map")), "{prefix}");
        checked += 1;
    }
    checked
}
