//! The launches that are counted, timed and profiled, defined once: `cargo xtask counters`, the benches and
//! `examples/launch_one.rs` take them from here.
//!
//! A shape is one line of [`SHAPES`]. An operation is one file beside this one and one line of [`OPERATIONS`]; it goes
//! through the launcher that users call, on tensors of its own.

mod activation;
mod attention;
mod cluster;
mod connectivity;
mod convolution;
mod frequency;
mod grid_norm;
mod head_norm;
mod linear;
mod matching;
mod merge;
mod norm;
mod patch;
mod performer;
mod plan;
mod predictor;
mod reduce;
mod score;
mod select;
mod softmax;
pub mod timing;
mod tokens;
mod unfold;
mod windows;

use std::{fmt, sync::Arc};

use cudarc::driver::{CudaSlice, CudaStream, DeviceRepr, DriverError, ValidAsZeroBits};
use foveate::{
    Error, Result,
    cuda::{DType, Device, Element},
};
use half::{bf16, f16};

/// What an operation is launched on: images, tokens of each, values of a token, attention heads. An operation leaves out what
/// it has no use for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Images.
    pub batch: usize,
    /// Tokens of each image.
    pub tokens: usize,
    /// Values of a token, all heads together.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "b{}n{}c{}h{}", self.batch, self.tokens, self.width, self.heads)
    }
}

const fn shape(tokens: usize, width: usize, heads: usize) -> Shape {
    Shape { batch: 1, tokens, width, heads }
}

/// Token counts of patches of 32, 16 (half of them pruned, all) and 14 pixels at 224, of 14 at 336 and at 518, as wide as
/// ViT-S; then ViT-B and CLIP's ViT-L.
pub const SHAPES: &[Shape] = &[
    shape(50, 384, 6),
    shape(99, 384, 6),
    shape(197, 384, 6),
    shape(257, 384, 6),
    shape(577, 384, 6),
    shape(1370, 384, 6),
    shape(197, 768, 12),
    shape(577, 1024, 16),
];

/// Feature maps of AFFNet at 256 pixels: 32x32, 16x16 and 8x8 positions as wide as the smallest and the largest variant.
const FEATURE_MAPS: &[Shape] = &[
    shape(1024, 64, 8),
    shape(256, 104, 8),
    shape(64, 144, 8),
    shape(1024, 128, 8),
    shape(256, 256, 8),
    shape(64, 320, 8),
];

/// Rows and columns of a feature map of so many positions, as square as it gets.
fn grid(positions: usize) -> [usize; 2] {
    let rows = (1..=positions).take_while(|rows| rows * rows <= positions);
    let rows = rows.filter(|&rows| positions.is_multiple_of(rows)).last().unwrap_or(1);
    [rows, positions / rows]
}

/// All operations, by the bench that times them.
pub const OPERATIONS: &[(&str, &[Operation])] = &[
    ("activation", activation::OPERATIONS),
    ("attention", attention::OPERATIONS),
    ("cluster", cluster::OPERATIONS),
    ("connectivity", connectivity::OPERATIONS),
    ("convolution", convolution::OPERATIONS),
    ("frequency", frequency::OPERATIONS),
    ("grid_norm", grid_norm::OPERATIONS),
    ("head_norm", head_norm::OPERATIONS),
    ("linear", linear::OPERATIONS),
    ("matching", matching::OPERATIONS),
    ("merge", merge::OPERATIONS),
    ("norm", norm::OPERATIONS),
    ("patch", patch::OPERATIONS),
    ("performer", performer::OPERATIONS),
    ("plan", plan::OPERATIONS),
    ("predictor", predictor::OPERATIONS),
    ("reduce", reduce::OPERATIONS),
    ("score", score::OPERATIONS),
    ("select", select::OPERATIONS),
    ("softmax", softmax::OPERATIONS),
    ("tokens", tokens::OPERATIONS),
    ("unfold", unfold::OPERATIONS),
    ("windows", windows::OPERATIONS),
];

/// Images of a counted launch: more than one, so that strides between images count.
const COUNTED_BATCH: usize = 2;
/// Images of a timed launch: enough to fill the largest card.
const TIMED_BATCH: usize = 64;

/// Values repeat after so many: a prime, so that rows do not.
const PERIOD: usize = 65_521;

