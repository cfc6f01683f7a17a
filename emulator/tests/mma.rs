//! Matrix products: every position of every fragment proven by one-hot matrices, values against sums in f64.
//!
//! The positions are written as the PTX ISA manual does, element by element: `group` is the lane divided by four, `member` the rest.
#![allow(clippy::format_push_string, clippy::match_same_arms, reason = "tests say it the short way")]

mod common;

use common::{Arg, Ran, config, words};
use cuda::config::Config;
use half::{bf16, f16};

/// Row and column of element `i` of a lane's fragment.
type Place = fn(i: usize, group: usize, member: usize) -> (usize, usize);

/// How an element is kept in a register.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    F16,
    Bf16,
    Tf32,
    F32,
    F64,
    S8,
    U8,
    S4,
    U4,
    S32,
    E4m3,
    E5m2,
}

impl Kind {
    fn bits(self) -> usize {
        match self {
            Kind::F64 => 64,
            Kind::F32 | Kind::Tf32 | Kind::S32 => 32,
            Kind::F16 | Kind::Bf16 => 16,
            Kind::S8 | Kind::U8 | Kind::E4m3 | Kind::E5m2 => 8,
            Kind::S4 | Kind::U4 => 4,
        }
    }

    /// The bits of a value the type can hold.
    fn encode(self, value: f64) -> u64 {
        match self {
            Kind::F16 => u64::from(f16::from_f64(value).to_bits()),
            Kind::Bf16 => u64::from(bf16::from_f64(value).to_bits()),
            Kind::Tf32 | Kind::F32 => u64::from((value as f32).to_bits()),
            Kind::F64 => value.to_bits(),
            Kind::S8 | Kind::U8 => value as i64 as u64 & 0xff,
            Kind::S4 | Kind::U4 => value as i64 as u64 & 0xf,
            Kind::S32 => u64::from(value as i64 as u32),
            Kind::E4m3 => (0..=255u64).find(|&b| Kind::E4m3.decode(b) == value).expect("a value of e4m3"),
            Kind::E5m2 => (0..=255u64).find(|&b| Kind::E5m2.decode(b) == value).expect("a value of e5m2"),
        }
    }

    fn decode(self, bits: u64) -> f64 {
        match self {
            Kind::F16 => f16::from_bits(bits as u16).to_f64(),
            Kind::Bf16 => bf16::from_bits(bits as u16).to_f64(),
            Kind::Tf32 | Kind::F32 => f64::from(f32::from_bits(bits as u32)),
            Kind::F64 => f64::from_bits(bits),
            Kind::S8 => f64::from(bits as u8 as i8),
            Kind::U8 | Kind::U4 => bits as f64,
            Kind::S4 => f64::from(((bits as u8) << 4) as i8 >> 4),
            Kind::S32 => f64::from(bits as u32 as i32),
            Kind::E4m3 => small_float(bits, 3, 7, false),
            Kind::E5m2 => small_float(bits, 2, 15, true),
        }
    }
}

/// A float of eight bits.
fn small_float(bits: u64, fraction_bits: i32, bias: i32, infinities: bool) -> f64 {
    let sign = if bits >> 7 & 1 == 1 { -1.0 } else { 1.0 };
    let exponent = (bits >> fraction_bits) as i32 & ((1 << (7 - fraction_bits)) - 1);
    let fraction = f64::from(bits as i32 & ((1 << fraction_bits) - 1)) / f64::from(1 << fraction_bits);
    let top = (1 << (7 - fraction_bits)) - 1;
    if infinities && exponent == top {
        return if fraction == 0.0 { sign * f64::INFINITY } else { f64::NAN };
    }
    if bits & 0x7f == 0x7f {
        return f64::NAN;
    }
    if exponent == 0 {
        sign * fraction * 2f64.powi(1 - bias)
    } else {
        sign * (1.0 + fraction) * 2f64.powi(exponent - bias)
    }
}

/// One shape with its types.
#[derive(Clone, Copy)]
struct Form {
    shape: &'static str,
    types: &'static str,
    m: usize,
    k: usize,
    /// D and C, A, B.
    kinds: [Kind; 3],
    a: Place,
    b: Place,
}

fn c_place(i: usize, group: usize, member: usize) -> (usize, usize) {
    (if i < 2 { group } else { group + 8 }, member * 2 + (i & 1))
}

fn a_halves_16(i: usize, group: usize, member: usize) -> (usize, usize) {
    let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
    (row, member * 2 + (i & 1) + if i < 4 { 0 } else { 8 })
}

fn b_halves_16(i: usize, group: usize, member: usize) -> (usize, usize) {
    (member * 2 + (i & 1) + if i < 2 { 0 } else { 8 }, group)
}

