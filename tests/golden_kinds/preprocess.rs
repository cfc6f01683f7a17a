use std::path::Path;

use foveate::image::{Interpolation, Transform, load};

use crate::golden_kinds::{Check, File, Tolerance, int, text};

/// timm's evaluation transform, byte for byte.
pub(crate) fn run(file: &File, check: &mut Check) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [
        file.path.with_file_name("photos"),
        root.join("../shared/models/photos"),
        root.join("assets/photos"),
    ];
    for case in file.config["cases"].as_array().unwrap() {
        let (p, photo, size) = (text(case, "prefix"), text(case, "photo"), int(case, "size"));
        let path = folders.iter().map(|folder| folder.join(photo)).find(|path| path.is_file());
        let Some(path) = path else {
            check.fail(format!("{photo} is in none of {folders:?}"));
            continue;
        };
        let numbers = |key: &str| -> Vec<f32> {
            case[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
        };
        let transform = Transform {
            crop_pct: case["crop_pct"].as_f64().unwrap(),
            interpolation: match text(case, "interpolation") {
                "bicubic" => Interpolation::Bicubic,
                _ => Interpolation::Bilinear,
            },
            mean: numbers("mean"),
            std: numbers("std"),
        };
        let picture = transform.apply(&load(&path).unwrap(), [size, size]).unwrap();
        let planes: Vec<usize> =
            (0..3).flat_map(|c| picture.data().iter().skip(c).step_by(3).map(|&v| usize::from(v))).collect();
        let want: Vec<usize> = file.array(&format!("{p}.u8")).values.iter().map(|&v| v as usize).collect();
        check.same(&format!("{p}.u8"), &planes, &want);
        if let Some(want) = file.get(&format!("{p}.normalised")) {
            let channel = |at: usize| at / (size * size);
            let value = |(at, &v): (usize, &usize)| {
                (v as f32 / 255.0 - transform.mean[channel(at)]) / transform.std[channel(at)]
            };
            let got: Vec<f32> = planes.iter().enumerate().map(value).collect();
            check.close(&format!("{p}.normalised"), &got, want, Tolerance::Absolute(1e-6));
        }
    }
}
