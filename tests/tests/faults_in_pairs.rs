//! A failure while another one is being cleaned up, and a failure in the middle of a range that moves in pieces.

use std::time::Duration;
use vm_scrub::lease::{LeaseError, QuarantineReason};
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{BLOCK_SIZE, PageSize, Pool, RevokeBy};
use vm_scrub_tests::child::with_huge_pages;
use vm_scrub_tests::maps::{has_uffdio_move, is_readable};
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, fill, numa, on_small_page_sizes, pools, quiesce,
    regions, skipped, smear, teardown,
};

on_small_page_sizes!(a_range_that_moves_in_pieces_moves_as_a_whole_or_not);

fn one_thread(page_size: PageSize, blocks: u64) -> Pool {
    pools::builder(page_size, blocks)
        .threads(1)
        .build()
        .unwrap()
}

/// Leaves borders in the pool's memory, as a VMM does that binds parts of its guest's memory differently.
fn with_borders(page_size: PageSize, node: u32) -> Pool {
    // Pages that are moved one by one leave no borders behind.
    let builder = pools::builder(page_size, 4).revoke_by(RevokeBy::Mremap);
    let pool = builder.threads(1).build().unwrap();
    let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    smear(&lease, 1);
    let (_, start) = lease.host_addresses().remove(0);
    for block in [1, 2] {
        let bound = start.wrapping_add(block * BLOCK_SIZE as usize + 4096);
        // SAFETY: the range lies in the lease's window.
        unsafe { numa::prefer(node, bound, 8192) };
    }
    assert!(teardown(lease).is_proven());
    pool
}

fn a_range_that_moves_in_pieces_moves_as_a_whole_or_not(page_size: PageSize) {
    let Some(node) = numa::node() else {
        return;
    };
    let with_borders = |page_size| with_borders(page_size, node);
    let whole = regions(&[(0, 4 * BLOCK_SIZE)]);
    let pool = with_borders(page_size);
    let lease = pool.lease(&whole).unwrap();
    assert_all_zero(&lease);
    fill(&lease, 2);
    assert!(teardown(lease).is_proven());
    assert_nothing_dirty_left(&pool);

    // Granting: each move fails once, and what had been moved goes back.
    let mut failures = 0;
    for skip in 0.. {
        let pool = with_borders(page_size);
        let before = pool.accounts();
        let fault = inject(Call::Mremap, skip, 1, libc::ENOMEM);
        let result = pool.lease(&whole);
        if fault.hits() == 0 {
            break;
        }
        failures += 1;
        drop(fault);
        let error = result.unwrap_err();
        assert!(matches!(error, LeaseError::Map { .. }), "{error}");
        assert_eq!(pool.accounts(), before);
        let again = pool.lease(&whole).unwrap();
        assert_all_zero(&again);
        smear(&again, 3);
        assert!(teardown(again).is_proven());
        assert_nothing_dirty_left(&pool);
    }
    assert!(failures > 5, "{failures} moves are not in pieces");

    // Revoking: whatever was moved or not, nothing of it is clean.
    for skip in 0.. {
        let pool = with_borders(page_size);
        let lease = pool.lease(&whole).unwrap();
        smear(&lease, 3);
        let quiesced = quiesce(&lease);
        let fault = inject(Call::Mremap, skip, 1, libc::ENOMEM);
        let receipt = lease.teardown(quiesced).unwrap();
        if fault.hits() == 0 {
            break;
        }
        drop(fault);
        assert_eq!(receipt.bytes_quarantined, 4 * BLOCK_SIZE);
        assert_eq!(receipt.quarantined[0].reason, QuarantineReason::NotRevoked);
        assert_nothing_dirty_left(&pool);
    }
}

