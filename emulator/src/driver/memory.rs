//! Allocations: device memory, page-locked host memory, managed memory.

use super::exports;
use super::ffi::{Code, Handle, Out, Status};
use super::state::State;
use crate::device::DeviceError;
use crate::mem::{FILL, Kind};
use std::alloc::{Layout, alloc, dealloc};
use std::ffi::{c_int, c_uint, c_void};
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

/// Page-locked memory starts at multiples of this.
const PAGE: usize = 4096;

/// Where host memory that the device can use came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// cuMemHostAlloc.
    Locked,
    /// cuMemAllocManaged.
    Managed,
    /// cuMemHostRegister: it belongs to the program.
    Registered,
}

/// Host memory that the device can use.
#[derive(Debug)]
pub(crate) struct HostBlock {
    address: u64,
    layout: Layout,
    origin: Origin,
    flags: c_uint,
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        if self.origin != Origin::Registered {
            // SAFETY: it was allocated with this layout, and is freed once because blocks are not copied.
            unsafe { dealloc(with_exposed_provenance_mut(self.address as usize), self.layout) };
        }
    }
}

impl State {
    fn host_alloc(&mut self, bytes: usize, origin: Origin, flags: c_uint) -> Status<u64> {
        // The page-locked memory of a program that runs wild should not take the machine down.
        let used: u64 = self.host_blocks.values().map(|block| block.layout.size() as u64).sum();
        if used.saturating_add(bytes as u64) > self.device.memory.limit {
            return Err(Code::OutOfMemory);
        }
        let layout = Layout::from_size_align(bytes.max(1), PAGE).map_err(|_| Code::OutOfMemory)?;
        // SAFETY: the layout is not of size zero.
        let pointer = unsafe { alloc(layout) };
        if pointer.is_null() {
            return Err(Code::OutOfMemory);
        }
        let address = pointer.expose_provenance() as u64;
        // SAFETY: just allocated with this size; it stays until the block is dropped, which its registration does not outlive.
        unsafe {
            pointer.write_bytes(FILL, layout.size());
            self.device.memory.register_pinned(address, layout.size() as u64);
        }
        self.host_blocks.insert(address, HostBlock { address, layout, origin, flags });
        Ok(address)
    }

    /// Takes a block out of the tables; the caller drops it.
    fn host_release(&mut self, address: u64) -> Status<HostBlock> {
        let block = self.host_blocks.remove(&address).ok_or(Code::InvalidValue)?;
        if let Some(index) = self.device.memory.find(address, 1) {
            self.order.forget(index);
        }
        self.device.memory.free(address).ok();
        Ok(block)
    }

    /// Files a free of something that cannot be freed so.
    fn bad_free(&mut self, address: u64, call: &str) -> Code {
        let text = self.device.memory.describe(address, 1);
        let lines =
            [format!("Invalid free: {call} of what is not the start of a live allocation of its kind"), text];
        self.refuse(Code::InvalidValue, &lines)
    }

    /// The live device allocation that starts at an address.
    fn starts_at(&self, address: u64) -> Option<usize> {
        let index = self.device.memory.find(address, 1)?;
        let a = self.device.memory.get(index);
        (a.base == address && a.kind == Kind::Device).then_some(index)
    }

    fn allocate_on(&mut self, address: Out<u64>, bytes: usize, stream: Handle) -> Status {
        address.check()?;
        let key = self.resolve(stream)?;
        self.forbid_in_capture(key, "stream-ordered allocation")?;
        if bytes == 0 {
            return address.set(0);
        }
        let base = self.device.allocate(bytes as u64)?;
        let index = self.device.memory.find(base, 1).ok_or(Code::Unknown)?;
        self.enter(key, &format!("allocation of {bytes} bytes"), &[(index, false, true)], 0.0);
        address.set(base)
    }

    /// The allocation around an address, for queries about pointers.
    fn around(&self, address: u64) -> Status<usize> {
        self.device.memory.find(address, 1).ok_or(Code::InvalidValue)
    }
}

