//! Engines: what they take, that their replays are the eager pass bit for bit, and that nothing is lost when memory runs out.
#![cfg(feature = "cuda")]

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use foveate::{
    Error, Images, Pixels, Reduction, Result, Tensor, TokenPlan,
    backend::Backend,
    cuda::{Cuda, DType, Engine, Forecast, LaunchRecord, Run, patch::PixelType},
    model::{Activation, Output, PoolParams, Readout, Vit, VitConfig, VitParams, arch},
    reduction::{Evidence, Host, Method, OwnWeights, Step},
    reference::Reference,
};
use foveate_device_tests::{Turn, emulator};

/// Runs a test. What it makes is dropped before the next test's turn, which may count memory.
fn on_device(test: impl FnOnce(&Turn)) {
    let Some(turn) = Turn::new() else { return };
    test(&turn);
    turn.end();
}

fn small() -> VitConfig {
    VitConfig {
        image: [32; 2],
        patch: [8; 2],
        width: 64,
        depth: 3,
        heads: 2,
        hidden: 128,
        classes: 10,
        ..arch::config("deit_tiny").unwrap()
    }
}

fn model(cuda: &Cuda, config: &VitConfig) -> Vit<Cuda> {
    Vit::new(cuda.clone(), config.clone(), params(config)).unwrap()
}

/// With the weights of those methods that have some of their own.
fn params(config: &VitConfig) -> VitParams<Tensor> {
    let of_dynamic = DYNAMIC.parse::<Reduction>().unwrap().own_weights(&config.host());
    let needed =
        OwnWeights { selector: true, layer_selectors: config.depth, projections: 1 << 2, ..of_dynamic };
    VitParams { reducers: arch::random_reducers(config, needed, 4), ..arch::random_params(config, 1) }
}

const DYNAMIC: &str = "dynamicvit:keep=0.7,layers=1/2";

fn pictures(config: &VitConfig, batch: usize, seed: usize) -> Images {
    let [height, width] = config.image;
    let shape = [batch, config.channels, height, width];
    // Waves, another length in each image: equal patches would be ties, whatever the image.
    let pixel = |at: usize| {
        let (x, y, plane) = (at % width, at / width % height, at / (width * height) + seed);
        let wave = (x * (37 + plane) + y * 11 + plane * 5) % 97 + (x * y + plane * 7) % 31 * 3;
        (wave % 251) as u8
    };
    Images::new(shape, Pixels::U8((0..shape.iter().product()).map(pixel).collect())).unwrap()
}

/// A ViT-S in `f16`, on the memory of a dry pass: none.
fn vit_small(turn: &Turn) -> Vit<Cuda> {
    let cuda = Cuda::on(&turn.device, DType::F16).unwrap();
    model(&cuda, &arch::config("deit_small").unwrap())
}

/// The arena is at most 1.15 times what is alive at a time, all of it and the part that changes; and nothing is computed to
/// know it.
#[test]
fn the_arena_is_little_more_than_what_is_alive() {
    on_device(|turn| {
        let vit = vit_small(turn);
        for spec in ["none", "tome:r=13", "mctf:r=16", "evit:keep=0.5"] {
            let method: Reduction = spec.parse().unwrap();
            emulator::log_calls();
            let forecast = Forecast::new(&vit, &method, 64, PixelType::U8).unwrap();
            let calls = emulator::calls();
            let harmless = |call: &String| call.starts_with("cuStream") || call.starts_with("cuCtx");
            assert!(calls.iter().all(harmless), "{calls:?}");
            let (arena, live) = (forecast.arena_bytes(), forecast.largest_live_bytes());
            let moving = |bytes| (bytes - forecast.constant_bytes()) as f64;
            println!(
                "{spec}: {arena} bytes, {live} alive ({:.3}); without images and workspace {:.3}",
                arena as f64 / live as f64,
                moving(arena) / moving(live)
            );
            assert!(arena as f64 <= 1.15 * live as f64 && moving(arena) <= 1.15 * moving(live), "{spec}");
            assert_eq!(forecast.token_counts(), method.token_counts(197, &vit.host()));
            // Memory grows with the batch, so there is a largest one.
            let most = Forecast::largest_batch(&vit, &method, PixelType::U8, arena).unwrap();
            assert_eq!(most, 64, "{spec}");
        }
    });
}