fn a_halves_8(i: usize, group: usize, member: usize) -> (usize, usize) {
    (if i < 2 { group } else { group + 8 }, member * 2 + (i & 1))
}

fn b_halves_8(i: usize, group: usize, member: usize) -> (usize, usize) {
    (member * 2 + i, group)
}

fn a_tf32(i: usize, group: usize, member: usize) -> (usize, usize) {
    (if i == 0 || i == 2 { group } else { group + 8 }, if i < 2 { member } else { member + 4 })
}

fn b_tf32(i: usize, group: usize, member: usize) -> (usize, usize) {
    (if i == 0 { member } else { member + 4 }, group)
}

fn a_bytes_32(i: usize, group: usize, member: usize) -> (usize, usize) {
    let row = if i < 4 || (8..12).contains(&i) { group } else { group + 8 };
    (row, member * 4 + (i & 3) + if i < 8 { 0 } else { 16 })
}

fn b_bytes_32(i: usize, group: usize, member: usize) -> (usize, usize) {
    (member * 4 + (i & 3) + if i < 4 { 0 } else { 16 }, group)
}

fn a_bytes_16(i: usize, group: usize, member: usize) -> (usize, usize) {
    (if i < 4 { group } else { group + 8 }, member * 4 + (i & 3))
}

fn a_bytes_8x16(i: usize, group: usize, member: usize) -> (usize, usize) {
    (group, member * 4 + i)
}

fn b_bytes_16(i: usize, group: usize, member: usize) -> (usize, usize) {
    (member * 4 + i, group)
}

fn a_nibbles_32(i: usize, group: usize, member: usize) -> (usize, usize) {
    (if i < 8 { group } else { group + 8 }, member * 8 + (i & 7))
}

fn a_nibbles_8x32(i: usize, group: usize, member: usize) -> (usize, usize) {
    (group, member * 8 + i)
}

fn b_nibbles_32(i: usize, group: usize, member: usize) -> (usize, usize) {
    (member * 8 + i, group)
}

fn a_nibbles_64(i: usize, group: usize, member: usize) -> (usize, usize) {
    let row = if i < 8 || (16..24).contains(&i) { group } else { group + 8 };
    (row, member * 8 + (i & 7) + if i < 16 { 0 } else { 32 })
}

fn b_nibbles_64(i: usize, group: usize, member: usize) -> (usize, usize) {
    (member * 8 + (i & 7) + if i < 8 { 0 } else { 32 }, group)
}

fn a_double(i: usize, group: usize, member: usize) -> (usize, usize) {
    if i.is_multiple_of(2) { (group, i * 2 + member) } else { (group + 8, i * 2 - 2 + member) }
}

fn b_double(i: usize, group: usize, member: usize) -> (usize, usize) {
    (member + i * 4, group)
}

