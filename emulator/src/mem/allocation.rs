//! Allocations and their look-up.

use super::{DEFINED, DEVICE_BASE, FILL, MODULE_BASE, UNDEFINED};
use std::collections::BTreeMap;
use std::fmt;

/// Where an allocation came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// cuMemAlloc and its like.
    Device,
    /// Page-locked host memory, at its host address.
    Pinned,
    /// A module's `.global` variable.
    Global,
    /// A module's `.const` variable: kernels must not write it.
    Const,
}

/// One allocation; it stays known after it was freed, so that a use after free can be named.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "four independent facts")]
pub struct Allocation {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
    /// Origin.
    pub kind: Kind,
    /// Running number, from 1.
    pub ordinal: u64,
    /// Name given by `emu_name` or by the module.
    pub name: Option<String>,
    /// Given back.
    pub freed: bool,
    /// The contents: empty for pinned memory (which lies at its own address) and after the free.
    data: Vec<u8>,
    /// One byte a byte: [`DEFINED`] or [`UNDEFINED`]. Empty after the free.
    pub shadow: Vec<u8>,
    /// A byte of it may be undefined (false = the shadow need not be looked at).
    pub maybe_undefined: bool,
    /// The present launch read it.
    pub was_read: bool,
    /// The present launch wrote it.
    pub was_written: bool,
}

impl Allocation {
    /// Pointer to the first byte.
    pub fn pointer(&mut self) -> *mut u8 {
        if self.kind == Kind::Pinned { self.base as *mut u8 } else { self.data.as_mut_ptr() }
    }

    /// The contents.
    pub fn bytes(&self) -> &[u8] {
        if self.kind == Kind::Pinned && !self.freed {
            // SAFETY: pinned memory is registered by whoever allocated it at `base` with `len` bytes, and is removed from the
            // table before it is deallocated.
            unsafe { std::slice::from_raw_parts(self.base as *const u8, self.len as usize) }
        } else {
            &self.data
        }
    }

    /// The contents, to be written.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        if self.kind == Kind::Pinned && !self.freed {
            // SAFETY: as in `bytes`; the driver lock makes this the only view of the emulator's side.
            unsafe { std::slice::from_raw_parts_mut(self.base as *mut u8, self.len as usize) }
        } else {
            &mut self.data
        }
    }

    /// Contents and shadow together.
    pub fn parts_mut(&mut self) -> (&mut [u8], &mut [u8]) {
        if self.kind == Kind::Pinned && !self.freed {
            // SAFETY: as in `bytes_mut`; the shadow is separate memory.
            let bytes = unsafe { std::slice::from_raw_parts_mut(self.base as *mut u8, self.len as usize) };
            (bytes, &mut self.shadow)
        } else {
            (&mut self.data, &mut self.shadow)
        }
    }

    /// `allocation #12 (size 40000, "qkv")`.
    pub fn label(&self) -> String {
        let what = match self.kind {
            Kind::Device => "allocation",
            Kind::Pinned => "pinned allocation",
            Kind::Global => "module variable",
            Kind::Const => "constant",
        };
        let name = self.name.as_ref().map(|name| format!(", \"{name}\"")).unwrap_or_default();
        format!("{what} #{} (size {}{name})", self.ordinal, self.len)
    }
}

