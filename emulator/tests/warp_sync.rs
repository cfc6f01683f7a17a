//! Shuffles, votes, matches and reductions against their definitions lane by lane, with partial masks, teams and divergent code.
#![allow(
    clippy::items_after_statements,
    clippy::match_same_arms,
    clippy::needless_range_loop,
    reason = "tests say it the short way"
)]

mod common;

use common::{Arg, Ran, kernel, run, run_with, words};
use cuda::config::Config;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }
}

/// What the lanes of a warp bring to an instruction: three operands and a member mask; lanes with mask 0 do not execute it.
#[derive(Clone, Debug)]
struct Warp {
    a: [u32; 32],
    b: [u32; 32],
    c: [u32; 32],
    members: [u32; 32],
}

impl Warp {
    /// The lanes that execute together with a lane.
    fn team(&self, lane: usize) -> u32 {
        (0..32).filter(|&l| self.members[l] == self.members[lane]).fold(0, |m, l| m | 1 << l)
    }

    fn lanes(&self) -> impl Iterator<Item = usize> + '_ {
        (0..32).filter(|&lane| self.members[lane] != 0)
    }
}

/// Masks in turn: everybody, some lanes, two teams, teams of four.
fn members(random: &mut Random, turn: usize) -> [u32; 32] {
    let mut out = [0; 32];
    let split = random.next();
    for (lane, members) in out.iter_mut().enumerate() {
        *members = match turn % 4 {
            0 => u32::MAX,
            1 if split >> lane & 1 == 1 => split,
            1 => 0,
            2 if split >> lane & 1 == 1 => split,
            2 => !split,
            _ => 15 << (lane / 4 * 4),
        };
    }
    out
}

/// Runs `instruction` (operands `%r10`, `%r11`, `%r12`, mask `%r13`, also as predicate `%p3` = bit 0 of `%r10` and 64-bit `%rd10`; results
/// `%r20` and `%p2`) for each warp in a block of its own. Returns (d, p, d is undefined, p is undefined) by lane.
fn execute(instruction: &str, warps: &[Warp]) -> Vec<[(u32, u32, bool, bool); 32]> {
    let body = format!(
        "    mov.u32 %r1, %ctaid.x;
    mul.wide.u32 %rd3, %r1, 512;
    add.s64 %rd1, %rd1, %rd3;
    mul.wide.u32 %rd3, %r1, 256;
    add.s64 %rd2, %rd2, %rd3;
    mul.wide.u32 %rd3, %r0, 4;
    add.s64 %rd1, %rd1, %rd3;
    add.s64 %rd2, %rd2, %rd3;
    ld.global.u32 %r10, [%rd1];
    ld.global.u32 %r11, [%rd1+128];
    ld.global.u32 %r12, [%rd1+256];
    ld.global.u32 %r13, [%rd1+384];
    mov.b64 %rd10, {{%r10, %r11}};
    and.b32 %r14, %r10, 1;
    setp.ne.u32 %p3, %r14, 0;
    mov.u32 %r20, 0xdeadbeef;
    mov.u32 %r21, 7;
    setp.eq.u32 %p2, %r0, %r0;
    setp.eq.u32 %p1, %r13, 0;
    @%p1 bra $SKIP;
    {instruction}
    selp.u32 %r21, 1, 0, %p2;
$SKIP:
    st.global.u32 [%rd2], %r20;
    st.global.u32 [%rd2+128], %r21;"
    );
    let input: Vec<u32> = warps.iter().flat_map(|w| [w.a, w.b, w.c, w.members]).flatten().collect();
    let args = [words(&input), Arg::Out(256 * warps.len())];
    let ran = run_with(
        &kernel(2, &body),
        "test",
        [warps.len() as u32, 1, 1],
        [32, 1, 1],
        0,
        &args,
        Config::default(),
    )
    .silent();
    let (values, undefined) = (ran.words(1), undefined(&ran, 1));
    (0..warps.len())
        .map(|w| {
            let mut out = [(0, 0, false, false); 32];
            for (lane, out) in out.iter_mut().enumerate() {
                let (d, p) = (64 * w + lane, 64 * w + 32 + lane);
                *out = (values[d], values[p], undefined[d], undefined[p]);
            }
            out
        })
        .collect()
}