#[rustfmt::skip]
const FORMS: &[Form] = &[
    Form { shape: "m16n8k16", types: "f32.f16.f16.f32", m: 16, k: 16, kinds: [Kind::F32, Kind::F16, Kind::F16], a: a_halves_16, b: b_halves_16 },
    Form { shape: "m16n8k16", types: "f32.bf16.bf16.f32", m: 16, k: 16, kinds: [Kind::F32, Kind::Bf16, Kind::Bf16], a: a_halves_16, b: b_halves_16 },
    Form { shape: "m16n8k8", types: "f32.f16.f16.f32", m: 16, k: 8, kinds: [Kind::F32, Kind::F16, Kind::F16], a: a_halves_8, b: b_halves_8 },
    Form { shape: "m16n8k8", types: "f32.bf16.bf16.f32", m: 16, k: 8, kinds: [Kind::F32, Kind::Bf16, Kind::Bf16], a: a_halves_8, b: b_halves_8 },
    Form { shape: "m16n8k16", types: "f16.f16.f16.f16", m: 16, k: 16, kinds: [Kind::F16, Kind::F16, Kind::F16], a: a_halves_16, b: b_halves_16 },
    Form { shape: "m16n8k8", types: "f16.f16.f16.f16", m: 16, k: 8, kinds: [Kind::F16, Kind::F16, Kind::F16], a: a_halves_8, b: b_halves_8 },
    Form { shape: "m16n8k4", types: "f32.tf32.tf32.f32", m: 16, k: 4, kinds: [Kind::F32, Kind::Tf32, Kind::Tf32], a: a_tf32, b: b_tf32 },
    Form { shape: "m16n8k8", types: "f32.tf32.tf32.f32", m: 16, k: 8, kinds: [Kind::F32, Kind::Tf32, Kind::Tf32], a: a_tf32, b: b_tf32 },
    Form { shape: "m16n8k32", types: "s32.s8.s8.s32", m: 16, k: 32, kinds: [Kind::S32, Kind::S8, Kind::S8], a: a_bytes_32, b: b_bytes_32 },
    Form { shape: "m16n8k32", types: "s32.u8.s8.s32", m: 16, k: 32, kinds: [Kind::S32, Kind::U8, Kind::S8], a: a_bytes_32, b: b_bytes_32 },
    Form { shape: "m16n8k32", types: "s32.s8.u8.s32", m: 16, k: 32, kinds: [Kind::S32, Kind::S8, Kind::U8], a: a_bytes_32, b: b_bytes_32 },
    Form { shape: "m16n8k16", types: "s32.u8.u8.s32", m: 16, k: 16, kinds: [Kind::S32, Kind::U8, Kind::U8], a: a_bytes_16, b: b_bytes_16 },
    Form { shape: "m16n8k16", types: "s32.s8.s8.s32", m: 16, k: 16, kinds: [Kind::S32, Kind::S8, Kind::S8], a: a_bytes_16, b: b_bytes_16 },
    Form { shape: "m8n8k16", types: "s32.s8.s8.s32", m: 8, k: 16, kinds: [Kind::S32, Kind::S8, Kind::S8], a: a_bytes_8x16, b: b_bytes_16 },
    Form { shape: "m8n8k16", types: "s32.u8.s8.s32", m: 8, k: 16, kinds: [Kind::S32, Kind::U8, Kind::S8], a: a_bytes_8x16, b: b_bytes_16 },
    Form { shape: "m16n8k32", types: "s32.s4.u4.s32", m: 16, k: 32, kinds: [Kind::S32, Kind::S4, Kind::U4], a: a_nibbles_32, b: b_nibbles_32 },
    Form { shape: "m16n8k64", types: "s32.u4.s4.s32", m: 16, k: 64, kinds: [Kind::S32, Kind::U4, Kind::S4], a: a_nibbles_64, b: b_nibbles_64 },
    Form { shape: "m8n8k32", types: "s32.s4.s4.s32", m: 8, k: 32, kinds: [Kind::S32, Kind::S4, Kind::S4], a: a_nibbles_8x32, b: b_nibbles_32 },
    Form { shape: "m16n8k32", types: "f32.e4m3.e5m2.f32", m: 16, k: 32, kinds: [Kind::F32, Kind::E4m3, Kind::E5m2], a: a_bytes_32, b: b_bytes_32 },
    Form { shape: "m8n8k4", types: "f64.f64.f64.f64", m: 8, k: 4, kinds: [Kind::F64, Kind::F64, Kind::F64], a: a_double, b: b_double },
    Form { shape: "m16n8k4", types: "f64.f64.f64.f64", m: 16, k: 4, kinds: [Kind::F64, Kind::F64, Kind::F64], a: a_double, b: b_double },
    Form { shape: "m16n8k8", types: "f64.f64.f64.f64", m: 16, k: 8, kinds: [Kind::F64, Kind::F64, Kind::F64], a: a_double, b: b_double },
    Form { shape: "m16n8k16", types: "f64.f64.f64.f64", m: 16, k: 16, kinds: [Kind::F64, Kind::F64, Kind::F64], a: a_double, b: b_double },
];

/// A dense matrix by rows.
#[derive(Clone, Debug, PartialEq)]
struct Matrix {
    columns: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn new(rows: usize, columns: usize, value: impl FnMut() -> f64) -> Self {
        Self { columns, values: std::iter::repeat_with(value).take(rows * columns).collect() }
    }

    fn zero(rows: usize, columns: usize) -> Self {
        Self::new(rows, columns, || 0.0)
    }

    fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    fn set(&mut self, row: usize, column: usize, value: f64) {
        self.values[row * self.columns + column] = value;
    }
}

/// Registers of a fragment of `count` elements a lane, one after the other, each as 32 lanes of 32-bit words (two for f64).
fn pack(matrix: &Matrix, kind: Kind, place: Place, count: usize) -> Vec<u32> {
    let width = kind.bits().max(32);
    let per_register = width / kind.bits();
    let mut out = Vec::new();
    for register in 0..count / per_register {
        for lane in 0..32 {
            let mut bits = 0u64;
            for e in 0..per_register {
                let (row, column) = place(register * per_register + e, lane / 4, lane % 4);
                bits |= kind.encode(matrix.at(row, column)) << (e * kind.bits());
            }
            out.push(bits as u32);
            if width == 64 {
                out.push((bits >> 32) as u32);
            }
        }
    }
    out
}

