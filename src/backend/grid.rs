//! The operations of models whose tokens stay a grid: convolutions, norms over feature maps, the frequency filter.

use crate::{
    Result,
    backend::{Backend, Norm},
    model::Activation,
};

/// A 3x3 convolution that mixes channels: padding 1, `act(bias + sum of 9·I products)`.
#[derive(Clone, Debug)]
pub struct Convolution<T> {
    /// (9·I, O): rows in the order kernel row, kernel column, input channel.
    pub weight: T,
    /// (O).
    pub bias: T,
    /// 1 or 2 along both axes. A side of n becomes ceil(n/stride).
    pub stride: usize,
    /// What follows, if anything.
    pub activation: Option<Activation>,
}

/// A 3x3 convolution of each channel by itself: padding 1, zeros beyond the border.
#[derive(Clone, Debug)]
pub struct Depthwise<T> {
    /// (9, C): rows in the order kernel row, kernel column.
    pub weight: T,
    /// (C).
    pub bias: T,
    /// 1 or 2 along both axes. A side of n becomes ceil(n/stride).
    pub stride: usize,
    /// What happens to each input value first: the activation of the layer before, which then needs no pass of its own.
    pub before: Option<Activation>,
    /// What follows, if anything.
    pub activation: Option<Activation>,
}

/// An adaptive frequency filter (AFF, arXiv 2307.14008): a mask that a small complex network computes from the spectrum of
/// each group of channels, bin by bin, times that spectrum.
#[derive(Clone, Debug)]
pub struct Frequency<T> {
    /// First complex layer, (2, G, S, S): real and imaginary part, group, input, output.
    pub w1: T,
    /// Its bias, (2, G, S).
    pub b1: T,
    /// Second complex layer, as the first.
    pub w2: T,
    /// Its bias.
    pub b2: T,
    /// Between the layers, of real and imaginary parts by themselves: [`Activation::Silu`] or [`Activation::Relu`].
    pub activation: Activation,
    /// λ of the soft shrinkage of the mask's real and imaginary parts.
    pub threshold: f32,
}

/// Over what a norm of a feature map takes its statistics. Weight and bias are per channel always.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormOver {
    /// Mean and variance over all positions and channels of an image: `(x - mean)/sqrt(variance + eps)` (`layer_norm_2d`, a
    /// group norm of one group).
    Image,
    /// Mean and deviation over the channels of each position: `(x - mean)/(sqrt(variance) + eps)`, with epsilon outside the
    /// root (`layer_norm` of `CVNets`).
    Position,
    /// None: a scale and a shift, which is what `batch_norm` is once its running statistics are folded in.
    Nothing,
}

impl NormOver {
    /// The name in the official configuration, and of the setting `norm`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Image => "layer_norm_2d",
            Self::Position => "layer_norm",
            Self::Nothing => "batch_norm",
        }
    }

    /// The norm that the official configuration calls `name`.
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "layer_norm_2d" => Some(Self::Image),
            "layer_norm" => Some(Self::Position),
            "batch_norm" | "sync_batch_norm" => Some(Self::Nothing),
            _ => None,
        }
    }
}

/// What a backend adds to [`Backend`] to run models of feature maps ([`AffNet`](crate::model::AffNet)); the transformers need
/// nothing of it.
///
/// A feature map is a tensor of tokens, (B, H·W, C), position by position along the rows of the grid (H, W), so that a
/// pointwise convolution is [`Backend::linear`] and a global mean is [`Backend::mean_tokens`].
///
/// # Errors
/// Every operation returns [`crate::Error::Argument`] when shapes or ranges do not fit, and computes nothing then.
#[expect(clippy::missing_errors_doc, reason = "stated above, once for all operations")]
pub trait GridBackend: Backend {
    /// A dense 3x3 convolution, (B, H·W, I) → (B, H'·W', O).
    fn convolution(
        &self,
        x: &Self::Tensor,
        grid: [usize; 2],
        layer: &Convolution<Self::Tensor>,
    ) -> Result<Self::Tensor>;

    /// A depthwise 3x3 convolution, (B, H·W, C) → (B, H'·W', C).
    fn depthwise(
        &self,
        x: &Self::Tensor,
        grid: [usize; 2],
        layer: &Depthwise<Self::Tensor>,
    ) -> Result<Self::Tensor>;

    /// A norm of feature maps, (B, H·W, C) → (B, H·W, C).
    fn grid_norm(&self, x: &Self::Tensor, over: NormOver, norm: &Norm<Self::Tensor>) -> Result<Self::Tensor>;

    /// The nonlinearity of every value.
    fn activate(&self, x: Self::Tensor, activation: Activation) -> Result<Self::Tensor>;

    /// `x + residual + inverse(mask(X)·X)` with X the orthonormal real Fourier transform of each channel of `x`
    /// (B, H·W, C) over its grid, C = G·S. Any H and W, up to 4,096 on the CPU and 128 on CUDA.
    ///
    /// The masked spectrum is not Hermitian in the columns 0 and W/2. The inverse is a complex one along H, then a real one
    /// along W that ignores the imaginary parts of those two columns, which is what `NumPy` and `PyTorch` on the CPU do:
    /// each such column is replaced by its Hermitian part.
    fn frequency(
        &self,
        x: &Self::Tensor,
        grid: [usize; 2],
        filter: &Frequency<Self::Tensor>,
        residual: Option<&Self::Tensor>,
    ) -> Result<Self::Tensor>;
}
