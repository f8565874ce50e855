//! Which way memory is taken away from guests: what was asked for, what the host does, and what the kernel's answers to
//! single moves lead to. Whoever really holds pages is in `pinned.rs`.

use log::Level;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::lease::QuarantineReason;
use vm_scrub::test_support::{Call, FaultGuard, inject, inject_short};
use vm_scrub::{BLOCK_SIZE, PageSize, Pool, PoolBuilder, PoolError, Revocation, RevokeBy};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::maps::{has_uffdio_move, mappings, revocation};
use vm_scrub_tests::{
    PAGE, assert_nothing_dirty_left, fill, logs, on_small_page_sizes, pools, regions, smear,
    teardown,
};

on_small_page_sizes!(
    where_the_host_does_not_move_there_is_mremap_or_an_error,
    whoever_asks_for_mremap_gets_it,
    what_asks_for_populated_pages_is_open_before_there_is_a_pool,
    a_page_that_is_busy_once_is_tried_again,
    a_page_that_stays_busy_is_quarantined_and_the_next_guest_is_not_told,
    a_move_that_fails_for_another_reason_is_made_without_proof,
    memory_that_may_not_be_writable_once_more_comes_home_without_proof,
    moves_that_stop_half_way_go_on,
    pages_that_were_only_read,
    advice_about_parts_of_a_guest,
    sparse_guests,
    locked_guests,
    guard_pages_do_not_come_home_where_nothing_is_known_about_them,
);

fn builder(page_size: PageSize, blocks: u64) -> PoolBuilder {
    // Faults belong to a thread.
    pools::builder(page_size, blocks)
        .threads(1)
        .pin_patience(Duration::from_millis(5))
}

/// `None` on kernels without `UFFDIO_MOVE`.
fn moving(page_size: PageSize, blocks: u64) -> Option<Pool> {
    if !has_uffdio_move() {
        vm_scrub_tests::skipped(&"this kernel has no UFFDIO_MOVE");
        return None;
    }
    let builder = builder(page_size, blocks).revoke_by(RevokeBy::Move);
    Some(builder.build().unwrap())
}

/// The end of a test's name.
fn of(page_size: PageSize) -> &'static str {
    match page_size {
        PageSize::Base4K => "base_4k",
        _ => "transparent",
    }
}

fn whoever_asks_for_mremap_gets_it(page_size: PageSize) {
    let builder = builder(page_size, 2).revoke_by(RevokeBy::Mremap);
    let pool = builder.build().unwrap();
    assert_eq!(pool.revocation(), Revocation::Mremap);
    let lease = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    assert_eq!(receipt.revocation, Revocation::Mremap);
}

/// A VMM may lock itself in as soon as it has its pools.
fn what_asks_for_populated_pages_is_open_before_there_is_a_pool(page_size: PageSize) {
    let test = format!(
        "what_asks_for_populated_pages_is_open_before_there_is_a_pool::{}",
        of(page_size)
    );
    // It is opened once in a process.
    alone(&test, || {
        let builder = builder(page_size, 2).revoke_by(RevokeBy::Mremap);
        let _pool = builder.build().unwrap();
        let opened = std::fs::read_dir("/proc/self/fd").unwrap();
        let mut files = opened.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
        assert!(files.any(|file| file.ends_with("pagemap")));
    });
}

