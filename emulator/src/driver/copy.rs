//! Copies and fills.

use super::action::{Action, Place};
use super::exports;
use super::ffi::{Code, Copy2D, Handle, Status};
use super::state::State;
use super::stream::LEGACY;
use crate::config::{Check, Level};
use crate::mem::{DEFINED, Kind, UNDEFINED};
use crate::report::Fault;
use std::ffi::{c_uchar, c_uint, c_ushort, c_void};
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};

impl State {
    /// Copies bytes between places that were checked. Undefined bytes stay undefined on the device and are reported when the host
    /// gets them.
    pub(crate) fn copy_row(&mut self, to: Place, from: Place, bytes: u64) -> Status {
        let n = bytes as usize;
        match (to, from) {
            (Place::Device(to), Place::Host(from)) => {
                // SAFETY: the caller promised `n` readable bytes. They are copied first: page-locked memory may be both ends.
                let source = unsafe { std::slice::from_raw_parts(with_exposed_provenance::<u8>(from), n) };
                if self.is_pinned(to) {
                    let source = source.to_vec();
                    self.device.write(to, &source)?;
                } else {
                    self.device.write(to, source)?;
                }
            }
            (Place::Host(to), Place::Device(from)) => {
                if self.is_pinned(from) {
                    // SAFETY: both ends are host memory of `n` bytes by the checks and the caller's promise; they may overlap.
                    unsafe {
                        let from = with_exposed_provenance::<u8>(from as usize);
                        std::ptr::copy(from, with_exposed_provenance_mut::<u8>(to), n);
                    }
                } else {
                    // SAFETY: the caller promised `n` writable bytes, and the source lies in the emulator's own memory.
                    let target =
                        unsafe { std::slice::from_raw_parts_mut(with_exposed_provenance_mut::<u8>(to), n) };
                    self.read_to_host(from, target)?;
                }
            }
            (Place::Host(to), Place::Host(from)) => {
                // SAFETY: the caller promised `n` bytes at both ends; they may overlap.
                unsafe {
                    let from = with_exposed_provenance::<u8>(from);
                    std::ptr::copy(from, with_exposed_provenance_mut::<u8>(to), n);
                }
            }
            (Place::Device(to), Place::Device(from)) => {
                let index = self.device.range(from, bytes, "read")?.ok_or(Code::InvalidValue)?;
                if self.is_pinned(to) && !self.is_pinned(from) {
                    // The host will see these bytes, so they must be defined.
                    let mut contents = vec![0; n];
                    self.read_to_host(from, &mut contents)?;
                    self.device.write(to, &contents)?;
                    return Ok(());
                }
                let source = self.device.memory.get(index);
                let at = (from - source.base) as usize;
                let contents = source.bytes()[at..at + n].to_vec();
                let shadow = source.shadow[at..at + n].to_vec();
                self.device.write(to, &contents)?;
                if shadow.iter().any(|&s| s & UNDEFINED != 0) {
                    let index = self.device.range(to, bytes, "write")?.ok_or(Code::InvalidValue)?;
                    let target = self.device.memory.get_mut(index);
                    let at = (to - target.base) as usize;
                    target.shadow[at..at + n].copy_from_slice(&shadow);
                    target.maybe_undefined = true;
                }
            }
        }
        Ok(())
    }

    /// Copies to the host; at level error undefined bytes are a fault.
    fn read_to_host(&mut self, from: u64, target: &mut [u8]) -> Status {
        let undefined = self.device.read_counting(from, target)?;
        if undefined > 0 && self.device.config.level(Check::Uninit) == Level::Error {
            self.device.fault.get_or_insert(Fault::LaunchFailed);
        }
        Ok(())
    }

    /// Repeats a pattern over bytes that were checked.
    pub(crate) fn fill_row(&mut self, address: u64, pattern: &[u8], bytes: u64) -> Status {
        let Some(index) = self.device.range(address, bytes, "write")? else { return Ok(()) };
        let a = self.device.memory.get_mut(index);
        let at = (address - a.base) as usize;
        let whole = bytes == a.len;
        let (data, shadow) = a.parts_mut();
        let data = &mut data[at..at + bytes as usize];
        if let [byte] = pattern {
            data.fill(*byte);
        } else {
            data.chunks_exact_mut(pattern.len()).for_each(|chunk| chunk.copy_from_slice(pattern));
        }
        shadow[at..at + bytes as usize].fill(DEFINED);
        if whole {
            a.maybe_undefined = false;
        }
        Ok(())
    }

