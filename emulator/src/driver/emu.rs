//! Controls of the emulator that tests look up in the loaded library (specification section 10).

use super::action::{Action, Done, START};
use super::exports;
use super::ffi::{Code, Handle, Status, Text, copy_text};
use super::state::{State, callback, usable, with};
use crate::config::{Check, Level};
use crate::device::Launch;
use crate::mem::{DEFINED, UNDEFINED};
use crate::report::Fault;
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// The version of the `emu_*` functions.
const INTERFACE: c_int = 1;
/// Launches whose counters are kept; then the older half is forgotten.
const KEEP_COUNTED: usize = 1 << 15;

/// A piece of device memory that host work reads or writes.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct EmuRange {
    /// Device address.
    pub address: u64,
    /// Length.
    pub bytes: u64,
    /// 0 = read, else written.
    pub write: u32,
    /// Not used.
    pub pad: u32,
}

/// Runs with the caller's argument and one host pointer a range.
type RunFn = unsafe extern "C" fn(*mut c_void, *const *mut u8);
/// Ends the argument's life.
type DropFn = unsafe extern "C" fn(*mut c_void);

/// Host work on device memory: the kernels of library stand-ins.
#[derive(Debug)]
pub(crate) struct HostWork {
    pub(crate) name: String,
    pub(crate) ranges: Vec<EmuRange>,
    run: RunFn,
    user: usize,
    drop_user: Option<DropFn>,
}

impl Drop for HostWork {
    fn drop(&mut self) {
        if let Some(drop_user) = self.drop_user {
            // SAFETY: the caller of emu_enqueue_host promised that this ends the argument's life, once.
            callback(|| unsafe { drop_user(std::ptr::with_exposed_provenance_mut(self.user)) });
        }
    }
}

impl State {
    /// Runs host work whose ranges were checked.
    pub(crate) fn run_host_work(&mut self, work: &HostWork) -> Status<Done> {
        let mut done = Done { seconds: START, ..Done::default() };
        let mut pointers = Vec::with_capacity(work.ranges.len());
        let mut bytes = 0;
        for range in &work.ranges {
            let Some(index) = self.device.range(range.address, range.bytes, "call")? else {
                pointers.push(std::ptr::null_mut());
                continue;
            };
            bytes += range.bytes;
            let writes = range.write != 0;
            done.accesses.push((index, !writes, writes));
            if !writes {
                self.find_undefined(work, range, index);
            }
            let a = self.device.memory.get_mut(index);
            // SAFETY: the range was found inside the allocation.
            pointers.push(unsafe { a.pointer().add((range.address - a.base) as usize) });
        }
        done.seconds += bytes as f64 / self.device.config.model.bandwidth;
        // SAFETY: the pointers stay valid under the lock, and the caller promised that the function takes them.
        callback(|| unsafe {
            (work.run)(std::ptr::with_exposed_provenance_mut(work.user), pointers.as_ptr());
        });
        for range in work.ranges.iter().filter(|range| range.write != 0) {
            if let Some(index) = self.device.range(range.address, range.bytes, "call")? {
                let a = self.device.memory.get_mut(index);
                let at = (range.address - a.base) as usize;
                a.shadow[at..at + range.bytes as usize].fill(DEFINED);
                if range.bytes == a.len {
                    a.maybe_undefined = false;
                }
            }
        }
        Ok(done)
    }

    fn find_undefined(&mut self, work: &HostWork, range: &EmuRange, index: usize) {
        let level = self.device.config.level(Check::Uninit);
        let a = self.device.memory.get(index);
        if !a.maybe_undefined || level == Level::Off {
            return;
        }
        let at = (range.address - a.base) as usize;
        let shadow = &a.shadow[at..at + range.bytes as usize];
        let Some(first) = shadow.iter().position(|&s| s & UNDEFINED != 0) else { return };
        let count = shadow.iter().filter(|&&s| s & UNDEFINED != 0).count();
        let lines = [
            format!("Undefined bytes read by {}: {count} of {}", work.name, range.bytes),
            format!("the first is byte {} of {}", at + first, a.label()),
        ];
        self.device.reports.push(Check::Uninit, level, &work.name, 0, &lines);
        if level == Level::Error {
            self.device.fault.get_or_insert(Fault::LaunchFailed);
        }
    }

    /// Keeps a launch's counters and logs the launch.
    pub(crate) fn count_launch(&mut self, launch: &Launch, stream: usize) {
        if self.counted.len() >= KEEP_COUNTED {
            self.counted.drain(..KEEP_COUNTED / 2);
        }
        let json = launch.counters.json(launch, &self.device.config).to_string();
        self.counted.push((launch.kernel.name.clone(), json));
        if self.log_launches {
            let [gx, gy, gz] = launch.grid;
            let [bx, by, bz] = launch.block;
            eprintln!(
                "========= launch #{}: {} grid ({gx},{gy},{gz}) block ({bx},{by},{bz}) dynamic shared {}, {}",
                launch.ordinal,
                launch.kernel.name,
                launch.dynamic_shared,
                self.stream_name(stream)
            );
        }
    }

