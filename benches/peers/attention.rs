//! Attention beside candle-flash-attn's, on a GPU: f16 and bf16, 64 values a head, the shapes of the bench `attention`.
//!
//!     cargo bench --manifest-path benches/peers/Cargo.toml --target-dir target/peers
//!
//! Both read the same packed rows, on one stream, 32 launches in a graph, at as many copies of the tensors
//! (`benches/launches/timing.rs`). Before they are timed they must agree on two images. Criterion times one after the
//! other; the ratio that is printed then is of turns that alternate.
//!
//! What differs: each call of `flash_attn` takes its output and the logarithms of its sums from the stream's pool, clears
//! the latter and writes them. All of that is in the graph and in its time. Ours writes to tensors that are there.
//!
//! **Type-checked only.** candle-flash-attn's kernels (CUTLASS) were never compiled for this, it was never linked, and it has
//! neither run nor timed anything.

#[path = "../gpu/mod.rs"]
#[allow(dead_code, reason = "what was counted belongs to the benches of foveate alone")]
mod gpu;

use std::error::Error;

use candle_core::{CudaDevice, Device, Tensor, WithDType};
use candle_flash_attn::flash_attn;
use criterion::BenchmarkId;
use foveate::cuda::{
    DType, Strided,
    attention::{Attention, Scores, Split, attention},
};
use gpu::{
    Bench,
    launches::{self, Case, Launch, Place, Shape, Value, Work, host_values, timing::Timer},
};
use half::{bf16, f16};

const PEER: &str = "candle-flash-attn";

/// Pairs of turns that a ratio comes from.
const TURNS: usize = 31;
/// Seconds of a turn, about: many times the clock's resolution.
const TURN: f64 = 5e-3;

fn main() {
    match open() {
        Ok((place, device)) => time(&place, &device),
        Err(reason) => println!("attention beside {PEER}: no GPU was timed: {reason}"),
    }
}

/// The device as both know it, and one stream for both.
fn open() -> Result<(Place, Device), String> {
    let place = gpu::place()?;
    let device = CudaDevice::new_with_stream(0).map_err(|error| error.to_string())?;
    // SAFETY: everything that is allocated from here on is used on this device's one stream, ours too.
    unsafe { device.disable_event_tracking() };
    Ok((Place { stream: device.cuda_stream(), ..place }, Device::Cuda(device)))
}

fn time(place: &Place, device: &Device) {
    let mut bench = Bench::new("attention", place);
    for case in launches::timed("attention") {
        if case.operation.name != "attention" {
            continue;
        }
        let compared = match case.dtype {
            DType::F16 => compare::<f16>(&mut bench, place, device, &case, f16::EPSILON.to_f64()),
            DType::Bf16 => compare::<bf16>(&mut bench, place, device, &case, bf16::EPSILON.to_f64()),
            // The peer has no f32.
            DType::F32 => Ok(()),
        };
        if let Err(reason) = compared {
            println!("{case}: not compared: {reason}");
        }
    }
    bench.finish();
}

/// Times both, and prints the ratio unless the command line left one of them out.
fn compare<T: Value + WithDType>(
    bench: &mut Bench,
    place: &Place,
    device: &Device,
    case: &Case,
    epsilon: f64,
) -> Result<(), Box<dyn Error>> {
    check_agreement::<T>(place, device, Shape { batch: 2, ..case.shape }, epsilon)?;
    let ours = Timer::new(place, case, &bench.peak)?;
    let work = ours.work;
    let theirs = Timer::of(place, &bench.peak, || flash::<T>(device, case.shape, work))?;
    let id = |who: &str| BenchmarkId::new(format!("{}/{}", case.shape, case.dtype), who);
    let timed = bench.time("attention", id("foveate"), &ours);
    if !(bench.time("attention", id(PEER), &theirs) && timed) {
        return Ok(());
    }
    let ratios = ratios(&theirs, &ours)?;
    println!(
        "{case}: {PEER} takes {:.3} times as long as foveate ({:.3} to {:.3} in the middle half of {TURNS} turns)",
        ratios[TURNS / 2],
        ratios[TURNS / 4],
        ratios[TURNS - 1 - TURNS / 4]
    );
    Ok(())
}

