//! The reference gives the same bits for any number of threads, and the same image the same result in any batch.

use foveate::{
    Images, Pixels, Reduction, Tensor,
    model::{Vit, VitConfig, arch},
    reference::Reference,
};

fn small() -> VitConfig {
    VitConfig {
        image: [64, 64],
        patch: [8, 8],
        width: 96,
        depth: 4,
        heads: 3,
        hidden: 384,
        classes: 10,
        ..arch::config("deit_tiny").unwrap()
    }
}

fn images(batch: usize, config: &VitConfig) -> Images {
    let [h, w] = config.image;
    let pixels = (0..batch * 3 * h * w).map(|i| ((i * 2_654_435_761) >> 7) as u8).collect();
    Images::new([batch, 3, h, w], Pixels::U8(pixels)).unwrap()
}

fn logits(threads: usize, config: &VitConfig, batch: usize, spec: &str) -> Tensor {
    let vit =
        Vit::new(Reference::with_threads(threads).unwrap(), config.clone(), arch::random_params(config, 7))
            .unwrap();
    let reduction: Reduction = spec.parse().unwrap();
    vit.forward(&images(batch, config), &reduction).unwrap().logits.unwrap()
}

const SPECS: [&str; 6] = [
    "none",
    "tome:r=7",
    "mctf:r=6",
    "mctf:r=6,ahead=0,pool=max",
    "mctf:r=0.3,layers=1/2,ahead=2",
    "evit:keep=0.6",
];

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let config = small();
    for spec in SPECS {
        let one = logits(1, &config, 3, spec);
        for threads in [2, 3, 7] {
            assert_eq!(logits(threads, &config, 3, spec), one, "{spec} with {threads} threads");
        }
    }
}

/// At the sizes where the matrix products really spread over threads.
#[test]
fn any_number_of_threads_gives_the_same_bits_at_full_width() {
    let config = VitConfig { depth: 2, ..arch::config("deit_small").unwrap() };
    for spec in ["none", "tome:r=13", "mctf:r=16"] {
        let one = logits(1, &config, 2, spec);
        assert_eq!(logits(2, &config, 2, spec), one, "{spec}");
        assert_eq!(logits(5, &config, 2, spec), one, "{spec}");
    }
}

/// An image's logits do not depend on its neighbours: another product size may order sums differently, no more.
#[test]
fn a_batch_is_its_images() {
    let config = small();
    let vit = Vit::new(Reference::new(), config.clone(), arch::random_params(&config, 7)).unwrap();
    let all = images(3, &config);
    let Pixels::U8(pixels) = all.pixels() else { unreachable!() };
    for spec in SPECS {
        let reduction: Reduction = spec.parse().unwrap();
        let together = vit.forward(&all, &reduction).unwrap();
        for image in 0..3 {
            let n = pixels.len() / 3;
            let alone = Pixels::U8(pixels[image * n..(image + 1) * n].to_vec());
            let alone = Images::new([1, 3, 64, 64], alone).unwrap();
            let alone = vit.forward(&alone, &reduction).unwrap();
            assert_eq!(alone.token_counts, together.token_counts);
            let scale = together.logits.as_ref().unwrap().data().iter().fold(1.0_f32, |m, x| m.max(x.abs()));
            for (a, b) in
                alone.logits.unwrap().data().iter().zip(together.logits.as_ref().unwrap().item(image))
            {
                // Four blocks of sums over at most 384 values: 4·eps·sqrt(384)·4 is 4e-5.
                assert!((a - b).abs() <= 4e-5 * scale, "{spec}: {a} and {b}");
            }
        }
    }
}
