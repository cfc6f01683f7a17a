//! Floating point by exact integer arithmetic: every format, every rounding mode, one rounding. Slow and obvious; the usual
//! operations have faster ways, which the tests hold against the IEEE definitions.

/// Where to go when a value lies between two neighbours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// `.rn`: the nearer, on a tie the even one.
    #[default]
    Nearest,
    /// `.rz`: towards zero.
    Zero,
    /// `.rm`: towards minus infinity.
    Down,
    /// `.rp`: towards plus infinity.
    Up,
    /// `.rna`: the nearer, on a tie the larger magnitude.
    NearestAway,
}

impl Rounding {
    /// The mode of a number that [`Rounding::code`] gave.
    pub(crate) fn from_code(code: u32) -> Self {
        [Self::Nearest, Self::Zero, Self::Down, Self::Up, Self::NearestAway][code as usize % 5]
    }

    /// A small number, for a field of an instruction.
    pub(crate) fn code(self) -> u32 {
        self as u32
    }

    /// `.rn`, `.rz`, `.rm`, `.rp` and, followed by an `i`, the same for rounding to integers.
    pub(crate) fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "rn" | "rni" => Self::Nearest,
            "rz" | "rzi" => Self::Zero,
            "rm" | "rmi" => Self::Down,
            "rp" | "rpi" => Self::Up,
            "rna" => Self::NearestAway,
            _ => return None,
        })
    }
}

/// What the largest exponent of a format means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Special {
    /// Infinities and NaN, as in IEEE 754.
    Ieee,
    /// Numbers, but for one NaN with all bits set (e4m3).
    OneNan,
}

/// A binary floating-point format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// Bits of the significand, the hidden one counted.
    digits: u32,
    /// Bits of the exponent.
    exponent_bits: u32,
    special: Special,
    /// The NaN that operations give.
    pub(crate) nan: u64,
}

/// IEEE binary16.
pub(crate) const F16: Format = Format { digits: 11, exponent_bits: 5, special: Special::Ieee, nan: 0x7fff };
/// The upper half of a binary32.
pub(crate) const BF16: Format = Format { digits: 8, exponent_bits: 8, special: Special::Ieee, nan: 0x7fff };
/// IEEE binary32.
pub(crate) const F32: Format =
    Format { digits: 24, exponent_bits: 8, special: Special::Ieee, nan: 0x7fff_ffff };
/// IEEE binary64. The manual leaves the NaN open; this is the f32 one in this width.
pub(crate) const F64: Format =
    Format { digits: 53, exponent_bits: 11, special: Special::Ieee, nan: 0x7fff_ffff_ffff_ffff };
/// The 19 bits of tf32, right-aligned.
pub(crate) const TF32: Format =
    Format { digits: 11, exponent_bits: 8, special: Special::Ieee, nan: 0x3_ffff };
/// 8 bits, no infinity, largest number 448.
pub(crate) const E4M3: Format = Format { digits: 4, exponent_bits: 4, special: Special::OneNan, nan: 0x7f };
/// The upper byte of a binary16.
pub(crate) const E5M2: Format = Format { digits: 3, exponent_bits: 5, special: Special::Ieee, nan: 0x7f };

impl Format {
    /// Width without the sign.
    const fn sign_bit(self) -> u32 {
        self.digits - 1 + self.exponent_bits
    }

    /// Exponent of the least subnormal.
    const fn quantum(self) -> i32 {
        let bias = (1 << (self.exponent_bits - 1)) - 1;
        2 - bias - self.digits as i32
    }

    /// The bits of the largest finite number.
    const fn largest(self) -> u64 {
        let all = (1 << self.sign_bit()) - 1;
        match self.special {
            Special::Ieee => all - (1 << (self.digits - 1)),
            Special::OneNan => all - 1,
        }
    }

    /// The bits of infinity, where there is one.
    const fn infinity(self) -> Option<u64> {
        match self.special {
            Special::Ieee => Some(self.largest() + 1),
            Special::OneNan => None,
        }
    }

    /// The bits of 1.
    pub(crate) const fn one(self) -> u64 {
        ((1 << (self.exponent_bits - 1)) - 1) << (self.digits - 1)
    }

    /// The bits of zero with a sign.
    pub(crate) const fn zero(self, negative: bool) -> u64 {
        (negative as u64) << self.sign_bit()
    }

    /// A subnormal number becomes zero with its sign.
    pub(crate) const fn flush(self, bits: u64) -> u64 {
        let exponent = bits >> (self.digits - 1) & ((1 << self.exponent_bits) - 1);
        if exponent == 0 { bits & 1 << self.sign_bit() } else { bits }
    }
}

