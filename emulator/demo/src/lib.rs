//! Nothing but tests: they are what a package with kernels of its own would write. The two dev-dependencies put
//! `libcuda.so` and `libcublasLt.so` where the loader finds them, and nothing else has to be set up.
