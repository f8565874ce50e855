//! Which pages can hold data.
//!
//! A page that was never populated has no bytes to scrub, and writing zeros to it would only make the kernel supply it.
//! The question is 'could there be anything', so swapped-out pages count, and so does whatever the kernel cannot tell.
//! What was *written* is never asked: devices and other processes write behind the back of every such tracking.

use super::pass::HostPtr;
use super::plan::push_joined;
use crate::sys::pagemap::Pagemap;
use crate::sys::procmap::{self, Maps};
use crate::sys::{self, Call, fault, fork, map};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Set once the kernel has said that it has no `PAGEMAP_SCAN`.
static NO_PAGEMAP_SCAN: AtomicBool = AtomicBool::new(false);

/// Set once the kernel has said that it has no `PROCMAP_QUERY`.
static NO_PROCMAP_QUERY: AtomicBool = AtomicBool::new(false);

/// A file of the kernel's about this process, kept open: opening it would cost more than many a scrub. It goes on speaking of
/// the address space of the process that opened it, so a forked child opens its own.
type KeptOpen<T> = Mutex<Option<(u64, Arc<T>)>>;

static PAGEMAP: KeptOpen<Pagemap> = Mutex::new(None);
static MAPS: KeptOpen<Maps> = Mutex::new(None);

/// The file that this process opened, opened now if need be.
fn of_this_process<T>(
    file: &KeptOpen<T>,
    call: Call,
    open: fn() -> sys::Result<T>,
) -> sys::Result<Arc<T>> {
    if fault::is_planned(call) {
        return open().map(Arc::new);
    }
    let Ok(here) = fork::address_space() else {
        return open().map(Arc::new);
    };
    let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
    match &*file {
        Some((owner, open)) if *owner == here => Ok(Arc::clone(open)),
        _ => {
            let opened = Arc::new(open()?);
            *file = Some((here, Arc::clone(&opened)));
            Ok(opened)
        }
    }
}

/// This process's pagemap.
pub(crate) fn pagemap() -> sys::Result<Arc<Pagemap>> {
    of_this_process(&PAGEMAP, Call::PagemapOpen, Pagemap::open)
}

/// Opens what [`Residency::of_private_mapping`] needs, as long as it can be had: a VMM may lock itself in after it has built
/// its pools (no `/proc`, no descriptors left, a seccomp filter), and what cannot be asked about is quarantined.
pub(crate) fn get_ready() {
    if fault::is_planned(Call::PagemapOpen) {
        return;
    }
    if let Err(error) = pagemap() {
        log::warn!("populated pages will not be found, and teardowns quarantine: {error}");
    }
}

fn maps() -> sys::Result<Arc<Maps>> {
    of_this_process(&MAPS, Call::MapsOpen, Maps::open)
}

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
        let mut populated = Vec::new();
        populated_pages(
            &*pagemap()?,
            origin + range.start..origin + range.end,
            |found| {
                push_joined(&mut populated, found.start - origin..found.end - origin);
            },
        )?;
        let bytes: usize = populated.iter().map(Range::len).sum();
        Ok(Self {
            populated,
            never_populated: (range.len() - bytes) as u64,
        })
    }

    /// Asks the kernel about memory that somebody else mapped: where it is private and anonymous, as
    /// [`of_private_mapping`](Self::of_private_mapping); everything else, and pages of which only a part belongs to the
    /// range, can hold data. `len` bytes from `base`, in any alignment.
    pub(crate) fn of_foreign_memory(base: HostPtr, len: usize) -> sys::Result<Self> {
        let page = map::host_page_size();
        let origin = base.0.addr();
        let end = origin + len;
        let (first, last) = (origin.next_multiple_of(page).min(end), end / page * page);
        let mut populated = Vec::new();
        let mut add = |found: Range<usize>| {
            if !found.is_empty() {
                push_joined(&mut populated, found.start - origin..found.end - origin);
            }
        };
        add(origin..first);
        if first < last {
            let pagemap = pagemap()?;
            let mut at = first;
            for_each_anonymous(&*maps()?, first..last, |anonymous| {
                add(at..anonymous.start);
                at = anonymous.end;
                populated_pages(&pagemap, anonymous, &mut add)
            })?;
            add(at..last);
        }
        add(last.max(first)..end);
        let bytes: usize = populated.iter().map(Range::len).sum();
        Ok(Self {
            populated,
            never_populated: (len - bytes) as u64,
        })
    }
}

impl Residency {
    /// The whole pages of `[base, base + len)` that are private anonymous memory, as offsets, ascending.
    pub(crate) fn anonymous_parts(base: HostPtr, len: usize) -> sys::Result<Vec<Range<usize>>> {
        let page = map::host_page_size();
        let origin = base.0.addr();
        let (first, last) = (origin.next_multiple_of(page), (origin + len) / page * page);
        let mut parts = Vec::new();
        if first < last {
            for_each_anonymous(&*maps()?, first..last, |part| {
                push_joined(&mut parts, part.start - origin..part.end - origin);
                Ok(())
            })?;
        }
        Ok(parts)
    }
}

