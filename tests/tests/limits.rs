//! Limits that are met for real, in the middle of a lease, a teardown and a retirement: on address space, on the number of
//! mappings, on hugetlb pages. Those on locked memory are in `lock_memory.rs`, more about address space in `address_space.rs`.
//!
//! What cannot be done is an error, or quarantined with a reason; the books add up, and nothing dirty is leased.

use log::Level;
use std::ptr;

use vm_scrub::lease::{LeaseError, QuarantineReason};
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{
    BLOCK_SIZE, Lease, LeaseOptions, PageSize, Pool, PoolBuilder, Revocation, ScrubReceipt,
};
use vm_scrub_tests::child::{alone, with_huge_pages};
use vm_scrub_tests::{
    HugePages, PAGE, assert_adds_up, assert_all_zero, assert_nothing_dirty_left, fill, huge_pages,
    pools, quiesce, regions, skipped, smear,
};
use vm_scrub_tests::{limits, logs, numa};

const BLOCKS: u64 = 8;
const GUEST: [(u64, u64); 2] = [(0, 2 * BLOCK_SIZE), (1 << 32, BLOCK_SIZE)];

fn builder(page_size: PageSize) -> PoolBuilder {
    pools::builder(page_size, BLOCKS).threads(1)
}

/// A guest that lies in several pieces, with memory of others between them.
fn guest(pool: &Pool) -> (Lease, Vec<Lease>) {
    let one = || pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let mut others: Vec<Lease> = (0..BLOCKS).map(|_| one()).collect();
    for at in [6, 4, 2] {
        drop(others.remove(at));
    }
    let guest = pool.lease(&regions(&GUEST)).unwrap();
    assert_eq!(guest.blocks().len(), 3);
    fill(&guest, 1);
    (guest, others)
}

/// Ends a lease in one of both ways.
fn end(lease: Lease, retire: bool) -> ScrubReceipt {
    let quiesced = quiesce(&lease);
    let receipt = if retire {
        lease.retire(quiesced).unwrap().wait().unwrap()
    } else {
        lease.teardown(quiesced).unwrap()
    };
    assert_adds_up(&receipt);
    receipt
}

/// What the limit took is quarantined and named; what is left is clean.
#[track_caller]
fn assert_sound(pool: &Pool, receipt: &ScrubReceipt, others: Vec<Lease>) {
    assert_eq!(pool.accounts().quarantined, receipt.bytes_quarantined);
    for range in &receipt.quarantined {
        assert!(!range.detail.is_empty(), "{range:?}");
    }
    drop(others);
    assert_nothing_dirty_left(pool);
}

/// Whether a block's address space is to be had.
fn has_room() -> bool {
    let (len, flags) = (BLOCK_SIZE as usize, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: the kernel picks a range that nothing else uses; it is unmapped at once.
    unsafe {
        let start = libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0);
        start != libc::MAP_FAILED && libc::munmap(start, len) == 0
    }
}

fn address_space(builder: PoolBuilder) {
    let pool = builder.build().unwrap();
    for retire in [false, true] {
        let (guest, others) = guest(&pool);
        // Not a block more.
        limits::set(libc::RLIMIT_AS, limits::in_status("VmSize:") + (1 << 20));
        assert!(!has_room(), "the limit is not in force");
        let receipt = end(guest, retire);
        limits::set(libc::RLIMIT_AS, libc::RLIM_INFINITY);
        assert!(receipt.is_proven(), "{receipt:?}");
        assert_sound(&pool, &receipt, others);
    }
}

/// Teardown takes no address space: where there is none left, all is scrubbed and nothing lost.
#[test]
fn a_teardown_needs_no_address_space() {
    alone("a_teardown_needs_no_address_space", || {
        for page_size in [PageSize::Base4K, PageSize::Transparent] {
            address_space(builder(page_size));
            address_space(builder(page_size).lock_memory(true));
        }
    });
}

#[test]
fn a_teardown_needs_no_address_space_2m() {
    with_huge_pages("a_teardown_needs_no_address_space_2m", BLOCKS, || {
        address_space(builder(PageSize::Huge2M));
    });
}

