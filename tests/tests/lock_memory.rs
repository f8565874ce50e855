//! Pools that lock their memory: what a guest has populated stays in RAM wherever it is, and the kernel's count of what is locked
//! stays what it was when the pool was built.
//!
//! What is locked is counted for the whole process, so each test runs in a child.

use log::Level;
use vm_scrub::lease::{LeaseError, QuarantineReason};
use vm_scrub::test_support::{Call, arena_address, inject};
use vm_scrub::{
    BLOCK_SIZE, Lease, LeaseOptions, PageSize, Policy, Pool, PoolBuilder, PoolError, RevokeBy,
};
use vm_scrub_tests::child::{alone, with_huge_pages};
use vm_scrub_tests::limits::{self, locked, obey_memlock};
use vm_scrub_tests::maps::{has_uffdio_move, mappings, populated_bytes};
use vm_scrub_tests::pinned::Pinned;
use vm_scrub_tests::{
    PAGE, assert_all_zero, assert_nothing_dirty_left, fill, logs, pools, quiesce, regions, smear,
    teardown,
};

/// As much as a process may lock that nobody has given more: 8 MiB.
const BLOCKS: u64 = 4;
const CAPACITY: u64 = BLOCKS * BLOCK_SIZE;
const WHOLE: [(u64, u64); 1] = [(0, CAPACITY)];
/// Two regions, of which the first ends within a block.
const GUEST: [(u64, u64); 2] = [(0, BLOCK_SIZE + 3 * PAGE), (1 << 32, BLOCK_SIZE)];

fn builder(page_size: PageSize) -> PoolBuilder {
    pools::builder(page_size, BLOCKS).lock_memory(true)
}

/// Runs `test` on pools of small and of transparent huge pages, revoked in either way.
fn on_each(name: &str, test: impl Fn(PoolBuilder)) {
    alone(name, || {
        for page_size in [PageSize::Base4K, PageSize::Transparent] {
            for by in [RevokeBy::Automatic, RevokeBy::Mremap] {
                test(builder(page_size).revoke_by(by));
            }
        }
    });
}

/// Every page of `[start, start + bytes)` that is populated is locked, and there are so many bytes of them.
#[track_caller]
fn assert_locked(start: *mut u8, bytes: u64, populated: u64) {
    let range = start.addr()..start.addr() + bytes as usize;
    let mut found = 0;
    for mapping in mappings(range) {
        assert!(mapping.has("lo"), "not locked: {mapping:?}");
        assert_eq!(mapping.locked, mapping.resident, "{mapping:?}");
        found += mapping.locked;
    }
    assert!(found >= populated, "{found:#x} of {populated:#x} bytes");
}

#[track_caller]
fn assert_windows_locked(lease: &Lease) {
    for (region, start) in lease.host_addresses() {
        assert_locked(start, region.bytes, region.bytes);
    }
}

#[test]
fn what_is_populated_is_locked_in_the_window_and_at_home() {
    let test = "what_is_populated_is_locked_in_the_window_and_at_home";
    on_each(test, |builder| {
        let pool = builder.build().unwrap();
        assert_eq!(locked(), CAPACITY);
        let arena = arena_address(&pool);
        let all = arena.addr()..arena.addr() + CAPACITY as usize;
        assert_eq!(populated_bytes(all), 0, "locking has populated it");

        let lease = pool.lease(&regions(&WHOLE)).unwrap();
        let window = lease.host_addresses()[0].1;
        let shown = window.addr()..window.addr() + CAPACITY as usize;
        assert_eq!(populated_bytes(shown), 0);
        fill(&lease, 1);
        assert_windows_locked(&lease);
        assert_eq!(locked(), CAPACITY);

        let quiesced = quiesce(&lease);
        let dirty = lease.revoke(quiesced).unwrap();
        assert_locked(arena, CAPACITY, CAPACITY);
        let receipt = dirty.scrub().verify().recycle().unwrap();
        assert!(receipt.is_proven());
        assert_eq!((receipt.bytes_unlocked, locked()), (0, CAPACITY));
        drop(pool);
        assert_eq!(locked(), 0);
    });
}

#[test]
fn the_count_does_not_grow_and_nothing_piles_up() {
    on_each("the_count_does_not_grow_and_nothing_piles_up", |builder| {
        // Where there is room for the pool and for nothing else.
        obey_memlock();
        limits::set(libc::RLIMIT_MEMLOCK, CAPACITY);
        let pool = builder.build().unwrap();
        let layouts = [&WHOLE[..], &GUEST[..], &[(0, PAGE)]];
        let mut before = 0;
        for round in 0..200 {
            let lease = pool.lease(&regions(layouts[round % 3])).unwrap();
            if round % 10 == 0 {
                assert_all_zero(&lease);
            }
            smear(&lease, round as u8);
            assert_eq!(locked(), CAPACITY);
            let receipt = match round % 4 {
                3 => {
                    let quiesced = quiesce(&lease);
                    lease.retire(quiesced).unwrap().wait().unwrap()
                }
                _ => teardown(lease),
            };
            assert!(receipt.is_proven());
            assert_eq!((receipt.bytes_unlocked, locked()), (0, CAPACITY));
            let count = mappings(0..usize::MAX).len();
            if round == 20 {
                before = count;
            }
            assert!(round < 20 || count <= before + 8, "{before} and {count}");
        }
        assert_nothing_dirty_left(&pool);
        limits::set(libc::RLIMIT_MEMLOCK, libc::RLIM_INFINITY);
    });
}

