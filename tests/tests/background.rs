//! Leases that are scrubbed in the background: revoked at once, clean in the end, and stopped, hurried or helped at will.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::lease::{Cancelled, LeaseError, QuarantineReason};
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{
    Lease, PageSize, Pool, PoolBuilder, Priority, Quiesced, RevokeBy, ScrubRate, TeardownError,
    Ticket,
};
use vm_scrub_tests::clock::StoppedClock;
use vm_scrub_tests::maps::pagemap_call;

const BLOCK: u64 = vm_scrub::BLOCK_SIZE;
const PIECE: u64 = 256 << 10;

/// One piece a second.
const CRAWL: ScrubRate = ScrubRate {
    bytes_per_second: PIECE,
    burst: 0,
};

fn builder(blocks: u64) -> PoolBuilder {
    Pool::builder().capacity(blocks * BLOCK).threads(2)
}

fn crawling(blocks: u64) -> (Pool, StoppedClock) {
    crawling_by(builder(blocks))
}

fn crawling_by(builder: PoolBuilder) -> (Pool, StoppedClock) {
    let clock = StoppedClock::default();
    let pool = builder
        .scrub_rate(CRAWL)
        .clock(clock.clone())
        .build()
        .unwrap();
    (pool, clock)
}

/// A lease whose every byte was written.
fn dirty_lease(pool: &Pool, blocks: u64) -> (Lease, Quiesced) {
    let lease = pool.lease(&[(GuestAddress(0), blocks * BLOCK)]).unwrap();
    let secret = vec![0x5e_u8; BLOCK as usize];
    let memory = lease.memory();
    for block in 0..blocks {
        memory
            .write_slice(&secret, GuestAddress(block * BLOCK))
            .unwrap();
    }
    // SAFETY: the only handle is dropped here.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    (lease, quiesced)
}

/// Everything that can be leased is zero.
fn assert_free_memory_is_zero(pool: &Pool) {
    let clean = pool.accounts().clean;
    if clean == 0 {
        return;
    }
    let lease = pool.lease(&[(GuestAddress(0), clean)]).unwrap();
    let mut bytes = vec![1_u8; BLOCK as usize];
    for block in 0..clean / BLOCK {
        lease
            .memory()
            .read_slice(&mut bytes, GuestAddress(block * BLOCK))
            .unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
    }
    // SAFETY: no handle is left.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    assert!(lease.teardown(quiesced).unwrap().is_proven());
}

#[test]
fn a_retired_lease_is_scrubbed_by_itself() {
    let pool = builder(8).build().unwrap();
    let (lease, quiesced) = dirty_lease(&pool, 8);
    let ticket = lease.retire(quiesced).unwrap();
    let receipt = ticket.wait_in_background().unwrap();
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_scrubbed, 8 * BLOCK);
    assert_eq!(pool.accounts().clean, 8 * BLOCK);
    assert_free_memory_is_zero(&pool);
}

#[test]
fn until_it_is_scrubbed_it_is_dirty_and_out_of_reach() {
    let (pool, clock) = crawling(4);
    let (lease, quiesced) = dirty_lease(&pool, 4);
    let ticket = lease.retire(quiesced).unwrap();
    clock.wait_until_asleep();
    let accounts = pool.accounts();
    assert_eq!(
        (accounts.clean, accounts.leased, accounts.dirty),
        (0, 0, 4 * BLOCK)
    );
    assert!(!ticket.is_finished());
    assert_eq!(ticket.progress().bytes_total, 4 * BLOCK);
    assert_eq!(
        ticket.progress().bytes_done,
        PIECE,
        "one piece on credit, then the throttle"
    );
    clock.go_on(Duration::from_secs(1));
    clock.wait_until_asleep();
    clock.wait_until_asleep();
    assert_eq!(ticket.progress().bytes_done, 2 * PIECE);
    assert!(
        ticket.wait().unwrap().is_proven(),
        "who waits is not throttled"
    );
}

