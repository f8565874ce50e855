//! Every system call fails, at every place where it is made: when a guest is leased, torn down or dropped, in any pool.

use crate::maps::has_uffdio_move;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use vm_scrub::lease::LeaseError;
use vm_scrub::test_support::{Call, FaultGuard, inject};
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, PoolBuilder};

use crate::{
    assert_adds_up, assert_all_zero, assert_nothing_dirty_left, first_nonzero, quiesce, regions,
    smear, teardown,
};

/// Blocks of each pool.
pub const BLOCKS: u64 = 5;

/// `EINVAL` comes last: as the answer to `PAGEMAP_SCAN` it means that the kernel has no such thing, for ever.
const ERRNOS: [i32; 5] = [
    libc::ENOMEM,
    libc::EFAULT,
    libc::EINTR,
    libc::EAGAIN,
    libc::EINVAL,
];

/// Makes tests out of walks that take a [`PageSize`]: each in a process of its own, for which `pages` hugetlb pages are free if that is
/// its size.
#[macro_export]
macro_rules! walks {
    ($pages:expr; $($walk:ident: $($test:ident $size:ident),+;)+) => {$($(
        #[test]
        fn $test() {
            let walk = || $walk(PageSize::$size);
            match PageSize::$size {
                PageSize::Huge2M => $crate::child::with_huge_pages(stringify!($test), $pages, walk),
                _ => $crate::child::alone(stringify!($test), walk),
            }
        }
    )+)+};
}

/// Calls `run` with every call, error, first occurrence and whether it is once or for good; it says whether the fault was met
/// at all. Those that are met must be the `expected` ones: a call that is new wants a look at what its failure does.
pub fn walk_calls(
    expected: &[Call],
    mut run: impl FnMut(&dyn Fn() -> FaultGuard, Call, i32, bool) -> bool,
) {
    let mut met = HashSet::new();
    // How often each call is made, until a fault changes that: where it is known, no run is needed to find that there is no further one.
    let mut made = HashMap::new();
    for errno in ERRNOS {
        // After some of these other calls are made.
        if errno == libc::EINVAL {
            made.clear();
        }
        for call in Call::ALL.iter().copied() {
            for times in [1, u32::MAX] {
                // For good, two are enough: one that the code retries on somewhere, and one that it does not.
                if times > 1 && ![libc::ENOMEM, libc::EINVAL].contains(&errno) {
                    continue;
                }
                // The next occurrence, until there is none.
                let mut skip = 0;
                while made.get(&call).is_none_or(|&made| skip < made) {
                    let faults = || inject(call, skip, times, errno);
                    if !run(&faults, call, errno, times == 1) {
                        made.insert(call, skip);
                        break;
                    }
                    met.insert(call);
                    skip = if skip >= few(call, errno, times) {
                        4 * skip
                    } else {
                        skip + 1
                    };
                }
            }
        }
    }
    // An older kernel is asked otherwise, and has less that has to be asked about.
    let depends = |call: &Call| !has_uffdio_move() && DEPEND_ON_THE_KERNEL.contains(call);
    met.retain(|call| !depends(call));
    let expected = expected.iter().copied();
    assert_eq!(met, expected.filter(|call| !depends(call)).collect());
}

/// From which occurrence on only some are met. But for [`Call::Touch`], `ENOMEM` is met at all of them, `EINVAL` at all of them once, and
/// everything where all are asked for: walks take minutes.
fn few(call: Call, errno: i32, times: u32) -> u32 {
    let every = std::env::var_os(EVERY).is_some()
        || errno == libc::ENOMEM
        || (errno == libc::EINVAL && times == 1);
    // Where every page is touched, what comes of one is what comes of the next.
    if call != Call::Touch && every {
        u32::MAX
    } else {
        4
    }
}

/// Set to have every error at every occurrence of every call but [`Call::Touch`].
const EVERY: &str = "VM_SCRUB_EVERY_FAULT";

/// Calls of which a kernel without `UFFDIO_MOVE` sees more or fewer.
const DEPEND_ON_THE_KERNEL: [Call; 13] = [
    Call::Getrlimit,
    Call::Populate,
    Call::PopulateRead,
    Call::Touch,
    Call::Fstat,
    Call::PagemapOpen,
    Call::PagemapScan,
    Call::PagemapRead,
    Call::UffdDevice,
    Call::UffdApi,
    Call::UffdRegister,
    Call::UffdUnregister,
    Call::UffdMove,
];

/// Unmaps what is left of hugetlb pools that are gone, and says how many mappings that were.
///
/// A window that could not be closed shows a guest's memory for ever, and so keeps the whole file. That is right, and more
/// than a host has pages for if it happens hundreds of times.
pub fn close_views() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let views = maps.lines().filter(|line| line.contains("memfd:vm-scrub"));
    views
        .map(|line| {
            let (start, rest) = line.split_once('-').unwrap();
            let end = rest.split(' ').next().unwrap();
            let address = |text| usize::from_str_radix(text, 16).unwrap();
            let (start, end) = (address(start), address(end));
            let from = std::ptr::without_provenance_mut(start);
            // SAFETY: a view of a pool that is gone, in a process with one test: nobody refers to it.
            assert_eq!(unsafe { libc::munmap(from, end - start) }, 0);
        })
        .count()
}

/// As [`walk_calls`], in a process that has not more and more of its memory in windows that could not be closed.
pub fn walk(
    expected: &[Call],
    mut run: impl FnMut(&dyn Fn() -> FaultGuard, Call, i32, bool) -> bool,
) {
    walk_calls(expected, |faults, call, errno, once| {
        let hit = run(faults, call, errno, once);
        let left = close_views();
        assert!(
            hit || left == 0,
            "memory is left behind though nothing failed"
        );
        hit
    });
}

