//! Everything behind the C interface, under one lock, and the ways into it.

use super::capture::Capture;
use super::context::Contexts;
use super::event::Event;
use super::ffi::{Code, Handle, Status};
use super::function::Function;
use super::graph::{Exec, Graph};
use super::memory::HostBlock;
use super::module::Loaded;
use super::order::{Clock, Order};
use super::pool::Pool;
use super::reserve;
use super::stream::Stream;
use crate::config::{Check, Config, Level};
use crate::device::{Device, DeviceError};
use crate::mem::{DEVICE_BASE, MemoryError};
use crate::ptx::ast;
use crate::report::Fault;
use std::any::Any;
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::c_int;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

/// The driver's state.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) device: Device,
    pub(crate) initialised: bool,
    /// Why the environment's settings cannot be used.
    pub(crate) bad_settings: Option<String>,
    pub(crate) contexts: Contexts,
    pub(crate) order: Order,
    pub(crate) streams: HashMap<usize, Stream>,
    /// Work of streams that were destroyed.
    pub(crate) ended: Clock,
    pub(crate) events: HashMap<usize, Event>,
    pub(crate) modules: HashMap<usize, Loaded>,
    pub(crate) functions: HashMap<usize, Function>,
    pub(crate) captures: HashMap<usize, Capture>,
    pub(crate) graphs: HashMap<usize, Graph>,
    pub(crate) execs: HashMap<usize, Arc<Exec>>,
    pub(crate) pools: HashMap<usize, Pool>,
    /// Page-locked and managed memory by its address.
    pub(crate) host_blocks: HashMap<u64, HostBlock>,
    /// Syntax trees of PTX texts seen before.
    pub(crate) parsed: HashMap<String, Arc<ast::Module>>,
    /// Counters of the launches since the last reset: kernel and JSON object.
    pub(crate) counted: Vec<(String, String)>,
    pub(crate) log_launches: bool,
    next_handle: usize,
}

impl State {
    fn new() -> Self {
        let (config, bad_settings) = match Config::from_env() {
            Ok(config) => (config, None),
            Err(error) => (Config::default(), Some(error.to_string())),
        };
        let mut state = Self {
            device: Device::new(config),
            initialised: false,
            bad_settings,
            contexts: Contexts::default(),
            order: Order::default(),
            streams: HashMap::new(),
            ended: Clock::default(),
            events: HashMap::new(),
            modules: HashMap::new(),
            functions: HashMap::new(),
            captures: HashMap::new(),
            graphs: HashMap::new(),
            execs: HashMap::new(),
            pools: HashMap::new(),
            host_blocks: HashMap::new(),
            parsed: HashMap::new(),
            counted: Vec::new(),
            log_launches: false,
            next_handle: 0x1000,
        };
        if let Some(base) = reserve::device_addresses(DEVICE_BASE) {
            state.device.memory.start_at(base);
        }
        state.add_default_stream();
        state.add_default_pool();
        state
    }

    /// A number that no handle has had before.
    pub(crate) fn handle(&mut self) -> usize {
        self.next_handle += 0x10;
        self.next_handle
    }

    /// The code of the sticky fault, if any.
    pub(crate) fn sticky(&self) -> Status {
        self.device.fault.map_or(Ok(()), |fault| Err(fault_code(fault)))
    }

    /// Files why a call was refused. The call returns its code whatever the level is.
    pub(crate) fn refuse(&mut self, code: Code, lines: &[String]) -> Code {
        let level = self.device.config.level(Check::Misuse);
        self.device.reports.push(Check::Misuse, level, "", 0, lines);
        code
    }

    /// The host has waited for all work.
    pub(crate) fn join_all(&mut self) {
        for stream in self.streams.values() {
            self.order.host.join(&stream.clock);
        }
        self.order.host.join(&self.ended);
    }

    /// The device forgets all work and every object: the last context is gone.
    pub(crate) fn clear_objects(&mut self) {
        self.join_all();
        let live: Vec<(usize, u64)> = (self.device.memory.all().iter().enumerate())
            .filter(|(_, a)| !a.freed)
            .map(|(index, a)| (index, a.base))
            .collect();
        for (index, base) in live {
            if self.device.memory.free(base).is_ok() {
                self.order.forget(index);
            }
        }
        self.host_blocks.clear();
        self.events.clear();
        self.modules.clear();
        self.functions.clear();
        self.captures.clear();
        self.graphs.clear();
        self.execs.clear();
        self.streams.clear();
        self.add_default_stream();
    }

