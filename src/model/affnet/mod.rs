//! AFFNet: convolutions, and filters in the frequency domain as the global mixer (arXiv 2307.14008).
//!
//! There is no attention and no token to drop: methods of token reduction do not apply.

mod config;
mod params;
mod random;

use std::fmt;

pub use config::{AffNetConfig, AffStage, Bottleneck, GROUPS, names};
pub use params::{AffBlockParams, AffLayerParams, AffNetParams, BottleneckParams};
pub use random::random_params;

pub(crate) use config::transform;

use crate::{
    Error, Images, Result, Tensor,
    backend::{Backend, Epilogue, GridBackend, NormOver},
    model::Activation,
};
use params::Checker;

/// An AFFNet on a backend.
#[derive(Clone, Debug)]
pub struct AffNet<B: GridBackend> {
    backend: B,
    config: AffNetConfig,
    params: AffNetParams<B::Tensor>,
}

/// What a forward pass gives.
#[derive(Clone, Debug)]
pub struct AffOutput<B: Backend> {
    /// The last feature map, (B, positions, C): what `layer_5` gives.
    pub map: B::Tensor,
    /// Its grid.
    pub grid: [usize; 2],
    /// What the classifier reads, (B, F).
    pub features: B::Tensor,
    /// (B, classes).
    pub logits: B::Tensor,
}

/// Looks at feature maps while a model runs: the place, named as the official modules are (`layer_3.1.global_rep.0.norm1`),
/// and the map.
pub type Look<'a, B> = &'a mut dyn FnMut(&str, &<B as Backend>::Tensor);

/// Someone who may be looking, and where.
struct Watch<'a, 'b, B: Backend> {
    look: Option<Look<'a, B>>,
    place: &'b str,
}

impl<B: Backend> Watch<'_, '_, B> {
    fn see(&mut self, part: impl fmt::Display, map: &B::Tensor) {
        if let Some(look) = &mut self.look {
            look(&format!("{}{part}", self.place), map);
        }
    }
}

impl<B: GridBackend> AffNet<B> {
    /// A model from host parameters, moved to `backend`.
    ///
    /// # Errors
    /// When the numbers of `config` contradict each other or a parameter has another shape than they say.
    pub fn new(backend: B, config: AffNetConfig, params: AffNetParams<Tensor>) -> Result<Self> {
        config.check()?;
        Checker::check(&config, &params)?;
        let params = params.try_map(&mut |tensor| backend.upload(tensor))?;
        Ok(Self { backend, config, params })
    }

    /// The same parameters on another backend that can use them.
    pub(crate) fn on(&self, backend: B) -> Self {
        Self { backend, config: self.config.clone(), params: self.params.clone() }
    }

    /// The model's numbers.
    pub fn config(&self) -> &AffNetConfig {
        &self.config
    }

    /// The backend it runs on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Runs a batch of images of the model's input size.
    ///
    /// # Errors
    /// When the images have another size.
    pub fn forward(&self, images: &Images) -> Result<AffOutput<B>> {
        self.run(images, None)
    }

    /// Runs a batch with someone looking on.
    ///
    /// # Errors
    /// As [`AffNet::forward`].
    pub fn forward_observed(&self, images: &Images, look: Look<'_, B>) -> Result<AffOutput<B>> {
        self.run(images, Some(look))
    }

    fn run(&self, images: &Images, mut look: Option<Look<'_, B>>) -> Result<AffOutput<B>> {
        let config = &self.config;
        let [_, channels, height, width] = images.shape();
        if channels != config.channels || [height, width] != config.image {
            return Err(Error::model(format!(
                "the images are {height}x{width} with {channels} channels, the model takes {}x{} with {}",
                config.image[0], config.image[1], config.channels
            )));
        }
        let mut seen = |place: &str, map: &B::Tensor| {
            if let Some(look) = &mut look {
                look(place, map);
            }
        };
        let outcome = self.pixels(images).and_then(|pixels| self.forward_pixels(pixels, &mut seen));
        outcome.map_err(|error| {
            self.backend.explain(error, images.batch(), &|backend, batch| {
                let model = self.on(backend);
                model.forward_pixels(model.pixels(&images.blank(batch)?)?, &mut |_, _| {}).map(drop)
            })
        })
    }

    fn pixels(&self, images: &Images) -> Result<B::Tensor> {
        let transform = &self.config.transform;
        self.backend.patches(images, [1, 1], &transform.mean, &transform.std)
    }

