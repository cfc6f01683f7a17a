//! Memory pools: attributes are kept, memory comes from the one device memory.

use super::context::device_zero;
use super::exports;
use super::ffi::{Code, Handle, Out, Status};
use super::state::{State, number, opaque};
use std::ffi::{c_int, c_uint, c_void};

/// Handle of the default pool.
const DEFAULT: usize = 0x200;

/// A pool.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pool {
    /// Values by attribute number, 1 to 8.
    values: [u64; 9],
}

impl State {
    pub(crate) fn add_default_pool(&mut self) {
        self.pools.insert(DEFAULT, Pool { values: [0, 1, 1, 1, 0, 0, 0, 0, 0] });
    }

    /// A pool handle given by the caller.
    pub(crate) fn pool(&mut self, pool: Handle) -> Status<&mut Pool> {
        self.pools.get_mut(&number(pool)).ok_or(Code::InvalidHandle)
    }
}

/// Whether the value of an attribute has 64 bits (else it is an int).
fn wide(attribute: c_uint) -> Status<bool> {
    match attribute {
        1..=3 => Ok(false),
        4..=8 => Ok(true),
        _ => Err(Code::NotSupported),
    }
}

exports! {
    /// The device's own pool.
    init fn cuDeviceGetDefaultMemPool(pool: Out<Handle>, device: c_int) |_| {
        device_zero(device)?;
        pool.set(opaque(DEFAULT))
    }

    /// The pool that allocations come from: the device's own.
    init fn cuDeviceGetMemPool(pool: Out<Handle>, device: c_int) |_| {
        device_zero(device)?;
        pool.set(opaque(DEFAULT))
    }

    /// Makes a pool the one that allocations come from: all share the device memory.
    init fn cuDeviceSetMemPool(device: c_int, pool: Handle) |s| {
        device_zero(device)?;
        s.pool(pool)?;
        Ok(())
    }

    /// A pool of its own; its properties are not looked at.
    ctx fn cuMemPoolCreate(pool: Out<Handle>, properties: *const c_void) |s| {
        pool.check()?;
        if properties.is_null() {
            return Err(Code::InvalidValue);
        }
        let handle = s.handle();
        s.pools.insert(handle, Pool { values: [0, 1, 1, 1, 0, 0, 0, 0, 0] });
        pool.set(opaque(handle))
    }

    /// Ends a pool.
    end fn cuMemPoolDestroy(pool: Handle) |s| {
        if number(pool) == DEFAULT {
            return Err(Code::InvalidValue);
        }
        s.pools.remove(&number(pool)).map(|_| ()).ok_or(Code::InvalidHandle)
    }

    /// Gives unused memory back: there is none.
    ctx fn cuMemPoolTrimTo(pool: Handle, keep: usize) |s| {
        let _ = keep;
        s.pool(pool)?;
        Ok(())
    }

    /// Changes an attribute.
    ctx fn cuMemPoolSetAttribute(pool: Handle, attribute: c_uint, value: *mut c_void) |s| {
        if value.is_null() {
            return Err(Code::InvalidValue);
        }
        let wide = wide(attribute)?;
        let values = &mut s.pool(pool)?.values;
        // SAFETY: not null, and the caller promised an int or a 64-bit value as the attribute has it.
        values[attribute as usize] = unsafe {
            if wide { value.cast::<u64>().read_unaligned() } else { u64::from(value.cast::<u32>().read_unaligned()) }
        };
        Ok(())
    }

    /// Reads an attribute.
    ctx fn cuMemPoolGetAttribute(pool: Handle, attribute: c_uint, value: *mut c_void) |s| {
        if value.is_null() {
            return Err(Code::InvalidValue);
        }
        let wide = wide(attribute)?;
        let used = s.device.memory.live_bytes();
        let stored = s.pool(pool)?.values[attribute as usize];
        let now = if attribute >= 5 { used } else { stored };
        // SAFETY: not null, and the caller promised room for an int or a 64-bit value as the attribute has it.
        unsafe {
            if wide { value.cast::<u64>().write_unaligned(now) } else { value.cast::<u32>().write_unaligned(now as u32) }
        }
        Ok(())
    }
}
