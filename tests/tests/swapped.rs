//! A guest's pages that are swapped out when it goes hold its bytes like any others: they are found, revoked, scrubbed and read
//! back. Needs a host with swap, which `scripts/test-in-qemu.sh` has.

use std::fs;
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::{
    BLOCK_SIZE, Lease, PageSize, Policy, Revocation, RevokeBy, ScrubReceipt, scrub_raw,
};
use vm_scrub_tests::maps::{has_uffdio_move, populated_bytes, swapped_bytes};
use vm_scrub_tests::{
    PAGE, assert_adds_up, assert_all_zero, assert_nothing_dirty_left, fill, on_small_page_sizes,
    pools, quiesce, regions, skipped, teardown,
};

on_small_page_sizes!(
    a_whole_guest_comes_back_and_is_scrubbed,
    a_few_pages_are_found_among_none,
    in_the_background,
);

const BLOCKS: u64 = 4;
const BYTES: u64 = BLOCKS * BLOCK_SIZE;

/// Whether there is swap; says so if there is none.
fn has_swap() -> bool {
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    // The first line is the table's head.
    let has = swaps.lines().count() > 1;
    if !has {
        skipped(&"this host has no swap");
    }
    has
}

/// Asks the kernel to write out what is in `range`, and sees that `expected` bytes of it are.
fn swap_out(range: Range<usize>, expected: u64) {
    // It leaves out pages that it is busy with.
    for _ in 0..100 {
        // SAFETY: the range is mapped, and what is in it stays what it is.
        let status = unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(range.start),
                range.len(),
                libc::MADV_PAGEOUT,
            )
        };
        assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
        if swapped_bytes(range.clone()) >= expected {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!(
        "{} of {expected} bytes are swapped out",
        swapped_bytes(range)
    );
}

fn window(lease: &Lease) -> Range<usize> {
    let (region, start) = lease.host_addresses().remove(0);
    let start = start.expose_provenance();
    start..start + region.bytes as usize
}

/// The ways to revoke that this kernel has.
fn ways() -> Vec<RevokeBy> {
    let mut ways = vec![RevokeBy::Mremap];
    if has_uffdio_move() {
        ways.push(RevokeBy::Move);
    }
    ways
}

/// Leases a whole pool for each way to revoke, to `guest`, whose receipt is then looked at.
fn for_each_way(page_size: PageSize, guest: impl Fn(Lease) -> ScrubReceipt, scrubbed: u64) {
    if !has_swap() {
        return;
    }
    for way in ways() {
        let pool = pools::builder(page_size, BLOCKS)
            .revoke_by(way)
            .build()
            .unwrap();
        let receipt = guest(pool.lease(&regions(&[(0, BYTES)])).unwrap());
        assert_adds_up(&receipt);
        assert_eq!(receipt.bytes_quarantined, 0, "{receipt:?}");
        assert_eq!(receipt.bytes_scrubbed, scrubbed);
        assert_eq!(receipt.bytes_never_populated, BYTES - scrubbed);
        assert!(receipt.is_proven());
        if way == RevokeBy::Mremap {
            assert_eq!(receipt.revocation, Revocation::Mremap);
        }
        let next = pool.lease(&regions(&[(0, BYTES)])).unwrap();
        assert_all_zero(&next);
        assert!(teardown(next).is_proven());
        assert_nothing_dirty_left(&pool);
    }
}

fn a_whole_guest_comes_back_and_is_scrubbed(page_size: PageSize) {
    let guest = |lease: Lease| {
        fill(&lease, 7);
        swap_out(window(&lease), BYTES / 2);
        teardown(lease)
    };
    for_each_way(page_size, guest, BYTES);
}

/// The only pages of theirs, and swapped out: nothing that is present says that there is something.
fn a_few_pages_are_found_among_none(page_size: PageSize) {
    let pages = [0, 3, 511, 1100, BYTES / PAGE - 1];
    let guest = |lease: Lease| {
        let memory = lease.memory();
        for page in pages {
            memory
                .write_obj(0x5a_u8, GuestAddress(page * PAGE + page % PAGE))
                .unwrap();
        }
        drop(memory);
        let populated = populated_bytes(window(&lease));
        swap_out(window(&lease), populated);
        teardown(lease)
    };
    // A transparent huge page comes as a whole: all blocks but one have a page that was touched.
    let scrubbed = match page_size {
        PageSize::Base4K => pages.len() as u64 * PAGE,
        _ => 3 * BLOCK_SIZE,
    };
    for_each_way(page_size, guest, scrubbed);
}

fn in_the_background(page_size: PageSize) {
    let guest = |lease: Lease| {
        fill(&lease, 9);
        swap_out(window(&lease), BYTES / 2);
        let quiesced = quiesce(&lease);
        lease
            .retire(quiesced)
            .unwrap()
            .wait_in_background()
            .unwrap()
    };
    for_each_way(page_size, guest, BYTES);
}

/// Clean memory that the host swaps out is leased as it is, and is zero when it comes back.
#[test]
fn clean_memory_is_swapped_out_and_leased() {
    if !has_swap() {
        return;
    }
    for way in ways() {
        let builder = pools::builder(PageSize::Base4K, BLOCKS).revoke_by(way);
        let pool = builder.check_on_grant(true).build().unwrap();
        for tag in 1..4 {
            let lease = pool.lease(&regions(&[(0, BYTES)])).unwrap();
            swap_out(window(&lease), 0);
            assert_all_zero(&lease);
            fill(&lease, tag);
            swap_out(window(&lease), BYTES / 2);
            assert!(teardown(lease).is_proven());
        }
        assert_nothing_dirty_left(&pool);
    }
}

#[test]
fn of_memory_that_is_not_a_pools() {
    if !has_swap() {
        return;
    }
    let len = 8 << 20;
    // SAFETY: new memory, wherever there is room.
    let start = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(start, libc::MAP_FAILED);
    let start = start.cast::<u8>();
    // SAFETY: mapped, and this test's alone.
    unsafe {
        start.add(len / 2).write_bytes(0xc3, 3 * PAGE as usize);
        let range = start.expose_provenance()..start.expose_provenance() + len;
        swap_out(range.clone(), populated_bytes(range));
        let done = scrub_raw(start, len, &Policy::new()).unwrap();
        assert_eq!(done.bytes, 3 * PAGE);
        let all = std::slice::from_raw_parts(start, len);
        assert_eq!(all.iter().position(|byte| *byte != 0), None);
        libc::munmap(start.cast(), len);
    }
}
