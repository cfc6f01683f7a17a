//! Whole models on the kernels against the reference: every method, in every storage type.
#![cfg(feature = "cuda")]

use std::path::Path;

use foveate::{
    Images, Pixels, Reduction, Result, Tensor, TokenPlan,
    backend::{Backend, Heads, Merged, Scores, Select},
    cuda::{Cuda, CudaPlan, CudaTensor, DType},
    model::{Activation, Observer, Readout, Reducers, Vit, VitConfig, VitParams, arch},
    reduction::{Evidence, Host, Method, Removal, Step},
    reference::Reference,
    weights::{Checkpoint, Overrides, load_vit},
};
use foveate_device_tests::{Turn, rounded};
use half::{bf16, f16};

/// The methods, with every way MCTF looks ahead and every kind of pooling.
const SPECS: [&str; 21] = [
    "none",
    "tome:r=3",
    "tome:r=4,proportional=false",
    "mctf:r=2,ahead=0",
    "mctf:r=2",
    "mctf:r=2,ahead=2",
    "mctf:r=3,pool=max",
    "mctf:r=0.2,layers=0/2,both=false,pool=size",
    "evit:keep=0.6,layers=0/1",
    "evit:keep=0.5,layers=1,fuse=false",
    "dynamicvit:keep=0.7,layers=0/1/2",
    "dynamicvit:keep=[0.6,0.3],layers=1/2",
    "svite:tokens=9",
    "svite:tokens=9,mode=mask",
    "svite:tokens=7,mode=mask,layerwise=true",
    "bat:keep=0.7,layers=0/2",
    "bat:keep=0.5,layers=1,pairs=2,clusters=3,neighbours=3",
    "bat:keep=0.4,layers=0,clusters=0",
    "mstm:keep=0.6,layers=0/1",
    "mstm:keep=0.7,layers=1,scales=none",
    "mstm:keep=0.5,layers=1,scales=2/3",
];

/// The most that a result may differ, of its largest value.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 1e-4,
        DType::F16 => 1e-2,
        DType::Bf16 => 5e-2,
    }
}

fn config(width: usize, heads: usize, image: usize, patch: usize) -> VitConfig {
    VitConfig {
        image: [image; 2],
        patch: [patch; 2],
        width,
        depth: 3,
        heads,
        hidden: 2 * width,
        classes: 10,
        ..arch::config("deit_tiny").unwrap()
    }
}

/// Values as the device stores them.
fn stored(dtype: DType, tensor: &Tensor) -> Tensor {
    let values = match dtype {
        DType::F32 => tensor.data().to_vec(),
        DType::F16 => rounded::<f16>(tensor.data()),
        DType::Bf16 => rounded::<bf16>(tensor.data()),
    };
    Tensor::new(tensor.shape(), values).unwrap()
}

fn pictures(config: &VitConfig, batch: usize, seed: usize) -> Images {
    let [height, width] = config.image;
    let shape = [batch, config.channels, height, width];
    let count = shape.iter().product();
    // Neither noise nor flat: waves of several lengths, another phase in each image.
    let pixel = |at: usize| {
        let (x, y, image) = (at % width, at / width % height, at / (width * height));
        let wave = (x * 37 + y * 11 + image * 5 + seed) % 97 + (x * y + image * 7) % 31 * 3;
        (wave % 251) as u8
    };
    Images::new(shape, Pixels::U8((0..count).map(pixel).collect())).unwrap()
}

/// A method that decides as it was decided before: the plans of another run.
struct Replay<'a> {
    method: &'a Reduction,
    plans: &'a [(usize, TokenPlan)],
}

