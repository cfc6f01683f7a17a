//! Allocations, copies and fills.
#![allow(clippy::cast_ptr_alignment, reason = "tests say it the short way")]
// SAFETY of every call in this file: pointers are to live locals of the sizes given, or are wrong on purpose in a way that the driver
// must answer with an error code without following them.
#![allow(clippy::undocumented_unsafe_blocks, reason = "stated above, once for all calls")]

mod driver;

use driver::Value::{U32, U64};
use driver::*;
use std::ffi::c_void;
use std::ptr::{null, null_mut};

#[test]
fn both_ways_to_allocate() {
    for pools in ["1", "0"] {
        let _session = Session::new(&[("EMU_POOLS", pools)]);
        let mut supported = -1;
        let mut p = 77;
        unsafe {
            assert_eq!(cuDeviceGetAttribute(&raw mut supported, 115, 0), OK);
            assert_eq!(supported.to_string(), pools);
            let expected = if supported == 1 { OK } else { 801 };
            assert_eq!(cuMemAllocAsync(&raw mut p, 64, null_mut()), expected);
            if supported == 1 {
                assert_eq!(cuMemsetD8_v2(p, 1, 64), OK);
                assert_eq!(cuMemFreeAsync(p, null_mut()), OK);
                // Empty allocations are null and can be freed.
                assert_eq!(cuMemAllocAsync(&raw mut p, 0, null_mut()), OK);
                assert_eq!(p, 0);
                assert_eq!(cuMemFreeAsync(0, null_mut()), OK);
            }
            assert_eq!(cuMemAlloc_v2(&raw mut p, 64), OK);
            assert_eq!(p % 256, 0);
            assert_eq!(cuMemsetD8_v2(p, 1, 64), OK);
            assert_eq!(cuMemFree_v2(p), OK);
            assert_eq!(cuMemAlloc_v2(&raw mut p, 0), INVALID_VALUE);
            assert_eq!(cuMemFree_v2(0), OK);
        }
        silent();
    }
}

#[test]
fn frees_of_what_is_not_there_are_refused_and_reported() {
    let _session = Session::new(&[]);
    let p = alloc(64);
    let m = module(PTX);
    let (mut global, mut locked, mut local) = (0, null_mut(), 0u64);
    unsafe {
        assert_eq!(cuModuleGetGlobal_v2(&raw mut global, null_mut(), m, text("counter").as_ptr()), OK);
        assert_eq!(cuMemHostAlloc(&raw mut locked, 16, 0), OK);
        let bad = [
            p + 4,
            p - 4096,
            0xdead_beef,
            1,
            u64::MAX,
            global,
            locked.addr() as u64,
            (&raw const local).addr() as u64,
        ];
        for address in bad {
            emu_clear_errors();
            assert_eq!(cuMemFree_v2(address), INVALID_VALUE, "{address:#x}");
            found_one("Invalid free: cuMemFree of");
            emu_clear_errors();
            assert_eq!(cuMemFreeAsync(address, null_mut()), INVALID_VALUE, "{address:#x}");
            found_one("Invalid free: cuMemFreeAsync of");
        }
        emu_clear_errors();
        assert_eq!(cuMemFree_v2(p), OK);
        assert_eq!(cuMemFree_v2(p), INVALID_VALUE);
        assert!(texts()[0].contains("which was freed"), "{}", texts()[0]);
        emu_clear_errors();
        assert_eq!(cuMemFreeHost((&raw mut local).cast()), INVALID_VALUE);
        found_one("Invalid free: cuMemFreeHost of");
        assert_eq!(cuMemFreeHost(locked), OK);
        assert_eq!(cuMemFreeHost(null_mut()), OK);
        local += 1;
        assert_eq!(local, 1);
        // A refused free is no failure of the device.
        assert_eq!(cuCtxSynchronize(), OK);
    }
}

