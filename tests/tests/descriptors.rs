//! A VMM that closes every descriptor it does not know, as daemons do, and then opens files of its own: these get the numbers
//! of what the library has kept open. What they answer must not be taken for the kernel's word that there is nothing to scrub, and
//! what is in them must not become a guest's memory.

use std::fs::File;
use vm_scrub::lease::{LeaseError, QuarantineReason};
use vm_scrub::{BLOCK_SIZE, LeaseOptions, PageSize, Policy, RevokeBy, scrub_raw};
use vm_scrub_tests::assert_all_zero;
use vm_scrub_tests::child::{alone, done, with_huge_pages};
use vm_scrub_tests::pools::{builder, pool, regions, teardown};

/// Closes all descriptors but the standard ones and gives their numbers to a file in which there are zeros at every offset.
fn close_what_is_unknown() -> Vec<File> {
    // SAFETY: alone in its process, this test owns no file. That the library owns some is what it is about.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    assert_eq!(closed, 0);
    (0..16).map(|_| File::open("/dev/zero").unwrap()).collect()
}

/// Ends the process by [`done`]: the pool and the files would each close what the other one has.
fn a_guest_goes(page_size: PageSize, by: RevokeBy) -> ! {
    let pool = builder(page_size, 4).revoke_by(by).build().unwrap();
    let lease = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
    for (region, start) in lease.host_addresses() {
        // SAFETY: the lease's memory, which nobody else uses.
        unsafe { start.write_bytes(0xa5, region.bytes as usize) };
    }
    let files = close_what_is_unknown();
    let receipt = teardown(lease);
    assert_eq!(receipt.bytes_quarantined, 2 * BLOCK_SIZE, "{receipt:?}");
    let lost = &receipt.quarantined[0];
    assert_eq!(lost.reason, QuarantineReason::ResidencyUnknown);
    assert!(
        lost.detail
            .contains("something in this process has closed it"),
        "{lost:?}"
    );
    let rest = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
    assert_all_zero(&rest);
    assert_eq!(pool.accounts().clean, 0);
    drop(pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap_err());
    std::mem::forget((rest, files));
    done()
}

/// The worst that can have the number: a pagemap, in which nothing is populated where the guest's memory is.
#[test]
fn the_pagemap_of_another_process_is_not_asked_instead() {
    alone(
        "the_pagemap_of_another_process_is_not_asked_instead",
        || {
            let pools = [RevokeBy::Automatic, RevokeBy::Mremap].map(|by| {
                let pool = builder(PageSize::Base4K, 2).revoke_by(by).build().unwrap();
                let lease = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
                vm_scrub_tests::fill(&lease, 0x5e);
                (pool, lease)
            });
            let mut memory = vec![0xa5_u8; 64 << 20];
            let mut scrub = || {
                memory.fill(0xa5);
                // SAFETY: the memory is this test's own.
                let done = unsafe { scrub_raw(memory.as_mut_ptr(), memory.len(), &Policy::new()) }
                    .unwrap();
                (
                    done.bytes_never_populated,
                    memory.iter().all(|byte| *byte == 0),
                )
            };
            assert_eq!(scrub(), (0, true));
            // SAFETY: the child does nothing but wait for its end.
            let other = unsafe {
                let child = libc::fork();
                if child == 0 {
                    libc::pause();
                    libc::_exit(0);
                }
                child
            };
            let pagemap = format!("/proc/{other}/pagemap");
            // SAFETY: as in `close_what_is_unknown`.
            let closed = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
            assert_eq!(closed, 0);
            let files: Vec<_> = (0..16).map(|_| File::open(&pagemap).unwrap()).collect();
            for (pool, lease) in pools {
                let receipt = teardown(lease);
                assert_eq!(receipt.bytes_quarantined, 2 * BLOCK_SIZE, "{receipt:?}");
                assert_eq!(pool.accounts().clean, 0);
                std::mem::forget(pool);
            }
            assert_eq!(scrub(), (0, true));
            // SAFETY: it is this process's child, and nobody has waited for it.
            unsafe { libc::kill(other, libc::SIGKILL) };
            std::mem::forget(files);
            done();
        },
    );
}

#[test]
fn a_pagemap_that_is_lost_is_not_an_empty_one() {
    alone("a_pagemap_that_is_lost_is_not_an_empty_one", || {
        a_guest_goes(PageSize::Base4K, RevokeBy::Automatic)
    });
}

#[test]
fn nor_where_nothing_else_was_kept_open() {
    alone("nor_where_nothing_else_was_kept_open", || {
        a_guest_goes(PageSize::Transparent, RevokeBy::Mremap)
    });
}

#[test]
fn memory_of_somebody_elses_is_scrubbed_as_a_whole() {
    alone("memory_of_somebody_elses_is_scrubbed_as_a_whole", || {
        let mut memory = vec![0xa5_u8; 1 << 20];
        let policy = Policy::new();
        let scrub = |memory: &mut [u8]| {
            // SAFETY: the memory is this test's own.
            unsafe { scrub_raw(memory.as_mut_ptr(), memory.len(), &policy) }
        };
        assert_eq!(scrub(&mut memory).unwrap().bytes, 1 << 20);
        let files = close_what_is_unknown();
        memory.fill(0xa5);
        assert_eq!(scrub(&mut memory).unwrap().bytes, 1 << 20);
        assert!(memory.iter().all(|byte| *byte == 0));
        std::mem::forget(files);
        done();
    });
}

#[test]
fn another_file_is_not_leased_for_the_pools() {
    with_huge_pages("another_file_is_not_leased_for_the_pools", 4, || {
        let pool = pool(PageSize::Huge2M, 4);
        let lease = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
        let files = close_what_is_unknown();
        let error = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap_err();
        assert!(matches!(error, LeaseError::Map { .. }), "{error}");
        assert!(error.to_string().contains("fstat"), "{error}");
        // What is leased already does not need the file, and goes as always.
        assert!(teardown(lease).is_proven());
        assert_eq!(pool.accounts().clean, 4 * BLOCK_SIZE);
        std::mem::forget(files);
        done();
    });
}

#[test]
fn another_file_is_not_sealed_for_the_one_that_was_shared() {
    alone(
        "another_file_is_not_sealed_for_the_one_that_was_shared",
        || {
            let pool = pool(PageSize::Base4K, 4);
            let options = LeaseOptions::new().shareable(true);
            let lease = pool
                .lease_with(&regions(&[(0, BLOCK_SIZE)]), options)
                .unwrap();
            vm_scrub_tests::fill(&lease, 1);
            let files = close_what_is_unknown();
            let receipt = teardown(lease);
            assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE, "{receipt:?}");
            assert!(
                receipt.quarantined[0].detail.contains("fstat"),
                "{receipt:?}"
            );
            assert_eq!(pool.reclaim(), 0);
            std::mem::forget(files);
            done();
        },
    );
}
