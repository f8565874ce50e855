//! The search for the first byte that is not zero, written once for vectors of any width.
//!
//! Memory that was scrubbed is zero nearly always, so the search is built for reading everything:
//! whole cache lines are OR-ed together over several lines, and the sum is tested once. Only when a
//! test fails is the byte looked for.
//!
//! Everything is `#[inline(always)]` and has no target feature of its own: the function with the
//! feature that calls it lends its features to what is inlined into it.

use super::LINE;
use crate::arch::barrier::forget_contents;

/// Cache lines that are read between two tests: 512 bytes, enough to hide the test behind the
/// loads.
pub(in crate::arch) const BLOCK_LINES: usize = 8;

/// Bytes that are read between two tests.
const BLOCK: usize = BLOCK_LINES * LINE;

/// A register's worth of memory.
///
/// # Safety of the methods
///
/// Each may only be called where the vector's instructions can be executed. The loads read
/// `size_of::<Self>()` bytes, which must be readable and initialised.
pub(in crate::arch) trait Vector: Copy {
    /// Reads a vector from any address.
    unsafe fn load(ptr: *const u8) -> Self;
    /// Reads a vector from an address that is a multiple of its size.
    unsafe fn load_aligned(ptr: *const u8) -> Self;
    /// Every bit that is set in either vector.
    unsafe fn or(self, other: Self) -> Self;
    /// Whether no bit is set.
    unsafe fn is_zero(self) -> bool;
}

/// How an instruction set tests memory in the two portions that the search is made of.
///
/// # Safety of the methods
///
/// Each may only be called where the instructions can be executed, and what it reads must be
/// readable and initialised.
pub(in crate::arch) trait Scan {
    /// Whether the [`LINE`] bytes at `ptr`, which may have any alignment, are all zero.
    unsafe fn line_is_zero(ptr: *const u8) -> bool;
    /// How many of the `count` blocks of [`BLOCK_LINES`] lines at `ptr`, a multiple of [`LINE`],
    /// are zero before the first that is not.
    unsafe fn zero_blocks(ptr: *const u8, count: usize) -> usize;
}

impl<V: Vector> Scan for V {
    #[inline(always)]
    unsafe fn line_is_zero(ptr: *const u8) -> bool {
        // SAFETY: the caller promises a readable line and the instructions of `V`; `or_line` stays
        // inside the line.
        unsafe { or_line(ptr, V::load).is_zero() }
    }

    #[inline(always)]
    unsafe fn zero_blocks(ptr: *const u8, count: usize) -> usize {
        for block in 0..count {
            // SAFETY: the caller promises `count` readable blocks at a multiple of `LINE`, and
            // `block < count`. A line is a multiple of every vector's size, so each load is
            // aligned.
            let is_zero = unsafe {
                let start = ptr.add(block * BLOCK);
                let line = |index: usize| or_line(start.add(index * LINE), V::load_aligned);
                // Four sums that do not wait for each other.
                let mut sums = [line(0), line(1), line(2), line(3)];
                for index in sums.len()..BLOCK_LINES {
                    let sum = &mut sums[index % 4];
                    *sum = sum.or(line(index));
                }
                sums[0].or(sums[1]).or(sums[2].or(sums[3])).is_zero()
            };
            if !is_zero {
                return block;
            }
        }
        count
    }
}

/// Every bit that is set in any vector of the line at `ptr`.
///
/// # Safety
///
/// The line must be readable and initialised, and `ptr` aligned as `load` asks.
#[inline(always)]
unsafe fn or_line<V: Vector>(ptr: *const u8, load: unsafe fn(*const u8) -> V) -> V {
    // SAFETY: the first vector of the line, which the caller promises.
    let mut sum = unsafe { load(ptr) };
    for index in 1..LINE / size_of::<V>() {
        // SAFETY: `index` counts whole vectors inside the line; each is as aligned as the line.
        sum = unsafe { sum.or(load(ptr.add(index * size_of::<V>()))) };
    }
    sum
}

/// The offset of the first byte of the `len` at `ptr` that is not zero.
///
/// The first and the last line are read from wherever the range starts and ends, overlapping the
/// aligned lines between them: reading a byte twice is cheaper than counting single bytes, and
/// nothing outside the range is read.
///
/// # Safety
///
/// The `len` bytes at `ptr` must be readable and initialised, and the instructions of `S` must be
/// there. With `len` 0 `ptr` may be anything.
#[inline(always)]
pub(in crate::arch) unsafe fn first_nonzero<S: Scan>(ptr: *const u8, len: usize) -> Option<usize> {
    if len == 0 {
        return None;
    }
    // Without this the compiler could answer from what it remembers having stored.
    forget_contents(ptr);
    if len < LINE {
        // SAFETY: exactly the caller's range.
        return unsafe { nonzero_byte(ptr, len) };
    }
    // SAFETY: `len >= LINE`.
    if unsafe { !S::line_is_zero(ptr) } {
        // SAFETY: as above.
        return Some(unsafe { nonzero_byte(ptr, LINE) }.unwrap_or(0));
    }
    // From here on `at` is the offset of the next byte to read; everything before it is zero.
    let mut at = LINE - ptr.addr() % LINE;
    let blocks = (len - at) / BLOCK;
    // SAFETY: `0 < at <= LINE <= len` makes `ptr + at` a multiple of `LINE` inside the range or at
    // its end, and `blocks` blocks fit between there and the end.
    let clean = unsafe { S::zero_blocks(ptr.add(at), blocks) };
    at += clean * BLOCK;
    if clean < blocks {
        // SAFETY: `clean < blocks`, so a whole block starts at `at`.
        return Some(at + unsafe { nonzero_byte(ptr.add(at), BLOCK) }.unwrap_or(0));
    }
    while at < len {
        // The last line overlaps the one before it.
        let start = at.min(len - LINE);
        // SAFETY: `start <= len - LINE`, so a whole line starts there.
        if unsafe { !S::line_is_zero(ptr.add(start)) } {
            // SAFETY: as above.
            return Some(start + unsafe { nonzero_byte(ptr.add(start), LINE) }.unwrap_or(0));
        }
        at += LINE;
    }
    None
}

/// The first byte that is not zero, one byte at a time.
///
/// The searches above call this where a vector was not zero. Should every byte be zero by then,
/// somebody is writing to the memory at the same time, against the contract; they report the start
/// of what they read rather than call it clean.
///
/// # Safety
///
/// The `len` bytes at `ptr` must be readable and initialised.
#[cold]
#[inline(never)]
unsafe fn nonzero_byte(ptr: *const u8, len: usize) -> Option<usize> {
    // SAFETY: `offset < len`, and the caller promises `len` bytes.
    (0..len).find(|&offset| unsafe { ptr.add(offset).read() } != 0)
}
