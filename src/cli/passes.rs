//! Batches of pictures through a model, and what is wanted of it on the host.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    time::{Duration, Instant},
};

use foveate::{
    Error, Images, Reduction, Result as FoveateResult, SourceMap, Tensor,
    backend::Backend,
    model::{AffNet, Output, Vit, affnet::AffOutput},
};

use super::{
    device::Runner,
    failure::Failure,
    inputs::{Batch, Batches},
    memory::forward,
};

/// From so many batches on, a device gets a graph to replay: making one takes about as long as two batches.
const WORTH_A_GRAPH: usize = 4;

/// What is wanted of a pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// The head's outputs.
    Logits,
    /// Them, and all that [`Details`] has.
    Everything,
}

/// The results of one pass, on the host.
pub(crate) struct Pass {
    /// The head's outputs, where there is one.
    pub(crate) logits: Option<Tensor>,
    /// The rest, if it is wanted.
    pub(crate) details: Option<Details>,
}

/// What there is besides logits.
pub(crate) struct Details {
    /// All final tokens, (B, M, C).
    pub(crate) tokens: Tensor,
    /// What the head reads.
    pub(crate) features: Tensor,
    /// How many patches each final token stands for; absent when nothing was reduced.
    pub(crate) sizes: Option<Tensor>,
    /// Where each token of the input ended up.
    pub(crate) map: SourceMap,
}

impl Pass {
    fn of<B: Backend>(backend: &B, output: &Output<B>, wanted: Wanted) -> FoveateResult<Self> {
        let host =
            |tensor: &Option<B::Tensor>| tensor.as_ref().map(|tensor| backend.download(tensor)).transpose();
        let details = || -> FoveateResult<Details> {
            Ok(Details {
                tokens: backend.download(&output.tokens)?,
                features: backend.download(&output.features)?,
                sizes: host(&output.sizes)?,
                map: output.source_map(backend)?,
            })
        };
        let details = (wanted == Wanted::Everything).then(details).transpose()?;
        Ok(Self { logits: host(&output.logits)?, details })
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn of_run(run: &foveate::cuda::Run<'_>, wanted: Wanted) -> FoveateResult<Self> {
        let details = || -> FoveateResult<Details> {
            Ok(Details {
                tokens: run.tokens()?,
                features: run.features()?,
                sizes: run.sizes()?,
                map: run.source_map()?,
            })
        };
        let details = (wanted == Wanted::Everything).then(details).transpose()?;
        Ok(Self { logits: run.logits()?, details })
    }
}

/// The results of one pass of an AFFNet, on the host.
pub(crate) struct GridPass {
    /// (B, classes).
    pub(crate) logits: Tensor,
    /// The last feature map and what the classifier reads, if they are wanted.
    pub(crate) details: Option<[Tensor; 2]>,
}

impl GridPass {
    fn of<B: Backend>(backend: &B, output: &AffOutput<B>, wanted: Wanted) -> FoveateResult<Self> {
        let details = || Ok([backend.download(&output.map)?, backend.download(&output.features)?]);
        let details = (wanted == Wanted::Everything).then(details).transpose()?;
        Ok(Self { logits: backend.download(&output.logits)?, details })
    }

