//! What the demo brings along: a model and twenty pictures.

/// A small DeiT, trained on Fashion-MNIST.
pub(super) static MODEL: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/fashion_deit_f16.safetensors"));

macro_rules! images {
    ($($name:literal,)*) => {
        &[$(($name, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/fashion/", $name)))),*]
    };
}

/// Pictures of the test set (file name, content); the names are `<index>_<label>.png`.
pub(super) static IMAGES: &[(&str, &[u8])] = images![
    "0000_ankle_boot.png",
    "0001_pullover.png",
    "0002_trouser.png",
    "0003_trouser.png",
    "0004_shirt.png",
    "0006_coat.png",
    "0007_shirt.png",
    "0008_sandal.png",
    "0009_sneaker.png",
    "0010_coat.png",
    "0011_sandal.png",
    "0012_sneaker.png",
    "0013_dress.png",
    "0016_pullover.png",
    "0018_bag.png",
    "0019_t-shirt_top.png",
    "0023_ankle_boot.png",
    "0027_t-shirt_top.png",
    "0029_dress.png",
    "0030_bag.png",
];