    fn is_pinned(&self, address: u64) -> bool {
        let found = self.device.memory.find(address, 1);
        found.is_some_and(|index| self.device.memory.get(index).kind == Kind::Pinned)
    }

    /// An address of the unified space: on the device where an allocation is, else on the host.
    fn unified(&self, address: u64) -> Place {
        let memory = &self.device.memory;
        match memory.containing(address).map(|index| memory.get(index)) {
            Some(a) if !(a.freed && a.kind == Kind::Pinned) => Place::Device(address),
            _ => Place::Host(address as usize),
        }
    }

    /// A copy on a stream. One that touches pageable host memory has ended when the call returns.
    fn copy_on(&mut self, stream: Handle, to: Place, from: Place, bytes: usize) -> Status {
        self.enqueue(stream, Action::copy(to, from, bytes as u64))?;
        if let Place::Host(address) = to
            && !self.is_pinned(address as u64)
        {
            self.join_stream(stream)?;
        }
        Ok(())
    }

    /// A copy that the host waits for, on the legacy default stream.
    fn copy_now(&mut self, to: Place, from: Place, bytes: usize) -> Status {
        self.forbid_unsafe_call()?;
        self.enqueue(LEGACY_HANDLE, Action::copy(to, from, bytes as u64))?;
        // Between two device addresses the real call returns before the copy has ended.
        if matches!((to, from), (Place::Device(_), Place::Device(_))) {
            return Ok(());
        }
        self.join_stream(LEGACY_HANDLE)
    }

    fn copy_2d(&mut self, stream: Handle, copy: *const Copy2D, wait: bool) -> Status {
        if copy.is_null() {
            return Err(Code::InvalidValue);
        }
        // SAFETY: not null, and the exported functions ask that it points to the structure.
        let c = unsafe { copy.read_unaligned() };
        let place = |kind: c_uint, host: usize, device: u64, x: usize, y: usize, pitch: usize| {
            let offset = y.checked_mul(pitch).and_then(|n| n.checked_add(x)).ok_or(Code::InvalidValue)?;
            match kind {
                1 => Ok(Place::Host(host.wrapping_add(offset))),
                2 => Ok(Place::Device(device.wrapping_add(offset as u64))),
                4 => Ok(self.unified(device.wrapping_add(offset as u64))),
                _ => Err(Code::NotSupported),
            }
        };
        let from =
            place(c.src_type, c.src_host.expose_provenance(), c.src_device, c.src_x, c.src_y, c.src_pitch)?;
        let to =
            place(c.dst_type, c.dst_host.expose_provenance(), c.dst_device, c.dst_x, c.dst_y, c.dst_pitch)?;
        let pitch = |pitch: usize| if pitch == 0 { c.width } else { pitch } as u64;
        let action = Action::Copy {
            to,
            from,
            width: c.width as u64,
            rows: c.height as u64,
            to_pitch: pitch(c.dst_pitch),
            from_pitch: pitch(c.src_pitch),
        };
        self.enqueue(stream, action)?;
        if wait || matches!(to, Place::Host(_)) { self.join_stream(stream) } else { Ok(()) }
    }

    fn fill(&mut self, stream: Handle, address: u64, value: u32, size: u64, width: usize) -> Status {
        self.fill_2d(stream, address, 0, value, size, width, 1)
    }

    #[allow(clippy::too_many_arguments)]
    fn fill_2d(
        &mut self,
        stream: Handle,
        address: u64,
        pitch: usize,
        value: u32,
        size: u64,
        width: usize,
        rows: usize,
    ) -> Status {
        if !address.is_multiple_of(size) || (rows > 1 && !(pitch as u64).is_multiple_of(size)) {
            return Err(Code::InvalidValue);
        }
        let pattern = value.to_le_bytes();
        let (width, rows, pitch) = (width as u64, rows as u64, pitch as u64);
        self.enqueue(stream, Action::Fill { address, pattern, size, width, rows, pitch })
    }
}

const LEGACY_HANDLE: Handle = std::ptr::without_provenance_mut(LEGACY);

fn host(pointer: *const c_void) -> Place {
    Place::Host(pointer.expose_provenance())
}

