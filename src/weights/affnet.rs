//! An AFFNet out of a checkpoint with the official parameter names.

use std::{collections::BTreeSet, path::Path};

use super::{Checkpoint, ConfigFile, LoadedVit, Overrides, Provenance, batch_norm, load_vit, text::shape};
use crate::{
    Error, Result, Tensor,
    backend::{Convolution, Depthwise, Frequency, GridBackend, Linear, Norm, NormOver},
    image::Transform,
    model::{
        Activation, AffNet, AffNetConfig,
        affnet::{
            AffBlockParams, AffLayerParams, AffNetParams, AffStage, Bottleneck, BottleneckParams, GROUPS,
            transform,
        },
    },
};

/// What the official configurations leave as it is.
const NORM_EPS: f32 = 1e-5;
const THRESHOLD: f32 = 0.01;
/// More layers in a name would be no AFFNet.
const MOST_LAYERS: usize = 64;

/// An AFFNet as read: its numbers, its parameters, and how they were found out.
#[derive(Clone, Debug)]
pub struct LoadedAffNet {
    /// The numbers.
    pub config: AffNetConfig,
    /// The parameters, in host memory; batch norms are folded into the convolutions.
    pub params: AffNetParams<Tensor>,
    /// Where each number came from, in the order in which `foveate info` shows them.
    pub provenance: Vec<Provenance>,
}

impl LoadedAffNet {
    /// The model on a backend.
    ///
    /// # Errors
    /// Those of moving the parameters there.
    pub fn build<B: GridBackend>(self, backend: B) -> Result<AffNet<B>> {
        AffNet::new(backend, self.config, self.params)
    }
}

/// A model of either kind.
#[derive(Clone, Debug)]
pub enum Loaded {
    /// A transformer.
    Vit(Box<LoadedVit>),
    /// An AFFNet.
    AffNet(Box<LoadedAffNet>),
}

/// Reads whatever model a checkpoint holds: an AFFNet where its tensors' names say so, else as [`load_vit`].
///
/// # Errors
/// As [`load_affnet`] and [`load_vit`].
pub fn load(checkpoint: &Checkpoint, config: Option<&ConfigFile>, overrides: &Overrides) -> Result<Loaded> {
    if is_affnet(checkpoint) {
        return Ok(Loaded::AffNet(Box::new(load_affnet(checkpoint, overrides)?)));
    }
    if let Some(norm) = overrides.norm {
        return Err(not_here(checkpoint, "norm", norm.name(), "transformers have LayerNorms"));
    }
    if let Some(shrinkage) = overrides.shrinkage {
        return Err(not_here(
            checkpoint,
            "shrinkage",
            &shrinkage.to_string(),
            "transformers shrink no masks",
        ));
    }
    Ok(Loaded::Vit(Box::new(load_vit(checkpoint, config, overrides)?)))
}

/// Whether a checkpoint's names are those of an AFFNet.
pub fn is_affnet(checkpoint: &Checkpoint) -> bool {
    checkpoint.contains("conv_1.block.conv.weight") && checkpoint.contains("layer_3.1.global_rep.0.filter.w1")
}

/// Opens `path` and reads the AFFNet in it.
///
/// # Errors
/// As [`Checkpoint::open`] and [`load_affnet`].
pub fn load_affnet_file(path: impl AsRef<Path>, overrides: &Overrides) -> Result<LoadedAffNet> {
    load_affnet(&Checkpoint::open(path)?, overrides)
}

