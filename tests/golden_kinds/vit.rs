use foveate::Reduction;

use super::{Check, File, Tolerance, images, int, load, record, text, tome};

/// A state dict: loads, with the numbers its configuration gives.
pub(crate) fn weights(file: &File, check: &mut Check) {
    let model = &file.config["model"];
    let settings = [format!("heads={}", int(model, "heads")), format!("norm_eps={}", model["ln_eps"])];
    let vit = load(&file.path, "", &settings);
    let c = vit.config();
    check.same("image", &c.image, &[int(model, "img"); 2]);
    check.same("patch", &c.patch, &[int(model, "patch"); 2]);
    let got = [c.width, c.depth, c.heads, c.hidden, c.classes];
    let dim = int(model, "dim");
    let want =
        [dim, int(model, "depth"), int(model, "heads"), dim * int(model, "mlp_ratio"), int(model, "classes")];
    check.same("width, depth, heads, hidden, classes", &got, &want);
    check.same("distillation token", &c.distillation_token, &model["distilled"].as_bool().unwrap());
}

/// No reduction.
pub(crate) fn model(file: &File, check: &mut Check) {
    let vit = tome::host_model(file);
    let (output, record) = record(&vit, &images(file.array("images")), &Reduction::None);
    let blocks = Tolerance::Absolute(5e-5);
    let embedded = record.embedded.as_ref().unwrap();
    let want = file.array("embed");
    check.close("embed", &embedded.data()[..want.values.len()], want, blocks);
    for (layer, tokens) in record.blocks.iter().enumerate() {
        if let Some(want) = file.get(&format!("block{layer}.cls_out")) {
            let class: Vec<f32> =
                (0..tokens.dim(0)).flat_map(|image| tokens.item(image)[..tokens.width()].to_vec()).collect();
            check.close(&format!("block{layer}.cls_out"), &class, want, blocks);
        }
    }
    tome::compare_model(file, &output, &record, check);
}

pub(crate) fn distilled(file: &File, check: &mut Check) {
    let settings = [format!("heads={}", file.int("heads")), format!("norm_eps={}", file.config["ln_eps"])];
    let vit = load(&file.path, "w/", &settings);
    let (output, _) = record(&vit, &images(file.array("x")), &Reduction::None);
    let scaled = Tolerance::Scaled(1e-5);
    let width = output.tokens.width();
    for (at, name) in ["cls", "dist"].into_iter().enumerate() {
        let rows = (0..output.tokens.dim(0))
            .flat_map(|image| output.tokens.item(image)[at * width..][..width].to_vec());
        check.close(name, &rows.collect::<Vec<_>>(), file.array(name), scaled);
    }
    let [class, distilled] = output.head_logits.unwrap();
    check.close("logits_cls", class.data(), file.array("logits_cls"), scaled);
    check.close("logits_dist", distilled.data(), file.array("logits_dist"), scaled);
    check.close("logits", output.logits.unwrap().data(), file.array("logits"), scaled);
}

pub(crate) fn registers(file: &File, check: &mut Check) {
    let image = file.config["img"].as_array().unwrap();
    let settings = [
        format!("heads={}", file.int("heads")),
        format!("norm_eps={}", file.config["ln_eps"]),
        format!("image={}x{}", image[0], image[1]),
    ];
    let vit = load(&file.path, "w/", &settings);
    check.same("ffn", &text(&file.config, "ffn"), &"mlp");
    let (output, record) = record(&vit, &images(file.array("x")), &Reduction::None);
    let scaled = Tolerance::Scaled(2e-5);
    check.close("act/tokens", record.embedded.unwrap().data(), file.array("act/tokens"), scaled);
    let (n, width) = (output.tokens.dim(1), output.tokens.width());
    let registers = file.int("n_register");
    for (name, range) in [("cls", 0..1), ("reg_tokens", 1..1 + registers), ("patch_tokens", 1 + registers..n)]
    {
        let rows = (0..output.tokens.dim(0))
            .flat_map(|image| output.tokens.item(image)[range.start * width..range.end * width].to_vec());
        check.close(name, &rows.collect::<Vec<_>>(), file.array(name), scaled);
    }
}
