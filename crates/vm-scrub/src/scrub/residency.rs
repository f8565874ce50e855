//! Which pages can hold data.
//!
//! A page that was never populated has no bytes to scrub, and writing zeros to it would only make the kernel supply it.
//! The question is 'could there be anything', so swapped-out pages count, and so does whatever the kernel cannot tell.
//! What was *written* is never asked: devices and other processes write behind the back of every such tracking.

use super::engine::HostPtr;
use super::plan::push_joined;
use crate::sys::pagemap::Pagemap;
use crate::sys::{self, map};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set once the kernel has said that it has no `PAGEMAP_SCAN`.
static NO_PAGEMAP_SCAN: AtomicBool = AtomicBool::new(false);

/// What is known about a range: where data can be, and how much of it was never populated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Residency {
    /// Ranges that can hold data, as byte offsets; ascending, disjoint, not touching.
    pub(crate) populated: Vec<Range<usize>>,
    /// Bytes that were never populated.
    pub(crate) never_populated: u64,
}

impl Residency {
    /// Every byte of `range` can hold data.
    pub(crate) fn all(range: Range<usize>) -> Self {
        Self {
            populated: vec![range],
            never_populated: 0,
        }
    }

    /// Asks the kernel about a private anonymous mapping of this process, where a page that is neither present nor swapped
    /// out has no bytes. `range` is relative to `base` and page aligned.
    pub(crate) fn of_private_mapping(base: HostPtr, range: Range<usize>) -> sys::Result<Self> {
        let origin = base.0.addr();
        let addresses = origin + range.start..origin + range.end;
        let mut populated = Vec::new();
        let pagemap = Pagemap::open()?;

        let mut scanned = false;
        if !NO_PAGEMAP_SCAN.load(Ordering::Relaxed) {
            let scan = pagemap.scan(addresses.clone(), |found| {
                push_joined(&mut populated, found)
            });
            match scan {
                Ok(()) => scanned = true,
                Err(error) if matches!(error.errno(), Some(libc::ENOTTY | libc::EINVAL)) => {
                    if !NO_PAGEMAP_SCAN.swap(true, Ordering::Relaxed) {
                        log::info!("no PAGEMAP_SCAN on this kernel, reading the pagemap instead");
                    }
                    populated.clear();
                }
                Err(error) => return Err(error),
            }
        }
        if !scanned {
            pagemap.read(addresses, map::host_page_size(), |found| {
                push_joined(&mut populated, found)
            })?;
        }

        for found in &mut populated {
            *found = found.start - origin..found.end - origin;
        }
        let bytes: usize = populated.iter().map(Range::len).sum();
        Ok(Self {
            populated,
            never_populated: (range.len() - bytes) as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backing::{AnonymousArena, BLOCK, Backing};
    use crate::sys::fault;

    const PAGE: usize = 4096;

    fn touch(arena: &AnonymousArena, page: usize) {
        // SAFETY: the arena is mapped, writable and this test's own.
        unsafe { arena.arena().at(page * PAGE).write_volatile(1) };
    }

    fn pages(of: &Residency) -> Vec<Range<usize>> {
        of.populated
            .iter()
            .map(|range| range.start / PAGE..range.end / PAGE)
            .collect()
    }

    /// Every page pattern is seen the same way by `PAGEMAP_SCAN` and by reading the pagemap.
    #[test]
    fn populated_pages_are_found_by_both_ways_of_asking() {
        let arena = AnonymousArena::map(2 * BLOCK, false).unwrap();
        for page in [0, 1, 2, 7, 511, 512, 600, 1023] {
            touch(&arena, page);
        }
        let expected = vec![0..3, 7..8, 511..513, 600..601, 1023..1024];
        let by_scan = arena.residency(0..2 * BLOCK).unwrap();
        assert_eq!(pages(&by_scan), expected);
        assert_eq!(by_scan.never_populated as usize, 2 * BLOCK - 8 * PAGE);

        let pagemap = Pagemap::open().unwrap();
        let origin = arena.arena().0.addr();
        let mut by_reading = Vec::new();
        pagemap
            .read(origin..origin + 2 * BLOCK, PAGE, |found| {
                push_joined(&mut by_reading, found.start - origin..found.end - origin);
            })
            .unwrap();
        assert_eq!(by_reading, by_scan.populated);
    }

    #[test]
    fn a_part_of_the_arena_is_asked_about_by_its_own_offsets() {
        let arena = AnonymousArena::map(2 * BLOCK, false).unwrap();
        touch(&arena, 3);
        touch(&arena, 520);
        let part = arena.residency(BLOCK..2 * BLOCK).unwrap();
        assert_eq!(pages(&part), vec![520..521]);
        assert_eq!(part.never_populated as usize, BLOCK - PAGE);
    }

    #[test]
    fn more_runs_than_one_answer_holds() {
        let arena = AnonymousArena::map(8 * BLOCK, false).unwrap();
        for page in (0..4096).step_by(2) {
            touch(&arena, page);
        }
        let found = arena.residency(0..8 * BLOCK).unwrap();
        assert_eq!(found.populated.len(), 2048);
        assert!(
            found
                .populated
                .iter()
                .all(|range| range.len() == PAGE && range.start % (2 * PAGE) == 0)
        );
    }

    #[test]
    fn the_shared_zero_page_holds_no_data() {
        let arena = AnonymousArena::map(BLOCK, false).unwrap();
        // SAFETY: the arena is mapped, readable and this test's own.
        unsafe { arena.arena().at(5 * PAGE).read_volatile() };
        let found = arena.residency(0..BLOCK).unwrap();
        // A kernel without PAGEMAP_SCAN cannot tell, and then it counts.
        let blind = NO_PAGEMAP_SCAN.load(Ordering::Relaxed);
        assert_eq!(found.populated.len(), usize::from(blind));
    }

    #[test]
    fn huge_pages_count_whole() {
        let arena = AnonymousArena::map(2 * BLOCK, true).unwrap();
        touch(&arena, 0);
        let found = arena.residency(0..2 * BLOCK).unwrap();
        // One huge page, or one small page where the host has no huge page to give.
        let bytes: usize = found.populated.iter().map(Range::len).sum();
        assert!(bytes == BLOCK || bytes == PAGE, "{found:?}");
        assert_eq!(found.never_populated as usize, 2 * BLOCK - bytes);
    }

    #[test]
    fn not_knowing_is_an_error_and_never_empty() {
        let arena = AnonymousArena::map(BLOCK, false).unwrap();
        for (call, errno) in [
            (fault::Call::PagemapOpen, libc::EACCES),
            (fault::Call::PagemapScan, libc::ENOMEM),
        ] {
            let _fault = fault::inject(call, 0, 1, errno);
            let error = arena.residency(0..BLOCK).unwrap_err();
            assert_eq!((error.call, error.errno()), (call, Some(errno)));
        }
    }
}
