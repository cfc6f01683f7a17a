//! The PTX inside fat binaries: made by nvcc, built by hand, and damaged.

use std::ffi::CString;
use std::path::Path;

use cuda::fatbin::{
    FATBIN_MAGIC, FatbinError, ImageKind, WRAPPER_MAGIC, image_kind, image_len, ptx_from_image, ptx_text,
    select_ptx, unwrap_image,
};
use proptest::prelude::*;

const PTX: u16 = 1;
const ELF: u16 = 2;

/// One of the files in `tests/fatbins`.
fn file(name: &str) -> Vec<u8> {
    std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fatbins").join(name)).unwrap()
}

/// An entry as the format describes it.
struct Entry {
    kind: u16,
    architecture: u32,
    flags: u64,
    compressed: u32,
    decompressed: u64,
    payload: Vec<u8>,
}

fn entry(kind: u16, architecture: u32, payload: &str) -> Entry {
    Entry {
        kind,
        architecture,
        flags: 0x11,
        compressed: 0,
        decompressed: 0,
        payload: payload.as_bytes().to_vec(),
    }
}

fn fatbin(entries: &[Entry]) -> Vec<u8> {
    let mut body = Vec::new();
    for entry in entries {
        let start = body.len();
        body.extend(entry.kind.to_le_bytes());
        body.extend(0x0101_u16.to_le_bytes());
        body.extend(64_u32.to_le_bytes());
        body.extend((entry.payload.len() as u64).to_le_bytes());
        body.extend(entry.compressed.to_le_bytes());
        body.resize(start + 28, 0);
        body.extend(entry.architecture.to_le_bytes());
        body.resize(start + 40, 0);
        body.extend(entry.flags.to_le_bytes());
        body.resize(start + 56, 0);
        body.extend(entry.decompressed.to_le_bytes());
        body.extend(&entry.payload);
    }
    let mut out = FATBIN_MAGIC.to_le_bytes().to_vec();
    out.extend([1, 0, 16, 0]);
    out.extend((body.len() as u64).to_le_bytes());
    out.extend(body);
    out
}

/// The word after `.target`.
fn target(ptx: &str) -> &str {
    ptx.split_once(".target ").expect("a target").1.split_whitespace().next().expect("its name")
}

#[test]
fn nvcc_stored_and_compressed_give_the_same_text() {
    for sm in [80, 86, 89, 90, 100] {
        let stored = select_ptx(&file("stored.fatbin"), sm).unwrap();
        assert!(stored.contains(".visible .entry twice("), "{stored}");
        assert_eq!(select_ptx(&file("zstd.fatbin"), sm).unwrap(), stored);
        cuda::ptx::parse(&stored).unwrap();
    }
    let stored = select_ptx(&file("stored.fatbin"), 80).unwrap();
    assert_eq!(select_ptx(&file("lz4.fatbin"), 80).unwrap(), stored);
}

#[test]
fn the_highest_architecture_that_runs_is_taken() {
    for name in ["stored.fatbin", "zstd.fatbin"] {
        let image = file(name);
        for (sm, expected) in [(80, "sm_80"), (89, "sm_80"), (90, "sm_90a"), (100, "sm_90")] {
            assert_eq!(target(&select_ptx(&image, sm).unwrap()), expected, "{name} on sm_{sm}");
        }
    }
    // Independent of the order in the file.
    let image =
        fatbin(&[entry(PTX, 86, "86"), entry(PTX, 90, "90"), entry(ELF, 89, "elf"), entry(PTX, 80, "80")]);
    for (sm, expected) in [(80, "80"), (86, "86"), (89, "86"), (90, "90"), (120, "90")] {
        assert_eq!(select_ptx(&image, sm).unwrap(), expected);
    }
}

#[test]
fn family_code_runs_on_its_family_alone() {
    let image = file("family.fatbin");
    assert_eq!(target(&select_ptx(&image, 120).unwrap()), "sm_120f");
    assert_eq!(target(&select_ptx(&image, 121).unwrap()), "sm_120f");
    for sm in [80, 90, 130] {
        let error = select_ptx(&image, sm).unwrap_err();
        assert_eq!(error, FatbinError::WrongArchitecture { found: vec!["sm_120f".to_owned()], device: sm });
    }
}