/// Reads an AFFNet: the official state dict (`conv_1.block.conv.weight`, `layer_3.1.global_rep.0.filter.w1`, ...) in
/// safetensors form.
///
/// Names and shapes tell the architecture. They do not tell the activation (`silu` unless overridden, as in the released
/// models; `relu` is the code's default), which of the norms without running statistics is meant (`layer_norm_2d` unless
/// overridden), the soft shrinkage (0.01, the default) and the input transform (see [`AffNetConfig::transform`]). A
/// config.json is not read.
///
/// # Errors
/// [`crate::Error::Weights`] when a tensor is missing, misshapen, superfluous or unreadable; [`crate::Error::File`] when the
/// names are not an AFFNet's, or an override does not apply to one.
pub fn load_affnet(checkpoint: &Checkpoint, overrides: &Overrides) -> Result<LoadedAffNet> {
    if !is_affnet(checkpoint) {
        return Err(Error::file(
            checkpoint.file(),
            "is no AFFNet with the official names: conv_1.block.conv.weight or layer_3.1.global_rep.0.filter.w1 is missing",
        ));
    }
    let unfit = [
        ("heads", overrides.heads.map(|heads| heads.to_string())),
        ("readout", overrides.readout.map(|readout| readout.name().to_owned())),
        ("position_antialias", overrides.position_antialias.map(|flag| flag.to_string())),
        ("skip_lam", overrides.skip_lam.map(|skip| skip.to_string())),
    ];
    if let Some((key, Some(value))) = unfit.iter().find(|(_, value)| value.is_some()) {
        return Err(not_here(
            checkpoint,
            key,
            value,
            "an AFFNet has no attention, class token or position table",
        ));
    }
    let mut reader = Reader::new(checkpoint);
    let mut provenance = Vec::new();
    let mut note = |field, value: String, source: &str| {
        provenance.push(Provenance { field, value, source: source.to_owned() });
    };
    note("family", "official AFFNet".to_owned(), "tensor names");

    let activation = overrides.activation.unwrap_or(Activation::Silu);
    let settings = Settings {
        norm: reader.norm(overrides.norm, "layer_3.1.global_rep.0.norm1")?,
        activation,
        threshold: overrides.shrinkage.unwrap_or(THRESHOLD),
        norm_eps: overrides.norm_eps.unwrap_or(NORM_EPS),
    };
    let [stem, channels] = reader.convolution_shape("conv_1")?;
    let (weight, bias) = reader.folded("conv_1", &[stem, channels, 3, 3])?;
    let stem_params = Convolution {
        weight: transposed(&weight, [stem, channels, 9], |[o, i, tap]| (tap * channels + i) * stem + o)?
            .reshape(&[9 * channels, stem])?,
        bias,
        stride: 2,
        activation: Some(activation),
    };
    let (one, one_params) = reader.bottlenecks(1, &settings)?;
    let (two, two_params) = reader.bottlenecks(2, &settings)?;
    let mut stages = Vec::new();
    let mut stage_params = Vec::new();
    for layer in 3..=5 {
        let (down, down_params) = reader.bottleneck(&format!("layer_{layer}.0"), 2, &settings)?;
        let (body, hidden) = reader.body(&format!("layer_{layer}.1."), down.outputs, &settings)?;
        let (blocks, fuse) = (body.layers.len(), body.fusion.is_some());
        stages.push(AffStage { down, blocks, hidden, fuse });
        stage_params.push((down_params, body));
    }
    let width = stages[2].down.outputs;
    let (expand, features) = reader.pointwise_of("conv_1x1_exp", width)?;
    let (head, classes) = reader.head(features)?;
    reader.finish()?;

    let plain = transform();
    let transform = Transform {
        mean: overrides.mean.clone().unwrap_or(plain.mean),
        std: overrides.std.clone().unwrap_or(plain.std),
        crop_pct: overrides.crop_pct.unwrap_or(plain.crop_pct),
        interpolation: overrides.interpolation.unwrap_or(plain.interpolation),
    };
    let transform = Transform {
        mean: spread(checkpoint, "mean", transform.mean, channels)?,
        std: spread(checkpoint, "std", transform.std, channels)?,
        ..transform
    };
    let stages: [AffStage; 3] = [stages[0], stages[1], stages[2]];
    let config = AffNetConfig {
        image: overrides.image.unwrap_or([256; 2]),
        channels,
        stem,
        bottlenecks: [one, two],
        stages,
        features,
        classes,
        activation,
        norm: settings.norm,
        norm_eps: settings.norm_eps,
        threshold: settings.threshold,
        transform,
        labels: None,
    };
    config.check().map_err(|error| Error::file(checkpoint.file(), error.to_string()))?;
    describe(&config, overrides, &mut note);
    Ok(LoadedAffNet {
        config,
        params: AffNetParams {
            stem: stem_params,
            bottlenecks: [one_params, two_params],
            stages: stage_params,
            expand,
            head,
        },
        provenance,
    })
}

