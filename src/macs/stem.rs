//! Multiply-adds of what comes before the patch projection.

use super::Macs;
use crate::model::{Stem, TokensAttention, VitConfig};

/// The counts of a stem, without its last projection. A stem that finds no place for a window costs nothing: no model has it.
pub(super) fn of(config: &VitConfig) -> Macs {
    let Ok((steps, _)) = config.stem_grids() else { return Macs::default() };
    let places = |at: usize| steps.get(at).map_or(0, |(_, [height, width])| (height * width) as u64);
    match config.stem {
        Stem::Patches => Macs::default(),
        Stem::Convolutions { filters } => {
            // A window's places are the grid that the next one moves over.
            let (f, channels) = (filters as u64, config.channels as u64);
            let products = [(places(1), 49 * channels), (places(2), 9 * f), (places(3), 9 * f)];
            Macs {
                linear: products.iter().map(|(places, inputs)| places * inputs * f).sum(),
                batch_normalised: products.iter().map(|(places, _)| places * f).sum(),
                ..Macs::default()
            }
        }
        Stem::TokensToToken { width, attention } => {
            let t = width as u64;
            let inputs = config.stage_inputs(width).map(|inputs| inputs as u64);
            let stages = [(places(1), inputs[0]), (places(2), inputs[1])];
            let attended = |n: u64| match attention {
                TokensAttention::Transformer => 2 * n * n * t,
                // Features of keys and queries, what they are divided by, sums and their use.
                TokensAttention::Performer { features } => features as u64 * n * (4 * t + 1),
            };
            let softmax = |n: u64| if attention == TokensAttention::Transformer { n * n } else { 0 };
            Macs {
                linear: stages.iter().map(|(n, inputs)| n * (3 * t * inputs + 3 * t * t)).sum(),
                attention: stages.iter().map(|(n, _)| attended(*n)).sum(),
                normalised: stages.iter().map(|(n, inputs)| n * (inputs + t)).sum(),
                softmax: stages.iter().map(|(n, _)| softmax(*n)).sum(),
                ..Macs::default()
            }
        }
    }
}
