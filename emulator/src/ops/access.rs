//! How instructions reach memory: addresses of lanes, the checks before an access, and the bytes themselves.
//!
//! An access goes through four steps. `Operand::addresses` gives each lane's address, [`aligned`] looks at the alignment,
//! then the place is resolved: [`within`] says whether all lanes lie in one piece of memory of known length and turns addresses
//! into offsets ([`Lanes`], safe to use without looking again), and [`note_global`] or [`note_shared`] tell the counters and the
//! race detectors. Nothing is touched before all four have passed.
//!
//! `ldmatrix` and its like need [`shared_rows`] only.
// Loops over the lanes index several arrays at once, and vectorise as they are.
#![allow(clippy::needless_range_loop)]

use super::conflicts;
use crate::check::global::GlobalAccess;
use crate::check::shared::{Access, Touch};
use crate::config::{Check, Level};
use crate::count::GlobalKind;
use crate::lower::Address;
use crate::machine::core::Core;
use crate::machine::inst::{Flow, Inst};
use crate::mem::{Allocation, Kind, LOCAL_WINDOW, PARAM_WINDOW, PENDING, SHARED_WINDOW};
use crate::ptx::ast::Space;
use crate::report::Fault;

/// Where the base of an address is: bits of `Inst::aux` that all memory instructions share.
///
/// Bit 0: the base is a 64-bit slot; bits 1 to 3: the state space.
pub(crate) const WIDE: u32 = 1;

/// The bits of a space and of the base's width.
pub(crate) fn place_bits(address: &Address, space: Space) -> u32 {
    let number = match space {
        Space::Generic => 0,
        Space::Global => 1,
        Space::Shared => 2,
        Space::Local => 3,
        Space::Const => 4,
        Space::Param => 5,
    };
    u32::from(address.wide) | number << 1
}

/// The state space an instruction works on: the written one, made precise by the variable it names.
///
/// # Errors
/// A variable of another space.
pub(crate) fn space_of(address: &Address, written: Space) -> Result<Space, String> {
    match (written, address.space) {
        (space, None) => Ok(space),
        (Space::Generic, Some(named)) => Ok(named),
        (space, Some(named)) if space == named => Ok(space),
        // Arguments and results of calls are .param variables that live in the frame.
        (Space::Param, Some(Space::Local)) => Ok(Space::Local),
        (space, Some(named)) => {
            Err(format!("the variable is in .{named:?} memory, not .{space:?}").to_lowercase())
        }
    }
}

/// The space encoded by [`place_bits`].
#[inline(always)]
pub(crate) fn space_from(aux: u32) -> Space {
    match aux >> 1 & 7 {
        0 => Space::Generic,
        1 => Space::Global,
        2 => Space::Shared,
        3 => Space::Local,
        4 => Space::Const,
        _ => Space::Param,
    }
}

/// Each lane's address: base in slot `slot` plus `offset`.
#[inline(always)]
pub(crate) fn addresses(core: &Core<'_>, slot: u32, wide: bool, offset: i64) -> [u64; 32] {
    let mut out = [0; 32];
    if wide {
        let base = core.warp.regs.get64(slot);
        for lane in 0..32 {
            out[lane] = base[lane].wrapping_add(offset as u64);
        }
    } else {
        let base = core.warp.regs.get32(slot);
        for lane in 0..32 {
            // 32-bit addresses wrap at 32 bits.
            out[lane] = u64::from(base[lane].wrapping_add(offset as u32));
        }
    }
    out
}

/// How the addresses of a whole warp lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// One lane behind the other.
    Row,
    /// All at one place.
    Point,
}

impl Shape {
    /// Bytes that an access of this shape covers.
    #[inline(always)]
    pub(crate) fn length(self, size: u32) -> usize {
        if self == Self::Row { 32 * size as usize } else { size as usize }
    }
}

