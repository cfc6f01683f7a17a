//! Stream capture: streams keep their operations as the nodes of a graph instead of carrying them out.

use super::action::Action;
use super::event::Recorded;
use super::exports;
use super::ffi::{Code, Handle, Out, Status};
use super::graph::{Graph, Node};
use super::state::{State, opaque};
use super::stream::{LEGACY, thread};
use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{c_int, c_uint, c_void};

/// `CU_STREAM_CAPTURE_MODE_GLOBAL`, `_THREAD_LOCAL` and `_RELAXED`.
const GLOBAL: c_uint = 0;
const THREAD_LOCAL: c_uint = 1;
const RELAXED: c_uint = 2;

thread_local! {
    /// How strict the thread wants calls to be that could disturb a capture.
    static MODE: Cell<c_uint> = const { Cell::new(GLOBAL) };
}

/// A capture under way.
#[derive(Debug)]
pub(crate) struct Capture {
    origin: usize,
    mode: c_uint,
    thread: usize,
    valid: bool,
    nodes: Vec<Node>,
    /// For each stream that takes part, its position in the graph and its last nodes.
    streams: HashMap<usize, (usize, Vec<usize>)>,
    lanes: usize,
}

impl Capture {
    fn join(&mut self, key: usize, after: &[usize]) {
        let lanes = &mut self.lanes;
        let (_, tips) = self.streams.entry(key).or_insert_with(|| {
            *lanes += 1;
            (*lanes - 1, Vec::new())
        });
        for &node in after {
            if !tips.contains(&node) {
                tips.push(node);
            }
        }
    }

    /// Every node is before the origin's next operation.
    fn all_joined(&self) -> bool {
        let mut joined = vec![false; self.nodes.len()];
        let mut open = self.streams.get(&self.origin).map(|(_, tips)| tips.clone()).unwrap_or_default();
        while let Some(node) = open.pop() {
            if !std::mem::replace(&mut joined[node], true) {
                open.extend(&self.nodes[node].after);
            }
        }
        joined.iter().all(|&j| j)
    }
}

impl State {
    /// The capture a stream takes part in; an invalidated one is an error.
    pub(crate) fn capture_of(&self, key: usize) -> Status<Option<usize>> {
        let Some(capture) = self.streams.get(&key).and_then(|stream| stream.capture) else { return Ok(None) };
        match self.captures.get(&capture) {
            Some(c) if c.valid => Ok(Some(capture)),
            _ => Err(Code::CaptureInvalidated),
        }
    }

    /// Nothing more can come of a capture.
    pub(crate) fn invalidate(&mut self, capture: usize) {
        if let Some(capture) = self.captures.get_mut(&capture) {
            capture.valid = false;
        }
    }

    /// The last nodes of a capturing stream.
    pub(crate) fn tips(&self, capture: usize, key: usize) -> Vec<usize> {
        let capture = self.captures.get(&capture);
        capture.and_then(|c| c.streams.get(&key)).map(|(_, tips)| tips.clone()).unwrap_or_default()
    }

    /// Keeps an operation of a capturing stream.
    pub(crate) fn add_node(&mut self, capture: usize, key: usize, action: Action) {
        let Some(capture) = self.captures.get_mut(&capture) else { return };
        let index = capture.nodes.len();
        let Some((lane, tips)) = capture.streams.get_mut(&key) else { return };
        let after = std::mem::replace(tips, vec![index]);
        capture.nodes.push(Node { action, after, lane: *lane });
    }

    /// Keeps all nodes of a graph in place of its launch on a capturing stream.
    pub(crate) fn add_child(&mut self, capture: usize, key: usize, child: &[Node], lanes: usize) {
        let Some(capture) = self.captures.get_mut(&capture) else { return };
        let (first, lane) = (capture.nodes.len(), capture.lanes);
        let Some((_, tips)) = capture.streams.get_mut(&key) else { return };
        let before = tips.clone();
        let mut last = vec![true; child.len()];
        for node in child {
            node.after.iter().for_each(|&n| last[n] = false);
            let after = if node.after.is_empty() {
                before.clone()
            } else {
                node.after.iter().map(|n| n + first).collect()
            };
            capture.nodes.push(Node { action: node.action.clone(), after, lane: node.lane + lane });
        }
        if !child.is_empty() {
            *tips = (0..child.len()).filter(|&n| last[n]).map(|n| n + first).collect();
        }
        capture.lanes += lanes;
    }

