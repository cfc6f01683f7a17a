//! Functions: attributes and occupancy.

use super::exports;
use super::ffi::{Code, Handle, LaunchConfig, Out, Status};
use super::state::{State, number, opaque};
use crate::machine::inst::Kernel;
use std::ffi::{CString, c_char, c_int, c_uint};
use std::sync::Arc;

/// Dynamic shared memory that needs no permission.
const FREE_SHARED: u32 = 49152;

/// A kernel handle's object.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    pub(crate) module: usize,
    pub(crate) kernel: Arc<Kernel>,
    /// Attribute 8, once set.
    pub(crate) max_dynamic: Option<u32>,
    carveout: c_int,
    name: CString,
}

/// Dynamic shared memory that a block of the given size wants.
type SharedOfBlock = Option<unsafe extern "C" fn(c_int) -> usize>;

impl Function {
    pub(crate) fn new(module: usize, kernel: Arc<Kernel>) -> Self {
        let name = CString::new(kernel.name.clone()).unwrap_or_default();
        Self { module, kernel, max_dynamic: None, carveout: -1, name }
    }

    /// Most threads a block may have.
    fn max_threads(&self) -> u32 {
        let declared = self.kernel.reqntid.or(self.kernel.maxntid);
        declared.map_or(1024, |n| n.iter().fold(1, |a: u32, &b| a.saturating_mul(b)).min(1024))
    }
}

impl State {
    /// A function handle given by the caller.
    pub(crate) fn function(&mut self, function: Handle) -> Status<&mut Function> {
        self.functions.get_mut(&number(function)).ok_or(Code::InvalidHandle)
    }

    pub(crate) fn function_attribute(&mut self, attribute: c_int, function: Handle) -> Status<c_int> {
        let opt_in = self.device.config.model.shared_opt_in;
        let sm = self.device.config.model.sm;
        let f = self.function(function)?;
        let kernel = &f.kernel;
        let int = |n: u64| c_int::try_from(n).unwrap_or(c_int::MAX);
        Ok(match attribute {
            0 => int(f.max_threads().into()),
            1 => int(kernel.shared_static.into()),
            2 => int(kernel.const_bytes),
            3 => int(kernel.local_bytes.into()),
            4 => int(kernel.registers.into()),
            5 => int(kernel.ptx_version.into()),
            6 => int(sm.into()),
            8 => {
                let default = FREE_SHARED.min(opt_in).saturating_sub(kernel.shared_dynamic);
                int(f.max_dynamic.unwrap_or(default).into())
            }
            9 => f.carveout,
            // Cache mode, clusters.
            7 | 10..=15 => 0,
            _ => return Err(Code::InvalidValue),
        })
    }

    pub(crate) fn set_function_attribute(
        &mut self,
        function: Handle,
        attribute: c_int,
        value: c_int,
    ) -> Status {
        let opt_in = self.device.config.model.shared_opt_in;
        let f = self.function(function)?;
        match attribute {
            8 => {
                let wanted = u32::try_from(value).map_err(|_| Code::InvalidValue)?;
                let total = f.kernel.shared_dynamic.checked_add(wanted).ok_or(Code::InvalidValue)?;
                if total > opt_in {
                    let lines = [format!(
                        "Invalid limit of dynamic shared memory for {}: {} static and {wanted} dynamic bytes, at most {opt_in} together",
                        f.kernel.name, f.kernel.shared_dynamic
                    )];
                    return Err(self.refuse(Code::InvalidValue, &lines));
                }
                f.max_dynamic = Some(wanted);
                Ok(())
            }
            9 if (-1..=100).contains(&value) => {
                f.carveout = value;
                Ok(())
            }
            _ => Err(Code::InvalidValue),
        }
    }

    fn blocks(&mut self, function: Handle, threads: c_int, dynamic: usize) -> Status<u32> {
        let f = self.function(function)?.clone();
        if !(1..=1024).contains(&threads) {
            return Err(Code::InvalidValue);
        }
        let limit = self.device.config.model.shared_opt_in as usize;
        let fits = dynamic.saturating_add(f.kernel.shared_dynamic as usize) <= limit;
        if !fits || threads as u32 > f.max_threads() {
            return Ok(0);
        }
        Ok(self.device.blocks_per_sm(&f.kernel, threads as u32, dynamic as u32))
    }

    /// The block size with the most threads on a multiprocessor, the largest one where several have, and the grid that fills the device.
    fn best_block(
        &mut self,
        function: Handle,
        shared_of: SharedOfBlock,
        dynamic: usize,
        limit: c_int,
    ) -> Status<(c_int, c_int)> {
        let most = self.function(function)?.max_threads() as c_int;
        let most = if limit > 0 { most.min(limit) } else { most };
        let mut best = (0, 0, 0);
        // Whole warps, from the largest block down, and the largest block itself.
        for threads in std::iter::once(most).chain((1..=most / 32).rev().map(|warps| warps * 32)) {
            let dynamic = shared_of.map_or(dynamic, |f| {
                // SAFETY: the caller promised a function of the block size.
                super::state::callback(|| unsafe { f(threads) })
            });
            let blocks = self.blocks(function, threads, dynamic)? as c_int;
            if blocks * threads > best.0 {
                best = (blocks * threads, threads, blocks);
            }
        }
        if best.1 == 0 {
            return Err(Code::InvalidValue);
        }
        Ok((best.2 * self.device.config.model.sms as c_int, best.1))
    }
}

