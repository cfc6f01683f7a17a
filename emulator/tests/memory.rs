//! Loads and stores: every space, width and vector, against bytes put together by hand; and each way to miss.

mod common;

use common::{Arg, words};

/// A module around `body`, which declares its own registers: one buffer `p0` in `%rd1`, one in `%rd2`.
fn bare(body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry test(.param .u64 p0, .param .u64 p1)\n{{\n.reg .b32 %r<32>;\n.reg .b64 %rd<32>;\nld.param.u64 %rd1, [p0];\nld.param.u64 %rd2, [p1];\n{body}\nret;\n}}\n"
    )
}

#[test]
fn lanes_on_one_address_store_in_lane_order() {
    let ptx = bare(
        "ld.global.v2.u32 {%r1, %r2}, [%rd1+8]; st.global.u32 [%rd2], %tid.x; st.global.v2.u32 [%rd2+8], {%r1, %r2};",
    );
    let ran = common::run(&ptx, "test", 32, &[words(&[1, 2, 3, 4]), Arg::Out(16)]).silent();
    assert_eq!(ran.words(1), [31, u32::MAX, 3, 4]);
}
