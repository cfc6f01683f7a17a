use foveate::{
    Reduction,
    backend::{Backend, Epilogue, Linear},
};

use super::{Array, Check, File, Tolerance, images, load, loaded, record};

/// What the numbers of a golden LV-ViT come to.
pub(crate) fn lvvit_settings(file: &File) -> Vec<String> {
    vec![
        format!("heads={}", file.int("heads")),
        format!("image={}", file.int("img")),
        format!("norm_eps={}", file.config["ln_eps"]),
        format!("skip_lam={}", file.config["skip_lam"]),
    ]
}

/// (B, C, rows, columns) as tokens, (B, rows · columns, C).
fn as_tokens(map: &Array) -> Array {
    let [batch, channels, rows, columns] = <[usize; 4]>::try_from(&map.shape[..]).unwrap();
    let positions = rows * columns;
    let value = |at: usize| {
        let (image, position, channel) =
            (at / (positions * channels), at / channels % positions, at % channels);
        map.values[(image * channels + channel) * positions + position]
    };
    Array { shape: vec![batch, positions, channels], values: (0..map.values.len()).map(value).collect() }
}

pub(crate) fn lvvit(file: &File, check: &mut Check) {
    let settings = lvvit_settings(file);
    let vit = load(&file.path, "w/", &settings);
    let scaled = Tolerance::Scaled(2e-5);
    let (output, record) = record(&vit, &images(file.array("x")), &Reduction::None);

    // The positions that were added come off again.
    let params = loaded(&file.path, "w/", &settings).params;
    let (mut embedded, position) = (record.embedded.unwrap(), params.position.unwrap());
    let (batch, width) = (embedded.dim(0), embedded.width());
    let patches = (0..batch).flat_map(|image| {
        let tokens = &embedded.data_mut()[image * (position.data().len() + width)..][width..];
        tokens.iter().zip(position.data()).map(|(token, position)| token - position).collect::<Vec<_>>()
    });
    let patches: Vec<f32> = patches.collect();
    check.close("act/patch_embed", &patches, &as_tokens(file.array("act/patch_embed")), scaled);

    check.close("act/features", output.tokens.data(), file.array("act/features"), scaled);
    let backend = crate::backend();
    let head = |layer: &Linear<_>| backend.linear(&output.tokens, layer.all(), Epilogue::None).unwrap();
    let (class, mut aux) = (head(&params.head.unwrap()), head(&params.aux_head.unwrap()));
    let classes = class.width();
    let rows = class.data().chunks(class.dim(1) * classes).flat_map(|rows| rows[..classes].to_vec());
    check.close("logits_cls", &rows.collect::<Vec<_>>(), file.array("logits_cls"), scaled);
    // The layer is halved.
    aux.data_mut().iter_mut().for_each(|logit| *logit *= 2.0);
    let rows = aux.data().chunks(aux.dim(1) * classes).flat_map(|rows| rows[classes..].to_vec());
    check.close("logits_aux", &rows.collect::<Vec<_>>(), file.array("logits_aux"), scaled);
    check.close("logits", output.logits.unwrap().data(), file.array("logits"), scaled);
}
