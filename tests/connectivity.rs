//! Drop and grow, checked by hand and by the specification's words.

use foveate::{
    Tensor,
    reference::connectivity::{
        HeadScores, drop_and_grow, drop_smallest, grow_largest, head_scores, neuron_scores, update_heads,
        update_neurons,
    },
};
use proptest::prelude::*;

/// The specification's pseudocode, word by word, over full sorts.
fn by_the_book(weight: &[f32], gradient: &[f32], mask: &[u8], rate: f64) -> (Vec<u8>, usize) {
    let n = mask.len();
    let nonzero = mask.iter().filter(|&&m| m != 0).count();
    let r = (rate * nonzero as f64).ceil() as usize;
    if nonzero == n || r == 0 {
        return (mask.to_vec(), 0);
    }
    let mut sorted: Vec<f32> = weight.iter().map(|w| w.abs()).collect();
    sorted.sort_by(f32::total_cmp);
    let threshold = sorted[n - nonzero + r - 1];
    let mut new: Vec<u8> = weight.iter().map(|w| u8::from(w.abs() > threshold)).collect();
    let grow = nonzero - new.iter().filter(|&&m| m != 0).count();
    let mut candidates: Vec<usize> = (0..n).filter(|&at| new[at] == 0).collect();
    candidates.sort_by(|&a, &b| gradient[b].abs().total_cmp(&gradient[a].abs()));
    candidates[..grow].iter().for_each(|&at| new[at] = 1);
    (new, grow)
}

/// Few different values, so that they tie; the mask has more zeros than the weights.
fn layer() -> impl Strategy<Value = (Vec<f32>, Vec<f32>, Vec<u8>)> {
    let value = prop::sample::select(vec![0.0_f32, -0.0, 0.5, -0.5, 1.0, -2.0, 3.0, 1e-40, f32::INFINITY]);
    prop::collection::vec((value.clone(), value, any::<bool>()), 1..200).prop_map(|triples| {
        let masked = triples.iter().map(|&(w, _, m)| if m { w } else { 0.0 }).collect();
        let gradient = triples.iter().map(|&(_, g, _)| g).collect();
        (masked, gradient, triples.iter().map(|&(_, _, m)| u8::from(m)).collect())
    })
}

proptest! {
    #[test]
    fn an_update_is_the_specifications((weight, gradient, mask) in layer(), rate in 0.0_f64..=1.0) {
        let (want, dropped) = by_the_book(&weight, &gradient, &mask, rate);
        let (mut new_weight, mut new) = (weight.clone(), mask.clone());
        let update = drop_and_grow(&mut new_weight, &gradient, &mut new, rate).unwrap();
        prop_assert_eq!(&new, &want);
        prop_assert_eq!(update.dropped, dropped);
        prop_assert!(update.asked <= update.dropped);
        for ((new_weight, weight), new) in new_weight.iter().zip(&weight).zip(&new) {
            prop_assert_eq!(*new_weight, if *new == 1 { *weight } else { 0.0 });
        }
    }
}

#[test]
fn values_without_order_count_as_zero() {
    let weight = [f32::NAN, 1.0, f32::INFINITY, 7.0];
    // One of three active ones is asked for, and it is the one that counts as zero.
    let survivors = drop_smallest(&weight, &[1, 1, 1, 0], 0.3).unwrap();
    assert_eq!(survivors.mask, [0, 1, 1, 0]);
    assert_eq!((survivors.update.asked, survivors.update.dropped), (1, 1));
    // No gradient is larger than NaN's zero but the last; then the lower index comes.
    assert_eq!(grow_largest(&[f32::NAN, 0.0, 0.0, 0.1], &[0, 0, 1, 0], 2).unwrap(), [1, 0, 1, 1]);
}

#[test]
fn what_is_not_active_starts_at_zero() {
    let (mut weight, mut mask) = ([3.0, 9.0, 1.0], [1, 0, 1]);
    drop_and_grow(&mut weight, &[0.0, 1.0, 0.0], &mut mask, 0.5).unwrap();
    assert_eq!((weight, mask), ([3.0, 0.0, 0.0], [1, 1, 0]));
}

