//! A device without room: what would fit.

use foveate::{
    Error, Images, Pixels, Reduction,
    model::{Output, Vit},
};

use super::{device::Runner, failure::Failure};

/// Whether the device has no more memory.
pub(crate) fn out_of_memory(error: &Error) -> bool {
    #[cfg(feature = "cuda")]
    if matches!(error, Error::OutOfMemory { .. }) {
        return true;
    }
    // Without a device there is no such error.
    let _ = error;
    false
}

/// The largest batch that an error without memory says would fit.
fn forecast(error: &Error) -> Option<usize> {
    #[cfg(feature = "cuda")]
    if let Error::OutOfMemory { fits, .. } = error {
        return *fits;
    }
    let _ = error;
    None
}

/// A forward pass. Where memory does not suffice, the error names a batch for which it does.
pub(crate) fn forward<B: Runner>(
    model: &Vit<B>,
    images: &Images,
    method: &Reduction,
) -> Result<Output<B>, Failure> {
    match model.forward(images, method) {
        Err(error) if out_of_memory(&error) => Err(too_large(model, images, method, &error)),
        other => Ok(other?),
    }
}

/// The error for a batch that was too large, with a smaller one that runs: the one that should fit, and halves of it, are tried
/// until one does.
pub(crate) fn too_large<B: Runner>(
    model: &Vit<B>,
    images: &Images,
    method: &Reduction,
    error: &Error,
) -> Failure {
    let asked = images.batch();
    let should = forecast(error).filter(|batch| (1..asked).contains(batch)).unwrap_or(asked / 2);
    let halves = std::iter::successors(Some(should), |batch| Some(batch / 2));
    let fits = halves.take_while(|&batch| batch > 0).find(|&batch| {
        // What the pass before has left is returned first.
        let tried = model.backend().wait().and_then(|()| model.forward(&first(images, batch)?, method));
        tried.is_ok() && model.backend().wait().is_ok()
    });
    Failure::Other(match fits {
        Some(batch) => {
            format!(
                "the device's memory is used up: {asked} images at a time are too many, --batch {batch} fits (it was tried)"
            )
        }
        None => format!(
            "{error}: not one image fits; --image-size makes it smaller, --dtype f16 halves what it takes"
        ),
    })
}

/// The first images of a batch.
fn first(images: &Images, count: usize) -> foveate::Result<Images> {
    let [_, channels, height, width] = images.shape();
    let values = count * channels * height * width;
    let pixels = match images.pixels() {
        Pixels::U8(pixels) => Pixels::U8(pixels[..values].to_vec()),
        Pixels::F32(pixels) => Pixels::F32(pixels[..values].to_vec()),
    };
    Images::new([count, channels, height, width], pixels)
}

/// The error for a model that is too large.
pub(crate) fn no_room_for_weights(error: &Error) -> Failure {
    let error = error.to_string();
    // No batch is at fault here.
    let error = error.trim_end_matches("; use a smaller batch");
    Failure::Other(format!(
        "the weights do not fit the device: {error}; --dtype f16 halves what they take, --device cpu needs none of it"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_images_of_a_batch() {
        let pixels = Pixels::U8((0..24).collect());
        let images = Images::new([3, 2, 2, 2], pixels).unwrap();
        let two = first(&images, 2).unwrap();
        assert_eq!(two.shape(), [2, 2, 2, 2]);
        assert!(matches!(two.pixels(), Pixels::U8(pixels) if *pixels == (0..16).collect::<Vec<u8>>()));
    }
}
