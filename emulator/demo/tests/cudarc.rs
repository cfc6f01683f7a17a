//! A program as users write it: unchanged cudarc loads this package's `libcuda.so` and `libcublasLt.so`, and launches what
//! nvcc made. The whole file runs three times: as it is, without memory pools, and with blocks and warps in reverse order.

#[path = "../../tests/cuda/mod.rs"]
mod sources;

use std::{
    env,
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use cudarc::{
    cublaslt::{Activation, CudaBlasLT, Matmul, MatmulConfig},
    driver::{
        CudaContext, CudaFunction, CudaSlice, CudaStream, DriverError, LaunchConfig, PushKernelArg,
        sys::{self, CUevent_flags, CUgraphInstantiate_flags, CUresult, CUstreamCaptureMode},
    },
    nvrtc::Ptx,
};
use half::f16;

/// The tests share one device, and each wants to know that it caused no report.
static DEVICE: Mutex<()> = Mutex::new(());

/// One test's turn at the device. At its end the context must be without errors and the emulator without reports.
struct Turn {
    context: Arc<CudaContext>,
    _guard: MutexGuard<'static, ()>,
}

impl Turn {
    fn new() -> Self {
        let guard = DEVICE.lock().unwrap_or_else(PoisonError::into_inner);
        // Those of a test that failed are that test's.
        clear_reports();
        Self { context: CudaContext::new(0).unwrap(), _guard: guard }
    }

    fn end(self) {
        self.context.synchronize().unwrap();
        self.context.check_err().unwrap();
        assert_eq!(reports(), Vec::<String>::new());
    }
}

/// The reports of the loaded library.
fn reports() -> Vec<String> {
    // SAFETY: these are the signatures of the emulator's own exports, and it is the loaded library: no other has them.
    unsafe {
        let library = sys::culib();
        let count = library.get::<unsafe extern "C" fn() -> usize>(b"emu_errors\0").unwrap();
        let text = library
            .get::<unsafe extern "C" fn(usize, *mut u8, usize) -> usize>(b"emu_error_text\0")
            .expect("the emulated driver");
        (0..count())
            .map(|i| {
                let mut buffer = vec![0; 1 << 16];
                text(i, buffer.as_mut_ptr(), buffer.len());
                let end = buffer.iter().position(|&byte| byte == 0).unwrap_or(buffer.len());
                String::from_utf8(buffer[..end].to_vec()).unwrap()
            })
            .collect()
    }
}

fn clear_reports() {
    // SAFETY: as in `reports`.
    unsafe { sys::culib().get::<unsafe extern "C" fn()>(b"emu_clear_errors\0").unwrap()() };
}

fn kernel(context: &Arc<CudaContext>, file: &str, name: &str) -> CudaFunction {
    let module = context.load_module(Ptx::from_src(sources::ptx(file))).unwrap();
    module.load_function(name).unwrap()
}

fn blocks(count: usize, block: u32) -> LaunchConfig {
    LaunchConfig {
        grid_dim: ((count as u32).div_ceil(block), 1, 1),
        block_dim: (block, 1, 1),
        shared_mem_bytes: 0,
    }
}

fn add(
    stream: &Arc<CudaStream>,
    function: &CudaFunction,
    a: &CudaSlice<f32>,
    b: &CudaSlice<f32>,
    out: &mut CudaSlice<f32>,
) -> Result<(), DriverError> {
    let count = out.len() as i32;
    let config = blocks(out.len(), 128);
    // SAFETY: the kernel's parameters, with three buffers of `count` values where the caller passes equal lengths.
    unsafe { stream.launch_builder(function).arg(a).arg(b).arg(out).arg(&count).launch(config) }.map(|_| ())
}

/// Small whole numbers that differ from place to place: sums of products of them are exact.
fn numbers(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed * 13 + i / 11) % 17) as f32 - 8.0).collect()
}

