//! What IEEE 754 says, by the book: numbers are exact integers times powers of two, and rounding is a search through all
//! values of a format.
#![allow(dead_code)]

use std::cmp::Ordering;

/// A natural number, 32 bits a word, lowest first, no zero at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Big(Vec<u32>);

impl Big {
    fn from(mut n: u128) -> Self {
        let mut words = Vec::new();
        while n != 0 {
            words.push(n as u32);
            n >>= 32;
        }
        Self(words)
    }

    fn trimmed(mut self) -> Self {
        while self.0.last() == Some(&0) {
            self.0.pop();
        }
        self
    }

    fn word(&self, i: usize) -> u64 {
        u64::from(self.0.get(i).copied().unwrap_or(0))
    }

    fn times(&self, other: &Self) -> Self {
        let mut out = vec![0; self.0.len() + other.0.len()];
        for i in 0..self.0.len() {
            let mut carry = 0;
            for j in 0..other.0.len() {
                let sum = self.word(i) * other.word(j) + u64::from(out[i + j]) + carry;
                out[i + j] = sum as u32;
                carry = sum >> 32;
            }
            out[i + other.0.len()] = carry as u32;
        }
        Self(out).trimmed()
    }

    fn shifted(&self, bits: u32) -> Self {
        let mut out = vec![0; (bits / 32) as usize];
        let mut carry = 0;
        for &word in &self.0 {
            let both = u64::from(word) << (bits % 32) | carry;
            out.push(both as u32);
            carry = both >> 32;
        }
        out.push(carry as u32);
        Self(out).trimmed()
    }

    fn plus(&self, other: &Self) -> Self {
        let mut out = Vec::new();
        let mut carry = 0;
        for i in 0..=self.0.len().max(other.0.len()) {
            let sum = self.word(i) + other.word(i) + carry;
            out.push(sum as u32);
            carry = sum >> 32;
        }
        Self(out).trimmed()
    }

    /// `self - other`, which must not be larger.
    fn minus(&self, other: &Self) -> Self {
        let mut out = Vec::new();
        let mut borrow = 0;
        for i in 0..self.0.len() {
            let (a, b) = (self.word(i), other.word(i) + borrow);
            borrow = u64::from(a < b);
            out.push((a + (borrow << 32) - b) as u32);
        }
        assert_eq!(borrow, 0);
        Self(out).trimmed()
    }

    /// Number of bits.
    fn length(&self) -> i32 {
        self.0.last().map_or(0, |top| self.0.len() as i32 * 32 - top.leading_zeros() as i32)
    }

    fn compare(&self, other: &Self) -> Ordering {
        self.0.len().cmp(&other.0.len()).then_with(|| self.0.iter().rev().cmp(other.0.iter().rev()))
    }
}

/// A finite number: sign, magnitude, exponent.
#[derive(Clone, Debug)]
pub(crate) struct Exact {
    pub(crate) negative: bool,
    magnitude: Big,
    exponent: i32,
}

impl Exact {
    pub(crate) fn integer(n: i128) -> Self {
        Self { negative: n < 0, magnitude: Big::from(n.unsigned_abs()), exponent: 0 }
    }

    /// The same magnitude with a sign.
    pub(crate) fn signed(self, negative: bool) -> Self {
        Self { negative, ..self }
    }

    pub(crate) fn is_zero(&self) -> bool {
        self.magnitude.0.is_empty()
    }

    fn aligned(&self, other: &Self) -> (Big, Big, i32) {
        let exponent = self.exponent.min(other.exponent);
        let shift = |x: &Self| x.magnitude.shifted((x.exponent - exponent) as u32);
        (shift(self), shift(other), exponent)
    }

    pub(crate) fn plus(&self, other: &Self) -> Self {
        let (a, b, exponent) = self.aligned(other);
        let (negative, magnitude) = if self.negative == other.negative {
            (self.negative, a.plus(&b))
        } else if a.compare(&b) == Ordering::Less {
            (other.negative, b.minus(&a))
        } else {
            (self.negative, a.minus(&b))
        };
        Self { negative, magnitude, exponent }
    }

    pub(crate) fn times(&self, other: &Self) -> Self {
        Self {
            negative: self.negative != other.negative,
            magnitude: self.magnitude.times(&other.magnitude),
            exponent: self.exponent + other.exponent,
        }
    }

    /// Order of the magnitudes.
    pub(crate) fn compare(&self, other: &Self) -> Ordering {
        if self.is_zero() || other.is_zero() {
            return other.is_zero().cmp(&self.is_zero());
        }
        // The highest bits decide most comparisons without the long numbers.
        let top = |x: &Self| x.magnitude.length() + x.exponent;
        if top(self) != top(other) {
            return top(self).cmp(&top(other));
        }
        let (a, b, _) = self.aligned(other);
        a.compare(&b)
    }

