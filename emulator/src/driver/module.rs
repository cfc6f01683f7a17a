//! Modules: images, their kernels and variables.

use super::exports;
use super::ffi::{Code, Handle, Out, Status, Text, copy_text};
use super::function::Function;
use super::state::{State, number, opaque};
use crate::config::{Check, Level};
use crate::fatbin::{self, FatbinError};
use crate::lower::{self, LoadError, Module};
use crate::ptx::{self, ast};
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Arc;

/// `CU_JIT_ERROR_LOG_BUFFER` and `CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES`.
const ERROR_LOG: c_int = 5;
const ERROR_LOG_SIZE: c_int = 6;
/// Parsed texts kept for a second load.
const KEEP_PARSED: usize = 256;

/// A loaded module.
#[derive(Debug)]
pub(crate) struct Loaded {
    module: Module,
    /// Handles given out for its kernels.
    functions: HashMap<String, usize>,
}

/// Why a module did not load.
struct Refused {
    code: Code,
    text: String,
}

impl From<FatbinError> for Refused {
    fn from(error: FatbinError) -> Self {
        let code = match error {
            FatbinError::WrongArchitecture { .. } => Code::NoBinaryForGpu,
            _ => Code::InvalidImage,
        };
        Self { code, text: error.to_string() }
    }
}

impl From<LoadError> for Refused {
    fn from(error: LoadError) -> Self {
        Self { code: Code::InvalidPtx, text: error.to_string() }
    }
}

/// The first CUDA version, from 12.0 on, whose driver knows a version of PTX.
fn driver_of(ptx: (u32, u32)) -> (u32, u32) {
    match ptx {
        (0..=7, _) | (8, 0) => (12, 0),
        (8, minor @ 1..=5) => (12, minor),
        (8, minor) => (12, minor + 1),
        (major, minor) => (major + 4, minor),
    }
}

/// The number in `sm_80` and `sm_90a`.
fn architecture(target: &str) -> u32 {
    let digits: String = target.chars().filter(char::is_ascii_digit).collect();
    digits.parse().unwrap_or(0)
}

impl State {
    fn parse(&mut self, text: String) -> Result<Arc<ast::Module>, Refused> {
        if let Some(parsed) = self.parsed.get(&text) {
            return Ok(Arc::clone(parsed));
        }
        let parsed = ptx::parse(&text).map_err(|e| LoadError { line: e.line, message: e.message })?;
        let parsed = Arc::new(parsed);
        if self.parsed.len() >= KEEP_PARSED {
            self.parsed.clear();
        }
        self.parsed.insert(text, Arc::clone(&parsed));
        Ok(parsed)
    }

    fn load_text(&mut self, text: String) -> Result<usize, Refused> {
        let parsed = self.parse(text)?;
        let (sm, driver) = (self.device.config.model.sm, self.device.config.driver);
        if driver_of(parsed.version) > driver {
            let (major, minor) = parsed.version;
            let text = format!(
                "PTX {major}.{minor} is newer than the driver of CUDA {}.{} (EMU_DRIVER)",
                driver.0, driver.1
            );
            return Err(Refused { code: Code::UnsupportedPtxVersion, text });
        }
        if architecture(&parsed.target) > sm {
            let text =
                format!("PTX for {} cannot run on the sm_{sm} that is emulated (EMU_DEVICE)", parsed.target);
            return Err(Refused { code: Code::NoBinaryForGpu, text });
        }
        let module = lower::lower(&parsed, &mut self.device.memory)?;
        let handle = self.handle();
        self.modules.insert(handle, Loaded { module, functions: HashMap::new() });
        Ok(handle)
    }

    /// Loads what an image was found to hold; what is wrong is reported and its text comes back.
    pub(crate) fn load(&mut self, text: Result<String, FatbinError>) -> Result<usize, (Code, String)> {
        let loaded = text.map_err(Refused::from).and_then(|text| self.load_text(text));
        loaded.map_err(|refused| {
            let lines = [format!("Invalid module: {}", refused.text)];
            self.device.reports.push(Check::Misuse, Level::Error, "", 0, &lines);
            (refused.code, refused.text)
        })
    }

    /// Loads an image in memory.
    pub(crate) fn load_image(&mut self, image: *const c_void) -> Result<usize, (Code, String)> {
        if image.is_null() {
            return Err((Code::InvalidValue, "a null pointer".to_owned()));
        }
        let sm = self.device.config.model.sm;
        // SAFETY: not null, and the exported functions ask that it points to a module image.
        let text = unsafe { fatbin::ptx_from_image(image.cast(), sm) };
        self.load(text)
    }

    /// Loads an image from a file.
    pub(crate) fn load_file(&mut self, path: &str) -> Status<usize> {
        let bytes = std::fs::read(path).map_err(|error| {
            let lines = [format!("Invalid module: {path}: {error}")];
            self.refuse(Code::FileNotFound, &lines)
        })?;
        let sm = self.device.config.model.sm;
        let text = match bytes.first_chunk::<4>().map(|first| u32::from_le_bytes(*first)) {
            Some(fatbin::FATBIN_MAGIC) => fatbin::select_ptx(&bytes, sm),
            Some(0x464c_457f) => Err(FatbinError::OnlyMachineCode),
            _ => Ok(fatbin::ptx_text(&bytes)),
        };
        self.load(text).map_err(|(code, _)| code)
    }