/// The body of a stage by itself (the official `AFFBlock`): `global_rep.0.filter.w1` and so on, as a view of a checkpoint
/// has them ([`Checkpoint::with_prefix`]).
///
/// # Errors
/// As [`load_affnet`].
pub fn load_aff_block(
    checkpoint: &Checkpoint,
    norm: NormOver,
    activation: Activation,
    threshold: f32,
    norm_eps: f32,
) -> Result<AffBlockParams<Tensor>> {
    let mut reader = Reader::new(checkpoint);
    let settings =
        Settings { norm: reader.norm(Some(norm), "global_rep.0.norm1")?, activation, threshold, norm_eps };
    let [width, _] = reader.convolution_shape("conv_proj")?;
    let (body, _) = reader.body("", width, &settings)?;
    reader.finish()?;
    Ok(body)
}

/// An override that means nothing for this model.
fn not_here(checkpoint: &Checkpoint, key: &str, value: &str, why: &str) -> Error {
    Error::file(checkpoint.file(), format!("`{key}={value}` does not apply: {why}; leave it out"))
}

fn spread(checkpoint: &Checkpoint, what: &str, values: Vec<f32>, channels: usize) -> Result<Vec<f32>> {
    match values[..] {
        [] => Err(Error::file(checkpoint.file(), format!("{what} has no values"))),
        _ if values.len() == channels => Ok(values),
        [first, ..] if values.iter().all(|&value| value == first) => Ok(vec![first; channels]),
        _ => Err(Error::file(
            checkpoint.file(),
            format!("{what} has {} values, the model {channels} channels", values.len()),
        )),
    }
}

/// Where the numbers came from.
fn describe(config: &AffNetConfig, overrides: &Overrides, note: &mut impl FnMut(&'static str, String, &str)) {
    let sides = |[height, width]: [usize; 2]| format!("{height}x{width}");
    let list = |values: &mut dyn Iterator<Item = usize>| {
        values.map(|value| value.to_string()).collect::<Vec<_>>().join(", ")
    };
    let source = |set: bool, otherwise: &'static str| if set { "override" } else { otherwise };
    note("image", sides(config.image), source(overrides.image.is_some(), "as published"));
    note("channels", config.channels.to_string(), "shapes");
    let layers = config.bottlenecks.iter().filter_map(|layers| layers.last());
    let widths = layers.chain(config.stages.iter().map(|stage| &stage.down)).map(|layer| layer.outputs);
    note("widths", list(&mut std::iter::once(config.stem).chain(widths)), "shapes");
    note("filters", list(&mut config.stages.iter().map(|stage| stage.blocks)), "tensor names");
    note("features", config.features.to_string(), "shapes");
    note("classes", config.classes.to_string(), "shapes");
    let released = "as in the released models";
    note("activation", config.activation.name().to_owned(), source(overrides.activation.is_some(), released));
    let norm = if config.norm == NormOver::Nothing { "tensor names" } else { released };
    note("norm", config.norm.name().to_owned(), source(overrides.norm.is_some(), norm));
    note("norm_eps", config.norm_eps.to_string(), source(overrides.norm_eps.is_some(), "the code's default"));
    let shrinkage = source(overrides.shrinkage.is_some(), "the code's default");
    note("shrinkage", config.threshold.to_string(), shrinkage);
    let transform = &config.transform;
    let set = overrides.mean.is_some() || overrides.std.is_some();
    note("mean, std", format!("{:?}, {:?}", transform.mean, transform.std), source(set, "the code's"));
    let set = overrides.crop_pct.is_some() || overrides.interpolation.is_some();
    let resize = format!("{:.3}, {}", transform.crop_pct, transform.interpolation.name());
    note("crop_pct, filter", resize, source(set, "CVNets' usual (AFFNet's own is not published)"));
}

/// What the tensors do not tell.
struct Settings {
    norm: NormOver,
    activation: Activation,
    threshold: f32,
    norm_eps: f32,
}

/// Reads tensors and remembers which.
struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    taken: BTreeSet<String>,
}