exports! {
    /// Device memory, undefined.
    ctx fn cuMemAlloc_v2(address: Out<u64>, bytes: usize) |s| {
        address.check()?;
        s.forbid_unsafe_call()?;
        if bytes == 0 {
            return Err(Code::InvalidValue);
        }
        let base = s.device.allocate(bytes as u64)?;
        address.set(base)
    }

    /// Rows of device memory, each at a multiple of 512 bytes.
    ctx fn cuMemAllocPitch_v2(address: Out<u64>, pitch: Out<usize>, width: usize, height: usize, element: c_uint) |s| {
        address.check()?;
        s.forbid_unsafe_call()?;
        let row = width.checked_next_multiple_of(512).ok_or(Code::OutOfMemory)?;
        let bytes = row.checked_mul(height).ok_or(Code::OutOfMemory)?;
        if bytes == 0 || !matches!(element, 4 | 8 | 16) {
            return Err(Code::InvalidValue);
        }
        pitch.set(row)?;
        let base = s.device.allocate(bytes as u64)?;
        address.set(base)
    }

    /// Gives device or managed memory back after all work has ended.
    end fn cuMemFree_v2(address: u64) |s| {
        if address == 0 {
            return Ok(());
        }
        s.forbid_unsafe_call()?;
        s.join_all();
        if s.host_blocks.get(&address).is_some_and(|block| block.origin == Origin::Managed) {
            return s.host_release(address).map(drop);
        }
        let Some(index) = s.starts_at(address) else { return Err(s.bad_free(address, "cuMemFree")) };
        s.order.forget(index);
        s.device.memory.free(address).map_err(|e| DeviceError::Memory(e).into())
    }

    /// Device memory in stream order.
    ctx fn cuMemAllocAsync(address: Out<u64>, bytes: usize, stream: Handle) |s| {
        if !s.device.config.pools {
            return Err(Code::NotSupported);
        }
        s.allocate_on(address, bytes, stream)
    }

    /// Device memory of a pool in stream order.
    ctx fn cuMemAllocFromPoolAsync(address: Out<u64>, bytes: usize, pool: Handle, stream: Handle) |s| {
        if !s.device.config.pools {
            return Err(Code::NotSupported);
        }
        s.pool(pool)?;
        s.allocate_on(address, bytes, stream)
    }

    /// Gives device memory back in stream order.
    end fn cuMemFreeAsync(address: u64, stream: Handle) |s| {
        if !s.device.config.pools {
            return Err(Code::NotSupported);
        }
        let key = s.resolve(stream)?;
        if address == 0 {
            return Ok(());
        }
        s.forbid_in_capture(key, "stream-ordered free")?;
        let Some(index) = s.starts_at(address) else { return Err(s.bad_free(address, "cuMemFreeAsync")) };
        let bytes = s.device.memory.get(index).len;
        s.enter(key, &format!("free of {bytes} bytes"), &[(index, false, true)], 0.0);
        s.order.forget(index);
        s.device.memory.free(address).map_err(|e| DeviceError::Memory(e).into())
    }

    /// Memory that host and device share, at one address.
    ctx fn cuMemAllocManaged(address: Out<u64>, bytes: usize, flags: c_uint) |s| {
        address.check()?;
        if bytes == 0 || !matches!(flags, 1 | 2) {
            return Err(Code::InvalidValue);
        }
        s.forbid_unsafe_call()?;
        let base = s.host_alloc(bytes, Origin::Managed, flags)?;
        address.set(base)
    }

    /// Page-locked host memory, also known to the device at its address.
    ctx fn cuMemHostAlloc(pointer: Out<*mut c_void>, bytes: usize, flags: c_uint) |s| {
        pointer.check()?;
        if flags & !7 != 0 {
            return Err(Code::InvalidValue);
        }
        s.forbid_unsafe_call()?;
        let address = s.host_alloc(bytes, Origin::Locked, flags)?;
        pointer.set(with_exposed_provenance_mut(address as usize))
    }

    /// Page-locked host memory.
    ctx fn cuMemAllocHost_v2(pointer: Out<*mut c_void>, bytes: usize) |s| {
        pointer.check()?;
        s.forbid_unsafe_call()?;
        let address = s.host_alloc(bytes, Origin::Locked, 0)?;
        pointer.set(with_exposed_provenance_mut(address as usize))
    }

    /// Gives page-locked host memory back after all work has ended.
    end fn cuMemFreeHost(pointer: *mut c_void) |s| {
        if pointer.is_null() {
            return Ok(());
        }
        s.forbid_unsafe_call()?;
        s.join_all();
        let address = pointer.addr() as u64;
        if s.host_blocks.get(&address).is_some_and(|block| block.origin == Origin::Locked) {
            s.host_release(address).map(drop)
        } else {
            Err(s.bad_free(address, "cuMemFreeHost"))
        }
    }

    /// Makes memory of the program known to the device.
    ctx fn cuMemHostRegister_v2(pointer: *mut c_void, bytes: usize, flags: c_uint) |s| {
        if pointer.is_null() || bytes == 0 || bytes > isize::MAX as usize {
            return Err(Code::InvalidValue);
        }
        s.forbid_unsafe_call()?;
        let address = pointer.expose_provenance() as u64;
        let overlaps = s.host_blocks.values().any(|block| {
            address < block.address + block.layout.size() as u64 && block.address < address + bytes as u64
        });
        if overlaps {
            return Err(Code::HostMemoryAlreadyRegistered);
        }
        if bytes as u64 > s.device.memory.limit {
            return Err(Code::OutOfMemory);
        }
        let layout = Layout::from_size_align(bytes, 1).map_err(|_| Code::InvalidValue)?;
        // SAFETY: the caller promised that the memory stays until it is unregistered.
        unsafe { s.device.memory.register_pinned(address, bytes as u64) };
        s.host_blocks.insert(address, HostBlock { address, layout, origin: Origin::Registered, flags });
        Ok(())
    }

    /// The device forgets memory of the program.
    end fn cuMemHostUnregister(pointer: *mut c_void) |s| {
        let address = pointer.addr() as u64;
        if !s.host_blocks.get(&address).is_some_and(|block| block.origin == Origin::Registered) {
            return Err(Code::HostMemoryNotRegistered);
        }
        s.join_all();
        s.host_release(address).map(drop)
    }

    /// The device address of page-locked memory: the same.
    ctx fn cuMemHostGetDevicePointer_v2(address: Out<u64>, pointer: *mut c_void, flags: c_uint) |s| {
        address.check()?;
        let at = pointer.addr() as u64;
        let index = s.around(at)?;
        if flags != 0 || s.device.memory.get(index).kind != Kind::Pinned {
            return Err(Code::InvalidValue);
        }
        address.set(at)
    }

    /// The flags page-locked memory was allocated with.
    ctx fn cuMemHostGetFlags(flags: Out<c_uint>, pointer: *mut c_void) |s| {
        let index = s.around(pointer.addr() as u64)?;
        let base = s.device.memory.get(index).base;
        flags.set(s.host_blocks.get(&base).ok_or(Code::InvalidValue)?.flags)
    }

    /// Free and total bytes.
    ctx fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) |s| {
        let limit = s.device.memory.limit;
        free.set_if_wanted(limit.saturating_sub(s.device.memory.live_bytes()) as usize);
        total.set_if_wanted(limit as usize);
        Ok(())
    }

    /// Start and length of the allocation around an address.
    ctx fn cuMemGetAddressRange_v2(base: Out<u64>, size: Out<usize>, address: u64) |s| {
        let Ok(index) = s.around(address) else { return Err(Code::NotFound) };
        let a = s.device.memory.get(index);
        base.set_if_wanted(a.base);
        size.set_if_wanted(a.len as usize);
        Ok(())
    }

    /// What is known of an address.
    ctx fn cuPointerGetAttribute(value: *mut c_void, attribute: c_uint, address: u64) |s| {
        if value.is_null() {
            return Err(Code::InvalidValue);
        }
        let index = s.around(address)?;
        let a = s.device.memory.get(index);
        let pinned = a.kind == Kind::Pinned;
        let managed = s.host_blocks.get(&a.base).is_some_and(|block| block.origin == Origin::Managed);
        // SAFETY: not null, and the caller promised room for a value of the attribute's type.
        unsafe {
            match attribute {
                1 => value.cast::<usize>().write_unaligned(super::context::Contexts::current()),
                2 => value.cast::<c_uint>().write_unaligned(if pinned && !managed { 1 } else { 2 }),
                3 => value.cast::<u64>().write_unaligned(address),
                4 if pinned => {
                    value.cast::<*const u8>().write_unaligned(with_exposed_provenance(address as usize));
                }
                7 => value.cast::<u64>().write_unaligned(a.ordinal),
                8 => value.cast::<u8>().write_unaligned(u8::from(managed)),
                9 => value.cast::<c_int>().write_unaligned(0),
                11 => value.cast::<u64>().write_unaligned(a.base),
                12 => value.cast::<usize>().write_unaligned(a.len as usize),
                13 => value.cast::<u8>().write_unaligned(1),
                4 => return Err(Code::InvalidValue),
                _ => return Err(Code::NotSupported),
            }
        }
        Ok(())
    }

    /// A hint about managed memory: only its range is checked.
    ctx fn cuMemAdvise_v2(address: u64, bytes: usize, advice: c_uint, location: u64) |s| {
        let _ = (advice, location);
        s.device.range(address, bytes as u64, "advice")?;
        Ok(())
    }

    /// A hint about managed memory: only its range is checked.
    ctx fn cuMemAdvise(address: u64, bytes: usize, advice: c_uint, device: c_int) |s| {
        let _ = (advice, device);
        s.device.range(address, bytes as u64, "advice")?;
        Ok(())
    }

    /// A hint about managed memory: only its range is checked.
    ctx fn cuMemPrefetchAsync_v2(address: u64, bytes: usize, location: u64, flags: c_uint, stream: Handle) |s| {
        let _ = (location, flags);
        s.resolve(stream)?;
        s.device.range(address, bytes as u64, "prefetch")?;
        Ok(())
    }

    /// A hint about managed memory: only its range is checked.
    ctx fn cuMemPrefetchAsync(address: u64, bytes: usize, device: c_int, stream: Handle) |s| {
        let _ = device;
        s.resolve(stream)?;
        s.device.range(address, bytes as u64, "prefetch")?;
        Ok(())
    }

    /// Binds managed memory to a stream: nothing to do, the host always sees it.
    ctx fn cuStreamAttachMemAsync(stream: Handle, address: u64, bytes: usize, flags: c_uint) |s| {
        let _ = flags;
        s.resolve(stream)?;
        if bytes > 0 {
            s.device.range(address, bytes as u64, "attachment")?;
        }
        Ok(())
    }
}