    pub(crate) fn unload(&mut self, module: Handle) -> Status {
        let loaded = self.modules.remove(&number(module)).ok_or(Code::InvalidHandle)?;
        for handle in loaded.functions.values() {
            self.functions.remove(handle);
        }
        for (address, _) in loaded.module.globals.values() {
            if let Some(index) = self.device.memory.find(*address, 1) {
                self.order.forget(index);
            }
            self.device.memory.free(*address).ok();
        }
        Ok(())
    }

    /// The handle of a kernel, the same each time.
    pub(crate) fn kernel_of(&mut self, module: Handle, name: &str) -> Status<usize> {
        let handle = self.handle();
        let loaded = self.modules.get_mut(&number(module)).ok_or(Code::InvalidHandle)?;
        if let Some(&known) = loaded.functions.get(name) {
            return Ok(known);
        }
        let kernel = Arc::clone(loaded.module.kernels.get(name).ok_or(Code::NotFound)?);
        loaded.functions.insert(name.to_owned(), handle);
        self.functions.insert(handle, Function::new(number(module), kernel));
        Ok(handle)
    }

    /// Address and size of a variable.
    pub(crate) fn global_of(&self, module: Handle, name: &str) -> Status<(u64, u64)> {
        let loaded = self.modules.get(&number(module)).ok_or(Code::InvalidHandle)?;
        loaded.module.globals.get(name).copied().ok_or(Code::NotFound)
    }

    /// Names of all kernels, sorted.
    pub(crate) fn kernel_names(&self, module: Handle) -> Status<Vec<String>> {
        let loaded = self.modules.get(&number(module)).ok_or(Code::InvalidHandle)?;
        let mut names: Vec<String> = loaded.module.kernels.keys().cloned().collect();
        names.sort();
        Ok(names)
    }
}

/// The value of an option, if it was given.
///
/// # Safety
/// Both lists have `count` entries, or are null.
unsafe fn option(
    wanted: c_int,
    count: c_uint,
    options: *const c_int,
    values: *const *mut c_void,
) -> Option<*mut c_void> {
    if options.is_null() || values.is_null() {
        return None;
    }
    (0..count as usize).find_map(|i| {
        // SAFETY: within the entries the caller promised.
        unsafe { (options.add(i).read_unaligned() == wanted).then(|| values.add(i).read_unaligned()) }
    })
}

exports! {
    /// Loads PTX text or the PTX of a fat binary.
    ctx fn cuModuleLoadData(module: Out<Handle>, image: *const c_void) |s| {
        module.check()?;
        let handle = s.load_image(image).map_err(|(code, _)| code)?;
        module.set(opaque(handle))
    }

    /// Loads PTX; of the options only the error log is served.
    ctx fn cuModuleLoadDataEx(
        module: Out<Handle>, image: *const c_void, count: c_uint, options: *const c_int, values: *const *mut c_void
    ) |s| {
        module.check()?;
        match s.load_image(image) {
            Ok(handle) => module.set(opaque(handle)),
            Err((code, text)) => {
                // SAFETY: the caller promised lists of this length.
                let (log, size) = unsafe {
                    (option(ERROR_LOG, count, options, values), option(ERROR_LOG_SIZE, count, options, values))
                };
                if let (Some(log), Some(size)) = (log, size) {
                    copy_text(&text, log.cast::<c_char>(), size.addr() & 0xffff_ffff);
                }
                Err(code)
            }
        }
    }

    /// Loads a fat binary.
    ctx fn cuModuleLoadFatBinary(module: Out<Handle>, image: *const c_void) |s| {
        module.check()?;
        let handle = s.load_image(image).map_err(|(code, _)| code)?;
        module.set(opaque(handle))
    }

    /// Loads a file.
    ctx fn cuModuleLoad(module: Out<Handle>, path: Text) |s| {
        module.check()?;
        let path = path.get()?;
        let handle = s.load_file(&path)?;
        module.set(opaque(handle))
    }

    /// Ends a module: its kernels cannot be launched any more and its variables are freed.
    end fn cuModuleUnload(module: Handle) |s| {
        s.join_all();
        s.unload(module)
    }

    /// A kernel by its symbol.
    ctx fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: Text) |s| {
        function.check()?;
        let name = name.get()?;
        let handle = s.kernel_of(module, &name)?;
        function.set(opaque(handle))
    }

    /// How many kernels a module has.
    ctx fn cuModuleGetFunctionCount(count: Out<c_uint>, module: Handle) |s| {
        count.set(s.kernel_names(module)?.len() as c_uint)
    }

    /// A variable by its symbol.
    ctx fn cuModuleGetGlobal_v2(address: Out<u64>, bytes: Out<usize>, module: Handle, name: Text) |s| {
        let name = name.get()?;
        let (at, size) = s.global_of(module, &name)?;
        address.set_if_wanted(at);
        bytes.set_if_wanted(size as usize);
        Ok(())
    }

    /// Modules are loaded at once.
    init fn cuModuleGetLoadingMode(mode: Out<c_int>) |_| {
        mode.set(1)
    }
}
