//! vm-scrub under a filter of system calls that is made of `docs/system-calls.md`, so that document and code cannot part.
//!
//! A filter is for good, so each test runs in a child, and the child ends itself: its test harness would need other calls.

use std::alloc::{Layout, alloc_zeroed};
use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::Arc;
use vm_scrub::lease::{LeaseError, QuarantineReason};
use vm_scrub::{BLOCK_SIZE, Lease, LeaseOptions, PageSize, Policy, Pool, scrub_raw};
use vm_scrub_tests::child::{alone, done};
use vm_scrub_tests::documents::{section, table};
use vm_scrub_tests::{
    PAGE, assert_adds_up, assert_all_zero, fill, on_every_page_size, on_small_page_sizes, pool,
    pools, quiesce, regions, seccomp, skipped, teardown,
};

const DOCUMENT: &str = include_str!("../../docs/system-calls.md");

on_every_page_size!(
    what_the_document_lists_is_enough: 8,
    it_is_enough_to_build_a_pool: 4,
    it_is_enough_to_drop_a_pool: 4,
    shareable_leases_need_a_few_more: 16,
    without_fcntl_a_shareable_lease_is_not_sealed: 16,
    without_madvise: 8,
);
on_small_page_sizes!(
    without_mremap,
    without_mprotect,
    without_pkey_mprotect,
    without_ioctl,
    pools_that_lock_their_memory,
    without_mlock2,
);

/// The calls in the table of the section `title` that are marked in one of `columns` for pools of these pages.
fn listed(title: &str, columns: &[&str], page_size: PageSize) -> BTreeSet<String> {
    let table = table(section(DOCUMENT, title));
    let own = match page_size {
        PageSize::Huge2M => "hugetlb",
        _ => "anonymous",
    };
    let columns: Vec<usize> = columns.iter().map(|name| table.column(name)).collect();
    // A mark may have numbers of notes behind it.
    let is_marked = |cell: &str| {
        let mark = cell.split(' ').next();
        mark.is_some_and(|mark| ["all", "x", own].contains(&mark))
    };
    let marked = table
        .rows
        .iter()
        .filter(|row| columns.iter().any(|column| is_marked(&row[*column])));
    marked.map(|row| row[0].replace('`', "")).collect()
}

/// What is let through: the `operations` on pools of these pages, and what the runtime calls meanwhile.
fn allowed(operations: &[&str], page_size: PageSize) -> Vec<libc::c_long> {
    let runtime = listed("The Rust runtime", &["afterwards"], page_size);
    let own = listed("vm-scrub", operations, page_size);
    own.union(&runtime).map(|name| number(name)).collect()
}

/// What is let through while a pool is built or dropped, and nothing else happens.
fn allowed_to(stage: &str, page_size: PageSize) -> Vec<libc::c_long> {
    let runtime = listed("The Rust runtime", &[stage], page_size);
    let own = listed("vm-scrub", &[stage], page_size);
    own.union(&runtime).map(|name| number(name)).collect()
}

fn number(name: &str) -> libc::c_long {
    seccomp::number(name).unwrap_or_else(|| panic!("the document has a call '{name}'"))
}

/// Installs the filter, or says that the test is skipped and ends the child.
fn filter(allowed: &[libc::c_long], denied: &[libc::c_long]) {
    if let Err(error) = seccomp::install(allowed, denied) {
        skipped(&format!("this process can install no filter: {error}"));
        done();
    }
}

/// Two regions, of which the second ends within a block where it may.
fn guest(pool: &Pool, page_size: PageSize) -> Lease {
    let rest = match page_size {
        PageSize::Huge2M => BLOCK_SIZE,
        _ => 3 * PAGE,
    };
    let layout = [(0, 2 * BLOCK_SIZE), (1 << 32, rest)];
    pool.lease(&regions(&layout)).unwrap()
}

fn name(test: &str, page_size: PageSize) -> String {
    let page_size = match page_size {
        PageSize::Base4K => "base_4k",
        PageSize::Huge2M => "huge_2m",
        _ => "transparent",
    };
    format!("{test}::{page_size}")
}

/// 1 MiB that vm-scrub did not allocate, with something in it.
fn foreign() -> *mut u8 {
    let layout = Layout::from_size_align(FOREIGN, 4096).unwrap();
    // SAFETY: the layout is not empty.
    let memory = unsafe { alloc_zeroed(layout) };
    assert!(!memory.is_null());
    // SAFETY: allocated above, and nobody else's.
    unsafe { memory.wrapping_add(5000).write(1) };
    memory
}

const FOREIGN: usize = 1 << 20;

