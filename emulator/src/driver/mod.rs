//! The C interface of `libcuda.so`: the functions of the CUDA driver that libraries look up, and the `emu_*` controls.
//!
//! Work runs at the call that submits it, in submission order; what a real device could have run in another order is found by
//! the vector clocks of `order.rs`. Handles are numbers in tables, so no call dereferences one it did not give out.

mod action;
pub mod calls;
pub mod capture;
pub mod context;
pub mod copy;
pub mod emu;
pub mod error;
pub mod event;
mod ffi;
pub mod function;
pub mod graph;
pub mod launch;
pub mod library;
pub mod lookup;
pub mod memory;
pub mod module;
mod order;
pub mod pool;
mod reserve;
mod state;
pub mod stream;
pub mod unsupported;

pub use emu::EmuRange;
pub use ffi::{Copy2D, Handle, HostFn, LaunchAttribute, LaunchConfig, Out, Text};

/// Defines exported functions. The word before `fn` says what must be true before the body runs ([`state`]): `free` nothing;
/// `init` that cuInit was called; `ctx` also a current context and no earlier fault; `end` (for what gives back) a current
/// context, and an earlier fault is returned after the work. All but `free` get the locked state. No panic leaves a function.
macro_rules! exports {
    ($( $(#[$meta:meta])* $kind:ident fn $name:ident($($arg:ident: $ty:ty),* $(,)?) |$state:pat_param| $body:block )*) => {
        $(
            $(#[$meta])*
            ///
            /// # Safety
            /// Pointers must be null or what the driver API asks for; handles may be anything.
            #[unsafe(no_mangle)]
            #[allow(non_snake_case, clippy::too_many_arguments)]
            pub unsafe extern "C" fn $name($($arg: $ty),*) -> std::ffi::c_int {
                $crate::driver::state::$kind(stringify!($name), |$state| $body)
            }
        )*

        /// The address of one of this file's exports.
        pub(crate) fn address(name: &str) -> Option<*const std::ffi::c_void> {
            match name {
                $( stringify!($name) => Some($name as *const std::ffi::c_void), )*
                _ => None,
            }
        }
    };
}
pub(crate) use exports;
