//! Libraries and kernels: the newer names of modules and functions. A library's handle is its module's, a kernel's its function's.

use super::context::device_zero;
use super::exports;
use super::ffi::{Code, Handle, Out, Text};
use super::state::{number, opaque};
use std::ffi::{c_int, c_uint, c_void};

exports! {
    /// Loads PTX; options are not looked at.
    init fn cuLibraryLoadData(
        library: Out<Handle>, image: *const c_void, jit: *const c_int, jit_values: *const *mut c_void, jit_count: c_uint,
        options: *const c_int, values: *const *mut c_void, count: c_uint
    ) |s| {
        let _ = (jit, jit_values, jit_count, options, values, count);
        library.check()?;
        s.sticky()?;
        let handle = s.load_image(image).map_err(|(code, _)| code)?;
        library.set(opaque(handle))
    }

    /// Loads a file; options are not looked at.
    init fn cuLibraryLoadFromFile(
        library: Out<Handle>, path: Text, jit: *const c_int, jit_values: *const *mut c_void, jit_count: c_uint,
        options: *const c_int, values: *const *mut c_void, count: c_uint
    ) |s| {
        let _ = (jit, jit_values, jit_count, options, values, count);
        library.check()?;
        s.sticky()?;
        let path = path.get()?;
        let handle = s.load_file(&path)?;
        library.set(opaque(handle))
    }

    /// Ends a library.
    init fn cuLibraryUnload(library: Handle) |s| {
        s.join_all();
        s.unload(library)
    }

    /// The module of a library.
    init fn cuLibraryGetModule(module: Out<Handle>, library: Handle) |s| {
        module.check()?;
        if s.modules.contains_key(&number(library)) { module.set(library) } else { Err(Code::InvalidHandle) }
    }

    /// A kernel by its symbol.
    init fn cuLibraryGetKernel(kernel: Out<Handle>, library: Handle, name: Text) |s| {
        kernel.check()?;
        let name = name.get()?;
        let handle = s.kernel_of(library, &name)?;
        kernel.set(opaque(handle))
    }

    /// How many kernels a library has.
    init fn cuLibraryGetKernelCount(count: Out<c_uint>, library: Handle) |s| {
        count.set(s.kernel_names(library)?.len() as c_uint)
    }

    /// A variable by its symbol.
    init fn cuLibraryGetGlobal(address: Out<u64>, bytes: Out<usize>, library: Handle, name: Text) |s| {
        let name = name.get()?;
        let (at, size) = s.global_of(library, &name)?;
        address.set_if_wanted(at);
        bytes.set_if_wanted(size as usize);
        Ok(())
    }

    /// The function of a kernel.
    init fn cuKernelGetFunction(function: Out<Handle>, kernel: Handle) |s| {
        function.check()?;
        s.function(kernel)?;
        function.set(kernel)
    }

    /// One of a kernel's properties.
    init fn cuKernelGetAttribute(value: Out<c_int>, attribute: c_int, kernel: Handle, device: c_int) |s| {
        value.check()?;
        device_zero(device)?;
        let found = s.function_attribute(attribute, kernel)?;
        value.set(found)
    }

    /// Sets one of a kernel's properties.
    init fn cuKernelSetAttribute(attribute: c_int, value: c_int, kernel: Handle, device: c_int) |s| {
        device_zero(device)?;
        s.set_function_attribute(kernel, attribute, value)
    }
}