exports! {
    /// One of a function's properties.
    ctx fn cuFuncGetAttribute(value: Out<c_int>, attribute: c_int, function: Handle) |s| {
        value.check()?;
        let found = s.function_attribute(attribute, function)?;
        value.set(found)
    }

    /// Sets the limit of dynamic shared memory (8) or the preferred division of the cache (9).
    ctx fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) |s| {
        s.set_function_attribute(function, attribute, value)
    }

    /// Preference between cache and shared memory: without effect.
    ctx fn cuFuncSetCacheConfig(function: Handle, config: c_int) |s| {
        s.function(function)?;
        if (0..=3).contains(&config) { Ok(()) } else { Err(Code::InvalidValue) }
    }

    /// The module of a function.
    ctx fn cuFuncGetModule(module: Out<Handle>, function: Handle) |s| {
        module.check()?;
        let handle = s.function(function)?.module;
        module.set(opaque(handle))
    }

    /// The symbol of a function; valid while its module is loaded.
    ctx fn cuFuncGetName(name: Out<*const c_char>, function: Handle) |s| {
        name.check()?;
        let text = s.function(function)?.name.as_ptr();
        name.set(text)
    }

    /// Offset and size of a parameter.
    ctx fn cuFuncGetParamInfo(function: Handle, index: usize, offset: Out<usize>, size: Out<usize>) |s| {
        let f = s.function(function)?;
        let param = f.kernel.params.get(index).ok_or(Code::InvalidValue)?;
        size.set_if_wanted(param.size as usize);
        offset.set(param.offset as usize)
    }

    /// Functions are loaded with their module.
    ctx fn cuFuncLoad(function: Handle) |s| {
        s.function(function)?;
        Ok(())
    }

    /// Blocks of a function that fit a multiprocessor.
    ctx fn cuOccupancyMaxActiveBlocksPerMultiprocessor(
        blocks: Out<c_int>, function: Handle, threads: c_int, dynamic: usize
    ) |s| {
        blocks.check()?;
        let n = s.blocks(function, threads, dynamic)?;
        blocks.set(n as c_int)
    }

    /// Blocks of a function that fit a multiprocessor.
    ctx fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        blocks: Out<c_int>, function: Handle, threads: c_int, dynamic: usize, flags: c_uint
    ) |s| {
        blocks.check()?;
        if flags > 1 {
            return Err(Code::InvalidValue);
        }
        let n = s.blocks(function, threads, dynamic)?;
        blocks.set(n as c_int)
    }

    /// The block size that fills the device best, and the smallest grid that fills it.
    ctx fn cuOccupancyMaxPotentialBlockSize(
        grid: Out<c_int>, block: Out<c_int>, function: Handle, shared_of: SharedOfBlock, dynamic: usize, limit: c_int
    ) |s| {
        grid.check()?;
        let (blocks, threads) = s.best_block(function, shared_of, dynamic, limit)?;
        block.set(threads)?;
        grid.set(blocks)
    }

    /// The block size that fills the device best, and the smallest grid that fills it.
    ctx fn cuOccupancyMaxPotentialBlockSizeWithFlags(
        grid: Out<c_int>, block: Out<c_int>, function: Handle, shared_of: SharedOfBlock, dynamic: usize, limit: c_int,
        flags: c_uint
    ) |s| {
        grid.check()?;
        if flags > 1 {
            return Err(Code::InvalidValue);
        }
        let (blocks, threads) = s.best_block(function, shared_of, dynamic, limit)?;
        block.set(threads)?;
        grid.set(blocks)
    }

    /// Dynamic shared memory that each of so many blocks on a multiprocessor can have.
    ctx fn cuOccupancyAvailableDynamicSMemPerBlock(bytes: Out<usize>, function: Handle, blocks: c_int, threads: c_int) |s| {
        bytes.check()?;
        let model = s.device.config.model;
        let f = s.function(function)?;
        if blocks < 1 || !(1..=1024).contains(&threads) {
            return Err(Code::InvalidValue);
        }
        let share = (model.shared_per_sm / blocks as u32).saturating_sub(1024) & !127;
        bytes.set(share.min(model.shared_opt_in).saturating_sub(f.kernel.shared_dynamic) as usize)
    }

    /// There are no clusters.
    ctx fn cuOccupancyMaxActiveClusters(clusters: Out<c_int>, function: Handle, config: *const LaunchConfig) |s| {
        let _ = config;
        clusters.set(0)?;
        s.function(function)?;
        Err(Code::NotSupported)
    }

    /// There are no clusters.
    ctx fn cuOccupancyMaxPotentialClusterSize(size: Out<c_int>, function: Handle, config: *const LaunchConfig) |s| {
        let _ = config;
        size.set(0)?;
        s.function(function)?;
        Err(Code::NotSupported)
    }
}
