//! Memory that raises `SIGBUS` while it is zeroed or read back: the process goes on, the page is quarantined and named, and
//! nothing else is lost.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::ptr::null_mut;
use std::sync::{Arc, Once, OnceLock};
use std::time::Duration;
use vm_scrub::lease::{Cancelled, LeaseError, Outcome, QuarantineReason};
use vm_scrub::test_support::{Call, Sabotage, arena_address, build_sabotaged, inject};
use vm_scrub::{
    BLOCK_SIZE, Lease, LeaseOptions, PageSize, Policy, Pool, Revocation, ScrubError, ScrubRate,
    ScrubReceipt, Verify, memory_errors, scrub_raw,
};
use vm_scrub_tests::child::{alone, end_of, with_huge_pages};
use vm_scrub_tests::maps::{has_populate_write, is_readable};
use vm_scrub_tests::{
    PAGE, assert_adds_up, assert_all_zero, assert_nothing_dirty_left, fill, pools, quiesce, regions,
};

/// In the second of four blocks, and not in its first page.
const BROKEN: u64 = BLOCK_SIZE + (300 << 10);
const BASE: u64 = 9 * BLOCK_SIZE;

fn pool(page_size: PageSize, policy: Policy, threads: usize, check: bool) -> Pool {
    let builder = pools::builder(page_size, 4)
        .threads(threads)
        .policy(policy)
        .check_on_grant(check);
    let offset = BROKEN as usize;
    let late = false;
    build_sabotaged(builder, Sabotage::BreakMemory { offset, late }).unwrap()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    AtOnce,
    InSteps,
    InBackground,
}