#[test]
fn the_library_is_the_emulator_and_the_device_is_described() {
    let turn = Turn::new();
    assert_eq!(CudaContext::device_count().unwrap(), 1);
    assert_eq!(turn.context.compute_capability().unwrap(), (8, 0));
    println!("device: {}", turn.context.name().unwrap());
    let pools = env::var("EMU_POOLS").as_deref() != Ok("0");
    assert_eq!(turn.context.has_async_alloc(), pools);
    let (free, total) = turn.context.mem_get_info().unwrap();
    assert!(free <= total && total > 0);
    assert!(CudaContext::new(1).is_err());
    turn.end();
}

#[test]
fn a_vector_addition() {
    let turn = Turn::new();
    let stream = turn.context.default_stream();
    let function = kernel(&turn.context, "vector_add", "vector_add");
    for count in [1, 31, 128, 1000] {
        let (a, b) = (numbers(count, 1), numbers(count, 2));
        let (device_a, device_b) = (stream.clone_htod(&a).unwrap(), stream.clone_htod(&b).unwrap());
        let mut out = stream.alloc_zeros::<f32>(count).unwrap();
        add(&stream, &function, &device_a, &device_b, &mut out).unwrap();
        let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        assert_eq!(stream.clone_dtoh(&out).unwrap(), expected);
    }
    assert!(turn.context.load_module(Ptx::from_src(".version 8.0 .target sm_80 .entry")).is_err());
    assert!(function.num_regs().unwrap() > 0);
    drop(function);
    // The module that failed to load was reported.
    assert_eq!(reports().len(), 1);
    clear_reports();
    turn.end();
}

/// What nvcc makes with `-fatbin`, its PTX stored or compressed; machine code alone cannot be run.
#[test]
fn fat_binaries() {
    let turn = Turn::new();
    let stream = turn.context.default_stream();
    let load = |name: &str| {
        let file = sources::folder().with_file_name("fatbins").join(name);
        turn.context.load_module(Ptx::from_binary(std::fs::read(file).unwrap()))
    };
    for name in ["stored.fatbin", "zstd.fatbin"] {
        let function = load(name).unwrap().load_function("twice").unwrap();
        let mut values = stream.clone_htod(&numbers(32, 1)).unwrap();
        let mut launch = stream.launch_builder(&function);
        launch.arg(&mut values);
        // SAFETY: the kernel's parameter, a buffer with a value for each of the threads.
        unsafe { launch.launch(blocks(32, 32)) }.unwrap();
        let expected: Vec<f32> = numbers(32, 1).into_iter().map(|value| 2.0 * value).collect();
        assert_eq!(stream.clone_dtoh(&values).unwrap(), expected, "{name}");
    }
    assert_eq!(load("elf.fatbin").unwrap_err().0, CUresult::CUDA_ERROR_INVALID_IMAGE);
    assert_eq!(reports().len(), 1, "why it cannot be loaded");
    clear_reports();
    turn.end();
}

