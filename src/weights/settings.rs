//! The numbers of a model, each from the source that outranks the others, with a record of which one it was.

use super::{
    Checkpoint, ConfigFile, Family, Overrides, PositionResampling, Provenance,
    config::{Dimension, Hints},
    json::Sourced,
    overrides::{LARGEST_SIDE, MOST_PATCHES, interpolation},
    parameters::Skeleton,
    text::shown,
};
use crate::{
    Error, Result,
    image::{Interpolation, Transform},
    model::{Activation, Readout, Stem, TokensAttention, VitConfig},
};

/// Widths whose number of heads is a convention rather than width/64.
const KNOWN_HEADS: [(usize, usize); 10] = [
    (192, 3),
    (240, 4),
    (384, 6),
    (768, 12),
    (1024, 16),
    (1152, 16),
    (1280, 16),
    (1408, 16),
    (1536, 24),
    (1664, 16),
];

/// Width, depth and what residuals are divided by of the released LV-ViTs: nothing in a file tells.
const KNOWN_SKIPS: [(usize, usize, f32); 4] =
    [(240, 12, 1.0), (384, 16, 2.0), (512, 20, 2.0), (768, 24, 3.0)];
/// Widths of the LV-ViTs whose pictures are not cropped.
const UNCROPPED: [usize; 2] = [512, 768];

/// How a position table is laid out and what becomes of it.
#[derive(Debug)]
pub(super) struct Positions {
    /// Leading rows that belong to special tokens.
    pub(super) special: usize,
    /// The patches' rows, as a grid.
    pub(super) grid: [usize; 2],
    pub(super) mode: PositionResampling,
}

/// The model's numbers as resolved.
pub(super) struct Settings {
    pub(super) config: VitConfig,
    pub(super) positions: Positions,
    /// What the blocks' additions to the residual stream are divided by.
    pub(super) skip: f32,
    pub(super) provenance: Vec<Provenance>,
}

struct Resolver<'a> {
    file: &'a str,
    family: Family,
    skeleton: &'a Skeleton,
    overrides: &'a Overrides,
    config: Hints,
    metadata: Hints,
    provenance: Vec<Provenance>,
}

/// The first of an override, the configuration's and the metadata's value.
fn first<T>(set: Option<T>, config: Option<Sourced<T>>, metadata: Option<Sourced<T>>) -> Option<Sourced<T>> {
    set.map(|value| Sourced { value, source: "override".into() }).or(config).or(metadata)
}

impl Settings {
    pub(super) fn resolve(
        checkpoint: &Checkpoint,
        family: Family,
        skeleton: &Skeleton,
        config: Option<&ConfigFile>,
        overrides: &Overrides,
    ) -> Result<Self> {
        let resolver = Resolver {
            file: checkpoint.file(),
            family,
            skeleton,
            overrides,
            config: config.map(|config| Hints::of_config(config, family)).transpose()?.unwrap_or_default(),
            metadata: Hints::of_metadata(checkpoint)?,
            provenance: Vec::new(),
        };
        resolver.resolve()
    }
}