fn where_the_host_does_not_move_there_is_mremap_or_an_error(page_size: PageSize) {
    // `userfaultfd(2)` alone may be forbidden, and the device not.
    for (call, errno) in [
        (Call::UffdApi, libc::EINVAL),
        (Call::UffdRegister, libc::ENOMEM),
        (Call::PagemapScan, libc::ENOTTY),
    ] {
        if !has_uffdio_move() {
            break;
        }
        let _fault = inject(call, 0, u32::MAX, errno);
        let error = builder(page_size, 1).revoke_by(RevokeBy::Move).build();
        let error = error.unwrap_err();
        assert!(
            matches!(&error, PoolError::Revocation { by: RevokeBy::Move, source: Some(source) } if source.call == call),
            "{error:?}"
        );
        assert!(error.to_string().contains(call.name()), "{error}");

        logs::listen();
        let pool = builder(page_size, 1).build().unwrap();
        assert_eq!(pool.revocation(), Revocation::Mremap);
        assert!(logs::heard(Level::Info, "will not be found"));
        assert!(logs::heard(Level::Info, "revocation by Mremap"));
    }
    let forbidden = inject(Call::UffdOpen, 0, u32::MAX, libc::EPERM);
    let device = inject(Call::UffdDevice, 0, u32::MAX, libc::EACCES);
    let pool = builder(page_size, 2).build().unwrap();
    assert!(device.hits() >= 2);
    drop((forbidden, device));
    let lease = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    assert_eq!(receipt.revocation, Revocation::Mremap);
    assert_nothing_dirty_left(&pool);
}

/// Asked for by a VMM that may open the device and not make the system call.
#[test]
fn the_device_serves_where_the_system_call_is_forbidden() {
    if !has_uffdio_move() || std::fs::File::open("/dev/userfaultfd").is_err() {
        return vm_scrub_tests::skipped(&"no /dev/userfaultfd for this process");
    }
    let _forbidden = inject(Call::UffdOpen, 0, u32::MAX, libc::EPERM);
    let pool = builder(PageSize::Base4K, 1).build().unwrap();
    assert_eq!(pool.revocation(), Revocation::Move);
}

#[test]
fn hugetlb_memory_is_revoked_in_one_way_only() {
    vm_scrub_tests::child::with_huge_pages("hugetlb_memory_is_revoked_in_one_way_only", 1, || {
        for by in [RevokeBy::Move, RevokeBy::Mremap] {
            let error = pools::builder(PageSize::Huge2M, 1).revoke_by(by).build();
            let error = error.unwrap_err();
            assert!(matches!(error, PoolError::Revocation { source: None, .. }));
            assert!(error.to_string().contains("hugetlb"), "{error}");
        }
        let pool = pools::pool(PageSize::Huge2M, 1);
        assert_eq!(pool.revocation(), revocation(PageSize::Huge2M));
    });
}

/// A guest of four blocks, filled and torn down under faults.
fn torn_down(pool: &Pool, faults: impl FnOnce() -> FaultGuard) -> vm_scrub::ScrubReceipt {
    let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    // Not read before: on kernels before 6.13 that would bring the huge zero page, and then small ones.
    fill(&lease, 1);
    let fault = faults();
    let receipt = teardown(lease);
    assert!(fault.hits() > 0, "no fault was met");
    receipt
}

const BUSY: [i32; 5] = [
    libc::EBUSY,
    libc::EAGAIN,
    libc::EINTR,
    libc::EEXIST,
    libc::ENOENT,
];