/// The address of lane 0 and the shape of all 32, where they have one and all are defined.
#[inline(always)]
pub(crate) fn whole(core: &Core<'_>, slot: u32, wide: bool, offset: i64, size: u32) -> Option<(u64, Shape)> {
    let regs = &core.warp.regs;
    let (first, row, point);
    if wide {
        let base = regs.get64(slot);
        let (mut away, mut any) = (0, 0);
        for lane in 0..32 {
            let distance = base[lane].wrapping_sub(base[0]);
            away |= distance ^ (lane as u64 * u64::from(size));
            any |= distance;
        }
        if regs.track && regs.any_undef64(slot) != 0 {
            return None;
        }
        (first, row, point) = (base[0].wrapping_add(offset as u64), away == 0, any == 0);
    } else {
        let base = regs.get32(slot);
        let (mut away, mut any) = (0, 0);
        for lane in 0..32 {
            let distance = base[lane].wrapping_sub(base[0]);
            away |= distance ^ (lane as u32 * size);
            any |= distance;
        }
        if regs.track && regs.any_undef32(slot) != 0 {
            return None;
        }
        (first, row, point) = (u64::from(base[0].wrapping_add(offset as u32)), away == 0, any == 0);
    }
    match (row, point) {
        (true, _) => Some((first, Shape::Row)),
        (_, true) => Some((first, Shape::Point)),
        _ => None,
    }
}

/// The `length` bytes at `first` as a range of an allocation, if they are in it, aligned to `size`, and may be accessed.
#[inline(always)]
pub(crate) fn block_of(
    a: &Allocation,
    touch: Touch,
    first: u64,
    length: usize,
    size: u32,
) -> Option<std::ops::Range<usize>> {
    let at = first.wrapping_sub(a.base);
    let last = a.len.checked_sub(length as u64)?;
    let good = at <= last && first & u64::from(size - 1) == 0 && allows(a, Space::Global, touch);
    good.then(|| at as usize..at as usize + length)
}

/// Somebody wants to know of global accesses.
#[inline(always)]
pub(crate) fn global_is_watched(core: &Core<'_>) -> bool {
    core.counters.memory
        || core.config.level(Check::Global) != Level::Off
        || core.config.level(Check::ReadOnly) != Level::Off
}

/// Bytes of shared memory the block may use.
#[inline(always)]
pub(crate) fn shared_length(core: &Core<'_>) -> u64 {
    // Without dynamic memory the padding that would align it belongs to nobody.
    match core.block.ids.dynamic_shared {
        0 => u64::from(core.kernel.shared_static),
        _ => core.block.shared.len() as u64,
    }
}

/// Reports lanes whose address is undefined.
#[inline(always)]
pub(crate) fn defined_address(
    core: &mut Core<'_>,
    inst: &Inst,
    slot: u32,
    wide: bool,
    mask: u32,
) -> Result<(), Flow> {
    if !core.warp.regs.track {
        return Ok(());
    }
    let undef = if wide { core.warp.regs.any_undef64(slot) } else { core.warp.regs.any_undef32(slot) } & mask;
    if undef != 0 && core.undefined(inst, undef, "address") == Flow::Fault {
        return Err(Flow::Fault);
    }
    Ok(())
}

/// The low 32 bits, which are what counts in shared and local memory.
#[inline(always)]
pub(crate) fn low(addresses: &[u64; 32]) -> [u32; 32] {
    addresses.map(|a| a as u32)
}

/// The name of a space as compute-sanitizer writes it.
pub(crate) const fn title(space: Space) -> &'static str {
    match space {
        Space::Generic | Space::Global => "__global__",
        Space::Shared => "__shared__",
        Space::Local => "__local__",
        Space::Const => "__constant__",
        Space::Param => "__param__",
    }
}

/// What an access does, as reports say it.
pub(crate) const fn verb(touch: Touch) -> &'static str {
    match touch {
        Touch::Read => "read",
        Touch::Write => "write",
        Touch::Atomic => "atomic",
    }
}

/// The lanes of `mask` for which `test` holds.
#[inline(always)]
pub(crate) fn lanes_where(mask: u32, test: impl Fn(usize) -> bool) -> u32 {
    let mut out = 0;
    for lane in 0..32 {
        out |= u32::from(test(lane)) << lane;
    }
    out & mask
}

/// Every active lane's address is a multiple of `size` (a power of two).
#[inline(always)]
pub(crate) fn aligned(
    core: &mut Core<'_>,
    inst: &Inst,
    space: Space,
    touch: Touch,
    addresses: &[u64; 32],
    mask: u32,
    size: u32,
) -> Result<(), Flow> {
    let low = u64::from(size - 1);
    let mut any = 0;
    for lane in 0..32 {
        any |= addresses[lane] & low & 0u64.wrapping_sub(u64::from(mask >> lane & 1));
    }
    if any == 0 { Ok(()) } else { misaligned(core, inst, space, touch, addresses, mask, size) }
}