/// The times of the first over those of the second, in alternate turns, ascending.
fn ratios(first: &Timer, second: &Timer) -> foveate::Result<Vec<f64>> {
    let one = second.seconds(32)? / 32.0;
    let count = (TURN / one).max(32.0) as u64;
    let mut ratios = Vec::with_capacity(TURNS);
    for _ in 0..TURNS {
        ratios.push(first.seconds(count)? / second.seconds(count)?);
    }
    ratios.sort_by(f64::total_cmp);
    Ok(ratios)
}

fn scale(shape: Shape) -> f32 {
    1.0 / ((shape.width / shape.heads) as f32).sqrt()
}

fn packed_len(shape: Shape) -> usize {
    shape.batch * shape.tokens * 3 * shape.width
}

/// Queries, keys and values (B, N, H, D): views of packed rows, as ours are.
fn parts<T: Value + WithDType>(device: &Device, shape: Shape) -> candle_core::Result<[Tensor; 3]> {
    let Shape { batch, tokens, width, heads } = shape;
    let rows = host_values::<T>(packed_len(shape), 1);
    let packed = Tensor::from_vec(rows, (batch, tokens, 3, heads, width / heads), device)?;
    let part = |part| packed.narrow(2, part, 1)?.squeeze(2);
    Ok([part(0)?, part(1)?, part(2)?])
}

fn flash<T: Value + WithDType>(device: &Device, shape: Shape, work: Work) -> foveate::Result<Launch> {
    let failed = |error: candle_core::Error| foveate::Error::Driver { action: PEER, what: error.to_string() };
    let [q, k, v] = parts::<T>(device, shape).map_err(failed)?;
    Ok(Launch::new(work, move || flash_attn(&q, &k, &v, scale(shape), false).map(drop).map_err(failed)))
}

/// Two kernels that compute different things are not to be compared: all outputs must be the same to `2·epsilon` of the
/// largest, some times what rounding probabilities and outputs to the type makes.
fn check_agreement<T: Value + WithDType>(
    place: &Place,
    device: &Device,
    shape: Shape,
    epsilon: f64,
) -> Result<(), Box<dyn Error>> {
    let Shape { batch, tokens, width, heads } = shape;
    let [q, k, v] = parts::<T>(device, shape)?;
    let theirs = flash_attn(&q, &k, &v, scale(shape), false)?.flatten_all()?.to_vec1::<T>()?;

    let rows = place.stream.clone_htod(&host_values::<T>(packed_len(shape), 1))?;
    let mut out = place.stream.alloc_zeros::<T>(batch * tokens * width)?;
    let part = |part: usize| {
        Strided::new(rows.slice(part * width..), [batch, tokens, width])
            .with_strides([tokens * 3 * width, 3 * width])
    };
    let call =
        Attention { q: part(0), k: part(1), heads, scale: scale(shape), sizes: None, split: Split::Auto };
    let mut view = Strided::new(out.as_view_mut(), [batch, tokens, width]);
    attention(&place.device, &place.stream, &call, &part(2), &mut view, &mut Scores::default())?;
    let ours = place.stream.clone_dtoh(&out)?;

    let largest = ours.iter().map(|x| x.to_f64().abs()).fold(0.0, f64::max);
    let limit = 2.0 * epsilon * largest;
    let apart = |(a, b): (&T, &T)| (a.to_f64() - b.to_f64()).abs();
    // A NaN is within no limit.
    if largest > 0.0 && ours.iter().zip(&theirs).all(|pair| apart(pair) <= limit) {
        return Ok(());
    }
    let most = ours.iter().zip(&theirs).map(apart).fold(0.0, f64::max);
    Err(format!("the outputs differ by {most:.3e} where {limit:.3e} is allowed, or are not numbers").into())
}