const ALL_TYPES: &[DType] = &[DType::F16, DType::Bf16, DType::F32];
const HALVES: &[DType] = &[DType::F16, DType::Bf16];

/// On what an operation is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counted {
    /// Two images of each shape in its first type, and of a short and a long one in the others.
    Everywhere,
    /// One image as wide as ViT-S of up to so many tokens, in the other types of 197: the emulator takes seconds for work that
    /// grows with the square of the tokens.
    UpTo(usize),
    /// Nowhere: its kernels are a library's.
    Nowhere,
}

/// Something that launches.
#[derive(Clone, Copy)]
pub struct Operation {
    /// Its name in counters.json, in the benches and for `launch_one`.
    pub name: &'static str,
    /// The types of its tensors.
    pub types: &'static [DType],
    /// On what it is counted.
    pub counted: Counted,
    /// Whether the values of a token, or the heads, are part of what it does.
    by_width: bool,
    /// The shapes that it is counted and timed on.
    shapes: &'static [Shape],
    prepare: Prepare,
}

type Prepare = fn(&Place, DType, Shape) -> Result<Launch>;

impl Operation {
    const fn new(name: &'static str, types: &'static [DType], prepare: Prepare) -> Self {
        Self { name, types, counted: Counted::Everywhere, by_width: true, shapes: SHAPES, prepare }
    }

    const fn counted(self, counted: Counted) -> Self {
        Self { counted, ..self }
    }

    /// It has shapes of its own.
    const fn on(self, shapes: &'static [Shape]) -> Self {
        Self { shapes, ..self }
    }

    /// It does the same whatever the width.
    const fn of_any_width(self) -> Self {
        Self { by_width: false, ..self }
    }
}

/// An operation, a type and a shape.
#[derive(Clone, Copy)]
pub struct Case {
    /// What is launched.
    pub operation: &'static Operation,
    /// The type of its tensors.
    pub dtype: DType,
    /// Their shape.
    pub shape: Shape,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.operation.name, self.shape, self.dtype)
    }
}

impl Case {
    /// Allocates and fills the tensors; nothing of the operation itself is launched yet.
    ///
    /// # Errors
    /// When the shape is not one for the operation, or memory runs out.
    pub fn prepare(&self, place: &Place) -> Result<Launch> {
        (self.operation.prepare)(place, self.dtype, self.shape)
    }
}

/// The operation of a name.
pub fn operation(name: &str) -> Option<&'static Operation> {
    OPERATIONS.iter().flat_map(|(_, operations)| *operations).find(|operation| operation.name == name)
}

/// What is counted.
pub fn counted() -> Vec<Case> {
    let mut counted = Vec::new();
    for case in OPERATIONS.iter().flat_map(|(_, operations)| cases(operations, COUNTED_BATCH)) {
        let Case { operation, dtype, shape } = case;
        let (first, slim) = (dtype == operation.types[0], shape.width == SHAPES[0].width);
        let usual = operation.shapes == SHAPES;
        let chosen = if usual {
            slim && [197, 577].contains(&shape.tokens)
        } else {
            (shape.tokens, shape.width) == (operation.shapes[0].tokens, operation.shapes[0].width)
        };
        match operation.counted {
            Counted::Everywhere if first || chosen => counted.push(case),
            Counted::UpTo(most) if slim && shape.tokens <= most && (first || shape.tokens == 197) => {
                counted.push(Case { shape: Shape { batch: 1, ..shape }, ..case });
            }
            _ => {}
        }
    }
    counted
}

/// What the bench of a name times: all types on all shapes.
pub fn timed(bench: &str) -> Vec<Case> {
    let of_bench = OPERATIONS.iter().filter(|(name, _)| *name == bench);
    of_bench.flat_map(|(_, operations)| cases(operations, TIMED_BATCH)).collect()
}

fn cases(operations: &'static [Operation], batch: usize) -> Vec<Case> {
    let mut cases = Vec::new();
    for operation in operations {
        for &dtype in operation.types {
            let shapes =
                operation.shapes.iter().filter(|shape| operation.by_width || shape.width == SHAPES[0].width);
            cases.extend(shapes.map(|&shape| Case { operation, dtype, shape: Shape { batch, ..shape } }));
        }
    }
    cases
}

