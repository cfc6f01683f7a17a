//! Graphs: what captures leave, launched as often as wanted.

use super::action::{Action, HostCall};
use super::event::Recorded;
use super::exports;
use super::ffi::{Code, Handle, Out, Status};
use super::order::Clock;
use super::state::{State, number, opaque, usable, with};
use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::Arc;

/// `CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH`.
const DEVICE_LAUNCH: u64 = 4;
/// `AUTO_FREE_ON_LAUNCH`, `UPLOAD`, `DEVICE_LAUNCH` and `USE_NODE_PRIORITY`.
const KNOWN_FLAGS: u64 = 15;

/// An operation of a graph.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub(crate) action: Action,
    /// Nodes that come before it.
    pub(crate) after: Vec<usize>,
    /// Which of the captured streams it was submitted to.
    pub(crate) lane: usize,
}

/// A graph.
#[derive(Clone, Debug)]
pub(crate) struct Graph {
    nodes: Arc<Vec<Node>>,
    lanes: usize,
    handles: Vec<usize>,
}

impl Graph {
    pub(crate) fn new(nodes: Vec<Node>, lanes: usize) -> Self {
        Self { nodes: Arc::new(nodes), lanes, handles: Vec::new() }
    }
}

/// A graph ready to be launched.
#[derive(Debug)]
pub(crate) struct Exec {
    nodes: Arc<Vec<Node>>,
    /// Positions of its streams in the vector clocks.
    lanes: Vec<usize>,
    flags: u64,
}

/// A launch of a graph under way.
struct Run {
    exec: Arc<Exec>,
    key: usize,
    start: Clock,
    clocks: Vec<Clock>,
}

impl State {
    /// Gives a graph and its nodes handles.
    pub(crate) fn add_graph(&mut self, mut graph: Graph) -> usize {
        graph.handles = graph.nodes.iter().map(|_| self.handle()).collect();
        let handle = self.handle();
        self.graphs.insert(handle, graph);
        handle
    }

    fn instantiate(&mut self, exec: Out<Handle>, graph: Handle, flags: u64) -> Status {
        exec.set(std::ptr::null_mut())?;
        let graph = self.graphs.get(&number(graph)).ok_or(Code::InvalidHandle)?;
        if flags & DEVICE_LAUNCH != 0 || flags & !KNOWN_FLAGS != 0 {
            return Err(Code::InvalidValue);
        }
        let (nodes, count) = (Arc::clone(&graph.nodes), graph.lanes);
        let lanes = (0..count).map(|_| self.order.lane()).collect();
        let handle = self.handle();
        self.execs.insert(handle, Arc::new(Exec { nodes, lanes, flags }));
        exec.set(opaque(handle))
    }

    /// Begins a launch; `None` when the stream is capturing and has kept the nodes.
    fn begin_graph(&mut self, exec: Handle, stream: Handle) -> Status<Option<Run>> {
        let exec = Arc::clone(self.execs.get(&number(exec)).ok_or(Code::InvalidHandle)?);
        let key = self.resolve(stream)?;
        if let Some(capture) = self.capture_of(key)? {
            self.add_child(capture, key, &exec.nodes, exec.lanes.len());
            return Ok(None);
        }
        self.forbid_implicit(key)?;
        let start = self.arrival(key);
        let clocks = Vec::with_capacity(exec.nodes.len());
        Ok(Some(Run { exec, key, start, clocks }))
    }

    /// Carries a node out. A function of the host comes back for the caller to call without the lock. After a fault nothing more
    /// is done.
    fn run_node(&mut self, run: &mut Run, index: usize) -> Status<Option<HostCall>> {
        let node = &run.exec.nodes[index];
        let mut clock = run.start.clone();
        for &before in &node.after {
            clock.join(&run.clocks[before]);
        }
        let mut host = None;
        if self.device.fault.is_none() {
            match &node.action {
                Action::Host(call) => host = Some(*call),
                Action::Wait(event) => {
                    if let Some(Recorded::At(recorded)) = self.events.get(event).map(|e| &e.recorded) {
                        clock.join(recorded);
                    }
                }
                _ => {}
            }
            let done = self.perform(&node.action, run.key)?;
            let label = done.label.unwrap_or_else(|| node.action.label());
            let label = format!("{label} (node {index} of a graph on {})", self.stream_name(run.key));
            let lane = run.exec.lanes[node.lane];
            self.order.enter(&mut self.device, &mut clock, lane, &label, &done.accesses, done.seconds);
            if let Action::Record(event) = &node.action
                && let Some(event) = self.events.get_mut(event)
            {
                event.recorded = Recorded::At(clock.clone());
            }
        }
        run.clocks.push(clock);
        Ok(host)
    }

    /// The stream goes on after all nodes.
    fn end_graph(&mut self, run: &Run) {
        if let Some(stream) = self.streams.get_mut(&run.key) {
            stream.clock.join(&run.start);
            run.clocks.iter().for_each(|clock| stream.clock.join(clock));
        }
    }

