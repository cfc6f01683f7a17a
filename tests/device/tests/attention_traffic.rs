//! What attention costs on DeiT-S's shape, by the emulator's counters.
#![cfg(feature = "emulated")]

use cudarc::driver::CudaSlice;
use foveate::cuda::{
    Strided,
    attention::{Attention, Scores, Split, attention},
};
use foveate_device_tests::{Turn, emulator, random};
use half::f16;
use serde_json::Value as Json;

const TOKENS: usize = 197;
const HEADS: usize = 6;
const DIM: usize = 64;
const WIDTH: usize = HEADS * DIM;

/// The least that tiles of 16 by 8 by 16 allow: for each of 13 tiles of queries 25 tiles of 8 keys, 4 steps deep, and 13 steps of 16
/// keys for 8 tiles of the output.
const PRODUCTS: f64 = (HEADS * 13 * (25 * 4 + 13 * 8)) as f64;

#[derive(Clone, Copy)]
struct Wanted {
    class: bool,
    received: bool,
    log_sum_exp: bool,
    split: Split,
}

const PLAIN: Wanted = Wanted { class: false, received: false, log_sum_exp: false, split: Split::Least };

/// The counters of one image's attention.
fn count(turn: &Turn, wanted: Wanted) -> Json {
    let packed: CudaSlice<f16> = turn.upload(&random::<f16>(TOKENS * 3 * WIDTH, 1, 1.0));
    let mut out: CudaSlice<f16> = turn.upload(&vec![0.0; TOKENS * WIDTH]);
    let mut room = [(); 3].map(|()| turn.upload::<f32>(&vec![0.0; HEADS * TOKENS]));
    let [class, received, lse] = &mut room;
    let view = |part: usize| {
        Strided::new(packed.slice(part * WIDTH..), [1, TOKENS, WIDTH])
            .with_strides([TOKENS * 3 * WIDTH, 3 * WIDTH])
    };
    let call =
        Attention { q: view(0), k: view(1), heads: HEADS, scale: 0.125, sizes: None, split: wanted.split };
    let mut scores = Scores {
        class_rows: wanted.class.then(|| (class.as_view_mut(), 1)),
        received: wanted.received.then(|| received.as_view_mut()),
        log_sum_exp: wanted.log_sum_exp.then(|| lse.as_view_mut()),
    };
    turn.stream.synchronize().unwrap();
    emulator::reset_counters();
    let mut target = Strided::new(out.as_view_mut(), [1, TOKENS, WIDTH]);
    attention(&turn.device, &turn.stream, &call, &view(2), &mut target, &mut scores).unwrap();
    turn.stream.synchronize().unwrap();
    let all: Vec<Json> = serde_json::from_str(&emulator::counters()).unwrap();
    let [one] = <[Json; 1]>::try_from(all).expect("one launch");
    one
}

fn number(json: &Json) -> f64 {
    json.as_f64().expect("a number")
}

#[test]
fn one_block_a_head_does_little_more_than_its_products() {
    let Some(turn) = Turn::new() else { return };
    let plain = count(&turn, PLAIN);
    let instructions = |json: &Json| number(&json["insts"]);
    let products = number(&plain["insts_by_class"]["mma"]);
    let per_product = instructions(&plain) / products;
    let more = |wanted: Wanted| instructions(&count(&turn, wanted)) / instructions(&plain) - 1.0;
    let class = more(Wanted { class: true, ..PLAIN });
    let received = more(Wanted { received: true, ..PLAIN });
    let lse = more(Wanted { log_sum_exp: true, ..PLAIN });
    let auto = instructions(&count(&turn, Wanted { split: Split::Auto, ..PLAIN })) / products;
    println!(
        "{products} products, {per_product:.3} warp instructions each; {:+.1} % with class rows, {:+.1} % with received attention, \
         {:+.1} % with logarithms of sums; {auto:.3} each when split over blocks for one image",
        100.0 * class,
        100.0 * received,
        100.0 * lse
    );
    assert!(products <= 1.05 * PRODUCTS, "{products} products, {PRODUCTS} are needed");
    assert!(per_product <= 7.0, "{per_product} instructions a product");
    assert!(class <= 0.03, "class rows cost {class}");
    assert!(received <= 0.40, "received attention costs {received}");

    assert_eq!(plain["shared"]["bank_conflicts"], 0, "{}", plain["bank_conflict_lines"]);
    for kind in ["cp_async", "st"] {
        let efficiency = number(&plain["global"][kind]["efficiency"]);
        assert!(efficiency >= 0.95, "{kind}: {efficiency} of the sectors' bytes are used");
    }
    // Queries, keys, values and the output, each once.
    let needed = (4 * TOKENS * WIDTH * 2) as f64;
    let moved = number(&plain["unique_bytes_read"]) + number(&plain["unique_bytes_written"]);
    let over = (32.0 * number(&plain["global"]["cp_async"]["sectors"])
        + number(&plain["unique_bytes_written"]))
        / needed;
    println!("{:.3} of the bytes it must move, {over:.3} counting every request", moved / needed);
    assert!(moved <= 1.05 * needed && over <= 1.05);
    turn.end();
}
