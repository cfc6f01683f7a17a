//! Runs one instruction on many values.
#![allow(dead_code)]

use super::common::{Arg, Ran, run_with};
use cuda::config::Config;

/// Values of one operand and how many bytes each has.
#[derive(Clone, Debug)]
pub(crate) struct Values(pub(crate) usize, pub(crate) Vec<u64>);

fn bytes(values: &Values) -> Vec<u8> {
    values.1.iter().flat_map(|v| v.to_le_bytes()[..values.0].to_vec()).collect()
}

fn declare(name: &str, size: usize) -> String {
    format!(".reg .b{} {name};\n", size.max(2) * 8)
}

/// PTX that loads element `i` of each source into `a`, `b`, `c`, runs `text` and stores `d`.
pub(crate) fn module(text: &str, size: usize, sources: &[Values]) -> String {
    let count = sources[0].1.len();
    let params: Vec<String> = (0..=sources.len()).map(|i| format!(".param .u64 p{i}")).collect();
    let mut body = declare("d", size);
    for (i, source) in sources.iter().enumerate() {
        let name = ["a", "b", "c"][i];
        body += &declare(name, source.0);
        let address = format!(
            "ld.param.u64 base, [p{i}];\nmul.wide.u32 offset, index, {};\nadd.s64 base, base, offset;\n",
            source.0
        );
        body += &address;
        body += &["ld.global.b", &(source.0 * 8).to_string(), " ", name, ", [base];\n"].concat();
    }
    format!(
        ".version 8.6\n.target sm_80\n.address_size 64\n.visible .entry test({})\n{{\n.reg .b32 index, block;\n.reg .b64 base, offset;\n.reg .pred outside;\nmov.u32 index, %tid.x;\nmov.u32 block, %ctaid.x;\nmad.lo.u32 index, block, 256, index;\nsetp.ge.u32 outside, index, {count};\n@outside ret;\n{body}{text}\nld.param.u64 base, [p{}];\nmul.wide.u32 offset, index, {size};\nadd.s64 base, base, offset;\nst.global.b{} [base], d;\nret;\n}}\n",
        params.join(", "),
        sources.len(),
        size * 8
    )
}

/// The results of `text` (which reads `a`, `b`, `c` and writes `d`), `size` bytes each.
pub(crate) fn apply_with(text: &str, size: usize, sources: &[Values], config: Config) -> Vec<u64> {
    let count = sources[0].1.len();
    assert!(count > 0 && sources.iter().all(|s| s.1.len() == count));
    let mut args: Vec<Arg> = sources.iter().map(|s| Arg::Buffer(bytes(s))).collect();
    args.push(Arg::Out(count * size));
    let ptx = module(text, size, sources);
    let blocks = count.div_ceil(256) as u32;
    let ran: Ran = run_with(&ptx, "test", [blocks, 1, 1], [256, 1, 1], 0, &args, config).silent();
    ran.buffers[sources.len()]
        .chunks_exact(size)
        .map(|chunk| chunk.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte)))
        .collect()
}

/// [`apply_with`] the default configuration.
pub(crate) fn apply(text: &str, size: usize, sources: &[Values]) -> Vec<u64> {
    apply_with(text, size, sources, Config::default())
}

/// Which bytes of a buffer are undefined.
pub(crate) fn undefined(ran: &Ran, buffer: usize) -> Vec<bool> {
    let size = ran.buffers[buffer].len();
    let memory = &ran.device.memory;
    let allocation = memory.get(memory.find(ran.addresses[buffer], size as u64).unwrap());
    let at = (ran.addresses[buffer] - allocation.base) as usize;
    allocation.shadow[at..at + size].iter().map(|byte| byte & cuda::mem::UNDEFINED != 0).collect()
}

/// Fails with the operands of the first lane that differs.
#[track_caller]
pub(crate) fn check(
    text: &str,
    sources: &[Values],
    got: &[u64],
    want: impl Fn(&[u64]) -> u64,
    same: impl Fn(u64, u64) -> bool,
) {
    for (i, &got) in got.iter().enumerate() {
        let operands: Vec<u64> = sources.iter().map(|s| s.1[i]).collect();
        let want = want(&operands);
        assert!(same(got, want), "{text} of {operands:x?} gave {got:x}, not {want:x}");
    }
}

/// All pairs of two lists.
pub(crate) fn pairs(a: &[u64], b: &[u64]) -> [Vec<u64>; 2] {
    let both = || a.iter().flat_map(|&x| b.iter().map(move |&y| (x, y)));
    [both().map(|p| p.0).collect(), both().map(|p| p.1).collect()]
}

/// Pseudo-random numbers, the same in every run.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// Bit patterns of a format: edges, anything, and numbers near 1 whose sums and products meet.
pub(crate) fn float_bits(format: super::oracle::Format) -> impl proptest::strategy::Strategy<Value = u64> {
    use proptest::prelude::*;
    let all = format.sign() | (format.sign() - 1);
    let step = 1u64 << (format.digits - 1);
    let one = format.infinity() / 2 / step * step;
    let near = i64::from(format.digits).min(i64::from(1i32 << (format.exponent - 1)) - 2);
    prop_oneof![
        1 => proptest::sample::select(format.edges()),
        2 => any::<u64>().prop_map(move |bits| bits & all),
        4 => (-near..=near, any::<u64>(), any::<bool>(), 0..3).prop_map(move |(exponent, fraction, negative, zeros)| {
            // Short significands make exact ties likely.
            let fraction = fraction & (step - 1) & !((1u64 << (zeros as u32 * format.digits / 3)) - 1);
            let magnitude = one.wrapping_add((exponent as u64).wrapping_mul(step)) | fraction;
            magnitude | if negative { format.sign() } else { 0 }
        }),
    ]
}