impl Method for Replay<'_> {
    fn check(&self, host: &Host) -> Result<()> {
        self.method.check(host)
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        self.method.step(layer, tokens, host)
    }

    fn proportional_attention(&self) -> bool {
        self.method.proportional_attention()
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        let plan = self.plans.iter().find(|(layer, _)| *layer == evidence.layer);
        backend.upload_plan(plan.expect("a plan for each step").1.clone())
    }

    fn prepare<B: Backend>(
        &self,
        backend: &B,
        layer: usize,
        tokens: &B::Tensor,
        host: &Host,
        weights: &Reducers<B::Tensor>,
    ) -> Result<Option<B::Tensor>> {
        self.method.prepare(backend, layer, tokens, host, weights)
    }

    fn attention_mask<B: Backend>(
        &self,
        backend: &B,
        layer: usize,
        normed: &B::Tensor,
        special: usize,
        weights: &Reducers<B::Tensor>,
    ) -> Result<Option<B::Plan>> {
        self.method.attention_mask(backend, layer, normed, special, weights)
    }
}

/// Holds each decision of the device to what the reference decides on the same evidence.
struct Judge<'a> {
    cuda: &'a Cuda,
    method: &'a Reduction,
    steps: usize,
}

impl Judge<'_> {
    fn down(&self, tensor: Option<&CudaTensor>) -> Option<Tensor> {
        tensor.map(|tensor| self.cuda.download(tensor).unwrap())
    }
}

impl Judge<'_> {
    /// Scores that are rounded on their way may put tokens in another order: they are held to the reference's, and the order
    /// to them.
    fn judge_scores(&self, evidence: &Evidence<'_, Cuda>, known: &Evidence<'_, Reference>) -> TokenPlan {
        let (at, special) = (self.steps - 1, evidence.special);
        let got = self.cuda.keep_scores(evidence.tokens, &evidence.weights.predictors[at], special).unwrap();
        let got = self.cuda.download(&got).unwrap();
        let want =
            Reference::new().keep_scores(known.tokens, &known.weights.predictors[at], special).unwrap();
        assert_close("scores", &got, &want, tolerance(self.cuda.dtype()));
        let keep = evidence.step.tokens - special;
        Reference::new().select(&Select { class_scores: &got, special, keep, fuse: false }).unwrap()
    }
}

impl Observer<Cuda> for Judge<'_> {
    fn reduced(&mut self, evidence: &Evidence<'_, Cuda>, plan: &CudaPlan, merged: &Merged<CudaTensor>) {
        self.steps += 1;
        let tokens = self.cuda.download(evidence.tokens).unwrap();
        let packed = self.down(evidence.heads.as_ref().map(|heads| heads.packed));
        let sizes = self.down(evidence.sizes);
        let scores = Scores {
            class: self.down(evidence.scores.class.as_ref()),
            received: self.down(evidence.scores.received.as_ref()),
        };
        let known = Evidence::<Reference> {
            layer: evidence.layer,
            depth: evidence.depth,
            step: evidence.step,
            tokens: &tokens,
            heads: evidence.heads.as_ref().zip(packed.as_ref()).map(|(heads, packed)| Heads {
                packed,
                heads: heads.heads,
                head_dim: heads.head_dim,
                scale: heads.scale,
                sizes: None,
            }),
            scores: &scores,
            sizes: sizes.as_ref(),
            count: evidence.count,
            special: evidence.special,
            weights: &evidence.weights.clone().try_map(&mut |tensor| self.cuda.download(&tensor)).unwrap(),
        };
        let want = match self.method {
            Reduction::DynamicVit(_) => self.judge_scores(evidence, &known),
            method => method.plan(&Reference::new(), &known).unwrap(),
        };
        let got = self.cuda.download_plan(plan).unwrap();
        let who = |plan: &TokenPlan| (plan.offsets().to_vec(), plan.members().to_vec());
        assert_eq!(who(&got), who(&want), "{} in block {}: other tokens", self.method, evidence.layer);
        for (got, want) in got.weights().iter().zip(want.weights()) {
            assert!((got - want).abs() <= 1e-5 * want.abs(), "weight {got} instead of {want}");
        }
        for image in self.cuda.download(&merged.sizes).unwrap().data().chunks(evidence.step.tokens) {
            let drops = match self.method {
                Reduction::Evit(evit) => !evit.fuse,
                Reduction::DynamicVit(_) => true,
                Reduction::Svite(svite) => svite.removal == Removal::Gather,
                Reduction::Bat(bat) => bat.clusters.as_deref() == Some(&[0]),
                _ => false,
            };
            let total: f32 = image.iter().sum();
            assert!(
                drops || (total - tokens_before(sizes.as_ref(), evidence.count)).abs() < 1e-3,
                "{total} patches"
            );
        }
    }
}

