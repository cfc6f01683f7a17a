//! The processor, fast: weights packed once, products, activations and norms in vector registers, attention in tiles that
//! stay in the cache, buffers that come back.
//!
//! [`Cpu`] is what the command runs on when there is no card. It is held to the plain [reference](crate::reference), operation
//! by operation and model by model. Results are the same bits for any number of threads, and as close to the reference's as
//! sums in another order are; they may differ in their last bits between instruction sets.

#![allow(
    clippy::inline_always,
    reason = "only inlined code is compiled for the instruction set that a kernel is run with"
)]

mod activation;
mod amx;
mod attention;
mod backend;
mod check;
mod cluster;
mod folded;
mod frequency;
mod gemm;
mod grid;
mod kept;
mod linear;
mod matching;
mod memory;
mod merge;
mod mlp;
mod norm;
mod pack;
mod pairs;
mod patch;
mod performer;
mod plan;
mod pool;
mod predictor;
mod products;
mod readout;
mod schedule;
mod score;
mod select;
mod simd;
mod softmax;
mod stem;
mod tensor;
mod threads;
mod timing;
mod windows;

use std::sync::{Arc, OnceLock};

pub use plan::Plan;
pub use products::Products;
pub use simd::Instructions;
pub use tensor::Tensor;

use self::{amx::Amx, pool::Pool, simd::Kernels, threads::Threads, timing::Timing};
use crate::{Error, Result, reference::Reference};

/// The processor as a backend: its threads, and the memory that forward passes use again and again. Clones share both.
///
/// ```
/// use foveate::{backend::{Backend, Epilogue, Linear}, cpu::Cpu, Tensor};
/// let cpu = Cpu::new();
/// let x = cpu.upload(Tensor::new(&[1, 1, 2], vec![1.0, 2.0])?)?;
/// let weight = cpu.upload(Tensor::new(&[1, 2], vec![10.0, 1.0])?)?;
/// let y = cpu.linear(&x, Linear { weight, bias: None }.all(), Epilogue::None)?;
/// assert_eq!(cpu.download(&y)?.data(), [12.0]);
/// # Ok::<(), foveate::Error>(())
/// ```
#[derive(Clone)]
pub struct Cpu {
    context: Arc<Context>,
}

/// What operations work with.
struct Context {
    threads: Threads,
    pool: Pool,
    kernels: Kernels,
    /// What multiplies bf16, where products are of bf16.
    amx: Option<Amx>,
    timing: Timing,
    /// Runs what is rare; its threads are started when it is first needed.
    plain: OnceLock<Reference>,
}

impl Cpu {
    /// A backend with as many threads as rayon's global pool has: one per core unless the program set it up otherwise. Where the
    /// operating system starts no more threads, the calling one works alone.
    pub fn new() -> Self {
        let threads = Threads::new(rayon::current_num_threads()).unwrap_or_else(|_| Threads::alone());
        Self::of(threads, Kernels::detect())
    }

    /// A backend with `threads` threads, the calling one among them.
    ///
    /// # Errors
    /// When `threads` is 0 or the operating system refuses to start them.
    pub fn with_threads(threads: usize) -> Result<Self> {
        Self::with(threads, Instructions::detect())
    }

    /// A backend with `threads` threads and other instructions than the best ones that the processor has, to compare.
    ///
    /// # Errors
    /// As [`Cpu::with_threads`], and when the processor does not have them.
    pub fn with(threads: usize, instructions: Instructions) -> Result<Self> {
        let kernels = instructions.checked()?;
        Ok(Self::of(Threads::new(threads)?, kernels))
    }

    fn of(threads: Threads, kernels: Kernels) -> Self {
        let (pool, timing, plain) = (Pool::default(), Timing::default(), OnceLock::new());
        Self { context: Arc::new(Context { threads, pool, kernels, amx: None, timing, plain }) }
    }

    /// The same with other factors of products. A backend that has clones leaves them theirs, and starts threads of its own.
    ///
    /// ```
    /// use foveate::cpu::{Cpu, Products};
    /// let cpu = match Products::Bf16.check() {
    ///     Ok(()) => Cpu::new().with_products(Products::Bf16)?,
    ///     Err(missing) => {
    ///         println!("{missing}");
    ///         Cpu::new()
    ///     }
    /// };
    /// # let _ = cpu;
    /// # Ok::<(), foveate::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the processor or the system lacks what they take; the message says what. When the operating system refuses to start
    /// threads.
    pub fn with_products(self, products: Products) -> Result<Self> {
        let amx = products.checked()?;
        let context = match Arc::try_unwrap(self.context) {
            Ok(context) => Context { amx, ..context },
            Err(shared) => {
                let threads = Threads::new(shared.threads.count())?;
                let (pool, timing, plain) = (Pool::default(), Timing::default(), OnceLock::new());
                Context { threads, pool, kernels: shared.kernels, amx, timing, plain }
            }
        };
        Ok(Self { context: Arc::new(context) })
    }

    /// What the factors of products are rounded to.
    pub fn products(&self) -> Products {
        if self.context.amx.is_some() { Products::Bf16 } else { Products::F32 }
    }

    /// How many threads the operations use.
    pub fn threads(&self) -> usize {
        self.context.threads.count()
    }

    /// The vector instructions in use.
    pub fn instructions(&self) -> Instructions {
        self.context.kernels.name()
    }

    /// Bytes that are kept for the next forward pass and not in use, those included that were never touched.
    pub fn idle_bytes(&self) -> usize {
        self.context.pool.idle_bytes()
    }

    /// Gives the memory that is kept for the next forward pass back to the system.
    pub fn release_memory(&self) {
        self.context.pool.clear();
    }

    /// Begins to measure how long operations take, by kind.
    pub fn start_timing(&self) {
        self.context.timing.start();
    }

    /// How long the operations of each kind have taken since [`Cpu::start_timing`], on the thread that asked for them.
    pub fn stop_timing(&self) -> Vec<(&'static str, std::time::Duration)> {
        self.context.timing.stop()
    }

    /// The plain backend for operations that have no fast form.
    fn plain(&self) -> Result<&Reference> {
        if let Some(plain) = self.context.plain.get() {
            return Ok(plain);
        }
        let plain = Reference::with_threads(self.threads())
            .map_err(|e| Error::argument("threads", format!("a second set of them was refused: {e}")))?;
        Ok(self.context.plain.get_or_init(|| plain))
    }
}

impl Default for Cpu {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = f.debug_struct("Cpu");
        out.field("threads", &self.threads())
            .field("instructions", &self.instructions())
            .field("products", &self.products())
            .finish_non_exhaustive()
    }
}