    /// The magnitude rounded to an integer.
    pub(crate) fn whole(&self, mode: Mode) -> u128 {
        // Search, as for floats: the largest integer not above it, between two powers of two.
        let top = (self.magnitude.length() + self.exponent).clamp(0, 100);
        let (mut low, mut high) = if top == 0 { (0, 1) } else { (1u128 << (top - 1), 1 << top) };
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let above = Self::integer(middle as i128).compare(self) == Ordering::Greater;
            if above { high = middle } else { low = middle }
        }
        if Self::integer(low as i128).compare(self) == Ordering::Equal {
            return low;
        }
        let half = Self { exponent: -1, ..Self::integer(2 * low as i128 + 1) };
        if up(mode, self.negative, half.compare(self), low % 2 == 0) { low + 1 } else { low }
    }
}

/// Whether to take the upper of two neighbours; `half` is how the middle compares with the exact value.
fn up(mode: Mode, negative: bool, half: Ordering, low_even: bool) -> bool {
    match mode {
        Mode::Rz => false,
        Mode::Rm => negative,
        Mode::Rp => !negative,
        Mode::Rn => half == Ordering::Less || (half == Ordering::Equal && !low_even),
        Mode::Rna => half != Ordering::Greater,
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Rn,
    Rz,
    Rm,
    Rp,
    Rna,
}

pub(crate) const MODES: [(&str, Mode); 4] =
    [("rn", Mode::Rn), ("rz", Mode::Rz), ("rm", Mode::Rm), ("rp", Mode::Rp)];

/// Significant bits and exponent bits of an IEEE format, and the NaN that operations give (the manual leaves f64's open).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    pub(crate) digits: u32,
    pub(crate) exponent: u32,
    pub(crate) nan: u64,
}

pub(crate) const F16: Format = Format { digits: 11, exponent: 5, nan: 0x7fff };
pub(crate) const BF16: Format = Format { digits: 8, exponent: 8, nan: 0x7fff };
pub(crate) const F32: Format = Format { digits: 24, exponent: 8, nan: 0x7fff_ffff };
pub(crate) const F64: Format = Format { digits: 53, exponent: 11, nan: 0x7ff8 << 48 };

#[derive(Clone, Debug)]
pub(crate) enum Number {
    Nan,
    Infinite(bool),
    Finite(Exact),
}

impl Format {
    pub(crate) fn sign(self) -> u64 {
        1 << (self.digits + self.exponent - 1)
    }

    pub(crate) fn infinity(self) -> u64 {
        ((1 << self.exponent) - 1) << (self.digits - 1)
    }

    pub(crate) fn is_nan(self, bits: u64) -> bool {
        bits & (self.sign() - 1) > self.infinity()
    }

    /// The value of a bit pattern below NaN, the infinity read as the next power of two.
    fn value(self, magnitude: u64, negative: bool) -> Exact {
        let hidden = 1 << (self.digits - 1);
        let field = (magnitude >> (self.digits - 1)) as i32;
        let fraction = magnitude % hidden;
        let least = 2 - ((1 << (self.exponent - 1)) - 1) - self.digits as i32;
        let (mantissa, exponent) =
            if field == 0 { (fraction, least) } else { (fraction + hidden, least + field - 1) };
        Exact { negative, magnitude: Big::from(u128::from(mantissa)), exponent }
    }

    pub(crate) fn number(self, bits: u64) -> Number {
        let negative = bits & self.sign() != 0;
        let magnitude = bits & (self.sign() - 1);
        match magnitude.cmp(&self.infinity()) {
            Ordering::Less => Number::Finite(self.value(magnitude, negative)),
            Ordering::Equal => Number::Infinite(negative),
            Ordering::Greater => Number::Nan,
        }
    }

    /// `.ftz`.
    pub(crate) fn flush(self, bits: u64) -> u64 {
        if bits & self.infinity() == 0 { bits & self.sign() } else { bits }
    }

    /// The float that an exact magnitude rounds to; `compare` says how a candidate's magnitude compares with it.
    pub(crate) fn search(self, negative: bool, mode: Mode, compare: impl Fn(&Exact) -> Ordering) -> u64 {
        let sign = if negative { self.sign() } else { 0 };
        let infinity = self.infinity();
        let (mut low, mut high) = (0, infinity + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if compare(&self.value(middle, false)) == Ordering::Greater {
                high = middle;
            } else {
                low = middle;
            }
        }
        if low < infinity && compare(&self.value(low, false)) == Ordering::Equal {
            return low | sign;
        }
        if low == infinity {
            // Beyond all numbers: directed roundings away from infinity stay at the last one.
            return if up(mode, negative, Ordering::Less, true) { infinity } else { infinity - 1 } | sign;
        }
        let (a, b) = (self.value(low, false), self.value(low + 1, false));
        let twice = a.plus(&b);
        let half = compare(&Exact { exponent: twice.exponent - 1, ..twice });
        (if up(mode, negative, half, low % 2 == 0) { low + 1 } else { low }) | sign
    }