exports! {
    /// Host to device, waited for.
    ctx fn cuMemcpyHtoD_v2(to: u64, from: *const c_void, bytes: usize) |s| {
        s.copy_now(Place::Device(to), host(from), bytes)
    }

    /// Device to host, waited for.
    ctx fn cuMemcpyDtoH_v2(to: *mut c_void, from: u64, bytes: usize) |s| {
        s.copy_now(host(to), Place::Device(from), bytes)
    }

    /// Inside the device.
    ctx fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) |s| {
        s.copy_now(Place::Device(to), Place::Device(from), bytes)
    }

    /// Between any two addresses.
    ctx fn cuMemcpy(to: u64, from: u64, bytes: usize) |s| {
        let (to, from) = (s.unified(to), s.unified(from));
        s.copy_now(to, from, bytes)
    }

    /// Host to device, in stream order.
    ctx fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) |s| {
        s.copy_on(stream, Place::Device(to), host(from), bytes)
    }

    /// Device to host, in stream order.
    ctx fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) |s| {
        s.copy_on(stream, host(to), Place::Device(from), bytes)
    }

    /// Inside the device, in stream order.
    ctx fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) |s| {
        s.copy_on(stream, Place::Device(to), Place::Device(from), bytes)
    }

    /// Between any two addresses, in stream order.
    ctx fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: Handle) |s| {
        let (to, from) = (s.unified(to), s.unified(from));
        s.copy_on(stream, to, from, bytes)
    }

    /// Between contexts, which share the one device.
    ctx fn cuMemcpyPeer(to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: usize) |s| {
        s.contexts.check(to_context)?;
        s.contexts.check(from_context)?;
        s.copy_now(Place::Device(to), Place::Device(from), bytes)
    }

    /// Between contexts, in stream order.
    ctx fn cuMemcpyPeerAsync(
        to: u64, to_context: Handle, from: u64, from_context: Handle, bytes: usize, stream: Handle
    ) |s| {
        s.contexts.check(to_context)?;
        s.contexts.check(from_context)?;
        s.copy_on(stream, Place::Device(to), Place::Device(from), bytes)
    }

    /// Rows, waited for.
    ctx fn cuMemcpy2D_v2(copy: *const Copy2D) |s| {
        s.forbid_unsafe_call()?;
        s.copy_2d(LEGACY_HANDLE, copy, true)
    }

    /// Rows, waited for.
    ctx fn cuMemcpy2DUnaligned_v2(copy: *const Copy2D) |s| {
        s.forbid_unsafe_call()?;
        s.copy_2d(LEGACY_HANDLE, copy, true)
    }

    /// Rows, in stream order.
    ctx fn cuMemcpy2DAsync_v2(copy: *const Copy2D, stream: Handle) |s| {
        s.copy_2d(stream, copy, false)
    }

    /// Fills with bytes, on the legacy default stream.
    ctx fn cuMemsetD8_v2(address: u64, value: c_uchar, count: usize) |s| {
        s.forbid_unsafe_call()?;
        s.fill(LEGACY_HANDLE, address, value.into(), 1, count)
    }

    /// Fills with 16-bit values, on the legacy default stream.
    ctx fn cuMemsetD16_v2(address: u64, value: c_ushort, count: usize) |s| {
        s.forbid_unsafe_call()?;
        s.fill(LEGACY_HANDLE, address, value.into(), 2, count)
    }

    /// Fills with 32-bit values, on the legacy default stream.
    ctx fn cuMemsetD32_v2(address: u64, value: c_uint, count: usize) |s| {
        s.forbid_unsafe_call()?;
        s.fill(LEGACY_HANDLE, address, value, 4, count)
    }

    /// Fills with bytes, in stream order.
    ctx fn cuMemsetD8Async(address: u64, value: c_uchar, count: usize, stream: Handle) |s| {
        s.fill(stream, address, value.into(), 1, count)
    }

    /// Fills with 16-bit values, in stream order.
    ctx fn cuMemsetD16Async(address: u64, value: c_ushort, count: usize, stream: Handle) |s| {
        s.fill(stream, address, value.into(), 2, count)
    }

    /// Fills with 32-bit values, in stream order.
    ctx fn cuMemsetD32Async(address: u64, value: c_uint, count: usize, stream: Handle) |s| {
        s.fill(stream, address, value, 4, count)
    }

    /// Fills rows with bytes, in stream order.
    ctx fn cuMemsetD2D8Async(
        address: u64, pitch: usize, value: c_uchar, width: usize, height: usize, stream: Handle
    ) |s| {
        s.fill_2d(stream, address, pitch, value.into(), 1, width, height)
    }

    /// Fills rows with 32-bit values, in stream order.
    ctx fn cuMemsetD2D32Async(
        address: u64, pitch: usize, value: c_uint, width: usize, height: usize, stream: Handle
    ) |s| {
        s.fill_2d(stream, address, pitch, value, 4, width, height)
    }
}
