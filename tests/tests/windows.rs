//! The address space in which a guest's memory appears: aligned, guarded, kept private, and dead for good once torn down.
//!
//! Whether an address is accessible is asked of the kernel (`process_vm_readv`, smaps), so no test has to crash to know.

use std::ops::Range;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, RevokeBy};
use vm_scrub_tests::maps::{is_readable, is_writable, mappings};
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, fill, on_every_page_size, on_small_page_sizes,
    pool, pools, regions, teardown,
};

on_every_page_size!(
    aligned_with_guard_space_on_both_sides: 8,
    a_window_that_was_torn_down_is_dead_and_not_used_again: 4,
    private_on_every_trip_round_the_pool: 8,
    what_a_vmm_did_to_its_window_ends_with_the_lease: 8,
);
on_small_page_sizes!(guard_space_begins_where_a_short_region_ends);

const BLOCK: usize = BLOCK_SIZE as usize;

fn windows(lease: &Lease) -> Vec<Range<usize>> {
    lease
        .host_addresses()
        .into_iter()
        .map(|(region, start)| start.addr()..start.addr() + region.bytes as usize)
        .collect()
}

/// Every byte of `range` would fault. One address a page is asked about, and both ends.
#[track_caller]
fn assert_dead(range: Range<usize>) {
    for address in range.clone().step_by(PAGE).chain([range.end - 1]) {
        assert!(!is_readable(address), "{address:#x} in {range:x?}");
    }
}

const PAGE: usize = 4096;

fn aligned_with_guard_space_on_both_sides(page_size: PageSize) {
    let pool = pool(page_size, 8);
    let layout = regions(&[
        (0, BLOCK_SIZE),
        (BLOCK_SIZE, 3 * BLOCK_SIZE),
        (9 * BLOCK_SIZE, 2 * BLOCK_SIZE),
    ]);
    let lease = pool.lease(&layout).unwrap();
    for window in windows(&lease) {
        assert_eq!(window.start % BLOCK, 0);
        assert!(is_readable(window.start) && is_writable(window.end - 1, 1));
        assert_dead(window.start - BLOCK..window.start);
        assert_dead(window.end..window.end + BLOCK);
        for mapping in mappings(window.start - BLOCK..window.end + BLOCK) {
            let inside = window.contains(&mapping.range.start);
            let expected = if inside { "rw-" } else { "---" };
            assert_eq!(&mapping.permissions[..3], expected, "{mapping:?}");
        }
    }
    assert!(teardown(lease).is_proven());
}

fn guard_space_begins_where_a_short_region_ends(page_size: PageSize) {
    let pool = pool(page_size, 2);
    for bytes in [PAGE, BLOCK - PAGE, BLOCK + PAGE] {
        let lease = pool.lease(&regions(&[(0, bytes as u64)])).unwrap();
        let [window] = &windows(&lease)[..] else {
            panic!("one region, one window");
        };
        assert!(is_writable(window.end - 1, 1));
        assert_dead(window.end..window.end + BLOCK);
        assert!(teardown(lease).is_proven());
    }
}

fn a_window_that_was_torn_down_is_dead_and_not_used_again(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let mut gone: Vec<Range<usize>> = Vec::new();
    for generation in 0..8 {
        let layout = regions(&[(0, BLOCK_SIZE), (4 * BLOCK_SIZE, 3 * BLOCK_SIZE)]);
        let lease = pool.lease(&layout).unwrap();
        let now = windows(&lease);
        for window in &now {
            for old in &gone {
                assert!(
                    window.end <= old.start || old.end <= window.start,
                    "generation {generation}: {window:x?} was a window before"
                );
            }
        }
        fill(&lease, generation);
        assert!(teardown(lease).is_proven());
        gone.extend(now);
        for old in &gone {
            assert_dead(old.clone());
            assert!(!is_writable(old.start, 1), "a forgotten pointer writes");
            for mapping in mappings(old.clone()) {
                assert_eq!(&mapping.permissions[..3], "---", "{mapping:?}");
                assert_eq!(mapping.resident, 0);
            }
        }
    }
}

/// Not in core dumps, not in children, never merged with equal pages.
#[track_caller]
fn assert_private(lease: &Lease) {
    for window in windows(lease) {
        let inside = mappings(window.clone());
        assert!(!inside.is_empty());
        for mapping in inside {
            assert!(mapping.has("dd"), "dumped: {mapping:?}");
            assert!(mapping.has("dc"), "inherited: {mapping:?}");
            assert!(!mapping.has("mg"), "mergeable: {mapping:?}");
        }
    }
}

fn private_on_every_trip_round_the_pool(page_size: PageSize) {
    let pool = pool(page_size, 8);
    let layouts = [
        regions(&[(0, 8 * BLOCK_SIZE)]),
        regions(&[(0, 3 * BLOCK_SIZE), (3 * BLOCK_SIZE, 5 * BLOCK_SIZE)]),
        regions(&[(0, BLOCK_SIZE)]),
    ];
    for generation in 0..6 {
        let lease = pool.lease(&layouts[generation % 3]).unwrap();
        assert_private(&lease);
        fill(&lease, 1);
        assert_private(&lease);
        assert!(teardown(lease).is_proven());
    }
}

/// `asm-generic/mman-common.h`; every access to such a page is a SIGSEGV. Linux 6.13.
const MADV_GUARD_INSTALL: libc::c_int = 102;

/// A VMM may protect, advise and share what it was leased. The next guest must find its memory as if nobody had.
fn what_a_vmm_did_to_its_window_ends_with_the_lease(page_size: PageSize) {
    what_was_done_ends_with_the_lease(&pool(page_size, 8));
    if page_size != PageSize::Huge2M {
        // Which takes with it what was said of the window, where moving pages leaves it behind.
        let builder = pools::builder(page_size, 8).revoke_by(RevokeBy::Mremap);
        what_was_done_ends_with_the_lease(&builder.build().unwrap());
    }
}

fn what_was_done_ends_with_the_lease(pool: &Pool) {
    let layout = regions(&[(0, 8 * BLOCK_SIZE)]);
    for advice in [
        libc::MADV_MERGEABLE,
        libc::MADV_DOFORK,
        libc::MADV_DODUMP,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_HUGEPAGE,
        MADV_GUARD_INSTALL,
    ] {
        let lease = pool.lease(&layout).unwrap();
        assert_private(&lease);
        fill(&lease, 1);
        let (_, start) = lease.host_addresses()[0];
        let middle = start.wrapping_add(BLOCK);
        // SAFETY: both ranges lie in the lease's window, to which nobody holds a reference. Not every kernel knows every
        // advice for every kind of memory; one that is refused changes nothing.
        unsafe {
            libc::madvise(middle.cast(), 2 * BLOCK, advice);
            let read_only = middle.wrapping_add(3 * BLOCK);
            assert_eq!(libc::mprotect(read_only.cast(), BLOCK, libc::PROT_READ), 0);
        }
        assert!(teardown(lease).is_proven(), "advice {advice}");

        let lease = pool.lease(&layout).unwrap();
        assert_private(&lease);
        assert_all_zero(&lease);
        fill(&lease, 2);
        let inside: Vec<_> = windows(&lease).into_iter().flat_map(mappings).collect();
        let uniform = inside
            .iter()
            .all(|mapping| mapping.flags == inside[0].flags);
        assert!(uniform, "advice {advice} outlived its lease: {inside:?}");
        assert!(teardown(lease).is_proven());
    }
    assert_nothing_dirty_left(pool);
}