fn in_block(launches: &[LaunchRecord], block: usize) -> Vec<&str> {
    launches.iter().filter(|launch| launch.layer == Some(block)).map(|launch| launch.operation).collect()
}

/// The launches of a block, with the four products: the numbers that users are told.
#[test]
fn a_block_takes_few_launches() {
    on_device(|turn| {
        let vit = vit_small(turn);
        let dense =
            ["layer_norm", "linear", "attention", "linear", "layer_norm", "linear", "activation", "linear"];
        // MCTF looks at the attention map before it reduces and attends with it again, which takes a fifth product (values of their
        // own), scores before the values, matching, and merging with a norm of its own.
        for (spec, most) in [
            ("none", 8),
            ("tome:r=13", 9),
            ("evit:keep=0.5", 9),
            (DYNAMIC, 10),
            ("mctf:r=16,ahead=0", 10),
            ("mctf:r=16", 12),
            ("mctf:r=16,pool=max", 12),
        ] {
            let forecast =
                Forecast::new(&vit, &spec.parse::<Reduction>().unwrap(), 64, PixelType::U8).unwrap();
            let block = forecast.token_counts().windows(2).position(|counts| counts[1] < counts[0]);
            let launches = in_block(forecast.launches(), block.unwrap_or(0));
            println!("{spec}: {} {launches:?}", launches.len());
            assert!(launches.len() <= most, "{spec}");
            if spec == "none" {
                assert_eq!(launches, dense);
            }
        }
    });
}

/// A dry pass foretells what an eager one launches, and a recording writes down all that the driver is asked for.
#[test]
fn forecasts_are_what_happens() {
    on_device(|turn| {
        let config = small();
        let cuda = Cuda::on(&turn.device, DType::F16).unwrap();
        let vit = model(&cuda, &config);
        for spec in ["none", "tome:r=3", "mctf:r=2", "evit:keep=0.6,layers=0/1", DYNAMIC] {
            let method: Reduction = spec.parse().unwrap();
            let images = pictures(&config, 2, 1);
            emulator::log_calls();
            let (output, launches) = cuda.record(|| vit.forward(&images, &method));
            let output = output.unwrap();
            let calls = emulator::calls();
            let enqueued =
                ["cuLaunchKernel", "emu_enqueue_host", "cuMemcpyDtoDAsync_v2", "cuMemsetD2D32Async"];
            let count = calls.iter().filter(|call| enqueued.contains(&&***call)).count();
            assert_eq!(launches.len(), count, "{spec}");
            let forecast = Forecast::new(&vit, &method, 2, PixelType::U8).unwrap();
            let told: Vec<LaunchRecord> = forecast.launches().to_vec();
            let nowhere = |launch: LaunchRecord| LaunchRecord { layer: None, ..launch };
            let told: Vec<LaunchRecord> = told.into_iter().map(nowhere).collect();
            assert_eq!(told, launches, "{spec}");
            assert_eq!(forecast.token_counts(), output.token_counts);
            // A product reads its rows and weights and writes its rows, each once.
            let product = told.iter().find(|launch| launch.macs > 0).unwrap();
            assert_eq!(
                (product.macs, product.bytes),
                (2 * 16 * 192 * 64, 2 * (2 * 16 * 192 + 193 * 64 + 2 * 16 * 64))
            );
            assert!(launches.iter().all(|launch| !launch.operation.is_empty()), "{launches:?}");
        }
    });
}

/// Everything that a pass gives, on the host.
#[derive(Debug, PartialEq)]
struct Results {
    tensors: Vec<Option<Tensor>>,
    plans: Vec<(usize, TokenPlan)>,
    token_counts: Vec<usize>,
}

