//! What a backend launches, written down: the table of launches behind profiles, and the dry pass of an engine's plan.

use std::cell::RefCell;

use cudarc::driver::CudaStream;

/// Something that a backend has enqueued on its stream, or would have.
///
/// ```no_run
/// use foveate::{Images, Pixels, Reduction, cuda::{Cuda, DType}, weights::{Overrides, load_vit_file}};
/// # fn main() -> foveate::Result<()> {
/// let vit = load_vit_file("deit_small.safetensors", &Overrides::default())?.build(Cuda::new(0, DType::F16)?)?;
/// let images = Images::new([1, 3, 224, 224], Pixels::U8(vec![0; 3 * 224 * 224]))?;
/// let (output, launches) = vit.backend().record(|| vit.forward(&images, &Reduction::None));
/// output?;
/// for launch in &launches {
///     println!("{:12} {:30} {:>10} bytes", launch.operation, launch.kernel, launch.bytes);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchRecord {
    /// The operation, by the name that its errors have: `attention`, `linear`, ...
    pub operation: &'static str,
    /// The kernel; `cublasLtMatmul`, `memcpy` or `memset` where it is none of this crate's.
    pub kernel: String,
    /// Blocks along three axes; 0 for what is no kernel of this crate.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block.
    pub shared_bytes: u32,
    /// Bytes of the tensors that the operation reads and writes, each counted once and none of its scratch memory: the least
    /// it can move. Where an operation takes several launches, the first has those of all, but for a nonlinearity behind a
    /// product, which has its own.
    pub bytes: u64,
    /// Multiply-adds, of matrix products (cuBLASLt) only.
    pub macs: u64,
    /// The model's block; absent before and behind the blocks, and where nobody said
    /// ([`Forecast`](super::Forecast) does).
    pub layer: Option<usize>,
}

/// Launches of one stream by one thread.
#[derive(Debug)]
struct Recording {
    /// The stream's handle.
    stream: usize,
    /// Nothing is to be launched.
    dry: bool,
    operation: &'static str,
    /// Bytes of tensors that no launch has taken yet.
    operands: u64,
    layer: Option<usize>,
    records: Vec<LaunchRecord>,
}

thread_local! {
    static RECORDINGS: RefCell<Vec<Recording>> = const { RefCell::new(Vec::new()) };
}

/// Ends the recording also when the work panics.
struct Guard(usize);

impl Drop for Guard {
    fn drop(&mut self) {
        RECORDINGS.with_borrow_mut(|recordings| recordings.truncate(self.0));
    }
}

fn key(stream: &CudaStream) -> usize {
    stream.cu_stream().addr()
}

/// Runs `work` and writes down what it launches on `stream` from this thread; `dry` launches nothing.
pub(super) fn record<R>(stream: &CudaStream, dry: bool, work: impl FnOnce() -> R) -> (R, Vec<LaunchRecord>) {
    let depth = RECORDINGS.with_borrow_mut(|recordings| {
        recordings.push(Recording {
            stream: key(stream),
            dry,
            operation: "",
            operands: 0,
            layer: None,
            records: Vec::new(),
        });
        recordings.len() - 1
    });
    let guard = Guard(depth);
    let result = work();
    let records = RECORDINGS
        .with_borrow_mut(|recordings| recordings.get_mut(depth).map(|own| std::mem::take(&mut own.records)));
    drop(guard);
    (result, records.unwrap_or_default())
}

/// The innermost recording, of this stream or of any.
fn on<R>(stream: Option<usize>, change: impl FnOnce(&mut Recording) -> R) -> Option<R> {
    RECORDINGS.with_borrow_mut(|recordings| {
        let mut found = recordings.iter_mut().rev();
        found.find(|recording| stream.is_none_or(|stream| recording.stream == stream)).map(change)
    })
}

/// An operation begins.
pub(super) fn operation(name: &'static str) {
    on(None, |recording| recording.operation = name);
}

/// A block of the model begins, or what belongs to none.
pub(super) fn layer(layer: Option<usize>) {
    on(None, |recording| recording.layer = layer);
}

/// A tensor of so many bytes is read or written by the operation.
pub(super) fn operand(stream: &CudaStream, bytes: usize) {
    on(Some(key(stream)), |recording| recording.operands += bytes as u64);
}

/// Whether this thread is within a dry pass over `stream`.
pub(super) fn is_dry(stream: &CudaStream) -> bool {
    on(Some(key(stream)), |recording| recording.dry).unwrap_or(false)
}

/// Something is about to be enqueued: `describe` fills in what it is. Returns whether to go on with it.
pub(super) fn launch(stream: &CudaStream, describe: impl FnOnce(&mut LaunchRecord)) -> bool {
    let go_on = on(Some(key(stream)), |recording| {
        let mut record = LaunchRecord {
            operation: recording.operation,
            kernel: String::new(),
            grid: [0; 3],
            block: 0,
            shared_bytes: 0,
            bytes: std::mem::take(&mut recording.operands),
            macs: 0,
            layer: recording.layer,
        };
        describe(&mut record);
        recording.records.push(record);
        !recording.dry
    });
    go_on.unwrap_or(true)
}