#[cold]
fn misaligned(
    core: &mut Core<'_>,
    inst: &Inst,
    space: Space,
    touch: Touch,
    addresses: &[u64; 32],
    mask: u32,
    size: u32,
) -> Result<(), Flow> {
    let wrong = lanes_where(mask, |lane| addresses[lane] & u64::from(size - 1) != 0);
    let first = addresses[wrong.trailing_zeros() as usize & 31];
    let what = match space {
        Space::Shared | Space::Local => format!("offset {}", first as u32),
        _ => format!("address {first:#x}"),
    };
    let lines = vec![
        format!("Misaligned {} {} of size {size} bytes", title(space), verb(touch)),
        format!("{what} is not a multiple of {size}"),
    ];
    match core.find(Check::Align, Fault::Misaligned, inst, wrong, lines) {
        Flow::Fault => Err(Flow::Fault),
        _ => Ok(()),
    }
}

/// Offsets of lanes in a piece of memory; those of inactive lanes are 0. Made by [`within`] only: `offset + size` of every lane is inside
/// the length that was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lanes {
    offsets: [usize; 32],
    size: usize,
    len: usize,
}

impl Lanes {
    /// The offset of a lane.
    #[inline(always)]
    pub(crate) fn offset(&self, lane: usize) -> usize {
        self.offsets[lane]
    }

    /// All lanes lie one behind the other.
    #[inline(always)]
    pub(crate) fn contiguous(&self, mask: u32) -> bool {
        if mask != u32::MAX {
            return false;
        }
        let mut wrong = 0;
        for lane in 0..32 {
            wrong |= self.offsets[lane] ^ (self.offsets[0] + lane * self.size);
        }
        wrong == 0
    }

    /// Reads `T` at `at` bytes behind each lane's offset and gives it to `put`.
    #[inline(always)]
    pub(crate) fn fetch<T: Copy, U>(
        &self,
        bytes: &[u8],
        at: usize,
        out: &mut [U; 32],
        convert: impl Fn(T) -> U,
    ) {
        assert!(bytes.len() >= self.len && at + size_of::<T>() <= self.size);
        for lane in 0..32 {
            // SAFETY: `within` made every offset + size <= len, and the line above keeps the read inside `size` and `len` inside `bytes`.
            // T is one of the unsigned integers, for which any bits will do.
            let value = unsafe { bytes.as_ptr().add(self.offsets[lane] + at).cast::<T>().read_unaligned() };
            out[lane] = convert(value);
        }
    }

    /// Writes `T` at `at` bytes behind the offset of each lane of `mask`, in lane order.
    #[inline(always)]
    pub(crate) fn store<T: Copy>(&self, bytes: &mut [u8], at: usize, mask: u32, value: impl Fn(usize) -> T) {
        assert!(bytes.len() >= self.len && at + size_of::<T>() <= self.size);
        let start = bytes.as_mut_ptr();
        let put = |lane: usize| {
            // SAFETY: as in `fetch`.
            unsafe { start.add(self.offsets[lane] + at).cast::<T>().write_unaligned(value(lane)) }
        };
        if mask == u32::MAX {
            for lane in 0..32 {
                put(lane);
            }
        } else {
            let mut rest = mask;
            while rest != 0 {
                put(rest.trailing_zeros() as usize);
                rest &= rest - 1;
            }
        }
    }

    /// All shadow bytes of all lanes or-ed.
    #[inline(always)]
    pub(crate) fn any_shadow(&self, shadow: &[u8], mask: u32) -> u8 {
        assert!(shadow.len() >= self.len);
        if self.contiguous(mask) {
            let at = self.offsets[0];
            return shadow[at..at + 32 * self.size].iter().fold(0, |a, b| a | b);
        }
        let mut any = [0u64; 32];
        match self.size {
            1 => self.fetch(shadow, 0, &mut any, |v: u8| u64::from(v)),
            2 => self.fetch(shadow, 0, &mut any, |v: u16| u64::from(v)),
            4 => self.fetch(shadow, 0, &mut any, |v: u32| u64::from(v)),
            8 => self.fetch(shadow, 0, &mut any, |v: u64| v),
            16 => self.fetch(shadow, 0, &mut any, |v: u128| v as u64 | (v >> 64) as u64),
            _ => {
                let mut half = [0u64; 32];
                self.fetch(shadow, 0, &mut any, |v: u128| v as u64 | (v >> 64) as u64);
                self.fetch(shadow, 16, &mut half, |v: u128| v as u64 | (v >> 64) as u64);
                for lane in 0..32 {
                    any[lane] |= half[lane];
                }
            }
        }
        let mut all = 0;
        for lane in 0..32 {
            all |= any[lane] & 0u64.wrapping_sub(u64::from(mask >> lane & 1));
        }
        all.to_le_bytes().into_iter().fold(0, |a, b| a | b)
    }