    /// Clocks of the streams that wait for the legacy default stream and that it waits for.
    pub(crate) fn blocking_clock(&self) -> Clock {
        let mut clock = Clock::default();
        for stream in self.streams.values().filter(|stream| stream.blocks()) {
            clock.join(&stream.clock);
        }
        clock
    }
}

/// The result that stands for a fault.
pub(crate) fn fault_code(fault: Fault) -> Code {
    match fault {
        Fault::IllegalAddress => Code::IllegalAddress,
        Fault::Misaligned => Code::MisalignedAddress,
        Fault::Assert => Code::Assert,
        Fault::LaunchFailed => Code::LaunchFailed,
        Fault::Timeout => Code::LaunchTimeout,
    }
}

impl From<DeviceError> for Code {
    fn from(error: DeviceError) -> Self {
        match error {
            DeviceError::Invalid(_) | DeviceError::Memory(MemoryError::NotAnAllocation(_)) => {
                Self::InvalidValue
            }
            DeviceError::Fault(fault) => fault_code(fault),
            DeviceError::TooManyBlocks(_) => Self::CooperativeLaunchTooLarge,
            DeviceError::Memory(MemoryError::OutOfMemory) => Self::OutOfMemory,
        }
    }
}

static STATE: Mutex<Option<State>> = Mutex::new(None);

thread_local! {
    /// A function of the caller runs on this thread: it must not call the driver, and the lock may be held.
    static IN_CALLBACK: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with the locked state, whatever has happened before.
pub(crate) fn with<T>(f: impl FnOnce(&mut State) -> T) -> T {
    let mut guard = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    f(guard.get_or_insert_with(State::new))
}

/// Runs a function of the caller; driver calls it makes are refused instead of waiting for the lock for ever.
pub(crate) fn callback<T>(f: impl FnOnce() -> T) -> T {
    let before = IN_CALLBACK.replace(true);
    let result = f();
    IN_CALLBACK.set(before);
    result
}

/// No panic crosses the C interface.
fn guard(name: &'static str, body: impl FnOnce() -> Status) -> c_int {
    if IN_CALLBACK.get() {
        return Code::NotPermitted as c_int;
    }
    match catch_unwind(AssertUnwindSafe(|| super::calls::begin(name).and_then(|()| body()))) {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code as c_int,
        Err(panic) => {
            internal_error(name, panic.as_ref());
            Code::Unknown as c_int
        }
    }
}

/// A panic is a fault of the emulator: it is reported, and the device counts as broken.
pub(crate) fn internal_error(name: &str, panic: &(dyn Any + Send)) {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    let lines = [format!("Internal error of the emulator in {name}: {text}")];
    with(|s| {
        s.device.reports.push(Check::Misuse, Level::Error, "", 0, &lines);
        s.device.fault.get_or_insert(Fault::LaunchFailed);
    });
}

/// A call that needs nothing.
pub(crate) fn free(name: &'static str, body: impl FnOnce(()) -> Status) -> c_int {
    guard(name, || body(()))
}

/// A call that needs cuInit.
pub(crate) fn init(name: &'static str, body: impl FnOnce(&mut State) -> Status) -> c_int {
    guard(name, || with(|s| if s.initialised { body(s) } else { Err(Code::NotInitialized) }))
}

/// What the calls of kind `ctx` need: also for `free` calls that take the lock themselves.
pub(crate) fn usable(s: &State) -> Status {
    if !s.initialised {
        return Err(Code::NotInitialized);
    }
    s.contexts.require_current()?;
    s.sticky()
}

/// A call that needs a current context and a device that has not failed.
pub(crate) fn ctx(name: &'static str, body: impl FnOnce(&mut State) -> Status) -> c_int {
    guard(name, || {
        with(|s| {
            usable(s)?;
            body(s)
        })
    })
}

/// A call that gives something back: done even after a fault, which it returns.
pub(crate) fn end(name: &'static str, body: impl FnOnce(&mut State) -> Status) -> c_int {
    guard(name, || {
        with(|s| {
            if !s.initialised {
                return Err(Code::NotInitialized);
            }
            s.contexts.require_current()?;
            let done = body(s);
            s.sticky()?;
            done
        })
    })
}

/// A handle as the number it is.
pub(crate) fn number(handle: Handle) -> usize {
    handle.addr()
}

/// A number as the handle the caller gets.
pub(crate) fn opaque(number: usize) -> Handle {
    std::ptr::without_provenance_mut(number)
}
