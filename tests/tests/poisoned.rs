//! Pages that the kernel has taken out of use because their hardware failed: guests' pages are quarantined and named when the
//! guest goes, the rest is scrubbed, and the process lives.
//!
//! The kernel does it on request (`MADV_HWPOISON`), to real pages, and they stay out of use until the host is started again. So
//! that is done only where somebody has said that it may be, as `scripts/test-in-qemu.sh` does for its machines.

use std::sync::atomic::{AtomicBool, Ordering};
use vm_scrub::lease::{Outcome, QuarantineReason};
use vm_scrub::{
    BLOCK_SIZE, Lease, PageSize, Policy, RevokeBy, ScrubError, ScrubReceipt, memory_errors,
    scrub_raw,
};
use vm_scrub_tests::child::{alone, with_huge_pages};
use vm_scrub_tests::maps::has_uffdio_move;
use vm_scrub_tests::{
    PAGE, assert_adds_up, assert_nothing_dirty_left, fill, pools, quiesce, regions, skipped,
};

const MAY: &str = "VM_SCRUB_TEST_MAY_POISON";
const BASE: u64 = 1 << 32;
/// In the second of four blocks.
const BROKEN: u64 = BLOCK_SIZE + 77 * PAGE;

/// Set while a signal is no news: some kernels tell whoever asks for a page to be poisoned, as if it had been accessed.
static EXPECTED: AtomicBool = AtomicBool::new(false);

extern "C" fn only_when_expected(signal: libc::c_int) {
    if !EXPECTED.load(Ordering::Relaxed) {
        // SAFETY: both may be called in a handler. The access raises the signal again, with nobody to handle it.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Before anything else handles the signal.
fn expect_signals() {
    let handler: extern "C" fn(libc::c_int) = only_when_expected;
    // SAFETY: the handler touches atomics only.
    let previous = unsafe { libc::signal(libc::SIGBUS, handler as libc::sighandler_t) };
    assert_ne!(previous, libc::SIG_ERR);
}

/// Has the page at `address` taken out of use, or says why it cannot be.
fn poison(address: *mut u8) -> bool {
    if std::env::var_os(MAY).is_none() {
        skipped(&format!(
            "takes memory of this host out of use for good; set {MAY}=1 where that may be"
        ));
        return false;
    }
    EXPECTED.store(true, Ordering::Relaxed);
    // SAFETY: the page is the calling test's, which expects not to find it again.
    let status = unsafe { libc::madvise(address.cast(), PAGE as usize, libc::MADV_HWPOISON) };
    let error = std::io::Error::last_os_error();
    EXPECTED.store(false, Ordering::Relaxed);
    match (status, error.raw_os_error()) {
        (0, _) => true,
        (_, Some(libc::EINVAL | libc::EPERM)) => {
            skipped(&format!(
                "this kernel does not poison memory for this process: {error}"
            ));
            false
        }
        _ => panic!("{error}"),
    }
}

fn ways(page_size: PageSize) -> Vec<RevokeBy> {
    let mut ways = vec![RevokeBy::Automatic];
    if page_size != PageSize::Huge2M && has_uffdio_move() {
        ways.push(RevokeBy::Mremap);
    }
    ways
}

fn at_once(lease: Lease) -> ScrubReceipt {
    let quiesced = quiesce(&lease);
    lease.teardown(quiesced).unwrap()
}

fn in_background(lease: Lease) -> ScrubReceipt {
    let quiesced = quiesce(&lease);
    lease
        .retire(quiesced)
        .unwrap()
        .wait_in_background()
        .unwrap()
}

fn a_guests_page_is_lost(page_size: PageSize, policy: &Policy) {
    for way in ways(page_size) {
        for tear_down in [at_once, in_background] {
            let builder = pools::builder(page_size, 4).policy(policy.clone());
            let pool = builder.revoke_by(way).build().unwrap();
            let lease = pool.lease(&regions(&[(BASE, 4 * BLOCK_SIZE)])).unwrap();
            fill(&lease, 3);
            let (_, start) = lease.host_addresses()[0];
            if !poison(start.wrapping_add(BROKEN as usize)) {
                return;
            }
            let receipt = tear_down(lease);
            assert_adds_up(&receipt);
            assert_eq!(receipt.outcome, Outcome::Quarantined);
            assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE, "{receipt:?}");
            assert_eq!(receipt.bytes_scrubbed, 3 * BLOCK_SIZE);
            let named = receipt
                .quarantined
                .iter()
                .find(|range| range.reason == QuarantineReason::MemoryError);
            let named = named.unwrap_or_else(|| panic!("{receipt:?}"));
            let broken = BASE + BROKEN;
            assert!(
                (named.guest_address..named.guest_address + named.bytes).contains(&broken),
                "{named:?}"
            );
            if page_size != PageSize::Huge2M {
                assert_eq!((named.guest_address, named.bytes), (broken, PAGE));
            }
            assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
            assert_nothing_dirty_left(&pool);
        }
    }
}

/// With the handler in place.
fn survives(page_size: PageSize) {
    expect_signals();
    memory_errors::install().unwrap();
    a_guests_page_is_lost(page_size, &Policy::new());
}

/// Without a handler: the kernel is asked before each access.
fn is_probed(page_size: PageSize) {
    expect_signals();
    a_guests_page_is_lost(page_size, &Policy::new().probe(true));
}

mod a_guest_survives {
    use super::*;

    #[test]
    fn base_4k() {
        alone("a_guest_survives::base_4k", || survives(PageSize::Base4K));
    }

    #[test]
    fn transparent() {
        alone("a_guest_survives::transparent", || {
            survives(PageSize::Transparent)
        });
    }

    #[test]
    fn huge_2m() {
        with_huge_pages("a_guest_survives::huge_2m", 8, || {
            survives(PageSize::Huge2M)
        });
    }
}

mod a_guest_is_probed {
    use super::*;

    #[test]
    fn base_4k() {
        alone("a_guest_is_probed::base_4k", || is_probed(PageSize::Base4K));
    }

    #[test]
    fn transparent() {
        alone("a_guest_is_probed::transparent", || {
            is_probed(PageSize::Transparent)
        });
    }

    #[test]
    fn huge_2m() {
        with_huge_pages("a_guest_is_probed::huge_2m", 8, || {
            is_probed(PageSize::Huge2M)
        });
    }
}

#[test]
fn of_memory_that_is_not_a_pools() {
    alone("of_memory_that_is_not_a_pools", || {
        expect_signals();
        memory_errors::install().unwrap();
        let len = 64 * PAGE as usize;
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
        let page = PAGE as usize;
        // SAFETY: mapped, and this test's alone.
        unsafe { start.write_bytes(0xc3, len) };
        if !poison(start.wrapping_add(9 * page)) {
            return;
        }
        // SAFETY: as above; nobody holds a reference.
        let error = unsafe { scrub_raw(start, len, &Policy::new()) }.unwrap_err();
        let ranges = std::iter::once(9 * page..10 * page).collect();
        assert_eq!(error, ScrubError::MemoryError { ranges });
        for around in [0..9 * page, 10 * page..len] {
            // SAFETY: mapped, and not what was poisoned.
            let around =
                unsafe { std::slice::from_raw_parts(start.add(around.start), around.len()) };
            assert_eq!(around.iter().position(|byte| *byte != 0), None);
        }
    });
}
