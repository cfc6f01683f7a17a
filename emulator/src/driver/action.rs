//! The operations that a stream carries out and a graph keeps: what they do to memory, and how long they take.

use super::emu::HostWork;
use super::ffi::{Code, Status};
use super::launch::Call;
use super::order::Access;
use super::state::State;
use crate::mem::Kind;
use std::ffi::c_void;
use std::sync::Arc;

/// Seconds of modelled time that any operation takes at least.
pub(crate) const START: f64 = 2e-6;
/// Bytes a second between host and device.
const BUS: f64 = 25e9;

/// One end of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// An address of the device (also of page-locked memory).
    Device(u64),
    /// An address of the host.
    Host(usize),
}

impl Place {
    /// So many bytes further on.
    fn after(self, bytes: u64) -> Self {
        match self {
            Self::Device(address) => Self::Device(address.wrapping_add(bytes)),
            Self::Host(address) => Self::Host(address.wrapping_add(bytes as usize)),
        }
    }
}

/// A function of the host with its argument.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HostCall {
    pub(crate) run: unsafe extern "C" fn(*mut c_void),
    pub(crate) user: usize,
}

impl HostCall {
    /// Calls it; the lock must not be held.
    pub(crate) fn call(self) {
        // SAFETY: the caller of cuLaunchHostFunc promised that the function can be called with this argument.
        super::state::callback(|| unsafe { (self.run)(std::ptr::with_exposed_provenance_mut(self.user)) });
    }
}

/// An operation.
#[derive(Clone, Debug)]
pub(crate) enum Action {
    /// A kernel with its parameter values.
    Kernel(Arc<Call>),
    /// Rows of bytes.
    Copy { to: Place, from: Place, width: u64, rows: u64, to_pitch: u64, from_pitch: u64 },
    /// A pattern of `size` bytes, repeated `width` times in each row.
    Fill { address: u64, pattern: [u8; 4], size: u64, width: u64, rows: u64, pitch: u64 },
    /// A function of the host: the caller runs it once the lock is free.
    Host(HostCall),
    /// Work of a library stand-in on device memory.
    Emulated(Arc<HostWork>),
    /// An event recorded when a graph runs.
    Record(usize),
    /// An event waited for when a graph runs.
    Wait(usize),
}

/// What an operation has done.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) accesses: Vec<Access>,
    pub(crate) seconds: f64,
    /// A better name than the action's own.
    pub(crate) label: Option<String>,
}

impl Action {
    /// A copy of `bytes` in one piece.
    pub(crate) fn copy(to: Place, from: Place, bytes: u64) -> Self {
        Self::Copy { to, from, width: bytes, rows: 1, to_pitch: 0, from_pitch: 0 }
    }

    /// `memcpy HtoD of 256 bytes`.
    pub(crate) fn label(&self) -> String {
        match self {
            Self::Kernel(call) => format!("kernel {}", call.kernel.name),
            Self::Copy { to, from, width, rows, .. } => {
                let end = |place: &Place| if matches!(place, Place::Device(_)) { 'D' } else { 'H' };
                format!("memcpy {}to{} of {} bytes", end(from), end(to), width.saturating_mul(*rows))
            }
            Self::Fill { size, width, rows, .. } => {
                format!("memset of {} bytes", size.saturating_mul(*width).saturating_mul(*rows))
            }
            Self::Host(_) => "host function".to_owned(),
            Self::Emulated(work) => work.name.clone(),
            Self::Record(_) => "event record".to_owned(),
            Self::Wait(_) => "event wait".to_owned(),
        }
    }
}

impl State {
    /// Finds what is wrong with an operation without carrying it out.
    pub(crate) fn check_action(&mut self, action: &Action) -> Status {
        match action {
            Action::Kernel(call) => self.check_call(call),
            Action::Copy { to, from, width, rows, to_pitch, from_pitch } => {
                let mut ends = [(*from, *from_pitch, "read"), (*to, *to_pitch, "write")];
                // What is wrong on the device says more than a host pointer that cannot have so many bytes.
                ends.sort_by_key(|(place, ..)| matches!(place, Place::Host(_)));
                for (place, pitch, what) in ends {
                    self.check_rows(place, *width, *rows, pitch, what)?;
                }
                Ok(())
            }
            Action::Fill { address, size, width, rows, pitch, .. } => {
                let bytes = width.checked_mul(*size).ok_or(Code::InvalidValue)?;
                self.check_rows(Place::Device(*address), bytes, *rows, *pitch, "write")
            }
            Action::Emulated(work) => {
                for range in &work.ranges {
                    self.device.range(range.address, range.bytes, "call")?;
                }
                Ok(())
            }
            Action::Host(_) | Action::Record(_) | Action::Wait(_) => Ok(()),
        }
    }

