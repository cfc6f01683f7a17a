//! Wall-clock measurements that stay comparable on a busy machine.

use std::time::{Duration, Instant};

use super::failure::Failure;

/// The middle value; the mean of the two middle ones of an even number. 0 of none.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    match n {
        0 => 0.0,
        _ if n % 2 == 1 => sorted[n / 2],
        _ => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

/// How often and how long to measure.
pub(crate) struct Patience {
    /// Rounds at least.
    pub(crate) rounds: usize,
    /// Rounds at most.
    pub(crate) most_rounds: usize,
    /// No further round is begun after so long.
    pub(crate) budget: Duration,
}

/// Runs things 0 to `count` in turn, round after round, each round beginning with another one, so that whatever else
/// the machine does meanwhile falls on all of them alike. Returns the seconds per thing and round.
pub(crate) fn in_turn(
    count: usize,
    patience: &Patience,
    mut run: impl FnMut(usize) -> Result<(), Failure>,
) -> Result<Vec<Vec<f64>>, Failure> {
    let mut seconds = vec![Vec::new(); count];
    let start = Instant::now();
    for round in 0..patience.most_rounds {
        if round >= patience.rounds && start.elapsed() >= patience.budget {
            break;
        }
        for turn in 0..count {
            let which = (round + turn) % count;
            let begun = Instant::now();
            run(which)?;
            seconds[which].push(begun.elapsed().as_secs_f64());
        }
    }
    Ok(seconds)
}

/// The median over the rounds of the first one's time over the other one's: how many times faster the other one is.
pub(crate) fn speedup(base: &[f64], other: &[f64]) -> f64 {
    let ratios: Vec<f64> = base.iter().zip(other).map(|(base, other)| base / other.max(1e-9)).collect();
    median(&ratios)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
        assert_eq!(speedup(&[2.0, 4.0, 100.0], &[1.0, 2.0, 1.0]), 2.0);
    }

    #[test]
    fn rounds_take_turns() {
        let mut order = Vec::new();
        let patience = Patience { rounds: 3, most_rounds: 5, budget: Duration::ZERO };
        let seconds = in_turn(3, &patience, |which| {
            order.push(which);
            Ok(())
        });
        assert_eq!(order, [0, 1, 2, 1, 2, 0, 2, 0, 1]);
        assert!(seconds.unwrap().iter().all(|thing| thing.len() == 3));
    }
}
