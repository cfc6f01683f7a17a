//! Events.

use super::action::Action;
use super::exports;
use super::ffi::{Code, Handle, Out, Status};
use super::order::Clock;
use super::state::{State, number, opaque};
use std::ffi::c_uint;

/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: c_uint = 2;
/// `CU_EVENT_INTERPROCESS`.
const INTERPROCESS: c_uint = 4;

/// An event.
#[derive(Debug)]
pub(crate) struct Event {
    flags: c_uint,
    pub(crate) recorded: Recorded,
}

/// What an event has recorded last.
#[derive(Clone, Debug)]
pub(crate) enum Recorded {
    Never,
    /// A point of a stream.
    At(Clock),
    /// The last nodes of a stream that was capturing.
    Captured {
        capture: usize,
        after: Vec<usize>,
    },
}

impl State {
    fn event(&self, event: Handle) -> Status<&Event> {
        self.events.get(&number(event)).ok_or(Code::InvalidHandle)
    }

    fn record(&mut self, event: Handle, stream: Handle, flags: c_uint) -> Status {
        let key = self.resolve(stream)?;
        self.event(event)?;
        if flags > 1 {
            return Err(Code::InvalidValue);
        }
        let recorded = if let Some(capture) = self.capture_of(key)? {
            if flags == 1 {
                self.add_node(capture, key, Action::Record(number(event)));
                return Ok(());
            }
            Recorded::Captured { capture, after: self.tips(capture, key) }
        } else {
            self.forbid_implicit(key)?;
            let clock = self.arrival(key);
            if let Some(stream) = self.streams.get_mut(&key) {
                stream.clock = clock.clone();
            }
            Recorded::At(clock)
        };
        if let Some(event) = self.events.get_mut(&number(event)) {
            event.recorded = recorded;
        }
        Ok(())
    }

    /// The host learns that what an event recorded has ended.
    fn join_event(&mut self, event: Handle) -> Status {
        match self.event(event)?.recorded.clone() {
            Recorded::Never => Ok(()),
            Recorded::At(clock) => {
                self.order.host.join(&clock);
                Ok(())
            }
            Recorded::Captured { capture, .. } => {
                self.invalidate(capture);
                Err(Code::CapturedEvent)
            }
        }
    }

    fn elapsed(&mut self, milliseconds: Out<f32>, start: Handle, end: Handle) -> Status {
        milliseconds.check()?;
        let time = |event: &Event| match &event.recorded {
            _ if event.flags & DISABLE_TIMING != 0 => Err(Code::InvalidHandle),
            Recorded::Never => Err(Code::InvalidHandle),
            Recorded::At(clock) => Ok(clock.time),
            Recorded::Captured { .. } => Err(Code::CapturedEvent),
        };
        let (start, end) = (time(self.event(start)?)?, time(self.event(end)?)?);
        milliseconds.set(((end - start) * 1e3) as f32)
    }
}

exports! {
    /// An event that has recorded nothing.
    ctx fn cuEventCreate(event: Out<Handle>, flags: c_uint) |s| {
        event.check()?;
        if flags & !7 != 0 || (flags & INTERPROCESS != 0 && flags & DISABLE_TIMING == 0) {
            return Err(Code::InvalidValue);
        }
        let handle = s.handle();
        s.events.insert(handle, Event { flags, recorded: Recorded::Never });
        event.set(opaque(handle))
    }

    /// Records the work a stream has so far.
    ctx fn cuEventRecord(event: Handle, stream: Handle) |s| {
        s.record(event, stream, 0)
    }

    /// Records the work a stream has so far; flag 1 makes a node of it in a capture.
    ctx fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: c_uint) |s| {
        s.record(event, stream, flags)
    }

    /// Whether the recorded work has ended: always, and now the host knows.
    ctx fn cuEventQuery(event: Handle) |s| {
        s.forbid_unsafe_call()?;
        s.join_event(event)
    }

    /// Waits for the recorded work.
    ctx fn cuEventSynchronize(event: Handle) |s| {
        s.join_event(event)
    }

    /// Modelled milliseconds between two records: a bound from counted work, no measurement.
    ctx fn cuEventElapsedTime(milliseconds: Out<f32>, start: Handle, end: Handle) |s| {
        s.elapsed(milliseconds, start, end)
    }

    /// Modelled milliseconds between two records: a bound from counted work, no measurement.
    ctx fn cuEventElapsedTime_v2(milliseconds: Out<f32>, start: Handle, end: Handle) |s| {
        s.elapsed(milliseconds, start, end)
    }

    /// Ends an event.
    end fn cuEventDestroy_v2(event: Handle) |s| {
        s.events.remove(&number(event)).map(|_| ()).ok_or(Code::InvalidHandle)
    }
}