    /// Runs from normalised pixels on, (B, H·W, channels).
    pub(crate) fn forward_pixels(&self, pixels: B::Tensor, seen: Look<'_, B>) -> Result<AffOutput<B>> {
        let (backend, config, params) = (&self.backend, &self.config, &self.params);
        let mut map = backend.convolution(&pixels, config.image, &params.stem)?;
        drop(pixels);
        seen("conv_1", &map);
        let grids = config.grids();
        let mut grid = grids[0];
        for (at, layers) in params.bottlenecks.iter().enumerate() {
            for layer in layers {
                map = bottleneck(backend, map, grid, layer)?;
                grid = if layer.depthwise.stride == 2 { grid.map(|side| side.div_ceil(2)) } else { grid };
            }
            seen(&format!("layer_{}", at + 1), &map);
        }
        for (at, (down, body)) in params.stages.iter().enumerate() {
            map = bottleneck(backend, map, grid, down)?;
            grid = grids[at + 3];
            let place = format!("layer_{}", at + 3);
            map = body.run(backend, config.norm, map, grid, Some(&mut *seen), &format!("{place}.1."))?;
            seen(&place, &map);
        }
        let activation = Epilogue::Activation(config.activation);
        let expanded = backend.linear(&map, params.expand.all(), activation)?;
        let features = backend.mean_tokens(&expanded, None, 0)?;
        drop(expanded);
        let logits = backend.linear(&features, params.head.all(), Epilogue::None)?;
        Ok(AffOutput { map, grid, features, logits })
    }
}

/// An inverted residual.
fn bottleneck<B: GridBackend>(
    backend: &B,
    x: B::Tensor,
    grid: [usize; 2],
    layer: &BottleneckParams<B::Tensor>,
) -> Result<B::Tensor> {
    let hidden = backend.linear(&x, layer.expand.all(), Epilogue::None)?;
    let hidden = backend.depthwise(&hidden, grid, &layer.depthwise)?;
    let add = if layer.residual { Epilogue::AddTo(x) } else { Epilogue::None };
    backend.linear(&hidden, layer.reduce.all(), add)
}

impl<T: Clone> AffBlockParams<T> {
    /// The stage's body on `backend`: blocks, a norm, a projection and, with `fusion`, the stage's input again; (B, H·W, C)
    /// on `grid` to the same. `look` sees the maps between, under the names of the official module.
    ///
    /// # Errors
    /// When `x` is no feature map on `grid` of the parameters' width.
    pub fn forward<B: GridBackend<Tensor = T>>(
        &self,
        backend: &B,
        norm: NormOver,
        x: T,
        grid: [usize; 2],
        look: Option<Look<'_, B>>,
    ) -> Result<T> {
        self.run(backend, norm, x, grid, look, "")
    }

    fn run<B: GridBackend<Tensor = T>>(
        &self,
        backend: &B,
        norm: NormOver,
        x: T,
        grid: [usize; 2],
        look: Option<Look<'_, B>>,
        place: &str,
    ) -> Result<T> {
        let mut watch = Watch::<B> { look, place };
        let input = self.fusion.as_ref().map(|_| x.clone());
        let mut map = x;
        for (at, layer) in self.layers.iter().enumerate() {
            let normed = backend.grid_norm(&map, norm, &layer.norm1)?;
            watch.see(format_args!("global_rep.{at}.norm1"), &normed);
            let mixed = bottleneck(backend, normed, grid, &layer.mlp)?;
            watch.see(format_args!("global_rep.{at}.mlp"), &mixed);
            let normed = backend.grid_norm(&mixed, norm, &layer.norm2)?;
            drop(mixed);
            watch.see(format_args!("global_rep.{at}.norm2"), &normed);
            map = backend.frequency(&normed, grid, &layer.filter, Some(&map))?;
            watch.see(format_args!("global_rep.{at}"), &map);
        }
        let normed = backend.grid_norm(&map, norm, &self.norm)?;
        drop(map);
        watch.see(format_args!("global_rep.{}", self.layers.len()), &normed);
        let projected = backend.linear(&normed, self.proj.all(), Epilogue::None)?;
        drop(normed);
        watch.see("conv_proj", &projected);
        let (Some(input), Some([first, second])) = (input, &self.fusion) else { return Ok(projected) };
        // One layer over both, its columns in two parts: nothing has to be copied side by side.
        let half = backend.linear(&input, first.all(), Epilogue::None)?;
        let sum = backend.linear(&projected, second.all(), Epilogue::AddTo(half))?;
        backend.activate(sum, self.activation())
    }

    /// The activation of the whole stage.
    fn activation(&self) -> Activation {
        self.layers.first().map_or(Activation::Silu, |layer| layer.filter.activation)
    }
}
