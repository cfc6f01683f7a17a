//! Numbers that no specification string can say, and shapes that no model has: through the API they are errors, never panics.

use foveate::{
    Reduction, Tensor,
    backend::{Backend, Convolution, Depthwise, GridBackend, Norm},
    macs::ModelMacs,
    model::arch,
    reduction::{Bat, DynamicVit, Evit, Host, Keep, Method, Mstm, Svite},
    reference::Reference,
};

const HUGE: usize = usize::MAX;

fn host() -> Host {
    Host {
        depth: 4,
        special: 1,
        class_token: true,
        width: 8,
        heads: 2,
        grid: [4, 4],
        aux_head: false,
        weights: None,
    }
}

/// Methods with numbers beyond all bounds, and what the refusal names.
fn methods() -> Vec<(Reduction, &'static str)> {
    let shares = [f64::NAN, 0.0, -1.0, 1.5, f64::INFINITY];
    let mut all = Vec::new();
    for share in shares {
        let keep = Keep::Rate(share);
        all.push((Reduction::Evit(Evit { keep: keep.clone(), ..Evit::default() }), "keeps a share of"));
        all.push((Reduction::Bat(Bat { keep: keep.clone(), ..Bat::default() }), "keeps a share of"));
        all.push((Reduction::Mstm(Mstm { keep, ..Mstm::default() }), "keeps a share of"));
    }
    for layer in [4, HUGE] {
        let layers = Some(vec![layer]);
        all.push((Reduction::Evit(Evit { layers: layers.clone(), ..Evit::default() }), "does not exist"));
        all.push((Reduction::Bat(Bat { layers: layers.clone(), ..Bat::default() }), "does not exist"));
        all.push((Reduction::Mstm(Mstm { layers: layers.clone(), ..Mstm::default() }), "does not exist"));
        let cut = DynamicVit { layers, ..DynamicVit::default() };
        all.push((Reduction::DynamicVit(cut), "does not exist"));
    }
    for scale in [0, 1, 64, HUGE] {
        all.push((Reduction::Mstm(Mstm { scales: vec![scale], ..Mstm::default() }), "windows have sides"));
    }
    all.push((Reduction::Svite(Svite { tokens: 0, ..Svite::default() }), "keeps no token"));
    for share in [f64::NAN, -1.0] {
        let none = DynamicVit { keep: Keep::Rate(share), ..DynamicVit::default() };
        all.push((Reduction::DynamicVit(none), "none"));
    }
    all
}

#[test]
fn methods_with_impossible_numbers_are_refused() {
    let (config, host) = (arch::config("deit_tiny").unwrap(), host());
    for (method, what) in methods() {
        let message = method.check(&host).unwrap_err().to_string();
        assert!(message.contains(what), "{method}: {message}");
        // Who counts before asking whether the method suits gets numbers, or none, but no panic.
        for layer in 0..5 {
            let _ = method.step(layer, 17, &host);
        }
        let _ = ModelMacs::of(&config, &method);
    }
    let all = Reduction::Svite(Svite { tokens: HUGE, ..Svite::default() });
    all.check(&host).unwrap();
    assert!(all.step(0, 17, &host).is_none(), "more tokens than there are: nothing to do");
}

#[test]
fn layers_beyond_all_numbers_are_refused_as_they_are_written() {
    for name in ["evit", "bat", "mstm", "mctf", "dynamicvit"] {
        let method: Reduction = format!("{name}:layers={HUGE}").parse().unwrap();
        let message = method.check(&host()).unwrap_err().to_string();
        assert!(message.contains("does not exist"), "{message}");
    }
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::new(shape, vec![0.0; shape.iter().product()]).unwrap()
}

#[test]
fn shapes_of_nothing_and_of_everything_are_refused() {
    let reference = Reference::new();
    let x = zeros(&[1, 4, 2]);
    let dense = Convolution { weight: zeros(&[18, 0]), bias: zeros(&[0]), stride: 1, activation: None };
    let message = reference.convolution(&x, [2, 2], &dense).unwrap_err().to_string();
    assert!(message.contains("no outputs"), "{message}");
    let each =
        Depthwise { weight: zeros(&[9, 0]), bias: zeros(&[0]), stride: 1, before: None, activation: None };
    assert!(reference.depthwise(&zeros(&[1, 4, 0]), [2, 2], &each).is_err());
    let norm = Norm { weight: zeros(&[0]), bias: None, eps: 1e-6 };
    let message = reference.layer_norm(&zeros(&[3, 0]), &norm).unwrap_err().to_string();
    assert!(message.contains("no values"), "{message}");
    for grid in [[HUGE, 2], [2, HUGE], [HUGE, HUGE], [0, 4], [3, 1]] {
        assert!(reference.pool_windows(&x, 0, grid, 2).is_err(), "{grid:?}");
        assert!(reference.add_windows(x.clone(), &x, 1, grid, 2).is_err(), "{grid:?}");
        assert!(reference.convolution(&x, grid, &dense).is_err(), "{grid:?}");
    }
    assert!(reference.pool_windows(&x, HUGE, [2, 2], 2).is_err());
    assert!(reference.pool_windows(&x, 0, [2, 2], 0).is_err());
    assert!(reference.hidden_sizes(None, [1, HUGE], 1).is_err());
    assert!(reference.hidden_sizes(None, [HUGE, 2], 1).is_err());
    // One row of a hundred thousand: its table of turns would be tens of gigabytes.
    let row = zeros(&[1, 100_000, 1]);
    let message = foveate::reference::frequency::spectrum(&row, [1, 100_000]).unwrap_err().to_string();
    assert!(message.contains("sides of up to 4096"), "{message}");
}