#[test]
fn capacity() {
    let _session = Session::new(&[("EMU_MEM_LIMIT", "1M")]);
    let (mut p, mut free, mut total) = (0, 0, 0);
    unsafe {
        assert_eq!(cuMemAlloc_v2(&raw mut p, (1 << 20) + 1), OUT_OF_MEMORY);
        assert_eq!(cuMemAlloc_v2(&raw mut p, usize::MAX), OUT_OF_MEMORY);
        assert_eq!(cuMemAllocAsync(&raw mut p, 1 << 60, null_mut()), OUT_OF_MEMORY);
        assert_eq!(cuMemAllocManaged(&raw mut p, usize::MAX, 1), OUT_OF_MEMORY);
        let mut host = null_mut();
        assert_eq!(cuMemHostAlloc(&raw mut host, usize::MAX, 0), OUT_OF_MEMORY);
        assert_eq!(cuMemHostAlloc(&raw mut host, 1 << 50, 0), OUT_OF_MEMORY);
        assert_eq!(cuMemAlloc_v2(&raw mut p, 1 << 19), OK);
        assert_eq!(cuMemGetInfo_v2(&raw mut free, &raw mut total), OK);
        assert_eq!((free, total), (1 << 19, 1 << 20));
        assert_eq!(cuDeviceTotalMem_v2(&raw mut total, 0), OK);
        assert_eq!(total, 1 << 20);
        assert_eq!(cuMemAlloc_v2(&raw mut p, (1 << 19) + 1), OUT_OF_MEMORY);
    }
}

#[test]
fn copies_stay_inside_one_allocation() {
    let _session = Session::new(&[]);
    let (p, q) = (upload(&[1, 2, 3, 4]), alloc(64));
    let mut host = [0u8; 64];
    let h = host.as_mut_ptr().cast::<c_void>();
    unsafe {
        let wrong: [(i32, &str); 12] = [
            (cuMemcpyHtoD_v2(p, h, 17), "Invalid host write of size 17"),
            (cuMemcpyHtoD_v2(p + 8, h, 9), "Invalid host write of size 9"),
            (cuMemcpyHtoD_v2(p - 1, h, 1), "Invalid host write of size 1"),
            (cuMemcpyDtoH_v2(h, p + 15, 2), "Invalid host read of size 2"),
            (cuMemcpyDtoD_v2(q, p, 17), "Invalid host read of size 17"),
            (cuMemcpyDtoD_v2(q + 60, p, 5), "Invalid host write of size 5"),
            (cuMemcpyHtoD_v2(0, h, 1), "Invalid host write"),
            (cuMemcpyDtoH_v2(h, 0xdead_0000, 1), "Invalid host read"),
            (cuMemcpyDtoH_v2(h, p, usize::MAX), "Invalid host read"),
            (cuMemcpyHtoD_v2(u64::MAX, h, 64), "Invalid host write"),
            (cuMemsetD8_v2(p, 0, 17), "Invalid host write of size 17"),
            (cuMemsetD32_v2(p, 0, 1 << 40), "Invalid host write"),
        ];
        let findings = findings();
        assert_eq!(findings.len(), wrong.len(), "{findings:?}");
        for ((code, start), finding) in wrong.iter().zip(&findings) {
            assert_eq!(*code, INVALID_VALUE, "{finding}");
            assert!(finding.starts_with(start), "{start}: {finding}");
        }
        emu_clear_errors();
        // Empty ones are fine anywhere.
        assert_eq!(cuMemcpyHtoD_v2(0, null(), 0), OK);
        assert_eq!(cuMemcpyDtoH_v2(null_mut(), 1, 0), OK);
        assert_eq!(cuMemsetD8_v2(77, 0, 0), OK);
        assert_eq!(cuMemsetD32_v2(p, 0, usize::MAX / 2), INVALID_VALUE);
    }
    assert_eq!(download(p, 4), [1, 2, 3, 4]);
}