/// A number that is not rounded yet: `mantissa * 2^exponent`, plus less than `2^exponent` when `more` is set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number {
    /// Sign.
    pub(crate) negative: bool,
    /// Significand.
    pub(crate) mantissa: u128,
    /// Exponent of its last bit.
    pub(crate) exponent: i32,
    /// There are non-zero bits below the last one.
    pub(crate) more: bool,
}

/// What a bit pattern stands for, or an operation gives.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Value {
    /// Not a number.
    Nan,
    /// Infinity; true = negative.
    Infinite(bool),
    /// Anything else.
    Finite(Number),
}

impl Number {
    /// An integer.
    pub(crate) fn integer(negative: bool, mantissa: u128) -> Self {
        Self { negative, mantissa, exponent: 0, more: false }
    }

    /// Zero with a sign.
    fn zero(negative: bool) -> Self {
        Self::integer(negative, 0)
    }

    fn is_zero(&self) -> bool {
        self.mantissa == 0 && !self.more
    }

    /// The same with the highest set bit of the mantissa at `bit` (which must not lie below it).
    fn raised_to(self, bit: u32) -> Self {
        let shift = bit as i32 - (127 - self.mantissa.leading_zeros() as i32);
        Self { mantissa: self.mantissa << shift, exponent: self.exponent - shift, ..self }
    }

    /// The multiple of `2^quantum` that it is rounded to.
    fn quotient(&self, quantum: i32, rounding: Rounding) -> u128 {
        let shift = i64::from(quantum) - i64::from(self.exponent);
        if shift <= 0 {
            // Operations leave enough bits: nothing lies below the last bit when the quantum is as small as it.
            return self.mantissa << (-shift).min(127);
        }
        let (whole, rest, half) = if shift >= 128 {
            (0, self.mantissa, if shift == 128 { 1 << 127 } else { u128::MAX })
        } else {
            (self.mantissa >> shift, self.mantissa & ((1 << shift) - 1), 1 << (shift - 1))
        };
        let exact = rest == 0 && !self.more;
        let (above, tie) = (rest > half || (rest == half && self.more), rest == half && !self.more);
        let (above, tie) = if shift > 128 { (false, false) } else { (above, tie) };
        let up = match rounding {
            Rounding::Nearest => above || (tie && whole & 1 == 1),
            Rounding::NearestAway => above || tie,
            Rounding::Zero => false,
            Rounding::Down => self.negative && !exact,
            Rounding::Up => !self.negative && !exact,
        };
        whole + u128::from(up)
    }

    /// Rounded to an integer: its magnitude (saturated far beyond 64 bits).
    pub(crate) fn to_integer(self, rounding: Rounding) -> u128 {
        if self.mantissa != 0 && self.exponent > self.mantissa.leading_zeros() as i32 - 1 {
            return u128::MAX;
        }
        self.quotient(0, rounding)
    }
}

impl Value {
    /// What bits of a format stand for.
    pub(crate) fn of(bits: u64, format: Format) -> Self {
        let negative = bits >> format.sign_bit() & 1 == 1;
        let magnitude = bits & ((1 << format.sign_bit()) - 1);
        if magnitude > format.largest() {
            return if format.infinity() == Some(magnitude) { Self::Infinite(negative) } else { Self::Nan };
        }
        let fraction = magnitude & ((1 << (format.digits - 1)) - 1);
        let biased = (magnitude >> (format.digits - 1)) as i32;
        let (mantissa, up) =
            if biased == 0 { (fraction, 0) } else { (fraction | 1 << (format.digits - 1), biased - 1) };
        let exponent = format.quantum() + up;
        Self::Finite(Number { negative, mantissa: u128::from(mantissa), exponent, more: false })
    }

    /// Rounded once to bits of a format. `saturate`: too large becomes the largest number instead of infinity, and so does
    /// infinity itself.
    pub(crate) fn round(self, format: Format, rounding: Rounding, saturate: bool) -> u64 {
        let sign = |negative| format.zero(negative);
        let beyond = |negative| match format.infinity() {
            Some(infinity) if !saturate => infinity,
            _ if saturate => format.largest(),
            _ => format.nan,
        } | sign(negative);
        let number = match self {
            Self::Nan => return format.nan,
            Self::Infinite(negative) => return beyond(negative),
            Self::Finite(number) => number,
        };
        let negative = number.negative;
        if number.is_zero() {
            return sign(negative);
        }
        let top = number.exponent + 127 - number.mantissa.leading_zeros() as i32;
        let quantum = (top + 1 - format.digits as i32).max(format.quantum());
        let significand = number.quotient(quantum, rounding);
        // The hidden bit and a carry out of the significand both add one to the exponent field.
        let field = (quantum - format.quantum()) as u128;
        let magnitude = (field << (format.digits - 1)) + significand;
        if magnitude <= u128::from(format.largest()) {
            return magnitude as u64 | sign(negative);
        }
        let inwards = match rounding {
            Rounding::Nearest | Rounding::NearestAway => false,
            Rounding::Zero => true,
            Rounding::Down => !negative,
            Rounding::Up => negative,
        };
        if inwards { format.largest() | sign(negative) } else { beyond(negative) }
    }

