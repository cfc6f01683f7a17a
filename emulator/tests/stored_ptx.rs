//! The stored PTX is what nvcc makes of the sources beside it. `EMU_STORE_PTX=1` writes it anew.

#[path = "cuda/mod.rs"]
mod sources;

use std::{env, fs};

const SOURCES: [&str; 5] = ["block_sum", "gemm_tile", "histogram", "mathfn", "vector_add"];

/// The instructions: behind them are the file table and strings with a hash of the source's path.
fn instructions(text: &str) -> &str {
    text.find("\t.file\t").map_or(text, |end| &text[..end])
}

#[test]
fn every_source_has_its_ptx() {
    let mut names: Vec<String> = fs::read_dir(sources::folder())
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_suffix(".cu").map(str::to_owned))
        .collect();
    names.sort();
    assert_eq!(names, SOURCES);
    for name in SOURCES {
        let text = sources::stored(name);
        assert!(text.len() < 200_000, "{name}: {} bytes", text.len());
        assert!(text.contains(".visible .entry"), "{name}: no kernel");
        assert!(text.contains(&format!("\"{name}.cu\"")), "{name}: no line information");
        assert!(!text.contains("\"/"), "{name}: a path of the machine that made it");
    }
}

#[test]
fn every_kernel_is_read() {
    for name in SOURCES {
        let text = sources::ptx(name);
        let module = cuda::ptx::parse(&text).unwrap_or_else(|error| panic!("{name}: {error:?}"));
        assert_eq!(module.functions.len(), text.matches(".visible .entry").count(), "{name}");
    }
}

#[test]
fn fresh_and_stored_ptx_agree() {
    for name in SOURCES {
        let fresh = match sources::compile(name) {
            Ok(fresh) => fresh,
            Err(reason) => return println!("skipped: {reason}"),
        };
        if env::var_os("EMU_STORE_PTX").is_some() {
            fs::write(sources::folder().join(name).with_extension("ptx"), &fresh).unwrap();
        }
        let stored = sources::stored(name);
        if sources::release(&fresh) == sources::release(&stored) {
            assert!(
                instructions(&fresh) == instructions(&stored),
                "{name}.ptx is not what nvcc makes of {name}.cu: run this test again with EMU_STORE_PTX=1"
            );
        } else {
            println!("{name}: not compared, {} made the stored one", sources::release(&stored));
        }
    }
}