fn one_guest(pool: &Pool, way: Way) -> ScrubReceipt {
    let lease = pool.lease(&regions(&[(BASE, 3 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    taken_back(lease, way)
}

fn taken_back(lease: Lease, way: Way) -> ScrubReceipt {
    let quiesced = quiesce(&lease);
    let receipt = match way {
        Way::AtOnce => lease.teardown(quiesced),
        Way::InSteps => lease.revoke(quiesced).unwrap().scrub().verify().recycle(),
        Way::InBackground => lease.retire(quiesced).unwrap().wait_in_background(),
    };
    let receipt = receipt.unwrap();
    assert_adds_up(&receipt);
    receipt
}

/// One page is named, the rest of its block is beside it, and two blocks can be leased again.
fn assert_one_page_is_lost(page_size: PageSize, receipt: &ScrubReceipt, said: &str, probed: bool) {
    assert_eq!(receipt.outcome, Outcome::Quarantined);
    assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE);
    assert_eq!(receipt.bytes_scrubbed, 2 * BLOCK_SIZE);
    let seen: Vec<_> = receipt
        .quarantined
        .iter()
        .map(|range| (range.guest_address - BASE, range.bytes, range.reason))
        .collect();
    let (error, beside) = (
        QuarantineReason::MemoryError,
        QuarantineReason::BesideMemoryError,
    );
    if (page_size, probed) == (PageSize::Huge2M, true) {
        // The rest of the huge page may have been scrubbed before it broke.
        let breaks = seen.iter().any(|&(start, bytes, reason)| {
            reason == error && (start..start + bytes).contains(&BROKEN)
        });
        assert!(breaks, "{seen:?}");
    } else {
        let expected = match page_size {
            PageSize::Huge2M => vec![(BLOCK_SIZE, BLOCK_SIZE, error)],
            _ => vec![
                (BLOCK_SIZE, BROKEN - BLOCK_SIZE, beside),
                (BROKEN, PAGE, error),
                (BROKEN + PAGE, 2 * BLOCK_SIZE - BROKEN - PAGE, beside),
            ],
        };
        assert_eq!(seen, expected);
    }
    for range in &receipt.quarantined {
        assert!(range.detail.contains(said), "{range:?}");
    }
}

fn a_page_breaks(page_size: PageSize, probe: bool, said: &str) {
    if !probe {
        memory_errors::install().unwrap();
    }
    for verify in [
        Verify::Full,
        Verify::None,
        Verify::Memory,
        Verify::Sampled { per_mille: 500 },
    ] {
        // Asking does not help whom the huge page breaks for while it works on another part of it.
        let most = if probe && page_size == PageSize::Huge2M {
            1
        } else {
            2
        };
        for threads in 1..=most {
            for way in [Way::AtOnce, Way::InSteps, Way::InBackground] {
                let policy = Policy::new().verify(verify).probe(probe);
                let pool = pool(page_size, policy, threads, false);
                let receipt = one_guest(&pool, way);
                assert_one_page_is_lost(page_size, &receipt, said, probe);
                assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
                assert_nothing_dirty_left(&pool);
            }
        }
    }
}

/// How this kernel is asked whether a page can be accessed.
fn asked_by() -> &'static str {
    if has_populate_write() {
        "madvise(MADV_POPULATE_WRITE)"
    } else {
        "futex(FUTEX_WAKE_OP)"
    }
}

fn is_checked_on_grant(page_size: PageSize) {
    memory_errors::install().unwrap();
    let populated = pools::builder(page_size, 4)
        .populate(true)
        .check_on_grant(true);
    let pool = build_sabotaged(
        populated,
        Sabotage::BreakMemory {
            offset: BROKEN as usize,
            late: false,
        },
    )
    .unwrap();
    let lease = pool.lease(&regions(&[(0, 3 * BLOCK_SIZE)])).unwrap();
    assert_all_zero(&lease);
    assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
    let error = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap_err();
    assert!(matches!(error, LeaseError::NotEnough { .. }));
}

fn breaks_when_it_is_read_back(page_size: PageSize) {
    memory_errors::install().unwrap();
    let (offset, late) = (BROKEN as usize, true);
    let builder = pools::builder(page_size, 4);
    let pool = build_sabotaged(builder, Sabotage::BreakMemory { offset, late }).unwrap();
    let receipt = one_guest(&pool, Way::InSteps);
    assert_one_page_is_lost(page_size, &receipt, "SIGBUS", false);
    assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
    assert_nothing_dirty_left(&pool);
}

/// With nobody to handle it, or nothing to replace it with, it is the end of the process.
fn ends(test: &str, body: impl FnOnce()) {
    if let Some((status, output)) = end_of(test, body) {
        assert_eq!(status.signal(), Some(libc::SIGBUS), "{status}\n{output}");
    }
}

#[test]
fn without_anything_it_is_the_end() {
    ends("without_anything_it_is_the_end", || {
        drop(one_guest(
            &pool(PageSize::Base4K, Policy::new(), 1, false),
            Way::AtOnce,
        ));
    });
}

#[test]
fn where_nothing_can_be_mapped_it_is_the_end() {
    ends("where_nothing_can_be_mapped_it_is_the_end", || {
        memory_errors::install().unwrap();
        let _fault = inject(Call::MmapOver, 0, u32::MAX, libc::ENOMEM);
        drop(one_guest(
            &pool(PageSize::Base4K, Policy::new(), 1, false),
            Way::AtOnce,
        ));
    });
}

/// Replaces what is at `at` with memory that raises `SIGBUS`, once. Sabotage would do it again when the memory is scrubbed again.
fn break_at(at: *mut u8, page_size: PageSize) {
    let (len, flags) = match page_size {
        PageSize::Huge2M => (BLOCK_SIZE as usize, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB),
        _ => (PAGE as usize, 0),
    };
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let how = libc::MAP_SHARED | libc::MAP_FIXED;
    // SAFETY: the range lies in a pool's arena, on the thread that works on it and is between two pieces; the file is new.
    unsafe {
        let file = libc::memfd_create(c"broken".as_ptr(), libc::MFD_CLOEXEC | flags);
        assert_eq!(libc::ftruncate(file, len as libc::off_t), 0);
        let mapped = libc::mmap(at.cast(), len, protection, how, file, 0);
        assert_eq!(mapped, at.cast());
        assert_eq!(libc::ftruncate(file, 0), 0);
        libc::close(file);
    }
}

/// What is in its place when somebody goes on with it is something else, and zero or not says nothing about the memory.
fn what_was_broken_when_it_was_cancelled_stays_lost(page_size: PageSize) {
    memory_errors::install().unwrap();
    for before in [0, 1] {
        what_was_broken_stays_lost_behind(before, page_size);
    }
}

/// The lease begins behind so many blocks of the pool.
fn what_was_broken_stays_lost_behind(before: u64, page_size: PageSize) {
    let slowly = ScrubRate {
        bytes_per_second: 2 << 20,
        burst: 0,
    };
    let arena: Arc<OnceLock<usize>> = Arc::default();
    let (known, once) = (Arc::clone(&arena), Once::new());
    let pool = pools::builder(page_size, 3)
        .threads(1)
        .scrub_rate(slowly)
        .on_progress(move |_| {
            once.call_once(|| {
                let start = std::ptr::with_exposed_provenance_mut::<u8>(*known.wait());
                // The block that is being worked on.
                let at = if page_size == PageSize::Huge2M {
                    0
                } else {
                    300 << 10
                };
                let block = (before * BLOCK_SIZE) as usize;
                break_at(start.wrapping_add(block + at), page_size);
            });
        })
        .build()
        .unwrap();
    arena.set(arena_address(&pool).expose_provenance()).unwrap();
    let others = (0..before).map(|_| pool.lease(&regions(&[(0, BLOCK_SIZE)])));
    let others: Vec<Lease> = others.map(Result::unwrap).collect();
    let lease = pool.lease(&regions(&[(BASE, 2 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let quiesced = quiesce(&lease);
    let ticket = lease.retire(quiesced).unwrap();
    while ticket.progress().bytes_done < BLOCK_SIZE / 2 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let Cancelled::Dirty(memory) = ticket.cancel() else {
        panic!("it cannot have been finished");
    };
    let receipt = memory.scrub_and_verify().recycle().unwrap();
    assert_adds_up(&receipt);
    assert_eq!(receipt.outcome, Outcome::Quarantined);
    assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE);
    let mut reasons = receipt.quarantined.iter().map(|range| range.reason);
    assert!(reasons.any(|reason| reason == QuarantineReason::MemoryError));
    assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
    drop(others);
    assert_nothing_dirty_left(&pool);
}

macro_rules! by_page_size {
    ($($name:ident = $page_size:ident: $test:expr;)+) => {$(
        #[test]
        fn $name() {
            let body = || $test(PageSize::$page_size);
            if PageSize::$page_size == PageSize::Huge2M {
                // One page more for what is broken.
                with_huge_pages(stringify!($name), 5, body);
            } else {
                alone(stringify!($name), body);
            }
        }
    )+};
}

by_page_size! {
    breaks_4k = Base4K: |size| a_page_breaks(size, false, "SIGBUS");
    breaks_thp = Transparent: |size| a_page_breaks(size, false, "SIGBUS");
    breaks_2m = Huge2M: |size| a_page_breaks(size, false, "SIGBUS");
    probed_4k = Base4K: |size| a_page_breaks(size, true, asked_by());
    probed_thp = Transparent: |size| a_page_breaks(size, true, asked_by());
    probed_2m = Huge2M: |size| a_page_breaks(size, true, asked_by());
    read_4k = Base4K: breaks_when_it_is_read_back;
    read_thp = Transparent: breaks_when_it_is_read_back;
    read_2m = Huge2M: breaks_when_it_is_read_back;
    checked_4k = Base4K: is_checked_on_grant;
    checked_thp = Transparent: is_checked_on_grant;
    checked_2m = Huge2M: is_checked_on_grant;
    cancelled_4k = Base4K: what_was_broken_when_it_was_cancelled_stays_lost;
    cancelled_thp = Transparent: what_was_broken_when_it_was_cancelled_stays_lost;
    cancelled_2m = Huge2M: what_was_broken_when_it_was_cancelled_stays_lost;
}

/// `pages` pages of a file that has only the first `there` of them.
fn truncated(pages: usize, there: usize) -> *mut u8 {
    let len = pages * PAGE as usize;
    // SAFETY: a new file and a new mapping of it, both of this function's own.
    unsafe {
        let file = libc::memfd_create(c"truncated".as_ptr(), libc::MFD_CLOEXEC);
        assert_eq!(libc::ftruncate(file, len as libc::off_t), 0);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let start = libc::mmap(
            std::ptr::null_mut(),
            len,
            protection,
            libc::MAP_SHARED,
            file,
            0,
        );
        assert_ne!(start, libc::MAP_FAILED);
        start.cast::<u8>().write_bytes(0x77, len);
        assert_eq!(
            libc::ftruncate(file, (there * PAGE as usize) as libc::off_t),
            0
        );
        libc::close(file);
        start.cast()
    }
}

fn scrubs_the_rest(policy: &Policy) {
    let page = PAGE as usize;
    for (head, tail) in [(0, 0), (100, 300)] {
        let start = truncated(200, 130);
        // A page in the middle that breaks, too.
        let hole = truncated(1, 0);
        // SAFETY: both mappings are this test's own.
        unsafe {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let at = start.add(70 * page);
            assert_eq!(libc::mremap(hole.cast(), page, page, flags, at), at.cast());
        }
        let len = 200 * page - head - tail;
        // SAFETY: mapped, and nobody else's.
        let error = unsafe { scrub_raw(start.add(head), len, policy) }.unwrap_err();
        let ScrubError::MemoryError { ranges } = &error else {
            panic!("{error}");
        };
        assert_eq!(
            *ranges,
            [70 * page - head..71 * page - head, 130 * page - head..len]
        );
        assert!(
            error
                .to_string()
                .contains(&format!("offset {:#x}", 70 * page - head))
        );
        for at in head..130 * page {
            if at / page != 70 {
                // SAFETY: in the file, and mapped.
                assert_eq!(unsafe { start.add(at).read_volatile() }, 0, "{at:#x}");
            }
        }
        for at in [70, 130, 199] {
            assert!(!is_readable(start.addr() + at * page), "page {at}");
        }
        if head > 0 {
            // SAFETY: in the file, and mapped.
            assert_eq!(unsafe { start.add(head - 1).read_volatile() }, 0x77);
        }
    }
}

#[test]
fn a_truncated_file_is_scrubbed_as_far_as_it_goes() {
    alone("a_truncated_file_is_scrubbed_as_far_as_it_goes", || {
        memory_errors::install().unwrap();
        for verify in [Verify::Full, Verify::None, Verify::Memory] {
            scrubs_the_rest(&Policy::new().verify(verify));
        }
        scrubs_the_rest(&Policy::new().probe(true));
    });
}

#[test]
fn a_truncated_file_is_probed_without_a_handler() {
    alone("a_truncated_file_is_probed_without_a_handler", || {
        scrubs_the_rest(&Policy::new().probe(true));
    });
}

/// The first byte of the range lies in a page that is gone, and so do all others.
#[test]
fn nothing_left_to_scrub_is_an_error_too() {
    alone("nothing_left_to_scrub_is_an_error_too", || {
        memory_errors::install().unwrap();
        let start = truncated(3, 0);
        let len = 3 * PAGE as usize - 2;
        // SAFETY: mapped, and nobody else's.
        let error = unsafe { scrub_raw(start.add(1), len, &Policy::new()) }.unwrap_err();
        let all = std::iter::once(0..len).collect();
        assert_eq!(error, ScrubError::MemoryError { ranges: all });
    });
}

/// A file that other processes may have is kept as a whole, and its broken page is named.
#[test]
fn of_shared_memory_all_is_kept() {
    alone("of_shared_memory_all_is_kept", || {
        memory_errors::install().unwrap();
        for way in [Way::AtOnce, Way::InSteps, Way::InBackground] {
            let pool = pool(PageSize::Base4K, Policy::new(), 2, true);
            let options = LeaseOptions::new().shareable(true);
            let region = regions(&[(BASE, 3 * BLOCK_SIZE)]);
            let lease = pool.lease_with(&region, options).unwrap();
            fill(&lease, 1);
            let receipt = taken_back(lease, way);
            assert_eq!(receipt.bytes_quarantined, 3 * BLOCK_SIZE);
            // What is broken is neither sealed nor read back.
            assert_eq!(receipt.revocation, Revocation::ViewReplaced);
            assert_eq!(receipt.bytes_verified, 0);
            let named = receipt
                .quarantined
                .iter()
                .find(|range| range.reason == QuarantineReason::MemoryError);
            let named = named.unwrap_or_else(|| panic!("{receipt:?}"));
            assert_eq!((named.guest_address, named.bytes), (BASE + BROKEN, PAGE));
            assert_eq!(pool.accounts().quarantined, 3 * BLOCK_SIZE);
            assert_eq!(pool.reclaim(), 0, "what is broken does not come back");
        }
    });
}

/// A shareable lease is in quarantine because somebody can write to it, who does so once more before letting go. What breaks then has
/// other memory in its place, which an attempt after that would find in order.
#[test]
fn what_breaks_when_it_is_tried_again_does_not_come_back() {
    let name = "what_breaks_when_it_is_tried_again_does_not_come_back";
    alone(name, || {
        memory_errors::install().unwrap();
        for late in [false, true] {
            let builder = pools::builder(PageSize::Base4K, 3).threads(1);
            let offset = BROKEN as usize;
            let pool = build_sabotaged(builder, Sabotage::BreakMemory { offset, late }).unwrap();
            let bytes = 3 * BLOCK_SIZE;
            let options = LeaseOptions::new().shareable(true);
            let lease = pool.lease_with(&regions(&[(0, bytes)]), options).unwrap();
            let file = Arc::clone(lease.file_offsets()[0].1.arc());
            let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
            // SAFETY: a new mapping wherever the kernel likes, of memory that nothing refers to.
            let writable = unsafe {
                libc::mmap(
                    null_mut(),
                    bytes as usize,
                    protection,
                    libc::MAP_SHARED,
                    fd,
                    0,
                )
            };
            assert_ne!(writable, libc::MAP_FAILED);
            assert_eq!(taken_back(lease, Way::AtOnce).bytes_quarantined, bytes);
            // The background pauses longer after each attempt in vain, and is not to come while this is going on.
            for attempts in 1..=5 {
                assert_eq!(pool.reclaim(), 0);
                let [withheld] = &pool.withheld()[..] else {
                    panic!("it came back");
                };
                assert!(!withheld.for_good && withheld.attempts == attempts);
            }
            file.write_all_at(&[1; PAGE as usize], BROKEN).unwrap();
            // SAFETY: the mapping is the test's own, and nothing refers to it.
            assert_eq!(unsafe { libc::munmap(writable, bytes as usize) }, 0);
            for _ in 0..2 {
                assert_eq!(pool.reclaim(), 0);
                let [withheld] = &pool.withheld()[..] else {
                    panic!("it came back");
                };
                let reason = &withheld.reason;
                assert!(
                    withheld.for_good && reason.contains("memory error"),
                    "{reason}"
                );
            }
            assert_eq!(pool.accounts().quarantined, bytes);
        }
    });
}
