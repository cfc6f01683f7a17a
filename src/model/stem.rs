//! What turns pixels into the patches' tokens.

use super::{Activation, Observer, Vit, VitConfig, map::TryMap, tokens_to_token::StageParams};
use crate::{
    Error, Images, Result, Tensor,
    backend::{Backend, Epilogue, Linear, Window},
};

/// How pixels become patch tokens. What a stem gives is one token for each patch, whatever it does before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stem {
    /// Each patch by itself, projected.
    #[default]
    Patches,
    /// Three convolutions with `ReLU`, then a projection of patches half as wide: LV-ViT (arXiv 2104.10858).
    Convolutions {
        /// Channels between them.
        filters: usize,
    },
    /// Overlapping windows made tokens, attended to and unfolded again, twice: T2T-ViT (arXiv 2101.11986).
    TokensToToken {
        /// Width of the tokens between.
        width: usize,
        /// How they attend to each other.
        attention: TokensAttention,
    },
}

/// The attention of T2T-ViT's tokens before the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokensAttention {
    /// One head of softmax attention.
    Transformer,
    /// Random features, linear in the number of tokens.
    Performer {
        /// How many.
        features: usize,
    },
}

/// A window and the grid that it moves over.
pub(crate) type Placed = (Window, [usize; 2]);

/// LV-ViT's convolutions.
const CONVOLUTIONS: [Window; 3] = [
    Window { kernel: 7, stride: 2, padding: 3 },
    Window { kernel: 3, stride: 1, padding: 1 },
    Window { kernel: 3, stride: 1, padding: 1 },
];

/// T2T-ViT's soft splits.
const SPLITS: [Window; 3] = [
    Window { kernel: 7, stride: 4, padding: 2 },
    Window { kernel: 3, stride: 2, padding: 1 },
    Window { kernel: 3, stride: 2, padding: 1 },
];
/// Side of the patch that the soft splits make a token of.
pub(crate) const SPLIT_PATCH: usize = 16;

impl Stem {
    /// The windows that the stem moves over the pixels, then over what it has made of them, for patches of this side; none
    /// where patches are cut out at once.
    pub(crate) fn windows(self, patch: usize) -> Vec<Window> {
        match self {
            Self::Patches => Vec::new(),
            Self::Convolutions { .. } => {
                let half = patch / 2;
                let project = Window { kernel: half, stride: half, padding: 0 };
                CONVOLUTIONS.into_iter().chain([project]).collect()
            }
            Self::TokensToToken { .. } => SPLITS.to_vec(),
        }
    }

    /// Inputs of the last projection, for patches of `patch` and so many channels of the image.
    pub(crate) fn projected(self, channels: usize, [height, width]: [usize; 2]) -> usize {
        match self {
            Self::Patches => channels * height * width,
            Self::Convolutions { filters } => filters * (height / 2) * (width / 2),
            Self::TokensToToken { width, .. } => SPLITS[2].taps() * width,
        }
    }
}

impl VitConfig {
    /// The windows of the stem with the grid that each moves over, the image first, and the grid behind the last.
    ///
    /// # Errors
    /// When a window finds no place.
    pub(crate) fn stem_grids(&self) -> Result<(Vec<Placed>, [usize; 2])> {
        let (mut grid, mut steps) = (self.image, Vec::new());
        for window in self.stem.windows(self.patch[0]) {
            steps.push((window, grid));
            grid = window.over(grid).ok_or_else(|| {
                Error::model(format!(
                    "images of {}x{} are too small for the model's stem; set image to a larger size",
                    self.image[0], self.image[1]
                ))
            })?;
        }
        Ok((steps, if self.stem == Stem::Patches { self.grid() } else { grid }))
    }

    /// The window that the stem moves over the pixels; none where patches are cut out.
    pub(crate) fn first_window(&self) -> Option<Window> {
        self.stem.windows(self.patch[0]).first().copied()
    }

