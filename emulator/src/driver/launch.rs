//! Kernel launches.

use super::action::{Action, Done};
use super::exports;
use super::ffi::{Code, Handle, LaunchConfig, Status};
use super::state::{State, number};
use crate::device::{DeviceError, Shape};
use crate::machine::inst::Kernel;
use std::ffi::{c_uint, c_void};
use std::io::Write;
use std::sync::Arc;

/// `CU_LAUNCH_ATTRIBUTE_COOPERATIVE` and `_CLUSTER_DIMENSION`.
const COOPERATIVE: c_uint = 2;
const CLUSTER: c_uint = 4;

/// A kernel with all it needs to run, now or when a graph is launched.
#[derive(Debug)]
pub(crate) struct Call {
    function: usize,
    pub(crate) kernel: Arc<Kernel>,
    shape: Shape,
    params: Vec<u8>,
}

impl State {
    /// Whether a launch would be refused, and why.
    pub(crate) fn check_call(&mut self, call: &Call) -> Status {
        if !self.functions.contains_key(&call.function) {
            let lines = [format!("Invalid launch of {}: its module was unloaded", call.kernel.name)];
            return Err(self.refuse(Code::InvalidHandle, &lines));
        }
        let Err(error) = self.device.check_launch(&call.kernel, &call.shape, call.params.len()) else {
            return Ok(());
        };
        let lines = [format!("Invalid launch of {}: {error}", call.kernel.name)];
        Err(self.refuse(error.into(), &lines))
    }

    /// Runs a kernel that was checked. Its fault is returned by later calls, not by this one.
    pub(crate) fn run_call(&mut self, call: &Call, stream: usize) -> Status<Done> {
        let shape = Shape { stream: stream as u64, ..call.shape };
        let launch = match self.device.launch(&call.kernel, &shape, &call.params) {
            Ok(launch) => launch,
            Err(DeviceError::Fault(_)) => return Ok(Done::default()),
            Err(error) => return Err(error.into()),
        };
        if !launch.printed.is_empty() {
            let mut out = std::io::stdout().lock();
            // A closed output is no concern of the kernel.
            out.write_all(launch.printed.as_bytes()).and_then(|()| out.flush()).ok();
        }
        self.count_launch(&launch, stream);
        Ok(Done {
            accesses: launch.touched,
            seconds: launch.modelled_seconds,
            label: Some(format!("kernel {} (launch #{})", call.kernel.name, launch.ordinal)),
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn launch(
        &mut self,
        function: Handle,
        grid: [c_uint; 3],
        block: [c_uint; 3],
        dynamic_shared: c_uint,
        stream: Handle,
        values: *const *const c_void,
        extra: *const *const c_void,
        cooperative: bool,
    ) -> Status {
        let f = self.function(function)?.clone();
        if !extra.is_null() {
            return Err(Code::NotSupported);
        }
        let kernel = &f.kernel;
        let mut params = vec![0; kernel.param_bytes as usize];
        if values.is_null() && !kernel.params.is_empty() {
            let lines = [format!(
                "Invalid launch of {}: no parameters, it takes {}",
                kernel.name,
                kernel.params.len()
            )];
            return Err(self.refuse(Code::InvalidValue, &lines));
        }
        for (i, param) in kernel.params.iter().enumerate() {
            // SAFETY: the caller promised as many pointers as the kernel has parameters.
            let value = unsafe { values.add(i).read_unaligned() };
            if value.is_null() {
                let lines =
                    [format!("Invalid launch of {}: the pointer to parameter {i} is null", kernel.name)];
                return Err(self.refuse(Code::InvalidValue, &lines));
            }
            let (at, size) = (param.offset as usize, param.size as usize);
            // SAFETY: the caller promised that each pointer points to a value of its parameter's size.
            let value = unsafe { std::slice::from_raw_parts(value.cast::<u8>(), size) };
            params[at..at + size].copy_from_slice(value);
        }
        let shape =
            Shape { grid, block, dynamic_shared, max_dynamic_shared: f.max_dynamic, cooperative, stream: 0 };
        let call = Call { function: number(function), kernel: f.kernel, shape, params };
        self.enqueue(stream, Action::Kernel(Arc::new(call)))
    }
}

exports! {
    /// Launches a kernel.
    ctx fn cuLaunchKernel(
        function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, shared: c_uint, stream: Handle, values: *const *const c_void, extra: *const *const c_void
    ) |s| {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        s.launch(function, grid, block, shared, stream, values, extra, false)
    }

    /// Launches a kernel whose blocks all run at once.
    ctx fn cuLaunchCooperativeKernel(
        function: Handle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, shared: c_uint, stream: Handle, values: *const *const c_void
    ) |s| {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        s.launch(function, grid, block, shared, stream, values, std::ptr::null(), true)
    }

    /// Launches a kernel with attributes, of which only the cooperative one changes anything here.
    ctx fn cuLaunchKernelEx(
        config: *const LaunchConfig, function: Handle, values: *const *const c_void, extra: *const *const c_void
    ) |s| {
        if config.is_null() {
            return Err(Code::InvalidValue);
        }
        // SAFETY: not null, and the caller promised the structure.
        let config = unsafe { config.read_unaligned() };
        let mut cooperative = false;
        if config.count > 0 && config.attributes.is_null() {
            return Err(Code::InvalidValue);
        }
        for i in 0..config.count as usize {
            // SAFETY: the caller promised so many attributes.
            let attribute = unsafe { config.attributes.add(i).read_unaligned() };
            match attribute.id {
                COOPERATIVE => cooperative = attribute.value[0] != 0,
                CLUSTER if attribute.value[..3] != [1, 1, 1] => return Err(Code::NotSupported),
                _ => {}
            }
        }
        s.launch(function, config.grid, config.block, config.shared_bytes, config.stream, values, extra, cooperative)
    }
}