#[test]
fn pointers_on_the_wrong_side() {
    let _session = Session::new(&[]);
    let (p, q) = (upload(&[1; 4]), alloc(16));
    let mut host = [0u8; 16];
    unsafe {
        assert_eq!(cuMemcpyHtoD_v2(p, std::ptr::without_provenance(q as usize), 16), INVALID_VALUE);
        found_one("Invalid host pointer in a read");
        assert!(texts()[0].contains("a device pointer"), "{}", texts()[0]);
        emu_clear_errors();
        assert_eq!(cuMemcpyDtoH_v2(std::ptr::without_provenance_mut(q as usize), p, 16), INVALID_VALUE);
        found_one("Invalid host pointer in a write");
        emu_clear_errors();
        for null in [0, 1, 4095] {
            assert_eq!(cuMemcpyDtoH_v2(std::ptr::without_provenance_mut(null), p, 16), INVALID_VALUE);
            assert_eq!(cuMemcpyHtoD_v2(p, std::ptr::without_provenance(null), 16), INVALID_VALUE);
        }
        emu_clear_errors();
        assert_eq!(cuMemcpyDtoD_v2(p, host.as_mut_ptr().expose_provenance() as u64, 16), INVALID_VALUE);
        found_one("Invalid host read");
        emu_clear_errors();
        // The unified copy finds out which side a pointer is on.
        assert_eq!(cuMemcpy(host.as_mut_ptr().expose_provenance() as u64, p, 16), OK);
        assert_eq!(host, [1, 0, 0, 0].repeat(4)[..]);
    }
    silent();
}

#[test]
fn fills_of_every_width() {
    let _session = Session::new(&[]);
    let p = upload(&[0; 4]);
    unsafe {
        assert_eq!(cuMemsetD32_v2(p, 0x0403_0201, 4), OK);
        assert_eq!(download(p, 4), [0x0403_0201; 4]);
        assert_eq!(cuMemsetD16_v2(p + 2, 0xbeef, 3), OK);
        assert_eq!(download(p, 4), [0xbeef_0201, 0xbeef_beef, 0x0403_0201, 0x0403_0201]);
        assert_eq!(cuMemsetD8_v2(p + 1, 0xff, 2), OK);
        assert_eq!(download(p, 1), [0xbeff_ff01]);
        assert_eq!(cuMemsetD16_v2(p + 1, 0, 1), INVALID_VALUE);
        assert_eq!(cuMemsetD32_v2(p + 2, 0, 1), INVALID_VALUE);
    }
    silent();
}

#[test]
fn rows() {
    let _session = Session::new(&[]);
    let host: Vec<u8> = (0..40).collect();
    let p = upload(&[0; 16]);
    // Four bytes from column 3 of rows 1 to 3 of a 10-byte matrix, to column 2 of rows of 16 bytes.
    let copy = [3, 1, 1, host.as_ptr().expose_provenance(), 0, 0, 10, 2, 0, 2, 0, p as usize, 0, 16, 4, 3];
    unsafe { assert_eq!(cuMemcpy2D_v2(&raw const copy), OK) };
    let bytes: Vec<u8> = download(p, 16).iter().flat_map(|w| w.to_le_bytes()).collect();
    for (row, line) in bytes.chunks(16).enumerate() {
        let mut expected = [0u8; 16];
        if row < 3 {
            let from = (row as u8 + 1) * 10 + 3;
            expected[2..6].copy_from_slice(&[from, from + 1, from + 2, from + 3]);
        }
        assert_eq!(line, expected, "row {row}");
    }
    silent();
    let mut wrong = copy;
    wrong[15] = 5;
    unsafe { assert_eq!(cuMemcpy2D_v2(&raw const wrong), INVALID_VALUE) };
    found_one("Invalid host write");
}