    /// Values of an image that the stem's operations write and read, from the rows of pixels to the patches' tokens.
    pub fn stem_values(&self) -> u64 {
        let Ok((steps, [rows, columns])) = self.stem_grids() else { return 0 };
        let (patches, c) = ((rows * columns) as u64, self.width as u64);
        let places =
            |at: usize| steps.get(at).map_or(patches, |(_, [height, width])| (height * width) as u64);
        let row = |taps: usize| (self.channels * taps) as u64;
        match self.stem {
            Stem::Patches => {
                let row = row(self.patch[0] * self.patch[1]);
                patches * row + patches * (row + c)
            }
            Stem::Convolutions { filters } => {
                let (f, row) = (filters as u64, row(CONVOLUTIONS[0].taps()));
                let pixels = places(1) * row + places(1) * (row + f);
                pixels
                    + (places(1) + places(2)) * f
                    + (places(2) + places(3)) * f
                    + places(3) * f
                    + patches * c
            }
            Stem::TokensToToken { width, .. } => {
                let t = width as u64;
                let inputs = self.stage_inputs(t as usize).map(|inputs| inputs as u64);
                // Rows unfolded, normalised, packed; values copied, attention, projection, norm, MLP; the last rows unfolded.
                let stage = |n: u64, inputs: u64| n * (4 * inputs + 3 * t) + n * (2 + 4 + 3 + 2 + 2 + 3) * t;
                let last = patches * SPLITS[2].taps() as u64 * t;
                stage(places(1), inputs[0])
                    + stage(places(2), inputs[1])
                    + places(2) * t
                    + 2 * last
                    + patches * c
            }
        }
    }

    /// Inputs of T2T-ViT's stages for tokens of this width.
    pub(crate) fn stage_inputs(&self, width: usize) -> [usize; 2] {
        [SPLITS[0].taps() * self.channels, SPLITS[1].taps() * width]
    }

    /// Whether the stem's numbers fit the patches and the image.
    pub(super) fn check_stem(&self) -> Result<()> {
        let [height, width] = self.patch;
        match self.stem {
            Stem::Patches => return Ok(()),
            Stem::TokensToToken { width: tokens, attention } => {
                let features = !matches!(attention, TokensAttention::Performer { features: 0 });
                if tokens == 0 || !features || [height, width] != [SPLIT_PATCH; 2] {
                    return Err(Error::model(format!(
                        "a tokens-to-token stem of width {tokens} and patches of {height}x{width}: the width and the number of \
                         random features must not be 0, and patches must be {SPLIT_PATCH}x{SPLIT_PATCH}"
                    )));
                }
            }
            Stem::Convolutions { filters } => {
                if filters == 0 || height != width || height < 2 || !height.is_multiple_of(2) {
                    return Err(Error::model(format!(
                        "a stem of convolutions with {filters} filters and patches of {height}x{width}: there must be a filter, \
                         and patches must be square with an even side"
                    )));
                }
            }
        }
        let (_, grid) = self.stem_grids()?;
        if grid == self.grid() {
            return Ok(());
        }
        Err(Error::model(format!(
            "the stem makes {}x{} patches of images of {}x{}, patches of {height}x{width} would be {}x{}; set image to \
             multiples of the patch",
            grid[0],
            grid[1],
            self.image[0],
            self.image[1],
            self.grid()[0],
            self.grid()[1]
        )))
    }
}

/// The parameters of a stem before its last projection, which is [`VitParams::patch`](super::VitParams::patch).
#[derive(Clone, Debug)]
pub enum StemParams<T> {
    /// None.
    Patches,
    /// LV-ViT's convolutions with their batch norms folded in: (F, channels · 49) in the order of
    /// [`Backend::unfold_images`], then (F, 9·F) twice in that of [`Backend::unfold`].
    Convolutions([Linear<T>; 3]),
    /// T2T-ViT's two stages.
    TokensToToken(Box<[StageParams<T>; 2]>),
}

impl<T> StemParams<T> {
    /// The random features of performers, which are `f32` on every device.
    pub(super) fn features_mut(&mut self) -> impl Iterator<Item = &mut Option<T>> {
        let stages = if let Self::TokensToToken(stages) = self { &mut stages[..] } else { &mut [] };
        stages.iter_mut().map(|stage| &mut stage.features)
    }

