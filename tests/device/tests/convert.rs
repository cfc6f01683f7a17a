//! kernels/convert.cu: values in another storage type, rounded as `half` rounds.
#![cfg(feature = "cuda")]

use cudarc::driver::CudaSlice;
use foveate::cuda::convert::convert;
use foveate_device_tests::{Turn, Value, bits, random, rounded};
use half::{bf16, f16};
use proptest::prelude::*;

/// On the device, between values that must stay as they are.
fn converted<T: Value, O: Value>(turn: &Turn, values: &[f32]) -> Vec<f32> {
    let n = values.len();
    let x: CudaSlice<T> = turn.upload(values);
    let mut out: CudaSlice<O> = turn.upload(&vec![7.0; n + 16]);
    convert(&turn.device, &turn.stream, &x.as_view(), &mut out.slice_mut(8..n + 8)).unwrap();
    let all = turn.download(&out);
    assert!(all[..8].iter().chain(&all[n + 8..]).all(|&x| x == 7.0), "nothing beside is written");
    all[8..n + 8].to_vec()
}

fn check<T: Value, O: Value>(turn: &Turn, values: &[f32]) {
    let stored = rounded::<T>(values);
    let got = turn.in_every_order(|| bits(&converted::<T, O>(turn, &stored)));
    assert_eq!(got, bits(&rounded::<O>(&stored)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn values_are_rounded_to_nearest_even(
        count in prop_oneof![1_usize..40, 2040_usize..2060, Just(6000_usize)], seed in any::<u64>(),
        spread in prop::sample::select(vec![1e-7_f32, 1.0, 1e5]),
    ) {
        let Some(turn) = Turn::new() else { return Ok(()) };
        // 16 bytes are 8 halves.
        let mut values = random::<f32>(count, seed, spread);
        let odd = [f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 65504.0, 65519.9, 65520.0, 1.000_488_3, 6e-8, 1e-40];
        values.iter_mut().step_by(11).zip(odd).for_each(|(x, odd)| *x = odd);
        check::<f32, f16>(&turn, &values);
        check::<f32, bf16>(&turn, &values);
        check::<f16, f32>(&turn, &values);
        check::<bf16, f32>(&turn, &values);
        turn.end();
    }
}

#[test]
fn no_number_stays_none() {
    let Some(turn) = Turn::new() else { return };
    let x = vec![f32::NAN; 9];
    assert!(converted::<f32, f16>(&turn, &x).iter().all(|x| x.is_nan()));
    assert!(converted::<f32, bf16>(&turn, &x).iter().all(|x| x.is_nan()));
    assert!(converted::<f16, f32>(&turn, &x).iter().all(|x| x.is_nan()));
    turn.end();
}

#[test]
fn wrong_arguments_are_named() {
    let Some(turn) = Turn::new() else { return };
    let x: CudaSlice<f32> = turn.upload(&[0.0; 64]);
    let mut halves: CudaSlice<f16> = turn.upload(&[0.0; 64]);
    let mut singles: CudaSlice<f32> = turn.upload(&[0.0; 64]);
    let (device, stream) = (&turn.device, &turn.stream);
    let message = convert(device, stream, &x.as_view(), &mut singles.as_view_mut()).unwrap_err().to_string();
    assert!(message.contains("no kernel converts f32 to f32"), "{message}");
    let message = convert(device, stream, &x.slice(..9), &mut halves.as_view_mut()).unwrap_err().to_string();
    assert!(message.contains("out has 64 values, expected 9"), "{message}");
    let message =
        convert(device, stream, &x.slice(1..9), &mut halves.slice_mut(..8)).unwrap_err().to_string();
    assert!(message.contains("aligned to 16 bytes"), "{message}");
    turn.end();
}