    /// The bytes of a lane in `shadow` (or in the data).
    #[inline(always)]
    pub(crate) fn slice<'a>(&self, bytes: &'a [u8], lane: usize) -> &'a [u8] {
        &bytes[self.offsets[lane]..self.offsets[lane] + self.size]
    }

    /// The bytes of a lane, to be written.
    #[inline(always)]
    pub(crate) fn slice_mut<'a>(&self, bytes: &'a mut [u8], lane: usize) -> &'a mut [u8] {
        &mut bytes[self.offsets[lane]..self.offsets[lane] + self.size]
    }

    /// The same lanes in memory where each lane has a frame of its own.
    fn framed(mut self, frame: usize) -> Self {
        for lane in 0..32 {
            self.offsets[lane] += lane * frame;
        }
        self.len = 32 * frame;
        self
    }
}

/// Offsets of the lanes of `mask` behind `base`, if all of them have `size` bytes below `len`.
#[inline(always)]
pub(crate) fn within(addresses: &[u64; 32], mask: u32, base: u64, len: u64, size: u32) -> Option<Lanes> {
    let last = len.checked_sub(u64::from(size))?;
    let mut offsets = [0usize; 32];
    let mut bad = false;
    for lane in 0..32 {
        let offset = addresses[lane].wrapping_sub(base) & 0u64.wrapping_sub(u64::from(mask >> lane & 1));
        bad |= offset > last;
        offsets[lane] = offset as usize;
    }
    (!bad).then_some(Lanes { offsets, size: size as usize, len: len as usize })
}

/// An access of a kernel to an allocation is possible: it is live, and constants are only read.
#[inline(always)]
fn allows(a: &Allocation, space: Space, touch: Touch) -> bool {
    !a.freed
        && (a.kind != Kind::Const || touch == Touch::Read)
        && (space != Space::Const || a.kind == Kind::Const)
}

/// Lanes of a global access that lie in one allocation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Index of the allocation.
    pub(crate) index: usize,
    /// Lanes.
    pub(crate) mask: u32,
    /// Where they are.
    pub(crate) lanes: Lanes,
}

/// The whole access when it lies in the allocation this instruction used last.
#[inline(always)]
pub(crate) fn same_allocation(
    core: &Core<'_>,
    inst: &Inst,
    space: Space,
    touch: Touch,
    addresses: &[u64; 32],
    mask: u32,
    size: u32,
) -> Option<Part> {
    let index = core.memory.hint(inst.pc)?;
    let a = core.memory.get(index);
    if !allows(a, space, touch) {
        return None;
    }
    within(addresses, mask, a.base, a.len, size).map(|lanes| Part { index, mask, lanes })
}

/// Splits a global access by allocation; every lane is checked before the first part is returned.
#[inline(never)]
pub(crate) fn split_global(
    core: &mut Core<'_>,
    inst: &Inst,
    space: Space,
    touch: Touch,
    addresses: &[u64; 32],
    mask: u32,
    size: u32,
) -> Result<Vec<Part>, Flow> {
    let mut parts = Vec::new();
    let mut rest = mask;
    let mut outside = 0;
    while rest != 0 {
        let lane = rest.trailing_zeros() as usize;
        let found = core
            .memory
            .find(addresses[lane], u64::from(size))
            .filter(|&i| allows(core.memory.get(i), space, touch));
        let Some(index) = found else {
            outside |= 1 << lane;
            rest &= rest - 1;
            continue;
        };
        let a = core.memory.get(index);
        let last = a.len - u64::from(size);
        let mask = lanes_where(rest, |lane| addresses[lane].wrapping_sub(a.base) <= last);
        let Some(lanes) = within(addresses, mask, a.base, a.len, size) else { break };
        rest &= !mask;
        parts.push(Part { index, mask, lanes });
    }
    if outside != 0 {
        return Err(invalid_global(core, inst, space, touch, addresses, outside, size));
    }
    if let Some(first) = parts.first() {
        core.memory.set_hint(inst.pc, first.index);
    }
    Ok(parts)
}