fn what_the_document_lists_is_enough(page_size: PageSize) {
    alone(
        &name("what_the_document_lists_is_enough", page_size),
        || {
            let pool = pool(page_size, 8);
            let memory = foreign();
            let calls = allowed(&["lease", "teardown", "scrub_raw"], page_size);
            filter(&calls, &[]);

            for generation in 0..20 {
                let lease = guest(&pool, page_size);
                assert_all_zero(&lease);
                fill(&lease, generation);
                let other = guest(&pool, page_size);
                fill(&other, generation);
                assert!(teardown(lease).is_proven());
                let quiesced = quiesce(&other);
                let ticket = other.retire(quiesced).unwrap();
                let receipt = if generation % 2 == 0 {
                    ticket.wait()
                } else {
                    ticket.wait_in_background()
                };
                assert!(receipt.unwrap().is_proven());
                // Nobody has seen this one, so it is torn down on the spot.
                drop(guest(&pool, page_size));
            }
            assert_eq!(pool.accounts().clean, pool.capacity());

            // SAFETY: allocated above, and nobody else's.
            let scrubbed = unsafe { scrub_raw(memory, FOREIGN, &Policy::new()) }.unwrap();
            let counted = scrubbed.bytes + scrubbed.bytes_never_populated;
            assert_eq!(counted, FOREIGN as u64);
            // SAFETY: as above.
            assert_eq!(unsafe { memory.wrapping_add(5000).read() }, 0);
            done();
        },
    );
}

fn it_is_enough_to_build_a_pool(page_size: PageSize) {
    alone(&name("it_is_enough_to_build_a_pool", page_size), || {
        filter(&allowed_to("build", page_size), &[]);
        let builder = Pool::builder().capacity(4 * BLOCK_SIZE);
        let pool = builder.page_size(page_size).populate(true).build();
        std::mem::forget(pool.unwrap());
        done();
    });
}

fn it_is_enough_to_drop_a_pool(page_size: PageSize) {
    alone(&name("it_is_enough_to_drop_a_pool", page_size), || {
        let pool = pool(page_size, 4);
        assert!(teardown(guest(&pool, page_size)).is_proven());
        filter(&allowed_to("drop", page_size), &[]);
        drop(pool);
        done();
    });
}

fn shareable(pool: &Pool) -> Lease {
    let options = LeaseOptions::new().shareable(true);
    let layout = regions(&[(0, 2 * BLOCK_SIZE), (1 << 32, BLOCK_SIZE)]);
    pool.lease_with(&layout, options).unwrap()
}

/// What is leased to be shared, torn down and retired, also with a peer that lets go too late.
fn shareable_leases_need_a_few_more(page_size: PageSize) {
    alone(&name("shareable_leases_need_a_few_more", page_size), || {
        let pool = pool(page_size, 8);
        let calls = allowed(&["lease", "teardown", "shareable"], page_size);
        filter(&calls, &[]);

        for generation in 0..4 {
            let lease = shareable(&pool);
            assert_all_zero(&lease);
            fill(&lease, generation);
            assert!(teardown(lease).is_proven());

            let lease = shareable(&pool);
            let file = Arc::clone(lease.file_offsets()[0].1.arc());
            fill(&lease, generation);
            let held = map(&file);
            let quiesced = quiesce(&lease);
            let receipt = lease.retire(quiesced).unwrap().wait().unwrap();
            assert_eq!(receipt.bytes_quarantined, receipt.bytes_total);
            unmap(held);
            // The background may have been quicker.
            pool.reclaim();
            assert_eq!(pool.withheld(), []);
            drop(shareable(&pool));
        }
        assert_eq!(pool.accounts().clean, pool.capacity());
        done();
    });
}

/// What a back-end in another process would have: a mapping that could be written to.
fn map(file: &File) -> *mut libc::c_void {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let (len, fd) = (BLOCK_SIZE as usize, file.as_raw_fd());
    // SAFETY: the kernel picks a range that nothing else uses.
    let mapping = unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, 0) };
    assert_ne!(mapping, libc::MAP_FAILED);
    mapping
}

fn unmap(mapping: *mut libc::c_void) {
    // SAFETY: made by `map`, and nobody refers to it.
    assert_eq!(unsafe { libc::munmap(mapping, BLOCK_SIZE as usize) }, 0);
}

fn without_fcntl_a_shareable_lease_is_not_sealed(page_size: PageSize) {
    let test = "without_fcntl_a_shareable_lease_is_not_sealed";
    alone(&name(test, page_size), || {
        let pool = pool(page_size, 8);
        let lease = shareable(&pool);
        fill(&lease, 1);
        let quiesced = quiesce(&lease);
        let calls = allowed(&["lease", "teardown", "shareable"], page_size);
        filter(&calls, &[number("fcntl")]);

        let receipt = lease.teardown(quiesced).unwrap();
        assert_adds_up(&receipt);
        assert_eq!(receipt.bytes_quarantined, receipt.bytes_total);
        for range in &receipt.quarantined {
            assert_eq!(range.reason, QuarantineReason::NotSealed, "{range:?}");
            assert!(range.detail.contains("fcntl"), "{range:?}");
        }
        assert_eq!(pool.accounts().quarantined, 3 * BLOCK_SIZE);
        assert_eq!(pool.reclaim(), 0);
        done();
    });
}