    fn nodes_out(&self, graph: Handle, nodes: *mut Handle, count: Out<usize>, roots: bool) -> Status {
        let graph = self.graphs.get(&number(graph)).ok_or(Code::InvalidHandle)?;
        let wanted =
            graph.handles.iter().zip(graph.nodes.iter()).filter(|(_, node)| !roots || node.after.is_empty());
        let handles: Vec<usize> = wanted.map(|(&handle, _)| handle).collect();
        if nodes.is_null() {
            return count.set(handles.len());
        }
        let room = count.get()?;
        for i in 0..room {
            let handle = handles.get(i).map_or(std::ptr::null_mut(), |&handle| opaque(handle));
            // SAFETY: the caller promised room for as many handles as it says.
            unsafe { nodes.add(i).write_unaligned(handle) };
        }
        count.set(room.min(handles.len()))
    }
}

exports! {
    /// A graph without nodes.
    ctx fn cuGraphCreate(graph: Out<Handle>, flags: c_uint) |s| {
        graph.check()?;
        if flags != 0 {
            return Err(Code::InvalidValue);
        }
        let handle = s.add_graph(Graph::new(Vec::new(), 0));
        graph.set(opaque(handle))
    }

    /// A copy of a graph.
    ctx fn cuGraphClone(copy: Out<Handle>, graph: Handle) |s| {
        copy.check()?;
        let graph = s.graphs.get(&number(graph)).ok_or(Code::InvalidHandle)?.clone();
        let handle = s.add_graph(graph);
        copy.set(opaque(handle))
    }

    /// Makes a graph ready to be launched.
    ctx fn cuGraphInstantiateWithFlags(exec: Out<Handle>, graph: Handle, flags: c_ulonglong) |s| {
        s.instantiate(exec, graph, flags)
    }

    /// Makes a graph ready to be launched.
    ctx fn cuGraphInstantiate_v2(
        exec: Out<Handle>, graph: Handle, error_node: Out<Handle>, log: *mut c_char, len: usize
    ) |s| {
        error_node.set_if_wanted(std::ptr::null_mut());
        super::ffi::copy_text("", log, len);
        s.instantiate(exec, graph, 0)
    }

    /// The flags a graph was made ready with.
    ctx fn cuGraphExecGetFlags(exec: Handle, flags: Out<u64>) |s| {
        let exec = s.execs.get(&number(exec)).ok_or(Code::InvalidHandle)?;
        flags.set(exec.flags)
    }

    /// Carries out all nodes of a graph.
    free fn cuGraphLaunch(exec: Handle, stream: Handle) |()| {
        let run = with(|s| {
            usable(s)?;
            s.begin_graph(exec, stream)
        })?;
        let Some(mut run) = run else { return Ok(()) };
        let mut outcome = Ok(());
        for index in 0..run.exec.nodes.len() {
            match with(|s| s.run_node(&mut run, index)) {
                Ok(Some(call)) => call.call(),
                Ok(None) => {}
                Err(code) => {
                    outcome = Err(code);
                    break;
                }
            }
        }
        // A graph that is destroyed meanwhile ends here, and the functions that frees call must find the lock free.
        with(|s| s.end_graph(&run));
        outcome
    }

    /// Prepares a launch: nothing to do.
    ctx fn cuGraphUpload(exec: Handle, stream: Handle) |s| {
        s.resolve(stream)?;
        if s.execs.contains_key(&number(exec)) { Ok(()) } else { Err(Code::InvalidHandle) }
    }

    /// Ends a graph that was made ready.
    end fn cuGraphExecDestroy(exec: Handle) |s| {
        s.execs.remove(&number(exec)).map(|_| ()).ok_or(Code::InvalidHandle)
    }

    /// Ends a graph; what was made ready from it stays.
    end fn cuGraphDestroy(graph: Handle) |s| {
        s.graphs.remove(&number(graph)).map(|_| ()).ok_or(Code::InvalidHandle)
    }

    /// The nodes of a graph, or how many there are.
    ctx fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: Out<usize>) |s| {
        s.nodes_out(graph, nodes, count, false)
    }

    /// The nodes without predecessors, or how many there are.
    ctx fn cuGraphGetRootNodes(graph: Handle, nodes: *mut Handle, count: Out<usize>) |s| {
        s.nodes_out(graph, nodes, count, true)
    }

    /// What kind of operation a node is.
    ctx fn cuGraphNodeGetType(node: Handle, kind: Out<c_int>) |s| {
        let found = s.graphs.values().find_map(|graph| {
            let index = graph.handles.iter().position(|&handle| handle == number(node))?;
            Some(&graph.nodes[index].action)
        });
        kind.set(match found.ok_or(Code::InvalidHandle)? {
            Action::Kernel(_) => 0,
            Action::Copy { .. } => 1,
            Action::Fill { .. } => 2,
            Action::Host(_) | Action::Emulated(_) => 3,
            Action::Wait(_) => 6,
            Action::Record(_) => 7,
        })
    }

    /// Changing a graph that was made ready is not supported.
    ctx fn cuGraphExecUpdate_v2(exec: Handle, graph: Handle, result: *mut c_void) |s| {
        let _ = result;
        if !s.execs.contains_key(&number(exec)) || !s.graphs.contains_key(&number(graph)) {
            return Err(Code::InvalidHandle);
        }
        Err(Code::NotSupported)
    }
}
