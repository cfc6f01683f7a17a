//! Runs one case folder: a kernel with its inputs and expected outputs.

fn main() {}
