//! Initialisation, the one device, and contexts.

use super::exports;
use super::ffi::{Code, Handle, Out, Status, Text, copy_text};
use super::state::{State, number, opaque, with};
use crate::config::Check;
use crate::mem::Kind;
use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::ffi::{c_char, c_int, c_uint, c_void};

/// Handle of the primary context.
const PRIMARY: usize = 0x100;

thread_local! {
    /// The current context of the thread, 0 = none.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
    /// Contexts below it, pushed away by cuCtxPushCurrent.
    static BELOW: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

/// Which contexts exist.
#[derive(Debug)]
pub(crate) struct Contexts {
    retained: u32,
    created: HashSet<usize>,
    flags: c_uint,
    cache: c_int,
    limits: [usize; 11],
}

impl Default for Contexts {
    fn default() -> Self {
        let limits = [1024, 1 << 20, 8 << 20, 2, 2048, 64, 0, 0, 0, 0, 0];
        Self { retained: 0, created: HashSet::new(), flags: 0, cache: 0, limits }
    }
}

impl Contexts {
    fn lives(&self, context: usize) -> bool {
        (context == PRIMARY && self.retained > 0) || self.created.contains(&context)
    }

    /// The thread has a context that exists.
    pub(crate) fn require_current(&self) -> Status {
        if self.lives(CURRENT.get()) { Ok(()) } else { Err(Code::InvalidContext) }
    }

    /// The current context, 0 = none.
    pub(crate) fn current() -> usize {
        CURRENT.get()
    }

    /// A context handle given by the caller: null means the current one.
    pub(crate) fn check(&self, context: Handle) -> Status {
        let context = number(context);
        if context == 0 || self.lives(context) { Ok(()) } else { Err(Code::InvalidContext) }
    }
}

/// The only ordinal is 0.
pub(crate) fn device_zero(device: c_int) -> Status {
    if device == 0 { Ok(()) } else { Err(Code::InvalidDevice) }
}

impl State {
    fn create_context(&mut self, context: Out<Handle>, device: c_int) -> Status {
        device_zero(device)?;
        context.check()?;
        let handle = self.handle();
        self.contexts.created.insert(handle);
        if CURRENT.get() != 0 {
            BELOW.with_borrow_mut(|below| below.push(CURRENT.get()));
        }
        CURRENT.set(handle);
        context.set(opaque(handle))
    }

    /// When the last context goes, all memory goes with it; what the program has not freed is a leak.
    fn last_context_gone(&mut self) {
        if self.contexts.retained > 0 || !self.contexts.created.is_empty() {
            return;
        }
        let leaked: Vec<_> = (self.device.memory.all().iter())
            .filter(|a| !a.freed && matches!(a.kind, Kind::Device | Kind::Pinned))
            .collect();
        if !leaked.is_empty() {
            let bytes: u64 = leaked.iter().map(|a| a.len).sum();
            let mut lines = vec![format!(
                "Leak: {} allocations of {bytes} bytes were alive when the last context was released",
                leaked.len()
            )];
            lines.extend(leaked.iter().take(20).map(|a| a.label()));
            let level = self.device.config.level(Check::Leak);
            self.device.reports.push(Check::Leak, level, "", 0, &lines);
        }
        self.clear_objects();
    }

    /// A property by its number in the API.
    #[allow(clippy::match_same_arms)]
    fn attribute(&self, attribute: c_int) -> c_int {
        let model = &self.device.config.model;
        let int = |n: u32| c_int::try_from(n).unwrap_or(c_int::MAX);
        match attribute {
            1 => 1024,
            2 | 3 => 1024,
            4 => 64,
            5 => 2_147_483_647,
            6 | 7 => 65535,
            8 => 49152,
            9 => 65536,
            10 => 32,
            11 => 2_147_483_647,
            12 | 82 => 65536,
            13 => (model.clock / 1e3) as c_int,
            14 | 30 => 512,
            // Copies overlap with kernels, host memory is mapped, kernels are concurrent, addresses are unified.
            15 | 19 | 31 | 41 => 1,
            16 => int(model.sms),
            33 => 1,
            // Memory clock in kHz and bus width in bits that give the modelled bandwidth at two transfers a clock.
            36 => (model.bandwidth / (2.0 * f64::from(BUS_WIDTH) / 8.0) / 1e3) as c_int,
            37 => BUS_WIDTH,
            38 => {
                if model.sm >= 90 {
                    50 << 20
                } else {
                    40 << 20
                }
            }
            39 => 2048,
            40 => 3,
            51 => 32,
            75 => int(model.sm / 10),
            76 => int(model.sm % 10),
            // Stream priorities, caches of global and local memory.
            78..=80 => 1,
            81 => int(model.shared_per_sm),
            // Managed memory, also while kernels run; registered memory at its own address; cooperative launches.
            83 | 89 | 91 | 95 | 99 => 1,
            // Single to double precision.
            87 => 2,
            90 => 1,
            97 => int(model.shared_opt_in),
            106 => 32,
            111 => 1024,
            115 => c_int::from(self.device.config.pools),
            _ => 0,
        }
    }
}

/// Bits of the memory bus, as on the modelled devices.
const BUS_WIDTH: c_int = 5120;

/// The 16 bytes that identify the emulated device.
const UUID: [u8; 16] = *b"foveate emulator";

exports! {
    /// Starts the driver.
    free fn cuInit(flags: c_uint) |()| {
        if flags != 0 {
            return Err(Code::InvalidValue);
        }
        with(|s| {
            if let Some(text) = &s.bad_settings {
                eprintln!("========= Invalid setting: {text}");
                return Err(Code::InvalidValue);
            }
            s.initialised = true;
            Ok(())
        })
    }

    /// The version of the API that is emulated.
    free fn cuDriverGetVersion(version: Out<c_int>) |()| {
        let (major, minor) = with(|s| s.device.config.driver);
        version.set((1000 * major + 10 * minor) as c_int)
    }

    /// One device.
    init fn cuDeviceGetCount(count: Out<c_int>) |_| {
        count.set(1)
    }

    /// The device of an ordinal.
    init fn cuDeviceGet(device: Out<c_int>, ordinal: c_int) |_| {
        device.check()?;
        device_zero(ordinal)?;
        device.set(0)
    }

    /// The device of a bus address: there is one at 0000:01:00.0.
    init fn cuDeviceGetByPCIBusId(device: Out<c_int>, bus: Text) |_| {
        let bus = bus.get()?;
        let known = ["0000:01:00.0", "0000:01:00", "01:00.0"].iter().any(|&b| b == bus);
        if known { device.set(0) } else { Err(Code::InvalidDevice) }
    }

    /// The bus address of the device.
    init fn cuDeviceGetPCIBusId(text: *mut c_char, len: c_int, device: c_int) |_| {
        device_zero(device)?;
        if text.is_null() || len < 13 {
            return Err(Code::InvalidValue);
        }
        copy_text("0000:01:00.0", text, len as usize);
        Ok(())
    }

    /// A name that says it is an emulator.
    init fn cuDeviceGetName(text: *mut c_char, len: c_int, device: c_int) |s| {
        device_zero(device)?;
        if text.is_null() || len <= 0 {
            return Err(Code::InvalidValue);
        }
        copy_text(&format!("foveate emulator (sm_{})", s.device.config.model.sm), text, len as usize);
        Ok(())
    }

    /// The identity of the device.
    init fn cuDeviceGetUuid(uuid: Out<[u8; 16]>, device: c_int) |_| {
        device_zero(device)?;
        uuid.set(UUID)
    }

    /// The identity of the device.
    init fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: c_int) |_| {
        device_zero(device)?;
        uuid.set(UUID)
    }

    /// Its memory in bytes.
    init fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: c_int) |s| {
        device_zero(device)?;
        bytes.set(s.device.memory.limit as usize)
    }

    /// One of its properties; unknown ones are 0.
    init fn cuDeviceGetAttribute(value: Out<c_int>, attribute: c_int, device: c_int) |s| {
        device_zero(device)?;
        value.set(s.attribute(attribute))
    }

    /// Its architecture.
    init fn cuDeviceComputeCapability(major: Out<c_int>, minor: Out<c_int>, device: c_int) |s| {
        device_zero(device)?;
        major.check()?;
        minor.set(s.attribute(76))?;
        major.set(s.attribute(75))
    }

    /// There is no other device.
    init fn cuDeviceCanAccessPeer(can: Out<c_int>, device: c_int, peer: c_int) |_| {
        device_zero(device)?;
        device_zero(peer)?;
        can.set(0)
    }

    /// There is no peer to give access to.
    ctx fn cuCtxEnablePeerAccess(context: Handle, flags: c_uint) |s| {
        s.contexts.check(context)?;
        let _ = flags;
        Err(Code::InvalidDevice)
    }

    /// There is no peer that has access.
    ctx fn cuCtxDisablePeerAccess(context: Handle) |s| {
        s.contexts.check(context)?;
        Err(Code::PeerAccessNotEnabled)
    }

    /// The primary context, kept alive once more.
    init fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: c_int) |s| {
        device_zero(device)?;
        context.set(opaque(PRIMARY))?;
        s.contexts.retained += 1;
        Ok(())
    }

    /// One user of the primary context less.
    init fn cuDevicePrimaryCtxRelease_v2(device: c_int) |s| {
        device_zero(device)?;
        if s.contexts.retained == 0 {
            return Err(Code::InvalidContext);
        }
        s.contexts.retained -= 1;
        if s.contexts.retained == 0 {
            s.last_context_gone();
        }
        Ok(())
    }

    /// Whether the primary context is alive.
    init fn cuDevicePrimaryCtxGetState(device: c_int, flags: Out<c_uint>, active: Out<c_int>) |s| {
        device_zero(device)?;
        flags.set_if_wanted(s.contexts.flags);
        active.set_if_wanted(c_int::from(s.contexts.retained > 0));
        Ok(())
    }

    /// Flags of the primary context.
    init fn cuDevicePrimaryCtxSetFlags_v2(device: c_int, flags: c_uint) |s| {
        device_zero(device)?;
        s.contexts.flags = flags;
        Ok(())
    }

    /// Refused: everything on the device would go, under the feet of its other users.
    init fn cuDevicePrimaryCtxReset_v2(device: c_int) |s| {
        device_zero(device)?;
        if s.contexts.retained > 0 { Err(Code::PrimaryContextActive) } else { Ok(()) }
    }

    /// A context of its own.
    init fn cuCtxCreate_v2(context: Out<Handle>, flags: c_uint, device: c_int) |s| {
        let _ = flags;
        s.create_context(context, device)
    }

    /// A context of its own; execution affinity is not supported.
    init fn cuCtxCreate_v3(context: Out<Handle>, affinity: *mut c_void, count: c_int, flags: c_uint, device: c_int) |s| {
        let _ = flags;
        if !affinity.is_null() || count != 0 {
            return Err(Code::NotSupported);
        }
        s.create_context(context, device)
    }

    /// A context of its own; parameters are not supported.
    init fn cuCtxCreate_v4(context: Out<Handle>, parameters: *mut c_void, flags: c_uint, device: c_int) |s| {
        let _ = flags;
        if !parameters.is_null() {
            return Err(Code::NotSupported);
        }
        s.create_context(context, device)
    }

    /// Ends a context made by cuCtxCreate.
    init fn cuCtxDestroy_v2(context: Handle) |s| {
        let context = number(context);
        if !s.contexts.created.remove(&context) {
            return Err(Code::InvalidContext);
        }
        if CURRENT.get() == context {
            CURRENT.set(BELOW.with_borrow_mut(Vec::pop).unwrap_or(0));
        }
        s.last_context_gone();
        Ok(())
    }

    /// The thread's context, or null.
    init fn cuCtxGetCurrent(context: Out<Handle>) |_| {
        context.set(opaque(CURRENT.get()))
    }

    /// Makes a context (or null: none) the thread's.
    init fn cuCtxSetCurrent(context: Handle) |s| {
        s.contexts.check(context)?;
        CURRENT.set(number(context));
        Ok(())
    }

    /// Makes a context the thread's, above the one it has.
    init fn cuCtxPushCurrent_v2(context: Handle) |s| {
        if context.is_null() {
            return Err(Code::InvalidContext);
        }
        s.contexts.check(context)?;
        BELOW.with_borrow_mut(|below| below.push(CURRENT.get()));
        CURRENT.set(number(context));
        Ok(())
    }

    /// Takes the thread's context away; the one below is current again.
    init fn cuCtxPopCurrent_v2(context: Out<Handle>) |_| {
        if CURRENT.get() == 0 {
            return Err(Code::InvalidContext);
        }
        context.set_if_wanted(opaque(CURRENT.get()));
        CURRENT.set(BELOW.with_borrow_mut(Vec::pop).unwrap_or(0));
        Ok(())
    }

    /// The device of the thread's context.
    init fn cuCtxGetDevice(device: Out<c_int>) |s| {
        s.contexts.require_current()?;
        device.set(0)
    }

    /// A number for a context.
    init fn cuCtxGetId(context: Handle, id: Out<u64>) |s| {
        s.contexts.check(context)?;
        let context = if context.is_null() { CURRENT.get() } else { number(context) };
        if context == 0 { Err(Code::InvalidContext) } else { id.set(context as u64) }
    }

    /// The API version of a context.
    init fn cuCtxGetApiVersion(context: Handle, version: Out<c_uint>) |s| {
        s.contexts.check(context)?;
        version.set(3020)
    }

    /// Waits for all work.
    ctx fn cuCtxSynchronize() |s| {
        s.forbid_while_capturing()?;
        s.join_all();
        s.sticky()
    }

    /// Scheduling flags: kept, without effect.
    ctx fn cuCtxSetFlags(flags: c_uint) |s| {
        s.contexts.flags = flags;
        Ok(())
    }

    /// Scheduling flags.
    ctx fn cuCtxGetFlags(flags: Out<c_uint>) |s| {
        flags.set(s.contexts.flags)
    }

    /// A limit: kept, without effect.
    ctx fn cuCtxGetLimit(value: Out<usize>, limit: c_uint) |s| {
        match s.contexts.limits.get(limit as usize) {
            Some(&limit) => value.set(limit),
            None => Err(Code::UnsupportedLimit),
        }
    }

    /// A limit.
    ctx fn cuCtxSetLimit(limit: c_uint, value: usize) |s| {
        match s.contexts.limits.get_mut(limit as usize) {
            Some(limit) => {
                *limit = value;
                Ok(())
            }
            None => Err(Code::UnsupportedLimit),
        }
    }

    /// Preference between cache and shared memory.
    ctx fn cuCtxGetCacheConfig(config: Out<c_int>) |s| {
        config.set(s.contexts.cache)
    }

    /// Preference between cache and shared memory: kept, without effect.
    ctx fn cuCtxSetCacheConfig(config: c_int) |s| {
        if !(0..=3).contains(&config) {
            return Err(Code::InvalidValue);
        }
        s.contexts.cache = config;
        Ok(())
    }

    /// Priorities of streams.
    ctx fn cuCtxGetStreamPriorityRange(least: Out<c_int>, greatest: Out<c_int>) |_| {
        least.set_if_wanted(0);
        greatest.set_if_wanted(-5);
        Ok(())
    }
}