    /// The same with the other sign.
    pub(crate) fn negated(self) -> Self {
        match self {
            Self::Nan => Self::Nan,
            Self::Infinite(negative) => Self::Infinite(!negative),
            Self::Finite(n) => Self::Finite(Number { negative: !n.negative, ..n }),
        }
    }

    /// Sum. The rounding mode decides the sign of an exact zero.
    pub(crate) fn plus(self, other: Self, rounding: Rounding) -> Self {
        let (a, b) = match (self, other) {
            (Self::Finite(a), Self::Finite(b)) => (a, b),
            (Self::Infinite(a), Self::Infinite(b)) if a != b => return Self::Nan,
            (Self::Nan, _) | (_, Self::Nan) => return Self::Nan,
            (Self::Infinite(sign), _) | (_, Self::Infinite(sign)) => return Self::Infinite(sign),
        };
        if a.is_zero() && b.is_zero() {
            let negative = if a.negative == b.negative { a.negative } else { rounding == Rounding::Down };
            return Self::Finite(Number::zero(negative));
        }
        if a.is_zero() || b.is_zero() {
            return Self::Finite(if a.is_zero() { b } else { a });
        }
        // Both with their highest bit in one place, two below the width: the sum has room, and of the smaller one only
        // bits are lost that are worth less than the last bit of any significand (106 bits at most are in use).
        let (a, b) = (a.raised_to(125), b.raised_to(125));
        let (big, small) = if (a.exponent, a.mantissa) >= (b.exponent, b.mantissa) { (a, b) } else { (b, a) };
        let shift = (big.exponent - small.exponent) as u32;
        let (kept, more) = if shift > 127 {
            (0, true)
        } else {
            (small.mantissa >> shift, small.mantissa & ((1 << shift) - 1) != 0)
        };
        let mantissa = if big.negative == small.negative {
            big.mantissa + kept
        } else {
            big.mantissa - kept - u128::from(more)
        };
        if mantissa == 0 {
            return Self::Finite(Number::zero(rounding == Rounding::Down));
        }
        Self::Finite(Number { mantissa, more, ..big })
    }

    /// Product.
    pub(crate) fn times(self, other: Self) -> Self {
        let sign = |a: Self| match a {
            Self::Nan => false,
            Self::Infinite(negative) => negative,
            Self::Finite(n) => n.negative,
        };
        let negative = sign(self) != sign(other);
        match (self, other) {
            (Self::Finite(a), Self::Finite(b)) => Self::Finite(Number {
                negative,
                mantissa: a.mantissa * b.mantissa,
                exponent: a.exponent + b.exponent,
                more: false,
            }),
            (Self::Nan, _) | (_, Self::Nan) => Self::Nan,
            (Self::Finite(zero), _) | (_, Self::Finite(zero)) if zero.is_zero() => Self::Nan,
            _ => Self::Infinite(negative),
        }
    }

    /// Quotient.
    pub(crate) fn over(self, other: Self) -> Self {
        match (self, other) {
            (Self::Nan, _) | (_, Self::Nan) | (Self::Infinite(_), Self::Infinite(_)) => Self::Nan,
            (Self::Infinite(a), Self::Finite(b)) => Self::Infinite(a != b.negative),
            (Self::Finite(a), Self::Infinite(b)) => Self::Finite(Number::zero(a.negative != b)),
            (Self::Finite(a), Self::Finite(b)) => {
                let negative = a.negative != b.negative;
                match (a.is_zero(), b.is_zero()) {
                    (true, true) => Self::Nan,
                    (true, false) => Self::Finite(Number::zero(negative)),
                    (false, true) => Self::Infinite(negative),
                    (false, false) => {
                        let a = a.raised_to(127);
                        Self::Finite(Number {
                            negative,
                            mantissa: a.mantissa / b.mantissa,
                            exponent: a.exponent - b.exponent,
                            more: a.mantissa % b.mantissa != 0,
                        })
                    }
                }
            }
        }
    }

    /// Square root.
    pub(crate) fn root(self) -> Self {
        match self {
            Self::Finite(a) if a.is_zero() => self,
            Self::Finite(a) if !a.negative => {
                let mut a = a.raised_to(126);
                if a.exponent % 2 != 0 {
                    a = a.raised_to(127);
                }
                let mantissa = a.mantissa.isqrt();
                Self::Finite(Number {
                    negative: false,
                    mantissa,
                    exponent: a.exponent / 2,
                    more: mantissa * mantissa != a.mantissa,
                })
            }
            Self::Infinite(false) => self,
            _ => Self::Nan,
        }
    }
}
