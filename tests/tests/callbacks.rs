//! Progress callbacks that stand in the way, and that call back into the pool in the middle of a piece.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;
use vm_scrub::lease::Cancelled;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, Priority, ScrubRate};
use vm_scrub_tests::pools::{assert_nothing_dirty_left, builder, quiesce, regions};

fn dirty_lease(pool: &Pool, blocks: u64) -> Lease {
    let lease = pool.lease(&regions(&[(0, blocks * BLOCK_SIZE)])).unwrap();
    for (region, start) in lease.host_addresses() {
        // SAFETY: the lease's memory, which nobody else uses.
        unsafe { start.write_bytes(0x5e, region.bytes as usize) };
    }
    lease
}

/// What is handed back must be nobody else's: a thread that is still at a piece could write its zeros into what the next guest
/// has got by then.
#[test]
fn cancelling_waits_for_whoever_is_at_a_piece() {
    let (entered, seen): (Sender<()>, Receiver<()>) = mpsc::channel();
    let (leave, gate): (Sender<()>, Receiver<()>) = mpsc::channel();
    let (gate, entered) = (Mutex::new(gate), Mutex::new(entered));
    let pool = builder(PageSize::Base4K, 4)
        .on_progress(move |_| {
            let _ = entered.lock().unwrap().send(());
            // Nobody holds the other end any more in the second half.
            let _ = gate.lock().unwrap().recv();
        })
        .build()
        .unwrap();
    let lease = dirty_lease(&pool, 4);
    let quiesced = quiesce(&lease);
    let ticket = lease.retire(quiesced).unwrap();
    seen.recv().unwrap();
    let (handed_back, back) = mpsc::channel();
    let cancelling = std::thread::spawn(move || {
        let Cancelled::Dirty(memory) = ticket.cancel() else {
            panic!("it cannot have been finished");
        };
        handed_back.send(()).unwrap();
        memory
    });
    // Long enough for a thread to begin; one that waits as it should waits longer.
    let early = back.recv_timeout(Duration::from_millis(200));
    assert!(early.is_err(), "handed back while somebody is at a piece");
    drop(leave);
    back.recv().unwrap();
    let memory = cancelling.join().unwrap();
    assert!(memory.scrub_and_verify().recycle().unwrap().is_proven());
    assert_nothing_dirty_left(&pool);
}

/// Once, from the middle of the first piece, everything that a callback can call without waiting for itself.
fn calls_back(finish: fn(Lease) -> bool) {
    static POOL: Mutex<()> = Mutex::new(());
    let _one_at_a_time = POOL.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let pool: &'static OnceLock<Pool> = Box::leak(Box::default());
    let called: &'static AtomicBool = Box::leak(Box::default());
    let (over, wait_for_it) = mpsc::channel();
    let over = Mutex::new(over);
    let built = builder(PageSize::Base4K, 8)
        .on_progress(move |progress| {
            assert!(progress.bytes_done <= progress.bytes_total);
            let Some(pool) = pool.get() else { return };
            if called.swap(true, Ordering::SeqCst) {
                return;
            }
            let accounts = pool.accounts();
            assert_eq!(accounts.total(), pool.capacity());
            assert!(pool.withheld().is_empty());
            assert_eq!(pool.reclaim(), 0);
            let rate = ScrubRate {
                bytes_per_second: u64::MAX,
                burst: u64::MAX,
            };
            pool.set_scrub_rate(Some(rate));
            pool.set_scrub_rate(None);
            // What is free, and more than that: for which it helps with the very lease that it is told about.
            drop(pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap());
            drop(pool.lease(&regions(&[(0, 100 * BLOCK_SIZE)])).unwrap_err());
            drop(pool.lease(&regions(&[(0, 7 * BLOCK_SIZE)])));
            over.lock().unwrap().send(()).unwrap();
        })
        .build()
        .unwrap();
    let pool = pool.get_or_init(|| built);
    let lease = dirty_lease(pool, 6);
    assert!(finish(lease));
    assert!(called.load(Ordering::SeqCst));
    // It may have helped to finish that very lease, and still be at its own.
    wait_for_it.recv_timeout(Duration::from_secs(60)).unwrap();
    assert_nothing_dirty_left(pool);
}

#[test]
fn a_teardown_whose_callback_calls_back() {
    calls_back(|lease| {
        let quiesced = quiesce(&lease);
        lease.teardown(quiesced).unwrap().is_proven()
    });
}

#[test]
fn a_ticket_whose_callback_calls_back() {
    calls_back(|lease| {
        let quiesced = quiesce(&lease);
        let ticket = lease.retire(quiesced).unwrap();
        ticket.set_priority(Priority::High);
        ticket.wait().unwrap().is_proven()
    });
}

#[test]
fn the_background_whose_callback_calls_back() {
    calls_back(|lease| {
        let quiesced = quiesce(&lease);
        let ticket = lease.retire(quiesced).unwrap();
        ticket.wait_in_background().unwrap().is_proven()
    });
}
