//! One attempt to move what is in the lock into the arena, by `UFFDIO_MOVE`.
//!
//! What is to be moved, and what could not be, is asked of the kernel before and after ([`Round::look`]) and not concluded
//! from what the moves have answered.
//!
//! A huge page that is mapped in parts (somebody changed or discarded a piece of it, or a region ends within it) is split by
//! the kernel before it moves. If a page of it is pinned that fails, and up to Linux 6.18 the kernel then tries again for as
//! long as the pin lasts, whatever is asked of it meanwhile. Such a page looks like small ones. So small pages are moved this
//! way only where all pages are small, and are *unproven* elsewhere: moved by `mremap(2)`, which does not ask for pins.

use super::BLOCK;
use super::isolation::Isolation;
use crate::arch::VerifyLoop;
use crate::scrub::{HostPtr, intersections, joined, pagemap, pieces, push_joined};
use crate::sys::pagemap::Pagemap;
use crate::sys::{self, map};
use std::ops::Range;

const PAGE: usize = 4096;

/// The most, in bytes, that is moved by one call. The kernel holds back everybody who would change the arena's mapping, and
/// behind them all page faults of the process, for as long as the call takes: 0.3 ms for 4 KiB pages.
const LARGEST_MOVE: usize = 8 << 20;

/// The longest gap, in bytes, that is taken along: to look at 16 pages that are not there costs the kernel less than another
/// call.
const BRIDGED: usize = 16 * PAGE;

/// What is in a range of the lock: arena offsets, ascending, disjoint.
#[derive(Debug, Default)]
pub(super) struct Round {
    small: Vec<Range<usize>>,
    huge: Vec<Range<usize>>,
    /// What cannot be moved with proof, found while moving.
    failed: Vec<Range<usize>>,
    /// The last answer of the kernel about a page that it did not let go.
    refusal: String,
    small_pages: bool,
    range: Range<usize>,
    /// Whether every page is in memory: there are no guard pages then.
    pub(super) all_present: bool,
}

impl Round {
    /// Asks the kernel what is in `range` of the lock.
    pub(super) fn look(isolation: &Isolation, range: Range<usize>) -> sys::Result<Self> {
        let origin = isolation.lock.0.addr();
        let mut round = Self {
            range: range.clone(),
            all_present: true,
            ..Self::default()
        };
        let pagemap = pagemap()?;
        pagemap.scan_kinds(origin + range.start..origin + range.end, |found, kind| {
            round.all_present &= kind.present;
            let found = found.start - origin..found.end - origin;
            let whole = found.start.is_multiple_of(BLOCK) && found.end.is_multiple_of(BLOCK);
            let runs = if kind.huge && whole {
                &mut round.huge
            } else {
                &mut round.small
            };
            push_joined(runs, found);
        })?;
        let mut real = Vec::with_capacity(round.huge.len());
        for block in pieces(&round.huge, BLOCK) {
            // SAFETY: the block is populated, and in the lock.
            if !unsafe { discard_zero_page(&pagemap, isolation.lock.at(block.start)) }? {
                push_joined(&mut real, block);
            }
        }
        round.huge = real;
        round.small_pages = isolation.small_pages && round.huge.is_empty();
        Ok(round)
    }