impl Resolver<'_> {
    fn resolve(mut self) -> Result<Settings> {
        let s = self.skeleton;
        self.claims()?;
        self.note("family", self.family.name(), "tensor names");
        let (positions, image) = self.positions()?;
        self.note("patch", sides(s.patch), "shapes");
        let stem = match s.stem {
            Stem::Patches => None,
            Stem::Convolutions { filters } => Some(format!("3 convolutions, {filters} filters")),
            Stem::TokensToToken { width, attention } => Some(match attention {
                TokensAttention::Transformer => format!("tokens to token, transformer, width {width}"),
                TokensAttention::Performer { features } => {
                    format!("tokens to token, performer, width {width}, {features} random features")
                }
            }),
        };
        if let Some(stem) = stem {
            self.note("stem", stem, "tensor names, shapes");
        }
        self.note("channels", s.channels.to_string(), "shapes");
        self.note("width", s.width.to_string(), "shapes");
        self.note("depth", s.depth.to_string(), "tensor names");
        let heads = self.heads()?;
        self.note("hidden", s.hidden.to_string(), "shapes");
        let activation = self.activation()?;
        let norm_eps = self.norm_eps();
        let skip = self.skip()?;
        let special =
            [("class", usize::from(s.class_token)), ("distillation", usize::from(s.distillation_token))];
        let tokens: Vec<_> =
            special.iter().filter(|(_, n)| *n > 0).map(|(name, _)| (*name).to_owned()).collect();
        let registers = (s.registers > 0).then(|| format!("{} registers", s.registers));
        let tokens: Vec<_> = tokens.into_iter().chain(registers).collect();
        self.note(
            "special tokens",
            if tokens.is_empty() { "none".into() } else { tokens.join(", ") },
            "tensor names",
        );
        let readout = self.readout()?;
        let classes = s.head.map_or(0, |[classes, _]| classes);
        let outputs = if self.family.is_clip() { "projection" } else { "classes" };
        self.note(outputs, classes.to_string(), "shapes");
        let labels = self.labels(classes)?;
        let transform = self.transform()?;
        let notes: Vec<_> = self.config.notes.drain(..).collect();
        for note in notes {
            self.note("remark", note.value, note.source);
        }
        let config = VitConfig {
            image,
            patch: s.patch,
            stem: s.stem,
            channels: s.channels,
            width: s.width,
            depth: s.depth,
            heads,
            hidden: s.hidden,
            compact: Vec::new(),
            activation,
            norm_eps,
            class_token: s.class_token,
            distillation_token: s.distillation_token,
            registers: s.registers,
            readout,
            classes,
            transform,
            labels,
        };
        config.check().map_err(|e| self.fail(e.to_string()))?;
        if let Some(head_dim) = s.head_dim.filter(|&d| d != config.head_dim()) {
            return Err(self.fail(format!(
                "{heads} heads of a model {} wide are {} wide each, but queries or keys are normalised over {head_dim}",
                s.width,
                config.head_dim()
            )));
        }
        Ok(Settings { config, positions, skip, provenance: self.provenance })
    }

    fn fail(&self, what: impl Into<String>) -> Error {
        Error::file(self.file, what)
    }

    fn note(&mut self, field: &'static str, value: impl Into<String>, source: impl Into<String>) {
        self.provenance.push(Provenance { field, value: shown(&value.into()), source: source.into() });
    }

    /// Numbers the configuration repeats must be the weights' own: otherwise it belongs to another file.
    fn claims(&self) -> Result<()> {
        let s = self.skeleton;
        for (dimension, claim) in self.config.claims.iter().chain(&self.metadata.claims) {
            let (name, actual) = match dimension {
                Dimension::Width => ("width", s.width),
                Dimension::Depth => ("depth", s.depth),
                Dimension::Hidden => ("MLP width", s.hidden),
                Dimension::Channels => ("number of input channels", s.channels),
                Dimension::PatchHeight => ("patch height", s.patch[0]),
                Dimension::PatchWidth => ("patch width", s.patch[1]),
                Dimension::Registers => ("number of register tokens", s.registers),
                // Without a head there is nothing to contradict: many files leave it out.
                Dimension::Classes => match s.head {
                    Some([classes, _]) => ("number of outputs", classes),
                    None => continue,
                },
            };
            if claim.value != actual {
                return Err(self.fail(format!(
                    "`{}` is {}, but the weights' {name} is {actual}; is the configuration that of another model?",
                    claim.source, claim.value
                )));
            }
        }
        for ratio in [&self.config.mlp_ratio, &self.metadata.mlp_ratio].into_iter().flatten() {
            let hidden = s.width as f64 * ratio.value;
            // Frameworks truncate; gated MLPs have rules of their own.
            if !s.gated && (hidden - s.hidden as f64).abs() >= 1.0 {
                return Err(self.fail(format!(
                    "`{}` is {}, but the weights' MLP is {} wide in a model of width {}; is the configuration that of \
                     another model?",
                    ratio.source, ratio.value, s.hidden, s.width
                )));
            }
        }
        Ok(())
    }

    fn architecture(&self) -> Option<&Sourced<String>> {
        self.config.architecture.as_ref().or(self.metadata.architecture.as_ref())
    }

    fn heads(&mut self) -> Result<usize> {
        let s = self.skeleton;
        let given = first(self.overrides.heads, self.config.heads.take(), self.metadata.heads.take());
        let Sourced { value, source } = match given {
            Some(given) => given,
            None => self.default_heads()?,
        };
        if value == 0 || !s.width.is_multiple_of(value) {
            return Err(self.fail(format!(
                "{value} heads ({source}) do not divide the width {}; set heads to a divisor",
                s.width
            )));
        }
        self.note("heads", value.to_string(), source);
        Ok(value)
    }

    fn default_heads(&self) -> Result<Sourced<usize>> {
        let width = self.skeleton.width;
        let from = |value, source: &str| Ok(Sourced { value, source: source.into() });
        if let Some(head_dim) = self.skeleton.head_dim {
            return from(width / head_dim, "width of the query or key norm");
        }
        if let Some(&(_, heads)) = KNOWN_HEADS.iter().find(|(known, _)| *known == width) {
            return from(heads, "usual for this width");
        }
        if width.is_multiple_of(64) {
            return from(width / 64, "width/64");
        }
        Err(self.fail(format!("nothing says how many heads a model {width} wide has; set heads")))
    }

    fn activation(&mut self) -> Result<Activation> {
        let set = self.overrides.activation;
        let named = self.config.activation.take();
        if self.skeleton.gated {
            // Hugging Face's DINOv2 ignores `hidden_act` when its MLP is gated.
            let ignored = self.family == Family::HuggingFaceDinov2;
            let named = named.filter(|_| !ignored);
            let named = named.as_ref().map(|name| (Activation::parse(&shown(&name.value)), &name.source[..]));
            let asked = set.map(|set| (Ok(set), "override")).or(named);
            if let Some((activation, source)) = asked {
                let activation = activation.map_err(|e| self.fail(format!("`{source}`: {e}")))?;
                if !matches!(activation, Activation::SwiGlu | Activation::Silu) {
                    return Err(self.fail(format!(
                        "`{source}` asks for {}, but the MLP is gated; only swiglu is supported there",
                        activation.name()
                    )));
                }
            }
            self.note("activation", Activation::SwiGlu.name(), "shapes (gated MLP)");
            return Ok(Activation::SwiGlu);
        }
        let quick =
            self.architecture().filter(|name| name.value.contains("quickgelu")).map(|a| a.source.clone());
        let (activation, source) = match (set, named, quick) {
            (Some(set), ..) => (set, "override".into()),
            (None, Some(named), _) => {
                let activation = Activation::parse(&shown(&named.value))
                    .map_err(|e| self.fail(format!("`{}`: {e}", named.source)))?;
                (activation, named.source)
            }
            (None, None, Some(source)) => (Activation::QuickGelu, source),
            (None, None, None) => {
                let usual = if self.family.is_clip() { Activation::QuickGelu } else { Activation::Gelu };
                (usual, self.family_default())
            }
        };
        if activation == Activation::SwiGlu {
            return Err(self.fail(format!(
                "swiglu ({source}) needs an MLP whose first layer has {} rows, it has {}",
                2 * self.skeleton.hidden,
                self.skeleton.hidden
            )));
        }
        self.note("activation", activation.name(), source);
        Ok(activation)
    }

    fn family_default(&self) -> String {
        format!("default of {}", self.family.name())
    }

    fn norm_eps(&mut self) -> f32 {
        let set = self.overrides.norm_eps.map(f64::from);
        let given = first(set, self.config.norm_eps.take(), self.metadata.norm_eps.take());
        let Sourced { value, source } = given.unwrap_or_else(|| {
            let value = match self.family {
                Family::HuggingFaceVit => 1e-12,
                Family::HuggingFaceClip | Family::OpenClip | Family::LvVit | Family::T2tVit => 1e-5,
                // timm's CLIP towers, which keep the norm before the blocks.
                Family::Timm if self.skeleton.norm_pre => 1e-5,
                _ => 1e-6,
            };
            Sourced { value, source: self.family_default() }
        });
        self.note("norm_eps", format!("{:e}", value as f32), source);
        value as f32
    }

    /// What residuals are divided by.
    fn skip(&mut self) -> Result<f32> {
        let s = self.skeleton;
        let set = self.overrides.skip_lam;
        if self.family != Family::LvVit {
            return match set {
                None => Ok(1.0),
                Some(skip) => Err(self.fail(format!(
                    "`skip_lam={skip}` does not apply: only LV-ViT divides its residuals; leave it out"
                ))),
            };
        }
        let known = KNOWN_SKIPS.iter().find(|(width, depth, _)| [*width, *depth] == [s.width, s.depth]);
        let (skip, source) = match (set, known) {
            (Some(skip), _) => (skip, "override"),
            (None, Some((.., skip))) => (*skip, "the released model of this size"),
            (None, None) => {
                return Err(self.fail(format!(
                    "nothing says what an LV-ViT of width {} and depth {} divides its residuals by; set skip_lam (the \
                     released models of other sizes have 1, 2 and 3)",
                    s.width, s.depth
                )));
            }
        };
        self.note("skip_lam", skip.to_string(), source);
        Ok(skip)
    }

    fn readout(&mut self) -> Result<Readout> {
        let s = self.skeleton;
        if let Some(name) = self.architecture().filter(|name| name.value.contains("_rpn_")) {
            return Err(self.fail(format!(
                "`{}` is {}: norms after the layers (res-post-norm) are not supported",
                name.source,
                shown(&name.value)
            )));
        }
        let both = s.head.is_some_and(|[_, inputs]| inputs == 2 * s.width);
        let pool = self.config.pool.take().filter(|pool| !pool.value.is_empty());
        let (readout, source) = match (self.overrides.readout, pool) {
            (Some(set), _) => (set, "override".into()),
            (None, Some(pool)) => match &pool.value[..] {
                "token" => (Readout::Class, pool.source),
                "avg" => (Readout::Mean, pool.source),
                "map" if s.attn_pool => (Readout::Attention, pool.source),
                other => {
                    return Err(self.fail(format!(
                        "`{}` is `{}`; supported are token and avg (set readout=class or readout=mean to use \
                         another one)",
                        pool.source,
                        shown(other)
                    )));
                }
            },
            (None, None) if s.aux_head && s.class_token => {
                (Readout::ClassAndAux, "tensor names (auxiliary head)".into())
            }
            (None, None) if both => (Readout::ClassAndMean, "shape of the head".into()),
            (None, None) if s.attn_pool => (Readout::Attention, "tensor names (attention pooling)".into()),
            (None, None) if s.fc_norm => (Readout::Mean, "tensor names (norm of the mean)".into()),
            (None, None) if !s.class_token => (Readout::Mean, "tensor names (no class token)".into()),
            (None, None) => (Readout::Class, self.family_default()),
        };
        if readout == Readout::ClassAndAux && !(s.aux_head && s.head.is_some()) {
            return Err(self.fail(format!(
                "readout class_and_aux ({source}) needs a head and an auxiliary head, and the file lacks one; set \
                 readout=class"
            )));
        }
        let inputs = if readout == Readout::ClassAndMean { 2 * s.width } else { s.width };
        let name = readout.name();
        if let Some([_, found]) = s.head.filter(|[_, found]| *found != inputs) {
            return Err(self
                .fail(format!("readout {name} ({source}) gives {inputs} features, the head reads {found}")));
        }
        if readout == Readout::ClassAndMean && s.fc_norm {
            return Err(self.fail("a norm of pooled features and readout class_and_mean do not go together"));
        }
        self.note("readout", name, source);
        Ok(readout)
    }

    fn labels(&mut self, classes: usize) -> Result<Option<Vec<String>>> {
        let labels = first(None, self.config.labels.take(), self.metadata.labels.take());
        let Some(Sourced { value, source }) = labels.filter(|_| classes > 0 && !self.family.is_clip()) else {
            return Ok(None);
        };
        if value.len() != classes {
            return Err(self.fail(format!(
                "`{source}` names {} classes, but the head has {classes} outputs",
                value.len()
            )));
        }
        self.note("labels", format!("{} names", value.len()), source);
        Ok(Some(value))
    }

    fn transform(&mut self) -> Result<Transform> {
        let clip = self.family.is_clip() || self.skeleton.norm_pre;
        let default = if clip { Transform::clip() } else { Transform::imagenet() };
        let usual = if clip { "default of CLIP" } else { "default (ImageNet)" };
        let uncropped = self.family == Family::LvVit && UNCROPPED.contains(&self.skeleton.width);
        let mean = first(self.overrides.mean.clone(), self.config.mean.take(), self.metadata.mean.take());
        let std = first(self.overrides.std.clone(), self.config.std.take(), self.metadata.std.take());
        let mean = self.per_channel("mean", mean, &default.mean, usual)?;
        let std = self.per_channel("std", std, &default.std, usual)?;
        if let Some(bad) = std.iter().find(|&&v| v <= 0.0) {
            return Err(self.fail(format!("std {bad} cannot be divided by; set std")));
        }

        let crop = first(self.overrides.crop_pct, self.config.crop_pct.take(), self.metadata.crop_pct.take());
        let Sourced { value: crop_pct, source } = crop.unwrap_or_else(|| {
            let (value, source) =
                if uncropped { (1.0, "the released model of this size") } else { (default.crop_pct, usual) };
            Sourced { value, source: source.into() }
        });
        if !(crop_pct > 0.0 && crop_pct <= 1.0) {
            return Err(
                self.fail(format!("crop_pct {crop_pct} ({source}) must lie above 0 and be at most 1"))
            );
        }
        self.note("crop_pct", crop_pct.to_string(), source);

        let (filter, source) = match (self.overrides.interpolation, self.config.interpolation.take()) {
            (Some(set), _) => (set, "override".into()),
            (None, Some(Sourced { value, source })) => match interpolation(&value) {
                Some(filter) => (filter, source),
                None => {
                    return Err(self.fail(format!(
                        "`{source}` is {}; pictures can be resized bilinear or bicubic, set interpolation to one of them",
                        shown(&value)
                    )));
                }
            },
            (None, None) => (default.interpolation, usual.into()),
        };
        let name = if filter == Interpolation::Bicubic { "bicubic" } else { "bilinear" };
        self.note("interpolation", name, source);
        Ok(Transform { crop_pct, interpolation: filter, mean, std })
    }

    /// One finite value per channel.
    fn per_channel(
        &mut self,
        field: &'static str,
        given: Option<Sourced<Vec<f32>>>,
        default: &[f32],
        usual: &str,
    ) -> Result<Vec<f32>> {
        let channels = self.skeleton.channels;
        let Sourced { mut value, source } = given.unwrap_or_else(|| Sourced {
            // Grey pictures: the average over the three channels.
            value: if channels == 1 {
                vec![default.iter().sum::<f32>() / default.len() as f32]
            } else {
                default.to_vec()
            },
            source: usual.into(),
        });
        if value.len() == 1 && source == "override" && channels <= 4 {
            value = vec![value[0]; channels];
        }
        if value.len() != channels || value.iter().any(|v| !v.is_finite()) {
            return Err(self.fail(format!(
                "{field} {} ({source}) must be {channels} finite numbers, one per input channel; set {field}",
                shown(&format!("{value:?}"))
            )));
        }
        self.note(field, format!("{value:?}"), source);
        Ok(value)
    }

    /// How the position table reads, and the input size.
    fn positions(&mut self) -> Result<(Positions, [usize; 2])> {
        let s = self.skeleton;
        let hinted = first(None, self.config.image.take(), self.metadata.image.take());
        for (name, sides) in [
            ("override", self.overrides.image),
            (hinted.as_ref().map_or("", |h| &h.source), hinted.as_ref().map(|h| h.value)),
        ] {
            if sides.is_some_and(|sides| sides.iter().any(|side| !(1..=LARGEST_SIDE).contains(side))) {
                return Err(self
                    .fail(format!("the image size ({name}) must lie between 1 and {LARGEST_SIDE} pixels")));
            }
        }
        let grid_of = |sides: [usize; 2]| [sides[0] / s.patch[0], sides[1] / s.patch[1]];
        let class = usize::from(s.class_token) + usize::from(s.distillation_token);
        let table = layout(
            s.positions,
            [class, 0, class + s.registers],
            hinted.as_ref().map(|h| grid_of(h.value)),
            self.overrides.image.map(grid_of),
        );
        let Some((special, grid)) = table else {
            return Err(self.fail(format!(
                "the position table has {} rows, which is no square grid with or without rows for the {} special tokens; \
                 set image to the size the model was trained at (height x width)",
                s.positions,
                class + s.registers
            )));
        };
        let trained = [grid[0].checked_mul(s.patch[0]), grid[1].checked_mul(s.patch[1])];
        let (image, source) = match (self.overrides.image, hinted, trained) {
            (Some(set), ..) => (set, "override".to_owned()),
            (None, Some(hinted), _) => (hinted.value, hinted.source),
            (None, None, [Some(height), Some(width)]) => {
                ([height, width], "shape of the position table".into())
            }
            (None, None, _) => return Err(self.fail("the position table is too large")),
        };
        let wanted = grid_of(image);
        if wanted[0].saturating_mul(wanted[1]).max(s.positions) > MOST_PATCHES {
            return Err(self.fail(format!(
                "{} patches are too many, at most {MOST_PATCHES} are supported",
                wanted[0].saturating_mul(wanted[1]).max(s.positions)
            )));
        }
        self.note("image", sides(image), source);
        let (mode, source) = match (self.overrides.position_antialias, self.family) {
            (Some(true), _) => (PositionResampling::Antialiased, "override".to_owned()),
            (Some(false), _) => (PositionResampling::Bicubic, "override".to_owned()),
            (None, Family::Dinov2 | Family::HuggingFaceDinov2) if s.registers > 0 => {
                (PositionResampling::Antialiased, self.family_default())
            }
            (None, Family::Dinov2) => (PositionResampling::Offset, self.family_default()),
            (None, _) => (PositionResampling::Bicubic, self.family_default()),
        };
        let rows = if special == 1 { "row" } else { "rows" };
        let table = format!("{} table, {special} {rows} for special tokens", sides(grid));
        if wanted == grid {
            self.note("positions", table, "shapes");
        } else {
            self.note(
                "positions",
                format!("{table}, resampled to {} ({})", sides(wanted), mode.name()),
                source,
            );
        }
        Ok((Positions { special, grid, mode }, image))
    }
}