fn of_run(run: &Run<'_>) -> Results {
    let [a, b] = run.head_logits().unwrap().map_or([None, None], |both| both.map(Some));
    let (tokens, features) = (Some(run.tokens().unwrap()), Some(run.features().unwrap()));
    Results {
        tensors: vec![tokens, run.sizes().unwrap(), features, run.logits().unwrap(), a, b],
        plans: run.plans().unwrap(),
        token_counts: run.token_counts().to_vec(),
    }
}

fn of_output(cuda: &Cuda, output: &Output<Cuda>) -> Results {
    let down = |tensor: Option<&_>| tensor.map(|tensor| cuda.download(tensor).unwrap());
    let both = output.head_logits.as_ref();
    Results {
        tensors: vec![
            down(Some(&output.tokens)),
            down(output.sizes.as_ref()),
            down(Some(&output.features)),
            down(output.logits.as_ref()),
            down(both.map(|both| &both[0])),
            down(both.map(|both| &both[1])),
        ],
        plans: output.plans.iter().map(|(at, plan)| (*at, cuda.download_plan(plan).unwrap())).collect(),
        token_counts: output.token_counts.clone(),
    }
}

/// The results of the first `images`.
fn first(results: &Results, images: usize) -> Results {
    let cut = |tensor: &Tensor| {
        let shape = [&[images], &tensor.shape()[1..]].concat();
        let count = shape.iter().product();
        Tensor::new(&shape, tensor.data()[..count].to_vec()).unwrap()
    };
    let plan = |plan: &TokenPlan| {
        let (rows, members) = (images * (plan.tokens_out() + 1), images * plan.tokens_in());
        let arrays = (&plan.offsets()[..rows], &plan.members()[..members], &plan.weights()[..members]);
        let (offsets, members, weights) = (arrays.0.to_vec(), arrays.1.to_vec(), arrays.2.to_vec());
        TokenPlan::new(images, plan.tokens_in(), plan.tokens_out(), offsets, members, weights).unwrap()
    };
    Results {
        tensors: results.tensors.iter().map(|tensor| tensor.as_ref().map(cut)).collect(),
        plans: results.plans.iter().map(|(at, known)| (*at, plan(known))).collect(),
        token_counts: results.token_counts.clone(),
    }
}

/// The replays of an engine against eager passes over the same images, and a run over fewer images than the batch.
fn check(vit: &Vit<Cuda>, method: &impl Method, what: &str) {
    let mut engine = Engine::new(vit, method, 3, PixelType::U8).unwrap();
    let mut last = None;
    for seed in [1, 20] {
        let images = pictures(vit.config(), 3, seed);
        let want = of_output(vit.backend(), &vit.forward(&images, method).unwrap());
        let run = engine.run(&images).unwrap();
        assert_eq!(of_run(&run), want, "{what}, images {seed}");
        let map = run.source_map().unwrap();
        assert_eq!(map.batch(), 3);
        assert_ne!(last.as_ref(), Some(&want), "{what}: other images, other results");
        last = Some(want);
    }
    let part = pictures(vit.config(), 2, 20);
    let run = engine.run(&part).unwrap();
    assert_eq!(run.images(), 2);
    assert_eq!(of_run(&run), first(&last.unwrap(), 2), "{what}: two of three images");
}

const SPECS: [&str; 13] = [
    "none",
    "tome:r=3",
    "tome:r=4,proportional=false",
    "mctf:r=2,ahead=0",
    "mctf:r=2",
    "mctf:r=3,pool=max",
    "evit:keep=0.6,layers=0/1",
    "evit:keep=0.5,layers=1,fuse=false",
    DYNAMIC,
    "svite:tokens=9",
    "svite:tokens=7,mode=mask,layerwise=true",
    "bat:keep=0.6,layers=0/1",
    "mstm:keep=0.6,layers=0/2",
];

#[test]
fn replays_are_eager_passes_bit_for_bit() {
    on_device(|turn| {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let vit = model(&Cuda::on(&turn.device, dtype).unwrap(), &small());
            for spec in SPECS {
                check(&vit, &spec.parse::<Reduction>().unwrap(), &format!("{dtype} {spec}"));
            }
        }
        let vit = model(&Cuda::on(&turn.device, DType::F16).unwrap().with_f32_residual(true), &small());
        for spec in ["tome:r=3", "mctf:r=2", DYNAMIC] {
            check(&vit, &spec.parse::<Reduction>().unwrap(), &format!("f16 beside an f32 residual, {spec}"));
        }
    });
}

