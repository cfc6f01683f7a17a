//! The tile instructions. Rust's intrinsics for them are not stable yet.

use std::arch::asm;

use super::{Amx, PANEL, TILE_ROWS};

/// The tiles, set up: all eight have 16 rows of 64 bytes. They are let go when this is dropped: contents that outlive a kernel
/// would be saved and restored with every switch of threads.
pub(super) struct Configured(());

#[repr(C, align(64))]
struct Configuration([u8; 64]);

impl Configured {
    pub(super) fn new(_: Amx) -> Self {
        static CONFIGURATION: Configuration = {
            let mut bytes = [0; 64];
            // The palette, then the bytes of each tile's rows, 16 bits each, and the rows.
            bytes[0] = 1;
            let mut tile = 0;
            while tile < 8 {
                bytes[16 + 2 * tile] = 64;
                bytes[48 + tile] = TILE_ROWS as u8;
                tile += 1;
            }
            Configuration(bytes)
        };
        // SAFETY: there is AMX, by the argument; the configuration is one of palette 1.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly)) };
        Self(())
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: there is AMX, or there would be nothing to drop.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// A block of sums: one or, if `TWO`, two tiles of rows times two of columns. It is added up in the tiles, from
/// [`Block::begin`] over [`Block::step`] to [`Block::end`], and vector code may run between the steps: tiles are used where somebody
/// writes so and by no optimisation, and nothing that is called in between does.
pub(super) struct Block<const TWO: bool>;

impl<const TWO: bool> Block<TWO> {
    /// Begins with zeros, or with the sums that are in memory, rows `stride` apart.
    ///
    /// # Safety
    /// If it goes on, 16 or 32 rows of [`PANEL`] sums can be read.
    #[inline(always)]
    pub(super) unsafe fn begin(_: &Configured, go_on: bool, sums: *const f32, stride: usize) {
        // SAFETY: the caller's promise; the tiles are set up.
        unsafe {
            if !go_on {
                asm!(
                    "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    options(nostack, nomem, preserves_flags),
                );
                return;
            }
            asm!(
                "tileloadd tmm0, [{c} + {stride}*1]",
                "tileloadd tmm1, [{c} + {stride}*1 + 64]",
                c = in(reg) sums,
                stride = in(reg) stride * 4,
                out("tmm0") _, out("tmm1") _,
                options(nostack, readonly, preserves_flags),
            );
            if TWO {
                asm!(
                    "tileloadd tmm2, [{c} + {stride}*1]",
                    "tileloadd tmm3, [{c} + {stride}*1 + 64]",
                    c = in(reg) sums.add(TILE_ROWS * stride),
                    stride = in(reg) stride * 4,
                    out("tmm2") _, out("tmm3") _,
                    options(nostack, readonly, preserves_flags),
                );
            }
        }
    }

    /// Adds a chunk of the depth: the left factor's tiles of 16 rows at `a` and of the next ones at `below`, the right factor's two at
    /// `b`. Eight lines at `soon`, any address, will be needed soon.
    ///
    /// # Safety
    /// The tiles can be read, and the block has begun.
    #[inline(always)]
    pub(super) unsafe fn step(
        _: &Configured,
        a: *const u16,
        below: *const u16,
        b: *const u16,
        soon: *const u16,
    ) {
        const { assert!(PANEL == 2 * TILE_ROWS) };
        // SAFETY: the caller's promise; the tiles are set up.
        unsafe {
            if TWO {
                asm!(
                    "tileloadd tmm4, [{a} + {line}*1]",
                    "tileloadd tmm6, [{b} + {line}*1]",
                    "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                    "prefetcht1 [{soon}]",
                    "prefetcht1 [{soon} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{below} + {line}*1]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "prefetcht1 [{soon} + 128]",
                    "prefetcht1 [{soon} + 192]",
                    "prefetcht1 [{soon} + 256]",
                    "prefetcht1 [{soon} + 320]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "prefetcht1 [{soon} + 384]",
                    "prefetcht1 [{soon} + 448]",
                    a = in(reg) a,
                    below = in(reg) below,
                    b = in(reg) b,
                    soon = in(reg) soon,
                    line = in(reg) 64_usize,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, readonly, preserves_flags),
                );
            } else {
                asm!(
                    "tileloadd tmm4, [{a} + {line}*1]",
                    "tileloadd tmm6, [{b} + {line}*1]",
                    "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    a = in(reg) a,
                    b = in(reg) b,
                    line = in(reg) 64_usize,
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, readonly, preserves_flags),
                );
            }
        }
    }

    /// Writes the sums, rows `stride` apart.
    ///
    /// # Safety
    /// 16 or 32 rows of [`PANEL`] sums can be written, and the block has begun.
    #[inline(always)]
    pub(super) unsafe fn end(_: &Configured, sums: *mut f32, stride: usize) {
        // SAFETY: the caller's promise; the tiles are set up.
        unsafe {
            asm!(
                "tilestored [{c} + {stride}*1], tmm0",
                "tilestored [{c} + {stride}*1 + 64], tmm1",
                c = in(reg) sums,
                stride = in(reg) stride * 4,
                options(nostack, preserves_flags),
            );
            if TWO {
                asm!(
                    "tilestored [{c} + {stride}*1], tmm2",
                    "tilestored [{c} + {stride}*1 + 64], tmm3",
                    c = in(reg) sums.add(TILE_ROWS * stride),
                    stride = in(reg) stride * 4,
                    options(nostack, preserves_flags),
                );
            }
        }
    }
}