/// Words of buffer `i` that hold something undefined.
fn undefined(ran: &Ran, i: usize) -> Vec<bool> {
    let index = ran.device.memory.find(ran.addresses[i], ran.buffers[i].len() as u64).expect("the buffer");
    let shadow = &ran.device.memory.get(index).shadow;
    shadow[..ran.buffers[i].len()].chunks_exact(4).map(|w| w.iter().any(|&b| b != 0)).collect()
}

/// The manual's pseudocode: the source lane and the predicate.
fn shuffle(mode: &str, lane: u32, b: u32, c: u32) -> (u32, bool) {
    let bits = |value: u32, high: u32, low: u32| value >> low & ((1 << (high - low + 1)) - 1);
    let (lane, bval, cval, mask) =
        (i64::from(lane), i64::from(bits(b, 4, 0)), i64::from(bits(c, 4, 0)), i64::from(bits(c, 12, 8)));
    let five = |v: i64| v & 0x1f;
    let max_lane = (lane & mask) | (cval & five(!mask));
    let min_lane = lane & mask;
    let (j, p) = match mode {
        "up" => (lane - bval, lane - bval >= max_lane),
        "down" => (lane + bval, lane + bval <= max_lane),
        "bfly" => (lane ^ bval, (lane ^ bval) <= max_lane),
        _ => (min_lane | (bval & five(!mask)), (min_lane | (bval & five(!mask))) <= max_lane),
    };
    (if p { j } else { lane } as u32, p)
}

#[test]
fn shuffles_follow_the_manual() {
    for mode in ["up", "down", "bfly", "idx"] {
        let mut random = Random(3);
        let warps: Vec<Warp> = (0..200)
            .map(|i| {
                let width = 1 << (random.next() % 6);
                let (segment, by) = ((32 - width) << 8, random.next());
                // What compilers emit for a width, then anything at all.
                let c = if mode == "up" { segment } else { segment | 0x1f };
                let wild = i % 3 == 2;
                Warp {
                    a: std::array::from_fn(|_| random.next()),
                    b: std::array::from_fn(|_| if i % 3 == 0 { by % 32 } else { random.next() }),
                    c: std::array::from_fn(|_| if wild { random.next() } else { c }),
                    members: members(&mut random, i / 2),
                }
            })
            .collect();
        let got = execute(&format!("shfl.sync.{mode}.b32 %r20|%p2, %r10, %r11, %r12, %r13;"), &warps);
        let (mut moved, mut absent) = (0, 0);
        for (warp, got) in warps.iter().zip(&got) {
            for lane in 0..32 {
                if warp.members[lane] == 0 {
                    assert_eq!(got[lane], (0xdead_beef, 7, false, false));
                    continue;
                }
                let (from, p) = shuffle(mode, lane as u32, warp.b[lane], warp.c[lane]);
                let (d, q, d_undefined, q_undefined) = got[lane];
                assert_eq!((q, q_undefined), (u32::from(p), false), "{mode} lane {lane} of {warp:x?}");
                if warp.team(lane) >> from & 1 == 1 {
                    assert_eq!(
                        (d, d_undefined),
                        (warp.a[from as usize], false),
                        "{mode} lane {lane} of {warp:x?}"
                    );
                    moved += u32::from(from as usize != lane);
                } else {
                    assert!(
                        d_undefined,
                        "{mode} lane {lane} reads lane {from}, which is not there, of {warp:x?}"
                    );
                    absent += 1;
                }
            }
        }
        assert!(moved > 300 && absent > 100, "{mode}: {moved} moved, {absent} absent");
    }
}