/// Models whose read-out is more than a class token's: two heads, two features, attention pooling.
fn families() -> Vec<(&'static str, VitConfig, VitParams<Tensor>)> {
    let distilled = VitConfig { distillation_token: true, ..small() };
    let both =
        VitConfig { readout: Readout::ClassAndMean, registers: 2, activation: Activation::SwiGlu, ..small() };
    let pooled = VitConfig { readout: Readout::Attention, class_token: false, ..small() };
    let mut pool_params = arch::random_params(&pooled, 5);
    let block = &pool_params.blocks[0];
    pool_params.attn_pool = Some(PoolParams {
        latent: Tensor::new(&[1, 64], (0..64).map(|at| (at as f32 * 0.7).sin()).collect()).unwrap(),
        qkv: block.qkv.clone(),
        q_norm: None,
        k_norm: None,
        proj: block.proj.clone(),
        norm: Some(block.norm2.clone()),
        fc1: block.fc1.clone(),
        fc2: block.fc2.clone(),
    });
    let random = |config: VitConfig| {
        let params = arch::random_params(&config, 3);
        (config, params)
    };
    let ((distilled, a), (both, b)) = (random(distilled), random(both));
    vec![("two heads", distilled, a), ("class and mean", both, b), ("attention pooling", pooled, pool_params)]
}

#[test]
fn read_outs_stay_on_the_device() {
    on_device(|turn| {
        for (name, config, params) in families() {
            for (dtype, spec) in [(DType::F32, "tome:r=3"), (DType::F16, "none"), (DType::Bf16, "mctf:r=2")] {
                let vit =
                    Vit::new(Cuda::on(&turn.device, dtype).unwrap(), config.clone(), params.clone()).unwrap();
                check(&vit, &spec.parse::<Reduction>().unwrap(), &format!("{name} {dtype} {spec}"));
            }
        }
    });
}

/// In a run nothing is allocated, nobody waits, and the driver is called as often however deep the model is.
#[test]
fn a_run_asks_little_of_the_host() {
    on_device(|turn| {
        let cuda = Cuda::on(&turn.device, DType::F16).unwrap();
        for depth in [1, 3] {
            let vit = model(&cuda, &VitConfig { depth, ..small() });
            let mut engine =
                Engine::new(&vit, &"tome:r=3".parse::<Reduction>().unwrap(), 2, PixelType::U8).unwrap();
            let images = pictures(vit.config(), 2, 1);
            for _ in 0..3 {
                emulator::log_calls();
                engine.run(&images).unwrap();
                let mut calls = emulator::calls();
                calls.retain(|call| !call.starts_with("cuCtx"));
                assert_eq!(
                    calls,
                    ["cuEventQuery", "cuMemcpyHtoDAsync_v2", "cuEventRecord", "cuGraphLaunch"],
                    "{depth} blocks"
                );
            }
        }
    });
}

#[test]
fn engines_side_by_side() {
    on_device(|turn| {
        let vit = model(&Cuda::on(&turn.device, DType::F16).unwrap(), &small());
        let methods: [Reduction; 2] = ["tome:r=3", "mctf:r=2"].map(|spec| spec.parse().unwrap());
        let mut engines =
            methods.each_ref().map(|method| Engine::new(&vit, method, 2, PixelType::U8).unwrap());
        assert_ne!(engines[0].stream().cu_stream(), engines[1].stream().cu_stream());
        for round in 0..2 {
            let images = [0, 1].map(|engine| pictures(vit.config(), 2, 10 * round + engine));
            let [a, b] = &mut engines;
            // Both under way before either is waited for, with an eager pass between them.
            let runs = [a.run(&images[0]).unwrap(), b.run(&images[1]).unwrap()];
            for ((run, images), method) in runs.iter().zip(&images).zip(&methods) {
                assert_eq!(
                    of_run(run),
                    of_output(vit.backend(), &vit.forward(images, method).unwrap()),
                    "{method}"
                );
            }
        }
        // An engine outlives its model, and its weights outlive it.
        let images = pictures(vit.config(), 2, 5);
        let want = of_output(vit.backend(), &vit.forward(&images, &methods[0]).unwrap());
        drop(vit);
        let [mut engine, other] = engines;
        drop(other);
        assert_eq!(of_run(&engine.run(&images).unwrap()), want);
    });
}