#[test]
fn errors_name_the_remedy() {
    let error = select_ptx(&file("elf.fatbin"), 80).unwrap_err();
    assert_eq!(error, FatbinError::OnlyMachineCode);
    assert!(error.to_string().contains("code=compute_80"), "{error}");

    let error = select_ptx(&file("stored.fatbin"), 75).unwrap_err().to_string();
    assert!(error.contains("sm_80, sm_90, sm_90a") && error.contains("code=compute_75"), "{error}");

    let mut unknown = entry(PTX, 80, "whatever");
    unknown.compressed = 8;
    let error = select_ptx(&fatbin(&[unknown]), 80).unwrap_err().to_string();
    assert!(error.contains("-no-compress"), "{error}");

    assert_eq!(select_ptx(&fatbin(&[]), 80).unwrap_err(), FatbinError::Empty);
}

#[test]
fn stored_text_ends_at_nul_and_may_hold_any_bytes() {
    let image = fatbin(&[entry(PTX, 80, "\n\n.version 8.0\n\0\0rest")]);
    assert_eq!(select_ptx(&image, 80).unwrap(), "\n\n.version 8.0\n");
    assert_eq!(ptx_text(b"// \xff\n"), "// \u{fffd}\n");
}

#[test]
fn lz4_block_by_hand() {
    // "abc", then 4 + 15 + 2 = 21 bytes from 3 back, then the literals "xy".
    let block = [&[0x3f][..], b"abc", &[3, 0, 2, 0x20], b"xy"].concat();
    let expected = format!("{}xy", "abc".repeat(8));
    let packed = |decompressed: usize| {
        fatbin(&[Entry {
            kind: PTX,
            architecture: 80,
            flags: 0x2011,
            compressed: block.len() as u32,
            decompressed: decompressed as u64,
            payload: block.clone(),
        }])
    };
    assert_eq!(select_ptx(&packed(expected.len()), 80).unwrap(), expected);
    for wrong in [1, 2, 20, expected.len() - 1, expected.len() + 1, 1 << 30] {
        let error = select_ptx(&packed(wrong), 80).unwrap_err();
        assert!(matches!(error, FatbinError::Compressed(_)), "{wrong}: {error}");
    }
    assert!(matches!(select_ptx(&packed(usize::MAX), 80), Err(FatbinError::Malformed(_))));
}

#[test]
fn zstd_sizes_must_agree() {
    let image = file("lz4.fatbin");
    // Declared as zstd, it has no frame.
    let mut wrong = image.clone();
    wrong[16 + 41] = 0x80;
    assert!(matches!(select_ptx(&wrong, 80), Err(FatbinError::Compressed(_))));
    for (offset, value) in [(16 + 56, 0xd1), (16 + 56, 0xd3)] {
        let mut wrong = file("zstd.fatbin");
        // The PTX for sm_80 is the second entry, after 64 + 3,112 bytes of machine code.
        wrong[64 + 3112 + offset] = value;
        assert!(matches!(select_ptx(&wrong, 80), Err(FatbinError::Compressed(_))), "{value:#x}");
    }
}

#[test]
fn hostile_sizes_are_refused() {
    let good = fatbin(&[entry(PTX, 80, "text"), entry(PTX, 75, "more text")]);
    assert_eq!(select_ptx(&good, 80).unwrap(), "text");
    let malformed = |image: &[u8]| match select_ptx(image, 80) {
        Err(FatbinError::Malformed(_)) => {}
        other => panic!("{other:?}"),
    };
    for length in 0..good.len() {
        malformed(&good[..length]);
    }
    let edit = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    // Magic; header size; payload size; an entry's header size; an entry's payload size.
    malformed(&edit(0, b"\x7fELF"));
    for size in [0_u16, 15, u16::MAX] {
        malformed(&edit(6, &size.to_le_bytes()));
    }
    for size in [good.len() as u64 - 15, 1 << 31, u64::MAX - 15, u64::MAX] {
        malformed(&edit(8, &size.to_le_bytes()));
    }
    for size in [0_u32, 31, 1 << 20, u32::MAX] {
        malformed(&edit(16 + 4, &size.to_le_bytes()));
    }
    for size in [good.len() as u64, u64::MAX - 63, u64::MAX] {
        malformed(&edit(16 + 8, &size.to_le_bytes()));
    }
    // More compressed bytes than the payload has.
    malformed(&edit(16 + 16, &5_u32.to_le_bytes()));
    // Bytes behind the declared end do not matter.
    assert_eq!(select_ptx(&[&good[..], &[0xff; 9]].concat(), 80).unwrap(), "text");
}

