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

/// Some steps of a block of sums: one or two tiles of rows times two of columns.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// A tile of the left factor for each chunk.
    pub(super) a: *const u16,
    /// Values from there to the next 16 rows' tiles; `None` where there are only 16 rows.
    pub(super) next_rows: Option<usize>,
    /// Two tiles of the right factor for each chunk.
    pub(super) b: *const u16,
    /// Chunks, at least 1.
    pub(super) chunks: usize,
    /// Where the sums go, rows `stride` apart.
    pub(super) sums: *mut f32,
    pub(super) stride: usize,
    /// What is there already is added to.
    pub(super) go_on: bool,
    /// What will be needed soon; any address.
    pub(super) soon: *const u16,
}

impl Block {
    /// # Safety
    /// `chunks` tiles of each row's left factor and twice as many of the right one can be read, and 16 or 32 rows of [`PANEL`] sums
    /// written and, if `go_on`, read.
    #[inline(always)]
    pub(super) unsafe fn multiply(self, _: &Configured) {
        const { assert!(PANEL == 32) };
        let Self { a, next_rows, b, chunks, sums, stride, go_on, soon } = self;
        // SAFETY: the caller's promise covers every address; the tiles are set up. Of other registers only those named are used.
        unsafe {
            if let Some(next_rows) = next_rows {
                asm!(
                    "test {go_on:e}, {go_on:e}",
                    "jz 3f",
                    "tileloadd tmm0, [{c} + {stride}*1]",
                    "tileloadd tmm1, [{c} + {stride}*1 + 64]",
                    "tileloadd tmm2, [{c2} + {stride}*1]",
                    "tileloadd tmm3, [{c2} + {stride}*1 + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    "2:",
                    "tileloadd tmm4, [{a} + {line}*1]",
                    "tileloadd tmm6, [{b} + {line}*1]",
                    "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                    "prefetcht1 [{soon}]",
                    "prefetcht1 [{soon} + 64]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a2} + {line}*1]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "prefetcht1 [{soon} + 128]",
                    "prefetcht1 [{soon} + 192]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "prefetcht1 [{soon} + 256]",
                    "prefetcht1 [{soon} + 320]",
                    "prefetcht1 [{soon} + 384]",
                    "prefetcht1 [{soon} + 448]",
                    "add {a}, 1024",
                    "add {a2}, 1024",
                    "add {b}, 2048",
                    "add {soon}, 512",
                    "dec {chunks}",
                    "jnz 2b",
                    "tilestored [{c} + {stride}*1], tmm0",
                    "tilestored [{c} + {stride}*1 + 64], tmm1",
                    "tilestored [{c2} + {stride}*1], tmm2",
                    "tilestored [{c2} + {stride}*1 + 64], tmm3",
                    a = inout(reg) a => _,
                    a2 = inout(reg) a.wrapping_add(next_rows) => _,
                    b = inout(reg) b => _,
                    c = in(reg) sums,
                    c2 = in(reg) sums.wrapping_add(TILE_ROWS * stride),
                    stride = in(reg) stride * 4,
                    line = in(reg) 64_usize,
                    chunks = inout(reg) chunks => _,
                    go_on = in(reg) u32::from(go_on),
                    soon = inout(reg) soon => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            } else {
                asm!(
                    "test {go_on:e}, {go_on:e}",
                    "jz 3f",
                    "tileloadd tmm0, [{c} + {stride}*1]",
                    "tileloadd tmm1, [{c} + {stride}*1 + 64]",
                    "jmp 2f",
                    "3:",
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "2:",
                    "tileloadd tmm4, [{a} + {line}*1]",
                    "tileloadd tmm6, [{b} + {line}*1]",
                    "tileloadd tmm7, [{b} + {line}*1 + 1024]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "add {a}, 1024",
                    "add {b}, 2048",
                    "dec {chunks}",
                    "jnz 2b",
                    "tilestored [{c} + {stride}*1], tmm0",
                    "tilestored [{c} + {stride}*1 + 64], tmm1",
                    a = inout(reg) a => _,
                    b = inout(reg) b => _,
                    c = in(reg) sums,
                    stride = in(reg) stride * 4,
                    line = in(reg) 64_usize,
                    chunks = inout(reg) chunks => _,
                    go_on = in(reg) u32::from(go_on),
                    out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    }
}