/// What a launch must do whatever its kernel does: the bytes of its tensors, each once, and its arithmetic.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    /// Bytes that must be read and written.
    pub bytes: usize,
    /// Multiplications and additions of products; 0 where memory is what counts.
    pub flops: usize,
    /// What does them.
    pub units: Units,
}

/// What multiplies and adds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Units {
    /// The f32 lanes of the multiprocessors.
    #[default]
    Lanes,
    /// Their matrix units.
    Matrix,
}

impl Units {
    /// Those of products of a type: f32 is multiplied as f32, without TF32.
    const fn of(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::Lanes,
            DType::F16 | DType::Bf16 => Self::Matrix,
        }
    }
}

/// A call of a launcher with its tensors, to be made again and again.
pub struct Launch {
    /// What it must do.
    pub work: Work,
    run: Box<dyn FnMut() -> Result<()>>,
}

impl Launch {
    /// A call, and what it must do.
    pub fn new(work: Work, run: impl FnMut() -> Result<()> + 'static) -> Self {
        Self { work, run: Box::new(run) }
    }

    /// Launches.
    ///
    /// # Errors
    /// The launcher's.
    pub fn run(&mut self) -> Result<()> {
        (self.run)()
    }
}

/// Where launches go.
#[derive(Clone)]
pub struct Place {
    /// The device with its kernels.
    pub device: Device,
    /// A stream of it.
    pub stream: Arc<CudaStream>,
}

impl Place {
    /// The device, and a new stream of it. Launches of a place can be captured: cudarc's event tracking is off, and all of
    /// them, and their tensors, use this one stream.
    ///
    /// # Errors
    /// When the driver refuses a stream.
    pub fn new(device: Device) -> Result<Self> {
        // SAFETY: everything that is allocated from here on is used on the one stream made below.
        unsafe { device.context().disable_event_tracking() };
        let stream = device.context().new_stream().map_err(|error| failed("making a stream", error))?;
        Ok(Self { device, stream })
    }

    /// `count` values in -1..1, the same for a seed in every run.
    fn values<T: Value>(&self, count: usize, seed: usize) -> Result<CudaSlice<T>> {
        self.upload(&host_values::<T>(count, seed))
    }

    fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        self.stream.clone_htod(values).map_err(|error| failed("copying to the device", error))
    }

    fn zeros<T: DeviceRepr + ValidAsZeroBits>(&self, count: usize) -> Result<CudaSlice<T>> {
        self.stream.alloc_zeros(count).map_err(|error| failed("allocating", error))
    }

    /// Waits for the stream.
    ///
    /// # Errors
    /// When a launch before it failed.
    pub fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(|error| failed("waiting for the launches", error))
    }
}

fn failed(action: &'static str, error: DriverError) -> Error {
    Error::Driver { action, what: format!("{error:?}") }
}

/// `count` values in -1..1, the same for a seed in every run.
pub fn host_values<T: Value>(count: usize, seed: usize) -> Vec<T> {
    let table: Vec<T> = (0..count.min(PERIOD)).map(|i| T::of(noise(i, seed))).collect();
    table.iter().copied().cycle().take(count).collect()
}

/// A value in -1..1 from a hash (splitmix64), so that no counter depends on a crate's random numbers.
fn noise(index: usize, seed: usize) -> f32 {
    let mut z = ((seed as u64) << 40).wrapping_add(index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
}

/// A storage type as the launches fill it.
pub trait Value: Element + ValidAsZeroBits + Unpin + 'static {
    /// The nearest value.
    fn of(x: f32) -> Self;
}

impl Value for f32 {
    fn of(x: f32) -> Self {
        x
    }
}

impl Value for f16 {
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
}

impl Value for bf16 {
    fn of(x: f32) -> Self {
        Self::from_f32(x)
    }
}

/// A type at run time becomes one at compile time: `by_type!(dtype, prepare(place, shape))`.
macro_rules! by_type {
    ($dtype:expr, $function:ident($($argument:expr),*)) => {
        match $dtype {
            foveate::cuda::DType::F32 => $function::<f32>($($argument),*),
            foveate::cuda::DType::F16 => $function::<half::f16>($($argument),*),
            foveate::cuda::DType::Bf16 => $function::<half::bf16>($($argument),*),
        }
    };
}
use by_type;