fn a_page_that_is_busy_once_is_tried_again(page_size: PageSize) {
    let Some(pool) = moving(page_size, 4) else {
        return;
    };
    for errno in BUSY {
        let receipt = torn_down(&pool, || inject(Call::UffdMove, 0, 1, errno));
        assert!(receipt.is_proven(), "{errno}: {receipt:?}");
        assert_eq!(receipt.revocation, Revocation::Move);
        assert_eq!(receipt.bytes_scrubbed, 4 * BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    }
}

fn a_page_that_stays_busy_is_quarantined_and_the_next_guest_is_not_told(page_size: PageSize) {
    for errno in BUSY {
        let Some(pool) = moving(page_size, 4) else {
            return;
        };
        let receipt = torn_down(&pool, || inject(Call::UffdMove, 0, u32::MAX, errno));
        let [range] = &receipt.quarantined[..] else {
            panic!("{receipt:?}");
        };
        assert_eq!(range.reason, QuarantineReason::PinnedOrShared);
        assert_eq!(range.bytes, 4 * BLOCK_SIZE);
        assert!(range.detail.contains(Call::UffdMove.name()), "{range:?}");
        assert_eq!(pool.accounts().quarantined, 4 * BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    }
}

fn a_move_that_fails_for_another_reason_is_made_without_proof(page_size: PageSize) {
    let Some(pool) = moving(page_size, 4) else {
        return;
    };
    for errno in [libc::ENOMEM, libc::EINVAL, libc::EFAULT, libc::ESRCH] {
        for times in [1, u32::MAX] {
            let receipt = torn_down(&pool, || inject(Call::UffdMove, 0, times, errno));
            assert!(receipt.is_proven(), "{errno}: {receipt:?}");
            assert_eq!(receipt.bytes_scrubbed, 4 * BLOCK_SIZE);
            // The first answer of this kind is taken for a border between two mappings.
            let proven = errno == libc::EINVAL && times == 1;
            let expected = if proven {
                Revocation::Move
            } else {
                Revocation::Mremap
            };
            assert_eq!(receipt.revocation, expected, "{errno}");
            assert_nothing_dirty_left(&pool);
            // And the next time all is well.
            let receipt = torn_down(&pool, || inject_short(Call::UffdMove, 0, 1, 1 << 21));
            assert!(receipt.is_proven());
            assert_eq!(receipt.revocation, Revocation::Move, "{errno}");
        }
    }
    // Neither way: nobody gets it.
    let receipt = torn_down(&pool, || {
        let moves = inject(Call::UffdMove, 0, u32::MAX, libc::ENOMEM);
        std::mem::forget(moves);
        // The question whether the window is one mapping, and the move out of it, are made.
        inject(Call::Mremap, 2, u32::MAX, libc::ENOMEM)
    });
    assert_eq!(receipt.bytes_quarantined, 4 * BLOCK_SIZE);
    assert_eq!(receipt.quarantined[0].reason, QuarantineReason::NotRevoked);
    assert_nothing_dirty_left(&pool);
}

/// What the kernel answers where it keeps account of all that could be written to (`vm.overcommit_memory`).
fn memory_that_may_not_be_writable_once_more_comes_home_without_proof(page_size: PageSize) {
    let Some(pool) = moving(page_size, 4) else {
        return;
    };
    logs::listen();
    // The question whether the window is one mapping comes first.
    let receipt = torn_down(&pool, || inject(Call::Mremap, 1, 1, libc::ENOMEM));
    assert!(receipt.is_proven(), "{receipt:?}");
    assert_eq!(receipt.revocation, Revocation::Mremap);
    assert_eq!(receipt.bytes_scrubbed, 4 * BLOCK_SIZE);
    assert!(logs::heard(Level::Warn, "vm.overcommit_memory"));
    assert_nothing_dirty_left(&pool);
    let receipt = torn_down(&pool, || inject_short(Call::UffdMove, 0, 1, 1 << 21));
    assert_eq!(receipt.revocation, Revocation::Move);
}

fn moves_that_stop_half_way_go_on(page_size: PageSize) {
    let Some(pool) = moving(page_size, 4) else {
        return;
    };
    let step = match page_size {
        PageSize::Base4K => PAGE,
        _ => BLOCK_SIZE,
    };
    for bytes in [step, 3 * step] {
        let fault = || inject_short(Call::UffdMove, 0, u32::MAX, bytes as usize);
        let receipt = torn_down(&pool, fault);
        assert!(receipt.is_proven(), "{receipt:?}");
        assert_eq!(receipt.revocation, Revocation::Move);
        assert_eq!(receipt.bytes_scrubbed, 4 * BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    }
}

/// They show the kernel's zero page, or its huge one.
fn pages_that_were_only_read(page_size: PageSize) {
    let Some(pool) = moving(page_size, 4) else {
        return;
    };
    for _ in 0..3 {
        let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
        let memory = lease.memory();
        memory.write_obj(1_u8, GuestAddress(BLOCK_SIZE)).unwrap();
        for at in (0..4 * BLOCK_SIZE).step_by(PAGE as usize) {
            let byte: u8 = memory.read_obj(GuestAddress(at)).unwrap();
            assert_eq!(byte == 1, at == BLOCK_SIZE);
        }
        drop(memory);
        let receipt = teardown(lease);
        assert!(receipt.is_proven(), "{receipt:?}");
        assert_eq!(receipt.revocation, Revocation::Move);
        assert_nothing_dirty_left(&pool);
    }
}

fn advice_about_parts_of_a_guest(page_size: PageSize) {
    let by_mremap = pools::builder(page_size, 4).revoke_by(RevokeBy::Mremap);
    let by_mremap = by_mremap.build().unwrap();
    for pool in moving(page_size, 4).into_iter().chain([by_mremap]) {
        a_part_is_advised_about(&pool);
    }
}

fn a_part_is_advised_about(pool: &Pool) {
    let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let start = lease.host_addresses().remove(0).1;
    // Borders between blocks: no huge page is cut.
    let part = start.wrapping_add(BLOCK_SIZE as usize);
    // SAFETY: the range lies in the lease's window; the advice is about reading ahead and changes no byte.
    let status = unsafe { libc::madvise(part.cast(), BLOCK_SIZE as usize, libc::MADV_SEQUENTIAL) };
    assert_eq!(status, 0);
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    assert_eq!(receipt.revocation, pool.revocation());
    assert_eq!(receipt.bytes_scrubbed, 4 * BLOCK_SIZE);
    // The next guest is not advised about.
    let next = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    let start = next.host_addresses().remove(0).1.addr();
    let mut there = mappings(start..start + 4 * BLOCK_SIZE as usize).into_iter();
    assert!(there.all(|mapping| !mapping.has("sr")));
    assert!(teardown(next).is_proven());
    assert_nothing_dirty_left(pool);
}

fn sparse_guests(page_size: PageSize) {
    let Some(pool) = moving(page_size, 8) else {
        return;
    };
    for step in [2, 5, 17, 40, 511, 1000] {
        let lease = pool.lease(&regions(&[(0, 8 * BLOCK_SIZE)])).unwrap();
        let memory = lease.memory();
        for page in (0..4096).step_by(step) {
            memory.write_obj(7_u8, GuestAddress(page * PAGE)).unwrap();
        }
        drop(memory);
        let receipt = teardown(lease);
        assert!(receipt.is_proven());
        assert_eq!(receipt.revocation, Revocation::Move);
        assert_nothing_dirty_left(&pool);
    }
}

/// Memory that a VMM has locked is moved like any other.
fn locked_guests(page_size: PageSize) {
    let Some(pool) = moving(page_size, 4) else {
        return;
    };
    let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    let start = lease.host_addresses().remove(0).1;
    // SAFETY: the range is the lease's window.
    let status = unsafe { libc::mlock(start.cast(), 4 * BLOCK_SIZE as usize) };
    if status != 0 {
        return vm_scrub_tests::skipped(&"this process may not lock memory");
    }
    fill(&lease, 1);
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    assert_eq!(receipt.revocation, Revocation::Move);
    assert_nothing_dirty_left(&pool);
}

/// The kernel does not say what is in the guest's memory, so all of it is moved without proof. Whoever touched a guard page
/// (`MADV_GUARD_INSTALL`, Linux 6.13) that came with it would get a signal: the scrubber, or the next guest.
fn guard_pages_do_not_come_home_where_nothing_is_known_about_them(page_size: PageSize) {
    const MADV_GUARD_INSTALL: libc::c_int = 102;
    let test = format!(
        "guard_pages_do_not_come_home_where_nothing_is_known_about_them::{}",
        of(page_size)
    );
    alone(&test, || {
        let Some(pool) = moving(page_size, 4) else {
            return;
        };
        let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
        fill(&lease, 1);
        let guarded = lease.host_addresses()[0]
            .1
            .wrapping_add(BLOCK_SIZE as usize);
        // SAFETY: the range lies in the lease's window, to which nobody holds a reference.
        let status =
            unsafe { libc::madvise(guarded.cast(), BLOCK_SIZE as usize, MADV_GUARD_INSTALL) };
        if status != 0 {
            return vm_scrub_tests::skipped(&"this kernel has no guard pages");
        }
        let first_look = inject(Call::PagemapScan, 0, 1, libc::EIO);
        let receipt = teardown(lease);
        assert_eq!(first_look.hits(), 1);
        drop(first_look);
        assert!(receipt.is_proven(), "{receipt:?}");
        assert_eq!(receipt.revocation, Revocation::Mremap);
        assert_eq!(receipt.bytes_never_populated, BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    });
}

/// Huge pages are huge when they come back.
#[test]
fn huge_pages_stay_huge() {
    let Some(pool) = moving(PageSize::Transparent, 8) else {
        return;
    };
    let mut before = None;
    for generation in 0..4 {
        let lease = pool.lease(&regions(&[(0, 8 * BLOCK_SIZE)])).unwrap();
        let (_, start) = lease.host_addresses().remove(0);
        if generation == 0 {
            smear(&lease, 1);
        }
        let window = start.addr()..start.addr() + 8 * BLOCK_SIZE as usize;
        let huge: u64 = mappings(window).iter().map(|mapping| mapping.huge).sum();
        if huge == 0 {
            return vm_scrub_tests::skipped(&"this host gave no huge pages");
        }
        assert_eq!(*before.get_or_insert(huge), huge, "generation {generation}");
        let receipt = teardown(lease);
        assert!(receipt.is_proven());
    }
}

/// A huge page of which a guest has a part only is not mapped as one, and might be pinned as a whole: the kernel is not asked.
#[test]
fn parts_of_huge_pages_are_moved_without_proof() {
    let Some(pool) = moving(PageSize::Transparent, 4) else {
        return;
    };
    let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    assert_eq!(teardown(lease).revocation, Revocation::Move);
    // Beside whole ones, and where there is nothing but a part.
    for bytes in [2 * BLOCK_SIZE + PAGE, PAGE] {
        let lease = pool.lease(&regions(&[(0, bytes)])).unwrap();
        fill(&lease, 1);
        let receipt = teardown(lease);
        assert!(receipt.is_proven());
        assert_eq!(receipt.revocation, Revocation::Mremap);
        assert_eq!(receipt.bytes_scrubbed, receipt.bytes_total);
    }
    assert_nothing_dirty_left(&pool);
}

/// A VMM that wants huge pages for a part of its guest in a pool of small ones. What is beside one may be a part of another, about
/// which the kernel is not asked.
#[test]
fn small_pages_beside_a_huge_one_are_moved_without_proof() {
    let Some(pool) = moving(PageSize::Base4K, 2) else {
        return;
    };
    let lease = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
    let start = lease.host_addresses()[0].1;
    // SAFETY: the range lies in the lease's window; the advice changes no byte.
    unsafe { libc::madvise(start.cast(), BLOCK_SIZE as usize, libc::MADV_HUGEPAGE) };
    fill(&lease, 1);
    let first = mappings(start.addr()..start.addr() + BLOCK_SIZE as usize);
    if first.iter().all(|mapping| mapping.huge == 0) {
        return vm_scrub_tests::skipped(&"this host gave no huge pages");
    }
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    assert_eq!(receipt.revocation, Revocation::Mremap);
    assert_eq!(receipt.bytes_scrubbed, 2 * BLOCK_SIZE);
    assert_nothing_dirty_left(&pool);
}
