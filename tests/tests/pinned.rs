//! Writers that nobody can see in the address space: devices that have the guest's pages pinned, and processes that share
//! them. What they can still write to is found, named and never leased again; the rest is.
//!
//! The pages are pinned by io_uring, which goes on writing to them wherever they are mapped.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::time::Duration;
use vm_scrub::lease::{Outcome, QuarantineReason};
use vm_scrub::test_support::{Call, inject, inject_short};
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, Revocation, RevokeBy, ScrubReceipt};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::maps::{has_uffdio_move, is_readable, mappings};
use vm_scrub_tests::pinned::Pinned;
use vm_scrub_tests::{
    PAGE, assert_all_zero, assert_nothing_dirty_left, fill, on_small_page_sizes, pools, quiesce,
    regions, teardown,
};

on_small_page_sizes!(
    what_a_device_holds_is_quarantined_alone,
    several_places_in_several_pieces,
    places_in_pieces_that_are_not_in_the_pools_order,
    what_is_not_brought_home_stays_where_nobody_gets_it,
    a_device_that_lets_go_in_time_costs_nothing,
    all_of_a_guest_is_held,
    what_a_forked_child_shares_is_found,
    without_move_nothing_is_found_and_the_receipt_says_so,
    a_retired_guest,
);

/// Pages 0 and 2 are refused in the first round, and page 1 comes home; in the second round nothing can be moved with proof any more.
/// The gap that page 1 has left must not come home over it.
#[test]
fn what_came_home_is_not_lost_when_the_rest_cannot_be_moved() {
    let Some(builder) = builder(PageSize::Base4K, 1) else {
        return;
    };
    let pool = builder.threads(1).build().unwrap();
    let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    // SAFETY: the lease's memory, which nobody else uses.
    unsafe { start(&lease).write_bytes(SECRET, 3 * PAGE as usize) };
    let quiesced = quiesce(&lease);
    let refused = inject(Call::UffdMove, 0, 1, libc::EBUSY);
    // Faults of one kind are asked in turn, and count only the calls that come to them.
    let _one_page = inject_short(Call::UffdMove, 0, 1, PAGE as usize);
    let _refused = inject(Call::UffdMove, 1, 1, libc::EBUSY);
    let _failed = inject(Call::UffdMove, 1, 1, libc::ENOMEM);
    let receipt = lease.teardown(quiesced).unwrap();
    assert_eq!(refused.hits(), 4, "the moves are others than they were");
    assert_eq!(receipt.revocation, Revocation::Mremap);
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_scrubbed, 3 * PAGE);
    assert_nothing_dirty_left(&pool);
}

const SECRET: u8 = 0x5e;
const GUEST: u64 = 1 << 30;

/// `None` on kernels that cannot tell.
fn builder(page_size: PageSize, blocks: u64) -> Option<vm_scrub::PoolBuilder> {
    if !has_uffdio_move() {
        vm_scrub_tests::skipped(&"this kernel has no UFFDIO_MOVE");
        return None;
    }
    let patience = Duration::from_millis(20);
    let builder = pools::builder(page_size, blocks);
    Some(builder.revoke_by(RevokeBy::Move).pin_patience(patience))
}

fn start(lease: &Lease) -> *mut u8 {
    lease.host_addresses().remove(0).1
}

fn device_file() -> File {
    // SAFETY: the name is a NUL-terminated literal; the descriptor is new and nobody else's.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"device".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.write_all(&[SECRET; PAGE as usize]).unwrap();
    file
}

/// What the receipt says is held by somebody, as offsets in the guest, first byte and length.
fn held(receipt: &ScrubReceipt) -> Vec<(u64, u64)> {
    let held = receipt.quarantined.iter();
    held.filter(|range| range.reason == QuarantineReason::PinnedOrShared)
        .map(|range| (range.guest_address - GUEST, range.bytes))
        .collect()
}

/// The page that is pinned, or the huge page that it is in.
fn unit(page_size: PageSize, offset: u64, bytes: u64) -> (u64, u64) {
    match page_size {
        PageSize::Base4K => (offset, bytes),
        _ => (offset / BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE),
    }
}