    #[cfg(feature = "cuda")]
    pub(crate) fn of_run(
        run: &foveate::cuda::Run<'_, AffNet<foveate::cuda::Cuda>>,
        wanted: Wanted,
    ) -> FoveateResult<Self> {
        let details = || Ok([run.map()?.0, run.features()?]);
        let details = (wanted == Wanted::Everything).then(details).transpose()?;
        Ok(Self { logits: run.logits()?, details })
    }
}

/// What takes the results of a batch, with the pictures' names.
type Each<'a, P> = dyn FnMut(&[String], P) -> Result<(), Failure> + 'a;

/// Runs batch after batch through `infer` and hands what it makes of each to `each`, with the pictures' names. Returns how long
/// `infer` took.
pub(crate) fn one_by_one<R>(
    batches: &mut Batches<'_>,
    mut infer: impl FnMut(&Images) -> Result<R, Failure>,
    mut each: impl FnMut(&[String], R) -> Result<(), Failure>,
) -> Result<Duration, Failure> {
    let mut took = Duration::ZERO;
    for batch in batches {
        let Batch { names, images, .. } = batch?;
        let begun = Instant::now();
        let results = infer(&images)?;
        took += begun.elapsed();
        each(&names, results)?;
    }
    Ok(took)
}

/// Runs batch after batch through a model and hands the results to `each`, with the pictures' names. A device that has many of
/// them before it computes one while the next is decoded and copied. Returns how long it took: without decoding where it is
/// done in between, from the first batch to the last where it is done meanwhile.
pub(crate) fn through<B: Runner>(
    model: &Vit<B>,
    method: &Reduction,
    wanted: Wanted,
    batches: &mut Batches<'_>,
    mut each: impl FnMut(&[String], Pass) -> Result<(), Failure>,
) -> Result<Duration, Failure> {
    let stream: &mut Stream<'_, Pass> =
        &mut |size, images, results| B::stream(model, method, wanted, size, images, results);
    if let Some(took) = meanwhile(batches, stream, &mut each) {
        return took;
    }
    let infer = |images: &Images| Ok(Pass::of(model.backend(), &forward(model, images, method)?, wanted)?);
    one_by_one(batches, infer, each)
}

/// [`through`] of an AFFNet.
pub(crate) fn through_grid<B: Runner>(
    model: &AffNet<B>,
    wanted: Wanted,
    batches: &mut Batches<'_>,
    mut each: impl FnMut(&[String], GridPass) -> Result<(), Failure>,
) -> Result<Duration, Failure> {
    let stream: &mut Stream<'_, GridPass> =
        &mut |size, images, results| B::stream_grid(model, wanted, size, images, results);
    if let Some(took) = meanwhile(batches, stream, &mut each) {
        return took;
    }
    let infer = |images: &Images| Ok(GridPass::of(model.backend(), &model.forward(images)?, wanted)?);
    one_by_one(batches, infer, each)
}

/// Batches on their way in.
pub(crate) type Incoming<'a> = &'a mut dyn Iterator<Item = FoveateResult<Images>>;

/// What takes the results of one batch after the other.
pub(crate) type Outgoing<'a, P> = &'a mut dyn FnMut(P) -> FoveateResult<()>;

/// [`Runner::stream`] or [`Runner::stream_grid`] of a model, given the size of batches.
type Stream<'a, P> = dyn FnMut(usize, Incoming<'_>, Outgoing<'_, P>) -> Option<FoveateResult<()>> + 'a;

/// [`through`] where decoding is done meanwhile; nothing, and no batch taken, where the device cannot or the batches are few.
fn meanwhile<P>(
    batches: &mut Batches<'_>,
    stream: &mut Stream<'_, P>,
    each: &mut Each<'_, P>,
) -> Option<Result<Duration, Failure>> {
    if batches.expected() < WORTH_A_GRAPH {
        return None;
    }
    // Names wait here for their results. Our own errors cannot pass through the library: they wait here too.
    let (names, failed) = (RefCell::new(VecDeque::new()), RefCell::new(None));
    let began = Cell::new(None);
    let mut busy = Duration::ZERO;
    let stop = |failure: Failure| {
        failed.replace(Some(failure));
        Error::argument("batches", "stopped")
    };
    let size = batches.size();
    let mut images = batches.map(|batch| {
        let batch = batch.map_err(stop)?;
        names.borrow_mut().push_back(batch.names);
        began.set(began.get().or_else(|| Some(Instant::now())));
        Ok(batch.images)
    });
    let mut results = |pass: P| {
        let begun = Instant::now();
        let names = names.borrow_mut().pop_front().unwrap_or_default();
        let outcome = each(&names, pass).map_err(stop);
        busy += begun.elapsed();
        outcome
    };
    let outcome = stream(size, &mut images, &mut results)?;
    Some(match (failed.take(), outcome) {
        (Some(failure), _) => Err(failure),
        (None, Err(error)) => Err(error.into()),
        (None, Ok(())) => {
            Ok(began.get().map_or(Duration::ZERO, |began| began.elapsed().saturating_sub(busy)))
        }
    })
}