#[test]
fn a_product_on_tensor_cores() {
    let turn = Turn::new();
    let stream = turn.context.new_stream().unwrap();
    let function = kernel(&turn.context, "gemm_tile", "gemm_tile");
    for (rows, columns, depth) in [(64, 64, 32), (16, 8, 16), (100, 70, 72), (1, 1, 8)] {
        let (a, b) = (numbers(rows * depth, 3), numbers(columns * depth, 4));
        let halves = |values: &[f32]| values.iter().map(|&value| f16::from_f32(value)).collect::<Vec<_>>();
        let device_a = stream.clone_htod(&halves(&a)).unwrap();
        let device_b = stream.clone_htod(&halves(&b)).unwrap();
        // SAFETY: the kernel writes every value.
        let mut out = unsafe { stream.alloc::<f32>(rows * columns) }.unwrap();
        let extents = [rows, columns, depth].map(|extent| extent as i32);
        let config = LaunchConfig {
            grid_dim: ((columns as u32).div_ceil(64), (rows as u32).div_ceil(64), 1),
            block_dim: (128, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut launch = stream.launch_builder(&function);
        launch.arg(&device_a).arg(&device_b).arg(&mut out).arg(&extents[0]).arg(&extents[1]).arg(&extents[2]);
        // SAFETY: the kernel's parameters, and buffers of the extents given.
        unsafe { launch.launch(config) }.unwrap();
        let found = stream.clone_dtoh(&out).unwrap();
        for row in 0..rows {
            for column in 0..columns {
                let sum: f32 = (0..depth).map(|k| a[row * depth + k] * b[column * depth + k]).sum();
                assert_eq!(
                    found[row * columns + column],
                    sum,
                    "{rows} x {columns} x {depth}: {row}, {column}"
                );
            }
        }
    }
    turn.end();
}

#[test]
fn a_reduction_and_a_histogram() {
    let turn = Turn::new();
    let stream = turn.context.default_stream();
    let function = kernel(&turn.context, "block_sum", "block_sum");
    let (count, part) = (1000usize, 300usize);
    let values = numbers(count, 5);
    let device_values = stream.clone_htod(&values).unwrap();
    for block in [32, 96, 256] {
        let mut sums = stream.alloc_zeros::<f32>(4).unwrap();
        let mut launch = stream.launch_builder(&function);
        let (device_count, device_part) = (count as i32, part as i32);
        launch.arg(&device_values).arg(&mut sums).arg(&device_count).arg(&device_part);
        let config = LaunchConfig { grid_dim: (4, 1, 1), block_dim: (block, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the kernel's parameters; four blocks of 300 values cover the buffer.
        unsafe { launch.launch(config) }.unwrap();
        let expected: Vec<f32> = values.chunks(part).map(|part| part.iter().sum()).collect();
        assert_eq!(stream.clone_dtoh(&sums).unwrap(), expected);
    }
    let function = kernel(&turn.context, "histogram", "histogram");
    let bytes: Vec<u8> = (0..5000u32).map(|i| (i * i % 251) as u8).collect();
    let device_bytes = stream.clone_htod(&bytes).unwrap();
    let mut bins = stream.alloc_zeros::<u32>(256).unwrap();
    let mut launch = stream.launch_builder(&function);
    let device_count = bytes.len() as i32;
    launch.arg(&device_bytes).arg(&mut bins).arg(&device_count);
    // SAFETY: the kernel's parameters; any grid will do.
    unsafe {
        launch.launch(LaunchConfig { grid_dim: (3, 1, 1), block_dim: (192, 1, 1), shared_mem_bytes: 0 })
    }
    .unwrap();
    let mut expected = vec![0; 256];
    bytes.iter().for_each(|&byte| expected[usize::from(byte)] += 1);
    assert_eq!(stream.clone_dtoh(&bins).unwrap(), expected);
    turn.end();
}

#[test]
fn a_captured_graph_replays_kernels_memsets_and_products() {
    let turn = Turn::new();
    let context = CudaContext::new(0).unwrap();
    // Events of buffers made before would be waited for inside the capture, which CUDA does not allow.
    // SAFETY: everything below happens on one stream.
    unsafe { context.disable_event_tracking() };
    let stream = context.new_stream().unwrap();
    let function = kernel(&context, "vector_add", "vector_add");
    let blas = CudaBlasLT::new(stream.clone()).unwrap();
    let a = stream.clone_htod(&[1.0f32, 2.0, 3.0, 4.0]).unwrap();
    let mut total = stream.clone_htod(&[10.0f32; 4]).unwrap();
    let mut sum = stream.clone_htod(&[7.0f32; 4]).unwrap();
    let mut square = stream.alloc_zeros::<f32>(4).unwrap();

    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    stream.memset_zeros(&mut sum).unwrap();
    add(&stream, &function, &a, &total, &mut sum).unwrap();
    stream.memcpy_dtod(&sum, &mut total).unwrap();
    let config = MatmulConfig { m: 2, n: 2, k: 2, lda: 2, ldb: 2, ldc: 2, ..plain() };
    // SAFETY: three matrices of 2 x 2.
    unsafe { blas.matmul(config, &total, &a, &mut square, None, None) }.unwrap();
    let graph = stream.end_capture(CUgraphInstantiate_flags(0)).unwrap().expect("a captured graph");
    let untouched = (stream.clone_dtoh(&sum).unwrap(), stream.clone_dtoh(&square).unwrap());
    assert_eq!(untouched, (vec![7.0; 4], vec![0.0; 4]), "capturing runs nothing");

    graph.upload().unwrap();
    for round in 1..=3u8 {
        graph.launch().unwrap();
        let expected = [1.0, 2.0, 3.0, 4.0].map(|value| 10.0 + f32::from(round) * value);
        assert_eq!(stream.clone_dtoh(&total).unwrap(), expected);
        let [t0, t1, t2, t3] = expected;
        // Columns one after the other: total times a.
        let product = [t0 + 2.0 * t2, t1 + 2.0 * t3, 3.0 * t0 + 4.0 * t2, 3.0 * t1 + 4.0 * t3];
        assert_eq!(stream.clone_dtoh(&square).unwrap(), product);
    }
    drop((graph, blas, a, total, sum, square));
    context.check_err().unwrap();
    turn.end();
}

fn plain() -> MatmulConfig {
    MatmulConfig {
        transa: false,
        transb: false,
        transc: false,
        m: 1,
        n: 1,
        k: 1,
        alpha: 1.0,
        lda: 1,
        ldb: 1,
        beta: 0.0,
        ldc: 1,
        stride_a: None,
        stride_b: None,
        stride_c: None,
        stride_bias: None,
        batch_size: None,
    }
}

#[test]
fn two_streams_with_events() {
    let turn = Turn::new();
    let (first, second) = (turn.context.new_stream().unwrap(), turn.context.new_stream().unwrap());
    let function = kernel(&turn.context, "vector_add", "vector_add");
    let values = numbers(512, 6);
    let a = first.clone_htod(&values).unwrap();
    let b = second.clone_htod(&values).unwrap();
    let mut sum = first.alloc_zeros::<f32>(512).unwrap();
    let mut twice = second.alloc_zeros::<f32>(512).unwrap();
    let start = first.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    add(&first, &function, &a, &b, &mut sum).unwrap();
    let end = first.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    second.wait(&end).unwrap();
    add(&second, &function, &sum, &sum, &mut twice).unwrap();
    let expected: Vec<f32> = values.iter().map(|value| 4.0 * value).collect();
    assert_eq!(second.clone_dtoh(&twice).unwrap(), expected);
    assert!(start.elapsed_ms(&end).unwrap() > 0.0, "a modelled time");
    let untimed = first.record_event(None).unwrap();
    assert_eq!(start.elapsed_ms(&untimed).unwrap_err().0, CUresult::CUDA_ERROR_INVALID_HANDLE);
    first.join(&second).unwrap();
    first.synchronize().unwrap();
    assert!(end.try_is_complete().unwrap());
    drop((a, b, sum, twice, start, end, untimed, first, second));
    turn.end();
}

/// What cublasLt's bias and GELU do in one pass: D = gelu(A·B + bias), with the tanh form.
#[test]
fn a_product_with_bias_and_gelu() {
    let turn = Turn::new();
    let stream = turn.context.default_stream();
    let blas = CudaBlasLT::new(stream.clone()).unwrap();
    // Weights (m, k) and inputs (n, k), row-major, as a linear layer has them: out (n, m) row-major.
    let (m, n, k, batch) = (24usize, 10usize, 40usize, 3usize);
    let small = |count, seed| -> Vec<f16> {
        numbers(count, seed).into_iter().map(|value| f16::from_f32(value / 32.0)).collect()
    };
    let (weights, inputs, bias) = (small(m * k, 7), small(batch * n * k, 8), small(m, 9));
    let device_weights = stream.clone_htod(&weights).unwrap();
    let device_inputs = stream.clone_htod(&inputs).unwrap();
    let device_bias = stream.clone_htod(&bias).unwrap();
    let mut out = stream.alloc_zeros::<f16>(batch * n * m).unwrap();
    let config = MatmulConfig {
        transa: true,
        m: m as u64,
        n: n as u64,
        k: k as u64,
        lda: k as i64,
        ldb: k as i64,
        ldc: m as i64,
        stride_a: Some(0),
        stride_b: Some((n * k) as i64),
        stride_c: Some((n * m) as i64),
        batch_size: Some(batch as i32),
        ..plain()
    };
    // SAFETY: buffers of the extents in `config`.
    unsafe {
        blas.matmul(
            config,
            &device_weights,
            &device_inputs,
            &mut out,
            Some(&device_bias),
            Some(&Activation::Gelu),
        )
    }
    .unwrap();
    let found = stream.clone_dtoh(&out).unwrap();
    let gelu =
        |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3))).tanh());
    for line in 0..batch * n {
        for column in 0..m {
            let products = (0..k).map(|i| weights[column * k + i].to_f64() * inputs[line * k + i].to_f64());
            let expected = gelu(products.sum::<f64>() + bias[column].to_f64());
            // The sums are exact in f32; GELU's arithmetic is within 8 units of f32, and the result is rounded to f16.
            let tolerance = expected.abs() * (2f64.powi(-11) + 8.0 * 2f64.powi(-24)) + 2f64.powi(-24);
            let found = found[line * m + column].to_f64();
            assert!((found - expected).abs() <= tolerance, "{line}, {column}: {found}, expected {expected}");
        }
    }
    drop((blas, device_weights, device_inputs, device_bias, out));
    turn.end();
}