/// Mappings, so many that the process can have only a few more.
struct Crowd {
    start: *mut u8,
    pages: usize,
}

impl Crowd {
    /// Leaves room for `left` mappings. `None` where the host allows too many to be used up.
    fn leaving(left: usize) -> Option<Self> {
        let most = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
        let most: usize = most.trim().parse().unwrap();
        if most > 1 << 18 {
            vm_scrub_tests::skipped(&format!("{most} mappings are too many to be used up"));
            return None;
        }
        let pages = most + 2;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: the kernel picks a range that nothing else uses; protection is changed within it.
        let crowd = unsafe {
            let len = pages * PAGE as usize;
            let start = libc::mmap(ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0);
            assert_ne!(start, libc::MAP_FAILED);
            let start = start.cast::<u8>();
            // Each makes two mappings more.
            for page in (1..pages).step_by(2) {
                let at = start.add(page * PAGE as usize);
                if libc::mprotect(at.cast(), PAGE as usize, libc::PROT_READ) != 0 {
                    break;
                }
            }
            Self { start, pages }
        };
        // SAFETY: what was made readable becomes one with its neighbours again.
        unsafe {
            for pair in 0..left.div_ceil(2) {
                let at = crowd.start.add((1 + 2 * pair) * PAGE as usize);
                assert_eq!(libc::mprotect(at.cast(), PAGE as usize, libc::PROT_NONE), 0);
            }
        }
        Some(crowd)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        // SAFETY: mapped above, and nobody refers to it.
        unsafe { libc::munmap(self.start.cast(), self.pages * PAGE as usize) };
    }
}

/// With room for no mapping, for a few, and for enough.
fn mappings(builder: impl Fn() -> PoolBuilder) {
    if cfg!(target_env = "musl") {
        // Its allocator maps memory for small allocations as well, and without that a Rust process ends.
        vm_scrub_tests::skipped(&"without room for mappings there is no heap");
        return;
    }
    let (mut refused, mut leased, mut lost) = (0, 0, 0);
    for left in (0..16).step_by(2) {
        for retire in [false, true] {
            let pool = builder().build().unwrap();
            let (guest, others) = guest(&pool);
            let Some(crowd) = Crowd::leaving(left) else {
                return;
            };
            let receipt = end(guest, retire);
            drop(crowd);
            lost += receipt.bytes_quarantined;
            assert_sound(&pool, &receipt, others);
        }
        let pool = builder().build().unwrap();
        // So that no large reservation is made now.
        drop(pool.lease(&regions(&GUEST)).unwrap());
        let before = pool.accounts();
        let crowd = Crowd::leaving(left);
        let result = pool.lease(&regions(&GUEST));
        drop(crowd);
        match result {
            Ok(lease) => {
                assert_all_zero(&lease);
                smear(&lease, 1);
                assert!(end(lease, false).is_proven());
                leased += 1;
            }
            Err(LeaseError::Map { source, .. } | LeaseError::Lock { source, .. }) => {
                assert_eq!(source.source.raw_os_error(), Some(libc::ENOMEM));
                let accounts = pool.accounts();
                assert_eq!((accounts.leased, accounts.dirty), (0, 0));
                assert_eq!(accounts.total(), before.total());
                refused += 1;
            }
            Err(error) => panic!("{error}"),
        }
        assert_nothing_dirty_left(&pool);
    }
    assert!(refused > 0 && leased > 0, "{refused} and {leased}");
    // A view is closed as a whole, which takes no mapping more.
    let huge = builder().build().unwrap().page_size() == PageSize::Huge2M;
    assert_eq!(lost > 0, !huge, "{lost} bytes were lost");
}

#[test]
fn mappings_run_out_4k() {
    alone("mappings_run_out_4k", || {
        mappings(|| builder(PageSize::Base4K));
    });
}

#[test]
fn mappings_run_out_thp() {
    alone("mappings_run_out_thp", || {
        mappings(|| builder(PageSize::Transparent));
    });
}

#[test]
fn mappings_run_out_locked() {
    alone("mappings_run_out_locked", || {
        if let Err(error) = builder(PageSize::Base4K).lock_memory(true).build() {
            return vm_scrub_tests::skipped(&error);
        }
        mappings(|| builder(PageSize::Base4K).lock_memory(true));
    });
}