#[cold]
fn invalid_global(
    core: &mut Core<'_>,
    inst: &Inst,
    space: Space,
    touch: Touch,
    addresses: &[u64; 32],
    lanes: u32,
    size: u32,
) -> Flow {
    let first = addresses[lanes.trailing_zeros() as usize & 31];
    let mut detail = core.memory.describe(first, u64::from(size));
    let found = core.memory.find(first, u64::from(size)).map(|index| core.memory.get(index).kind);
    let space = match found {
        Some(Kind::Const) => {
            detail.push_str(", which kernels cannot write");
            Space::Const
        }
        Some(_) if space == Space::Const => {
            detail.push_str(", which is not constant memory");
            space
        }
        _ => space,
    };
    let lines = vec![format!("Invalid {} {} of size {size} bytes", title(space), verb(touch)), detail];
    core.find(Check::Bounds, Fault::IllegalAddress, inst, lanes, lines);
    Flow::Fault
}

/// Lanes of an access to shared memory.
#[inline(always)]
pub(crate) fn in_shared(
    core: &mut Core<'_>,
    inst: &Inst,
    touch: Touch,
    offsets: &[u64; 32],
    mask: u32,
    size: u32,
) -> Result<Lanes, Flow> {
    let len = shared_length(core);
    within(offsets, mask, 0, len, size)
        .ok_or_else(|| past(core, inst, Space::Shared, touch, offsets, mask, size, len))
}

/// Lanes of an access to local memory, as offsets in `Warp::local`.
#[inline(always)]
pub(crate) fn in_local(
    core: &mut Core<'_>,
    inst: &Inst,
    touch: Touch,
    offsets: &[u64; 32],
    mask: u32,
    size: u32,
) -> Result<Lanes, Flow> {
    let frame = core.kernel.local_bytes;
    within(offsets, mask, 0, u64::from(frame), size)
        .map(|lanes| lanes.framed(frame as usize))
        .ok_or_else(|| past(core, inst, Space::Local, touch, offsets, mask, size, u64::from(frame)))
}

/// Lanes of a read of the parameters.
#[inline(always)]
pub(crate) fn in_params(
    core: &mut Core<'_>,
    inst: &Inst,
    touch: Touch,
    offsets: &[u64; 32],
    mask: u32,
    size: u32,
) -> Result<Lanes, Flow> {
    let len = core.params.len() as u64;
    if touch == Touch::Read
        && let Some(lanes) = within(offsets, mask, 0, len, size)
    {
        return Ok(lanes);
    }
    Err(past(core, inst, Space::Param, touch, offsets, mask, size, len))
}

/// Reports an access outside a block's shared memory, a thread's frame or the parameters.
#[cold]
#[allow(clippy::too_many_arguments)]
fn past(
    core: &mut Core<'_>,
    inst: &Inst,
    space: Space,
    touch: Touch,
    offsets: &[u64; 32],
    mask: u32,
    size: u32,
    len: u64,
) -> Flow {
    let outside =
        lanes_where(mask, |lane| offsets[lane].checked_add(u64::from(size)).is_none_or(|end| end > len));
    let memory = match space {
        Space::Shared => format!("the block's {len} bytes of shared memory"),
        Space::Local => format!("the thread's {len} bytes of local memory"),
        _ => format!("the kernel's {len} bytes of parameters"),
    };
    let (lanes, detail) = if outside == 0 {
        (mask, format!("{memory} are read-only"))
    } else {
        let offset = offsets[outside.trailing_zeros() as usize & 31];
        let detail = if offset >= len {
            format!("offset {offset} is {} bytes past the end of {memory}", offset - len)
        } else {
            format!(
                "offset {offset}: the last {} of {size} bytes are past the end of {memory}",
                offset + u64::from(size) - len
            )
        };
        (outside, detail)
    };
    let lines = vec![format!("Invalid {} {} of size {size} bytes", title(space), verb(touch)), detail];
    core.find(Check::Bounds, Fault::IllegalAddress, inst, lanes, lines);
    Flow::Fault
}

/// Splits lanes with generic addresses by the space their address is in; the addresses become offsets there.
pub(crate) fn split_generic(addresses: &[u64; 32], mask: u32) -> [(Space, u32); 4] {
    let window = |base: u64| lanes_where(mask, |lane| addresses[lane] >> 32 == base >> 32);
    let (shared, local, param) = (window(SHARED_WINDOW), window(LOCAL_WINDOW), window(PARAM_WINDOW));
    [
        (Space::Global, mask & !(shared | local | param)),
        (Space::Shared, shared),
        (Space::Local, local),
        (Space::Param, param),
    ]
}

