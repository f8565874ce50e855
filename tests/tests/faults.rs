//! Every system call fails once, at every place where it is made, and from there on for good: nothing panics, the books add
//! up, nobody gets a dirty byte, and whoever asked is told which call it was.
//!
//! Faults belong to a thread, so the pools here scrub on the calling one. What the kernel cannot do is remembered by the
//! whole process, so each walk runs in a child.

use vm_scrub::lease::LeaseError;
use vm_scrub::test_support::{Call, FaultGuard};
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, PoolError};
use vm_scrub_tests::child::{alone, with_huge_pages};
use vm_scrub_tests::numa;
use vm_scrub_tests::walk::walk_calls;
use vm_scrub_tests::{
    assert_adds_up, assert_all_zero, assert_nothing_dirty_left, first_nonzero, pools, quiesce,
    regions, smear, teardown,
};

/// Blocks of each pool.
const BLOCKS: u64 = 6;

/// Unmaps what is left of hugetlb pools that are gone, and says how many mappings that were.
///
/// A window that could not be closed shows a guest's memory for ever, and so keeps the whole file. That is right, and more
/// than a host has pages for if it happens hundreds of times.
fn close_views() -> usize {
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
fn walk(expected: &[Call], mut run: impl FnMut(&dyn Fn() -> FaultGuard, Call, i32, bool) -> bool) {
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

fn built(page_size: PageSize, populate: bool) -> Result<Pool, PoolError> {
    pools::builder(page_size, BLOCKS)
        .threads(1)
        .populate(populate)
        .build()
}

/// The same on a NUMA node. Its threads, which have no faults planned, populate it.
fn built_on(node: u32, page_size: PageSize) -> Result<Pool, PoolError> {
    pools::builder(page_size, BLOCKS).numa_node(node).build()
}

fn a_pool_is_built(page_size: PageSize) {
    let without = [false, true].map(|populate| (None, populate));
    let on_node = numa::node().map(|node| (Some(node), false));
    for (node, populate) in without.into_iter().chain(on_node) {
        let mut calls = vec![Call::Mmap, Call::Madvise];
        if page_size == PageSize::Huge2M {
            calls.extend([Call::MemfdCreate, Call::Ftruncate, Call::Fstat]);
        } else {
            // What finds pins. Without it there is a pool nevertheless.
            calls.extend([
                Call::UffdOpen,
                Call::UffdApi,
                Call::UffdRegister,
                Call::PagemapOpen,
                Call::PagemapScan,
            ]);
        }
        if populate {
            calls.push(Call::Populate);
        }
        if node.is_some() {
            calls.extend([
                Call::NodeRead,
                Call::StatusRead,
                Call::Mbind,
                Call::SchedSetaffinity,
            ]);
        }
        walk(&calls, |faults, call, errno, _| {
            let guard = faults();
            let result = match node {
                Some(node) => built_on(node, page_size),
                None => built(page_size, populate),
            };
            let hits = guard.hits();
            drop(guard);
            match result {
                Err(error) => {
                    assert!(hits > 0, "{error}");
                    assert_ne!(call, Call::SchedSetaffinity, "{error}");
                    let text = error.to_string();
                    let pages = matches!(error, PoolError::NoHugePages { asked: BLOCKS, .. })
                        && text.contains("vm.nr_hugepages");
                    assert!(
                        pages || text.contains(call.name()),
                        "{call:?} {errno}: {text}"
                    );
                    assert_eq!(close_views(), 0, "{call:?} {errno}: memory is left behind");
                }
                Ok(pool) => {
                    let asked = [Call::NodeRead, Call::StatusRead, Call::Mbind].contains(&call);
                    assert!(
                        hits == 0 || !asked,
                        "{call:?} {errno}: a promise is not kept"
                    );
                    assert_eq!(pool.accounts().clean, BLOCKS * BLOCK_SIZE);
                    assert_nothing_dirty_left(&pool);
                }
            }
            hits > 0
        });
    }
}

/// A pool in which everything has been dirty once, and a neighbour in its second block, so that a guest of five blocks lies
/// in two pieces. Two regions, of which the second is the one in two pieces.
fn neighbour(page_size: PageSize, populate: bool) -> (Pool, Lease) {
    let pool = built(page_size, populate).unwrap();
    let first = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let second = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let rest = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    for lease in [&first, &second, &rest] {
        smear(lease, 1);
    }
    assert!(teardown(first).is_proven() && teardown(rest).is_proven());
    (pool, second)
}

const GUEST: [(u64, u64); 2] = [(0, 2 * BLOCK_SIZE), (9 * BLOCK_SIZE, 3 * BLOCK_SIZE)];

/// The books add up, the neighbour has noticed nothing, and no dirty byte can be leased.
#[track_caller]
fn assert_sound(pool: &Pool, neighbour: Lease) {
    let accounts = pool.accounts();
    assert_eq!(accounts.total(), BLOCKS * BLOCK_SIZE);
    assert_eq!((accounts.leased, accounts.dirty), (BLOCK_SIZE, 0));
    assert_eq!(first_nonzero(&neighbour), Some(0));
    assert!(teardown(neighbour).is_proven());
    assert_nothing_dirty_left(pool);
}

fn a_guest_is_leased(page_size: PageSize) {
    // Only a view of a file is populated when it is granted.
    let populated = page_size == PageSize::Huge2M;
    for populate in [false].into_iter().chain(populated.then_some(true)) {
        let calls: &[Call] = match (page_size, populate) {
            (PageSize::Huge2M, true) => &[Call::Fstat, Call::Mmap, Call::Madvise, Call::Populate],
            (PageSize::Huge2M, false) => &[Call::Fstat, Call::Mmap, Call::Madvise],
            // The window is cut from what was reserved for the neighbour.
            _ => &[Call::Mremap],
        };
        walk(calls, |faults, call, errno, once| {
            let (pool, neighbour) = neighbour(page_size, populate);
            let before = pool.accounts();
            let guard = faults();
            let result = pool.lease(&regions(&GUEST));
            let hits = guard.hits();
            drop(guard);
            match result {
                Err(LeaseError::Map { source, bytes }) => {
                    assert!(hits > 0);
                    assert_eq!(
                        (source.call, source.source.raw_os_error()),
                        (call, Some(errno))
                    );
                    assert!(GUEST.iter().any(|region| region.1 == bytes));
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
}

/// The calls that a teardown makes.
fn of_teardown(page_size: PageSize) -> &'static [Call] {
    match page_size {
        PageSize::Huge2M => &[Call::Mmap, Call::Populate],
        _ => &[
            Call::Mprotect,
            Call::Madvise,
            Call::Mremap,
            Call::Munlock,
            Call::UffdMove,
            Call::Mmap,
            Call::PagemapOpen,
            Call::PagemapScan,
            Call::PagemapRead,
        ],
    }
}

fn a_guest_is_torn_down(page_size: PageSize) {
    walk(of_teardown(page_size), |faults, call, errno, once| {
        let (pool, neighbour) = neighbour(page_size, false);
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
        let lost = receipt.bytes_quarantined / BLOCK_SIZE;
        if lost > 0 {
            assert!(hits > 0);
            // One failure costs one piece of the guest at most.
            assert!(
                lost <= if once { 2 } else { 5 },
                "{call:?} {errno}: {lost} blocks"
            );
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
fn a_guest_is_dropped(page_size: PageSize) {
    walk(of_teardown(page_size), |faults, call, errno, _| {
        let (pool, neighbour) = neighbour(page_size, false);
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

macro_rules! walks {
    ($($walk:ident: $base:ident $transparent:ident $huge:ident,)+) => {$(
        #[test]
        fn $base() {
            alone(stringify!($base), || $walk(PageSize::Base4K));
        }

        #[test]
        fn $transparent() {
            alone(stringify!($transparent), || $walk(PageSize::Transparent));
        }

        #[test]
        fn $huge() {
            with_huge_pages(stringify!($huge), numa::huge_pages_for(BLOCKS), || $walk(PageSize::Huge2M));
        }
    )+};
}

walks! {
    a_pool_is_built: build_4k build_thp build_2m,
    a_guest_is_leased: lease_4k lease_thp lease_2m,
    a_guest_is_torn_down: teardown_4k teardown_thp teardown_2m,
    a_guest_is_dropped: drop_4k drop_thp drop_2m,
}
