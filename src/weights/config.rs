//! `config.json` and `preprocessor_config.json`, and what they say about a vision transformer.

use std::path::Path;

use serde_json::{Map, Value};

use super::{
    Checkpoint, Family,
    header::read_limited,
    json::{Object, Sourced, numbers},
    text::shown,
};
use crate::{Error, Result};

/// Longest configuration read. Class names of 21,843 classes take about 1 MB.
const LONGEST_CONFIG_BYTES: u64 = 16 << 20;

/// A `config.json` in timm's or Hugging Face's style, with the `preprocessor_config.json` beside it if there is one.
///
/// Opening checks the syntax; what the numbers mean, and whether they fit the weights, [`super::load_vit`] checks.
///
/// # Examples
/// ```
/// use foveate::weights::ConfigFile;
/// let config = ConfigFile::from_json("config.json", r#"{"model_type": "vit", "num_attention_heads": 3}"#)?;
/// assert_eq!(config.file(), "config.json");
/// assert!(ConfigFile::from_json("config.json", "[1, 2]").is_err());
/// # Ok::<(), foveate::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ConfigFile {
    file: String,
    config: Map<String, Value>,
    preprocessor: Option<(String, Map<String, Value>)>,
}

impl ConfigFile {
    /// The configuration that lies beside `checkpoint`, if there is one.
    ///
    /// # Errors
    /// When it is there but cannot be read, or is not a JSON object.
    pub fn beside(checkpoint: impl AsRef<Path>) -> Result<Option<Self>> {
        let directory = checkpoint.as_ref().parent().unwrap_or(Path::new(""));
        let (config, preprocessor) =
            (directory.join("config.json"), directory.join("preprocessor_config.json"));
        let found = if config.exists() {
            Self::open(&config)?
        } else if preprocessor.exists() {
            Self { file: config.display().to_string(), config: Map::new(), preprocessor: None }
        } else {
            return Ok(None);
        };
        if !preprocessor.exists() {
            return Ok(Some(found));
        }
        let text = read_limited(&preprocessor, LONGEST_CONFIG_BYTES)?;
        found.with_preprocessor(preprocessor.display().to_string(), &text).map(Some)
    }

    /// Reads a configuration file.
    ///
    /// # Errors
    /// When it cannot be read or is not a JSON object.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::from_json(path.display().to_string(), &read_limited(path, LONGEST_CONFIG_BYTES)?)
    }

    /// Reads a configuration from memory; `file` stands for it in messages.
    ///
    /// # Errors
    /// When `text` is not a JSON object.
    pub fn from_json(file: impl Into<String>, text: &str) -> Result<Self> {
        let file = file.into();
        let config = parse(&file, text)?;
        Ok(Self { file, config, preprocessor: None })
    }

    /// Adds the text of a `preprocessor_config.json`; `file` stands for it in messages.
    ///
    /// # Errors
    /// When `text` is not a JSON object.
    pub fn with_preprocessor(mut self, file: impl Into<String>, text: &str) -> Result<Self> {
        let file = file.into();
        let map = parse(&file, text)?;
        self.preprocessor = Some((file, map));
        Ok(self)
    }

    /// The file, as messages name it.
    pub fn file(&self) -> &str {
        &self.file
    }
}

fn parse(file: &str, text: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::file(file, "is not a JSON object")),
        Err(e) => Err(Error::file(file, format!("is not valid JSON: {}", shown(&e.to_string())))),
    }
}

/// A number of the architecture that the weights' shapes know as well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dimension {
    Width,
    Depth,
    Hidden,
    Channels,
    PatchHeight,
    PatchWidth,
    Registers,
    Classes,
}

