//! Cutting a range into whole cache lines and what is left over at either end.
//!
//! The instructions that zero a line at a time need the line's address. What stands before the
//! first whole line and after the last is zeroed with ordinary stores, so that a range of any
//! alignment and length comes out exact.

use crate::arch::all::portable;

/// How many of `len` bytes from `addr` come before the first whole line, and how many whole lines
/// follow.
///
/// `line` is the line's length in bytes, a power of two. Both results are those of the range
/// itself: a range without a whole line has none and is all head, unless it starts on a line, when
/// it is all tail.
pub(in crate::arch) fn split(addr: usize, len: usize, line: usize) -> (usize, usize) {
    // The distance to the next multiple, also where that is 2^64.
    let head = len.min(addr.wrapping_neg() % line);
    (head, (len - head) / line)
}

/// Zeroes the `len` bytes at `ptr`: whole lines with `zero_lines(first line, count)`, the rest with
/// ordinary stores.
///
/// `zero_lines` is called at most once, and only with a count that is not 0.
///
/// # Safety
///
/// The `len` bytes at `ptr` must be writable and nobody else may access them; with `len` 0 `ptr`
/// may be anything. `line` must be a power of two, and `zero_lines` must write nothing but the
/// lines it is given.
#[inline(always)]
pub(in crate::arch) unsafe fn zero(
    ptr: *mut u8,
    len: usize,
    line: usize,
    zero_lines: impl FnOnce(*mut u8, usize),
) {
    let (head, lines) = split(ptr.addr(), len, line);
    // SAFETY: `head <= len`, so the head is inside the caller's range.
    unsafe { portable::zero(ptr, head) };
    let tail = head + lines * line;
    if lines > 0 {
        // SAFETY: `head < len` here, so the first line is inside the range.
        zero_lines(unsafe { ptr.add(head) }, lines);
    }
    if tail < len {
        // SAFETY: `tail < len`, so what is left is the end of the caller's range.
        unsafe { portable::zero(ptr.add(tail), len - tail) };
    }
}