    /// Carries an operation out, except for functions of the host.
    pub(crate) fn perform(&mut self, action: &Action, stream: usize) -> Status<Done> {
        self.check_action(action)?;
        match action {
            Action::Kernel(call) => self.run_call(call, stream),
            Action::Copy { to, from, width, rows, to_pitch, from_pitch } => {
                let mut done = Done::default();
                for row in 0..if *width == 0 { 0 } else { *rows } {
                    let (to, from) = (to.after(row * to_pitch), from.after(row * from_pitch));
                    self.copy_row(to, from, *width)?;
                }
                if width * rows > 0 {
                    done.accesses.extend(self.index_of(*from).map(|index| (index, true, false)));
                    done.accesses.extend(self.index_of(*to).map(|index| (index, false, true)));
                }
                let bytes = (width * rows) as f64;
                let inside = matches!((to, from), (Place::Device(_), Place::Device(_)));
                let speed = if inside { self.device.config.model.bandwidth / 2.0 } else { BUS };
                done.seconds = START + bytes / speed;
                Ok(done)
            }
            Action::Fill { address, pattern, size, width, rows, pitch } => {
                let mut done = Done::default();
                let bytes = width * size;
                for row in 0..if bytes == 0 { 0 } else { *rows } {
                    self.fill_row(address + row * pitch, &pattern[..*size as usize], bytes)?;
                }
                if bytes * rows > 0 {
                    done.accesses.extend(self.index_of(Place::Device(*address)).map(|i| (i, false, true)));
                }
                done.seconds = START + (bytes * rows) as f64 / self.device.config.model.bandwidth;
                Ok(done)
            }
            Action::Emulated(work) => self.run_host_work(work),
            Action::Host(_) | Action::Record(_) | Action::Wait(_) => Ok(Done::default()),
        }
    }

    /// The live allocation at a place, if the place is in one.
    fn index_of(&self, place: Place) -> Option<usize> {
        let address = match place {
            Place::Device(address) => address,
            Place::Host(address) => address as u64,
        };
        self.device.memory.find(address, 1)
    }

    /// All rows lie in one allocation, or on the host where no allocation of the device is.
    fn check_rows(&mut self, place: Place, width: u64, rows: u64, pitch: u64, what: &str) -> Status {
        if width == 0 || rows == 0 {
            return Ok(());
        }
        if rows > 1 && pitch < width {
            return Err(Code::InvalidValue);
        }
        let len =
            (rows - 1).checked_mul(pitch).and_then(|n| n.checked_add(width)).ok_or(Code::InvalidValue)?;
        match place {
            Place::Device(address) => {
                self.device.range(address, len, what)?;
                Ok(())
            }
            Place::Host(address) => self.check_host(address as u64, len, what),
        }
    }

    /// A host pointer is not null, does not point into device memory, and does not leave the page-locked block it starts in.
    fn check_host(&mut self, address: u64, len: u64, what: &str) -> Status {
        let memory = &self.device.memory;
        let known = memory.containing(address).map(|index| memory.get(index));
        let wrong = match known {
            _ if address < 4096 || address.checked_add(len).is_none() => {
                Some(format!("address {address:#x} cannot be host memory"))
            }
            // The host may have used the addresses of page-locked memory again once it was freed.
            Some(a) if a.kind == Kind::Pinned && a.freed => None,
            Some(a) if a.kind == Kind::Pinned => {
                (len > a.len - (address - a.base)).then(|| memory.describe(address, len))
            }
            Some(_) => Some(format!(
                "{}: a device pointer where one of the host is needed",
                memory.describe(address, len)
            )),
            None => None,
        };
        match wrong {
            None => Ok(()),
            Some(text) => {
                let lines = [format!("Invalid host pointer in a {what} of {len} bytes"), text];
                Err(self.refuse(Code::InvalidValue, &lines))
            }
        }
    }
}
