//! Every system call fails that is made for what a pool does only if it is told to: check memory once more before it is leased,
//! lock it in RAM, give some of it back. See `faults.rs`.

use vm_scrub::test_support::{Call, inject};
use vm_scrub::{PageSize, Policy, PoolBuilder, PoolError};
use vm_scrub_tests::walk::{self, BLOCKS, of_teardown};
use vm_scrub_tests::{pools, walks};

fn checked(page_size: PageSize) -> PoolBuilder {
    pools::builder(page_size, BLOCKS).check_on_grant(true)
}

fn locked(page_size: PageSize) -> PoolBuilder {
    pools::builder(page_size, BLOCKS).lock_memory(true)
}

/// Whether this process may lock so much, or else a word about it.
fn may_lock(page_size: PageSize) -> bool {
    locked(page_size)
        .build()
        .inspect_err(|error| vm_scrub_tests::skipped(error))
        .is_ok()
}

/// Gives everything back, so that the next guest's memory is populated in a locked window.
fn locked_and_not_retained(page_size: PageSize) -> PoolBuilder {
    locked(page_size).policy(Policy::new().retain(0))
}

/// With these and those that `with` names besides.
fn calls(page_size: PageSize, with: &[Call]) -> Vec<Call> {
    [of_teardown(page_size), with].concat()
}

fn a_guest_is_leased_from_checked_memory(page_size: PageSize) {
    let calls: &[Call] = match page_size {
        PageSize::Huge2M => &[
            Call::Fstat,
            Call::Mmap,
            Call::Mprotect,
            Call::Madvise,
            Call::Populate,
        ],
        _ => &[
            Call::Getrlimit,
            Call::Munlock,
            Call::Mremap,
            Call::Fstat,
            Call::PagemapOpen,
            Call::PagemapScan,
            Call::PagemapRead,
            Call::WipeOnFork,
        ],
    };
    walk::a_guest_is_leased(calls, || checked(page_size));
}

fn a_guest_in_checked_memory_is_torn_down(page_size: PageSize) {
    walk::a_guest_is_torn_down(&calls(page_size, &[]), || checked(page_size));
}

fn a_pool_is_locked(page_size: PageSize) {
    if !may_lock(page_size) {
        return;
    }
    for skip in 0.. {
        let fault = inject(Call::Mlock, skip, 1, libc::ENOMEM);
        let result = locked(page_size).build();
        let hits = fault.hits();
        drop(fault);
        let Err(error) = result else {
            assert_eq!((skip, hits), (1, 0), "a promise is not kept");
            return;
        };
        assert!(matches!(error, PoolError::Lock { .. }), "{error}");
        assert!(hits > 0 && error.to_string().contains(Call::Mlock.name()));
    }
}

fn a_guest_is_leased_from_locked_memory(page_size: PageSize) {
    let calls = [Call::Getrlimit, Call::Mremap, Call::Munlock, Call::Mlock];
    if may_lock(page_size) {
        walk::a_guest_is_leased(&calls, || locked(page_size));
    }
}

fn a_guest_in_locked_memory_is_torn_down(page_size: PageSize) {
    let calls = calls(page_size, &[Call::Mlock, Call::DiscardLocked]);
    if may_lock(page_size) {
        walk::a_guest_is_torn_down(&calls, || locked_and_not_retained(page_size));
    }
}

fn a_guest_in_locked_memory_is_dropped(page_size: PageSize) {
    // It has touched nothing, so there is nothing to be given back.
    let calls = calls(page_size, &[Call::Mlock]);
    if may_lock(page_size) {
        walk::a_guest_is_dropped(&calls, || locked(page_size));
    }
}

walks! {
    2 * BLOCKS;
    a_guest_is_leased_from_checked_memory: checked_lease_4k Base4K, checked_lease_thp Transparent, checked_lease_2m Huge2M;
    a_guest_in_checked_memory_is_torn_down: checked_teardown_4k Base4K, checked_teardown_thp Transparent, checked_teardown_2m Huge2M;
    a_pool_is_locked: lock_4k Base4K, lock_thp Transparent;
    a_guest_is_leased_from_locked_memory: locked_lease_4k Base4K, locked_lease_thp Transparent;
    a_guest_in_locked_memory_is_torn_down: locked_teardown_4k Base4K, locked_teardown_thp Transparent;
    a_guest_in_locked_memory_is_dropped: locked_drop_4k Base4K, locked_drop_thp Transparent;
}