    /// Whether there is nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.small.is_empty() && self.huge.is_empty()
    }

    /// Everything that there is, ascending.
    pub(super) fn ranges(mut self) -> Vec<Range<usize>> {
        self.small.append(&mut self.huge);
        self.small.sort_by_key(|range| range.start);
        let mut joined = Vec::new();
        for range in self.small {
            push_joined(&mut joined, range);
        }
        joined
    }

    /// Ranges in which nothing can be moved with proof, and nothing has been in this round: ascending.
    pub(super) fn unproven(&self) -> Vec<Range<usize>> {
        let mut ranges = self.failed.clone();
        if !self.small_pages {
            ranges.extend(blocks_around(&self.small, &self.range));
        }
        ranges.sort_by_key(|range| range.start);
        ranges
    }

    /// Forgets what lies in `ranges` (ascending, disjoint), and says in which of them there was something; or, where something may
    /// have come home from between, what `exactly` there was.
    pub(super) fn forget(&mut self, ranges: Vec<Range<usize>>, exactly: bool) -> Vec<Range<usize>> {
        let found = |range: &Range<usize>| -> Vec<Range<usize>> {
            let runs = [&self.small, &self.huge].into_iter();
            let found = runs.flat_map(|runs| intersections(range, runs));
            found.collect()
        };
        let ranges: Vec<Range<usize>> = if exactly {
            joined(ranges.iter().flat_map(found))
        } else {
            let has_some = |range: &Range<usize>| !found(range).is_empty();
            ranges.into_iter().filter(has_some).collect()
        };
        for runs in [&mut self.small, &mut self.huge] {
            let mut rest = Vec::new();
            for run in runs.iter() {
                let mut at = run.start;
                for gone in intersections(run, &ranges) {
                    if at < gone.start {
                        rest.push(at..gone.start);
                    }
                    at = gone.end;
                }
                if at < run.end {
                    rest.push(at..run.end);
                }
            }
            *runs = rest;
        }
        ranges
    }

    /// What the kernel answered about a page that it did not let go.
    pub(super) fn refusal(self) -> String {
        self.refusal
    }

    /// Moves as much of it as the kernel lets go. On the calling thread: the pages of a pool have one lock in the kernel, which it
    /// takes for each of them, so that two threads are no faster than one (measured on Zen 4 and on Cascade Lake).
    ///
    /// # Safety
    /// What was found must still be in the lock, its places in the arena empty, and nobody may hold a Rust reference into
    /// either.
    pub(super) unsafe fn go(&mut self, isolation: &Isolation) {
        for piece in pieces(&self.huge, LARGEST_MOVE) {
            // SAFETY: passed on to the caller; each piece is taken once.
            unsafe { self.move_piece(isolation, piece, BLOCK) };
        }
        if self.small_pages {
            for piece in pieces(&bridged(&self.small), LARGEST_MOVE) {
                // SAFETY: as above.
                unsafe { self.move_piece(isolation, piece, PAGE) };
            }
        }
    }

    /// Moves a piece that consists of pages of `unit` bytes.
    ///
    /// # Safety
    /// As for [`Round::go`].
    unsafe fn move_piece(&mut self, isolation: &Isolation, piece: Range<usize>, unit: usize) {
        let mut at = piece.start;
        let mut step = piece.len();
        while at < piece.end {
            let len = step.min(piece.end - at);
            let (from, to) = (isolation.lock.at(at), isolation.arena.at(at));
            // SAFETY: passed on to the caller. Whole huge pages are moved as such, and small ones only where there are no
            // others, so that no huge page is split.
            let moved = unsafe { isolation.userfaultfd.move_pages(from, to, len) };
            at += moved.bytes;
            let Some(error) = moved.stopped else {
                continue;
            };
            if moved.bytes > 0 {
                // Why it stopped is the answer to the next call.
                continue;
            }
            match error.errno() {
                // Pinned or shared, or busy for a moment; or it was moved, and the kernel has lost count.
                Some(libc::EBUSY | libc::EAGAIN | libc::EINTR | libc::EEXIST | libc::ENOENT) => {
                    self.refusal = error.to_string();
                    at += unit;
                }
                // Perhaps a border between two mappings, which a VMM's advice about a part of its memory has left.
                Some(libc::EINVAL) if len > unit => {
                    step = (len / 2).next_multiple_of(unit);
                }
                _ => {
                    self.failed.push(at..piece.end);
                    return;
                }
            }
        }
    }
}

/// The blocks in which the ascending `runs` lie, as far as they belong to `range`.
fn blocks_around(runs: &[Range<usize>], range: &Range<usize>) -> Vec<Range<usize>> {
    let mut blocks: Vec<Range<usize>> = Vec::new();
    for run in runs {
        let start = (run.start / BLOCK * BLOCK).max(range.start);
        let end = run.end.next_multiple_of(BLOCK).min(range.end);
        match blocks.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => blocks.push(start..end),
        }
    }
    blocks
}

/// Ranges with the short gaps between them.
fn bridged(ranges: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut joined: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start - last.end <= BRIDGED => last.end = range.end,
            _ => joined.push(range.clone()),
        }
    }
    joined
}

