//! The objects behind the opaque pointers. A pointer given out is a number, never an address: a wrong one is found missing
//! instead of being followed.

use std::{
    collections::BTreeMap,
    ffi::c_void,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{
    attributes::Attributes,
    status::{Failure, Status, invalid},
};

/// What an opaque pointer can stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Library,
    Layout,
    Product,
    Preference,
}

struct Objects {
    last: usize,
    objects: BTreeMap<usize, (Kind, Attributes)>,
}

static OBJECTS: Mutex<Objects> = Mutex::new(Objects { last: 0x1000, objects: BTreeMap::new() });

fn objects() -> MutexGuard<'static, Objects> {
    OBJECTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new object's opaque pointer.
pub(crate) fn create(kind: Kind, attributes: Attributes) -> *mut c_void {
    let mut objects = objects();
    // Never used twice: a pointer kept beyond destruction stays unknown.
    objects.last += 16;
    let handle = objects.last;
    objects.objects.insert(handle, (kind, attributes));
    std::ptr::without_provenance_mut(handle)
}

fn unknown(kind: Kind, handle: *mut c_void) -> Failure {
    let what = if handle.is_null() { "null" } else { "unknown or already destroyed" };
    let status = if kind == Kind::Library { Status::NotInitialized } else { Status::InvalidValue };
    let name = match kind {
        Kind::Library => "library handle",
        Kind::Layout => "matrix layout",
        Kind::Product => "matmul descriptor",
        Kind::Preference => "preference",
    };
    Failure { status, ..invalid(format!("the {name} is {what}")) }
}

/// Forgets an object.
pub(crate) fn destroy(kind: Kind, handle: *mut c_void) -> Result<(), Failure> {
    with(kind, handle, |_| ())?;
    objects().objects.remove(&handle.addr());
    Ok(())
}

/// Gives `action` the object's attributes.
pub(crate) fn with<R>(
    kind: Kind,
    handle: *mut c_void,
    action: impl FnOnce(&mut Attributes) -> R,
) -> Result<R, Failure> {
    match objects().objects.get_mut(&handle.addr()) {
        Some((found, attributes)) if *found == kind => Ok(action(attributes)),
        _ => Err(unknown(kind, handle)),
    }
}

/// A copy of the object's attributes.
pub(crate) fn attributes(kind: Kind, handle: *mut c_void) -> Result<Attributes, Failure> {
    with(kind, handle, |attributes| attributes.clone())
}
