//! What a matrix instruction is worth.

/// Shape and types of an `mma` instruction.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Mma {
    /// `m16n8k16.f32.bf16.bf16.f32`.
    pub(super) name: String,
    m: u64,
    n: u64,
    k: u64,
    a_bits: u64,
}

impl Mma {
    /// Reads them from the text of an instruction.
    pub(super) fn of(text: &str) -> Option<Self> {
        let opcode = text.split_whitespace().next()?;
        let mut words = opcode.split('.').skip_while(|word| *word != "mma");
        let shape = words.find(|word| word.starts_with('m') && word.contains('n') && word.contains('k'))?;
        let (m, rest) = shape[1..].split_once('n')?;
        let (n, k) = rest.split_once('k')?;
        let types: Vec<&str> = words.filter(|word| bits(word).is_some()).collect();
        // Destination, A, B, C.
        let a_bits = bits(types.get(1)?)?;
        Some(Self {
            name: format!("{shape}.{}", types.join(".")),
            m: m.parse().ok()?,
            n: n.parse().ok()?,
            k: k.parse().ok()?,
            a_bits,
        })
    }

    /// Multiplications and additions.
    pub(super) fn flops(&self) -> u64 {
        2 * self.m * self.n * self.k
    }

    /// Bytes of A that the tensor core takes in; tf32 has 32 bits.
    pub(super) fn a_bytes(&self) -> u64 {
        self.m * self.k * self.a_bits / 8
    }
}

fn bits(word: &str) -> Option<u64> {
    Some(match word {
        "f64" => 64,
        "f32" | "s32" | "tf32" => 32,
        "f16" | "bf16" => 16,
        "s8" | "u8" | "e4m3" | "e5m2" => 8,
        "s4" | "u4" => 4,
        "b1" => 1,
        _ => return None,
    })
}