#[test]
fn undefined_bytes_that_reach_the_host_are_reported_and_followed_through_copies() {
    let _session = Session::new(&[]);
    let (p, q) = (alloc(16), alloc(16));
    let mut host = [0u32; 4];
    let h = host.as_mut_ptr().cast();
    unsafe {
        assert_eq!(cuMemsetD8_v2(p, 1, 8), OK);
        assert_eq!(cuMemcpyDtoD_v2(q, p, 16), OK);
        assert_eq!(cuMemcpyDtoH_v2(h, q, 8), OK);
        silent();
        assert_eq!(emu_name(q, text("mask").as_ptr()), OK);
        assert_eq!(cuMemcpyDtoH_v2(h, q, 16), OK);
        found_one("Undefined bytes copied to the host: 8 of 16");
        assert!(
            texts()[0].contains("byte 8 of allocation") && texts()[0].contains("\"mask\""),
            "{}",
            texts()[0]
        );
        assert_eq!(cuCtxSynchronize(), 719);
        emu_clear_errors();
        assert_eq!(cuCtxSynchronize(), OK);
        // Written, they are fine.
        assert_eq!(cuMemsetD8_v2(q + 8, 1, 8), OK);
        assert_eq!(cuMemcpyDtoH_v2(h, q, 16), OK);
        silent();
        assert_eq!(emu_set(text("checks").as_ptr(), text("uninit=warn").as_ptr()), OK);
        assert_eq!(cuMemcpyDtoH_v2(h, p, 16), OK);
        found_one("Undefined bytes");
        assert_eq!(cuCtxSynchronize(), OK);
    }
}

#[test]
fn pinned_managed_and_registered_memory_is_used_by_kernels_at_its_address() {
    let _session = Session::new(&[]);
    let m = module(PTX);
    let next = function(m, "next");
    let (mut locked, mut managed, mut address) = (null_mut(), 0, 0);
    let mut own = vec![5u32; 8];
    let own_pointer = own.as_mut_ptr().cast::<c_void>();
    unsafe {
        assert_eq!(cuMemHostAlloc(&raw mut locked, 32, 2), OK);
        assert_eq!(locked.addr() % 4096, 0);
        assert_eq!(cuMemHostGetDevicePointer_v2(&raw mut address, locked, 0), OK);
        assert_eq!(address, locked.addr() as u64);
        assert_eq!(cuMemAllocManaged(&raw mut managed, 32, 1), OK);
        let shared = std::ptr::with_exposed_provenance_mut::<u32>(managed as usize);
        for i in 0..8 {
            shared.add(i).write(i as u32 * 10);
        }
        assert_eq!(launch(next, 1, 8, null_mut(), &[U64(address), U64(managed)]), OK);
        assert_eq!(cuCtxSynchronize(), OK);
        assert_eq!(locked.cast::<[u32; 8]>().read(), [1, 11, 21, 31, 41, 51, 61, 71]);
        // Not known to the device until registered, and not after.
        assert_eq!(cuMemHostRegister_v2(own_pointer, 32, 0), OK);
        assert_eq!(cuMemHostRegister_v2(own_pointer.byte_add(8), 4, 0), 712);
        assert_eq!(launch(next, 1, 8, null_mut(), &[U64(managed), U64(own_pointer.addr() as u64)]), OK);
        assert_eq!(cuCtxSynchronize(), OK);
        assert_eq!(shared.cast::<[u32; 8]>().read(), [6; 8]);
        assert_eq!(cuMemHostUnregister(own_pointer), OK);
        assert_eq!(cuMemHostUnregister(own_pointer), 713);
        // Host pointers may point into page-locked memory, but not past it.
        assert_eq!(cuMemcpyHtoD_v2(managed, locked, 32), OK);
        let mut kind = 0;
        assert_eq!(cuPointerGetAttribute((&raw mut kind).cast(), 2, address), OK);
        assert_eq!(kind, 1);
        silent();
        assert_eq!(cuMemcpyHtoD_v2(managed, locked.byte_add(16), 32), INVALID_VALUE);
        emu_clear_errors();
        assert_eq!(cuMemFree_v2(managed), OK);
        assert_eq!(cuMemFree_v2(managed), INVALID_VALUE);
        assert_eq!(cuMemFreeHost(locked), OK);
        assert_eq!(cuMemFreeHost(locked), INVALID_VALUE);
        emu_clear_errors();
        // A kernel that uses it now is out of bounds.
        assert_eq!(launch(function(m, "fill"), 1, 8, null_mut(), &[U64(address), U32(1)]), OK);
        assert_eq!(cuCtxSynchronize(), 700);
        assert!(findings()[0].starts_with("Invalid __global__ write"), "{:?}", findings());
    }
}

