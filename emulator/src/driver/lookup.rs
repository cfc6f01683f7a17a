//! Finding functions by name, as runtimes do instead of using the dynamic linker.

use super::exports;
use super::ffi::{Code, Out, Status, Text};
use super::{
    capture, context, copy, emu, error, event, function, graph, launch, library, memory, module, pool, stream,
};
use std::ffi::{c_int, c_void};

/// The address of an export that does something.
fn exported(name: &str) -> Option<*const c_void> {
    let tables = [
        capture::address,
        context::address,
        copy::address,
        emu::address,
        error::address,
        event::address,
        function::address,
        graph::address,
        launch::address,
        library::address,
        memory::address,
        module::address,
        pool::address,
        stream::address,
        address,
    ];
    tables.iter().find_map(|table| table(name))
}

/// Names are given without the version that the exported symbol may have.
fn find(name: &str) -> Option<*const c_void> {
    let plain = match name {
        "cuGraphInstantiate" => "cuGraphInstantiateWithFlags",
        "cuCtxCreate" => "cuCtxCreate_v4",
        "cuGraphExecUpdate" => "cuGraphExecUpdate_v2",
        name => name,
    };
    exported(&format!("{plain}_v2")).or_else(|| exported(plain))
}

fn look_up(symbol: Text, function: Out<*const c_void>, version: c_int, flags: u64) -> Status<()> {
    function.set(std::ptr::null())?;
    let name = symbol.get()?;
    if name.is_empty() || flags > 2 || version < 0 {
        return Err(Code::InvalidValue);
    }
    function.set(find(&name).ok_or(Code::NotFound)?)
}

exports! {
    /// The address of a function.
    free fn cuGetProcAddress(symbol: Text, function: Out<*const c_void>, version: c_int, flags: u64) |()| {
        look_up(symbol, function, version, flags)
    }

    /// The address of a function, and whether it was found.
    free fn cuGetProcAddress_v2(
        symbol: Text, function: Out<*const c_void>, version: c_int, flags: u64, found: Out<c_int>
    ) |()| {
        let outcome = look_up(symbol, function, version, flags);
        found.set_if_wanted(c_int::from(outcome == Err(Code::NotFound)));
        outcome
    }
}