/// Runs all of this file again, in a process with another setting.
fn again(variable: &str, value: &str) {
    if env::var_os(SECOND).is_some() {
        return;
    }
    let mut command = Command::new(env::current_exe().unwrap());
    let output = command.env(SECOND, "1").env(variable, value).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("test a_vector_addition ... ok"), "{text}");
}

/// Keeps a second process from starting a third.
const SECOND: &str = "EMULATOR_TEST_SECOND";

/// On a device without memory pools cudarc allocates and frees on another path.
#[test]
fn all_of_it_without_memory_pools() {
    again("EMU_POOLS", "0");
}

#[test]
fn all_of_it_with_blocks_and_warps_in_reverse_order() {
    again("EMU_ORDER", "reverse");
}

/// Tells a second process to commit the fault below.
const FAULT: &str = "EMULATOR_TEST_FAULT";

/// A kernel that reads behind its buffer: the launch succeeds, the next call fails, and the report says where it was. In
/// a process of its own, as such an error stays until the end.
#[test]
fn an_invalid_read_is_reported() {
    if env::var_os(FAULT).is_some() {
        let context = CudaContext::new(0).unwrap();
        let stream = context.default_stream();
        let function = kernel(&context, "vector_add", "vector_add");
        let a = stream.clone_htod(&[1.0f32; 100]).unwrap();
        let short = stream.clone_htod(&[1.0f32; 99]).unwrap();
        let mut out = stream.alloc_zeros::<f32>(100).unwrap();
        let result = add(&stream, &function, &a, &short, &mut out).and_then(|()| stream.synchronize());
        assert_eq!(result.unwrap_err().0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS);
        assert_eq!(context.synchronize().unwrap_err().0, CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, "it stays");
        let reports = reports();
        assert_eq!(reports.len(), 1, "{reports:?}");
        for part in
            ["Invalid", "read of size 4", "vector_add", "vector_add.cu:7", "thread (99,0,0) in block (0,0,0)"]
        {
            assert!(reports[0].contains(part), "{part} in:\n{}", reports[0]);
        }
        return;
    }
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", "an_invalid_read_is_reported", "--nocapture"])
        .env(FAULT, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    assert!(text.contains("========= Invalid"), "the report is on the standard error:\n{text}");
}