/// The patches that the tokens of an image stand for.
fn tokens_before(sizes: Option<&Tensor>, count: usize) -> f32 {
    sizes.map_or(count as f32, |sizes| sizes.item(0).iter().sum())
}

fn assert_close(what: &str, got: &Tensor, want: &Tensor, limit: f32) {
    assert_eq!(got.shape(), want.shape(), "{what}");
    let scale = want.data().iter().fold(0.0_f32, |scale, x| scale.max(x.abs()));
    let error = got.data().iter().zip(want.data()).fold(0.0_f32, |worst, (a, b)| {
        let error = (a - b).abs();
        if error > worst || error.is_nan() { error } else { worst }
    });
    println!("{what}: {:.2e} of {:.2e}", error / scale, limit);
    assert!(error <= limit * scale, "{what}: off by {error}, the largest value is {scale}");
}

/// One model with one method on the device, and on the processor with the device's decisions.
fn check(cuda: &Cuda, config: &VitConfig, params: &VitParams<Tensor>, batch: usize, spec: &str) {
    let method: Reduction = spec.parse().unwrap();
    let mut needed = method.own_weights(&config.host());
    // One scale with a projection, the other without.
    needed.projections = if matches!(method, Reduction::Mstm(_)) { 1 << 2 } else { 0 };
    let reducers = arch::random_reducers(config, needed, 4);
    let params = VitParams { reducers, ..params.clone() };
    let params = params.try_map(&mut |tensor| Ok(stored(cuda.dtype(), &tensor))).unwrap();
    let images = pictures(config, batch, 3);
    let device = Vit::new(cuda.clone(), config.clone(), params.clone()).unwrap();
    let mut judge = Judge { cuda, method: &method, steps: 0 };
    let got = device.forward_observed(&images, &method, &mut judge).unwrap();
    let plans: Vec<(usize, TokenPlan)> =
        got.plans.iter().map(|(layer, plan)| (*layer, cuda.download_plan(plan).unwrap())).collect();
    assert_eq!(judge.steps, plans.len());
    assert_eq!(plans.is_empty(), method == Reduction::None, "{spec} reduces");

    let host = Vit::new(Reference::new(), config.clone(), params).unwrap();
    let want = host.forward(&images, &Replay { method: &method, plans: &plans }).unwrap();
    assert_eq!(got.token_counts, want.token_counts);
    let what =
        |part: &str| format!("{} x {} tokens {} {spec} {part}", config.width, config.tokens(), cuda.dtype());
    let limit = tolerance(cuda.dtype());
    assert_close(&what("tokens"), &cuda.download(&got.tokens).unwrap(), &want.tokens, limit);
    let logits = cuda.download(got.logits.as_ref().unwrap()).unwrap();
    assert_close(&what("logits"), &logits, want.logits.as_ref().unwrap(), limit);
    if let (Some(got), Some(want)) = (&got.sizes, &want.sizes) {
        assert_eq!(&cuda.download(got).unwrap(), want, "sizes");
    }
    if cuda.dtype() == DType::F32 {
        let own = host.forward(&images, &method).unwrap();
        let who = |plan: &TokenPlan| (plan.offsets().to_vec(), plan.members().to_vec());
        for ((layer, got), (_, want)) in plans.iter().zip(&own.plans) {
            assert_eq!(who(got), who(want), "{spec} in block {layer}");
        }
        assert_eq!(got.source_map(cuda).unwrap(), own.source_map(&Reference::new()).unwrap());
    }
    let again = device.forward(&images, &method).unwrap();
    assert_eq!(cuda.download(again.logits.as_ref().unwrap()).unwrap(), logits, "twice the same bits");
}