    fn counters_json(&self, kernel: Option<&str>) -> String {
        let wanted = self.counted.iter().filter(|(name, _)| kernel.is_none_or(|kernel| kernel == name));
        let objects: Vec<&str> = wanted.map(|(_, json)| json.as_str()).collect();
        format!("[{}]", objects.join(",\n"))
    }
}

/// For exports whose result is no `CUresult`: a panic gives `other`.
fn plain<T>(name: &str, other: T, body: impl FnOnce(&mut State) -> T) -> T {
    catch_unwind(AssertUnwindSafe(|| with(body))).unwrap_or_else(|panic| {
        super::state::internal_error(name, panic.as_ref());
        other
    })
}

/// The version of these functions.
#[unsafe(no_mangle)]
pub extern "C" fn emu_version() -> c_int {
    INTERFACE
}

/// How many findings there are since the last clearing.
#[unsafe(no_mangle)]
pub extern "C" fn emu_errors() -> usize {
    plain("emu_errors", 0, |s| s.device.reports.all().len())
}

/// Writes the text of a finding, cut to the buffer, with a NUL. Returns its length; 0 when there is no such finding.
///
/// # Safety
/// `buffer` is null or has `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emu_error_text(index: usize, buffer: *mut c_char, len: usize) -> usize {
    plain("emu_error_text", 0, |s| {
        let report = s.device.reports.all().get(index);
        copy_text(report.map_or("", |report| &report.text), buffer, len)
    })
}

/// Forgets all findings and the sticky fault.
#[unsafe(no_mangle)]
pub extern "C" fn emu_clear_errors() {
    plain("emu_clear_errors", (), |s| {
        s.device.reports.clear();
        s.device.fault = None;
    });
}

/// Forgets the counters of all launches.
#[unsafe(no_mangle)]
pub extern "C" fn emu_reset_counters() {
    plain("emu_reset_counters", (), |s| s.counted.clear());
}

/// Writes the counters of all launches, or of one kernel's, as a JSON array, cut to the buffer, with a NUL. Returns its length.
///
/// # Safety
/// `kernel` is null or a text; `buffer` is null or has `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn emu_counters_json(kernel: Text, buffer: *mut c_char, len: usize) -> usize {
    plain("emu_counters_json", 0, |s| copy_text(&s.counters_json(kernel.get().ok().as_deref()), buffer, len))
}

/// Each launch is printed to the standard error (or no longer).
#[unsafe(no_mangle)]
pub extern "C" fn emu_launch_log(on: c_int) {
    plain("emu_launch_log", (), |s| s.log_launches = on != 0);
}

/// Declares how many floating-point operations of the next launch are useful; what its mma instructions do beyond is padding.
#[unsafe(no_mangle)]
pub extern "C" fn emu_expect_flops(flops: u64) {
    plain("emu_expect_flops", (), |s| s.device.expected_flops = Some(flops as f64));
}

exports! {
    /// Sets a key of the environment (`EMU_CHECKS`, or `checks`) to a value; an empty value gives the default back.
    free fn emu_set(key: Text, value: Text) |()| {
        let (key, value) = (key.get()?, value.get()?);
        with(|s| {
            if let Err(error) = s.device.config.set(&key, &value) {
                eprintln!("========= Invalid setting: {error}");
                return Err(Code::InvalidValue);
            }
            s.device.memory.limit = s.device.config.memory_limit;
            s.device.reports.abort = s.device.config.abort_on_fault;
            Ok(())
        })
    }

    /// Names the allocation around an address in reports.
    free fn emu_name(address: u64, name: Text) |()| {
        let name = name.get()?;
        with(|s| {
            let index = s.device.memory.find(address, 1).ok_or(Code::InvalidValue)?;
            s.device.memory.get_mut(index).name = Some(name);
            Ok(())
        })
    }

    /// Runs work on device memory in stream order: `run` gets `user` and a host pointer for each range, now or at each launch of the
    /// graph that keeps it; `drop_user` ends the life of `user`, whatever happens.
    free fn emu_enqueue_host(
        stream: Handle, name: Text, run: Option<RunFn>, user: *mut c_void, drop_user: Option<DropFn>,
        ranges: *const EmuRange, count: usize
    ) |()| {
        let run = run.ok_or(Code::InvalidValue);
        let mut work = HostWork {
            name: String::new(),
            ranges: Vec::new(),
            run: *run.as_ref().unwrap_or(&(nothing as RunFn)),
            user: user.expose_provenance(),
            drop_user,
        };
        run?;
        work.name = name.get()?;
        if ranges.is_null() && count > 0 {
            return Err(Code::InvalidValue);
        }
        // SAFETY: the caller promised so many ranges.
        work.ranges = (0..count).map(|i| unsafe { ranges.add(i).read_unaligned() }).collect();
        with(|s| {
            usable(s)?;
            s.enqueue(stream, Action::Emulated(std::sync::Arc::new(work)))
        })
    }
}

/// Stands for a function that was not given.
unsafe extern "C" fn nothing(_: *mut c_void, _: *const *mut u8) {}
