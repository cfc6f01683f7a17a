//! The sixteen barriers of a block.

/// What a barrier instruction asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// `bar.sync`, `bar.red`: the lanes wait.
    Sync,
    /// `bar.arrive`: the lanes go on.
    Arrive,
}

/// One barrier. A warp has arrived once all its live lanes have; counts are in warps of 32, as on hardware.
#[derive(Clone, Debug, Default)]
pub struct Barrier {
    /// Lanes of each warp that have arrived since the last completion.
    pub arrived: Vec<u32>,
    /// Threads the barrier waits for, when an instruction gave a number.
    pub count: Option<u32>,
    /// Warps whose lanes only arrived.
    pub arrive_only: Vec<bool>,
    /// Instruction of each warp's arrival, for reports.
    pub pc: Vec<u32>,
    /// Lanes with a true predicate (`bar.red`), lanes counted.
    pub votes: u32,
    /// Lanes that voted.
    pub voters: u32,
    /// Result of the last completed phase: number of true predicates, and of lanes.
    pub result: (u32, u32),
    /// Some lane's predicate was undefined.
    pub undefined: bool,
    /// The result of the last phase is undefined.
    pub result_undefined: bool,
}

impl Barrier {
    /// A barrier of a block with this many warps.
    pub fn new(warps: u32) -> Self {
        let n = warps as usize;
        Self { arrived: vec![0; n], arrive_only: vec![false; n], pc: vec![0; n], ..Self::default() }
    }

    /// Nobody is here.
    pub fn idle(&self) -> bool {
        self.arrived.iter().all(|&mask| mask == 0)
    }

    /// The warps that take part in the present phase.
    pub fn participants(&self) -> Vec<u32> {
        (0..self.arrived.len() as u32).filter(|&w| self.arrived[w as usize] != 0).collect()
    }

    /// Everyone the barrier waits for is here. `live` are the lanes of each warp that have not exited.
    pub fn complete(&self, live: &[u32]) -> bool {
        let whole = |warp: usize| self.arrived[warp] != 0 && self.arrived[warp] & live[warp] == live[warp];
        match self.count {
            None => !self.idle() && (0..live.len()).all(|w| live[w] == 0 || whole(w)),
            Some(count) => 32 * (0..live.len()).filter(|&w| whole(w)).count() as u32 >= count,
        }
    }

    /// Ends the phase.
    pub fn reset(&mut self) {
        self.arrived.fill(0);
        self.arrive_only.fill(false);
        self.count = None;
        self.result = (self.votes, self.voters);
        self.result_undefined = self.undefined;
        (self.votes, self.voters, self.undefined) = (0, 0, false);
    }
}