/// How a global access looks to the counters and to the race detector.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GlobalNote {
    /// For the counters.
    pub(crate) kind: GlobalKind,
    /// For the race detector; strong (relaxed, acquire, release) loads and stores count as atomic.
    pub(crate) touch: Touch,
    /// `ld.global.nc`.
    pub(crate) read_only: bool,
    /// Its order changes the result.
    pub(crate) float_atomic: bool,
}

/// Counts a global access and looks for races between blocks.
#[inline(always)]
pub(crate) fn note_global(
    core: &mut Core<'_>,
    inst: &Inst,
    addresses: &[u64; 32],
    mask: u32,
    size: u32,
    note: GlobalNote,
) -> Result<(), Flow> {
    if core.counters.memory {
        core.counters.global(inst.pc, note.kind, addresses, mask, size);
    }
    if core.config.level(Check::Global) == Level::Off && core.config.level(Check::ReadOnly) == Level::Off {
        return Ok(());
    }
    let access = GlobalAccess {
        block: core.block.index,
        warp: core.warp.id,
        pc: inst.pc,
        mask,
        addresses,
        size,
        touch: note.touch,
        read_only: note.read_only,
        float_atomic: note.float_atomic,
    };
    // A releasing store or atomic is a fence and a relaxed one.
    if note.touch == Touch::Atomic && note.kind != GlobalKind::Load && releases(core, inst) {
        core.global_race.fence(core.block.index, core.warp.id);
    }
    match core.global_race.access(&access) {
        None => Ok(()),
        Some(conflict) => conflicts::global(core, inst, &access, &conflict),
    }
}

fn releases(core: &Core<'_>, inst: &Inst) -> bool {
    let text = &core.kernel.meta[inst.pc as usize].text;
    text.split_whitespace().any(|word| word.split('.').any(|w| w == "release" || w == "acq_rel"))
}

/// Looks for races in shared memory and for bytes that an asynchronous copy is about to write. `shadow` are all shadow bits of the
/// access or-ed.
#[inline(always)]
pub(crate) fn note_shared(
    core: &mut Core<'_>,
    inst: &Inst,
    offsets: &[u32; 32],
    mask: u32,
    size: u32,
    touch: Touch,
    values: Option<&[u128; 32]>,
) -> Result<(), Flow> {
    if let Some(race) = &mut core.block.race {
        let access = Access { warp: core.warp.id, pc: inst.pc, mask, offsets, size, touch, values };
        if let Some(conflict) = race.access(&access) {
            return conflicts::shared(core, inst, &conflict);
        }
    }
    Ok(())
}

/// No byte of the access is waiting for an asynchronous copy.
#[inline(always)]
pub(crate) fn not_pending(
    core: &mut Core<'_>,
    inst: &Inst,
    lanes: &Lanes,
    mask: u32,
    touch: Touch,
) -> Result<(), Flow> {
    if core.block.pending.count == 0 || lanes.any_shadow(&core.block.shared_shadow, mask) & PENDING == 0 {
        return Ok(());
    }
    conflicts::pending(core, inst, lanes, mask, touch)
}

/// All checks of an access of `size` bytes at `offsets` in shared memory by the lanes of `mask`: alignment, bounds, pending copies,
/// races. The counters are the caller's (`Counters::shared` or `Counters::matrix_rows`), and so are the bytes:
/// `core.block.shared[offset..offset + size]` exists for every lane of the mask after `Ok`. `values` are what a write writes.
///
/// # Errors
/// `Err(Flow::Fault)` after a report at level error: return it.
pub(crate) fn shared_rows(
    core: &mut Core<'_>,
    inst: &Inst,
    mask: u32,
    offsets: &[u32; 32],
    size: u32,
    touch: Touch,
    values: Option<&[u128; 32]>,
) -> Result<(), Flow> {
    let wide = offsets.map(u64::from);
    aligned(core, inst, Space::Shared, touch, &wide, mask, size)?;
    let lanes = in_shared(core, inst, touch, &wide, mask, size)?;
    not_pending(core, inst, &lanes, mask, touch)?;
    note_shared(core, inst, offsets, mask, size, touch, values)
}