#[test]
fn a_lease_request_helps_instead_of_failing() {
    let (pool, clock) = crawling(4);
    let (lease, quiesced) = dirty_lease(&pool, 3);
    let ticket = lease.retire(quiesced).unwrap();
    clock.wait_until_asleep();
    let next = pool
        .lease(&[(GuestAddress(0), 4 * BLOCK)])
        .expect("the request should have helped");
    let mut bytes = vec![1_u8; (4 * BLOCK) as usize];
    next.memory()
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    assert!(ticket.is_finished());
    assert!(ticket.wait().unwrap().is_proven());
    assert!(
        pool.lease(&[(GuestAddress(0), BLOCK)]).is_err(),
        "there is nothing left to help with"
    );
}

/// Of two retired leases it helps with one, where that is enough.
#[test]
fn a_lease_request_helps_until_there_is_enough() {
    let (pool, clock) = crawling(5);
    let [(first, first_quiesced), (second, second_quiesced)] =
        [2, 2].map(|n| dirty_lease(&pool, n));
    let first = first.retire(first_quiesced).unwrap();
    clock.wait_until_asleep();
    let second = second.retire(second_quiesced).unwrap();
    let next = pool.lease(&[(GuestAddress(0), 2 * BLOCK)]).unwrap();
    assert!(first.is_finished() && !second.is_finished());
    assert_eq!(pool.accounts().clean, BLOCK);
    drop(next);
    assert!(second.wait().unwrap().is_proven());
}

#[test]
fn cancelling_hands_the_memory_back_dirty() {
    let (pool, clock) = crawling(4);
    let (lease, quiesced) = dirty_lease(&pool, 4);
    let ticket = lease.retire(quiesced).unwrap();
    clock.wait_until_asleep();
    let Cancelled::Dirty(memory) = ticket.cancel() else {
        panic!("it cannot have been finished");
    };
    assert_eq!(pool.accounts().dirty, 4 * BLOCK);
    let receipt = memory.scrub_and_verify().recycle().unwrap();
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_scrubbed, 4 * BLOCK);
    assert_free_memory_is_zero(&pool);

    let (lease, quiesced) = dirty_lease(&pool, 4);
    let ticket = lease.retire(quiesced).unwrap();
    drop(ticket.cancel());
    assert_eq!(
        pool.accounts().quarantined + pool.accounts().clean,
        4 * BLOCK
    );
    assert_eq!(
        pool.accounts().quarantined,
        4 * BLOCK,
        "dirty memory that is dropped is quarantined"
    );
}

/// The kernel does not say what is populated in one block, or that it is broken; the others are scrubbed like any.
#[test]
fn a_block_about_which_the_kernel_does_not_answer_is_lost_alone() {
    for (errno, reason) in [
        (libc::ENOMEM, QuarantineReason::ResidencyUnknown),
        (libc::EHWPOISON, QuarantineReason::MemoryError),
    ] {
        a_block_is_lost_alone(errno, reason);
    }
}

fn a_block_is_lost_alone(errno: i32, reason: QuarantineReason) {
    let (pool, clock) = crawling_by(builder(5).threads(1).revoke_by(RevokeBy::Mremap));
    // Keeps the background busy, so that it is this thread that asks.
    let (other, quiesced) = dirty_lease(&pool, 1);
    let other = other.retire(quiesced).unwrap();
    clock.wait_until_asleep();
    let (lease, quiesced) = dirty_lease(&pool, 4);
    let ticket = lease.retire(quiesced).unwrap();
    let fault = inject(pagemap_call(), 1, 2, errno);
    let receipt = ticket.wait().unwrap();
    assert_eq!(
        fault.hits(),
        2,
        "the question about the second block, twice"
    );
    drop(fault);
    assert_eq!(receipt.bytes_quarantined, BLOCK);
    let lost = &receipt.quarantined[0];
    assert_eq!((lost.guest_address, lost.reason), (BLOCK, reason));
    assert_eq!(
        (receipt.bytes_scrubbed, receipt.bytes_verified),
        (3 * BLOCK, 3 * BLOCK)
    );
    assert!(other.wait().unwrap().is_proven());
    assert_eq!(pool.accounts().clean, 4 * BLOCK);
    assert_free_memory_is_zero(&pool);
}