#[test]
fn an_engine_of_several_threads() {
    on_device(|turn| {
        let vit = model(&Cuda::on(&turn.device, DType::F32).unwrap(), &small());
        let method: Reduction = "evit:keep=0.6,layers=0/1".parse().unwrap();
        let engine = Arc::new(Mutex::new(Engine::new(&vit, &method, 1, PixelType::U8).unwrap()));
        let threads: Vec<_> = (0..4)
            .map(|seed| {
                let (engine, images) = (engine.clone(), pictures(vit.config(), 1, seed));
                std::thread::spawn(move || {
                    let results = |_| of_run(&engine.lock().unwrap().run(&images).unwrap());
                    let [a, b] = [0, 1].map(results);
                    assert_eq!(a, b);
                    a
                })
            })
            .collect();
        for (seed, thread) in threads.into_iter().enumerate() {
            let images = pictures(vit.config(), 1, seed);
            assert_eq!(
                thread.join().unwrap(),
                of_output(vit.backend(), &vit.forward(&images, &method).unwrap())
            );
        }
        // Dropped by another thread than the one that made it.
        let engine = Arc::into_inner(engine).unwrap();
        std::thread::spawn(move || drop(engine)).join().unwrap();
    });
}

/// What a method does that an engine must look after.
enum Habit {
    /// It reads from the device while it decides.
    Reads,
    /// It uploads what was decided before.
    Uploads(Vec<(usize, TokenPlan)>),
    /// It takes other memory than before from its fifth decision on. Each pass has three.
    Changes(Mutex<i32>),
}

struct Unusual {
    tome: Reduction,
    habit: Habit,
}

impl Method for Unusual {
    fn check(&self, host: &Host) -> Result<()> {
        self.tome.check(host)
    }

    fn step(&self, layer: usize, tokens: usize, host: &Host) -> Option<Step> {
        self.tome.step(layer, tokens, host)
    }

    fn proportional_attention(&self) -> bool {
        true
    }

    fn plan<B: Backend>(&self, backend: &B, evidence: &Evidence<'_, B>) -> Result<B::Plan> {
        match &self.habit {
            Habit::Uploads(plans) => {
                let plan = plans.iter().find(|(layer, _)| *layer == evidence.layer);
                backend.upload_plan(plan.unwrap().1.clone())
            }
            Habit::Reads => {
                let plan = self.tome.plan(backend, evidence)?;
                backend.download_plan(&plan)?;
                Ok(plan)
            }
            Habit::Changes(decisions) => {
                let mut decisions = decisions.lock().unwrap();
                *decisions += 1;
                if *decisions >= 5 {
                    backend.tokens(evidence.tokens, 0..1)?;
                }
                self.tome.plan(backend, evidence)
            }
        }
    }
}

#[test]
fn engines_look_after_what_methods_do() {
    on_device(|turn| {
        let vit = model(&Cuda::on(&turn.device, DType::F16).unwrap(), &small());
        let tome: Reduction = "tome:r=3".parse().unwrap();
        let unusual = |habit| Unusual { tome: tome.clone(), habit };
        let refused = |habit| Engine::new(&vit, &unusual(habit), 3, PixelType::U8).unwrap_err().to_string();
        let message = refused(Habit::Reads);
        assert!(message.contains("an engine's forward pass stays on the device"), "{message}");
        let message = refused(Habit::Changes(Mutex::new(0)));
        assert!(message.contains("other memory than in its dry pass"), "{message}");
        // In the dry and the eager pass as it should be, in the captured one not.
        let message = refused(Habit::Changes(Mutex::new(-3)));
        assert!(message.contains("other memory than in its dry pass"), "{message}");
        let images = pictures(vit.config(), 3, 1);
        let known = of_output(vit.backend(), &vit.forward(&images, &tome).unwrap());
        check(&vit, &unusual(Habit::Uploads(known.plans)), "plans of the host");
    });
}