fn unpack(registers: &[u32], rows: usize, kind: Kind) -> Matrix {
    let mut matrix = Matrix::zero(rows, 8);
    let width = kind.bits().max(32);
    let per_register = width / kind.bits();
    for i in 0..rows / 4 {
        for lane in 0..32 {
            let (row, column) = c_place(i, lane / 4, lane % 4);
            let at = i / per_register * 32 + lane;
            let bits = if width == 64 {
                u64::from(registers[2 * at]) | u64::from(registers[2 * at + 1]) << 32
            } else {
                u64::from(registers[at]) >> (i % per_register * kind.bits())
            };
            let mask = if kind.bits() == 64 { u64::MAX } else { (1 << kind.bits()) - 1 };
            matrix.set(row, column, kind.decode(bits & mask));
        }
    }
    matrix
}

impl Form {
    fn counts(&self) -> [usize; 3] {
        [self.m / 4, self.m * self.k / 32, 8 * self.k / 32]
    }

    /// Registers of C, A and B.
    fn registers(&self) -> [usize; 3] {
        let mut i = 0;
        self.counts().map(|count| {
            i += 1;
            count * self.kinds[i - 1].bits() / self.kinds[i - 1].bits().max(32)
        })
    }

    /// A kernel whose block `i` multiplies the `i`-th set of fragments (A, B, C).
    fn ptx(&self, extra: &str) -> String {
        let [c, a, b] = self.registers();
        let double = self.kinds[0] == Kind::F64;
        let (bytes, ty, name) = if double { (8, "f64", "%fd") } else { (4, "b32", "%r") };
        let ldst = if double { "f64" } else { "u32" };
        let stride = bytes * 32;
        let mut body = format!(
            "mov.u32 %r1, %ctaid.x;\nmul.wide.u32 %rd3, %r1, {};\nadd.s64 %rd1, %rd1, %rd3;\nmul.wide.u32 %rd3, %r1, {};\nadd.s64 %rd2, %rd2, %rd3;\n",
            (a + b + c) * stride,
            c * stride
        );
        body += &format!(
            "mul.wide.u32 %rd3, %r0, {bytes};\nadd.s64 %rd1, %rd1, %rd3;\nadd.s64 %rd2, %rd2, %rd3;\n"
        );
        for i in 0..a + b + c {
            body += &format!("ld.global.{ldst} {name}{}, [%rd1+{}];\n", 10 + i, i * stride);
        }
        let list = |first: usize, count: usize| {
            let names: Vec<String> = (first..first + count).map(|i| format!("{name}{i}")).collect();
            format!("{{{}}}", names.join(", "))
        };
        body += &format!(
            "mma.sync.aligned.{}.row.col{extra}.{} {}, {}, {}, {};\n",
            self.shape,
            self.types,
            list(40, c),
            list(10, a),
            list(10 + a, b),
            list(10 + a + b, c)
        );
        for i in 0..c {
            body += &format!("st.global.{ldst} [%rd2+{}], {name}{};\n", i * stride, 40 + i);
        }
        let _ = ty;
        common::kernel(2, &body)
    }

    fn run(&self, sets: &[[Matrix; 3]], extra: &str, config: Config) -> Vec<Matrix> {
        let counts = self.counts();
        let mut input = Vec::new();
        for [c, a, b] in sets {
            input.extend(pack(a, self.kinds[1], self.a, counts[1]));
            input.extend(pack(b, self.kinds[2], self.b, counts[2]));
            input.extend(pack(c, self.kinds[0], c_place, counts[0]));
        }
        let width = if self.kinds[0] == Kind::F64 { 64 } else { 32 };
        let out = self.registers()[0] * width;
        let ran = common::run_with(
            &self.ptx(extra),
            "test",
            [sets.len() as u32, 1, 1],
            [32, 1, 1],
            0,
            &[words(&input), Arg::Out(out * 4 * sets.len())],
            config,
        )
        .silent();
        ran.words(1).chunks_exact(out).map(|d| unpack(d, self.m, self.kinds[0])).collect()
    }

    fn name(&self) -> String {
        format!("{}.{}", self.shape, self.types)
    }
}

/// Numbers that are all different where it matters and exact in every type.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    /// A small value of the type: unsigned where it must be.
    fn small(&mut self, kind: Kind) -> f64 {
        let n = self.next();
        match kind {
            Kind::U8 => (n % 256) as f64,
            Kind::S8 => (n % 256) as f64 - 128.0,
            Kind::U4 => (n % 16) as f64,
            Kind::S4 => (n % 16) as f64 - 8.0,
            Kind::S32 => n as f64 - 1_073_741_824.0,
            Kind::E4m3 | Kind::E5m2 => loop {
                let value = kind.decode(self.next() % 256);
                if value.is_finite() {
                    break value;
                }
            },
            _ => (n % 63) as f64 - 31.0,
        }
    }

    /// Any value of the type of ordinary size.
    fn value(&mut self, kind: Kind) -> f64 {
        let unit = self.next() as f64 / 2f64.powi(31) * 2.0 - 1.0;
        let scale = 2f64.powi((self.next() % 9) as i32 - 4);
        match kind {
            Kind::F16 | Kind::Bf16 | Kind::F32 | Kind::F64 => kind.decode(kind.encode(unit * scale)),
            Kind::Tf32 => f64::from(f32::from_bits(((unit * scale) as f32).to_bits() & 0xffff_e000)),
            other => self.small(other),
        }
    }
}