impl<'a> Reader<'a> {
    fn new(checkpoint: &'a Checkpoint) -> Self {
        Self { checkpoint, taken: BTreeSet::new() }
    }

    fn take(&mut self, name: String, expected: &[usize]) -> Result<Tensor> {
        if let Some(found) = self.checkpoint.shape(&name)
            && found != expected
        {
            let what = format!("has shape {}, expected {}", shape(found), shape(expected));
            return Err(self.checkpoint.error(&name, what));
        }
        let tensor = self.checkpoint.tensor(&name)?;
        self.taken.insert(name);
        Ok(tensor)
    }

    /// (outputs, inputs) of the convolution `layer.block.conv`.
    fn convolution_shape(&self, layer: &str) -> Result<[usize; 2]> {
        let name = format!("{layer}.block.conv.weight");
        match self.checkpoint.shape(&name) {
            None => Err(self.checkpoint.error(&name, "missing")),
            Some(&[outputs, inputs, _, _]) if outputs > 0 && inputs > 0 => Ok([outputs, inputs]),
            Some(other) => Err(self.checkpoint.error(
                &name,
                format!("has shape {}, expected (outputs, inputs, height, width)", shape(other)),
            )),
        }
    }

    /// Scale and shift that a batch norm of `width` channels is.
    fn batch_norm(&mut self, name: &str, width: usize) -> Result<[Vec<f64>; 2]> {
        let mut part = |part: &str| self.take(format!("{name}.{part}"), &[width]);
        let parts = [part("weight")?, part("bias")?, part("running_mean")?, part("running_var")?];
        // A count of batches seen, which nothing depends on.
        self.taken.insert(format!("{name}.num_batches_tracked"));
        batch_norm::scale_and_shift(&parts).map_err(|negative| {
            let what = format!("holds {negative}; a variance is at least 0");
            self.checkpoint.error(&format!("{name}.running_var"), what)
        })
    }

    /// Weight and bias of `layer.block.conv` with the batch norm behind it folded in.
    fn folded(&mut self, layer: &str, expected: &[usize]) -> Result<(Tensor, Tensor)> {
        let weight = self.take(format!("{layer}.block.conv.weight"), expected)?;
        let norm = self.batch_norm(&format!("{layer}.block.norm"), expected[0])?;
        batch_norm::fold(weight, &norm)
    }

    fn pointwise(&mut self, layer: &str, outputs: usize, inputs: usize) -> Result<Linear<Tensor>> {
        let (weight, bias) = self.folded(layer, &[outputs, inputs, 1, 1])?;
        Ok(Linear { weight: weight.reshape(&[outputs, inputs])?, bias: Some(bias) })
    }

    /// A pointwise convolution and how many outputs it has.
    fn pointwise_of(&mut self, layer: &str, inputs: usize) -> Result<(Linear<Tensor>, usize)> {
        let [outputs, _] = self.convolution_shape(layer)?;
        Ok((self.pointwise(layer, outputs, inputs)?, outputs))
    }