/// A failure at each allocation in turn, until none is left to fail: an error that says what it is, nothing lost, and all
/// usable afterwards.
fn fail_everywhere(turn: &Turn, what: &str, work: impl Fn() -> Result<Tensor>) {
    const PAIRS: [(&str, &str); 5] = [
        ("cuMemAllocAsync", "cuMemFreeAsync"),
        ("cuMemHostAlloc", "cuMemFreeHost"),
        ("cuStreamCreate", "cuStreamDestroy_v2"),
        ("cuEventCreate", "cuEventDestroy_v2"),
        ("cuGraphInstantiateWithFlags", "cuGraphExecDestroy"),
    ];
    let want = work().unwrap();
    let free = || turn.device.context().mem_get_info().unwrap().0;
    let before = free();
    for after in 0.. {
        emulator::log_calls();
        emulator::fail_allocation(Some(after));
        let outcome = work();
        let pending = emulator::fail_allocation(None);
        let calls = emulator::calls();
        let mut count: HashMap<&str, i32> = HashMap::new();
        calls.iter().for_each(|call| *count.entry(call).or_default() += 1);
        // The one that failed gave nothing to give back.
        let takes = |call: &&String| PAIRS.iter().any(|(take, _)| take == call);
        if let Some(failed) = calls.iter().filter(takes).nth(after as usize).filter(|_| !pending) {
            *count.entry(failed).or_default() -= 1;
        }
        for (take, give) in PAIRS {
            let [taken, given] = [take, give].map(|call| count.get(call).copied().unwrap_or(0));
            assert_eq!(taken, given, "{what}, failure {after}: {take}");
        }
        assert_eq!(free(), before, "{what}, failure {after}: memory is lost");
        match outcome {
            Ok(got) => assert_eq!(got, want, "{what}, failure {after}"),
            Err(Error::OutOfMemory { .. }) => assert!(!pending),
            Err(error) => panic!("{what}, failure {after}: {error}"),
        }
        if pending {
            println!("{what}: {after} allocations, each has failed once");
            assert!(after > 5);
            break;
        }
    }
    assert_eq!(work().unwrap(), want, "{what}: usable afterwards");
}

#[test]
fn failing_allocations_lose_nothing() {
    on_device(|turn| {
        let config = VitConfig { depth: 1, ..small() };
        let cuda = Cuda::on(&turn.device, DType::F32).unwrap();
        let vit = model(&cuda, &config);
        let images = pictures(&config, 1, 1);
        let method: Reduction = "tome:r=3".parse().unwrap();
        fail_everywhere(turn, "eager", || {
            let output = vit.forward(&images, &method)?;
            cuda.download(output.logits.as_ref().unwrap())
        });
        fail_everywhere(turn, "engine", || {
            let mut engine = Engine::new(&vit, &method, 1, PixelType::U8)?;
            let run = engine.run(&images)?;
            Ok(run.logits()?.unwrap())
        });
        fail_everywhere(turn, "backend and model", || {
            let cuda = Cuda::on(&turn.device, DType::F32)?;
            let vit = Vit::new(cuda.clone(), config.clone(), params(&config))?;
            cuda.download(vit.forward(&images, &method)?.logits.as_ref().unwrap())
        });
    });
}

