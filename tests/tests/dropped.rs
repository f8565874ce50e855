//! Every way out other than a teardown: dropped, forgotten, abandoned half-way, unwound. None of them leads to the free list
//! unless the memory was scrubbed on the way.

use std::panic::{AssertUnwindSafe, catch_unwind};
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool};
use vm_scrub_tests::logs::{heard, listen};
use vm_scrub_tests::maps::{is_readable, is_writable};
use vm_scrub_tests::{
    assert_nothing_dirty_left, fill, first_nonzero, on_every_page_size, pool, pools, quiesce,
    regions, teardown,
};

on_every_page_size!(
    dropped_with_a_handle_alive: 8,
    dropped_with_a_handle_alive_and_no_windows_kept: 8,
    dropped_after_the_address_got_out: 8,
    dropped_after_somebody_asked_for_the_address: 8,
    dropped_after_a_handle_came_and_went: 8,
    dropped_before_anybody_saw_it: 8,
    dropped_half_way: 8,
    a_panic_at_every_stage: 8,
    forgotten: 8,
    the_pool_goes_first: 8,
);

/// What a lease takes in these tests.
const TAKEN: u64 = 3 * BLOCK_SIZE;

/// A dirty guest in a pool that has had another one before, so that clean memory has been used memory, too.
fn dirty_guest(page_size: PageSize) -> (Pool, Lease) {
    let pool = pool(page_size, 8);
    let first = pool.lease(&regions(&[(0, 8 * BLOCK_SIZE)])).unwrap();
    fill(&first, 1);
    assert!(teardown(first).is_proven());
    let lease = unseen_guest(&pool);
    fill(&lease, 2);
    listen();
    (pool, lease)
}

fn unseen_guest(pool: &Pool) -> Lease {
    let layout = regions(&[(0, BLOCK_SIZE), (BLOCK_SIZE, 2 * BLOCK_SIZE)]);
    pool.lease(&layout).unwrap()
}

#[track_caller]
fn assert_quarantined(pool: &Pool) {
    let accounts = pool.accounts();
    assert_eq!(accounts.quarantined, TAKEN, "{accounts:?}");
    assert_eq!((accounts.leased, accounts.dirty), (0, 0));
    assert!(heard(log::Level::Error, "quarantined"));
    assert_nothing_dirty_left(pool);
}

fn dropped_with_a_handle_alive(page_size: PageSize) {
    let (pool, lease) = dirty_guest(page_size);
    let memory = lease.memory();
    drop(lease);
    assert!(heard(log::Level::Error, "1 owners left"));
    assert_quarantined(&pool);
    // Still mapped, still the guest's own bytes, still writable: nobody crashes.
    let byte: u8 = memory.read_obj(GuestAddress(2 * BLOCK_SIZE)).unwrap();
    assert_ne!(byte, 0);
    memory.write_obj(0xee_u8, GuestAddress(0)).unwrap();
    assert_nothing_dirty_left(&pool);
    drop(memory);
    assert_quarantined(&pool);
}

/// The same in a pool that keeps no windows of guests that are gone.
fn dropped_with_a_handle_alive_and_no_windows_kept(page_size: PageSize) {
    let builder = pools::builder(page_size, 8).kept_windows(0);
    let pool = builder.build().unwrap();
    listen();
    let lease = unseen_guest(&pool);
    fill(&lease, 1);
    let memory = lease.memory();
    drop(lease);
    assert_quarantined(&pool);
    let byte: u8 = memory.read_obj(GuestAddress(2 * BLOCK_SIZE)).unwrap();
    assert_ne!(byte, 0);
}

fn dropped_after_the_address_got_out(page_size: PageSize) {
    let (pool, lease) = dirty_guest(page_size);
    let (_, start) = lease.host_addresses()[1];
    assert!(is_readable(start.addr()));
    drop(lease);
    assert_quarantined(&pool);
    // Whoever kept the address gets a fault and not somebody's memory.
    assert!(!is_readable(start.addr()) && !is_writable(start.addr(), 1));
}

/// The address alone is enough: no handle ever existed of which the lease could count the owners.
fn dropped_after_somebody_asked_for_the_address(page_size: PageSize) {
    let pool = pool(page_size, 8);
    listen();
    let lease = unseen_guest(&pool);
    let (_, start) = lease.host_addresses()[0];
    assert!(is_writable(start.addr(), 0x66));
    drop(lease);
    assert_quarantined(&pool);
    assert!(!is_readable(start.addr()));
}

