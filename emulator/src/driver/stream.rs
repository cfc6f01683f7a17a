//! Streams: submission, waiting, and what orders them.

use super::action::{Action, HostCall};
use super::event::Recorded;
use super::exports;
use super::ffi::{Code, Handle, HostFn, Out, Status};
use super::order::{Access, Clock};
use super::state::{State, number, opaque, usable, with};
use std::cell::Cell;
use std::ffi::{c_int, c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Key and second handle of the legacy default stream; its first handle is null.
pub(crate) const LEGACY: usize = 1;
/// Handle of the calling thread's own default stream.
const PER_THREAD: usize = 2;
/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: c_uint = 1;

/// A stream.
#[derive(Debug)]
pub(crate) struct Stream {
    /// Everything submitted so far, and what came before it.
    pub(crate) clock: Clock,
    /// Its position in the vector clocks.
    pub(crate) lane: usize,
    flags: c_uint,
    priority: c_int,
    kind: Kind,
    /// The capture it takes part in.
    pub(crate) capture: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Legacy,
    PerThread,
    Created,
}

impl Stream {
    /// Ordered with the legacy default stream both ways.
    pub(crate) fn blocks(&self) -> bool {
        self.kind != Kind::Legacy && self.flags & NON_BLOCKING == 0
    }
}

thread_local! {
    static OWN: Cell<usize> = const { Cell::new(0) };
    static THREAD: Cell<usize> = const { Cell::new(0) };
}

/// A number for the calling thread.
pub(crate) fn thread() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    if THREAD.get() == 0 {
        THREAD.set(NEXT.fetch_add(1, Ordering::Relaxed));
    }
    THREAD.get()
}

impl State {
    pub(crate) fn add_default_stream(&mut self) {
        self.add_stream(LEGACY, 0, 0, Kind::Legacy);
    }

    fn add_stream(&mut self, key: usize, flags: c_uint, priority: c_int, kind: Kind) {
        let lane = self.order.lane();
        let clock = self.order.host.clone();
        self.streams.insert(key, Stream { clock, lane, flags, priority, kind, capture: None });
    }

    /// The key of a stream handle given by the caller.
    pub(crate) fn resolve(&mut self, stream: Handle) -> Status<usize> {
        match number(stream) {
            0 | LEGACY => Ok(LEGACY),
            PER_THREAD => {
                if !self.streams.contains_key(&OWN.get()) {
                    let key = self.handle();
                    self.add_stream(key, 0, 0, Kind::PerThread);
                    OWN.set(key);
                }
                Ok(OWN.get())
            }
            key if self.streams.contains_key(&key) => Ok(key),
            _ => Err(Code::InvalidHandle),
        }
    }

    /// `stream 0x1010`.
    pub(crate) fn stream_name(&self, key: usize) -> String {
        match self.streams.get(&key).map(|stream| stream.kind) {
            Some(Kind::Legacy) => "the default stream".to_owned(),
            Some(Kind::PerThread) => "the thread's default stream".to_owned(),
            _ => format!("stream {key:#x}"),
        }
    }

    /// The clock that an operation submitted now on a stream starts from.
    pub(crate) fn arrival(&self, key: usize) -> Clock {
        let stream = &self.streams[&key];
        let mut clock = stream.clock.clone();
        clock.join(&self.order.host);
        if stream.kind == Kind::Legacy {
            clock.join(&self.blocking_clock());
        } else if stream.blocks() {
            clock.join(&self.streams[&LEGACY].clock);
        }
        clock
    }

    /// Enters an operation that was carried out on a stream.
    pub(crate) fn enter(&mut self, key: usize, label: &str, accesses: &[Access], seconds: f64) {
        let mut clock = self.arrival(key);
        let lane = self.streams[&key].lane;
        let label = format!("{label} on {}", self.stream_name(key));
        self.order.enter(&mut self.device, &mut clock, lane, &label, accesses, seconds);
        if let Some(stream) = self.streams.get_mut(&key) {
            stream.clock = clock;
        }
    }

    /// Carries an operation out on a stream, or keeps it when the stream is capturing. `true`: a function of the host is to be
    /// called by the caller, without the lock.
    pub(crate) fn submit(&mut self, stream: Handle, action: Action) -> Status<bool> {
        let key = self.resolve(stream)?;
        if let Some(capture) = self.capture_of(key)? {
            self.check_action(&action)?;
            self.add_node(capture, key, action);
            return Ok(false);
        }
        self.forbid_implicit(key)?;
        let done = self.perform(&action, key)?;
        let label = done.label.unwrap_or_else(|| action.label());
        self.enter(key, &label, &done.accesses, done.seconds);
        Ok(matches!(action, Action::Host(_)))
    }

    /// [`State::submit`] for what is no function of the host.
    pub(crate) fn enqueue(&mut self, stream: Handle, action: Action) -> Status {
        self.submit(stream, action).map(|_| ())
    }

