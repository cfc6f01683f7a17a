//! Text that is not PTX, or not quite: the parser must answer soon, and with an error that names a line of it.

use std::path::Path;
use std::time::{Duration, Instant};

use cuda::ptx::parse;
use proptest::prelude::*;

const HEADER: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";

/// Parses and checks that it took no longer than a second.
fn survive(text: &str) -> bool {
    let start = Instant::now();
    let parsed = parse(text);
    assert!(start.elapsed() < Duration::from_secs(1), "{:?} for {} bytes", start.elapsed(), text.len());
    if let Err(error) = &parsed {
        let lines = text.split('\0').next().unwrap_or_default().matches('\n').count() as u32 + 1;
        assert!((1..=lines).contains(&error.line), "{error} of {lines} lines");
    }
    parsed.is_ok()
}

#[test]
fn repetition_is_not_quadratic() {
    for piece in [
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "<",
        "-",
        "!",
        "~",
        "+",
        "|",
        ",",
        ";",
        ":",
        "::",
        ".",
        "..",
        "@",
        "\"",
        "\"\"",
        "/*",
        "//\n",
        "%",
        "%r",
        "a.",
        "a:",
        "0x",
        "1+",
        "1?",
        "1<<",
        "{a",
        "{1,",
        "a,",
        "ret;",
        "{}",
        "@p ",
        "@!p ret;",
        ".reg .b32 a;",
        ".param .b32 ",
        ".loc 1 1 1 ",
        ".section .a {",
        ".pragma \"a\";",
        ".file 1 \"a\"",
        "x: .branchtargets a;",
        "#",
        "\u{fffd}",
        ".func f();",
        ".alias a, b;",
        ".global .b32 a[1] = {",
        ".global .b8 a[2][2] = {{1}};",
        ".attribute(",
        "call (a), ",
    ] {
        let many = piece.repeat((1 << 18) / piece.len());
        survive(&many);
        survive(&format!("{HEADER}{many}"));
        survive(&format!("{HEADER}.entry k() {{ {many}"));
        survive(&format!("{HEADER}.entry k() {{ mov.b32 {many}"));
        survive(&format!("{HEADER}.global .b32 x[100] = {many}"));
    }
}

fn small_kernel() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases/misc_warp/kernel.ptx");
    std::fs::read_to_string(path).unwrap()
}

/// Pieces of PTX, to be put together at random.
fn soup() -> impl Strategy<Value = String> {
    let piece = proptest::sample::select(vec![
        "{",
        "}",
        "(",
        ")",
        "[",
        "]",
        "<",
        ">",
        ",",
        ";",
        ":",
        "|",
        "!",
        "@",
        "+",
        "-",
        "=",
        "_",
        "%r1",
        "%tid.x",
        "p",
        "$L",
        "mov.b32",
        "call.uni",
        "ld.global.v4.f32",
        ".reg",
        ".b32",
        ".pred",
        ".param",
        ".shared",
        ".align",
        ".entry",
        ".func",
        ".visible",
        ".extern",
        ".loc",
        ".file",
        ".section",
        ".pragma",
        ".maxntid",
        ".branchtargets",
        ".callprototype",
        ".ptr",
        ".v4",
        "0",
        "5",
        "-24",
        "0x1F",
        "0f3F800000",
        "1.5",
        "4000000000",
        "\"text\"",
        "// c\n",
        "/* c */",
        "\n",
        "generic(x)",
        "WARP_SZ",
        "<<",
        "0",
        "&&",
    ]);
    proptest::collection::vec(piece, 0..200).prop_map(|pieces| pieces.join(" "))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(500) })]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..2000), header: bool) {
        let text = String::from_utf8_lossy(&bytes);
        survive(&if header { format!("{HEADER}{text}") } else { text.into_owned() });
    }

    #[test]
    fn random_words(words in soup(), inside: bool) {
        survive(&if inside { format!("{HEADER}.entry k() {{ {words}") } else { format!("{HEADER}{words}") });
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(150) })]

    #[test]
    fn changed_kernels(
        edits in proptest::collection::vec(
            (any::<proptest::sample::Index>(), any::<proptest::sample::Index>(), 0_usize..6, any::<u8>()), 1..6),
    ) {
        let mut bytes = small_kernel().into_bytes();
        for (from, to, kind, byte) in edits {
            if bytes.is_empty() {
                break;
            }
            let (a, b) = (from.index(bytes.len()), to.index(bytes.len()));
            let (a, b) = (a.min(b), a.max(b));
            match kind {
                0 => bytes[a] = byte,
                1 => bytes.insert(a, b"{}()[];,.:\"/*@%<>|-+0"[usize::from(byte) % 21]),
                2 => {
                    bytes.drain(a..b.min(a + 200));
                }
                3 => bytes.truncate(b),
                4 => {
                    let copy = bytes[a..b].to_vec();
                    bytes.splice(a..a, copy);
                }
                _ => bytes.swap(a, b),
            }
        }
        survive(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn cut_kernels(at in any::<proptest::sample::Index>()) {
        let text = small_kernel();
        let cut = &text[..at.index(text.len())];
        let depth = cut.matches('{').count() - cut.matches('}').count();
        // A cut inside a body can never be a whole module.
        prop_assert!(!(survive(cut) && depth > 0));
    }
}
