//! The parts that all loops share, where the loops themselves can't show a fault.

use crate::arch::generic::LINE;
use crate::arch::generic::lines::split;
use crate::arch::generic::verify::{BLOCK_LINES, Scan, first_nonzero};

#[test]
fn whole_lines_are_found_at_every_alignment() {
    // Two million ranges are too many for an interpreter.
    let sizes: &[usize] = if cfg!(miri) { &[16] } else { &[16, 64, 512] };
    for &line in sizes {
        for addr in 0..2 * line {
            for len in 0..4 * line + 3 {
                let (head, lines) = split(addr, len, line);
                let tail = len - head - lines * line;
                assert!(head < line && tail < line, "{addr} {len} {line}");
                assert!(
                    lines == 0 || (addr + head).is_multiple_of(line),
                    "{addr} {len} {line}"
                );
                // Head and tail together could hide a whole line only if none starts in the range.
                let first = addr.next_multiple_of(line);
                let whole = (addr + len).saturating_sub(first) / line;
                assert_eq!(lines, whole, "{addr} {len} {line}");
            }
        }
    }
}

#[test]
fn a_range_may_end_where_addresses_do() {
    assert_eq!(split(usize::MAX - 9, 10, 64), (10, 0));
    assert_eq!(split(usize::MAX - 127, 128, 64), (0, 2));
    assert_eq!(split(usize::MAX - 69, 70, 64), (6, 1));
}

/// Calls one portion dirty, whatever it holds: what a loop sees when a byte is set while it reads
/// and cleared again before it looks for it.
struct Racing<const IN: u8>;

const FIRST_LINE: u8 = 0;
const SECOND_BLOCK: u8 = 1;
const LAST_LINE: u8 = 2;

impl<const IN: u8> Scan for Racing<IN> {
    unsafe fn line_is_zero(ptr: *const u8) -> bool {
        let is_first = ptr.addr().is_multiple_of(4096);
        IN != if is_first { FIRST_LINE } else { LAST_LINE }
    }

    unsafe fn zero_blocks(_: *const u8, count: usize) -> usize {
        if IN == SECOND_BLOCK { 1 } else { count }
    }
}

#[test]
fn memory_that_changes_while_it_is_read_is_never_called_clean() {
    #[repr(align(4096))]
    struct Page([u8; 4096]);
    let page = Page([0; 4096]);
    let ptr = page.0.as_ptr();
    let block = BLOCK_LINES * LINE;
    let len = LINE + 3 * block + 1;
    // SAFETY: the range is a part of the page, which is initialised; the stand-ins execute no
    // special instruction.
    let found = unsafe {
        [
            first_nonzero::<Racing<FIRST_LINE>>(ptr, len),
            first_nonzero::<Racing<SECOND_BLOCK>>(ptr, len),
            first_nonzero::<Racing<LAST_LINE>>(ptr, len),
        ]
    };
    assert_eq!(found, [Some(0), Some(LINE + block), Some(len - LINE)]);
}
