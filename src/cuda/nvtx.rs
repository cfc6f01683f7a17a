//! NVTX ranges: profilers show launches under the name of their operation (feature `nvtx`).
//!
//! NVTX is looked for when the first range opens. Where it is not, and without the feature, a range does nothing.

use super::record;

/// Opens the range `foveate.<operation>`; it ends when the result is dropped. Launches from here on are recorded under the
/// operation's name.
pub(super) fn range(operation: &'static str) -> Range {
    record::operation(operation);
    open(operation)
}

#[cfg(not(feature = "nvtx"))]
const fn open(_operation: &str) -> Range {
    Range
}

/// What stands for an open range without the feature.
#[cfg(not(feature = "nvtx"))]
#[must_use = "the range ends when this is dropped"]
pub(super) struct Range;

#[cfg(feature = "nvtx")]
use library::range as open;
/// An open range.
#[cfg(feature = "nvtx")]
pub(super) type Range = library::Range<'static>;

#[cfg(feature = "nvtx")]
mod library {
    use std::{
        ffi::{CString, c_char, c_int},
        marker::PhantomData,
        sync::OnceLock,
    };

    use libloading::Library;

    /// NVTX 3 as a library of its own, then that of older toolkits. Both export the same functions.
    const LIBRARIES: &[&str] = if cfg!(windows) {
        &["nvtx3interop.dll", "nvToolsExt64_1.dll"]
    } else {
        &["libnvtx3interop.so.1", "libnvtx3interop.so", "libnvToolsExt.so.1", "libnvToolsExt.so"]
    };

    type Push = unsafe extern "C" fn(*const c_char) -> c_int;
    type Pop = unsafe extern "C" fn() -> c_int;

    struct Api {
        push: Push,
        pop: Pop,
        // The functions live in it.
        _library: Option<Library>,
    }

    /// An open range of this thread; ranges nest, and end on the thread that opened them.
    #[must_use = "the range ends when this is dropped"]
    pub(in super::super) struct Range<'a> {
        api: Option<&'a Api>,
        _this_thread: PhantomData<*const ()>,
    }

    impl Drop for Range<'_> {
        fn drop(&mut self) {
            if let Some(api) = self.api {
                // SAFETY: NVTX's own function without arguments, from a library that is still loaded.
                unsafe { (api.pop)() };
            }
        }
    }

    /// Opens the range `foveate.<operation>`; it ends when the result is dropped.
    pub(in super::super) fn range(operation: &str) -> Range<'static> {
        static API: OnceLock<Option<Api>> = OnceLock::new();
        open(API.get_or_init(|| LIBRARIES.iter().find_map(|name| load(name))).as_ref(), operation)
    }

    fn open<'a>(api: Option<&'a Api>, operation: &str) -> Range<'a> {
        let name = api.and_then(|api| Some((api, CString::new(format!("foveate.{operation}")).ok()?)));
        if let Some((api, name)) = &name {
            // SAFETY: NVTX reads the text up to its NUL and keeps no pointer to it; the library is still loaded.
            unsafe { (api.push)(name.as_ptr()) };
        }
        Range { api: name.map(|(api, _)| api), _this_thread: PhantomData }
    }

    fn load(name: &str) -> Option<Api> {
        // SAFETY: loading NVTX runs no code of a profiler: that comes with the first range, if one is attached.
        let library = unsafe { Library::new(name) }.ok()?;
        // SAFETY: the two functions have had these signatures since NVTX 1.
        let push = unsafe { library.get::<Push>(b"nvtxRangePushA\0") }.ok().map(|push| *push)?;
        // SAFETY: as above.
        let pop = unsafe { library.get::<Pop>(b"nvtxRangePop\0") }.ok().map(|pop| *pop)?;
        Some(Api { push, pop, _library: Some(library) })
    }

    #[cfg(test)]
    mod tests {
        use std::{cell::RefCell, ffi::CStr};

        use super::*;

        thread_local! {
            static SEEN: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
        }

        unsafe extern "C" fn push(name: *const c_char) -> c_int {
            // SAFETY: `open` passes a text that ends in a NUL.
            let name = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
            SEEN.with_borrow_mut(|seen| seen.push(name));
            0
        }

        unsafe extern "C" fn pop() -> c_int {
            SEEN.with_borrow_mut(|seen| seen.push("pop".to_owned()));
            0
        }

        #[test]
        fn ranges_open_by_name_nest_and_end() {
            let api = Api { push, pop, _library: None };
            {
                let _outer = open(Some(&api), "matching");
                let _inner = open(Some(&api), "merge");
                // No C text: no range, and none is ended.
                let _none = open(Some(&api), "a\0b");
            }
            let seen = SEEN.with_borrow(Clone::clone);
            assert_eq!(seen, ["foveate.matching", "foveate.merge", "pop", "pop"]);
        }

        #[test]
        fn without_the_library_nothing_happens() {
            assert!(load("libno-such-nvtx.so").is_none());
            drop(open(None, "merge"));
            // With whatever this machine has.
            drop(range("merge"));
        }
    }
}
