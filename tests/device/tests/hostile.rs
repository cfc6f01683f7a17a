//! Shapes of nothing, shapes that do not fit, numbers that are none: the CUDA backend answers them as the reference does, with a
//! result or an error, without a panic and without a finding of the emulator.
#![cfg(feature = "cuda")]

#[path = "../../hostile_parts/mod.rs"]
mod hostile_parts;

#[cfg(feature = "emulated")]
use foveate::{Error, cuda::Device};
use foveate::{
    cuda::{Cuda, DType},
    reference::Reference,
};
use foveate_device_tests::{Turn, mirror::Mirror};
use hostile_parts::{Draw, OPERATIONS, complaint, outcome};

/// Of each operation so many drawings.
const SEEDS: u64 = 96;

/// What the kernels say that they do not do, where the reference does.
const LIMITS: [&str; 6] = [
    // No launch of nothing.
    "every axis must hold 1 to 2^31 - 1",
    "into 0: nothing to do",
    "name one token at least",
    // Heads and their rows; activations of AFFNet's layers.
    "rows that do not begin at multiples of 16 bytes",
    "the f32 kernels take multiples of 8 up to 128",
    "silu, relu and gelu are supported",
];

#[test]
fn the_device_answers_as_the_reference_does() {
    let Some(turn) = Turn::new() else { return };
    let cuda = Mirror(Cuda::on(&turn.device, DType::F32).unwrap());
    let reference = Reference::with_threads(1).unwrap();
    let mut kinds = [[0; 3]; OPERATIONS.len()];
    let mut failures = Vec::new();
    for seed in 0..SEEDS {
        for (at, (name, operation)) in OPERATIONS.iter().enumerate() {
            let mut draw = Draw::new(seed * 31 + at as u64);
            // Tokens of one value resemble each other wholly or not at all: ties, which sums in another order decide otherwise.
            if ["attention", "matching", "cluster"].iter().any(|kind| name.starts_with(kind)) {
                draw = draw.with_heads_of_eights();
            }
            let odd = draw.is_odd();
            let run = operation(&mut draw);
            let (want, got) = (outcome(&run, &reference), outcome(&run, &cuda));
            let limit = match (&want, &got) {
                (Ok(Ok(_)), Ok(Err(error))) => {
                    let error = error.to_string();
                    LIMITS.iter().any(|limit| error.contains(limit))
                }
                // Two channels go through one complex transform: what is no number in one is none in the other.
                (Ok(Ok(_)), Ok(Ok(_))) => odd && *name == "frequency",
                _ => false,
            };
            let kind = if limit { 2 } else { usize::from(!matches!(want, Ok(Ok(_)))) };
            kinds[at][kind] += 1;
            let complaint = complaint(name, &want, &got).filter(|_| !limit);
            failures.extend(complaint.map(|what| format!("{name}, seed {seed}: {what}")));
        }
    }
    for ((name, _), [taken, refused, limited]) in OPERATIONS.iter().zip(kinds) {
        println!("{name}: {taken} taken, {refused} refused, {limited} beyond the kernels");
        assert!(taken >= 12 && refused >= 4, "{name}: {taken} and {refused} are too few to tell");
    }
    assert!(failures.is_empty(), "{} failures:\n{}", failures.len(), failures.join("\n"));
    drop(cuda);
    turn.end();
}

/// cudarc would panic at the first function that an old driver lacks.
#[cfg(feature = "emulated")]
#[test]
fn an_old_driver_is_an_error() {
    use foveate_device_tests::emulator;

    let Some(turn) = Turn::new() else { return };
    emulator::set(c"EMU_DRIVER", c"11.8");
    let error = Device::new(0).unwrap_err();
    emulator::set(c"EMU_DRIVER", c"");
    let message = error.to_string();
    assert!(matches!(error, Error::Driver { .. }), "{error:?}");
    assert!(message.contains("CUDA 11.8") && message.contains("CUDA 12.0 or newer"), "{message}");
    Device::new(0).unwrap();
    turn.end();
}
