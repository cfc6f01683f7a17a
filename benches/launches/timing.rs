//! Time by CUDA events, and what a device could do at most.

use cudarc::driver::{
    CudaEvent, CudaGraph,
    sys::{CUdevice_attribute as Attribute, CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode},
};
use foveate::{Error, Result};

use super::{Case, Launch, Place, Work, failed};

/// Launches of one captured graph: what the processor takes to start it is spread over them.
const CAPTURED: usize = 32;

/// A case's launches, captured in a graph, between two events.
///
/// They take turns at so many copies of the tensors that none of a copy is left in the second-level cache when its turn
/// comes again: what is timed comes from memory, as after the other layers of a model.
pub struct Timer {
    graph: CudaGraph,
    launches: usize,
    start: CudaEvent,
    end: CudaEvent,
    place: Place,
    /// What one launch must do.
    pub work: Work,
    /// Copies of the tensors.
    pub copies: usize,
    // The graph holds their addresses.
    _launches: Vec<Launch>,
}

impl Timer {
    /// Prepares a case as often as `peak` asks for, launches each copy once, and captures.
    ///
    /// # Errors
    /// When memory runs out or a launch is refused.
    pub fn new(place: &Place, case: &Case, peak: &Peak) -> Result<Self> {
        Self::of(place, peak, || case.prepare(place))
    }

    /// The same for launches that are no case of ours, on tensors of their own each.
    ///
    /// # Errors
    /// When memory runs out or a launch is refused.
    pub fn of(place: &Place, peak: &Peak, prepare: impl Fn() -> Result<Launch>) -> Result<Self> {
        let mut launches = vec![prepare()?];
        let copies = (2 * peak.cache_bytes).div_ceil(launches[0].work.bytes.max(1)).clamp(1, CAPTURED);
        for _ in 1..copies {
            launches.push(prepare()?);
        }
        launches.iter_mut().try_for_each(Launch::run)?;
        place.synchronize()?;
        let turns = CAPTURED.div_ceil(copies);
        let stream = &place.stream;
        stream
            .begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
            .map_err(|error| failed("capturing launches", error))?;
        let launched = (0..turns).try_for_each(|_| launches.iter_mut().try_for_each(Launch::run));
        // Capturing ends also when a launch failed, and the launch's error is the one to tell.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        launched?;
        let graph = graph.map_err(|error| failed("capturing launches", error))?.ok_or(Error::Driver {
            action: "capturing launches",
            what: "the driver gave no graph".to_owned(),
        })?;
        graph.upload().map_err(|error| failed("uploading a graph", error))?;
        let event = || {
            let timed = Some(CUevent_flags::CU_EVENT_DEFAULT);
            stream.context().new_event(timed).map_err(|error| failed("making an event", error))
        };
        let (start, end) = (event()?, event()?);
        let (work, count) = (launches[0].work, turns * copies);
        Ok(Self {
            graph,
            launches: count,
            start,
            end,
            place: place.clone(),
            work,
            copies,
            _launches: launches,
        })
    }

    /// Seconds of `count` launches, by the device's clock. So many graphs are launched as hold that many, and the time is
    /// scaled to the count.
    ///
    /// # Errors
    /// When the driver refuses or a launch failed.
    pub fn seconds(&self, count: u64) -> Result<f64> {
        let graphs = count.div_ceil(self.launches as u64).max(1);
        let fail = |error| failed("timing a graph", error);
        self.start.record(&self.place.stream).map_err(fail)?;
        for _ in 0..graphs {
            self.graph.launch().map_err(fail)?;
        }
        self.end.record(&self.place.stream).map_err(fail)?;
        let seconds = f64::from(self.start.elapsed_ms(&self.end).map_err(fail)?) / 1e3;
        Ok(seconds * count as f64 / (graphs * self.launches as u64) as f64)
    }
}

/// What a device could do at most, of what its driver says of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Bytes a second: memory clock times bus width times two transfers a clock. `None` where the driver does not say.
    pub bandwidth: Option<f64>,
    /// f32 operations a second outside matrix instructions: multiprocessors times clock times lanes times two.
    pub f32_flops: Option<f64>,
    /// Operations a second of f16 and bf16 matrix instructions with f32 sums.
    pub matrix_flops: Option<f64>,
    /// Bytes of the second-level cache.
    pub cache_bytes: usize,
}

impl Peak {
    /// Asks the driver.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn of(place: &Place) -> Result<Self> {
        let context = place.device.context();
        let ask = |attribute| {
            let value = context.attribute(attribute);
            value
                .map(|n| f64::from(n.max(0)))
                .map_err(|error| failed("asking for the device's properties", error))
        };
        let memory_clock = 1e3 * ask(Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE)?;
        let bus_bytes = ask(Attribute::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH)? / 8.0;
        let clock = 1e3 * ask(Attribute::CU_DEVICE_ATTRIBUTE_CLOCK_RATE)?;
        let processors = ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let cache_bytes = ask(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as usize;
        let major = ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32;
        let minor = ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32;
        let (lanes, matrix) = per_clock(major, minor).unzip();
        let rate = |per_clock: f64| Some(per_clock * processors * clock).filter(|&rate| rate > 0.0);
        Ok(Self {
            bandwidth: Some(2.0 * memory_clock * bus_bytes).filter(|&rate| rate > 0.0),
            f32_flops: lanes.and_then(|lanes| rate(2.0 * lanes)),
            matrix_flops: matrix.and_then(rate),
            cache_bytes,
        })
    }
}

/// f32 lanes of a multiprocessor, and the operations of its matrix units a clock, by compute capability: what NVIDIA's
/// architecture papers state for the fastest card of each. `GeForce` cards and some others do half with f32 sums, so a share
/// of this is never too high.
fn per_clock(major: u32, minor: u32) -> Option<(f64, f64)> {
    match (major, minor) {
        (8, 0) => Some((64.0, 2048.0)),
        (8 | 12, _) => Some((128.0, 1024.0)),
        (9, _) => Some((128.0, 4096.0)),
        (10, _) => Some((128.0, 8192.0)),
        _ => None,
    }
}