/// Discards the huge page at `address` if it may be the kernel's huge zero page: mapped elsewhere too, and all zero. Says
/// whether it did.
///
/// Newer kernels do not count it as populated; older ones do, and some of them move it wrongly. If it was some other page full
/// of zeros, whoever shares it keeps it, and it is the pool's no more.
///
/// # Safety
/// A huge page must be mapped there, readable, and nobody may hold a Rust reference into it.
unsafe fn discard_zero_page(pagemap: &Pagemap, address: *mut u8) -> sys::Result<bool> {
    if pagemap.is_exclusive(address.addr(), PAGE)? {
        return Ok(false);
    }
    // SAFETY: passed on to the caller.
    unsafe {
        if VerifyLoop::portable()
            .first_nonzero(address, BLOCK)
            .is_some()
        {
            return Ok(false);
        }
        map::advise(HostPtr(address).0, BLOCK, map::Advice::Discard)?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::slice::from_ref;

    #[test]
    fn blocks_around_runs_are_whole_as_far_as_the_range_goes() {
        let range = PAGE..4 * BLOCK - PAGE;
        let of = |runs: &[Range<usize>]| blocks_around(runs, &range);
        assert!(of(&[]).is_empty());
        let one = PAGE..2 * PAGE;
        let same = 5 * PAGE..6 * PAGE;
        let far = 3 * BLOCK + PAGE..3 * BLOCK + 2 * PAGE;
        assert_eq!(
            of(&[one.clone(), same, far]),
            [PAGE..BLOCK, 3 * BLOCK..4 * BLOCK - PAGE]
        );
        // Neighbours are one range, and so is a run over a border.
        let next = BLOCK..BLOCK + PAGE;
        assert_eq!(of(&[one, next]), from_ref(&(PAGE..2 * BLOCK)));
        let across = BLOCK - PAGE..BLOCK + PAGE;
        assert_eq!(of(from_ref(&across)), from_ref(&(PAGE..2 * BLOCK)));
    }

    #[test]
    fn short_gaps_are_taken_along_and_long_ones_are_not() {
        let first = 8 * PAGE..9 * PAGE;
        let at_most = first.end + BRIDGED..first.end + BRIDGED + PAGE;
        let further = at_most.end + BRIDGED + PAGE..at_most.end + BRIDGED + 2 * PAGE;
        assert_eq!(
            bridged(&[first.clone(), at_most.clone(), further.clone()]),
            [first.start..at_most.end, further]
        );
        assert!(bridged(&[]).is_empty());
    }

    #[test]
    fn what_is_forgotten_leaves_no_empty_runs() {
        let mut round = Round {
            small: vec![0..4 * PAGE, 8 * PAGE..12 * PAGE],
            huge: Vec::from_iter(Some(BLOCK..3 * BLOCK)),
            ..Round::default()
        };
        let (head, middle) = (0..PAGE, 9 * PAGE..10 * PAGE);
        let (nothing, tail) = (20 * PAGE..21 * PAGE, 2 * BLOCK..3 * BLOCK);
        let gone = round.forget(
            vec![head.clone(), middle.clone(), nothing, tail.clone()],
            false,
        );
        assert_eq!(gone, [head, middle, tail]);
        assert_eq!(
            round.small,
            [PAGE..4 * PAGE, 8 * PAGE..9 * PAGE, 10 * PAGE..12 * PAGE]
        );
        assert_eq!(round.huge, from_ref(&(BLOCK..2 * BLOCK)));
    }

    #[test]
    fn what_came_home_earlier_is_not_in_what_is_exactly_there() {
        let runs = || Round {
            small: vec![0..PAGE, 2 * PAGE..3 * PAGE],
            huge: Vec::from_iter(Some(BLOCK..2 * BLOCK)),
            ..Round::default()
        };
        let all = || Vec::from_iter(Some(0..2 * BLOCK));
        assert_eq!(runs().forget(all(), false), all());
        let mut round = runs();
        let exactly = round.forget(all(), true);
        assert_eq!(exactly, [0..PAGE, 2 * PAGE..3 * PAGE, BLOCK..2 * BLOCK]);
        assert!(round.is_empty());
    }

    #[test]
    fn a_round_of_nothing_is_the_last_one() {
        let with = |small, huge| Round {
            small,
            huge,
            ..Round::default()
        };
        let some = || Vec::from_iter(Some(0..BLOCK));
        assert!(with(vec![], vec![]).is_empty());
        assert!(!with(some(), vec![]).is_empty());
        assert!(!with(vec![], some()).is_empty());
    }
}