/// What stays with its guest is not asked about, and the answers about the rest stand for the rest.
#[test]
fn what_was_not_taken_away_is_lost_alone() {
    let pool = builder(3)
        .page_size(PageSize::Base4K)
        .revoke_by(RevokeBy::Mremap)
        .build()
        .unwrap();
    let regions = [(0, BLOCK), (4 * BLOCK, 2 * BLOCK)];
    let lease = pool
        .lease(&regions.map(|(start, bytes)| (GuestAddress(start), bytes)))
        .unwrap();
    // All but the last page.
    let memory = lease.memory();
    for (start, bytes) in [(0, BLOCK), (4 * BLOCK, BLOCK), (5 * BLOCK, BLOCK - 4096)] {
        memory
            .write_slice(&vec![1_u8; bytes as usize], GuestAddress(start))
            .unwrap();
    }
    drop(memory);
    // SAFETY: the only handle is dropped.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    let fault = inject(Call::Mremap, 0, 1, libc::ENOMEM);
    let ticket = lease.retire(quiesced).unwrap();
    assert_eq!(fault.hits(), 1);
    drop(fault);
    let receipt = ticket.wait_in_background().unwrap();
    assert_eq!(receipt.bytes_quarantined, BLOCK);
    assert_eq!(receipt.quarantined[0].guest_address, 0);
    assert_eq!(receipt.quarantined[0].reason, QuarantineReason::NotRevoked);
    assert_eq!(receipt.bytes_scrubbed, 2 * BLOCK - 4096);
    assert_eq!(receipt.bytes_never_populated, 4096);
    assert_eq!(pool.accounts().clean, 2 * BLOCK);
}

/// The kernel says of one block that its memory is broken. So it has said something about it.
#[test]
fn a_block_that_the_kernel_knows_to_be_broken_is_lost_alone() {
    let pool = builder(3).threads(1).build().unwrap();
    let (lease, quiesced) = dirty_lease(&pool, 3);
    let dirty = lease.revoke(quiesced).unwrap();
    // The question about all of it, and then that about its first block.
    let fault = inject(pagemap_call(), 0, 2, libc::EHWPOISON);
    let scrubbed = dirty.scrub();
    assert_eq!(fault.hits(), 2);
    drop(fault);
    let receipt = scrubbed.verify().recycle().unwrap();
    let lost: Vec<_> = receipt
        .quarantined
        .iter()
        .map(|range| (range.guest_address, range.bytes, range.reason))
        .collect();
    assert_eq!(lost, [(0, BLOCK, QuarantineReason::MemoryError)]);
    assert_eq!(receipt.bytes_scrubbed, 2 * BLOCK);
    assert_eq!(pool.accounts().clean, 2 * BLOCK);
    assert_free_memory_is_zero(&pool);
}

#[test]
fn cancelling_what_is_finished_gives_the_receipt() {
    let pool = builder(2).build().unwrap();
    let (lease, quiesced) = dirty_lease(&pool, 2);
    let ticket = lease.retire(quiesced).unwrap();
    while !ticket.is_finished() {
        std::thread::yield_now();
    }
    let Cancelled::Finished(outcome) = ticket.cancel() else {
        panic!("it was finished");
    };
    assert!(outcome.unwrap().is_proven());
}

#[test]
fn the_urgent_one_goes_first() {
    let (pool, clock) = crawling(8);
    let (first, quiesced) = dirty_lease(&pool, 2);
    let first = first.retire(quiesced).unwrap();
    clock.wait_until_asleep();
    let (second, quiesced) = dirty_lease(&pool, 2);
    let second = second.retire(quiesced).unwrap();
    second.set_priority(Priority::High);
    for _ in 0..3 {
        clock.go_on(Duration::from_secs(1));
        clock.wait_until_asleep();
        clock.wait_until_asleep();
    }
    assert_eq!(
        first.progress().bytes_done,
        PIECE,
        "it was put aside after its first piece"
    );
    assert_eq!(second.progress().bytes_done, 3 * PIECE);
    pool.set_scrub_rate(None);
    assert!(second.wait_in_background().unwrap().is_proven());
    assert!(first.wait_in_background().unwrap().is_proven());
}

