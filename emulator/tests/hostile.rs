//! Files and arguments made to hang, overflow or exhaust: each ends in an error (a hang of this test is the finding).

mod common;

use common::config;
use cuda::config::SM_80;
use cuda::device::{Device, blocks_per_sm};
use cuda::machine::inst::Kernel;
use std::fmt::Write;

const HEAD: &str = ".version 8.0\n.target sm_80\n.address_size 64\n";

/// The load error.
fn refused(ptx: &str) -> String {
    let error = Device::new(config(&[])).load(ptx).unwrap_err();
    error.to_string()
}

#[test]
fn functions_that_double_at_every_level_do_not_hang_the_loader() {
    // 2^60 calls if all were inlined, and not one instruction.
    let mut ptx = format!("{HEAD}.func f0()\n{{\n}}\n");
    for level in 1..=60 {
        writeln!(ptx, ".func f{level}()\n{{\n    call f{0};\n    call f{0};\n}}", level - 1).unwrap();
    }
    ptx.push_str(".entry test()\n{\n    call f60;\n    ret;\n}\n");
    assert!(refused(&ptx).contains("statements after inlining"));
}

#[test]
fn a_long_chain_of_calls_does_not_exhaust_the_stack() {
    let mut ptx = format!("{HEAD}.func f0()\n{{\n}}\n");
    for level in 1..=20_000 {
        writeln!(ptx, ".func f{level}()\n{{\n    {{ call f{}; }}\n}}", level - 1).unwrap();
    }
    ptx.push_str(".entry test()\n{\n    call f20000;\n    ret;\n}\n");
    assert!(refused(&ptx).contains("nest more than"));
    // What real code has is far from the limit.
    let shallow = ptx.replace("call f20000;", "call f50;");
    assert!(Device::new(config(&[])).load(&shallow).is_ok());
}

#[test]
fn many_loops_over_many_registers_load_soon() {
    let mut ptx = format!("{HEAD}.entry test()\n{{\n    .reg .b32 %r<30001>;\n    .reg .pred %p<2>;\n");
    for i in 0..30_000 {
        writeln!(ptx, "    add.u32 %r{i}, %r{}, 1;\n$L{i}:\n    @%p1 bra $L{i};", i + 1).unwrap();
    }
    for i in 0..30_000 {
        writeln!(ptx, "    @%p1 bra $L{i};").unwrap();
    }
    ptx.push_str("}\n");
    let module = Device::new(config(&[])).load(&ptx).unwrap();
    assert_eq!(module.kernels["test"].registers, 255);
}

#[test]
fn occupancy_of_absurd_sizes_is_none() {
    let kernel = Kernel { registers: u32::MAX, shared_dynamic: 1024, ..Kernel::default() };
    for (threads, shared) in
        [(u32::MAX, 0), (1025, 0), (1024, u32::MAX), (32, u32::MAX - 2047), (1, u32::MAX - 1024)]
    {
        assert_eq!(blocks_per_sm(&SM_80, &kernel, threads, shared), 0, "{threads} threads, {shared} bytes");
    }
    assert_eq!(blocks_per_sm(&SM_80, &Kernel { registers: 32, ..Kernel::default() }, 256, 0), 8);
}

#[test]
fn damaged_arrays_are_errors() {
    use cuda::npy::Array;
    let file = |header: &str, bytes: &[u8]| {
        [b"\x93NUMPY\x01\x00", (header.len() as u16).to_le_bytes().as_slice(), header.as_bytes(), bytes]
            .concat()
    };
    let good = file("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", &[0; 8]);
    assert_eq!(Array::parse(&good).unwrap().shape, [2]);
    for cut in 0..good.len() {
        assert!(Array::parse(&good[..cut]).is_err(), "cut at {cut}");
    }
    for header in [
        "{'descr': '<', 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '', 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '<\u{e4}4', 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '>f4', 'fortran_order': False, 'shape': (2,), }",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (2,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967296, 4294967296, 2), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }",
    ] {
        assert!(Array::parse(&file(header, &[0; 8])).is_err(), "{header}");
    }
}