/// `blocks` blocks of the guest are lost, and everything else was recycled.
#[track_caller]
fn assert_lost(pool: &Pool, receipt: &ScrubReceipt, blocks: u64) {
    assert_eq!(receipt.outcome, Outcome::Quarantined);
    assert_eq!(receipt.revocation, Revocation::Move);
    assert_eq!(receipt.bytes_quarantined, blocks * BLOCK_SIZE);
    assert_eq!(
        receipt.bytes_scrubbed,
        receipt.bytes_total - blocks * BLOCK_SIZE
    );
    let accounts = pool.accounts();
    assert_eq!(accounts.quarantined, blocks * BLOCK_SIZE);
    assert_eq!(accounts.clean, pool.capacity() - blocks * BLOCK_SIZE);
    for range in &receipt.quarantined {
        let expected = [
            QuarantineReason::PinnedOrShared,
            QuarantineReason::BesidePinned,
        ];
        assert!(expected.contains(&range.reason), "{range:?}");
        assert!(range.detail.contains("UFFDIO_MOVE"), "{range:?}");
    }
}

fn what_a_device_holds_is_quarantined_alone(page_size: PageSize) {
    let Some(builder) = builder(page_size, 8) else {
        return;
    };
    let pool = builder.build().unwrap();
    let lease = pool.lease(&regions(&[(GUEST, 8 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let (offset, bytes) = (3 * BLOCK_SIZE + 5 * PAGE, 2 * PAGE);
    let window = start(&lease);
    let Some(device) = Pinned::new(window.wrapping_add(offset as usize), bytes as usize) else {
        return;
    };
    let receipt = teardown(lease);
    assert_eq!(held(&receipt), [unit(page_size, offset, bytes)]);
    assert_lost(&pool, &receipt, 1);
    // The window is gone as a whole, also where its pages could not be moved.
    let all = window.addr()..window.addr() + 8 * BLOCK_SIZE as usize;
    for address in all.clone().step_by(PAGE as usize) {
        assert!(!is_readable(address));
    }
    for mapping in mappings(all) {
        assert_eq!((&mapping.permissions[..3], mapping.resident), ("---", 0));
    }

    // The device writes, and nobody sees it: not the next guests, and not those after the pin is gone.
    let next = pool.lease(&regions(&[(0, 7 * BLOCK_SIZE)])).unwrap();
    device.write_from(&device_file(), PAGE as u32);
    assert_all_zero(&next);
    drop(device);
    fill(&next, 2);
    let receipt = teardown(next);
    assert!(receipt.is_proven());
    assert_eq!(receipt.revocation, Revocation::Move);
    std::thread::sleep(Duration::from_millis(50));
    assert_nothing_dirty_left(&pool);
    assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
}

fn several_places_in_several_pieces(page_size: PageSize) {
    let Some(builder) = builder(page_size, 12) else {
        return;
    };
    let pool = builder.build().unwrap();
    // A neighbour in the middle: the guest's region is in two pieces of the pool.
    let first = pool.lease(&regions(&[(0, 3 * BLOCK_SIZE)])).unwrap();
    let neighbour = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    fill(&neighbour, 9);
    assert!(teardown(first).is_proven());
    let layout = regions(&[(GUEST, 9 * BLOCK_SIZE), (4 * GUEST, 2 * BLOCK_SIZE)]);
    let lease = pool.lease(&layout).unwrap();
    assert!(lease.blocks().len() > 1);
    fill(&lease, 1);
    let places = [
        // The first page of the guest, the last of a block and the first of the next, the last page of the region.
        (0, PAGE),
        (5 * BLOCK_SIZE - PAGE, 2 * PAGE),
        (9 * BLOCK_SIZE - PAGE, PAGE),
    ];
    let window = start(&lease);
    let mut devices = Vec::new();
    for (offset, bytes) in places {
        let Some(device) = Pinned::new(window.wrapping_add(offset as usize), bytes as usize) else {
            return;
        };
        devices.push(device);
    }
    let receipt = teardown(lease);
    let expected = match page_size {
        PageSize::Base4K => places.to_vec(),
        _ => vec![
            (0, BLOCK_SIZE),
            (4 * BLOCK_SIZE, 2 * BLOCK_SIZE),
            (8 * BLOCK_SIZE, BLOCK_SIZE),
        ],
    };
    assert_eq!(held(&receipt), expected);
    assert_eq!(receipt.bytes_quarantined, 4 * BLOCK_SIZE);
    assert_eq!(pool.accounts().quarantined, 4 * BLOCK_SIZE);
    for device in &devices {
        device.write_from(&device_file(), PAGE as u32);
    }
    assert_nothing_dirty_left(&pool);
    assert_eq!(vm_scrub_tests::first_nonzero(&neighbour), Some(0));
    assert!(teardown(neighbour).is_proven());
    drop(devices);
    assert_nothing_dirty_left(&pool);
}

/// A guest's memory begins behind where it ends in the pool; both are held.
fn places_in_pieces_that_are_not_in_the_pools_order(page_size: PageSize) {
    let Some(builder) = builder(page_size, 5) else {
        return;
    };
    let pool = builder.build().unwrap();
    let one = regions(&[(GUEST, BLOCK_SIZE)]);
    let [first, second] = [(); 2].map(|()| pool.lease(&one).unwrap());
    let _ = teardown(first);
    let lease = pool.lease(&regions(&[(GUEST, 4 * BLOCK_SIZE)])).unwrap();
    let places: Vec<u64> = lease.blocks().iter().map(|extent| extent.first).collect();
    assert_eq!(places, [2, 0]);
    fill(&lease, 1);
    let at = [PAGE, 3 * BLOCK_SIZE + 5 * PAGE];
    let [Some(near), Some(far)] =
        at.map(|at| Pinned::new(start(&lease).wrapping_add(at as usize), PAGE as usize))
    else {
        return;
    };
    let receipt = teardown(lease);
    assert_eq!(held(&receipt), at.map(|at| unit(page_size, at, PAGE)));
    drop((near, far));
    let _ = teardown(second);
    assert_nothing_dirty_left(&pool);
}

/// The kernel refuses to move, and then to say what is left: all of it has to stay in a place that is inaccessible, because the
/// kernel would hand it to somebody else if it were unmapped.
fn what_is_not_brought_home_stays_where_nobody_gets_it(page_size: PageSize) {
    let test = match page_size {
        PageSize::Base4K => "what_is_not_brought_home_stays_where_nobody_gets_it::base_4k",
        _ => "what_is_not_brought_home_stays_where_nobody_gets_it::transparent",
    };
    alone(test, || {
        let Some(builder) = builder(page_size, 4) else {
            return;
        };
        let pool = builder.threads(1).build().unwrap();
        let kept = || -> u64 {
            let all = mappings(0..usize::MAX).into_iter();
            let closed = all.filter(|mapping| mapping.permissions.starts_with("---"));
            closed.map(|mapping| mapping.resident).sum()
        };
        let before = kept();
        let lease = pool.lease(&regions(&[(GUEST, 3 * BLOCK_SIZE)])).unwrap();
        fill(&lease, 1);
        let moving = inject(Call::UffdMove, 0, u32::MAX, libc::EBUSY);
        // Asked once before moving.
        let asking = inject(Call::PagemapScan, 1, 1, libc::EIO);
        let receipt = teardown(lease);
        drop((moving, asking));
        let lost = &receipt.quarantined[0];
        assert_eq!(lost.reason, QuarantineReason::NotRevoked);
        assert!(lost.detail.contains("PAGEMAP_SCAN"), "{lost:?}");
        assert_eq!(receipt.bytes_quarantined, 3 * BLOCK_SIZE);
        assert_eq!(kept() - before, 3 * BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    });
}

fn a_device_that_lets_go_in_time_costs_nothing(page_size: PageSize) {
    let Some(builder) = builder(page_size, 4) else {
        return;
    };
    let pool = builder.pin_patience(Duration::MAX).build().unwrap();
    let lease = pool.lease(&regions(&[(GUEST, 4 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let Some(device) = Pinned::new(start(&lease).wrapping_add(PAGE as usize), 4096) else {
        return;
    };
    let device = SendRing(device);
    let closing = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(30));
        drop(device);
    });
    let receipt = teardown(lease);
    closing.join().unwrap();
    assert!(receipt.is_proven(), "{receipt:?}");
    assert_eq!(receipt.revocation, Revocation::Move);
    assert_eq!(receipt.bytes_scrubbed, 4 * BLOCK_SIZE);
    assert_nothing_dirty_left(&pool);
}

/// A ring may be closed by any thread.
struct SendRing(#[expect(dead_code, reason = "held, and closed with this")] Pinned);

// SAFETY: the mappings of a ring are the process's, and one thread at a time has them.
unsafe impl Send for SendRing {}

/// A device that was never detached (VFIO pins all of its guest's memory).
fn all_of_a_guest_is_held(page_size: PageSize) {
    let Some(builder) = builder(page_size, 6) else {
        return;
    };
    let pool = builder.build().unwrap();
    let lease = pool.lease(&regions(&[(GUEST, 4 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let Some(device) = Pinned::new(start(&lease), 4 * BLOCK_SIZE as usize) else {
        return;
    };
    let receipt = teardown(lease);
    assert_eq!(held(&receipt), [(0, 4 * BLOCK_SIZE)]);
    assert_lost(&pool, &receipt, 4);
    device.write_from(&device_file(), PAGE as u32);
    assert_nothing_dirty_left(&pool);
    drop(device);
    assert_nothing_dirty_left(&pool);
}

/// A VMM that forked, and before that took off a part of its guest's memory what keeps it from children.
fn what_a_forked_child_shares_is_found(page_size: PageSize) {
    let Some(builder) = builder(page_size, 6) else {
        return;
    };
    let pool = builder.build().unwrap();
    let lease = pool.lease(&regions(&[(GUEST, 6 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let shared = start(&lease).wrapping_add(2 * BLOCK_SIZE as usize);
    // SAFETY: the range lies in the lease's window. The child waits until it is killed, and calls nothing else.
    let child = unsafe {
        for advice in [libc::MADV_DOFORK, libc::MADV_KEEPONFORK] {
            assert_eq!(libc::madvise(shared.cast(), BLOCK_SIZE as usize, advice), 0);
        }
        libc::fork()
    };
    assert!(child >= 0);
    if child == 0 {
        // SAFETY: a forked child that only waits, and not for longer than the test could take.
        unsafe {
            // The rings of other tests, which would keep their pages pinned.
            libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0);
            libc::sleep(60);
            libc::_exit(0);
        }
    }
    let receipt = teardown(lease);
    assert_eq!(held(&receipt), [(2 * BLOCK_SIZE, BLOCK_SIZE)]);
    assert_lost(&pool, &receipt, 1);
    assert_nothing_dirty_left(&pool);
    let mut status = 0;
    // SAFETY: the child is this test's own, and `status` is live and writable.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
    }
    assert_nothing_dirty_left(&pool);
}

fn without_move_nothing_is_found_and_the_receipt_says_so(page_size: PageSize) {
    let builder = pools::builder(page_size, 4).revoke_by(RevokeBy::Mremap);
    let pool = builder.build().unwrap();
    assert_eq!(pool.revocation(), Revocation::Mremap);
    let lease = pool.lease(&regions(&[(GUEST, 4 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let Some(device) = Pinned::new(start(&lease), 4096) else {
        return;
    };
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    assert_eq!(receipt.revocation, Revocation::Mremap);
    drop(device);
}

fn a_retired_guest(page_size: PageSize) {
    let Some(builder) = builder(page_size, 8) else {
        return;
    };
    let pool = builder.build().unwrap();
    let lease = pool.lease(&regions(&[(GUEST, 8 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let (offset, bytes) = (7 * BLOCK_SIZE, PAGE);
    let at = start(&lease).wrapping_add(offset as usize);
    let Some(device) = Pinned::new(at, bytes as usize) else {
        return;
    };
    let quiesced = vm_scrub_tests::quiesce(&lease);
    let ticket = lease.retire(quiesced).unwrap();
    assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
    let receipt = ticket.wait().unwrap();
    vm_scrub_tests::assert_adds_up(&receipt);
    assert_eq!(held(&receipt), [unit(page_size, offset, bytes)]);
    assert_lost(&pool, &receipt, 1);
    device.write_from(&device_file(), PAGE as u32);
    assert_nothing_dirty_left(&pool);
}

/// A VMM that protected a page of its guest's, within a huge page that a device has pinned. Kernels up to 6.18 would try to cut
/// that page for as long as the pin lasts, so they are not asked, and the receipt says it.
#[test]
fn a_huge_page_in_parts_with_a_pin_in_it_holds_nobody_up() {
    let Some(builder) = builder(PageSize::Transparent, 4) else {
        return;
    };
    let pool = builder.build().unwrap();
    let lease = pool.lease(&regions(&[(GUEST, 4 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let within = start(&lease).wrapping_add((BLOCK_SIZE + 3 * PAGE) as usize);
    // SAFETY: the page lies in the lease's window, to which nobody holds a reference.
    let status = unsafe { libc::mprotect(within.cast(), PAGE as usize, libc::PROT_READ) };
    assert_eq!(status, 0);
    // The pin is on another page of the same huge page, so that it is not what was protected that is held.
    let Some(device) = Pinned::new(within.wrapping_add(PAGE as usize), PAGE as usize) else {
        return;
    };
    let receipt = teardown(lease);
    assert_eq!(receipt.revocation, Revocation::Mremap);
    assert!(receipt.is_proven());
    drop(device);
}