#[test]
fn the_pool_may_go_before_its_tickets() {
    for crawl in [false, true] {
        let (pool, clock) = crawling(4);
        if !crawl {
            pool.set_scrub_rate(None);
        }
        let (lease, quiesced) = dirty_lease(&pool, 4);
        let ticket = lease.retire(quiesced).unwrap();
        if crawl {
            clock.wait_until_asleep();
        }
        drop(pool);
        assert!(ticket.wait().unwrap().is_proven());
    }
}

#[test]
fn progress_is_told_and_grows_to_the_end() {
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let sink = Arc::clone(&seen);
    let pool = builder(4)
        .on_progress(move |progress| {
            sink.lock()
                .unwrap()
                .push((progress.bytes_done, progress.bytes_total))
        })
        .build()
        .unwrap();
    let (lease, quiesced) = dirty_lease(&pool, 4);
    assert!(lease.teardown(quiesced).unwrap().is_proven());
    let mut seen = std::mem::take(&mut *seen.lock().unwrap());
    seen.sort_unstable();
    let expected: Vec<(u64, u64)> = (1..=4 * BLOCK / PIECE)
        .map(|piece| (piece * PIECE, 4 * BLOCK))
        .collect();
    assert_eq!(seen, expected);
}

#[test]
fn a_callback_that_panics_quarantines_and_harms_nobody_else() {
    let panics = Arc::new(AtomicBool::new(true));
    let flag = Arc::clone(&panics);
    let pool = builder(4)
        .on_progress(move |_| assert!(!flag.load(Ordering::SeqCst), "on purpose"))
        .build()
        .unwrap();
    let (lease, quiesced) = dirty_lease(&pool, 2);
    let id = lease.id();
    let ticket = lease.retire(quiesced).unwrap();
    let error = ticket.wait_in_background().unwrap_err();
    assert!(
        matches!(error, TeardownError::Panicked { lease } if lease == id),
        "{error}"
    );
    assert_eq!(pool.accounts().quarantined, 2 * BLOCK);

    panics.store(false, Ordering::SeqCst);
    let (lease, quiesced) = dirty_lease(&pool, 2);
    assert!(
        lease
            .retire(quiesced)
            .unwrap()
            .wait_in_background()
            .unwrap()
            .is_proven()
    );
    assert_free_memory_is_zero(&pool);
}

#[test]
fn a_callback_that_panics_does_not_harm_who_waits_or_asks_for_memory() {
    for threads in [1, 2] {
        let pool = builder(2)
            .threads(threads)
            .scrub_rate(CRAWL)
            .clock(StoppedClock::default())
            .on_progress(|progress| assert!(progress.bytes_done <= 2 * PIECE, "on purpose"))
            .build()
            .unwrap();
        let (lease, quiesced) = dirty_lease(&pool, 1);
        let error = lease.retire(quiesced).unwrap().wait().unwrap_err();
        assert!(matches!(error, TeardownError::Panicked { .. }), "{error}");
        assert_eq!(pool.accounts().quarantined, BLOCK);

        let (lease, quiesced) = dirty_lease(&pool, 1);
        let ticket = lease.retire(quiesced).unwrap();
        let error = pool.lease(&[(GuestAddress(0), BLOCK)]).unwrap_err();
        assert!(matches!(error, LeaseError::NotEnough { .. }), "{error}");
        assert!(ticket.is_finished());
        assert_eq!(pool.accounts().quarantined, 2 * BLOCK);
    }
}