#[test]
fn addresses_that_the_host_uses_again_are_host_memory() {
    let _session = Session::new(&[]);
    let p = upload(&[7; 1024]);
    for round in 0..50 {
        let mut locked = null_mut();
        unsafe {
            assert_eq!(cuMemHostAlloc(&raw mut locked, 4096 * (1 + round % 3), 0), OK);
            assert_eq!(cuMemFreeHost(locked), OK);
        }
        // Very likely where the page-locked memory was.
        let layout = std::alloc::Layout::from_size_align(4096, 4096).unwrap();
        unsafe {
            let memory = std::alloc::alloc_zeroed(layout);
            assert_eq!(cuMemcpyDtoH_v2(memory.cast(), p, 4096), OK);
            assert_eq!(memory.cast::<u32>().read(), 7);
            std::alloc::dealloc(memory, layout);
        }
    }
    silent();
}

#[test]
fn ranges_of_addresses() {
    let _session = Session::new(&[]);
    let p = alloc(100);
    let (mut base, mut size) = (0, 0);
    unsafe {
        assert_eq!(cuMemGetAddressRange_v2(&raw mut base, &raw mut size, p + 99), OK);
        assert_eq!((base, size), (p, 100));
        assert_eq!(cuMemGetAddressRange_v2(&raw mut base, &raw mut size, p + 100), 500);
        assert_eq!(cuPointerGetAttribute((&raw mut base).cast(), 11, p + 5), OK);
        assert_eq!(base, p);
        assert_eq!(cuPointerGetAttribute((&raw mut base).cast(), 11, 12345), INVALID_VALUE);
    }
}

#[test]
#[cfg(target_os = "linux")]
fn the_host_gets_no_memory_at_device_addresses() {
    let _session = Session::new(&[]);
    let p = alloc(64);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let kept = maps.lines().any(|line| {
        let (range, rest) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let [start, end] = [start, end].map(|n| u64::from_str_radix(n, 16).unwrap());
        rest.starts_with("---p") && start <= p && p + (1 << 30) <= end
    });
    assert!(kept, "{p:#x} in\n{maps}");
}

#[test]
fn calls_are_logged_and_fail_on_purpose() {
    let _session = Session::new(&[]);
    let log = || unsafe {
        let mut buffer = vec![0_u8; emu_calls(null_mut(), 0) + 1];
        emu_calls(buffer.as_mut_ptr().cast(), buffer.len());
        buffer.pop();
        String::from_utf8(buffer).unwrap()
    };
    let (any, mut locked) = (text("*"), null_mut());
    unsafe {
        emu_call_log(1);
        assert_eq!(emu_fail(any.as_ptr(), 1), 0);
        let p = alloc(16);
        assert_eq!(cuMemHostAlloc(&raw mut locked, 64, 0), OUT_OF_MEMORY);
        assert!(locked.is_null());
        assert_eq!(cuMemHostAlloc(&raw mut locked, 64, 0), OK, "once");
        assert_eq!((cuMemFreeHost(locked), cuMemFree_v2(p)), (OK, OK));
        assert_eq!(log(), "cuMemAlloc_v2\ncuMemHostAlloc\ncuMemHostAlloc\ncuMemFreeHost\ncuMemFree_v2");
        emu_call_log(0);
        assert_eq!(log(), "");
        assert_eq!(emu_fail(text("cuMemAlloc_v2").as_ptr(), 0), 0);
        assert_eq!(emu_fail(std::ptr::null(), 0), 1, "taken back");
        assert_eq!(cuMemFree_v2(alloc(16)), OK);
    }
}