#[test]
fn one_hot_a_shows_every_position_of_a_and_b() {
    for form in FORMS {
        let mut random = Random(7);
        let b = Matrix::new(form.k, 8, || random.small(form.kinds[2]));
        let places: Vec<(usize, usize)> =
            (0..form.m).flat_map(|r| (0..form.k).map(move |k| (r, k))).collect();
        let sets: Vec<[Matrix; 3]> = places
            .iter()
            .map(|&(r, k)| {
                let mut a = Matrix::zero(form.m, form.k);
                a.set(r, k, 1.0);
                [Matrix::zero(form.m, 8), a, b.clone()]
            })
            .collect();
        for (&(r, k), d) in places.iter().zip(form.run(&sets, "", Config::default())) {
            for row in 0..form.m {
                for n in 0..8 {
                    let expected = if row == r { b.at(k, n) } else { 0.0 };
                    assert_eq!(d.at(row, n), expected, "{} A({r},{k}) D({row},{n})", form.name());
                }
            }
        }
    }
}

#[test]
fn one_hot_b_and_c_show_every_position_of_b_c_and_d() {
    for form in FORMS {
        let mut random = Random(11);
        let a = Matrix::new(form.m, form.k, || random.small(form.kinds[1]));
        let mut sets = Vec::new();
        let mut expected = Vec::new();
        for k in 0..form.k {
            for n in 0..8 {
                let mut b = Matrix::zero(form.k, 8);
                b.set(k, n, 1.0);
                sets.push([Matrix::zero(form.m, 8), a.clone(), b]);
                let mut d = Matrix::zero(form.m, 8);
                (0..form.m).for_each(|r| d.set(r, n, a.at(r, k)));
                expected.push(d);
            }
        }
        for r in 0..form.m {
            for n in 0..8 {
                let mut c = Matrix::zero(form.m, 8);
                c.set(r, n, 5.0);
                sets.push([c.clone(), Matrix::zero(form.m, form.k), Matrix::zero(form.k, 8)]);
                expected.push(c);
            }
        }
        for (i, (got, want)) in form.run(&sets, "", Config::default()).iter().zip(&expected).enumerate() {
            assert_eq!(got, want, "{} set {i}", form.name());
        }
    }
}

/// The product in f64, and for each element the sum of the magnitudes.
fn reference([c, a, b]: &[Matrix; 3]) -> (Matrix, Matrix) {
    let (rows, inner) = (a.values.len() / a.columns, a.columns);
    let (mut d, mut size) = (Matrix::zero(rows, 8), Matrix::zero(rows, 8));
    for r in 0..rows {
        for n in 0..8 {
            let terms: Vec<f64> =
                std::iter::once(c.at(r, n)).chain((0..inner).map(|k| a.at(r, k) * b.at(k, n))).collect();
            d.set(r, n, terms.iter().sum());
            size.set(r, n, terms.iter().map(|t| t.abs()).sum());
        }
    }
    (d, size)
}

#[test]
fn random_products_are_within_one_rounding() {
    for form in FORMS {
        let mut random = Random(23);
        let sets: Vec<[Matrix; 3]> = (0..20)
            .map(|_| {
                [
                    Matrix::new(form.m, 8, || random.value(form.kinds[0])),
                    Matrix::new(form.m, form.k, || random.value(form.kinds[1])),
                    Matrix::new(form.k, 8, || random.value(form.kinds[2])),
                ]
            })
            .collect();
        // Half a unit in the last place of the result, and k + 1 roundings in f64 on the way.
        let (half_unit, tiny) = match form.kinds[0] {
            Kind::F32 => (2f64.powi(-24), 0.0),
            Kind::F16 => (2f64.powi(-11), 2f64.powi(-25)),
            Kind::F64 => (0.0, 0.0),
            _ => (0.0, 0.0),
        };
        for (set, d) in sets.iter().zip(form.run(&sets, "", Config::default())) {
            let (want, size) = reference(set);
            for r in 0..form.m {
                for n in 0..8 {
                    let (got, want) = (d.at(r, n), want.at(r, n));
                    let slack = (form.k + 1) as f64 * 2f64.powi(-52) * size.at(r, n);
                    let wrapped =
                        if form.kinds[0] == Kind::S32 { f64::from(want as i64 as i32) } else { want };
                    assert!(
                        (got - wrapped).abs() <= half_unit * want.abs() + slack + tiny,
                        "{} D({r},{n}) = {got}, expected {want}",
                        form.name()
                    );
                }
            }
        }
    }
}