/// A pool in which everything has been dirty once, and a neighbour in its second block, so that a guest of four blocks lies
/// in two pieces. Two regions, of which the second is the one in two pieces.
pub fn neighbour(builder: PoolBuilder) -> (Pool, Lease) {
    let pool = builder.threads(1).build().unwrap();
    let first = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let second = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let rest = pool.lease(&regions(&[(0, 3 * BLOCK_SIZE)])).unwrap();
    for lease in [&first, &second, &rest] {
        smear(lease, 1);
    }
    assert!(teardown(first).is_proven() && teardown(rest).is_proven());
    (pool, second)
}

/// The calls that a teardown makes for memory that is no file of its own.
pub fn of_teardown(page_size: PageSize) -> &'static [Call] {
    match page_size {
        PageSize::Huge2M => &[Call::Mmap, Call::Populate],
        _ => &[
            Call::Mprotect,
            Call::Madvise,
            Call::Mremap,
            Call::Munlock,
            Call::UffdMove,
            Call::Mmap,
            Call::Getrlimit,
            Call::Fstat,
            Call::PagemapOpen,
            Call::PagemapScan,
            Call::PagemapRead,
            // Looking whether this is a forked child, whose pagemap is another one.
            Call::WipeOnFork,
        ],
    }
}

/// A guest's regions.
pub const GUEST: [(u64, u64); 2] = [(0, 2 * BLOCK_SIZE), (9 * BLOCK_SIZE, 2 * BLOCK_SIZE)];

/// What of it is revoked at a time: in one region, and in one piece of the pool.
const PIECES: [Range<u64>; 3] = [
    0..2 * BLOCK_SIZE,
    9 * BLOCK_SIZE..10 * BLOCK_SIZE,
    10 * BLOCK_SIZE..11 * BLOCK_SIZE,
];

/// The books add up, the neighbour has noticed nothing, and no dirty byte can be leased.
#[track_caller]
pub fn assert_sound(pool: &Pool, neighbour: Lease) {
    let accounts = pool.accounts();
    assert_eq!(accounts.total(), BLOCKS * BLOCK_SIZE);
    assert_eq!((accounts.leased, accounts.dirty), (BLOCK_SIZE, 0));
    assert_eq!(first_nonzero(&neighbour), Some(0));
    assert!(teardown(neighbour).is_proven());
    assert_nothing_dirty_left(pool);
}

/// A guest is leased from such a pool, which makes the `calls`.
pub fn a_guest_is_leased(calls: &[Call], builder: impl Fn() -> PoolBuilder) {
    walk(calls, |faults, call, errno, once| {
        let (pool, neighbour) = neighbour(builder());
        let before = pool.accounts();
        let guard = faults();
        let result = pool.lease(&regions(&GUEST));
        let hits = guard.hits();
        drop(guard);
        match result {
            Err(
                LeaseError::Map { source, .. }
                | LeaseError::Lock { source, .. }
                | LeaseError::NotChecked { source },
            ) => {
                assert!(hits > 0);
                assert_eq!(
                    (source.call, source.source.raw_os_error()),
                    (call, Some(errno))
                );
                if once {
                    assert_eq!(
                        pool.accounts(),
                        before,
                        "{call:?}: the pool is not as it was"
                    );
                }
            }
            Err(error) => panic!("{call:?} {errno}: {error}"),
            Ok(lease) => {
                assert_all_zero(&lease);
                smear(&lease, 2);
                assert!(teardown(lease).is_proven(), "{call:?} {errno}");
            }
        }
        assert_sound(&pool, neighbour);
        hits > 0
    });
}

/// A guest is torn down in such a pool, which makes the `calls`.
pub fn a_guest_is_torn_down(calls: &[Call], builder: impl Fn() -> PoolBuilder) {
    walk(calls, |faults, call, errno, once| {
        let (pool, neighbour) = neighbour(builder());
        let lease = pool.lease(&regions(&GUEST)).unwrap();
        assert_eq!(lease.blocks().len(), 2);
        smear(&lease, 2);
        let quiesced = quiesce(&lease);
        let guard = faults();
        let result = lease.teardown(quiesced);
        let hits = guard.hits();
        drop(guard);
        let receipt = result.unwrap_or_else(|error| panic!("{call:?} {errno}: {error}"));
        assert_adds_up(&receipt);
        assert_eq!(pool.accounts().quarantined, receipt.bytes_quarantined);
        if receipt.bytes_quarantined > 0 {
            assert!(hits > 0);
            // One failure costs one piece of the guest at most.
            let costs_one = PIECES.iter().any(|piece| {
                let mut lost = receipt.quarantined.iter();
                lost.all(|range| {
                    piece.contains(&range.guest_address)
                        && range.bytes <= piece.end - range.guest_address
                })
            });
            assert!(costs_one || !once, "{call:?} {errno}: {receipt:?}");
            for range in &receipt.quarantined {
                assert!(
                    range.detail.contains(call.name()),
                    "{call:?} {errno}: {range:?}"
                );
            }
        }
        assert_sound(&pool, neighbour);
        hits > 0
    });
}

/// What a lease that is dropped does by itself. Nobody has seen this one, so it is scrubbed.
pub fn a_guest_is_dropped(calls: &[Call], builder: impl Fn() -> PoolBuilder) {
    walk(calls, |faults, call, errno, _| {
        let (pool, neighbour) = neighbour(builder());
        let lease = pool.lease(&regions(&GUEST)).unwrap();
        let guard = faults();
        drop(lease);
        let hits = guard.hits();
        drop(guard);
        let quarantined = pool.accounts().quarantined;
        assert!(hits > 0 || quarantined == 0, "{call:?} {errno}");
        assert_sound(&pool, neighbour);
        hits > 0
    });
}