/// A grant fails in its second range, and the first one cannot be taken back: its blocks are quarantined, no others.
#[test]
fn what_cannot_be_taken_back_from_a_lease_that_failed_is_quarantined() {
    for (call, errno) in [
        (Call::Mmap, libc::ENOMEM),
        (Call::Mprotect, libc::ENOMEM),
        (Call::Madvise, libc::ENOMEM),
    ] {
        let pool = one_thread(PageSize::Base4K, 4);
        let used = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
        fill(&used, 1);
        assert!(teardown(used).is_proven());

        // Two regions: the second grant fails (each takes a question and a move).
        let moves = inject(Call::Mremap, 3, 1, libc::ENOMEM);
        // Windows are cut from what was reserved for the first lease: nothing is mapped before something has to be closed.
        let closing = inject(call, 0, u32::MAX, errno);
        let layout = regions(&[(0, BLOCK_SIZE), (8 * BLOCK_SIZE, 2 * BLOCK_SIZE)]);
        let error = pool.lease(&layout).unwrap_err();
        assert!(moves.hits() > 1, "{call:?}");
        drop(closing);
        drop(moves);
        assert!(matches!(error, LeaseError::Map { .. }), "{error}");
        let accounts = pool.accounts();
        assert_eq!(accounts.quarantined, BLOCK_SIZE, "{call:?}");
        assert_eq!(accounts.clean, 3 * BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    }
}

/// The same where the kernel does not let go of the pages of the first range.
#[test]
fn what_is_held_of_a_lease_that_failed_is_quarantined() {
    if !has_uffdio_move() {
        skipped(&"this kernel has no UFFDIO_MOVE");
        return;
    }
    let builder = pools::builder(PageSize::Base4K, 4).threads(1);
    let pool = builder.pin_patience(Duration::ZERO).build().unwrap();
    let used = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    fill(&used, 1);
    assert!(teardown(used).is_proven());

    let moves = inject(Call::Mremap, 3, 1, libc::ENOMEM);
    let held = inject(Call::UffdMove, 0, u32::MAX, libc::EBUSY);
    let layout = regions(&[(0, BLOCK_SIZE), (8 * BLOCK_SIZE, 2 * BLOCK_SIZE)]);
    let error = pool.lease(&layout).unwrap_err();
    assert!(matches!(error, LeaseError::Map { .. }), "{error}");
    assert!(held.hits() > 1, "nothing was moved");
    drop(held);
    drop(moves);
    assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
    assert_nothing_dirty_left(&pool);
}

/// Whoever may still be at work behind a window that could not be closed finds it where it was, and not the next window:
/// even in a pool that keeps none.
#[test]
fn a_window_that_could_not_be_closed_keeps_its_place() {
    for (call, skip) in [(Call::Mprotect, 0), (Call::Mremap, 1), (Call::Mmap, 0)] {
        let builder = pools::builder(PageSize::Base4K, 4).kept_windows(0);
        let pool = builder.threads(1).build().unwrap();
        let lease = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
        smear(&lease, 1);
        let (_, start) = lease.host_addresses().remove(0);
        let quiesced = quiesce(&lease);
        // An answer for which there is no other way round.
        let fault = inject(call, skip, 1, libc::EINVAL);
        let receipt = lease.teardown(quiesced).unwrap();
        assert_eq!(fault.hits(), 1, "{call:?}");
        drop(fault);
        assert_eq!(receipt.bytes_quarantined, 2 * BLOCK_SIZE);
        assert!(is_readable(start.addr()), "{call:?}: the window is gone");
        assert_nothing_dirty_left(&pool);
    }
}

/// A view that was mapped and can be neither populated nor closed still shows its blocks to whoever finds it.
#[test]
fn a_view_that_cannot_be_closed_keeps_its_blocks_from_others() {
    let test = "a_view_that_cannot_be_closed_keeps_its_blocks_from_others";
    with_huge_pages(test, 4, || {
        let pool = pools::builder(PageSize::Huge2M, 4)
            .threads(1)
            .populate(true)
            .build()
            .unwrap();
        let populate = inject(Call::Populate, 0, 1, libc::ENOMEM);
        // The window and the view are mapped; closing it is the third.
        let closing = inject(Call::Mmap, 2, 1, libc::ENOMEM);
        let error = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap_err();
        assert_eq!(populate.hits(), 2);
        drop(closing);
        drop(populate);
        assert!(error.to_string().contains(Call::Populate.name()), "{error}");
        assert_eq!(pool.accounts().quarantined, 2 * BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    });
}