fn form(shape: &str, types: &str) -> &'static Form {
    FORMS.iter().find(|f| f.shape == shape && f.types == types).expect("a form")
}

/// A product whose rows all have the same few non-zero elements: `terms[k]` = A(·, k) · B(k, ·).
fn terms(form: &Form, c: f64, products: &[(usize, f64, f64)]) -> [Matrix; 3] {
    let (mut a, mut b) = (Matrix::zero(form.m, form.k), Matrix::zero(form.k, 8));
    for &(k, left, right) in products {
        (0..form.m).for_each(|r| a.set(r, k, left));
        (0..8).for_each(|n| b.set(k, n, right));
    }
    [Matrix::new(form.m, 8, || c), a, b]
}

#[track_caller]
fn every_element(form: &Form, set: [Matrix; 3], extra: &str, settings: Config, want: f64) {
    for d in form.run(&[set], extra, settings) {
        for value in d.values {
            assert!(
                value == want || value.is_nan() && want.is_nan(),
                "{} gives {value}, expected {want}",
                form.name()
            );
        }
    }
}

#[test]
fn sums_are_rounded_once_and_truncated_on_request() {
    for types in ["f32.f16.f16.f32", "f32.bf16.bf16.f32"] {
        let f = form("m16n8k16", types);
        // Two times three quarters of a unit, one in each half of k.
        let set = terms(
            f,
            1.0,
            &[(0, 0.75 * 2f64.powi(-12), 2f64.powi(-11)), (8, 0.75 * 2f64.powi(-12), 2f64.powi(-11))],
        );
        every_element(f, set.clone(), "", Config::default(), 1.0 + 2f64.powi(-22));
        every_element(f, set, "", config(&[("EMU_MMA", "rz8")]), 1.0);
        // Truncation goes towards zero.
        let down = terms(f, -1.0, &[(3, -0.75 * 2f64.powi(-12), 2f64.powi(-11))]);
        every_element(f, down.clone(), "", Config::default(), -1.0 - 2f64.powi(-23));
        every_element(f, down, "", config(&[("EMU_MMA", "rz8")]), -1.0);
        // What one addition in f32 would lose is kept until the end.
        let large = 2f64.powi(15);
        let cancel = terms(f, 2f64.powi(-10), &[(0, large, large), (15, -large, large)]);
        every_element(f, cancel, "", Config::default(), 2f64.powi(-10));
    }
}

#[test]
fn half_accumulators_are_rounded_once() {
    let f = form("m16n8k16", "f16.f16.f16.f16");
    // 2^-11 is half a unit of 1: a tie that goes to the even 1, were it not for the 2^-30 that f32 cannot see.
    let set = terms(f, 1.0, &[(0, 2f64.powi(-11), 1.0), (9, 2f64.powi(-15), 2f64.powi(-15))]);
    every_element(f, set, "", Config::default(), 1.0 + 2f64.powi(-10));
    let tie = terms(f, 1.0, &[(0, 2f64.powi(-11), 1.0)]);
    every_element(f, tie, "", Config::default(), 1.0);
    let below = terms(f, 1.0, &[(0, 2f64.powi(-11), 1.0), (9, -(2f64.powi(-15)), 2f64.powi(-15))]);
    every_element(f, below, "", Config::default(), 1.0);
    every_element(f, terms(f, 60000.0, &[(1, 256.0, 256.0)]), "", Config::default(), f64::INFINITY);
}

#[test]
fn infinities_and_nan_follow_ieee() {
    for types in ["f32.f16.f16.f32", "f32.bf16.bf16.f32", "f16.f16.f16.f16"] {
        let f = form("m16n8k16", types);
        let inf = f64::INFINITY;
        every_element(f, terms(f, 1.0, &[(2, inf, 2.0)]), "", Config::default(), inf);
        every_element(f, terms(f, 1.0, &[(2, inf, 2.0), (3, -inf, 1.0)]), "", Config::default(), f64::NAN);
        every_element(f, terms(f, f64::NAN, &[(2, 1.0, 2.0)]), "", Config::default(), f64::NAN);
        every_element(f, terms(f, -inf, &[(2, 1.0, 2.0)]), "", Config::default(), -inf);
    }
    let f = form("m16n8k16", "f32.f16.f16.f32");
    // A NaN result has one bit pattern.
    let nan = pack(&Matrix::new(16, 8, || f64::NAN), Kind::F32, c_place, 4);
    let mut input = vec![0; 6 * 32];
    input.extend(nan.iter().map(|bits| bits ^ 0x8012_3456));
    let ran = common::run(&f.ptx(""), "test", 32, &[words(&input), Arg::Out(512)]).silent();
    assert!(ran.words(1).iter().all(|&bits| bits == 0x7fff_ffff));
}