/// The background thread has done the last piece and is still in the callback when another thread concludes.
#[test]
fn a_callback_that_panics_too_late_leaves_the_receipt() {
    let (at_the_end, concluded) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (says_so, waits_for) = (Arc::clone(&at_the_end), Arc::clone(&concluded));
    let panicked = Arc::new(AtomicBool::new(false));
    let tells = Arc::clone(&panicked);
    let pool = builder(1)
        .threads(1)
        .on_progress(move |progress| {
            let background = std::thread::current().name() == Some("vm-scrub-back");
            if background && progress.bytes_done == progress.bytes_total {
                says_so.store(true, Ordering::SeqCst);
                while !waits_for.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
                let _tells = Told(Arc::clone(&tells));
                panic!("on purpose");
            }
        })
        .build()
        .unwrap();
    let (lease, quiesced) = dirty_lease(&pool, 1);
    let ticket = lease.retire(quiesced).unwrap();
    while !at_the_end.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    // Helps: there is nothing left to do but to conclude.
    let next = pool.lease(&[(GuestAddress(0), BLOCK)]).unwrap();
    concluded.store(true, Ordering::SeqCst);
    while !panicked.load(Ordering::SeqCst) {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(50));
    let receipt = ticket.wait().expect("the memory is with the next guest");
    assert!(receipt.is_proven());
    drop(next);
    assert_eq!(pool.accounts().clean, BLOCK);
}

/// Tells when a panic passes it.
struct Told(Arc<AtomicBool>);

impl Drop for Told {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// A VMM that waits for its tickets in a destructor, while another of its parts has panicked.
#[test]
fn who_waits_while_unwinding_gets_a_receipt() {
    struct Waits(Option<Ticket>, Arc<AtomicBool>);
    impl Drop for Waits {
        fn drop(&mut self) {
            let receipt = self.0.take().unwrap().wait();
            self.1
                .store(receipt.is_ok_and(|it| it.is_proven()), Ordering::SeqCst);
        }
    }
    let pool = builder(1)
        .threads(1)
        .scrub_rate(CRAWL)
        .clock(StoppedClock::default())
        .build()
        .unwrap();
    let (lease, quiesced) = dirty_lease(&pool, 1);
    let proven = Arc::new(AtomicBool::new(false));
    let waits = Waits(Some(lease.retire(quiesced).unwrap()), Arc::clone(&proven));
    let panicked = std::thread::spawn(move || {
        let _waits = waits;
        panic!("on purpose");
    });
    assert!(panicked.join().is_err());
    assert!(proven.load(Ordering::SeqCst));
    assert_eq!(pool.accounts().clean, BLOCK);
}

#[test]
fn many_threads_retire_wait_cancel_and_lease() {
    let pool = builder(16).build().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..6_u64 {
            let pool = &pool;
            scope.spawn(move || {
                for round in 0..40_u64 {
                    let blocks = 1 + (thread + round) % 5;
                    let Ok(lease) = pool.lease(&[(GuestAddress(0), blocks * BLOCK)]) else {
                        continue;
                    };
                    let mut bytes = vec![1_u8; (blocks * BLOCK) as usize];
                    lease
                        .memory()
                        .read_slice(&mut bytes, GuestAddress(0))
                        .unwrap();
                    assert!(
                        bytes.iter().all(|byte| *byte == 0),
                        "a byte of another guest"
                    );
                    bytes.fill(thread as u8 + 1);
                    lease.memory().write_slice(&bytes, GuestAddress(0)).unwrap();
                    // SAFETY: no handle is left.
                    let quiesced = unsafe { Quiesced::assert(&lease) };
                    let ticket = lease.retire(quiesced).unwrap();
                    match (thread + round) % 4 {
                        0 => drop(ticket),
                        1 => assert!(ticket.wait().unwrap().is_proven()),
                        2 => assert!(ticket.wait_in_background().unwrap().is_proven()),
                        _ => match ticket.cancel() {
                            Cancelled::Dirty(memory) => {
                                assert!(memory.scrub_and_verify().recycle().unwrap().is_proven());
                            }
                            Cancelled::Finished(outcome) => assert!(outcome.unwrap().is_proven()),
                        },
                    }
                    assert_eq!(pool.accounts().total(), 16 * BLOCK);
                }
            });
        }
    });
    // What is still queued is helped along.
    let all = pool.lease(&[(GuestAddress(0), 16 * BLOCK)]).unwrap();
    drop(all);
    assert_eq!(pool.accounts().clean, 16 * BLOCK);
    assert_free_memory_is_zero(&pool);
}