#[test]
fn scores_by_hand() {
    let fc1 = Tensor::new(&[2, 3], vec![1.0, -2.0, 3.0, 0.0, 0.5, 0.0]).unwrap();
    let fc2 = Tensor::new(&[3, 2], vec![-1.0, 0.0, 1.0, 2.0, 0.0, -4.0]).unwrap();
    assert_eq!(neuron_scores(&fc1, &fc2).unwrap(), [8.0, 6.5]);
    // Two images, one token, two heads of width 2.
    let output = Tensor::new(&[2, 1, 2, 2], vec![1.0, 2.0, 0.0, 1.0, -1.0, 0.0, 1.0, 1.0]).unwrap();
    let gradient = Tensor::new(&[2, 1, 2, 2], vec![1.0, -1.0, 5.0, 2.0, 3.0, 0.0, 1.0, -1.0]).unwrap();
    let scores = head_scores(&output, &gradient).unwrap();
    assert_eq!(scores, HeadScores { importance: vec![2.0, 1.0], call: vec![2.5, 4.5] });
}

#[test]
fn structured_updates_by_hand() {
    // Neuron 2 is the weakest of the three active ones; 3 has the larger gradient of the missing ones.
    let new = update_neurons(&[5.0, 4.0, 1.0, 0.0], &[9.0, 9.0, 1.0, 2.0], &[1, 1, 1, 0], 0.1).unwrap();
    assert_eq!(new, [1, 1, 0, 1]);
    // Equal gradients all come.
    let new = update_neurons(&[5.0, 4.0, 1.0, 0.0], &[9.0, 9.0, 2.0, 2.0], &[1, 1, 1, 0], 0.1).unwrap();
    assert_eq!(new, [1, 1, 1, 1]);
    let scores = HeadScores { importance: vec![3.0, 1.0, 1.0, 0.0], call: vec![0.0, 1.0, 1.0, 0.5] };
    // Of equal heads the later one goes; of equal calls the earlier one comes.
    assert_eq!(update_heads(&scores, &[1, 1, 1, 0], 0.3).unwrap(), [1, 1, 1, 0]);
    assert_eq!(update_heads(&scores, &[1, 1, 1, 0], 0.6).unwrap(), [1, 1, 1, 0]);
    let scores = HeadScores { call: vec![0.0, 1.0, 0.2, 0.5], ..scores };
    assert_eq!(update_heads(&scores, &[1, 1, 1, 0], 0.3).unwrap(), [1, 1, 0, 1]);
    // A single head is dropped and comes back.
    let only = HeadScores { importance: vec![1.0], call: vec![1.0] };
    assert_eq!(update_heads(&only, &[1], 0.005).unwrap(), [1]);
}

#[test]
fn nothing_active_stays_nothing() {
    assert_eq!(update_neurons(&[1.0, 2.0], &[1.0, 2.0], &[0, 0], 0.5).unwrap(), [0, 0]);
    let (mut weight, mut mask) = ([0.0; 3], [0; 3]);
    let update = drop_and_grow(&mut weight, &[1.0; 3], &mut mask, 0.5).unwrap();
    assert_eq!((update.dropped, mask), (0, [0; 3]));
}

#[test]
fn wrong_arguments_are_named() {
    let error = drop_and_grow(&mut [1.0, 2.0], &[1.0], &mut [1, 0], 0.5).unwrap_err().to_string();
    assert!(error.contains("gradient has 1 values, expected 2"), "{error}");
    let error = drop_smallest(&[1.0], &[1, 0], 0.5).unwrap_err().to_string();
    assert!(error.contains("mask has 2 values, expected 1"), "{error}");
    let error = grow_largest(&[1.0, 2.0], &[1, 0], 2).unwrap_err().to_string();
    assert!(error.contains("cannot grow 2 weights where only 1 are missing"), "{error}");
    let matrix = |shape: &[usize]| Tensor::zeros(shape);
    let error = neuron_scores(&matrix(&[4, 2]), &matrix(&[2, 3])).unwrap_err().to_string();
    assert!(error.contains("fc1 has 4 rows, fc2 3 columns"), "{error}");
    let error = head_scores(&matrix(&[1, 2, 3, 4]), &matrix(&[1, 2, 3, 5])).unwrap_err().to_string();
    assert!(error.contains("expected [1, 2, 3, 4]"), "{error}");
    let scores = HeadScores { importance: vec![1.0], call: vec![1.0] };
    assert!(update_heads(&scores, &[1, 1], 0.5).unwrap_err().to_string().contains("a mask of 2"));
}