#[test]
fn tf32_operands_count_with_their_upper_19_bits() {
    let f = form("m16n8k8", "f32.tf32.tf32.f32");
    let long = f64::from(f32::from_bits(0x3f80_3fff));
    let short = f64::from(f32::from_bits(0x3f80_2000));
    every_element(
        f,
        terms(f, 0.0, &[(5, long, long)]),
        "",
        Config::default(),
        f64::from((short * short) as f32),
    );
}

#[test]
fn integers_wrap_or_are_clamped() {
    for types in ["s32.s8.s8.s32", "s32.u8.s8.s32"] {
        let f = form("m16n8k32", types);
        let top = f64::from(i32::MAX);
        let up = terms(f, top, &[(31, 100.0, 100.0)]);
        every_element(f, up.clone(), "", Config::default(), f64::from(i32::MIN) + 9_999.0);
        every_element(f, up, ".satfinite", Config::default(), top);
        let down = terms(f, f64::from(i32::MIN), &[(0, 100.0, -100.0)]);
        every_element(f, down.clone(), "", Config::default(), top - 9_999.0);
        every_element(f, down, ".satfinite", Config::default(), f64::from(i32::MIN));
    }
}

/// Bytes of buffer `i` that nobody has written, by word.
fn undefined_words(ran: &Ran, i: usize) -> Vec<bool> {
    let index = ran.device.memory.find(ran.addresses[i], ran.buffers[i].len() as u64).expect("the buffer");
    let shadow = &ran.device.memory.get(index).shadow;
    shadow[..ran.buffers[i].len()].chunks_exact(4).map(|w| w.iter().any(|&b| b != 0)).collect()
}

/// Makes the registers of `which` (of the order A, B, C) undefined in the lanes of `lanes` and returns D's undefined elements.
fn undefined_elements(f: &Form, register: usize, lanes: u32) -> Vec<bool> {
    let ptx = f.ptx("");
    let load = format!("ld.global.u32 %r{}, ", 10 + register);
    let guarded = format!(
        "mov.u32 %r200, {lanes};\nshr.u32 %r200, %r200, %r0;\nand.b32 %r200, %r200, 1;\nsetp.eq.u32 %p1, %r200, 0;\n@%p1 {load}"
    );
    assert!(ptx.contains(&load));
    let ptx = ptx.replace(&load, &guarded);
    let [c, a, b] = f.registers();
    let input = vec![0; 32 * (a + b + c)];
    let ran = common::run(&ptx, "test", 32, &[words(&input), Arg::Out(128 * c)]).silent();
    let undefined = undefined_words(&ran, 1);
    let mut elements = vec![false; f.m * 8];
    for i in 0..c {
        for lane in 0..32 {
            // Registers of 32-bit accumulators only.
            let (row, column) = c_place(i, lane / 4, lane % 4);
            elements[row * 8 + column] = undefined[32 * i + lane];
        }
    }
    elements
}

#[test]
fn undefined_elements_spoil_their_row_column_or_place_only() {
    let f = form("m16n8k16", "f32.f16.f16.f32");
    let expect = |test: &dyn Fn(usize, usize) -> bool| -> Vec<bool> {
        (0..16).flat_map(|r| (0..8).map(move |n| (r, n))).map(|(r, n)| test(r, n)).collect()
    };
    assert_eq!(undefined_elements(f, 0, 0), expect(&|_, _| false));
    // Lane 13 is group 3, member 1: register 0 of A holds row 3, register 1 row 11; register 4 is the first of B, 6 of C.
    assert_eq!(undefined_elements(f, 0, 1 << 13), expect(&|r, _| r == 3));
    assert_eq!(undefined_elements(f, 1, 1 << 13), expect(&|r, _| r == 11));
    assert_eq!(undefined_elements(f, 2, 1 << 13), expect(&|r, _| r == 3));
    assert_eq!(undefined_elements(f, 3, 1 << 13 | 1 << 31), expect(&|r, _| r == 11 || r == 15));
    assert_eq!(undefined_elements(f, 4, 1 << 13), expect(&|_, n| n == 3));
    assert_eq!(undefined_elements(f, 5, 1 << 28), expect(&|_, n| n == 7));
    assert_eq!(undefined_elements(f, 6, 1 << 13), expect(&|r, n| (r, n) == (3, 2)));
    assert_eq!(undefined_elements(f, 7, 1 << 13), expect(&|r, n| (r, n) == (3, 3)));
    assert_eq!(undefined_elements(f, 9, 1 << 13), expect(&|r, n| (r, n) == (11, 3)));
    let f = form("m8n8k16", "s32.s8.s8.s32");
    let expect = |test: &dyn Fn(usize, usize) -> bool| -> Vec<bool> {
        (0..8).flat_map(|r| (0..8).map(move |n| (r, n))).map(|(r, n)| test(r, n)).collect()
    };
    assert_eq!(undefined_elements(f, 0, 1 << 13), expect(&|r, _| r == 3));
    assert_eq!(undefined_elements(f, 1, 1 << 13), expect(&|_, n| n == 3));
}