/// What a configuration says. Names stay text until it is known that no override makes them irrelevant.
#[derive(Debug, Default)]
pub(super) struct Hints {
    pub(super) heads: Option<Sourced<usize>>,
    pub(super) image: Option<Sourced<[usize; 2]>>,
    pub(super) norm_eps: Option<Sourced<f64>>,
    pub(super) activation: Option<Sourced<String>>,
    pub(super) pool: Option<Sourced<String>>,
    pub(super) mean: Option<Sourced<Vec<f32>>>,
    pub(super) std: Option<Sourced<Vec<f32>>>,
    pub(super) crop_pct: Option<Sourced<f64>>,
    pub(super) interpolation: Option<Sourced<String>>,
    pub(super) labels: Option<Sourced<Vec<String>>>,
    pub(super) architecture: Option<Sourced<String>>,
    /// Numbers the weights must agree with.
    pub(super) claims: Vec<(Dimension, Sourced<usize>)>,
    /// The MLP's width over the model's, which plain MLPs must agree with.
    pub(super) mlp_ratio: Option<Sourced<f64>>,
    /// Deviations worth knowing that do not prevent the model from running.
    pub(super) notes: Vec<Sourced<String>>,
}

impl Hints {
    /// What `config` says about a model of `family`.
    pub(super) fn of_config(config: &ConfigFile, family: Family) -> Result<Self> {
        let root = Object::new(&config.file, "", &config.config);
        let mut hints = Self::default();
        // CLIP's configuration describes two towers.
        let tower = if family.is_clip() { root.object("vision_config")? } else { None };
        let body = tower.map_or(root, |map| Object::new(&config.file, "vision_config.", map));
        hints.hugging_face(&body)?;
        if family.is_clip() {
            hints.claim(Dimension::Classes, root.count("projection_dim")?);
        } else {
            hints.labels_of(&root)?;
            hints.claim(Dimension::Classes, root.count("num_labels")?);
            hints.claim(Dimension::Classes, root.count("num_classes")?);
        }
        hints.timm(&root)?;
        if let Some((file, map)) = &config.preprocessor {
            hints.preprocessor(&Object::new(file, "", map), family)?;
        }
        Ok(hints)
    }

    fn claim(&mut self, dimension: Dimension, value: Option<Sourced<usize>>) {
        self.claims.extend(value.map(|value| (dimension, value)));
    }

    fn claim_patch(&mut self, patch: Option<Sourced<[usize; 2]>>) {
        if let Some(Sourced { value: [height, width], source }) = patch {
            self.claims.push((Dimension::PatchHeight, Sourced { value: height, source: source.clone() }));
            self.claims.push((Dimension::PatchWidth, Sourced { value: width, source }));
        }
    }

    fn hugging_face(&mut self, body: &Object<'_>) -> Result<()> {
        self.heads = body.count("num_attention_heads")?;
        self.norm_eps = body.number("layer_norm_eps")?;
        self.activation = body.text("hidden_act")?.map(owned);
        self.image = body.sides("image_size")?;
        self.architecture = body.text("model_type")?.map(owned);
        self.claim(Dimension::Width, body.count("hidden_size")?);
        self.claim(Dimension::Depth, body.count("num_hidden_layers")?);
        self.claim(Dimension::Hidden, body.count("intermediate_size")?);
        self.claim(Dimension::Channels, body.count("num_channels")?);
        self.claim(Dimension::Registers, body.count("num_register_tokens")?);
        self.claim_patch(body.sides("patch_size")?);
        self.mlp_ratio = body.number("mlp_ratio")?;
        Ok(())
    }

    /// Class names: `id2label` (Hugging Face) or `label_names` with `label_descriptions` (timm).
    fn labels_of(&mut self, root: &Object<'_>) -> Result<()> {
        if let Some(map) = root.object("id2label")? {
            let mut labels = vec![None; map.len()];
            for (id, label) in map {
                let slot = id.parse().ok().and_then(|id: usize| labels.get_mut(id));
                let (Some(slot), Some(label)) = (slot, label.as_str()) else {
                    let what = format!(
                        "has the entry `{}`: {}; expected class numbers 0 to {} and their names",
                        shown(id),
                        shown(&label.to_string()),
                        map.len() - 1
                    );
                    return Err(root.error("id2label", what));
                };
                *slot = Some(label.to_owned());
            }
            // Two spellings of one number leave another one without a name.
            let Some(labels) = labels.into_iter().collect::<Option<Vec<String>>>() else {
                return Err(root.error("id2label", "names a class twice"));
            };
            // What Hugging Face writes when nobody named the classes.
            let placeholders = labels.iter().enumerate().all(|(id, label)| *label == format!("LABEL_{id}"));
            self.claim(
                Dimension::Classes,
                Some(Sourced { value: labels.len(), source: root.source("id2label") }),
            );
            if !placeholders {
                self.labels = Some(Sourced { value: labels, source: root.source("id2label") });
            }
        } else if let Some(mut names) = root.strings("label_names")? {
            // WordNet numbers become words where the file brings them.
            if let Some(descriptions) = root.object("label_descriptions")? {
                for name in &mut names.value {
                    if let Some(words) = descriptions.get(name.as_str()).and_then(Value::as_str) {
                        words.clone_into(name);
                    }
                }
            }
            self.labels = Some(names);
        }
        Ok(())
    }