#[test]
fn images_are_told_apart_by_their_first_bytes() {
    let blob = file("stored.fatbin");
    // SAFETY: a whole fat binary.
    unsafe {
        assert_eq!(image_kind(blob.as_ptr()), ImageKind::Fatbin);
        assert_eq!(image_len(blob.as_ptr()), Ok(blob.len()));
        assert_eq!(unwrap_image(blob.as_ptr()), blob.as_ptr());
        assert_eq!(target(&ptx_from_image(blob.as_ptr(), 80).unwrap()), "sm_80");
    }
    // SAFETY: a cubin is recognised by its first four bytes.
    unsafe {
        assert_eq!(image_kind(b"\x7fELF".as_ptr()), ImageKind::Cubin);
        assert_eq!(image_len(b"\x7fELF".as_ptr()), Err(FatbinError::OnlyMachineCode));
        assert_eq!(ptx_from_image(b"\x7fELF".as_ptr(), 80), Err(FatbinError::OnlyMachineCode));
    }
    for text in ["", "/", "//", "///", "\n\n.version 8.0\n"] {
        let text = CString::new(text).unwrap();
        // SAFETY: text that ends with a NUL, in an allocation of exactly its size.
        unsafe {
            let image = text.as_ptr().cast();
            assert_eq!(image_kind(image), ImageKind::Text);
            assert_eq!(image_len(image), Ok(text.as_bytes().len()));
            assert_eq!(ptx_from_image(image, 80).unwrap().as_bytes(), text.as_bytes());
        }
    }
    // SAFETY: null is allowed.
    assert!(unsafe { ptx_from_image(std::ptr::null(), 80) }.is_err());
}

/// As nvcc's host code declares it.
#[repr(C)]
struct Wrapper {
    magic: u32,
    version: u32,
    data: *const u8,
    unused: *const u8,
}

#[test]
fn the_wrapper_of_host_objects_is_followed() {
    let blob = file("zstd.fatbin");
    let mut wrapper =
        Wrapper { magic: WRAPPER_MAGIC, version: 1, data: blob.as_ptr(), unused: std::ptr::null() };
    let image: *const Wrapper = &raw const wrapper;
    // SAFETY: a wrapper whose pointer points to a whole fat binary.
    unsafe {
        assert_eq!(image_kind(image.cast()), ImageKind::Fatbin);
        assert_eq!(unwrap_image(image.cast()), blob.as_ptr());
        assert_eq!(target(&ptx_from_image(image.cast(), 80).unwrap()), "sm_80");
    }
    wrapper.data = std::ptr::null();
    // SAFETY: a wrapper around null is refused before it is read.
    assert!(unsafe { ptx_from_image((&raw const wrapper).cast(), 80) }.is_err());
    assert!(wrapper.unused.is_null() && wrapper.version == 1);
}

#[test]
fn an_absurd_size_in_a_header_is_not_believed() {
    let mut header = fatbin(&[]);
    header[8..16].copy_from_slice(&(1_u64 << 40).to_le_bytes());
    // SAFETY: the header is all that is read.
    assert!(matches!(unsafe { image_len(header.as_ptr()) }, Err(FatbinError::Malformed(_))));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn random_bytes_never_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), magic: bool, sm in 0_u32..130) {
        if magic && bytes.len() >= 16 {
            bytes[..4].copy_from_slice(&FATBIN_MAGIC.to_le_bytes());
            bytes[6..8].copy_from_slice(&[16, 0]);
            let payload = bytes.len() as u64 - 16;
            bytes[8..16].copy_from_slice(&payload.to_le_bytes());
        }
        if let Ok(text) = select_ptx(&bytes, sm) {
            prop_assert!(text.len() <= 3 * bytes.len());
        }
    }

    #[test]
    fn damaged_fat_binaries_never_panic(
        name in proptest::sample::select(vec!["stored.fatbin", "zstd.fatbin", "lz4.fatbin", "family.fatbin"]),
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..12),
        keep in 0.3_f64..1.5,
        sm in proptest::sample::select(vec![80_u32, 90, 120]),
    ) {
        let mut image = file(name);
        // Half of the edits go to the headers and the first bytes of the PTX.
        let code = if name == "stored.fatbin" || name == "zstd.fatbin" { 16 + 64 + 3112 } else { 16 };
        for (index, (at, byte)) in edits.iter().enumerate() {
            let at = if index % 2 == 0 { code + at.index(120) } else { at.index(image.len()) };
            image[at] = *byte;
        }
        image.truncate((image.len() as f64 * keep) as usize);
        if let Ok(text) = select_ptx(&image, sm) {
            // Whatever came out, it is no larger than a damaged size field of a kilobyte's worth of input can justify.
            prop_assert!(text.len() < 1 << 24);
            let _ = cuda::ptx::parse(&text);
        }
    }
}