#[test]
fn mappings_run_out_2m() {
    // A window that cannot be closed keeps its file.
    with_huge_pages("mappings_run_out_2m", 40 * BLOCKS, || {
        mappings(|| builder(PageSize::Huge2M));
    });
}

/// The host has no page left for what a guest's balloon took out of its memory, nor for a file to be shared.
#[test]
fn hugetlb_pages_run_out() {
    let Some(_reserved) = HugePages::reserve_alone(2 * BLOCKS) else {
        return;
    };
    for retire in [false, true] {
        let pool = builder(PageSize::Huge2M).build().unwrap();
        let (guest, others) = guest(&pool);
        let page = guest.host_addresses()[1].1;
        // SAFETY: the range lies in the lease's window, to which nobody holds a reference.
        let status = unsafe { libc::madvise(page.cast(), BLOCK_SIZE as usize, libc::MADV_REMOVE) };
        assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
        let all = pools::builder(PageSize::Huge2M, huge_pages::free())
            .build()
            .unwrap();
        assert_eq!(huge_pages::free(), 0);

        let receipt = end(guest, retire);
        assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE, "{receipt:?}");
        let range = &receipt.quarantined[0];
        assert_eq!(range.guest_address, GUEST[1].0);
        assert_eq!(range.reason, QuarantineReason::ResidencyUnknown);

        // As much as the pool can lend is there, and a page more is not.
        drop(others);
        let clean = pool.accounts().clean;
        let options = || LeaseOptions::new().shareable(true);
        let lease = pool.lease_with(&regions(&[(0, clean)]), options());
        let lease = lease.unwrap();
        assert_all_zero(&lease);
        fill(&lease, 2);
        assert!(end(lease, retire).is_proven());
        let lease = pool.lease(&regions(&[(0, clean)])).unwrap();
        assert_all_zero(&lease);
        assert!(end(lease, retire).is_proven());
        drop(all);
        assert_nothing_dirty_left(&pool);
    }
}

/// Mappings of at least 16 MiB: those of pools.
fn large_mappings() -> Vec<(usize, usize)> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let ranges = maps.lines().map(|line| {
        let (start, rest) = line.split_once('-').unwrap();
        let end = rest.split(' ').next().unwrap();
        let address = |text| usize::from_str_radix(text, 16).unwrap();
        (address(start), address(end))
    });
    ranges
        .filter(|(start, end)| end - start >= 16 << 20)
        .collect()
}

/// What a guest had is moved within the limit, or not at all: a move that the kernel refuses half-way leaves address space to whoever
/// comes next, and the pool would unmap it when it goes.
#[test]
fn a_limit_on_data_leaves_no_hole() {
    alone("a_limit_on_data_leaves_no_hole", || {
        const MANY: u64 = 32;
        let pool = pools::builder(PageSize::Base4K, MANY).build().unwrap();
        let all = regions(&[(0, MANY * BLOCK_SIZE)]);
        let lease = pool.lease(&all).unwrap();
        fill(&lease, 1);
        let before = large_mappings();
        // Less than the guest has.
        let leave = |bytes| limits::set(libc::RLIMIT_DATA, limits::in_status("VmData:") + bytes);
        leave(16 << 20);
        logs::listen();
        let receipt = end(lease, false);
        let unproven = pool.revocation() == Revocation::Move;
        assert_eq!(logs::heard(Level::Warn, "RLIMIT_DATA"), unproven);
        leave(16 << 20);
        let refused = pool.lease(&all);
        limits::set(libc::RLIMIT_DATA, libc::RLIM_INFINITY);
        let error = refused.unwrap_err();

        assert!(receipt.is_proven(), "{receipt:?}");
        // The call that fails is the one that changes nothing.
        let LeaseError::Map { source, .. } = error else {
            panic!("{error}");
        };
        assert_eq!(source.call.name(), "mprotect", "{source}");
        let after = large_mappings();
        for (start, end) in before {
            let mut at = start;
            for (next, until) in &after {
                if (*next..*until).contains(&at) {
                    at = *until;
                }
            }
            // Small mappings are not looked at: what is left of the block in which one begins may be any.
            assert!(
                at + (2 << 20) >= end,
                "a hole at {at:#x} of {start:#x} to {end:#x}"
            );
        }
        let next = pool.lease(&all).unwrap();
        assert_all_zero(&next);
        fill(&next, 2);
        // What came home in the other way can leave in the usual one again.
        let receipt = end(next, false);
        assert!(receipt.is_proven());
        assert_eq!(receipt.revocation, pool.revocation());
        assert_nothing_dirty_left(&pool);
    });
}