#[test]
fn a_pool_larger_than_the_limit_is_refused() {
    alone("a_pool_larger_than_the_limit_is_refused", || {
        obey_memlock();
        for (limit, errno) in [(CAPACITY - PAGE, libc::ENOMEM), (0, libc::EPERM)] {
            limits::set(libc::RLIMIT_MEMLOCK, limit);
            for page_size in [PageSize::Base4K, PageSize::Transparent] {
                let error = builder(page_size).build().unwrap_err();
                let PoolError::Lock { capacity, source } = &error else {
                    panic!("{error}");
                };
                let why = (source.call, source.source.raw_os_error());
                assert_eq!(*capacity, CAPACITY);
                assert_eq!(why, (Call::Mlock, Some(errno)));
                let text = error.to_string();
                assert!(text.contains("ulimit -l") && text.contains("CAP_IPC_LOCK"));
                assert_eq!(locked(), 0);
            }
        }
    });
}

/// The limit is lowered behind the pool's back: no lease is made that is not locked, and what is leased is scrubbed.
#[test]
fn a_limit_that_is_lowered_stops_leases_and_no_teardown() {
    let test = "a_limit_that_is_lowered_stops_leases_and_no_teardown";
    on_each(test, |builder| {
        obey_memlock();
        limits::set(libc::RLIMIT_MEMLOCK, CAPACITY);
        let pool = builder.build().unwrap();
        for retired in [false, true] {
            let lease = pool.lease(&regions(&GUEST)).unwrap();
            fill(&lease, 1);
            let before = pool.accounts();
            limits::set(libc::RLIMIT_MEMLOCK, 0);
            let error = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap_err();
            assert!(
                matches!(&error, LeaseError::Lock { bytes: BLOCK_SIZE, source } if source.call == Call::Mlock),
                "{error}"
            );
            assert!(error.to_string().contains("ulimit -l"), "{error}");
            assert_eq!(pool.accounts(), before, "the pool is as it was");

            logs::listen();
            let quiesced = quiesce(&lease);
            let receipt = match retired {
                false => lease.teardown(quiesced).unwrap(),
                true => lease.retire(quiesced).unwrap().wait().unwrap(),
            };
            assert!(receipt.is_proven(), "{receipt:?}");
            assert_eq!(receipt.bytes_unlocked, receipt.bytes_total);
            assert!(logs::heard(Level::Error, "not locked any more"));

            limits::set(libc::RLIMIT_MEMLOCK, CAPACITY);
            let lease = pool.lease(&regions(&WHOLE)).unwrap();
            assert_all_zero(&lease);
            fill(&lease, 2);
            assert_windows_locked(&lease);
            assert_eq!(teardown(lease).bytes_unlocked, 0);
            assert_eq!(locked(), CAPACITY, "all of it is locked again");
        }
        assert_nothing_dirty_left(&pool);
        limits::set(libc::RLIMIT_MEMLOCK, libc::RLIM_INFINITY);
    });
}

/// What somebody holds stays where it is, and locked.
#[test]
fn what_is_pinned_is_locked_in_quarantine() {
    alone("what_is_pinned_is_locked_in_quarantine", || {
        if !has_uffdio_move() {
            return vm_scrub_tests::skipped(&"this kernel has no UFFDIO_MOVE");
        }
        for page_size in [PageSize::Base4K, PageSize::Transparent] {
            let pool = builder(page_size)
                .pin_patience(std::time::Duration::from_millis(5))
                .build()
                .unwrap();
            let lease = pool.lease(&regions(&WHOLE)).unwrap();
            fill(&lease, 1);
            let page = lease.host_addresses()[0].1.wrapping_add(5 * PAGE as usize);
            let Some(pinned) = Pinned::new(page, PAGE as usize) else {
                return;
            };
            let receipt = teardown(lease);
            assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE);
            let reasons = receipt.quarantined.iter().map(|range| range.reason);
            assert!(
                reasons
                    .into_iter()
                    .any(|reason| reason == QuarantineReason::PinnedOrShared)
            );
            assert_eq!((receipt.bytes_unlocked, locked()), (0, CAPACITY));
            let kept = mappings(0..usize::MAX);
            let kept = kept.iter().filter(|mapping| {
                mapping.permissions == "---p" && mapping.has("lo") && mapping.locked > 0
            });
            assert_eq!(kept.count(), 1);
            assert_nothing_dirty_left(&pool);
            drop(pinned);
        }
    });
}