    fn timm(&mut self, root: &Object<'_>) -> Result<()> {
        if let Some(architecture) = root.text("architecture")? {
            self.architecture = Some(owned(architecture));
        }
        self.claim(Dimension::Width, root.count("num_features")?);
        self.pool = root.text("global_pool")?.map(owned);
        // Older files keep these keys at the top.
        self.timm_transform(root)?;
        if let Some(map) = root.object("pretrained_cfg")? {
            self.timm_transform(&Object::new(root.file(), "pretrained_cfg.", map))?;
        }
        if let Some(map) = root.object("model_args")? {
            let args = Object::new(root.file(), "model_args.", map);
            replace(&mut self.heads, args.count("num_heads")?);
            replace(&mut self.image, args.sides("img_size")?);
            replace(&mut self.pool, args.text("global_pool")?.map(owned));
            replace(&mut self.activation, args.text("act_layer")?.map(owned));
            self.claim(Dimension::Width, args.count("embed_dim")?);
            self.claim(Dimension::Depth, args.count("depth")?);
            self.claim(Dimension::Channels, args.count("in_chans")?);
            self.claim(Dimension::Registers, args.count("reg_tokens")?);
            self.claim(Dimension::Classes, args.count("num_classes")?);
            self.claim_patch(args.sides("patch_size")?);
            replace(&mut self.mlp_ratio, args.number("mlp_ratio")?);
        }
        Ok(())
    }

    fn timm_transform(&mut self, object: &Object<'_>) -> Result<()> {
        if let Some(Sourced { value, source }) = object.counts("input_size")? {
            let [channels, height, width] = value[..] else {
                return Err(object.error("input_size", "must be three numbers: channels, height, width"));
            };
            self.claim(Dimension::Channels, Some(Sourced { value: channels, source: source.clone() }));
            self.image = Some(Sourced { value: [height, width], source });
        }
        replace(&mut self.mean, object.channels("mean")?);
        replace(&mut self.std, object.channels("std")?);
        replace(&mut self.crop_pct, object.number("crop_pct")?);
        replace(&mut self.interpolation, object.text("interpolation")?.map(owned));
        if let Some(Sourced { value, source }) =
            object.text("crop_mode")?.filter(|mode| mode.value != "center")
        {
            let value = format!("`{}` is not supported; the centre is cropped", shown(value));
            self.notes.push(Sourced { value, source });
        }
        Ok(())
    }

    fn preprocessor(&mut self, object: &Object<'_>, family: Family) -> Result<()> {
        self.mean = object.channels("image_mean")?.or(self.mean.take());
        self.std = object.channels("image_std")?.or(self.std.take());
        if let Some(Sourced { value: false, source }) = object.flag("do_normalize")? {
            let channels = self.mean.as_ref().map_or(3, |mean| mean.value.len());
            self.mean = Some(Sourced { value: vec![0.0; channels], source: source.clone() });
            self.std = Some(Sourced { value: vec![1.0; channels], source });
        }
        if let Some(Sourced { value, source }) = object.count("resample")? {
            // Pillow's numbers.
            let name = match value {
                0 => "nearest".into(),
                1 => "lanczos".into(),
                2 => "bilinear".into(),
                3 => "bicubic".into(),
                other => format!("resample {other}"),
            };
            self.interpolation = Some(Sourced { value: name, source });
        }
        let size = match object.is_object("size").then(|| object.object("size")).transpose()?.flatten() {
            Some(map) if map.contains_key("shortest_edge") => Object::new(object.file(), "size.", map)
                .count("shortest_edge")?
                .map(|edge| Sourced { value: [edge.value; 2], source: edge.source }),
            _ => object.sides("size")?,
        };
        let cropped = object.flag("do_center_crop")?.is_none_or(|flag| flag.value);
        let crop = if cropped { object.sides("crop_size")? } else { None };
        if let Some(resized) = &size {
            let crop = crop.as_ref().unwrap_or(resized);
            let (inner, outer) = (crop.value[0].min(crop.value[1]), resized.value[0].min(resized.value[1]));
            if inner == 0 || inner > outer {
                return Err(object.error("crop_size", format!("{inner} must lie between 1 and size {outer}")));
            }
            self.crop_pct = Some(Sourced { value: inner as f64 / outer as f64, source: crop.source.clone() });
        }
        // Hugging Face's DINOv2 resizes its positions to whatever comes; the other models insist on `image_size`.
        let input = crop.or(size);
        if family == Family::HuggingFaceDinov2 || self.image.is_none() {
            self.image = input.or(self.image.take());
        }
        Ok(())
    }