/// `14x14`.
fn sides([height, width]: [usize; 2]) -> String {
    format!("{height}x{width}")
}

/// Splits the rows of a position table into special tokens and a grid: the configured grid if it fits, else a square,
/// else the grid of the size that was asked for; `counts` are the possible numbers of special rows, likeliest first.
fn layout(
    rows: usize,
    counts: [usize; 3],
    configured: Option<[usize; 2]>,
    asked: Option<[usize; 2]>,
) -> Option<(usize, [usize; 2])> {
    let fits = |grid: Option<[usize; 2]>| {
        let grid = grid.filter(|[height, width]| *height > 0 && *width > 0)?;
        let special = rows.checked_sub(grid[0].checked_mul(grid[1])?)?;
        counts.contains(&special).then_some((special, grid))
    };
    let square = || {
        counts.into_iter().find_map(|special| {
            let patches = rows.checked_sub(special).filter(|&patches| patches > 0)?;
            let side = patches.isqrt();
            (side * side == patches).then_some((special, [side, side]))
        })
    };
    fits(configured).or_else(square).or_else(|| fits(asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn position_tables_are_read_as_their_authors_meant() {
        // ViT, DeiT III, distilled DeiT, DINOv2 with registers, timm with positions for registers.
        assert_eq!(layout(197, [1, 0, 1], None, None), Some((1, [14, 14])));
        assert_eq!(layout(196, [1, 0, 1], None, None), Some((0, [14, 14])));
        assert_eq!(layout(198, [2, 0, 2], None, None), Some((2, [14, 14])));
        assert_eq!(layout(1370, [1, 0, 5], None, None), Some((1, [37, 37])));
        assert_eq!(layout(261, [1, 0, 5], None, None), Some((5, [16, 16])));
        // Rectangles need to be told; a configured one outranks squares, one that was asked for does not.
        assert_eq!(layout(49, [1, 0, 1], None, None), Some((0, [7, 7])));
        assert_eq!(layout(49, [1, 0, 1], Some([8, 6]), None), Some((1, [8, 6])));
        assert_eq!(layout(49, [1, 0, 1], None, Some([8, 6])), Some((0, [7, 7])));
        assert_eq!(layout(13, [1, 0, 1], None, Some([4, 3])), Some((1, [4, 3])));
        assert_eq!(layout(13, [1, 0, 1], None, None), None);
        assert_eq!(layout(1, [1, 0, 1], None, None), Some((0, [1, 1])));
        assert_eq!(layout(0, [1, 0, 1], Some([0, 0]), None), None);
    }
}