fn check_all(dtype: DType) {
    let Some(turn) = Turn::new() else { return };
    let cuda = Cuda::on(&turn.device, dtype).unwrap();
    let small = config(64, 2, 32, 8);
    let params = arch::random_params(&small, 1);
    SPECS.iter().for_each(|spec| check(&cuda, &small, &params, 2, spec));
    let larger = config(128, 2, 64, 8);
    let params = arch::random_params(&larger, 2);
    for spec in ["none", "tome:r=12", "mctf:r=9", "evit:keep=0.5,layers=0/2"] {
        check(&cuda, &larger, &params, 1, spec);
    }
    turn.end();
}

#[test]
fn every_method_in_f32() {
    check_all(DType::F32);
}

#[test]
fn every_method_in_f16() {
    check_all(DType::F16);
}

#[test]
fn every_method_in_bf16() {
    check_all(DType::Bf16);
}

/// Weights and products of 16 bits beside a residual stream of f32: all methods, and models that meet the stream elsewhere.
#[test]
fn every_method_with_an_f32_residual() {
    let Some(turn) = Turn::new() else { return };
    let cuda = Cuda::on(&turn.device, DType::F16).unwrap().with_f32_residual(true);
    let small = config(64, 2, 32, 8);
    let params = arch::random_params(&small, 1);
    SPECS.iter().for_each(|spec| check(&cuda, &small, &params, 2, spec));
    for readout in [Readout::Mean, Readout::ClassAndMean] {
        let config = VitConfig { readout, distillation_token: readout == Readout::Mean, ..small.clone() };
        check(&cuda, &config, &arch::random_params(&config, 9), 2, "tome:r=3");
    }
    let cuda = Cuda::on(&turn.device, DType::Bf16).unwrap().with_f32_residual(true);
    for spec in ["tome:r=3", "mctf:r=2", "mstm:keep=0.5,layers=1,scales=2/3", "svite:tokens=9"] {
        check(&cuda, &small, &params, 2, spec);
    }
    // In f32 there is nothing to choose; a model that was put there before cannot change.
    let single = Cuda::on(&turn.device, DType::F32).unwrap().with_f32_residual(true);
    assert!(!single.has_f32_residual() && cuda.has_f32_residual());
    let before = Cuda::on(&turn.device, DType::F16).unwrap();
    let weight = before.upload(Tensor::zeros(&[8])).unwrap();
    let norm = foveate::backend::Norm { weight, bias: None, eps: 1e-6 };
    let x = before.upload(Tensor::zeros(&[1, 4, 8])).unwrap();
    let message = before.with_f32_residual(true).stream_norm(&x, &norm).unwrap_err().to_string();
    assert!(message.contains("before its residual stream became f32"), "{message}");
    turn.end();
}

/// What an f32 residual stream is for: what twelve blocks add is not rounded each time. The products still are, so the errors
/// become less by a third, not by a power (docs/precision.md).
#[test]
fn an_f32_residual_is_nearer_to_f32() {
    let Some(turn) = Turn::new() else { return };
    let config = VitConfig { depth: 12, ..config(128, 2, 32, 8) };
    let params = arch::random_params(&config, 7);
    let images = pictures(&config, 4, 1);
    for dtype in [DType::F16, DType::Bf16] {
        // Of weights that are rounded already, so that only the way through the blocks differs.
        let params = params.clone().try_map(&mut |tensor| Ok(stored(dtype, &tensor))).unwrap();
        let logits = |cuda: Cuda| {
            let model = Vit::new(cuda.clone(), config.clone(), params.clone()).unwrap();
            let output = model.forward(&images, &Reduction::None).unwrap();
            cuda.download(output.logits.as_ref().unwrap()).unwrap()
        };
        let truth = logits(Cuda::on(&turn.device, DType::F32).unwrap());
        let [rounded, exact] = [false, true].map(|exact| {
            let logits = logits(Cuda::on(&turn.device, dtype).unwrap().with_f32_residual(exact));
            let squares: f32 = logits.data().iter().zip(truth.data()).map(|(a, b)| (a - b).powi(2)).sum();
            (squares / logits.data().len() as f32).sqrt()
        });
        println!("{dtype}: {rounded:.2e} from f32; with an f32 residual {exact:.2e}");
        assert!(exact < 0.95 * rounded, "{dtype}: {exact} is hardly less than {rounded}");
    }
    turn.end();
}

