//! The device without any C interface: memory, modules, launches, findings.

use crate::config::{Check, Config, Level, Model};
use crate::count::Counters;
use crate::count::json::append_report;
use crate::count::model::modelled_time;
use crate::lower::{self, LoadError, Module};
use crate::machine::inst::Kernel;
use crate::machine::launch::{self, Spec};
use crate::mem::{DEFINED, Kind, Memory, MemoryError, UNDEFINED};
use crate::ptx;
use crate::report::{Fault, Reports};
use std::fmt;
use std::sync::Arc;

/// One emulated device.
#[derive(Debug)]
pub struct Device {
    /// Settings; may be changed between launches.
    pub config: Config,
    /// Memory.
    pub memory: Memory,
    /// Findings.
    pub reports: Reports,
    /// The sticky fault: every later launch and copy fails with it.
    pub fault: Option<Fault>,
    /// Useful floating-point operations of the next launch, for its counters.
    pub expected_flops: Option<f64>,
    launches: u64,
}

/// A finished launch.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The kernel.
    pub kernel: Arc<Kernel>,
    /// Running number.
    pub ordinal: u64,
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub dynamic_shared: u32,
    /// What was counted.
    pub counters: Counters,
    /// A bound on the time it would take on the modelled device, in seconds; not a measurement.
    pub modelled_seconds: f64,
    /// The pipe that makes this bound.
    pub modelled_bound: &'static str,
    /// What the kernel printed.
    pub printed: String,
    /// Allocations it really read and wrote, by index.
    pub touched: Vec<(usize, bool, bool)>,
}

/// Why a launch or a copy did not happen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceError {
    /// An argument is wrong; the text says which.
    Invalid(String),
    /// An earlier launch, or this one, failed.
    Fault(Fault),
    /// More cooperative blocks than fit the device.
    TooManyBlocks(String),
    /// Memory.
    Memory(MemoryError),
}

impl fmt::Display for DeviceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(text) | Self::TooManyBlocks(text) => f.write_str(text),
            Self::Fault(fault) => write!(f, "a kernel failed: {fault:?}"),
            Self::Memory(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for DeviceError {}

/// Dimensions of a launch.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads.
    pub block: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub dynamic_shared: u32,
    /// Limit of dynamic shared memory set for the kernel (attribute 8), if any.
    pub max_dynamic_shared: Option<u32>,
    /// All blocks at once.
    pub cooperative: bool,
    /// Stream handle, for reports.
    pub stream: u64,
}

/// Blocks of a kernel that fit one multiprocessor at once (the usual occupancy rule).
pub fn blocks_per_sm(model: &Model, kernel: &Kernel, threads: u32, dynamic_shared: u32) -> u32 {
    if threads > 1024 {
        return 0;
    }
    let warps = threads.div_ceil(32).max(1);
    let by_threads = 2048 / (warps * 32);
    let registers = (kernel.registers.clamp(1, 255) * 32).next_multiple_of(256) * warps;
    let by_registers = 65536 / registers;
    let shared = kernel.shared_dynamic.saturating_add(dynamic_shared).saturating_add(1024);
    let by_shared = model.shared_per_sm / shared;
    by_threads.min(by_registers).min(by_shared).min(32)
}

impl Device {
    /// A device with nothing in it.
    pub fn new(config: Config) -> Self {
        let memory = Memory::new(config.memory_limit);
        let reports = Reports::new(&config);
        Self { config, memory, reports, fault: None, expected_flops: None, launches: 0 }
    }

    /// Parses and lowers PTX text.
    ///
    /// # Errors
    /// The text is not PTX that this device can run; the error names the line.
    pub fn load(&mut self, text: &str) -> Result<Module, LoadError> {
        let parsed = ptx::parse(text).map_err(|e| LoadError { line: e.line, message: e.message })?;
        lower::lower(&parsed, &mut self.memory)
    }

    /// Allocates device memory, undefined.
    ///
    /// # Errors
    /// Out of memory.
    pub fn allocate(&mut self, bytes: u64) -> Result<u64, DeviceError> {
        self.memory.allocate(bytes, Kind::Device, None).map_err(DeviceError::Memory)
    }