/// What was made writable to move a guest there, and was not used, does not count against the limit for ever.
#[test]
fn a_move_that_is_refused_gives_its_share_of_a_limit_on_data_back() {
    alone(
        "a_move_that_is_refused_gives_its_share_of_a_limit_on_data_back",
        || {
            let pool = builder(PageSize::Base4K).build().unwrap();
            if pool.revocation() != Revocation::Move {
                return skipped(&"this kernel has no UFFDIO_MOVE");
            }
            let guest = || {
                let lease = pool.lease(&regions(&[(0, BLOCKS * BLOCK_SIZE)])).unwrap();
                fill(&lease, 1);
                lease
            };
            let data = || limits::in_status("VmData:");
            limits::set(libc::RLIMIT_DATA, data() + (1 << 30));
            assert!(end(guest(), false).is_proven());
            let before = data();
            let refused = |errno| {
                let lease = guest();
                let refused = inject(Call::Mremap, 0, 1, errno);
                let receipt = end(lease, false);
                assert_eq!(refused.hits(), 1);
                (receipt, data())
            };

            logs::listen();
            let (receipt, after) = refused(libc::ENOMEM);
            assert!(logs::heard(Level::Warn, "vm.max_map_count"));
            assert!(receipt.is_proven(), "{receipt:?}");
            assert_eq!(receipt.revocation, Revocation::Mremap);
            assert!(after < before + BLOCK_SIZE, "{before} and then {after}");

            // For another reason nobody gets it, and it stays where the guest had it.
            let (receipt, after) = refused(libc::EPERM);
            assert_eq!(receipt.bytes_quarantined, BLOCKS * BLOCK_SIZE);
            assert!(after < before + 9 * BLOCK_SIZE, "{before} and then {after}");
            assert_nothing_dirty_left(&pool);
        },
    );
}

/// A move that stops half-way has left a part of the guest where it was to go, and nothing of that may be dropped: the limit or not.
#[test]
fn what_was_moved_within_a_limit_on_data_before_a_failure_stays_in_quarantine() {
    alone(
        "what_was_moved_within_a_limit_on_data_before_a_failure_stays_in_quarantine",
        || {
            let Some(node) = numa::node() else { return };
            // Asking whether it is one mapping, and moving it: first of the whole, then of each half.
            for skip in 0..5 {
                let pool = builder(PageSize::Base4K).build().unwrap();
                if pool.revocation() != Revocation::Move {
                    return skipped(&"this kernel has no UFFDIO_MOVE");
                }
                limits::set(libc::RLIMIT_DATA, limits::in_status("VmData:") + (1 << 30));
                let bytes = BLOCKS * BLOCK_SIZE;
                let lease = pool.lease(&regions(&[(0, bytes)])).unwrap();
                fill(&lease, 1);
                let half = (bytes / 2) as usize;
                let start = lease.host_addresses().remove(0).1.wrapping_add(half);
                // SAFETY: this half of the guest's memory is the test's. It has a border that nothing undoes.
                unsafe { numa::prefer(node, start, half) };
                let populated = || limits::in_status("RssAnon:");
                let before = populated();
                let refused = inject(Call::Mremap, skip, 1, libc::EPERM);
                let receipt = end(lease, false);
                let hits = refused.hits();
                drop(refused);
                assert_eq!((hits, receipt.bytes_quarantined), (1, bytes), "{skip}");
                let after = populated();
                assert!(after + BLOCK_SIZE > before, "{before} and then {after}");
            }
        },
    );
}
