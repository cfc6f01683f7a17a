use foveate::{
    Reduction, Tensor,
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

/// The tokens behind the class token, without the positions that were added to them.
fn without_positions(mut embedded: Tensor, position: &Tensor) -> Vec<f32> {
    let (batch, width) = (embedded.dim(0), embedded.width());
    let patches = (0..batch).flat_map(|image| {
        let tokens = &embedded.data_mut()[image * (position.data().len() + width)..][width..];
        tokens[..position.data().len()].iter().zip(position.data()).map(|(t, p)| t - p).collect::<Vec<_>>()
    });
    patches.collect()
}

pub(crate) fn lvvit(file: &File, check: &mut Check) {
    let settings = lvvit_settings(file);
    let vit = load(&file.path, "w/", &settings);
    let scaled = Tolerance::Scaled(2e-5);
    let (output, record) = record(&vit, &images(file.array("x")), &Reduction::None);

    let params = loaded(&file.path, "w/", &settings).params;
    let patches = without_positions(record.embedded.unwrap(), params.position.as_ref().unwrap());
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

pub(crate) fn t2tvit(file: &File, check: &mut Check) {
    let settings = [
        format!("heads={}", file.int("heads")),
        format!("image={}", file.int("img")),
        format!("norm_eps={}", file.config["ln_eps"]),
    ];
    let vit = load(&file.path, "w/", &settings);
    let scaled = Tolerance::Scaled(2e-5);
    let (output, record) = record(&vit, &images(file.array("x")), &Reduction::None);
    check.same("stages", &record.stages.len(), &2);
    for (stage, name) in record.stages.iter().zip(["act/attention1", "act/attention2"]) {
        check.close(name, stage.data(), file.array(name), scaled);
    }
    let params = loaded(&file.path, "w/", &settings).params;
    let patches = without_positions(record.embedded.unwrap(), params.position.as_ref().unwrap());
    check.close("act/tokens", &patches, file.array("act/tokens"), scaled);
    check.close("act/features", output.tokens.data(), file.array("act/features"), scaled);
    check.close("logits", output.logits.unwrap().data(), file.array("logits"), scaled);
}