    fn bottleneck(
        &mut self,
        name: &str,
        stride: usize,
        settings: &Settings,
    ) -> Result<(Bottleneck, BottleneckParams<Tensor>)> {
        let layer = |layer: &str| format!("{name}.block.{layer}");
        let [hidden, inputs] = self.convolution_shape(&layer("exp_1x1"))?;
        let [outputs, _] = self.convolution_shape(&layer("red_1x1"))?;
        let numbers = Bottleneck { inputs, hidden, outputs, stride };
        let expand = self.pointwise(&layer("exp_1x1"), hidden, inputs)?;
        let (weight, bias) = self.folded(&layer("conv_3x3"), &[hidden, 1, 3, 3])?;
        let depthwise = Depthwise {
            weight: transposed(&weight, [hidden, 1, 9], |[o, _, tap]| tap * hidden + o)?
                .reshape(&[9, hidden])?,
            bias,
            stride,
            before: Some(settings.activation),
            activation: Some(settings.activation),
        };
        let reduce = self.pointwise(&layer("red_1x1"), outputs, hidden)?;
        Ok((numbers, BottleneckParams { expand, depthwise, reduce, residual: numbers.residual() }))
    }

    /// `layer_1` or `layer_2`; the first inverted residual of the second halves the grid.
    fn bottlenecks(
        &mut self,
        layer: usize,
        settings: &Settings,
    ) -> Result<(Vec<Bottleneck>, Vec<BottleneckParams<Tensor>>)> {
        let name = |i: usize| format!("layer_{layer}.{i}");
        let mut count = 1;
        while count < MOST_LAYERS
            && self.checkpoint.contains(&format!("{}.block.conv_3x3.block.conv.weight", name(count)))
        {
            count += 1;
        }
        let stride = |i: usize| if layer == 2 && i == 0 { 2 } else { 1 };
        let layers: Vec<_> =
            (0..count).map(|i| self.bottleneck(&name(i), stride(i), settings)).collect::<Result<_>>()?;
        Ok(layers.into_iter().unzip())
    }

    /// Which norm the blocks have: running statistics tell a batch norm, nothing tells the others apart.
    fn norm(&self, set: Option<NormOver>, name: &str) -> Result<NormOver> {
        let running = self.checkpoint.contains(&format!("{name}.running_mean"));
        match set {
            None if running => Ok(NormOver::Nothing),
            None => Ok(NormOver::Image),
            Some(norm) if (norm == NormOver::Nothing) == running => Ok(norm),
            Some(norm) => Err(self.checkpoint.error(
                &format!("{name}.running_mean"),
                format!(
                    "is {}, but norm={} {}",
                    if running { "there" } else { "missing" },
                    norm.name(),
                    if running { "has no running statistics" } else { "needs it" }
                ),
            )),
        }
    }

    fn norm_params(&mut self, name: &str, width: usize, settings: &Settings) -> Result<Norm<Tensor>> {
        let eps = settings.norm_eps;
        if settings.norm == NormOver::Nothing {
            let [scale, shift] = self.batch_norm(name, width)?;
            let tensor = |values: Vec<f64>| {
                Tensor::new(&[width], values.into_iter().map(|value| value as f32).collect())
            };
            return Ok(Norm { weight: tensor(scale)?, bias: Some(tensor(shift)?), eps });
        }
        let weight = self.take(format!("{name}.weight"), &[width])?;
        Ok(Norm { weight, bias: Some(self.take(format!("{name}.bias"), &[width])?), eps })
    }