/// DeiT-T as published: 224 by 224 pixels, 197 tokens, twelve blocks; random weights.
#[test]
fn deit_tiny_in_full_size() {
    let Some(turn) = Turn::new() else { return };
    let config = arch::config("deit_tiny").unwrap();
    let params = arch::random_params(&config, 3);
    let cuda = Cuda::on(&turn.device, DType::F16).unwrap();
    check(&cuda, &config, &params, 1, "tome:r=13");
    turn.end();
}

/// Every shape that timm's `VisionTransformer` can take (gated MLP, norms of queries and keys, registers, mean and attention
/// pooling, CLIP's activation), against timm's own outputs.
#[test]
fn timms_shapes() {
    let Some(turn) = Turn::new() else { return };
    for dtype in [DType::F32, DType::F16] {
        let cuda = Cuda::on(&turn.device, dtype).unwrap();
        for name in ["attention_pool", "clip_quickgelu", "no_class_token", "qk_norm_mean", "registers_swiglu"]
        {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../timm/{name}.safetensors"));
            let file = Checkpoint::open(path).unwrap();
            let mut overrides = Overrides::default();
            let settings: Vec<String> = serde_json::from_str(&file.metadata()["set"]).unwrap();
            settings.iter().for_each(|setting| overrides.set(setting).unwrap());
            let vit = load_vit(&file.with_prefix("w/"), None, &overrides).unwrap().build(cuda.clone());
            let vit = vit.unwrap();
            let x = file.tensor("x").unwrap();
            let shape = <[usize; 4]>::try_from(x.shape()).unwrap();
            let images = Images::new(shape, Pixels::F32(x.into_data())).unwrap();
            let head_dim = vit.config().head_dim();
            if dtype != DType::F32 && ![32, 40, 48, 64, 72, 80, 96, 128].contains(&head_dim) {
                let error = vit.forward(&images, &Reduction::None).unwrap_err().to_string();
                assert!(error.contains(&format!("heads have {head_dim} values")), "{error}");
                continue;
            }
            let output = vit.forward(&images, &Reduction::None).unwrap();
            let logits = cuda.download(output.logits.as_ref().unwrap()).unwrap();
            assert_close(
                &format!("{name} {dtype}"),
                &logits,
                &file.tensor("logits").unwrap(),
                tolerance(dtype),
            );
        }
    }
    turn.end();
}

/// GELU's tanh form within the product, on the demo's trained model: off only where asked for, and by what the documentation
/// says beside the error of rounding to f16.
#[test]
fn gelu_in_the_product() {
    let Some(turn) = Turn::new() else { return };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/fashion_deit_f16.safetensors");
    let images = load_vit(&Checkpoint::open(&root).unwrap(), None, &Overrides::default()).unwrap();
    let images = pictures(&images.config, 4, 1);
    let logits = |cuda: &Cuda| {
        let model = load_vit(&Checkpoint::open(&root).unwrap(), None, &Overrides::default()).unwrap();
        let output = model.build(cuda.clone()).unwrap().forward(&images, &Reduction::None).unwrap();
        cuda.download(output.logits.as_ref().unwrap()).unwrap()
    };
    let exact = Cuda::on(&turn.device, DType::F32).unwrap();
    let half = Cuda::on(&turn.device, DType::F16).unwrap();
    let truth = logits(&exact);
    assert_eq!(logits(&exact.clone().with_fused_gelu(true)), truth, "f32 is exact all the same");
    let (rounded, fused) = (logits(&half), logits(&half.clone().with_fused_gelu(true)));
    assert_ne!(rounded, fused);
    let rms = |a: &Tensor, b: &Tensor| {
        let squares: f32 = a.data().iter().zip(b.data()).map(|(a, b)| (a - b).powi(2)).sum();
        (squares / a.data().len() as f32).sqrt()
    };
    println!(
        "f16: {:.2e} from f32; tanh form: {:.2e} from f16",
        rms(&rounded, &truth),
        rms(&fused, &rounded)
    );
    assert_close("fused GELU", &fused, &truth, tolerance(DType::F16));
    turn.end();
}