#[test]
fn votes_are_taken_by_team() {
    let mut random = Random(5);
    let warps: Vec<Warp> = (0..60)
        .map(|i| {
            let kind = i / 4 % 3;
            Warp {
                a: std::array::from_fn(|_| match kind {
                    0 => random.next(),
                    1 => 0,
                    _ => 1,
                }),
                b: [0; 32],
                c: [0; 32],
                members: members(&mut random, i),
            }
        })
        .collect();
    for negated in [false, true] {
        let not = if negated { "!" } else { "" };
        let ballots = execute(&format!("vote.sync.ballot.b32 %r20, {not}%p3, %r13;"), &warps);
        for mode in ["any", "all", "uni"] {
            let votes = execute(&format!("vote.sync.{mode}.pred %p2, {not}%p3, %r13;"), &warps);
            for ((warp, ballot), vote) in warps.iter().zip(&ballots).zip(&votes) {
                for lane in warp.lanes() {
                    let team = warp.team(lane);
                    let yes = (0..32).filter(|&l| team >> l & 1 == 1 && (warp.a[l] & 1 == 1) != negated);
                    let yes = yes.fold(0u32, |m, l| m | 1 << l);
                    let want = match mode {
                        "any" => yes != 0,
                        "all" => yes == team,
                        _ => yes == 0 || yes == team,
                    };
                    assert_eq!(ballot[lane].0, yes);
                    assert_eq!(vote[lane].1, u32::from(want), "{mode} {not} lane {lane} of {warp:x?}");
                }
            }
        }
    }
}

#[test]
fn matches_are_found_by_team() {
    let mut random = Random(9);
    let warps: Vec<Warp> = (0..60)
        .map(|i| {
            let alike = i / 4 % 2 == 0;
            Warp {
                a: std::array::from_fn(|_| if alike { 5 } else { random.next() % 3 }),
                // The upper word of the 64-bit value.
                b: std::array::from_fn(|_| if alike { 9 } else { random.next() % 2 }),
                c: [0; 32],
                members: members(&mut random, i),
            }
        })
        .collect();
    for (ty, operand) in [("b32", "%r10"), ("b64", "%rd10")] {
        let value =
            |w: &Warp, l: usize| u64::from(w.a[l]) | if ty == "b64" { u64::from(w.b[l]) << 32 } else { 0 };
        let any = execute(&format!("match.any.sync.{ty} %r20, {operand}, %r13;"), &warps);
        let all = execute(&format!("match.all.sync.{ty} %r20|%p2, {operand}, %r13;"), &warps);
        for ((warp, any), all) in warps.iter().zip(&any).zip(&all) {
            for lane in warp.lanes() {
                let team = warp.team(lane);
                let same = (0..32)
                    .filter(|&l| team >> l & 1 == 1 && value(warp, l) == value(warp, lane))
                    .fold(0u32, |m, l| m | 1 << l);
                assert_eq!(any[lane].0, same, "{ty} lane {lane} of {warp:x?}");
                let whole = same == team;
                assert_eq!((all[lane].0, all[lane].1), (if whole { team } else { 0 }, u32::from(whole)));
            }
        }
    }
}

#[test]
fn reductions_are_made_by_team() {
    let mut random = Random(13);
    let warps: Vec<Warp> = (0..60)
        .map(|i| Warp {
            a: std::array::from_fn(|_| random.next()),
            b: [0; 32],
            c: [0; 32],
            members: members(&mut random, i),
        })
        .collect();
    type Fold = fn(u32, u32) -> u32;
    let operations: [(&str, Fold); 9] = [
        ("add.u32", |x, y| x.wrapping_add(y)),
        ("add.s32", |x, y| x.wrapping_add(y)),
        ("min.u32", |x, y| if x < y { x } else { y }),
        ("max.u32", |x, y| if x > y { x } else { y }),
        ("min.s32", |x, y| if (x as i32) < (y as i32) { x } else { y }),
        ("max.s32", |x, y| if (x as i32) > (y as i32) { x } else { y }),
        ("and.b32", |x, y| x & y),
        ("or.b32", |x, y| x | y),
        ("xor.b32", |x, y| x ^ y),
    ];
    for (name, fold) in operations {
        let got = execute(&format!("redux.sync.{name} %r20, %r10, %r13;"), &warps);
        for (warp, got) in warps.iter().zip(&got) {
            for lane in warp.lanes() {
                let team = warp.team(lane);
                let values = (0..32).filter(|&l| team >> l & 1 == 1).map(|l| warp.a[l]);
                assert_eq!(got[lane].0, values.reduce(fold).unwrap(), "{name} lane {lane} of {warp:x?}");
            }
        }
    }
}