    /// A capturing stream waits for an event.
    pub(crate) fn wait_in_capture(&mut self, capture: usize, key: usize, recorded: &Recorded) -> Status {
        match recorded {
            Recorded::Never => Ok(()),
            Recorded::Captured { capture: other, after } if *other == capture => {
                if let Some(capture) = self.captures.get_mut(&capture) {
                    capture.join(key, after);
                }
                Ok(())
            }
            Recorded::Captured { capture: other, .. } if self.captures.contains_key(other) => {
                self.invalidate(capture);
                self.invalidate(*other);
                Err(Code::CaptureMerge)
            }
            Recorded::Captured { .. } | Recorded::At(_) => {
                self.invalidate(capture);
                Err(Code::CaptureIsolation)
            }
        }
    }

    /// A stream waits for an event recorded in a capture: from now on it takes part.
    pub(crate) fn fork_into_capture(&mut self, capture: usize, key: usize, after: &[usize]) -> Status {
        let Some(target) = self.captures.get_mut(&capture) else { return Err(Code::CapturedEvent) };
        if !target.valid {
            return Err(Code::CaptureInvalidated);
        }
        if key == LEGACY {
            target.valid = false;
            return Err(Code::CaptureImplicit);
        }
        target.join(key, after);
        if let Some(stream) = self.streams.get_mut(&key) {
            stream.capture = Some(capture);
        }
        Ok(())
    }

    /// A stream that takes part is destroyed: without its origin a capture cannot end well.
    pub(crate) fn leave_capture(&mut self, capture: usize, key: usize) {
        if self.captures.get(&capture).is_some_and(|c| c.origin == key) {
            self.invalidate(capture);
        }
    }

    /// A call that must wait for a stream cannot be made while the stream is capturing.
    pub(crate) fn forbid_in_capture(&mut self, key: usize, what: &str) -> Status {
        let Some(capture) = self.capture_of(key)? else { return Ok(()) };
        self.invalidate(capture);
        let lines = [format!("Invalid {what} on {} while it is capturing", self.stream_name(key))];
        Err(self.refuse(Code::CaptureUnsupported, &lines))
    }

    /// A call that waits for everything cannot be made while any stream is capturing.
    pub(crate) fn forbid_while_capturing(&mut self) -> Status {
        let mut found = false;
        for capture in self.captures.values_mut().filter(|c| c.valid) {
            (capture.valid, found) = (false, true);
        }
        if found { Err(Code::CaptureUnsupported) } else { Ok(()) }
    }

    /// The legacy default stream waits for blocking streams, and a capturing one has nothing to wait for.
    pub(crate) fn forbid_implicit(&mut self, key: usize) -> Status {
        if key != LEGACY || self.captures.is_empty() {
            return Ok(());
        }
        let captures = self.streams.values().filter(|s| s.blocks()).filter_map(|s| s.capture);
        let mut found = false;
        for capture in captures.collect::<Vec<_>>() {
            self.invalidate(capture);
            found = true;
        }
        if found { Err(Code::CaptureImplicit) } else { Ok(()) }
    }

    /// Calls that could wait for other work, such as cuMemAlloc, are refused as the modes of captures and threads say.
    pub(crate) fn forbid_unsafe_call(&mut self) -> Status {
        let (mode, thread) = (MODE.get(), thread());
        let disturbed = |c: &Capture| match mode {
            RELAXED => false,
            _ if c.thread == thread => c.mode != RELAXED,
            THREAD_LOCAL => false,
            _ => c.mode == GLOBAL,
        };
        let mut found = false;
        for capture in self.captures.values_mut().filter(|c| c.valid && disturbed(c)) {
            (capture.valid, found) = (false, true);
        }
        if found { Err(Code::CaptureUnsupported) } else { Ok(()) }
    }