/// The kernel refuses `refused`, which a teardown needs, and what could be called instead of it: all of the guest is lost for
/// `reason`, and nobody gets a byte of it.
fn without(
    [refused, instead]: [&str; 2],
    test: &str,
    page_size: PageSize,
    reason: QuarantineReason,
) {
    alone(&name(test, page_size), || {
        let own = listed("vm-scrub", &["teardown"], page_size);
        assert!(own.contains(refused), "{refused} is not listed: {own:?}");
        let pool = pool(page_size, 8);
        let lease = guest(&pool, page_size);
        fill(&lease, 1);
        let quiesced = quiesce(&lease);
        filter(
            &allowed(&["lease", "teardown"], page_size),
            &[number(refused), number(instead)],
        );

        let receipt = lease.teardown(quiesced).unwrap();
        assert_adds_up(&receipt);
        assert_eq!(receipt.bytes_quarantined, receipt.bytes_total);
        for range in &receipt.quarantined {
            assert_eq!(range.reason, reason, "{range:?}");
            assert!(range.detail.contains(refused), "{range:?}");
        }
        let accounts = pool.accounts();
        assert_eq!(accounts.quarantined, 3 * BLOCK_SIZE);
        assert_eq!(accounts.clean, pool.capacity() - 3 * BLOCK_SIZE);
        match pool.lease(&regions(&[(0, accounts.clean)])) {
            Ok(next) => assert_all_zero(&next),
            Err(LeaseError::Map { source, .. }) => {
                assert!(source.call.name().contains(refused), "{source}");
            }
            Err(error) => panic!("{error}"),
        }
        done();
    });
}

fn without_mremap(page_size: PageSize) {
    let reason = QuarantineReason::NotRevoked;
    without(["mremap"; 2], "without_mremap", page_size, reason);
}

fn without_mprotect(page_size: PageSize) {
    let reason = QuarantineReason::NotRevoked;
    let calls = ["mprotect", "pkey_mprotect"];
    without(calls, "without_mprotect", page_size, reason);
}

/// Filters are older than the call.
fn without_pkey_mprotect(page_size: PageSize) {
    alone(&name("without_pkey_mprotect", page_size), || {
        let pool = pool(page_size, 8);
        let lease = guest(&pool, page_size);
        fill(&lease, 1);
        let calls = allowed(&["lease", "teardown"], page_size);
        filter(&calls, &[number("pkey_mprotect")]);
        assert!(teardown(lease).is_proven());
        assert_all_zero(&guest(&pool, page_size));
        done();
    });
}

fn without_madvise(page_size: PageSize) {
    // A view of a file is closed without it, and then its pages cannot be populated.
    let reason = match page_size {
        PageSize::Huge2M => QuarantineReason::ResidencyUnknown,
        _ => QuarantineReason::NotRevoked,
    };
    without(["madvise"; 2], "without_madvise", page_size, reason);
}

fn without_ioctl(page_size: PageSize) {
    let reason = QuarantineReason::ResidencyUnknown;
    without(["ioctl"; 2], "without_ioctl", page_size, reason);
}

/// A pool that locks its memory, or a word about why there is none.
fn locking(page_size: PageSize) -> Option<Pool> {
    let policy = Policy::new().retain(BLOCK_SIZE);
    let builder = pools::builder(page_size, 4).policy(policy);
    let pool = builder.lock_memory(true).build();
    pool.inspect_err(|error| skipped(error)).ok()
}

/// Leased, shared, given back in part.
fn pools_that_lock_their_memory(page_size: PageSize) {
    alone(&name("pools_that_lock_their_memory", page_size), || {
        let Some(pool) = locking(page_size) else {
            return;
        };
        let calls = allowed(&["lease", "teardown", "shareable"], page_size);
        filter(&calls, &[]);
        for generation in 0..4 {
            for is_shareable in [true, false] {
                let lease = match is_shareable {
                    true => shareable(&pool),
                    false => guest(&pool, page_size),
                };
                fill(&lease, generation);
                assert!(teardown(lease).is_proven());
            }
        }
        done();
    });
}

/// That costs no memory, and there is no lease that only looks locked.
fn without_mlock2(page_size: PageSize) {
    alone(&name("without_mlock2", page_size), || {
        let Some(pool) = locking(page_size) else {
            return;
        };
        let lease = guest(&pool, page_size);
        fill(&lease, 1);
        let calls = allowed(&["lease", "teardown"], page_size);
        filter(&calls, &[number("mlock2")]);
        let receipt = teardown(lease);
        assert!(receipt.is_proven());
        assert_eq!(receipt.bytes_unlocked, receipt.bytes_total);
        let error = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap_err();
        assert!(matches!(error, LeaseError::Lock { .. }), "{error}");
        done();
    });
}
