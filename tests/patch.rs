//! Images to tokens.

use foveate::{Images, Pixels, Tensor};
use proptest::prelude::*;

mod backends;
use backends::backends;

proptest! {
    #[test]
    fn every_pixel_lands_in_its_patch(
        batch in 1_usize..3, channels in prop_oneof![Just(1_usize), Just(3)], rows in 1_usize..5, columns in 1_usize..5,
        ph in 1_usize..6, pw in 1_usize..6, seed in any::<u32>(),
    ) {
        let (height, width) = (rows * ph, columns * pw);
        let shape = [batch, channels, height, width];
        let value = |i: usize| (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed).to_le_bytes()[2];
        let bytes: Vec<u8> = (0..shape.iter().product()).map(value).collect();
        let (mean, std) = (&[0.4, 0.5, 0.6][..channels], &[0.2, 0.3, 0.4][..channels]);
        let images = Images::new(shape, Pixels::U8(bytes.clone())).unwrap();
        for reference in backends() {
        let got = reference.patches(&images, [ph, pw], mean, std).unwrap();
        prop_assert_eq!(got.shape(), &[batch, rows * columns, channels * ph * pw][..]);
        let mut normalised = vec![0.0; bytes.len()];
        for (at, &byte) in bytes.iter().enumerate() {
            let (x, y) = (at % width, at / width % height);
            let (c, image) = (at / (width * height) % channels, at / (width * height * channels));
            let (row, column) = (y / ph * columns + x / pw, (c * ph + y % ph) * pw + x % pw);
            let want = (f32::from(byte) / 255.0 - mean[c]) / std[c];
            prop_assert_eq!(got.item(image)[row * channels * ph * pw + column], want);
            normalised[at] = want;
        }
        // Pixels that are normalised already are taken as they are.
        let images = Images::new(shape, Pixels::F32(normalised)).unwrap();
        prop_assert_eq!(reference.patches(&images, [ph, pw], mean, std).unwrap(), got);
        }
    }
}

#[test]
fn special_tokens_come_first_and_positions_are_added_to_patches() {
    for reference in backends() {
        let patches = Tensor::new(&[2, 2, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]).unwrap();
        let prefix = Tensor::new(&[1, 2], vec![-1.0, -2.0]).unwrap();
        let position = Tensor::new(&[2, 2], vec![10.0, 20.0, 30.0, 40.0]).unwrap();
        let tokens = reference.embed(&patches, Some(&prefix), Some(&position)).unwrap();
        assert_eq!(tokens.item(1), [-1.0, -2.0, 15.0, 26.0, 37.0, 48.0]);
        assert_eq!(reference.embed(&patches, None, None).unwrap(), patches);
        assert_eq!(reference.tokens(&tokens, 1..2).unwrap().data(), [11.0, 22.0, 15.0, 26.0]);
        let sizes = Tensor::new(&[2, 3], vec![9.0, 1.0, 3.0, 9.0, 1.0, 1.0]).unwrap();
        let mean = reference.mean_tokens(&tokens, Some(&sizes), 1).unwrap();
        assert_eq!(mean.data(), [(11.0 + 3.0 * 33.0) / 4.0, (22.0 + 3.0 * 44.0) / 4.0, 26.0, 37.0]);
    }
}

#[test]
fn wrong_shapes_are_named() {
    for reference in backends() {
        let images = Images::new([1, 1, 6, 6], Pixels::U8(vec![0; 36])).unwrap();
        let said =
            |patch, mean: &[f32]| reference.patches(&images, patch, mean, &[1.0]).unwrap_err().to_string();
        assert!(said([4, 3], &[0.0]).contains("6x6 images do not divide into 4x3 patches"));
        assert!(said([0, 3], &[0.0]).contains("do not divide"));
        assert!(said([3, 3], &[0.0; 3]).contains("mean and deviation of 3 and 1 channels"));
        assert!(Images::new([1, 1, 6, 6], Pixels::U8(vec![0; 35])).is_err());
        assert!(Images::new([0, 1, 6, 6], Pixels::U8(vec![])).is_err());
        assert!(Images::new([usize::MAX, 3, 6, 6], Pixels::U8(vec![])).is_err());
        let patches = Tensor::zeros(&[1, 4, 2]);
        let error = reference.embed(&patches, None, Some(&Tensor::zeros(&[3, 2]))).unwrap_err().to_string();
        assert!(error.contains("position has shape [3, 2], expected [4, 2]"), "{error}");
        let error = reference.mean_tokens(&patches, None, 4).unwrap_err().to_string();
        assert!(error.contains("no tokens are left from 4 on"), "{error}");
    }
}