/// More memory than any device has: said with what there is, and the device stays usable.
#[test]
fn running_out_of_memory_is_an_error() {
    let Some(turn) = Turn::new() else { return };
    let cuda = Cuda::on(&turn.device, DType::F32).unwrap();
    let tokens = 1 << 24;
    let dropped = TokenPlan::new(1, tokens, 1, vec![0, 0], vec![-1; tokens], vec![0.0; tokens]).unwrap();
    let plan = cuda.upload_plan(dropped).unwrap();
    let row = cuda.upload(Tensor::zeros(&[1, 1, 4096])).unwrap();
    let error = cuda.unmerge(&row, &plan).unwrap_err();
    assert!(matches!(error, foveate::Error::OutOfMemory { bytes: 0x40_0000_0000, .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains("274877.9 MB asked for") && message.contains("smaller batch"), "{message}");
    let config = config(64, 2, 32, 8);
    check(&cuda, &config, &arch::random_params(&config, 1), 1, "tome:r=3");
    turn.end();
}

/// The other activations and readouts: what no file above has together.
#[test]
fn other_activations_and_readouts() {
    let Some(turn) = Turn::new() else { return };
    for dtype in [DType::F32, DType::Bf16] {
        let cuda = Cuda::on(&turn.device, dtype).unwrap();
        for (activation, readout) in [
            (Activation::GeluTanh, Readout::Mean),
            (Activation::Silu, Readout::ClassAndMean),
            (Activation::Relu, Readout::Class),
            (Activation::SwiGlu, Readout::Mean),
        ] {
            let config = VitConfig { activation, readout, ..config(64, 2, 32, 8) };
            let params = arch::random_params(&config, 9);
            check(&cuda, &config, &params, 2, "tome:r=3");
        }
    }
    turn.end();
}

/// What the kernels cannot do is said with the operation's name, and leaves the device usable.
#[test]
fn errors_leave_the_device_usable() {
    let Some(turn) = Turn::new() else { return };
    let cuda = Cuda::on(&turn.device, DType::F16).unwrap();
    let x = cuda.upload(Tensor::zeros(&[1, 4, 8])).unwrap();
    let norm = |width| foveate::backend::Norm {
        weight: cuda.upload(Tensor::zeros(&[width])).unwrap(),
        bias: None,
        eps: 1e-6,
    };
    let message = cuda.layer_norm(&x, &norm(7)).unwrap_err().to_string();
    assert!(message.contains("layer_norm: weight has shape [7], expected [8]"), "{message}");
    let other = Cuda::on(&turn.device, DType::F16).unwrap();
    let message = other.layer_norm(&x, &norm(8)).unwrap_err().to_string();
    assert!(message.contains("x belongs to another backend"), "{message}");
    let exact = cuda.upload_f32(Tensor::zeros(&[1, 4, 8])).unwrap();
    let message = cuda.layer_norm(&exact, &norm(8)).unwrap_err().to_string();
    assert!(message.contains("x holds f32, expected f16"), "{message}");
    cuda.layer_norm(&x, &norm(8)).unwrap();
    turn.end();
}
