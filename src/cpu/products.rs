//! What the factors of matrix products are rounded to.

use super::amx::Amx;
use crate::Result;

/// What the factors of matrix products are rounded to. All else is `f32` always: the residual stream, norms, softmax, scores,
/// similarities, and every sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Products {
    /// Nothing is rounded.
    #[default]
    F32,
    /// bf16, multiplied in the tiles of AMX: Linux on processors that have it (Intel's Xeon since Sapphire Rapids). The layers'
    /// inputs and weights are rounded to the nearest bf16, ties to even, denormals to 0, NaN stays NaN; of attention the queries,
    /// keys, values and the exponentials of the map. Weights take half the bytes, and read back as they were rounded. Matching,
    /// and the convolutions and frequency filters of AFFNets, multiply in `f32` all the same.
    Bf16,
}

impl Products {
    /// The name, as messages and reports spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// Whether this processor and the operating system have what it takes.
    ///
    /// # Errors
    /// When they do not; the message says what is missing.
    pub fn check(self) -> Result<()> {
        self.checked().map(drop)
    }

    pub(super) fn checked(self) -> Result<Option<Amx>> {
        match self {
            Self::F32 => Ok(None),
            Self::Bf16 => Amx::detect().map(Some),
        }
    }
}