    /// A stage's body, and the channels between of its inverted residuals.
    fn body(
        &mut self,
        prefix: &str,
        width: usize,
        settings: &Settings,
    ) -> Result<(AffBlockParams<Tensor>, usize)> {
        let name = |i: usize, part: &str| format!("{prefix}global_rep.{i}.{part}");
        let first = name(0, "filter.w1");
        if !width.is_multiple_of(GROUPS) {
            let what = format!("belongs to {width} channels, which are not {GROUPS} groups");
            return Err(self.checkpoint.error(&first, what));
        }
        let s = width / GROUPS;
        let mut layers = Vec::new();
        let mut between = 0;
        while layers.len() < MOST_LAYERS
            && (layers.is_empty() || self.checkpoint.contains(&name(layers.len(), "filter.w1")))
        {
            let i = layers.len();
            let norm1 = self.norm_params(&name(i, "norm1"), width, settings)?;
            let (numbers, mlp) = self.bottleneck(&name(i, "mlp"), 1, settings)?;
            if numbers.inputs != width || numbers.outputs != width || (i > 0 && numbers.hidden != between) {
                let what = format!(
                    "leads from {} over {} to {} channels, expected {width} to {width}{}",
                    numbers.inputs,
                    numbers.hidden,
                    numbers.outputs,
                    if i > 0 { format!(" over {between} as in the block before") } else { String::new() }
                );
                return Err(self.checkpoint.error(&name(i, "mlp.block.exp_1x1.block.conv.weight"), what));
            }
            between = numbers.hidden;
            let norm2 = self.norm_params(&name(i, "norm2"), width, settings)?;
            let filter = Frequency {
                w1: self.take(name(i, "filter.w1"), &[2, GROUPS, s, s])?,
                b1: self.take(name(i, "filter.b1"), &[2, GROUPS, s])?,
                w2: self.take(name(i, "filter.w2"), &[2, GROUPS, s, s])?,
                b2: self.take(name(i, "filter.b2"), &[2, GROUPS, s])?,
                activation: settings.activation,
                threshold: settings.threshold,
            };
            layers.push(AffLayerParams { norm1, mlp, norm2, filter });
        }
        let norm = self.norm_params(&format!("{prefix}global_rep.{}", layers.len()), width, settings)?;
        let proj = self.pointwise(&format!("{prefix}conv_proj"), width, width)?;
        let fusion = format!("{prefix}fusion");
        let fusion = if self.checkpoint.contains(&format!("{fusion}.block.conv.weight")) {
            let both = self.pointwise(&fusion, width, 2 * width)?;
            // Columns of the stage's input first, then those of `conv_proj`.
            let half = |first: usize| {
                let rows = both.weight.data().chunks(2 * width).flat_map(|row| &row[first..first + width]);
                Tensor::new(&[width, width], rows.copied().collect())
            };
            let (input, result) = (half(0)?, half(width)?);
            Some([Linear { weight: input, bias: both.bias }, Linear { weight: result, bias: None }])
        } else {
            None
        };
        Ok((AffBlockParams { layers, norm, proj, fusion }, between))
    }

    fn head(&mut self, features: usize) -> Result<(Linear<Tensor>, usize)> {
        let name = "classifier.fc.weight";
        let classes = match self.checkpoint.shape(name) {
            Some(&[classes, _]) if classes > 0 => classes,
            _ => return Err(self.checkpoint.error(name, "missing, or no matrix (classes, features)")),
        };
        let weight = self.take(name.to_owned(), &[classes, features])?;
        let bias = self.take("classifier.fc.bias".to_owned(), &[classes])?;
        Ok((Linear { weight, bias: Some(bias) }, classes))
    }

    /// Checks that nothing is left over.
    fn finish(&self) -> Result<()> {
        match self.checkpoint.names().find(|name| !self.taken.contains(*name)) {
            None => Ok(()),
            Some(name) => Err(self.checkpoint.error(name, "does not belong to an AFFNet; remove it")),
        }
    }
}

/// A tensor of three axes with its values put where `place` says.
fn transposed(tensor: &Tensor, [_, b, c]: [usize; 3], place: impl Fn([usize; 3]) -> usize) -> Result<Tensor> {
    let mut values = vec![0.0; tensor.data().len()];
    for (at, &value) in tensor.data().iter().enumerate() {
        values[place([at / (b * c), at / c % b, at % c])] = value;
    }
    Tensor::new(&[values.len()], values)
}
