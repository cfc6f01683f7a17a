//! Runs one instruction on every combination of source values, with all lanes and with some switched off by a predicate.
#![allow(clippy::format_push_string, reason = "tests say it the short way")]
#![allow(dead_code)]

use super::common::{Arg, doubles, run_with, words};
use cuda::config::Config;

/// What a register holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// 16 bits.
    H,
    /// 32 bits.
    W,
    /// 64 bits.
    D,
    /// A predicate.
    P,
}

use Kind::{D, H, P, W};

impl Kind {
    /// What a result register holds before the instruction.
    fn before(self) -> u64 {
        match self {
            H => 0xbeef,
            W => 0xdead_beef,
            D => 0x0123_4567_89ab_cdef,
            P => 1,
        }
    }

    fn declare(self, name: &str) -> String {
        let ty = match self {
            H => ".b16",
            W => ".b32",
            D => ".b64",
            P => ".pred",
        };
        format!(".reg {ty} {name};\n")
    }

    fn load(self, name: &str, address: &str) -> String {
        match self {
            H => format!("ld.global.u16 {name}, [{address}];\n"),
            W => format!("ld.global.u32 {name}, [{address}];\n"),
            D => format!("ld.global.u64 {name}, [{address}];\n"),
            P => format!("ld.global.u32 %low, [{address}];\nsetp.ne.u32 {name}, %low, 0;\n"),
        }
    }

    fn set(self, name: &str) -> String {
        match self {
            H => format!("mov.b16 {name}, 0xbeef;\n"),
            W => format!("mov.b32 {name}, 0xdeadbeef;\n"),
            D => format!("mov.b64 {name}, 0x0123456789abcdef;\n"),
            P => format!("mov.pred {name}, 1;\n"),
        }
    }

    fn store(self, name: &str, address: &str) -> String {
        match self {
            H => format!("st.global.u16 [{address}], {name};\n"),
            W => format!("st.global.u32 [{address}], {name};\n"),
            D => format!("st.global.u64 [{address}], {name};\n"),
            P => format!("selp.u32 %low, 1, 0, {name};\nst.global.u32 [{address}], %low;\n"),
        }
    }
}

/// All combinations of one value from each list.
fn combinations(values: &[&[u64]]) -> Vec<Vec<u64>> {
    let mut all = vec![Vec::new()];
    for list in values {
        all =
            all.iter().flat_map(|head| list.iter().map(move |v| [head.as_slice(), &[*v]].concat())).collect();
    }
    all
}

/// Lanes of a combination that the guarded copy of the instruction leaves out.
fn left_out(index: usize) -> bool {
    (index as u32).wrapping_mul(0x9e37_79b9) >> 29 < 3
}

/// Runs `text` with `$d`, `$e` as results of the kinds `to` and `$a`, `$b`, `$c`, `$f` as sources of the kinds `from` on all combinations of
/// `values`; `expected` gives the results. Afterwards the same with a guard on every instruction, where the lanes left out must keep what
/// was there.
#[track_caller]
pub(crate) fn check(
    text: &str,
    to: &[Kind],
    from: &[Kind],
    values: &[&[u64]],
    expected: impl Fn(&[u64]) -> Vec<u64>,
) {
    let quiet = |_: &str| false;
    check_finding(text, to, from, values, expected, quiet);
}

/// [`check`], with a condition that the first line of every finding must meet.
#[track_caller]
pub(crate) fn check_finding(
    text: &str,
    to: &[Kind],
    from: &[Kind],
    values: &[&[u64]],
    expected: impl Fn(&[u64]) -> Vec<u64>,
    allowed: impl Fn(&str) -> bool,
) {
    let inputs = combinations(values);
    let count = inputs.len();
    let ptx = program(text, to, from);
    let mut args: Vec<Arg> =
        (0..from.len()).map(|n| doubles(&inputs.iter().map(|v| v[n]).collect::<Vec<_>>())).collect();
    let guards: Vec<u32> = (0..count).map(|n| u32::from(!left_out(n))).collect();
    args.push(words(&guards));
    args.extend(std::iter::repeat_n(Arg::Out(count * 8), 2 * to.len()));
    args.push(Arg::U32(count as u32));
    let blocks = count.div_ceil(96) as u32;
    let ran = run_with(&ptx, "test", [blocks, 1, 1], [96, 1, 1], 0, &args, Config::default());
    let findings = ran.findings();
    assert!(findings.iter().all(|f| allowed(f)), "{text}: {findings:?}");
    for (index, sources) in inputs.iter().enumerate() {
        let want = expected(sources);
        assert_eq!(want.len(), to.len());
        for (n, kind) in to.iter().enumerate() {
            let mask = match kind {
                H => 0xffff,
                W | P => 0xffff_ffff,
                D => u64::MAX,
            };
            let whole = ran.doubles(from.len() + 1 + 2 * n)[index] & mask;
            let some = ran.doubles(from.len() + 2 + 2 * n)[index] & mask;
            assert!(
                whole == want[n],
                "{text}: sources {sources:x?} give {whole:x}, not {:x} in result {n}",
                want[n]
            );
            let want = if left_out(index) { kind.before() } else { want[n] };
            assert!(
                some == want,
                "{text}: sources {sources:x?} give {some:x}, not {want:x} under a guard in result {n}"
            );
        }
    }
}

