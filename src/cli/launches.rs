//! What a forward pass gives a device to do.

use serde_json::{Value, json};

/// Something that is enqueued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Launch {
    /// The operation.
    pub(crate) operation: String,
    /// The kernel, or the library's function.
    pub(crate) kernel: String,
    /// Bytes of the tensors that it reads and writes, each once.
    pub(crate) bytes: u64,
    /// Multiply-adds, of matrix products by the library.
    pub(crate) macs: u64,
    /// The model's block.
    layer: Option<usize>,
}

/// All of a pass.
#[derive(Debug)]
pub(crate) struct Launches {
    /// In order: the embedding's, each block's, the head's.
    pub(crate) segments: Vec<Vec<Launch>>,
    /// Bytes that an engine allocates once, beside the weights.
    pub(crate) arena_bytes: usize,
    /// The most of them that are in use at a time.
    pub(crate) live_bytes: usize,
}

impl Launch {
    /// `operation kernel` of its bytes and multiply-adds.
    pub(crate) fn json(&self) -> Value {
        json!({"operation": self.operation, "kernel": self.kernel, "bytes": self.bytes, "macs": self.macs})
    }
}

#[cfg(feature = "cuda")]
impl From<&foveate::cuda::LaunchRecord> for Launch {
    fn from(record: &foveate::cuda::LaunchRecord) -> Self {
        Self {
            operation: record.operation.to_owned(),
            kernel: record.kernel.clone(),
            bytes: record.bytes,
            macs: record.macs,
            layer: record.layer,
        }
    }
}

#[cfg(feature = "cuda")]
impl Launches {
    /// Those of a pass through a model of `depth` blocks.
    pub(crate) fn of(forecast: &foveate::cuda::Forecast, depth: usize) -> Self {
        Self {
            segments: by_segment(forecast.launches().iter().map(Launch::from), depth),
            arena_bytes: forecast.arena_bytes(),
            live_bytes: forecast.largest_live_bytes(),
        }
    }
}

/// What belongs to no block comes before the first or behind the last.
#[cfg(any(feature = "cuda", test))]
fn by_segment(launches: impl Iterator<Item = Launch>, depth: usize) -> Vec<Vec<Launch>> {
    let mut segments = vec![Vec::new(); depth + 2];
    let mut begun = false;
    for launch in launches {
        begun |= launch.layer.is_some();
        let at = launch.layer.map_or(if begun { depth + 1 } else { 0 }, |layer| (layer + 1).min(depth));
        segments[at].push(launch);
    }
    segments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn launches_belong_to_a_stretch_of_the_pass() {
        let launch =
            |layer| Launch { operation: "merge".into(), kernel: "k".into(), bytes: 1, macs: 0, layer };
        let layers = [None, None, Some(0), Some(1), Some(1), None];
        let segments = by_segment(layers.into_iter().map(launch), 2);
        assert_eq!(segments.iter().map(Vec::len).collect::<Vec<_>>(), [2, 1, 2, 1]);
    }
}
