//! With the feature `cuda`: compiles the kernels (build/kernels.rs). Without: nothing.

#[cfg(feature = "cuda")]
#[path = "build/kernels.rs"]
mod kernels;

use std::process::ExitCode;

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    return kernels::main();
    #[cfg(not(feature = "cuda"))]
    ExitCode::SUCCESS
}