    pub(crate) fn round(self, x: &Exact, mode: Mode) -> u64 {
        self.search(x.negative, mode, |candidate| candidate.compare(x))
    }

    pub(crate) fn add(self, a: u64, b: u64, mode: Mode) -> u64 {
        match (self.number(a), self.number(b)) {
            (Number::Nan, _) | (_, Number::Nan) => self.nan,
            (Number::Infinite(x), Number::Infinite(y)) => {
                if x == y {
                    a
                } else {
                    self.nan
                }
            }
            (Number::Infinite(_), _) => a,
            (_, Number::Infinite(_)) => b,
            (Number::Finite(x), Number::Finite(y)) => self.sum(&x, &y, mode),
        }
    }

    fn sum(self, x: &Exact, y: &Exact, mode: Mode) -> u64 {
        let exact = x.plus(y);
        if exact.is_zero() {
            // Equal signs keep theirs; else +0, but -0 when rounding down.
            let both = x.is_zero() && y.is_zero() && x.negative == y.negative;
            let negative = if both { x.negative } else { mode == Mode::Rm };
            return if negative { self.sign() } else { 0 };
        }
        self.round(&exact, mode)
    }

    pub(crate) fn mul(self, a: u64, b: u64, mode: Mode) -> u64 {
        let sign = (a ^ b) & self.sign();
        match (self.number(a), self.number(b)) {
            (Number::Nan, _) | (_, Number::Nan) => self.nan,
            (Number::Finite(x), Number::Finite(y)) => self.round(&x.times(&y), mode),
            (Number::Finite(x), _) | (_, Number::Finite(x)) if x.is_zero() => self.nan,
            _ => self.infinity() | sign,
        }
    }

    pub(crate) fn fma(self, a: u64, b: u64, c: u64, mode: Mode) -> u64 {
        match (self.number(a), self.number(b), self.number(c)) {
            (Number::Finite(x), Number::Finite(y), Number::Finite(z)) => self.sum(&x.times(&y), &z, mode),
            (Number::Finite(_), Number::Finite(_), Number::Infinite(_)) => c,
            // The product is infinite or NaN, whatever its size.
            _ => self.add(self.mul(a, b, Mode::Rz), c, mode),
        }
    }

    pub(crate) fn div(self, a: u64, b: u64, mode: Mode) -> u64 {
        let sign = (a ^ b) & self.sign();
        match (self.number(a), self.number(b)) {
            (Number::Nan, _) | (_, Number::Nan) | (Number::Infinite(_), Number::Infinite(_)) => self.nan,
            (Number::Infinite(_), _) => self.infinity() | sign,
            (_, Number::Infinite(_)) => sign,
            (Number::Finite(x), Number::Finite(y)) if y.is_zero() => {
                if x.is_zero() {
                    self.nan
                } else {
                    self.infinity() | sign
                }
            }
            (Number::Finite(x), Number::Finite(y)) => {
                self.search(sign != 0, mode, |candidate| candidate.times(&y).compare(&x))
            }
        }
    }

    pub(crate) fn sqrt(self, a: u64, mode: Mode) -> u64 {
        match self.number(a) {
            Number::Finite(x) if x.is_zero() => a,
            Number::Finite(x) if !x.negative => {
                self.search(false, mode, |candidate| candidate.times(candidate).compare(&x))
            }
            Number::Infinite(false) => a,
            _ => self.nan,
        }
    }

    /// The same value in another format.
    pub(crate) fn convert(self, bits: u64, to: Self, mode: Mode) -> u64 {
        match self.number(bits) {
            Number::Nan => to.nan,
            Number::Infinite(negative) => to.infinity() | if negative { to.sign() } else { 0 },
            Number::Finite(x) => to.round(&x, mode),
        }
    }

    /// Bits whose neighbourhood is worth a test: zeros, subnormals, ones, ties, ends, infinities, NaN.
    pub(crate) fn edges(self) -> Vec<u64> {
        let (infinity, step) = (self.infinity(), 1 << (self.digits - 1));
        let one = infinity / 2 / step * step;
        let mut out = vec![0, 1, 2, step / 2, step - 1, step, step + 1, 2 * step, one / 2, one / 2 + 1];
        for exponent in
            [-1i64, 0, 1, 2, i64::from(self.digits) - 1, i64::from(self.digits), i64::from(self.digits) + 1]
        {
            let at = one.wrapping_add((exponent as u64).wrapping_mul(step));
            out.extend([at - 1, at, at + 1, at + step / 2, at + step / 2 + 1]);
        }
        out.extend([
            infinity - step,
            infinity - 2,
            infinity - 1,
            infinity,
            infinity + 1,
            infinity + step / 2,
        ]);
        out.iter().flat_map(|&bits| [bits, bits | self.sign()]).collect()
    }
}