/// Calls `found` with each run of populated pages in `addresses`, ascending.
fn populated_pages(
    pagemap: &Pagemap,
    addresses: Range<usize>,
    mut found: impl FnMut(Range<usize>),
) -> sys::Result<()> {
    if !NO_PAGEMAP_SCAN.load(Ordering::Relaxed) {
        // Collected first: a scan that fails half-way is not to be mixed with the other way of asking.
        let mut runs = Vec::new();
        match pagemap.scan(addresses.clone(), |run| runs.push(run)) {
            Ok(()) => {
                runs.into_iter().for_each(found);
                return Ok(());
            }
            Err(error) if error.is_no_such_ioctl() || error.errno() == Some(libc::EINVAL) => {
                if !NO_PAGEMAP_SCAN.swap(true, Ordering::Relaxed) {
                    log::info!("no PAGEMAP_SCAN on this kernel, reading the pagemap instead");
                }
            }
            Err(error) => return Err(error),
        }
    }
    pagemap.read(addresses, map::host_page_size(), &mut found)
}

/// Calls `found` with each part of `addresses` that is private anonymous memory, ascending.
fn for_each_anonymous(
    maps: &Maps,
    addresses: Range<usize>,
    mut found: impl FnMut(Range<usize>) -> sys::Result<()>,
) -> sys::Result<()> {
    let mut part = |mapping: &procmap::Mapping| {
        let part = mapping.range.start.max(addresses.start)..mapping.range.end.min(addresses.end);
        if mapping.private_anonymous && !part.is_empty() {
            found(part)
        } else {
            Ok(())
        }
    };
    if !NO_PROCMAP_QUERY.load(Ordering::Relaxed) {
        let mut at = addresses.start;
        loop {
            match maps.query(at) {
                Ok(Some(mapping)) if mapping.range.start < addresses.end => {
                    part(&mapping)?;
                    at = mapping.range.end;
                    if at >= addresses.end {
                        return Ok(());
                    }
                }
                Ok(_) => return Ok(()),
                Err(error) if error.is_no_such_ioctl() && at == addresses.start => break,
                Err(error) => return Err(error),
            }
        }
        if !NO_PROCMAP_QUERY.swap(true, Ordering::Relaxed) {
            log::info!("no PROCMAP_QUERY on this kernel, reading the list of mappings instead");
        }
    }
    procmap::read_all()?.iter().try_for_each(part)
}

#[cfg(all(test, feature = "vm-memory"))]
mod tests {
    use super::*;
    use crate::backing::{AnonymousArena, BLOCK, Backing};

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
        let arena = AnonymousArena::map(2 * BLOCK, false, None, false).unwrap();
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
        let arena = AnonymousArena::map(2 * BLOCK, false, None, false).unwrap();
        touch(&arena, 3);
        touch(&arena, 520);
        let part = arena.residency(BLOCK..2 * BLOCK).unwrap();
        assert_eq!(pages(&part), vec![520..521]);
        assert_eq!(part.never_populated as usize, BLOCK - PAGE);
    }

    #[test]
    fn more_runs_than_one_answer_holds() {
        let arena = AnonymousArena::map(8 * BLOCK, false, None, false).unwrap();
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
        let arena = AnonymousArena::map(BLOCK, false, None, false).unwrap();
        // SAFETY: the arena is mapped, readable and this test's own.
        unsafe { arena.arena().at(5 * PAGE).read_volatile() };
        let found = arena.residency(0..BLOCK).unwrap();
        // A kernel without PAGEMAP_SCAN cannot tell, and then it counts.
        let blind = NO_PAGEMAP_SCAN.load(Ordering::Relaxed);
        assert_eq!(found.populated.len(), usize::from(blind));
    }

    #[test]
    fn huge_pages_count_whole() {
        let arena = AnonymousArena::map(2 * BLOCK, true, None, false).unwrap();
        touch(&arena, 0);
        let found = arena.residency(0..2 * BLOCK).unwrap();
        // One huge page, or one small page where the host has no huge page to give.
        let bytes: usize = found.populated.iter().map(Range::len).sum();
        assert!(bytes == BLOCK || bytes == PAGE, "{found:?}");
        assert_eq!(found.never_populated as usize, 2 * BLOCK - bytes);
    }

    #[test]
    fn not_knowing_is_an_error_and_never_empty() {
        let arena = AnonymousArena::map(BLOCK, false, None, false).unwrap();
        arena.residency(0..BLOCK).unwrap();
        let asked = if NO_PAGEMAP_SCAN.load(Ordering::Relaxed) {
            Call::PagemapRead
        } else {
            Call::PagemapScan
        };
        for (call, errno) in [(Call::PagemapOpen, libc::EACCES), (asked, libc::ENOMEM)] {
            let _fault = fault::inject(call, 0, 1, errno);
            let error = arena.residency(0..BLOCK).unwrap_err();
            assert_eq!((error.call, error.errno()), (call, Some(errno)));
        }
    }
}