/// A handle that is gone again was a handle: what its owner did with the address is not known.
fn dropped_after_a_handle_came_and_went(page_size: PageSize) {
    let pool = pool(page_size, 8);
    for tracked in [false, true] {
        listen();
        let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
        if tracked {
            drop(lease.regions(|_| ()));
        } else {
            drop(lease.memory());
        }
        let before = pool.accounts().quarantined;
        drop(lease);
        assert_eq!(pool.accounts().quarantined, before + BLOCK_SIZE);
    }
    assert_nothing_dirty_left(&pool);
}

fn dropped_before_anybody_saw_it(page_size: PageSize) {
    let pool = pool(page_size, 8);
    listen();
    drop(unseen_guest(&pool));
    assert!(heard(log::Level::Warn, "torn down now, outcome Proven"));
    let accounts = pool.accounts();
    assert_eq!((accounts.clean, accounts.quarantined), (pool.capacity(), 0));
    assert_nothing_dirty_left(&pool);
}

fn dropped_half_way(page_size: PageSize) {
    for step in 0..3 {
        let (pool, lease) = dirty_guest(page_size);
        let quiesced = quiesce(&lease);
        let dirty = lease.revoke(quiesced).unwrap();
        match step {
            0 => drop(dirty),
            1 => drop(dirty.scrub()),
            _ => drop(dirty.scrub_and_verify()),
        }
        assert_quarantined(&pool);
    }
}

fn a_panic_at_every_stage(page_size: PageSize) {
    for stage in 0..5 {
        let (pool, lease) = dirty_guest(page_size);
        let unwound = catch_unwind(AssertUnwindSafe(|| {
            // In the hands of the caller at every stage, when the caller's own code goes wrong.
            if stage == 0 {
                let _lease = lease;
                std::panic::resume_unwind(Box::new("on purpose"));
            }
            let quiesced = quiesce(&lease);
            let dirty = lease.revoke(quiesced).unwrap();
            if stage == 1 {
                std::panic::resume_unwind(Box::new("on purpose"));
            }
            if stage == 2 {
                let _both = dirty.scrub_and_verify();
                std::panic::resume_unwind(Box::new("on purpose"));
            }
            let scrubbed = dirty.scrub();
            if stage == 3 {
                std::panic::resume_unwind(Box::new("on purpose"));
            }
            let _verified = scrubbed.verify();
            std::panic::resume_unwind(Box::new("on purpose"));
        }));
        assert!(unwound.is_err());
        assert_quarantined(&pool);
    }
    // Nobody saw this one; but while a thread unwinds, nothing as long as a scrub is begun.
    let pool = pool(page_size, 8);
    listen();
    let lease = unseen_guest(&pool);
    let unwound = catch_unwind(AssertUnwindSafe(|| {
        let _lease = lease;
        std::panic::resume_unwind(Box::new("on purpose"));
    }));
    assert!(unwound.is_err());
    assert_quarantined(&pool);
}

fn forgotten(page_size: PageSize) {
    let (pool, lease) = dirty_guest(page_size);
    let memory = lease.memory();
    std::mem::forget(lease);
    let accounts = pool.accounts();
    assert_eq!((accounts.leased, accounts.quarantined), (TAKEN, 0));
    memory.write_obj(0xee_u8, GuestAddress(0)).unwrap();
    assert_nothing_dirty_left(&pool);
    assert_eq!(
        pool.accounts(),
        accounts,
        "leased for ever, and accounted for"
    );

    let quiesced = {
        let lease = pool.lease(&regions(&[(0, TAKEN)])).unwrap();
        fill(&lease, 3);
        let quiesced = quiesce(&lease);
        std::mem::forget(lease.revoke(quiesced).unwrap());
        pool.accounts()
    };
    assert_eq!((quiesced.leased, quiesced.dirty), (TAKEN, TAKEN));
    assert_nothing_dirty_left(&pool);
}

fn the_pool_goes_first(page_size: PageSize) {
    let (pool, lease) = dirty_guest(page_size);
    let (stuck, memory) = {
        let lease = pool.lease(&regions(&[(0, TAKEN)])).unwrap();
        fill(&lease, 4);
        let memory = lease.memory();
        (lease, memory)
    };
    let clone = pool.clone();
    drop(pool);
    assert_eq!(first_nonzero(&lease), Some(0));
    assert!(teardown(lease).is_proven());
    assert_nothing_dirty_left(&clone);
    drop(clone);
    drop(stuck);
    // The pool is gone altogether, and this handle's memory is not.
    memory.write_obj(0xee_u8, GuestAddress(TAKEN - 1)).unwrap();
    let byte: u8 = memory.read_obj(GuestAddress(TAKEN - 1)).unwrap();
    assert_eq!(byte, 0xee);
}
