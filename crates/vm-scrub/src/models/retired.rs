//! A whole pool, on real memory: a retired lease between its ticket, the background thread, and whoever needs memory.

use super::check;
use super::memory::{self, Stores};
use crate::lease::{Cancelled, Quiesced};
use crate::sync::thread;
use crate::sys::fault::{self, Call, FaultGuard};
use crate::{BLOCK_SIZE, Lease, PageSize, Pool, Priority, ScrubReceipt, Ticket};
use vm_memory::GuestAddress;

/// A pool of one block, which is scrubbed by whoever calls and the background thread.
fn pool() -> (FaultGuard, Pool) {
    memory::model(Stores::Ordinary);
    // loom's threads share one of the kernel's, which is not to be put last.
    let priority = fault::inject(Call::SetPriority, 0, 1, libc::EPERM);
    let pool = Pool::builder()
        .capacity(BLOCK_SIZE)
        .page_size(PageSize::Base4K)
        .threads(1);
    (priority, pool.build().unwrap())
}

/// A lease of all there is.
fn lease(pool: &Pool) -> Lease {
    pool.lease(&[(GuestAddress(0), BLOCK_SIZE)]).unwrap()
}

/// Retires a lease with a page that holds data.
fn retire(pool: &Pool) -> Ticket {
    let lease = lease(pool);
    let (_, start) = lease.host_addresses()[0];
    // SAFETY: the lease is alive, its memory writable and nobody else's. It is not used any more afterwards.
    let quiesced = unsafe {
        start.write_bytes(0xa5, 4096);
        Quiesced::assert(&lease)
    };
    lease.retire(quiesced).unwrap()
}

fn assert_scrubbed(receipt: &ScrubReceipt) {
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_scrubbed, 4096, "{receipt:?}");
}

/// Everything is clean again, nobody works on it any more, and the next guest finds zeros.
fn assert_clean(pool: &Pool) {
    memory::read_all();
    assert_eq!(pool.accounts().clean, BLOCK_SIZE, "{:?}", pool.accounts());
    let lease = lease(pool);
    let (_, start) = lease.host_addresses()[0];
    // SAFETY: as above; fresh memory is initialised by the kernel.
    let first = unsafe { std::slice::from_raw_parts(start, 4096) };
    assert!(first.iter().all(|byte| *byte == 0));
}

#[test]
fn the_ticket_and_the_background_finish_one_lease() {
    check(2, || {
        let (_priority, pool) = pool();
        assert_scrubbed(&retire(&pool).wait().unwrap());
        assert_clean(&pool);
    });
}

#[test]
fn the_background_finishes_what_nobody_helps_with() {
    check(2, || {
        let (_priority, pool) = pool();
        let ticket = retire(&pool);
        ticket.set_priority(Priority::Low);
        assert_scrubbed(&ticket.wait_in_background().unwrap());
        assert_clean(&pool);
    });
}

#[test]
fn who_cancels_gets_the_memory_or_the_receipt() {
    check(2, || {
        let (_priority, pool) = pool();
        match retire(&pool).cancel() {
            Cancelled::Dirty(dirty) => {
                // Nobody is at it any more.
                memory::read_all();
                assert_eq!(pool.accounts().dirty, BLOCK_SIZE);
                assert_scrubbed(&dirty.scrub_and_verify().recycle().unwrap());
            }
            Cancelled::Finished(receipt) => assert_scrubbed(&receipt.unwrap()),
        }
        assert_clean(&pool);
    });
}

#[test]
fn who_needs_memory_waits_for_what_is_dirty() {
    check(2, || {
        let (_priority, pool) = pool();
        drop(retire(&pool));
        // Helps, or finds it clean; is never refused.
        drop(lease(&pool));
        assert_clean(&pool);
    });
}

#[test]
fn the_pool_goes_while_a_lease_is_being_scrubbed() {
    check(2, || {
        let (_priority, pool) = pool();
        let ticket = retire(&pool);
        drop(pool);
        // With the memory, or with its last owner: the background thread.
        let _ = ticket.wait();
    });
}

#[test]
fn one_waits_while_another_needs_the_memory() {
    check(1, || {
        let (_priority, pool) = pool();
        let ticket = retire(&pool);
        let other = thread::spawn({
            let pool = pool.clone();
            move || drop(lease(&pool))
        });
        assert_scrubbed(&ticket.wait().unwrap());
        other.join().unwrap();
        assert_clean(&pool);
    });
}