/// Out of memory names the batch that fits, and it does.
#[test]
fn running_out_of_memory_names_what_fits() {
    on_device(|turn| {
        let vit = model(&Cuda::on(&turn.device, DType::F32).unwrap(), &small());
        let method: Reduction = "tome:r=3".parse().unwrap();
        let used = 8_usize << 30;
        let live = used - turn.device.context().mem_get_info().unwrap().0;
        let room = Forecast::new(&vit, &method, 12, PixelType::U8).unwrap().arena_bytes();
        let limit = std::ffi::CString::new((live + room).to_string()).unwrap();
        emulator::set(c"EMU_MEM_LIMIT", &limit);
        let error = Engine::new(&vit, &method, 500, PixelType::U8).unwrap_err();
        let most = Forecast::largest_batch(&vit, &method, PixelType::U8, room).unwrap();
        let made = Engine::new(&vit, &method, most, PixelType::U8).map(|engine| engine.batch());
        let more = Engine::new(&vit, &method, most + 1, PixelType::U8).map(|engine| engine.batch());
        emulator::set(c"EMU_MEM_LIMIT", c"");
        let message = error.to_string();
        assert!(matches!(error, Error::OutOfMemory { .. }), "{message}");
        assert!(message.contains(&format!("a batch of {most} images would fit")), "{message}");
        assert!((12..15).contains(&most), "{most}");
        assert_eq!(made.unwrap(), most);
        assert!(more.is_err());
        check(&vit, &method, "afterwards");
    });
}

/// So it does without an engine, where a pass takes its memory piece by piece.
#[test]
fn an_eager_pass_without_memory_names_what_fits() {
    on_device(|turn| {
        let vit = model(&Cuda::on(&turn.device, DType::F32).unwrap(), &small());
        let method: Reduction = "tome:r=3".parse().unwrap();
        let room = Forecast::new(&vit, &method, 12, PixelType::U8).unwrap().arena_bytes();
        let images = pictures(vit.config(), 200, 1);
        let live = (8_usize << 30) - turn.device.context().mem_get_info().unwrap().0;
        let limit = std::ffi::CString::new((live + room).to_string()).unwrap();
        emulator::set(c"EMU_MEM_LIMIT", &limit);
        let error = vit.forward(&images, &method).map(drop).unwrap_err();
        let message = error.to_string();
        let most = message.split("a batch of ").nth(1).and_then(|rest| rest.split(' ').next());
        let most: usize = most.and_then(|most| most.parse().ok()).unwrap_or_else(|| panic!("{message}"));
        let fits = vit.forward(&pictures(vit.config(), most, 1), &method).map(drop);
        let more = vit.forward(&pictures(vit.config(), most + most / 2, 1), &method).map(drop);
        emulator::set(c"EMU_MEM_LIMIT", c"");
        assert!(matches!(error, Error::OutOfMemory { .. }), "{message}");
        assert!(message.contains("a pass over 200 images") && most > 0, "{message}");
        assert!(matches!(error, Error::OutOfMemory { fits: Some(named), .. } if named == most));
        fits.unwrap();
        assert!(more.is_err(), "{most} images, and half as many again fit");
        check(&vit, &method, "afterwards");
    });
}

#[test]
fn images_must_be_the_engines() {
    on_device(|turn| {
        let vit = model(&Cuda::on(&turn.device, DType::F32).unwrap(), &small());
        let mut engine = Engine::new(&vit, &Reduction::None, 2, PixelType::F32).unwrap();
        let values = |count: usize| Pixels::F32((0..count).map(|at| (at as f32 * 0.1).sin()).collect());
        let images = |shape: [usize; 4]| Images::new(shape, values(shape.iter().product())).unwrap();
        let refused =
            |engine: &mut Engine, images: &Images| engine.run(images).map(|_| ()).unwrap_err().to_string();
        let message = refused(&mut engine, &images([3, 3, 32, 32]));
        assert!(message.contains("3 images, the engine was made for 2"), "{message}");
        let message = refused(&mut engine, &images([1, 3, 24, 32]));
        assert!(message.contains("24x32 with 3 channels, the model takes 32x32"), "{message}");
        let message = refused(&mut engine, &pictures(vit.config(), 1, 1));
        assert!(message.contains("pixels of type F32"), "{message}");
        let message = Engine::new(&vit, &Reduction::None, 0, PixelType::U8).unwrap_err().to_string();
        assert!(message.contains("0 images are no batch"), "{message}");
        let floats = images([2, 3, 32, 32]);
        let want = of_output(vit.backend(), &vit.forward(&floats, &Reduction::None).unwrap());
        assert_eq!(of_run(&engine.run(&floats).unwrap()), want);
    });
}

