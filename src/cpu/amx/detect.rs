//! Whether there is AMX, and the leave to use it.

use std::{
    arch::{asm, x86_64::__cpuid_count},
    sync::OnceLock,
};

use super::super::simd::{Avx512, Instructions};
use crate::{Error, Result};

/// Proof that the processor has AMX with bf16, AVX-512 with bf16, and that the system lets this process use them; made in
/// [`Amx::detect`] only.
#[derive(Clone, Copy, Debug)]
pub(in crate::cpu) struct Amx(());

/// Something to do with AVX-512 and its conversions to bf16.
pub(in crate::cpu) trait Kernel {
    /// What comes of it.
    type Output;

    /// Does it. Implementations are `inline(always)`: only inlined code is compiled for the instruction set.
    fn run(self, s: Avx512) -> Self::Output;
}

impl Amx {
    /// Asks the processor, and the system for its leave, once.
    pub(in crate::cpu) fn detect() -> Result<Self> {
        static FOUND: OnceLock<std::result::Result<(), String>> = OnceLock::new();
        match FOUND.get_or_init(find) {
            Ok(()) => Ok(Self(())),
            Err(missing) => {
                let what = format!("bf16 on the processor takes AMX, and {missing}; use f32");
                Err(Error::argument("products", what))
            }
        }
    }

    /// Runs a kernel.
    #[expect(clippy::unused_self, reason = "it is the proof")]
    pub(in crate::cpu) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: a value of this type exists only if the processor has the instructions.
        unsafe { run(kernel) }
    }
}

/// # Safety
/// The processor has these instructions.
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw,avx512bf16,avx2,fma")]
unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the caller's promise.
    kernel.run(unsafe { Avx512::proven() })
}

fn find() -> std::result::Result<(), String> {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    if !Instructions::Avx512.available() || !is_x86_feature_detected!("avx512bf16") {
        return Err("this processor has no AVX-512 with bf16".to_owned());
    }
    // A processor with AVX-512 answers leaf 7.
    #[allow(unused_unsafe, reason = "safe in later versions of the compiler")]
    // SAFETY: every x86-64 processor has the instruction.
    let features = unsafe { __cpuid_count(7, 0) }.edx;
    if features & BF16 == 0 || features & TILE == 0 {
        return Err("this processor has no AMX with bf16 (amx_tile and amx_bf16 in /proc/cpuinfo)".to_owned());
    }
    match request_tiles() {
        0 => Ok(()),
        code => Err(format!(
            "the system does not let this process use it (arch_prctl: error {}; Linux does from 5.16 on)",
            -code
        )),
    }
}

/// Asks Linux to keep the tiles' contents for this process's threads: 0, or an error number below 0.
fn request_tiles() -> i64 {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XTILEDATA: i64 = 18;
    let code;
    // SAFETY: the call reads no memory and changes nothing but what this process may use.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => code,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    code
}