fn program(text: &str, to: &[Kind], from: &[Kind]) -> String {
    let names = ["$a", "$b", "$c", "$f"];
    let results = ["$d", "$e"];
    let mut body = String::new();
    let fill = |guard: &str, suffix: &str| {
        let mut out = String::new();
        for statement in text.split(';').map(str::trim).filter(|s| !s.is_empty()) {
            let mut statement = format!("{guard}{statement};\n");
            for (n, name) in names.iter().enumerate() {
                statement = statement.replace(name, &format!("%s{n}"));
            }
            for (n, name) in results.iter().enumerate() {
                statement = statement.replace(name, &format!("%t{n}{suffix}"));
            }
            out += &statement;
        }
        out
    };
    let (whole, some) = (fill("", "w"), fill("@%on ", "s"));
    for (n, kind) in from.iter().enumerate() {
        body += &kind.declare(&format!("%s{n}"));
    }
    for (n, kind) in to.iter().enumerate() {
        body += &kind.declare(&format!("%t{n}w"));
        body += &kind.declare(&format!("%t{n}s"));
        body += &kind.set(&format!("%t{n}s"));
    }
    for (n, kind) in from.iter().enumerate() {
        body += &format!(
            "ld.param.u64 %at, [in{n}];\nadd.s64 %at, %at, %offset;\n{}",
            kind.load(&format!("%s{n}"), "%at")
        );
    }
    body += "ld.param.u64 %at, [guard];\nadd.s64 %at, %at, %offset4;\nld.global.u32 %low, [%at];\nsetp.ne.u32 %on, %low, 0;\n";
    body += &whole;
    body += &some;
    for (n, kind) in to.iter().enumerate() {
        for suffix in ["w", "s"] {
            body += &format!(
                "ld.param.u64 %at, [out{n}{suffix}];\nadd.s64 %at, %at, %offset;\n{}",
                kind.store(&format!("%t{n}{suffix}"), "%at")
            );
        }
    }
    let mut params: Vec<String> = (0..from.len()).map(|n| format!(".param .u64 in{n}")).collect();
    params.push(".param .u64 guard".to_owned());
    for n in 0..to.len() {
        params.push(format!(".param .u64 out{n}w"));
        params.push(format!(".param .u64 out{n}s"));
    }
    params.push(".param .u32 count".to_owned());
    format!(
        ".version 8.6\n.target sm_80\n.address_size 64\n.visible .entry test({})\n{{\n\
         .reg .pred %p<4>, %on, %past;\n.reg .b16 %h<4>;\n.reg .b32 %r<8>, %low, %index;\n.reg .b64 %rd<4>, %at, %offset, %offset4;\n\
         mov.u32 %r0, %ctaid.x;\nmov.u32 %r1, %tid.x;\nmad.lo.u32 %index, %r0, 96, %r1;\n\
         ld.param.u32 %r2, [count];\nsetp.ge.u32 %past, %index, %r2;\n@%past ret;\n\
         mul.wide.u32 %offset, %index, 8;\nmul.wide.u32 %offset4, %index, 4;\n{body}ret;\n}}\n",
        params.join(", ")
    )
}

/// Values at the edges of a width, and some between.
pub(crate) fn edges(bits: u32) -> Vec<u64> {
    let mask = ones(bits);
    let top = 1u64 << (bits - 1);
    let mut list =
        vec![0, 1, 2, 3, 7, 31, 32, top - 1, top, top + 1, mask, mask - 1, 1 << (bits / 2), ones(bits / 2)];
    list.extend([0x5a5a_1234_8765_c3f0 & mask, 0x9d2c_5680_efc6_0001 & mask, 0x00ff_80fe_7f01_0080 & mask]);
    list.sort_unstable();
    list.dedup();
    list
}

/// A shorter list for instructions with many sources.
pub(crate) fn few(bits: u32) -> Vec<u64> {
    let mask = ones(bits);
    let top = 1u64 << (bits - 1);
    vec![0, 1, top - 1, top, mask, 0x9d2c_5680_efc6_8d01 & mask, 0x5a5a_1234_8765_43f0 & mask]
}

/// So many ones.
pub(crate) fn ones(bits: u32) -> u64 {
    if bits == 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// A value of so many bits as a number.
pub(crate) fn number(value: u64, bits: u32, signed: bool) -> i128 {
    let value = i128::from(value & ones(bits));
    if signed && value >> (bits - 1) == 1 { value - (1 << bits) } else { value }
}

/// The low bits of a number.
pub(crate) fn wrap(value: i128, bits: u32) -> u64 {
    value as u64 & ones(bits)
}

/// The register kind of a width.
pub(crate) fn kind(bits: u32) -> Kind {
    match bits {
        16 => H,
        32 => W,
        _ => D,
    }
}

/// Name, bits and signedness of the integer types.
pub(crate) const INTEGERS: [(&str, u32, bool); 6] = [
    ("u16", 16, false),
    ("s16", 16, true),
    ("u32", 32, false),
    ("s32", 32, true),
    ("u64", 64, false),
    ("s64", 64, true),
];

/// The instruction must be refused when the module is loaded, with the line it stands in.
#[track_caller]
pub(crate) fn refused(text: &str) {
    let ptx = super::common::kernel(0, &format!("{text};"));
    let line = ptx.lines().position(|l| l.contains(text)).unwrap() + 1;
    let mut device = cuda::device::Device::new(Config::default());
    device.reports.print = false;
    let error = device.load(&ptx).err().unwrap_or_else(|| panic!("{text} was accepted"));
    assert_eq!(error.line as usize, line, "{text}: {error}");
}
