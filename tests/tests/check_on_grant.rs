//! Free memory that somebody writes to is found when it is leased, where the pool is told to look.

use log::Level;
use vm_scrub::lease::LeaseError;
use vm_scrub::test_support::{arena_address, inject};
use vm_scrub::{BLOCK_SIZE, PageSize, Policy, Pool, Verify};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::maps::pagemap_call;
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, fill, first_nonzero, logs, on_every_page_size,
    pools, regions, teardown,
};

on_every_page_size!(
    what_was_written_to_free_memory_is_quarantined_and_replaced: 6,
    without_the_check_the_next_guest_gets_it: 6,
    nothing_left_is_said: 6,
    every_last_byte_is_looked_at: 6,
    whatever_the_policy_reads_back: 6,
    what_cannot_be_asked_about_is_not_leased_and_not_lost: 6,
);

const BLOCKS: u64 = 6;

/// A pool of which every page has been dirty once.
fn used(page_size: PageSize, check: bool, verify: Verify) -> Pool {
    let builder = pools::builder(page_size, BLOCKS).policy(Policy::new().verify(verify));
    let pool = builder.check_on_grant(check).build().unwrap();
    let all = pool.lease(&regions(&[(0, BLOCKS * BLOCK_SIZE)])).unwrap();
    fill(&all, 1);
    assert_eq!(teardown(all).bytes_quarantined, 0);
    pool
}

/// Writes a byte into the pool's arena, as a device would that nobody stopped: the page tables are not asked.
fn write(pool: &Pool, offset: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .write(true)
        .open("/proc/self/mem")
        .unwrap();
    let address = arena_address(pool).addr() as u64 + offset;
    file.write_all_at(&[0x5a], address).unwrap();
}

fn what_was_written_to_free_memory_is_quarantined_and_replaced(page_size: PageSize) {
    let pool = used(page_size, true, Verify::Full);
    // Two of the four blocks that would have been given, one of them in its last page.
    write(&pool, BLOCK_SIZE + 17);
    write(&pool, 4 * BLOCK_SIZE - 1);
    logs::listen();
    let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    for (block, offset) in [(1, BLOCK_SIZE + 17), (3, 4 * BLOCK_SIZE - 1)] {
        let line = format!(
            "block {block} quarantined before it was leased: the byte at pool offset {offset:#x}"
        );
        assert!(logs::heard(Level::Error, &line));
    }
    assert_all_zero(&lease);
    let given: Vec<u64> = lease
        .blocks()
        .iter()
        .flat_map(|extent| extent.first..extent.first + extent.blocks)
        .collect();
    assert_eq!(given, [0, 2, 4, 5]);
    let accounts = pool.accounts();
    assert_eq!(
        (accounts.clean, accounts.leased, accounts.quarantined),
        (0, 4 * BLOCK_SIZE, 2 * BLOCK_SIZE)
    );
    fill(&lease, 2);
    assert!(teardown(lease).is_proven());
    assert_nothing_dirty_left(&pool);
    assert_eq!(pool.accounts().quarantined, 2 * BLOCK_SIZE);
    // What is in quarantine is not looked at any more.
    logs::listen();
    let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    assert!(!logs::heard(
        Level::Error,
        "quarantined before it was leased"
    ));
    drop(lease);
}

fn without_the_check_the_next_guest_gets_it(page_size: PageSize) {
    let pool = used(page_size, false, Verify::Full);
    write(&pool, BLOCK_SIZE + 17);
    let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    assert_eq!(first_nonzero(&lease), Some(BLOCK_SIZE + 17));
}