    /// The host waits for a stream; one that is capturing has no work to wait for, which its own calls refuse.
    pub(crate) fn join_stream(&mut self, stream: Handle) -> Status {
        let key = self.resolve(stream)?;
        if self.streams[&key].capture.is_none() {
            let clock = self.arrival(key);
            self.order.host.join(&clock);
        }
        Ok(())
    }

    fn create_stream(&mut self, stream: Out<Handle>, flags: c_uint, priority: c_int) -> Status {
        stream.check()?;
        if flags & !NON_BLOCKING != 0 {
            return Err(Code::InvalidValue);
        }
        let key = self.handle();
        self.add_stream(key, flags, priority.clamp(-5, 0), Kind::Created);
        stream.set(opaque(key))
    }
}

exports! {
    /// A stream.
    ctx fn cuStreamCreate(stream: Out<Handle>, flags: c_uint) |s| {
        s.create_stream(stream, flags, 0)
    }

    /// A stream with a priority, which has no effect.
    ctx fn cuStreamCreateWithPriority(stream: Out<Handle>, flags: c_uint, priority: c_int) |s| {
        s.create_stream(stream, flags, priority)
    }

    /// Ends a stream; its work counts as submitted to the device, and a synchronisation of the context still waits for it.
    end fn cuStreamDestroy_v2(stream: Handle) |s| {
        let key = number(stream);
        if key <= PER_THREAD {
            return Err(Code::InvalidValue);
        }
        match s.streams.get(&key).map(|stream| (stream.kind, stream.capture)) {
            Some((Kind::Created, capture)) => {
                if let Some(capture) = capture {
                    s.leave_capture(capture, key);
                }
                let Some(ended) = s.streams.remove(&key) else { return Err(Code::InvalidHandle) };
                s.ended.join(&ended.clock);
                Ok(())
            }
            _ => Err(Code::InvalidHandle),
        }
    }

    /// Waits for a stream.
    ctx fn cuStreamSynchronize(stream: Handle) |s| {
        let key = s.resolve(stream)?;
        s.forbid_in_capture(key, "cuStreamSynchronize")?;
        s.forbid_implicit(key)?;
        s.join_stream(stream)
    }

    /// Whether a stream's work has ended: always, and now the host knows.
    ctx fn cuStreamQuery(stream: Handle) |s| {
        let key = s.resolve(stream)?;
        s.forbid_in_capture(key, "cuStreamQuery")?;
        s.forbid_implicit(key)?;
        s.join_stream(stream)
    }

    /// Later work of the stream comes after what the event recorded.
    ctx fn cuStreamWaitEvent(stream: Handle, event: Handle, flags: c_uint) |s| {
        let key = s.resolve(stream)?;
        let event = number(event);
        let recorded = s.events.get(&event).ok_or(Code::InvalidHandle)?.recorded.clone();
        if flags > 1 {
            return Err(Code::InvalidValue);
        }
        if let Some(capture) = s.capture_of(key)? {
            return match recorded {
                _ if flags == 1 => {
                    s.add_node(capture, key, Action::Wait(event));
                    Ok(())
                }
                recorded => s.wait_in_capture(capture, key, &recorded),
            };
        }
        match recorded {
            Recorded::Never => Ok(()),
            Recorded::At(clock) => {
                let mut arrival = s.arrival(key);
                arrival.join(&clock);
                if let Some(stream) = s.streams.get_mut(&key) {
                    stream.clock = arrival;
                }
                Ok(())
            }
            Recorded::Captured { capture, after } => s.fork_into_capture(capture, key, &after),
        }
    }

    /// Calls a function of the host in stream order.
    free fn cuLaunchHostFunc(stream: Handle, function: HostFn, user: *mut c_void) |()| {
        let Some(run) = function else { return Err(Code::InvalidValue) };
        let call = HostCall { run, user: user.expose_provenance() };
        let now = with(|s| {
            usable(s)?;
            s.submit(stream, Action::Host(call))
        })?;
        if now {
            call.call();
        }
        Ok(())
    }

    /// The flags a stream was created with.
    ctx fn cuStreamGetFlags(stream: Handle, flags: Out<c_uint>) |s| {
        let key = s.resolve(stream)?;
        flags.set(s.streams[&key].flags)
    }

    /// The priority a stream was created with.
    ctx fn cuStreamGetPriority(stream: Handle, priority: Out<c_int>) |s| {
        let key = s.resolve(stream)?;
        priority.set(s.streams[&key].priority)
    }

    /// A number for a stream.
    ctx fn cuStreamGetId(stream: Handle, id: Out<u64>) |s| {
        let key = s.resolve(stream)?;
        id.set(key as u64)
    }

    /// The context of a stream.
    ctx fn cuStreamGetCtx(stream: Handle, context: Out<Handle>) |s| {
        s.resolve(stream)?;
        context.set(opaque(super::context::Contexts::current()))
    }

    /// The device of a stream.
    ctx fn cuStreamGetDevice(stream: Handle, device: Out<c_int>) |s| {
        s.resolve(stream)?;
        device.set(0)
    }
}