/// A guest that is not revoked, because `call` fails once: its pool, and its window.
fn not_revoked(builder: PoolBuilder, call: Call) -> (Pool, *mut u8) {
    // So small that anybody may lock as much in all the places where it might be.
    let pool = builder.capacity(BLOCK_SIZE).threads(1).build().unwrap();
    let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let window = lease.host_addresses()[0].1;
    // An answer for which there is no other way round.
    let fault = inject(call, 0, 1, libc::EINVAL);
    let receipt = teardown(lease);
    assert_eq!(fault.hits(), 1);
    assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE);
    assert_eq!(receipt.quarantined[0].reason, QuarantineReason::NotRevoked);
    (pool, window)
}

#[test]
fn what_stays_in_its_window_is_locked_there() {
    on_each("what_stays_in_its_window_is_locked_there", |builder| {
        let (_pool, window) = not_revoked(builder, Call::Mremap);
        assert_locked(window, BLOCK_SIZE, BLOCK_SIZE);
    });
}

/// It is home, and quarantined because the window cannot be closed.
#[test]
fn what_is_home_is_locked_though_its_window_stays_open() {
    let test = "what_is_home_is_locked_though_its_window_stays_open";
    on_each(test, |builder| {
        let (pool, _) = not_revoked(builder, Call::Mmap);
        assert_locked(arena_address(&pool), BLOCK_SIZE, BLOCK_SIZE);
    });
}

/// What goes back to the kernel goes, on older kernels too, and is locked when it comes again.
#[test]
fn what_is_not_retained_goes_back() {
    on_each("what_is_not_retained_goes_back", |builder| {
        let policy = Policy::new().retain(BLOCK_SIZE);
        let pool = builder.threads(1).policy(policy).build().unwrap();
        let give = |older: bool| {
            let lease = pool.lease(&regions(&WHOLE)).unwrap();
            assert_all_zero(&lease);
            fill(&lease, 1);
            assert_windows_locked(&lease);
            // MADV_DONTNEED_LOCKED, Linux 5.18.
            let times = if older { u32::MAX } else { 0 };
            let missing = inject(Call::DiscardLocked, 0, times, libc::EINVAL);
            let receipt = teardown(lease);
            assert_eq!(missing.hits() > 0, older);
            assert!(receipt.is_proven());
            assert_eq!(receipt.bytes_returned, CAPACITY - BLOCK_SIZE);
            let arena = arena_address(&pool);
            let all = arena.addr()..arena.addr() + CAPACITY as usize;
            assert_eq!(populated_bytes(all), BLOCK_SIZE);
            assert_eq!(locked(), CAPACITY);
        };
        [false, true, false].into_iter().for_each(give);
    });
}

fn shareable(pool: &Pool) -> Result<Lease, LeaseError> {
    pool.lease_with(&regions(&GUEST), LeaseOptions::new().shareable(true))
}

/// A file takes the place of blocks, and is locked instead of them.
#[test]
fn shareable_windows_are_locked_too() {
    on_each("shareable_windows_are_locked_too", |builder| {
        let pool = builder.revoke_by(RevokeBy::Automatic).build().unwrap();
        for _ in 0..20 {
            let lease = shareable(&pool).unwrap();
            fill(&lease, 1);
            assert_windows_locked(&lease);
            // The window of the first region ends within a block.
            assert_eq!(locked(), CAPACITY - BLOCK_SIZE + 3 * PAGE);
            let receipt = teardown(lease);
            assert!(receipt.is_proven());
            assert_eq!(receipt.bytes_unlocked, receipt.bytes_total);
            assert_eq!(locked(), CAPACITY);
        }
        let before = pool.accounts();
        let refused = inject(Call::Mlock, 1, 1, libc::ENOMEM);
        let error = shareable(&pool).unwrap_err();
        assert_eq!(refused.hits(), 1);
        drop(refused);
        assert!(matches!(error, LeaseError::Lock { .. }), "{error}");
        assert_eq!((pool.accounts(), locked()), (before, CAPACITY));
    });
}

#[test]
fn hugetlb_pages_need_no_lock() {
    with_huge_pages("hugetlb_pages_need_no_lock", 2 * BLOCKS, || {
        obey_memlock();
        limits::set(libc::RLIMIT_MEMLOCK, 0);
        let pool = builder(PageSize::Huge2M).build().unwrap();
        let options = LeaseOptions::new().shareable(true);
        for options in [LeaseOptions::new(), options] {
            let lease = pool.lease_with(&regions(&WHOLE), options).unwrap();
            fill(&lease, 1);
            assert_eq!(locked(), 0);
            let receipt = teardown(lease);
            assert!(receipt.is_proven());
            assert_eq!(receipt.bytes_unlocked, 0);
        }
    });
}

/// An old kernel or a sandbox without `mlock2`: an error, and nothing that only looks locked.
#[test]
fn without_mlock2() {
    let _missing = inject(Call::Mlock, 0, u32::MAX, libc::ENOSYS);
    let error = builder(PageSize::Base4K).build().unwrap_err();
    assert!(matches!(error, PoolError::Lock { .. }), "{error}");
    assert!(error.to_string().contains("mlock2"), "{error}");
}