/// A kernel with one `mma` whose operands are written by the caller.
fn single(instruction: &str) -> String {
    common::kernel(
        2,
        &format!(
            "mul.wide.u32 %rd3, %r0, 4;\nadd.s64 %rd1, %rd1, %rd3;\nadd.s64 %rd2, %rd2, %rd3;\nld.global.u32 %r10, [%rd1];\nmov.u32 %r11, %r10;\nmov.u32 %r12, %r10;\nmov.u32 %r13, %r10;\n{instruction}\nst.global.u32 [%rd2], %r20;\n"
        ),
    )
}

#[test]
fn spellings_immediates_and_aliases_are_accepted() {
    // All of A and B are 1: every element of D is 16 plus C.
    let ones = words(&[0x3c00_3c00; 32]);
    let cases = [
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0f00000000,0f00000000,0f00000000,0f00000000};",
            16.0,
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0f40000000,0f40000000,0f40000000,0f40000000};",
            18.0,
        ),
        (
            "mma.sync.aligned.row.col.m16n8k8.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11}, {%r10}, {0,0,0,0};",
            8.0,
        ),
        // D is C, and D is A.
        (
            "mov.f32 %r20, 0f3F800000; mov.f32 %r21, %r20; mov.f32 %r22, %r20; mov.f32 %r23, %r20;\nmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {%r20,%r21,%r22,%r23};",
            17.0,
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r10,%r11,%r12,%r13}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0,0,0,0};\nmov.b32 %r20, %r13;",
            16.0,
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r20,%r21}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0,0};\ncvt.u16.u32 %h1, %r20;\ncvt.f32.f16 %f1, %h1;\nmov.b32 %r20, %f1;",
            16.0,
        ),
    ];
    for (instruction, want) in cases {
        let ran = common::run(&single(instruction), "test", 32, &[ones.clone(), Arg::Out(128)]).silent();
        let got: Vec<f32> = ran.words(1).into_iter().map(f32::from_bits).collect();
        assert_eq!(got, vec![want; 32], "{instruction}");
    }
}

#[test]
fn what_is_not_supported_says_so_with_its_line() {
    let cases = [
        (
            "mma.sync.aligned.m8n8k4.row.col.f16.f16.f16.f16 {%r20,%r21}, {%r10,%r11}, {%r10,%r11}, {0,0};",
            "not supported",
        ),
        (
            "mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0,0,0,0};",
            "not supported",
        ),
        (
            "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0,0,0,0};",
            ".row.col",
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20,%r21,%r22}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0,0,0,0};",
            "4 registers",
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.satfinite.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0,0,0,0};",
            "satfinite",
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.weird.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0,0,0,0};",
            "weird",
        ),
        (
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0,0,0,0};",
            "not supported",
        ),
        (
            "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11}, {%r10,%r11}, {0,0,0,0}, %r10, 0x0;",
            "sparse",
        ),
        (
            "mma.m16n8k16.row.col.f32.f16.f16.f32 {%r20,%r21,%r22,%r23}, {%r10,%r11,%r12,%r13}, {%r10,%r11}, {0,0,0,0};",
            ".sync.aligned",
        ),
        (
            "wmma.load.a.sync.aligned.row.m16n16k16.f16 {%r20,%r21,%r22,%r23,%r24,%r25,%r26,%r27}, [%rd1], %r10;",
            "wmma",
        ),
        ("wgmma.fence.sync.aligned;", "wgmma"),
    ];
    for (instruction, what) in cases {
        let ptx = single(instruction);
        let line = ptx.lines().position(|l| l == instruction).expect("the line") + 1;
        let error =
            cuda::device::Device::new(Config::default()).load(&ptx).map(|_| ()).expect_err(instruction);
        assert_eq!(error.line as usize, line, "{error}");
        assert!(error.message.contains(what), "{instruction}: {error}");
    }
}