fn nothing_left_is_said(page_size: PageSize) {
    let pool = used(page_size, true, Verify::Full);
    let neighbour = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    write(&pool, 2 * BLOCK_SIZE);
    let error = pool.lease(&regions(&[(0, 5 * BLOCK_SIZE)])).unwrap_err();
    let LeaseError::FoundDirty {
        asked,
        quarantined,
        accounts,
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!((asked, quarantined), (5 * BLOCK_SIZE, BLOCK_SIZE));
    assert_eq!(accounts, pool.accounts());
    assert_eq!(
        (accounts.clean, accounts.leased, accounts.quarantined),
        (4 * BLOCK_SIZE, BLOCK_SIZE, BLOCK_SIZE)
    );
    // What is said next time, when nothing new is found.
    let error = pool.lease(&regions(&[(0, 5 * BLOCK_SIZE)])).unwrap_err();
    assert!(matches!(error, LeaseError::NotEnough { .. }), "{error}");
    assert!(teardown(neighbour).is_proven());
    assert_nothing_dirty_left(&pool);
}

fn every_last_byte_is_looked_at(page_size: PageSize) {
    let pool = used(page_size, true, Verify::Full);
    for block in 0..BLOCKS {
        // First and last bytes of blocks and pieces.
        write(
            &pool,
            block * BLOCK_SIZE
                + [0, BLOCK_SIZE - 1, 4095, 4096, (256 << 10) - 1, 1 << 20][block as usize],
        );
    }
    let error = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap_err();
    assert!(
        matches!(error, LeaseError::FoundDirty { quarantined, .. } if quarantined == BLOCKS * BLOCK_SIZE),
        "{error}"
    );
    assert_eq!(pool.accounts().quarantined, BLOCKS * BLOCK_SIZE);
}

fn whatever_the_policy_reads_back(page_size: PageSize) {
    for verify in [
        Verify::None,
        Verify::Sampled { per_mille: 1 },
        Verify::Memory,
    ] {
        let pool = used(page_size, true, verify);
        write(&pool, 3 * BLOCK_SIZE + 12345);
        let lease = pool.lease(&regions(&[(0, 5 * BLOCK_SIZE)])).unwrap();
        assert_all_zero(&lease);
        assert_eq!(pool.accounts().quarantined, BLOCK_SIZE, "{verify:?}");
    }
}

/// The fault is met on the calling thread, which asks when there is one part to ask about.
fn what_cannot_be_asked_about_is_not_leased_and_not_lost(page_size: PageSize) {
    let pool = used(page_size, true, Verify::Full);
    let before = pool.accounts();
    let call = match page_size {
        PageSize::Huge2M => vm_scrub::test_support::Call::Populate,
        _ => pagemap_call(),
    };
    let fault = inject(call, 0, 1, libc::ENOMEM);
    let error = pool.lease(&regions(&[(0, 5 * BLOCK_SIZE)])).unwrap_err();
    assert_eq!(fault.hits(), 1);
    drop(fault);
    assert!(
        matches!(&error, LeaseError::NotChecked { source } if source.call == call),
        "{error}"
    );
    assert_eq!(pool.accounts(), before);
    write(&pool, 0);
    // The second question is about what replaces the block that was found dirty.
    let _neighbour = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    write(&pool, 2 * BLOCK_SIZE);
    let fault = inject(call, 1, 1, libc::ENOMEM);
    let error = pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap_err();
    assert_eq!(fault.hits(), 1);
    drop(fault);
    assert!(matches!(error, LeaseError::NotChecked { .. }), "{error}");
    let accounts = pool.accounts();
    assert_eq!(
        (accounts.clean, accounts.leased, accounts.quarantined),
        (3 * BLOCK_SIZE, BLOCK_SIZE, 2 * BLOCK_SIZE)
    );
    assert_nothing_dirty_left(&pool);
}

/// Pages that were never populated are not read: the check must not make the kernel supply them.
#[test]
fn what_was_never_populated_stays_so() {
    alone("what_was_never_populated_stays_so", || {
        for page_size in [PageSize::Base4K, PageSize::Transparent] {
            let pool = pools::builder(page_size, BLOCKS)
                .check_on_grant(true)
                .build()
                .unwrap();
            for _ in 0..3 {
                let lease = pool.lease(&regions(&[(0, 5 * BLOCK_SIZE)])).unwrap();
                let receipt = teardown(lease);
                assert_eq!(receipt.bytes_never_populated, 5 * BLOCK_SIZE);
            }
        }
    });
}