    pub(super) fn try_map<U>(self, f: &mut dyn FnMut(T) -> Result<U>) -> Result<StemParams<U>> {
        Ok(match self {
            Self::Patches => StemParams::Patches,
            Self::Convolutions([one, two, three]) => {
                StemParams::Convolutions([one.try_map(f)?, two.try_map(f)?, three.try_map(f)?])
            }
            Self::TokensToToken(stages) => {
                let [one, two] = *stages;
                StemParams::TokensToToken(Box::new([one.try_map(f)?, two.try_map(f)?]))
            }
        })
    }

    /// Every tensor.
    pub fn tensors(&self) -> Vec<&T> {
        match self {
            Self::Patches => Vec::new(),
            Self::Convolutions(layers) => {
                layers.iter().flat_map(|layer| std::iter::once(&layer.weight).chain(&layer.bias)).collect()
            }
            Self::TokensToToken(stages) => stages.iter().flat_map(StageParams::tensors).collect(),
        }
    }
}

impl StemParams<Tensor> {
    /// Checks every shape against the numbers.
    pub(super) fn check(
        &self,
        config: &VitConfig,
        linear: impl Fn(&str, &Linear<Tensor>, usize, usize) -> Result<()>,
    ) -> Result<()> {
        match (self, config.stem) {
            (Self::Patches, Stem::Patches) => Ok(()),
            (Self::Convolutions(layers), Stem::Convolutions { filters }) => {
                let inputs = [config.channels, filters, filters];
                for (i, (layer, inputs)) in layers.iter().zip(inputs).enumerate() {
                    let taps = CONVOLUTIONS[i].taps();
                    linear(&format!("stem.{}", i + 1), layer, filters, taps * inputs)?;
                }
                Ok(())
            }
            (Self::TokensToToken(stages), Stem::TokensToToken { width, attention }) => {
                for (i, (stage, inputs)) in stages.iter().zip(config.stage_inputs(width)).enumerate() {
                    stage.check(i + 1, inputs, width, attention, &linear)?;
                }
                Ok(())
            }
            (_, stem) => {
                Err(Error::model(format!("the parameters of the stem are not those of {}", stem.name())))
            }
        }
    }
}

impl Stem {
    /// What `foveate info` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Patches => "patches",
            Self::Convolutions { .. } => "convolutions",
            Self::TokensToToken { attention: TokensAttention::Transformer, .. } => {
                "tokens to token, transformer"
            }
            Self::TokensToToken { attention: TokensAttention::Performer { .. }, .. } => {
                "tokens to token, performer"
            }
        }
    }
}

impl<B: Backend> Vit<B> {
    /// The rows that the stem's first layer works on.
    pub(super) fn input_rows(&self, images: &Images) -> Result<B::Tensor> {
        let (config, transform) = (self.config(), &self.config().transform);
        match config.first_window() {
            None => self.backend().patches(images, config.patch, &transform.mean, &transform.std),
            Some(window) => self.backend().unfold_images(images, window, &transform.mean, &transform.std),
        }
    }

    /// The patches' tokens without their positions, (B, patches, C), from the rows that the first layer works on.
    pub(super) fn patch_tokens(&self, rows: B::Tensor, observer: &mut impl Observer<B>) -> Result<B::Tensor> {
        let (backend, project) = (self.backend(), &self.params().patch);
        let (steps, _) = self.config().stem_grids()?;
        match &self.params().stem {
            StemParams::Patches => backend.linear(&rows, project.all(), Epilogue::None),
            StemParams::Convolutions([first, rest @ ..]) => {
                let relu = Epilogue::Activation(Activation::Relu);
                let mut x = backend.linear(&rows, first.all(), relu)?;
                // What is not needed any more makes room at once.
                drop(rows);
                for (layer, (window, grid)) in rest.iter().zip(&steps[1..]) {
                    x = backend.convolve(&x, *grid, *window, layer, Some(Activation::Relu))?;
                }
                let (window, grid) = steps[3];
                backend.convolve(&x, grid, window, project, None)
            }
            StemParams::TokensToToken(stages) => {
                let ((window, grid), (last, last_grid)) = (steps[1], steps[2]);
                let x = self.stage(rows, &stages[0])?;
                observer.stage(0, &x);
                let rows = backend.unfold(&x, grid, window)?;
                drop(x);
                let x = self.stage(rows, &stages[1])?;
                observer.stage(1, &x);
                backend.convolve(&x, last_grid, last, project, None)
            }
        }
    }
}