    /// What a checkpoint's own notes say: an `arch` object with the numbers, `mean` and `std` lists, `labels` separated
    /// by commas, timm's `architecture`. Other programs use these keys for other things, so a value of another form is
    /// passed over.
    pub(super) fn of_metadata(checkpoint: &Checkpoint) -> Result<Self> {
        let mut hints = Self::default();
        let note = |key: &str| checkpoint.metadata().get(key).map(|text| text.trim());
        let source = |key: &str| format!("metadata: {key}");
        let arch = note("arch").filter(|text| text.starts_with('{'));
        if let Some(text) = arch {
            let map = parse(&format!("{}: metadata `arch`", checkpoint.file()), text)?;
            let arch = Object::new(checkpoint.file(), "arch.", &map);
            let sourced =
                |key: &'static str| move |value: Sourced<_>| Sourced { source: source(key), ..value };
            hints.heads = arch.count("heads")?.map(sourced("arch.heads"));
            hints.norm_eps =
                arch.number("norm_eps")?.map(|v| Sourced { source: source("arch.norm_eps"), ..v });
            hints.image = arch.sides("img")?.map(|v| Sourced { source: source("arch.img"), ..v });
            hints.claim_patch(arch.sides("patch")?);
            hints.claim(Dimension::Channels, arch.count("in_chans")?.map(sourced("arch.in_chans")));
            hints.claim(Dimension::Width, arch.count("dim")?.map(sourced("arch.dim")));
            hints.claim(Dimension::Depth, arch.count("depth")?.map(sourced("arch.depth")));
            hints.claim(Dimension::Classes, arch.count("classes")?.map(sourced("arch.classes")));
            hints.mlp_ratio = arch.number("mlp")?.map(|v| Sourced { source: source("arch.mlp"), ..v });
            // The script that writes these notes trains on whole pictures.
            hints.crop_pct = Some(Sourced { value: 1.0, source: source("arch") });
        }
        let list = |key: &str| -> Option<Sourced<Vec<f32>>> {
            let value = numbers(&serde_json::from_str(note(key)?).ok()?)?;
            Some(Sourced { value, source: source(key) })
        };
        hints.mean = list("mean");
        hints.std = list("std");
        if let Some(value) = note("crop_pct").and_then(|text| text.parse().ok()) {
            hints.crop_pct = Some(Sourced { value, source: source("crop_pct") });
        }
        hints.labels = note("labels").filter(|text| !text.is_empty()).map(|text| Sourced {
            value: text.split(',').map(|label| label.trim().to_owned()).collect(),
            source: source("labels"),
        });
        hints.architecture = note("architecture")
            .or(note("arch").filter(|text| !text.starts_with('{')))
            .map(|text| Sourced { value: text.to_owned(), source: source("architecture") });
        Ok(hints)
    }
}

fn owned(text: Sourced<&str>) -> Sourced<String> {
    Sourced { value: text.value.to_owned(), source: text.source }
}

/// A later key outranks an earlier one, if it is there.
fn replace<T>(old: &mut Option<Sourced<T>>, new: Option<Sourced<T>>) {
    if new.is_some() {
        *old = new;
    }
}
