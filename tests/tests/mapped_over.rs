//! A VMM that maps something else over a part of its guest's window: a snapshot to restore from, memory it shares with a
//! device, nothing at all. Whatever that is must not come home to the pool as if it were the pool's own.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use vm_scrub::lease::QuarantineReason;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, ScrubReceipt};
use vm_scrub_tests::maps::is_readable;
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, fill, on_every_page_size, pool, quiesce, regions,
    skipped, teardown,
};

on_every_page_size!(
    a_snapshot_restored_by_mapping_it: 8,
    memory_shared_with_somebody: 8,
    anonymous_memory_of_the_vmm_s_own: 8,
    memory_that_the_kernel_may_drop: 8,
    nothing: 8,
);

const BLOCK: usize = BLOCK_SIZE as usize;

/// A file of four blocks, full of somebody's secrets.
fn snapshot() -> File {
    // SAFETY: the name is a NUL-terminated literal; the descriptor is new and nobody else's.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"snapshot".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.write_all(&vec![0x5e; 4 * BLOCK]).unwrap();
    file
}

/// Maps over the third to the sixth of the eight blocks of a guest.
fn map_over(lease: &Lease, flags: libc::c_int, file: Option<&File>) {
    let (_, start) = lease.host_addresses().remove(0);
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let fd = file.map_or(-1, |file| file.as_raw_fd());
    // SAFETY: the range lies in the lease's window, to which nobody holds a reference.
    let mapped = unsafe {
        let at = start.wrapping_add(2 * BLOCK).cast();
        libc::mmap(at, 4 * BLOCK, prot, flags | libc::MAP_FIXED, fd, 0)
    };
    assert_ne!(mapped, libc::MAP_FAILED);
}

/// Lets `change` loose on a guest of eight blocks, tears it down, and lets nothing of it be seen by the next ones.
fn torn_down(page_size: PageSize, change: impl FnOnce(&Lease)) -> ScrubReceipt {
    let pool = pool(page_size, 8);
    let lease = pool.lease(&regions(&[(0, 8 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    change(&lease);
    let (_, start) = lease.host_addresses().remove(0);
    let quiesced = quiesce(&lease);
    let receipt = lease.teardown(quiesced).unwrap();
    if receipt.bytes_quarantined == 0 {
        assert!(!is_readable(start.addr()));
        let next = pool.lease(&regions(&[(0, 8 * BLOCK_SIZE)])).unwrap();
        assert_all_zero(&next);
        assert!(teardown(next).is_proven());
    }
    assert_nothing_dirty_left(&pool);
    receipt
}

/// In a hugetlb pool the window is replaced as a whole, and all of the file is scrubbed. Elsewhere pages come home from the
/// window, and where these are not the pool's, nothing does.
#[track_caller]
fn assert_kept_out(page_size: PageSize, receipt: &ScrubReceipt) {
    if page_size == PageSize::Huge2M {
        assert!(receipt.is_proven());
        return;
    }
    assert_eq!(
        receipt.bytes_quarantined, receipt.bytes_total,
        "{receipt:?}"
    );
    let [range] = &receipt.quarantined[..] else {
        panic!("{receipt:?}");
    };
    assert_eq!(range.reason, QuarantineReason::NotRevoked);
    let seen = ["was mapped over the guest's memory", "os error 12"];
    assert!(
        seen.iter().any(|seen| range.detail.contains(seen)),
        "{range:?}"
    );
}

fn a_snapshot_restored_by_mapping_it(page_size: PageSize) {
    let file = snapshot();
    let receipt = torn_down(page_size, |lease| {
        map_over(lease, libc::MAP_PRIVATE, Some(&file));
    });
    assert_kept_out(page_size, &receipt);
    // The guest has touched a page of it, which so became the guest's own.
    let receipt = torn_down(page_size, |lease| {
        map_over(lease, libc::MAP_PRIVATE, Some(&file));
        vm_scrub_tests::guest::fill_range(&lease.memory(), 3 * BLOCK_SIZE, 4096, 2);
    });
    assert_kept_out(page_size, &receipt);
}

/// What the next guest writes there could be zero again at any time.
fn memory_that_the_kernel_may_drop(page_size: PageSize) {
    /// `MAP_DROPPABLE` of `linux/mman.h`, Linux 6.11; without it the flags name no kind of mapping.
    const MAP_DROPPABLE: libc::c_int = 0x08;
    // SAFETY: a mapping at a place of the kernel's choice.
    let probe = unsafe {
        let flags = MAP_DROPPABLE | libc::MAP_ANONYMOUS;
        libc::mmap(std::ptr::null_mut(), BLOCK, libc::PROT_READ, flags, -1, 0)
    };
    if probe == libc::MAP_FAILED {
        skipped(&"this kernel has no memory that it may drop");
        return;
    }
    let receipt = torn_down(page_size, |lease| {
        map_over(lease, MAP_DROPPABLE | libc::MAP_ANONYMOUS, None);
        fill(lease, 2);
    });
    assert_kept_out(page_size, &receipt);
}

fn memory_shared_with_somebody(page_size: PageSize) {
    let file = snapshot();
    let receipt = torn_down(page_size, |lease| {
        map_over(lease, libc::MAP_SHARED, Some(&file));
    });
    assert_kept_out(page_size, &receipt);
    let kept = std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    assert!(
        kept.iter().all(|byte| *byte == 0x5e),
        "a file of the VMM's was scrubbed"
    );

    let receipt = torn_down(page_size, |lease| {
        map_over(lease, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None);
    });
    assert_kept_out(page_size, &receipt);
}

/// As good as the pool's: private, and its bytes are scrubbed.
fn anonymous_memory_of_the_vmm_s_own(page_size: PageSize) {
    let receipt = torn_down(page_size, |lease| {
        map_over(lease, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None);
        fill(lease, 3);
    });
    assert!(receipt.is_proven());
}

fn nothing(page_size: PageSize) {
    let receipt = torn_down(page_size, |lease| {
        let (_, start) = lease.host_addresses().remove(0);
        // SAFETY: the range lies in the lease's window, to which nobody holds a reference.
        let status = unsafe { libc::munmap(start.wrapping_add(2 * BLOCK).cast(), BLOCK) };
        assert_eq!(status, 0);
    });
    assert_kept_out(page_size, &receipt);
}