/// Why an allocation or a free did not work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MemoryError {
    /// Over the configured capacity.
    OutOfMemory,
    /// Not the start of a live allocation; the text says what is there.
    NotAnAllocation(String),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OutOfMemory => f.write_str("out of device memory"),
            Self::NotAnAllocation(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for MemoryError {}

/// All memory of the device.
#[derive(Debug, Default)]
pub struct Memory {
    allocations: Vec<Allocation>,
    by_base: BTreeMap<u64, usize>,
    next_device: u64,
    next_module: u64,
    live_bytes: u64,
    /// Allocation that each instruction used last, by instruction index. A guess only: it survives from one kernel to the next.
    hints: Vec<u32>,
    /// Capacity in bytes.
    pub limit: u64,
}

impl Memory {
    /// Nothing allocated.
    pub fn new(limit: u64) -> Self {
        Self { next_device: DEVICE_BASE, next_module: MODULE_BASE, limit, ..Self::default() }
    }

    /// Later device allocations get addresses from `base` on, if it is not below one that was given out.
    pub fn start_at(&mut self, base: u64) {
        self.next_device = self.next_device.max(base);
    }

    /// Allocates `len > 0` bytes, undefined; returns the address.
    ///
    /// # Errors
    /// [`MemoryError::OutOfMemory`].
    pub fn allocate(&mut self, len: u64, kind: Kind, name: Option<String>) -> Result<u64, MemoryError> {
        if len > self.limit.saturating_sub(self.live_bytes) {
            return Err(MemoryError::OutOfMemory);
        }
        let mut data = Vec::new();
        let mut shadow = Vec::new();
        data.try_reserve_exact(len as usize).map_err(|_| MemoryError::OutOfMemory)?;
        shadow.try_reserve_exact(len as usize).map_err(|_| MemoryError::OutOfMemory)?;
        data.resize(len as usize, FILL);
        shadow.resize(len as usize, UNDEFINED);
        let next = if matches!(kind, Kind::Global | Kind::Const) {
            &mut self.next_module
        } else {
            &mut self.next_device
        };
        let base = *next;
        // At least 4 KiB of nothing behind each allocation, and addresses are never used again.
        *next += (len + 4096 + 255) & !255;
        self.live_bytes += len;
        self.insert(base, len, kind, name, data, shadow);
        Ok(base)
    }

    /// Makes page-locked host memory known at its own address; its contents count as defined.
    ///
    /// # Safety
    /// `base..base + len` must stay valid for reads and writes until [`Memory::free`] of it.
    pub unsafe fn register_pinned(&mut self, base: u64, len: u64) {
        // The host uses addresses again: what was freed inside the range is not known by its address any more.
        let stale: Vec<u64> =
            self.by_base.range(base..base.saturating_add(len)).map(|(&base, _)| base).collect();
        for base in stale {
            if self.by_base.get(&base).is_some_and(|&index| self.allocations[index].freed) {
                self.by_base.remove(&base);
            }
        }
        self.insert(base, len, Kind::Pinned, None, Vec::new(), vec![DEFINED; len as usize]);
    }

    fn insert(
        &mut self,
        base: u64,
        len: u64,
        kind: Kind,
        name: Option<String>,
        data: Vec<u8>,
        shadow: Vec<u8>,
    ) {
        let index = self.allocations.len();
        self.allocations.push(Allocation {
            base,
            len,
            kind,
            ordinal: index as u64 + 1,
            name,
            freed: false,
            data,
            shadow,
            maybe_undefined: kind != Kind::Pinned,
            was_read: false,
            was_written: false,
        });
        self.by_base.insert(base, index);
    }

    /// Gives an allocation back; its address stays known as freed.
    ///
    /// # Errors
    /// `base` is not the start of a live allocation.
    pub fn free(&mut self, base: u64) -> Result<(), MemoryError> {
        match self.by_base.get(&base) {
            Some(&index) if !self.allocations[index].freed => {
                let a = &mut self.allocations[index];
                a.freed = true;
                a.data = Vec::new();
                a.shadow = Vec::new();
                if a.kind != Kind::Pinned {
                    self.live_bytes -= a.len;
                }
                Ok(())
            }
            _ => Err(MemoryError::NotAnAllocation(self.describe(base, 1))),
        }
    }

    /// The allocation (live or freed) that holds `address`, if any.
    #[inline]
    pub fn containing(&self, address: u64) -> Option<usize> {
        let (_, &index) = self.by_base.range(..=address).next_back()?;
        let a = &self.allocations[index];
        (address - a.base < a.len).then_some(index)
    }

    /// The live allocation that holds all of `address..address + len`.
    #[inline]
    pub fn find(&self, address: u64, len: u64) -> Option<usize> {
        let index = self.containing(address)?;
        let a = &self.allocations[index];
        (!a.freed && len <= a.len - (address - a.base)).then_some(index)
    }

    /// The allocation that instruction `pc` used last.
    #[inline]
    pub fn hint(&self, pc: u32) -> Option<usize> {
        let index = *self.hints.get(pc as usize)? as usize;
        (index < self.allocations.len()).then_some(index)
    }

    /// Remembers which allocation instruction `pc` used.
    pub fn set_hint(&mut self, pc: u32, index: usize) {
        let pc = pc as usize;
        if self.hints.len() <= pc {
            self.hints.resize(pc + 1, u32::MAX);
        }
        self.hints[pc] = index as u32;
    }

    /// An allocation by index.
    #[inline]
    pub fn get(&self, index: usize) -> &Allocation {
        &self.allocations[index]
    }

    /// An allocation by index.
    #[inline]
    pub fn get_mut(&mut self, index: usize) -> &mut Allocation {
        &mut self.allocations[index]
    }

    /// All allocations, freed ones too.
    pub fn all(&self) -> &[Allocation] {
        &self.allocations
    }

    /// All allocations, freed ones too.
    pub fn all_mut(&mut self) -> &mut [Allocation] {
        &mut self.allocations
    }

    /// Bytes in use (module variables included, pinned host memory not).
    pub fn live_bytes(&self) -> u64 {
        self.live_bytes
    }

    /// Where `address..address + len` lies, for reports: `address 0x.. is 16 bytes past the end of allocation #3 (size ..)`.
    pub fn describe(&self, address: u64, len: u64) -> String {
        let at = format!("address {address:#x}");
        if address == 0 {
            return format!("{at} is the null pointer");
        }
        let below = self.by_base.range(..=address).next_back().map(|(_, &index)| &self.allocations[index]);
        if let Some(a) = below {
            let offset = address - a.base;
            if offset < a.len {
                if a.freed {
                    return format!("{at} is {offset} bytes into {}, which was freed", a.label());
                }
                let over = (offset + len).saturating_sub(a.len);
                return if over > 0 {
                    format!("{at}: the last {over} of {len} bytes are past the end of {}", a.label())
                } else {
                    format!("{at} is {offset} bytes into {}", a.label())
                };
            }
        }
        let above = self.by_base.range(address..).next().map(|(_, &index)| &self.allocations[index]);
        let past = below.map(|a| (address - (a.base + a.len), a));
        let before = above.map(|a| (a.base - address, a));
        let state = |a: &Allocation| if a.freed { ", which was freed" } else { "" };
        match (past, before) {
            (Some((p, _)), Some((b, a))) if b < p => {
                format!("{at} is {b} bytes before {}{}", a.label(), state(a))
            }
            (Some((p, a)), _) => format!("{at} is {p} bytes past the end of {}{}", a.label(), state(a)),
            (None, Some((b, a))) => format!("{at} is {b} bytes before {}{}", a.label(), state(a)),
            (None, None) => format!("{at} is in no allocation: there is none"),
        }
    }
}