/// Batches that follow each other over a second stream are those that are run alone, and memory does not grow.
#[test]
fn batches_in_a_stream() {
    on_device(|turn| {
        let vit = model(&Cuda::on(&turn.device, DType::F16).unwrap(), &small());
        let mut engine =
            Engine::new(&vit, &"tome:r=3".parse::<Reduction>().unwrap(), 2, PixelType::U8).unwrap();
        let batches: Vec<Images> =
            (0..5).map(|seed| pictures(vit.config(), 2 - seed % 2, 3 * seed)).collect();
        let want: Vec<Results> = batches.iter().map(|images| of_run(&engine.run(images).unwrap())).collect();
        let (mut got, mut free) = (Vec::new(), Vec::new());
        let each = |batch: usize, run: &Run<'_>| {
            assert_eq!(batch, got.len());
            got.push(of_run(run));
            free.push(turn.device.context().mem_get_info().unwrap().0);
            Ok(())
        };
        engine.stream_batches(batches.iter().cloned().map(Ok), each).unwrap();
        assert_eq!(got, want);
        assert!(free.iter().all(|&now| now == free[0]), "{free:?}");
        // Nothing to do, a batch that cannot be had, a result that is not wanted: all leave the engine usable.
        engine.stream_batches(Vec::new(), |_, _| unreachable!()).unwrap();
        let broken = || Error::argument("decoder", "a broken image");
        let some = [Ok(batches[0].clone()), Err(broken()), Ok(batches[1].clone())];
        assert!(engine.stream_batches(some, |_, _| Ok(())).is_err());
        let mut seen = 0;
        let all = batches.iter().cloned().map(Ok);
        let stopped = engine.stream_batches(all, |batch, _| {
            seen += 1;
            if batch == 1 { Err(broken()) } else { Ok(()) }
        });
        assert!(stopped.is_err() && seen == 2);
        assert_eq!(of_run(&engine.run(&batches[0]).unwrap()), want[0]);
    });
}

/// The operations of read-outs against the reference's, in widths that no 16-byte access fits.
#[test]
fn operations_of_read_outs() {
    on_device(|turn| {
        for dtype in [DType::F32, DType::F16, DType::Bf16] {
            let cuda = Cuda::on(&turn.device, dtype).unwrap();
            // Small whole numbers and halves: exact in every type, and so are their means.
            let tensor = |shape: [usize; 2], seed: usize| {
                let value = |at: usize| ((at * 7 + seed) % 33) as f32 - 16.0;
                Tensor::new(&shape, (0..shape[0] * shape[1]).map(value).collect()).unwrap()
            };
            for (batch, left, right) in [(1, 1, 1), (3, 5, 2), (2, 64, 64), (4, 8, 3)] {
                let (a, b) = (tensor([batch, left], 1), tensor([batch, right], 2));
                let up = |tensor: &Tensor| cuda.upload(tensor.clone()).unwrap();
                let got = cuda.concat(&up(&a), &up(&b)).unwrap();
                assert_eq!(cuda.download(&got).unwrap(), Reference::new().concat(&a, &b).unwrap());
                let c = tensor([batch, left], 9);
                let got = cuda.average(&up(&a), &up(&c)).unwrap();
                assert_eq!(cuda.download(&got).unwrap(), Reference::new().average(&a, &c).unwrap());
                let exact = cuda.upload_f32(a.clone()).unwrap();
                for sizes in [None, Some(())] {
                    let got = cuda.hidden_sizes(sizes.map(|()| &exact), [batch, left], right).unwrap();
                    let want =
                        Reference::new().hidden_sizes(sizes.map(|()| &a), [batch, left], right).unwrap();
                    assert_eq!((got.dtype(), cuda.download(&got).unwrap()), (DType::F32, want));
                }
                if left != right {
                    let message = cuda.average(&up(&a), &up(&b)).unwrap_err().to_string();
                    assert!(message.contains("average: b has shape"), "{message}");
                }
            }
        }
    });
}
