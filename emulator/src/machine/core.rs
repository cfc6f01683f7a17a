//! What an instruction sees while it runs.

use super::block::Block;
use super::inst::{Flow, Inst, Kernel};
use super::warp::Warp;
use crate::check::global::GlobalRace;
use crate::config::{Check, Config, Level};
use crate::count::Counters;
use crate::mem::Memory;
use crate::report::{Fault, Reports};

/// The machine as one instruction of one warp sees it.
#[derive(Debug)]
pub struct Core<'a> {
    /// The warp that executes.
    pub warp: &'a mut Warp,
    /// Its block.
    pub block: &'a mut Block,
    /// Device memory.
    pub memory: &'a mut Memory,
    /// The kernel.
    pub kernel: &'a Kernel,
    /// Bytes of the kernel parameters.
    pub params: &'a [u8],
    /// Settings.
    pub config: &'a Config,
    /// Counters of the launch.
    pub counters: &'a mut Counters,
    /// Races between blocks.
    pub global_race: &'a mut GlobalRace,
    /// Findings.
    pub reports: &'a mut Reports,
    /// `launch #7: grid (4,6,1) block (128,1,1) dynamic shared 40960, stream 0x2000`.
    pub launch: &'a str,
    /// The first fault of the launch.
    pub fault: &'a mut Option<Fault>,
    /// The instruction runs again because its barrier has completed.
    pub resumed: bool,
    /// Text printed by the kernel so far.
    pub printed: &'a mut String,
}

impl Core<'_> {
    /// Files a finding about `inst` executed by `lanes`. `lines[0]` is the title. At level error the fault is recorded and
    /// [`Flow::Fault`] comes back, otherwise [`Flow::Next`]: the caller goes on with what is defined for that case.
    #[cold]
    pub fn find(
        &mut self,
        check: Check,
        fault: Fault,
        inst: &Inst,
        lanes: u32,
        mut lines: Vec<String>,
    ) -> Flow {
        let level = self.config.level(check);
        if level == Level::Off {
            return Flow::Next;
        }
        let meta = &self.kernel.meta[inst.pc as usize];
        let [x, y, z] = self.warp.thread(lanes, self.block.ids.ntid);
        let [bx, by, bz] = self.block.ids.ctaid;
        let mut place = vec![self.place(inst.pc)];
        place.push(format!(
            "by thread ({x},{y},{z}) in block ({bx},{by},{bz}), lanes {lanes:08x}, warp {}",
            self.warp.id
        ));
        lines.splice(1..1, place);
        lines.push(self.launch.to_owned());
        self.reports.push(check, level, &self.kernel.name, meta.line, &lines);
        if level == Level::Error {
            self.fault.get_or_insert(fault);
            Flow::Fault
        } else {
            Flow::Next
        }
    }

    /// `at attn_f16  ptx line 412  (attn.cu:57)  instruction: ld.global...`.
    pub fn place(&self, pc: u32) -> String {
        let meta = &self.kernel.meta[pc as usize];
        let source = self.kernel.source_of(pc).map(|s| format!("  ({s})")).unwrap_or_default();
        format!("at {}  ptx line {}{source}  instruction: {}", self.kernel.name, meta.line, meta.text)
    }

    /// Reports lanes whose value is undefined where it decides something; `what` completes "Undefined value used as ...".
    #[cold]
    pub fn undefined(&mut self, inst: &Inst, lanes: u32, what: &str) -> Flow {
        let fault = Fault::LaunchFailed;
        self.find(Check::Uninit, fault, inst, lanes, vec![format!("Undefined value used as {what}")])
    }
}