    /// Copies from the host.
    ///
    /// # Errors
    /// The range is not inside one live allocation (also reported).
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        let index = self.range(address, bytes.len() as u64, "write")?;
        let Some(index) = index else { return Ok(()) };
        let a = self.memory.get_mut(index);
        let at = (address - a.base) as usize;
        let (data, shadow) = a.parts_mut();
        data[at..at + bytes.len()].copy_from_slice(bytes);
        shadow[at..at + bytes.len()].fill(DEFINED);
        if bytes.len() as u64 == a.len {
            a.maybe_undefined = false;
        }
        Ok(())
    }

    /// Copies to the host; undefined bytes are reported (check `uninit`).
    ///
    /// # Errors
    /// The range is not inside one live allocation (also reported).
    pub fn read(&mut self, address: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        self.read_counting(address, out).map(|_| ())
    }

    /// [`Device::read`] that says how many of the bytes are undefined (0 when nobody wants to know).
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn read_counting(&mut self, address: u64, out: &mut [u8]) -> Result<usize, DeviceError> {
        let Some(index) = self.range(address, out.len() as u64, "read")? else { return Ok(0) };
        let a = self.memory.get(index);
        let at = (address - a.base) as usize;
        out.copy_from_slice(&a.bytes()[at..at + out.len()]);
        if a.maybe_undefined && self.config.level(Check::Uninit) != Level::Off {
            let undefined = a.shadow[at..at + out.len()].iter().filter(|&&s| s & UNDEFINED != 0).count();
            if undefined > 0 {
                let first = a.shadow[at..].iter().position(|&s| s & UNDEFINED != 0).unwrap_or(0);
                let lines = vec![
                    format!("Undefined bytes copied to the host: {undefined} of {}", out.len()),
                    format!("the first is byte {} of {}", at + first, a.label()),
                ];
                let level = self.config.level(Check::Uninit);
                self.reports.push(Check::Uninit, level, "", 0, &lines);
            }
            return Ok(undefined);
        }
        Ok(0)
    }

    /// The live allocation that holds the range; `None` for an empty one.
    ///
    /// # Errors
    /// There is none (also reported).
    pub fn range(&mut self, address: u64, len: u64, what: &str) -> Result<Option<usize>, DeviceError> {
        if len == 0 {
            return Ok(None);
        }
        if let Some(index) = self.memory.find(address, len) {
            return Ok(Some(index));
        }
        let text = self.memory.describe(address, len);
        let lines = vec![format!("Invalid host {what} of size {len} bytes"), text.clone()];
        self.reports.push(Check::Bounds, Level::Error, "", 0, &lines);
        Err(DeviceError::Invalid(text))
    }

    /// Blocks of a kernel that fit one multiprocessor at once.
    pub fn blocks_per_sm(&self, kernel: &Kernel, threads: u32, dynamic_shared: u32) -> u32 {
        blocks_per_sm(&self.config.model, kernel, threads, dynamic_shared)
    }

    /// Checks a launch as the driver does before anything runs.
    ///
    /// # Errors
    /// Dimensions, shared memory or parameters that the kernel or the device cannot have.
    pub fn check_launch(&self, kernel: &Kernel, shape: &Shape, params: usize) -> Result<(), DeviceError> {
        let invalid = |text: String| Err(DeviceError::Invalid(text));
        let limits =
            [("grid", shape.grid, [2_147_483_647, 65535, 65535]), ("block", shape.block, [1024, 1024, 64])];
        for (name, dims, limit) in limits {
            if (0..3).any(|i| dims[i] == 0 || dims[i] > limit[i]) {
                return invalid(format!("{name} dimensions {dims:?}: each must be 1 to {limit:?}"));
            }
        }
        let threads = shape.block.iter().map(|&n| u64::from(n)).product::<u64>();
        if threads > 1024 {
            return invalid(format!("{threads} threads in a block: at most 1024"));
        }
        if let Some(most) = kernel.maxntid
            && threads > most.iter().map(|&n| u64::from(n)).product()
        {
            return invalid(format!(
                "{threads} threads in a block: {} was compiled for at most {most:?}",
                kernel.name
            ));
        }
        if let Some(exactly) = kernel.reqntid
            && exactly != shape.block
        {
            return invalid(format!("block {:?}: {} was compiled for {exactly:?}", shape.block, kernel.name));
        }
        if kernel.sm > self.config.model.sm {
            return invalid(format!(
                "{} was compiled for sm_{}, the device is sm_{}",
                kernel.name, kernel.sm, self.config.model.sm
            ));
        }
        let opted = shape.max_dynamic_shared;
        if shape.dynamic_shared > opted.unwrap_or(49152) {
            return invalid(format!(
                "{} bytes of dynamic shared memory: the kernel's limit is {} (attribute MAX_DYNAMIC_SHARED_SIZE_BYTES)",
                shape.dynamic_shared,
                opted.unwrap_or(49152)
            ));
        }
        let total = u64::from(kernel.shared_dynamic) + u64::from(shape.dynamic_shared);
        let limit = if opted.is_some() {
            self.config.model.shared_opt_in
        } else {
            self.config.model.shared_opt_in.min(49152)
        };
        if total > u64::from(limit) {
            return invalid(format!(
                "{total} bytes of shared memory: at most {limit} without a higher limit set for the kernel"
            ));
        }
        if params as u64 != kernel.param_bytes {
            return invalid(format!(
                "{params} bytes of parameters: {} takes {}",
                kernel.name, kernel.param_bytes
            ));
        }
        let blocks = shape.grid.iter().map(|&n| u64::from(n)).product::<u64>();
        let fit = u64::from(self.blocks_per_sm(kernel, threads as u32, shape.dynamic_shared))
            * u64::from(self.config.model.sms);
        if shape.cooperative && blocks > fit {
            return Err(DeviceError::TooManyBlocks(format!(
                "{blocks} cooperative blocks: {fit} fit the device"
            )));
        }
        Ok(())
    }

    /// Runs a kernel. `params` are its parameter bytes at the kernel's offsets.
    ///
    /// # Errors
    /// The launch is invalid, or the device has failed before. A fault of this launch is *not* an error here: it is in
    /// [`Device::fault`] afterwards, as on hardware.
    pub fn launch(
        &mut self,
        kernel: &Arc<Kernel>,
        shape: &Shape,
        params: &[u8],
    ) -> Result<Launch, DeviceError> {
        if let Some(fault) = self.fault {
            return Err(DeviceError::Fault(fault));
        }
        self.check_launch(kernel, shape, params.len())?;
        self.launches += 1;
        let threads = shape.block.iter().product();
        let resident = u64::from(self.blocks_per_sm(kernel, threads, shape.dynamic_shared).max(1))
            * u64::from(self.config.model.sms);
        let spec = Spec {
            grid: shape.grid,
            block: shape.block,
            dynamic_shared: shape.dynamic_shared,
            params: params.to_vec(),
            cooperative: shape.cooperative,
            stream: shape.stream,
            ordinal: self.launches,
            resident,
        };
        for a in self.memory.all_mut() {
            (a.was_read, a.was_written) = (false, false);
        }
        let outcome = launch::run(kernel, &spec, &mut self.memory, &self.config, &mut self.reports);
        self.fault = outcome.fault;
        let all = self.memory.all().iter().enumerate();
        let touched = all
            .filter(|(_, a)| a.was_read || a.was_written)
            .map(|(i, a)| (i, a.was_read, a.was_written))
            .collect();
        let mut counters = outcome.counters;
        counters.useful_flops = self.expected_flops.take();
        let blocks = shape.grid.iter().map(|&n| u64::from(n)).product();
        let modelled = modelled_time(kernel, &counters, &self.config.model, blocks);
        let launch = Launch {
            kernel: Arc::clone(kernel),
            ordinal: self.launches,
            grid: shape.grid,
            block: shape.block,
            dynamic_shared: shape.dynamic_shared,
            counters,
            modelled_seconds: modelled.seconds,
            modelled_bound: modelled.bound,
            printed: outcome.printed,
            touched,
        };
        if let Some(path) = &self.config.report
            && let Err(error) = append_report(path, &launch.counters.json(&launch, &self.config))
        {
            let lines = vec![format!("Misuse: EMU_REPORT={path} cannot be written"), error.to_string()];
            self.reports.push(Check::Misuse, Level::Warn, &kernel.name, 0, &lines);
        }
        Ok(launch)
    }
}
