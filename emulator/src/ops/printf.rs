//! `vprintf` and `__assertfail`.

use super::control::{local_value, read_generic};
use crate::config::Check;
use crate::machine::core::Core;
use crate::machine::inst::{Flow, Inst};
use crate::report::Fault;
use std::io::Write;

fn text(core: &Core<'_>, lane: usize, address: u64) -> String {
    let bytes = read_generic(core, lane, address, 4096).unwrap_or_default();
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

pub(super) fn assert_fail(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    let lane = mask.trailing_zeros() as usize;
    let argument = |n: usize| core.kernel.extra[inst.x as usize + n];
    let (message, file) = (local_value(core, lane, argument(0), 8), local_value(core, lane, argument(1), 8));
    let line = local_value(core, lane, argument(2), 4);
    let function = local_value(core, lane, argument(3), 8);
    let said = format!(
        "{}:{line}: {}: Assertion `{}` failed.",
        text(core, lane, file),
        text(core, lane, function),
        text(core, lane, message)
    );
    core.find(
        Check::Bounds,
        Fault::Assert,
        inst,
        mask,
        vec!["Invalid state: an assertion of the kernel failed".to_owned(), said],
    );
    Flow::Fault
}

pub(super) fn vprintf(core: &mut Core<'_>, inst: &Inst, mask: u32) -> Flow {
    for lane in (0..32).filter(|&lane| mask >> lane & 1 == 1) {
        let argument = |n: usize| core.kernel.extra[inst.x as usize + n];
        let format = local_value(core, lane, argument(0), 8);
        let values = local_value(core, lane, argument(1), 8);
        let format = text(core, lane, format);
        let (line, count) = expand(core, lane, &format, values);
        // A reader that has gone is no fault of the kernel.
        write!(std::io::stdout(), "{line}").ok();
        core.printed.push_str(&line);
        if inst.d != u32::MAX {
            let frame = core.kernel.local_bytes as usize;
            let at = lane * frame + inst.d as usize;
            if let Some(to) = core.warp.local.get_mut(at..at + 4) {
                to.copy_from_slice(&(count as u32).to_le_bytes());
                core.warp.local_shadow[at..at + 4].fill(crate::mem::DEFINED);
            }
        }
    }
    Flow::Next
}

/// A C format with its arguments, which lie one after the other at their own alignment.
fn expand(core: &Core<'_>, lane: usize, format: &str, mut at: u64) -> (String, usize) {
    let mut out = String::new();
    let mut count = 0;
    let mut rest = format.chars().peekable();
    let mut next = |size: u64| {
        at = at.next_multiple_of(size);
        let bytes = read_generic(core, lane, at, size as usize).unwrap_or_default();
        at += size;
        let mut word = [0; 8];
        word[..bytes.len().min(8)].copy_from_slice(&bytes[..bytes.len().min(8)]);
        u64::from_le_bytes(word)
    };
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let (mut flags, mut width, mut precision, mut long) = (String::new(), String::new(), None, false);
        let conversion = loop {
            match rest.next() {
                Some(f @ ('-' | '+' | ' ' | '#')) => flags.push(f),
                Some('0') if width.is_empty() && precision.is_none() => flags.push('0'),
                Some('.') => precision = Some(String::new()),
                Some(digit) if digit.is_ascii_digit() => precision.as_mut().unwrap_or(&mut width).push(digit),
                Some('l' | 'z' | 'j' | 't') => long = true,
                Some('h') => {}
                other => break other,
            }
        };
        count += 1;
        let digits = precision.as_deref().map(|p| p.parse::<usize>().unwrap_or(0).min(64));
        let body = match conversion {
            Some('%') => {
                count -= 1;
                "%".to_owned()
            }
            Some('d' | 'i') => {
                let value = if long { next(8) as i64 } else { i64::from(next(4) as i32) };
                if flags.contains('+') && value >= 0 { format!("+{value}") } else { value.to_string() }
            }
            Some('u') => if long { next(8) } else { next(4) }.to_string(),
            Some('x') => format!("{:x}", if long { next(8) } else { next(4) }),
            Some('X') => format!("{:X}", if long { next(8) } else { next(4) }),
            Some('o') => format!("{:o}", if long { next(8) } else { next(4) }),
            Some('p') => format!("{:#x}", next(8)),
            Some('c') => char::from(next(4) as u8).to_string(),
            Some('s') => {
                let address = next(8);
                text(core, lane, address)
            }
            Some('e' | 'E') => format!("{:.*e}", digits.unwrap_or(6), f64::from_bits(next(8))),
            Some('f' | 'F') => format!("{:.*}", digits.unwrap_or(6), f64::from_bits(next(8))),
            Some('g' | 'G' | 'a' | 'A') => f64::from_bits(next(8)).to_string(),
            Some(other) => format!("%{other}"),
            None => break,
        };
        let wide = width.parse::<usize>().unwrap_or(0).min(256);
        let missing = wide.saturating_sub(body.chars().count());
        if flags.contains('-') {
            out.push_str(&body);
            out.extend(std::iter::repeat_n(' ', missing));
        } else if flags.contains('0') && conversion != Some('s') {
            let (sign, number) = body.strip_prefix('-').map_or(("", body.as_str()), |n| ("-", n));
            out.push_str(sign);
            out.extend(std::iter::repeat_n('0', missing));
            out.push_str(number);
        } else {
            out.extend(std::iter::repeat_n(' ', missing));
            out.push_str(&body);
        }
    }
    (out, count)
}
