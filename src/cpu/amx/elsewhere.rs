//! Where there is no AMX: nothing of it can be reached, because no [`Amx`] exists.

use std::ops::Range;

use super::{
    super::{
        attention::QueryRun,
        gemm::{Finish, Out, Rows},
    },
    Tiles,
};
use crate::{Error, Result};

#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) enum Amx {}

impl Amx {
    pub(in crate::cpu) fn detect() -> Result<Self> {
        let what =
            "bf16 on the processor takes AMX, which this foveate knows on Linux and x86-64 only; use f32";
        Err(Error::argument("products", what))
    }
}

pub(in crate::cpu) fn pack_transposed(amx: Amx, _: &[f32], _: usize, _: usize, _: &mut [u16]) {
    match amx {}
}

pub(in crate::cpu) fn scratch_values(_: usize) -> usize {
    0
}

pub(in crate::cpu) fn left_len(_: usize, _: usize) -> usize {
    0
}

pub(in crate::cpu) fn pack_rows(amx: Amx, _: Rows<'_>, _: usize, _: &mut [f32]) {
    match amx {}
}

#[expect(clippy::too_many_arguments, reason = "as many as a product has")]
pub(in crate::cpu) fn multiply(
    amx: Amx,
    _: &[f32],
    _: usize,
    _: Tiles<'_>,
    _: Range<usize>,
    _: Out<'_>,
    _: Finish<'_>,
    _: &mut [f32],
) {
    match amx {}
}

pub(in crate::cpu) fn head_values(_: usize, _: usize) -> usize {
    0
}

pub(in crate::cpu) fn attend(amx: Amx, _: QueryRun<'_>) {
    match amx {}
}

pub(in crate::cpu) fn times_values(_: usize, _: usize) -> usize {
    0
}

pub(in crate::cpu) fn times(
    amx: Amx,
    _: Rows<'_>,
    _: usize,
    _: (&[f32], usize),
    _: usize,
    _: Out<'_>,
    _: &mut [f32],
) {
    match amx {}
}