#[test]
fn one_lane_of_each_team_is_elected() {
    let mut random = Random(17);
    let warps: Vec<Warp> = (0..20)
        .map(|i| Warp { a: [0; 32], b: [0; 32], c: [0; 32], members: members(&mut random, i) })
        .collect();
    let got = execute("elect.sync %r20|%p2, %r13;", &warps);
    for (warp, got) in warps.iter().zip(&got) {
        for lane in warp.lanes() {
            let team = warp.team(lane);
            let leaders: Vec<usize> = (0..32).filter(|&l| team >> l & 1 == 1 && got[l].1 == 1).collect();
            assert_eq!(leaders.len(), 1);
            assert_eq!(got[lane].0 as usize, leaders[0]);
        }
    }
}

/// A kernel of one warp that stores `%r20` of each lane.
fn one(body: &str) -> String {
    kernel(
        1,
        &format!(
            "    mul.wide.u32 %rd3, %r0, 4;\n    add.s64 %rd1, %rd1, %rd3;\n{body}\n    st.global.u32 [%rd1], %r20;"
        ),
    )
}

#[test]
fn lanes_meet_at_a_shuffle_from_two_sides() {
    // The two sides of the branch take different numbers of steps; the shuffle behind both sees all lanes.
    let ptx = one("    setp.lt.u32 %p1, %r0, 13;
    @%p1 bra $A;
    mul.lo.u32 %r5, %r0, 10;
    add.u32 %r5, %r5, 1;
    add.u32 %r5, %r5, 1;
    bra $JOIN;
$A: add.u32 %r5, %r0, 1000;
$JOIN:
    shfl.sync.bfly.b32 %r20, %r5, 16, 0x1f, 0xffffffff;");
    let ran = run(&ptx, "test", 32, &[Arg::Out(128)]).silent();
    let value = |l: u32| if l < 13 { l + 1000 } else { l * 10 + 2 };
    assert_eq!(ran.words(0), (0..32).map(|l| value(l ^ 16)).collect::<Vec<_>>());
    // Each lane leaves the loop after its own number of turns.
    let ptx = one("    mov.u32 %r5, 0;
$LOOP:
    add.u32 %r5, %r5, 1;
    setp.le.u32 %p1, %r5, %r0;
    @%p1 bra $LOOP;
    redux.sync.add.s32 %r20, %r5, 0xffffffff;");
    assert_eq!(run(&ptx, "test", 32, &[Arg::Out(128)]).silent().words(0), vec![32 * 33 / 2; 32]);
}

#[test]
fn branches_of_a_warp_shuffle_among_themselves() {
    let ptx = one("    setp.lt.u32 %p1, %r0, 8;
    @%p1 bra $A;
    shfl.sync.up.b32 %r20, %r0, 1, 0, 0xffffff00;
    bra $END;
$A: shfl.sync.down.b32 %r20, %r0, 1, 0x1f, 0x000000ff;
$END:");
    let ran = run(&ptx, "test", 32, &[Arg::Out(128)]).silent();
    let (got, undefined) = (ran.words(0), undefined(&ran, 0));
    for lane in 0..32u32 {
        let from = if lane < 8 { lane + 1 } else { lane - 1 };
        // Lanes 7 and 8 read across the branch.
        assert_eq!(undefined[lane as usize], lane == 7 || lane == 8, "lane {lane}");
        assert!(undefined[lane as usize] || got[lane as usize] == from);
    }
}

#[test]
fn the_old_forms_take_the_lanes_that_are_there() {
    let ptx = one("    setp.lt.u32 %p1, %r0, 8;
    mov.u32 %r20, 0;
    @!%p1 bra $END;
    setp.lt.u32 %p2, %r0, 4;
    vote.ballot.b32 %r20, %p2;
    shfl.down.b32 %r21, %r0, 1, 0x1f;
    activemask.b32 %r22;
    shl.b32 %r22, %r22, 8;
    or.b32 %r20, %r20, %r22;
    shl.b32 %r21, %r21, 24;
    setp.lt.u32 %p3, %r0, 7;
    @%p3 or.b32 %r20, %r20, %r21;
$END:");
    let want = (0..32).map(|l: u32| match l {
        0..7 => 0x0f | 0xff00 | (l + 1) << 24,
        7 => 0xff0f,
        _ => 0,
    });
    assert_eq!(run(&ptx, "test", 32, &[Arg::Out(128)]).silent().words(0), want.collect::<Vec<u32>>());
}

#[test]
fn a_short_warp_has_no_more_lanes_than_threads() {
    let ptx = one("    shfl.sync.down.b32 %r5, %r0, 4, 0x1f, 0xffffffff;
    vote.sync.ballot.b32 %r20, 1, 0xffffffff;
    setp.ge.u32 %p1, %r0, 16;
    @%p1 bra $END;
    shl.b32 %r5, %r5, 24;
    or.b32 %r20, %r20, %r5;
$END:");
    let ran = run(&ptx, "test", 20, &[Arg::Out(80)]).silent();
    let want = (0..20).map(|l: u32| 0xf_ffff | if l < 16 { (l + 4) << 24 } else { 0 });
    assert_eq!(ran.words(0), want.collect::<Vec<u32>>());
    // The threads 16 to 19 would have read lanes that do not exist.
    let ptx = one("    shfl.sync.down.b32 %r20, %r0, 4, 0x1f, 0xffffffff;");
    let ran = run(&ptx, "test", 20, &[Arg::Out(80)]).silent();
    assert_eq!(undefined(&ran, 0), (0..20).map(|l| l >= 16).collect::<Vec<_>>());
}

#[test]
fn lanes_that_have_left_are_not_waited_for() {
    let ptx = one("    setp.ge.u32 %p1, %r0, 24;
    mov.u32 %r20, 5;
    @%p1 exit;
    redux.sync.add.s32 %r20, %r0, 0xffffffff;");
    let ran = run(&ptx, "test", 32, &[Arg::Out(128)]).silent();
    assert_eq!(ran.words(0)[..24], [23 * 24 / 2; 24]);
    assert_eq!(ran.words(0)[24..], [u32::MAX; 8]);
}

#[test]
fn undefined_values_move_with_their_half_and_spoil_votes() {
    // Lane 5 has an undefined upper half, lane 9 an undefined register.
    let body = "    setp.ne.u32 %p1, %r0, 5;
    mov.u16 %h1, 3;
    @%p1 mov.u16 %h2, 4;
    mov.b32 %r5, {%h1, %h2};
    setp.eq.u32 %p2, %r0, 9;
    @%p2 mov.b32 %r5, %r100;
    shfl.sync.idx.b32 %r20, %r5, SOURCE, 0x1f, 0xffffffff;
    mov.b32 {%h3, %h4}, %r20;
    cvt.u32.u16 %r20, HALF;";
    for (source, half, spoilt) in
        [("5", "%h3", false), ("5", "%h4", true), ("6", "%h4", false), ("9", "%h3", true), ("9", "%h4", true)]
    {
        let ptx = one(&body.replace("SOURCE", source).replace("HALF", half));
        let ran = run(&ptx, "test", 32, &[Arg::Out(128)]).silent();
        assert_eq!(undefined(&ran, 0), vec![spoilt; 32], "{half} of lane {source}");
        assert!(spoilt || ran.words(0) == vec![if half == "%h3" { 3 } else { 4 }; 32]);
    }
    let vote = |lanes: &str, members: &str| {
        one(&format!(
            "    setp.lt.u32 %p1, %r0, 31;
    mov.u32 %r20, 0;
    @%p1 mov.u32 %r6, %r0;
    setp.lt.u32 %p2, %r6, 4;
    setp.lt.u32 %p3, %r0, {lanes};
    @!%p3 bra $END;
    vote.sync.ballot.b32 %r20, %p2, {members};
$END:"
        ))
    };
    let ran = run(&vote("32", "0xffffffff"), "test", 32, &[Arg::Out(128)]).silent();
    assert_eq!(undefined(&ran, 0), [true; 32]);
    let ran = run(&vote("31", "0x7fffffff"), "test", 32, &[Arg::Out(128)]).silent();
    assert_eq!(undefined(&ran, 0), [false; 32]);
    assert_eq!(ran.words(0)[..31], [15; 31]);
    // An undefined shuffle distance spoils the result, an undefined member mask is an error.
    let distance = one("    shfl.sync.up.b32 %r20, %r0, %r100, 0, 0xffffffff;");
    assert_eq!(undefined(&run(&distance, "test", 32, &[Arg::Out(128)]).silent(), 0), [true; 32]);
    run(&one("    shfl.sync.up.b32 %r20, %r0, 1, 0, %r100;"), "test", 32, &[Arg::Out(128)])
        .found("Undefined");
}

#[test]
fn wrong_member_masks_are_reported() {
    let cases = [
        // A lane outside its own mask.
        "    shfl.sync.bfly.b32 %r20, %r0, 1, 0x1f, MASK;",
        // Half of the lanes wait at one shuffle, half at another.
        "    setp.lt.u32 %p1, %r0, 16;
    @%p1 bra $A;
    shfl.sync.bfly.b32 %r20, %r0, 1, 0x1f, SIDE;
    bra $END;
$A: shfl.sync.bfly.b32 %r20, %r0, 2, 0x1f, SIDE;
$END:",
        // Lanes of one team that do not agree on it.
        "    setp.eq.u32 %p1, %r0, 3;
    selp.b32 %r5, OTHER, 0xffffffff, %p1;
    vote.sync.ballot.b32 %r20, 1, %r5;",
        // A member is kept away by its guard.
        "    setp.GUARD.u32 %p1, %r0, 3;
    mov.u32 %r20, 0;
    @%p1 redux.sync.add.s32 %r20, %r0, 0xffffffff;",
    ];
    let right = [("MASK", "0xffffffff"), ("SIDE", "%r9"), ("OTHER", "0xffffffff"), ("GUARD", "lo.or")];
    let wrong = [("MASK", "0xfffffff7"), ("SIDE", "0xffffffff"), ("OTHER", "0x0000000f"), ("GUARD", "ne")];
    // The right masks of the two sides.
    let sides = "    setp.lt.u32 %p9, %r0, 16;\n    selp.b32 %r9, 0x0000ffff, 0xffff0000, %p9;\n    setp.eq.u32 %p8, %r0, %r0;\n";
    for case in cases {
        let fill = |words: [(&str, &str); 4]| {
            let mut text = format!("{sides}{case}");
            words.iter().for_each(|(name, value)| text = text.replace(name, value));
            one(&text.replace("lo.or.u32 %p1, %r0, 3", "lo.or.u32 %p1, %r0, 3, %p8"))
        };
        let ran = run(&fill(wrong), "test", 32, &[Arg::Out(128)]).found("Barrier");
        assert!(ran.device.fault.is_some(), "{case}");
        run(&fill(right), "test", 32, &[Arg::Out(128)]).silent();
    }
}

#[test]
fn modifiers_and_operands_are_checked() {
    let cases = [
        ("shfl.sync.b32 %r20, %r0, 1, 0x1f, 0xffffffff;", "bfly"),
        ("shfl.sync.up.b64 %r20, %r0, 1, 0x1f, 0xffffffff;", ".b32"),
        ("shfl.sync.up.b32 %r20, %r0, 1, 0x1f;", "operands"),
        ("shfl.sync.up.wide.b32 %r20, %r0, 1, 0x1f, 0xffffffff;", "wide"),
        ("vote.sync.ballot.pred %p1, %p2, 0xffffffff;", ".b32"),
        ("match.any.sync.b16 %r20, %r0, 0xffffffff;", ".b32 or .b64"),
        ("redux.sync.add.b32 %r20, %r0, 0xffffffff;", "redux.add"),
        ("redux.sync.mul.u32 %r20, %r0, 0xffffffff;", "missing"),
        ("elect.sync %p1|%p2, 0xffffffff;", "32-bit"),
    ];
    for (instruction, what) in cases {
        let ptx = one(&format!("    {instruction}"));
        let line = ptx.lines().position(|l| l.contains(instruction)).expect("the line") + 1;
        let error =
            cuda::device::Device::new(Config::default()).load(&ptx).map(|_| ()).expect_err(instruction);
        assert_eq!(error.line as usize, line, "{error}");
        assert!(error.message.contains(what), "{instruction}: {error}");
    }
}
