//! What a launch moved, by the emulator's counters, against what it must move.

use serde_json::Value as Json;

use crate::{Turn, emulator};

/// The counters of one launch.
#[derive(Clone, Debug)]
pub struct Traffic {
    json: Json,
}

impl Traffic {
    /// Runs `work` and gives the counters of its one launch.
    ///
    /// # Panics
    /// When it launches nothing or several kernels.
    pub fn of(turn: &Turn, work: impl FnOnce()) -> Self {
        turn.stream.synchronize().unwrap();
        emulator::reset_counters();
        work();
        turn.stream.synchronize().unwrap();
        let all: Vec<Json> = serde_json::from_str(&emulator::counters()).unwrap();
        let [json] = <[Json; 1]>::try_from(all).expect("one launch");
        Self { json }
    }

    fn number(json: &Json) -> f64 {
        json.as_f64().expect("a number")
    }

    /// Bytes of the sectors touched, for each byte of `must`. Prints it, with the efficiency of loads and stores: the share
    /// of the touched sectors' bytes that each request uses.
    ///
    /// # Panics
    /// When the launch had bank conflicts or float atomics whose order shows.
    pub fn over(&self, must: usize) -> f64 {
        let moved = self.moved();
        let over = moved / must as f64;
        println!(
            "{}: {moved} bytes, {over:.3} of what it must; efficiency {:.3} of loads, {:.3} of stores; {} warp instructions",
            self.json["kernel"],
            self.loads(),
            self.stores(),
            self.json["insts"]
        );
        assert_eq!(self.json["shared"]["bank_conflicts"], 0, "{}", self.json["bank_conflict_lines"]);
        assert_eq!(self.json["nondeterministic_atomics"], 0);
        over
    }

    /// Bytes of the sectors touched.
    pub fn moved(&self) -> f64 {
        Self::number(&self.json["unique_bytes_read"]) + Self::number(&self.json["unique_bytes_written"])
    }

    /// Bytes wanted by loads, of those of the sectors that each request touches.
    pub fn loads(&self) -> f64 {
        Self::number(&self.json["global"]["ld"]["efficiency"])
    }

    /// The same of stores.
    pub fn stores(&self) -> f64 {
        Self::number(&self.json["global"]["st"]["efficiency"])
    }

    /// Warp instructions.
    pub fn instructions(&self) -> f64 {
        Self::number(&self.json["insts"])
    }

    /// Those of them that multiply on tensor cores.
    pub fn matrix_instructions(&self) -> f64 {
        self.json["insts_by_class"]["mma"].as_f64().unwrap_or(0.0)
    }

    /// The kernel's name.
    pub fn kernel(&self) -> &str {
        self.json["kernel"].as_str().unwrap_or_default()
    }
}