    fn begin_capture(&mut self, stream: Handle, mode: c_uint) -> Status {
        let key = self.resolve(stream)?;
        if mode > RELAXED {
            return Err(Code::InvalidValue);
        }
        if key == LEGACY {
            return Err(Code::CaptureUnsupported);
        }
        if self.streams[&key].capture.is_some() {
            return Err(Code::IllegalState);
        }
        let id = self.handle();
        let mut capture = Capture {
            origin: key,
            mode,
            thread: thread(),
            valid: true,
            nodes: Vec::new(),
            streams: HashMap::new(),
            lanes: 0,
        };
        capture.join(key, &[]);
        self.captures.insert(id, capture);
        if let Some(stream) = self.streams.get_mut(&key) {
            stream.capture = Some(id);
        }
        Ok(())
    }

    fn end_capture(&mut self, stream: Handle, graph: Out<Handle>) -> Status {
        graph.set(std::ptr::null_mut())?;
        let key = self.resolve(stream)?;
        let Some(id) = self.streams[&key].capture else { return Err(Code::IllegalState) };
        let Some(capture) = self.captures.get(&id) else { return Err(Code::CaptureInvalidated) };
        if capture.origin != key {
            self.invalidate(id);
            return Err(Code::CaptureUnmatched);
        }
        if capture.mode != RELAXED && capture.thread != thread() {
            return Err(Code::CaptureWrongThread);
        }
        let Some(capture) = self.captures.remove(&id) else { return Err(Code::CaptureInvalidated) };
        for stream in self.streams.values_mut().filter(|stream| stream.capture == Some(id)) {
            stream.capture = None;
        }
        if !capture.valid {
            return Err(Code::CaptureInvalidated);
        }
        if !capture.all_joined() {
            return Err(Code::CaptureUnjoined);
        }
        let handle = self.add_graph(Graph::new(capture.nodes, capture.lanes));
        graph.set(opaque(handle))
    }

    /// 0 none, 1 active, 2 invalidated, and the number of the capture.
    fn capture_status(&mut self, stream: Handle) -> Status<(c_int, u64)> {
        let key = self.resolve(stream)?;
        Ok(match (self.streams[&key].capture, self.capture_of(key)) {
            (None, _) => (0, 0),
            (Some(id), Ok(_)) => (1, id as u64),
            (Some(id), Err(_)) => (2, id as u64),
        })
    }
}

exports! {
    /// The stream keeps its operations from now on.
    ctx fn cuStreamBeginCapture_v2(stream: Handle, mode: c_uint) |s| {
        s.begin_capture(stream, mode)
    }

    /// The operations kept since the beginning, as a graph.
    ctx fn cuStreamEndCapture(stream: Handle, graph: Out<Handle>) |s| {
        s.end_capture(stream, graph)
    }

    /// Whether a stream is capturing.
    ctx fn cuStreamIsCapturing(stream: Handle, status: Out<c_int>) |s| {
        let (now, _) = s.capture_status(stream)?;
        status.set(now)
    }

    /// Whether a stream is capturing, and the number of the capture.
    ctx fn cuStreamGetCaptureInfo(stream: Handle, status: Out<c_int>, id: Out<u64>) |s| {
        let (now, number) = s.capture_status(stream)?;
        id.set_if_wanted(number);
        status.set(now)
    }

    /// Whether a stream is capturing, and the number of the capture; its graph and dependencies are not given out.
    ctx fn cuStreamGetCaptureInfo_v2(
        stream: Handle, status: Out<c_int>, id: Out<u64>, graph: Out<Handle>, after: Out<*const c_void>, count: Out<usize>
    ) |s| {
        let (now, number) = s.capture_status(stream)?;
        id.set_if_wanted(number);
        graph.set_if_wanted(std::ptr::null_mut());
        after.set_if_wanted(std::ptr::null());
        count.set_if_wanted(0);
        status.set(now)
    }

    /// Exchanges how strict the thread is about calls that could disturb a capture.
    init fn cuThreadExchangeStreamCaptureMode(mode: Out<c_uint>) |_| {
        let new = mode.get()?;
        if new > RELAXED {
            return Err(Code::InvalidValue);
        }
        mode.set(MODE.replace(new))
    }
}
