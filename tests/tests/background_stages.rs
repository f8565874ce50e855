//! Everything that is done to a retired lease is background work, not only zeroing it: reading sealed memory back, zeroing and reading
//! again what was not zero, giving back what is not retained. Each is throttled, and stops when it is told to.

use std::fs::File;
use std::sync::Arc;
use std::time::Duration;
use vm_scrub::lease::{Cancelled, QuarantineReason};
use vm_scrub::test_support::{Call, Sabotage, build_sabotaged, inject};
use vm_scrub::{
    BLOCK_SIZE, Lease, PageSize, Policy, Pool, PoolBuilder, Priority, ScrubRate, Ticket,
};
use vm_scrub_tests::clock::StoppedClock;
use vm_scrub_tests::peer::{self, Peer};
use vm_scrub_tests::{
    assert_adds_up, assert_nothing_dirty_left, fill, on_every_page_size, pools, quiesce, regions,
};

on_every_page_size!(
    sealed_memory_is_read_back_at_the_same_pace: 4,
    what_is_sealed_is_not_handed_back_dirty: 4,
    reading_back_is_put_aside: 5,
    what_could_not_be_sealed_is_zeroed_again_at_the_same_pace: 4,
    what_cannot_be_sealed_is_not_tried_again: 4,
    a_second_chance_is_work_like_any_other: 2,
);

#[test]
fn peer() {
    peer::serve();
}

const PIECE: u64 = 256 << 10;
const PIECES: u64 = BLOCK_SIZE / PIECE;
const SECOND: Duration = Duration::from_secs(1);

/// One piece a second.
fn crawling(builder: PoolBuilder, build: impl Fn(PoolBuilder) -> Pool) -> (Pool, StoppedClock) {
    let clock = StoppedClock::default();
    let rate = ScrubRate {
        bytes_per_second: PIECE,
        burst: 0,
    };
    (build(builder.scrub_rate(rate).clock(clock.clone())), clock)
}

fn crawling_pool(page_size: PageSize, blocks: u64) -> (Pool, StoppedClock) {
    crawling(pools::builder(page_size, blocks), |builder| {
        builder.build().unwrap()
    })
}

fn retire(lease: Lease) -> Ticket {
    let quiesced = quiesce(&lease);
    lease.retire(quiesced).unwrap()
}

fn done(ticket: &Ticket) -> u64 {
    ticket.progress().bytes_done
}

/// Lets the background do piece after piece until this many bytes are done.
#[track_caller]
fn work_until(clock: &StoppedClock, ticket: &Ticket, bytes: u64) {
    clock.wait_until_asleep();
    while done(ticket) < bytes {
        let before = done(ticket);
        clock.let_work(SECOND);
        assert!(!ticket.is_finished(), "after {before} bytes");
        assert_eq!(done(ticket), before + PIECE, "one piece a second");
    }
}

fn sealed_memory_is_read_back_at_the_same_pace(page_size: PageSize) {
    let (pool, clock) = crawling_pool(page_size, 2);
    let ticket = retire(pools::dirty_block(&pool, true));
    assert_eq!(ticket.progress().bytes_total, 2 * BLOCK_SIZE);
    work_until(&clock, &ticket, (2 * PIECES - 1) * PIECE);
    clock.go_on(SECOND);
    let receipt = ticket.wait_in_background().unwrap();
    assert!(receipt.is_proven());
    assert_adds_up(&receipt);
    assert_eq!(pool.accounts().clean, 2 * BLOCK_SIZE);

    // Whoever waits is not slowed down, whatever is being done.
    let ticket = retire(pools::dirty_block(&pool, true));
    work_until(&clock, &ticket, (PIECES + 1) * PIECE);
    assert!(ticket.wait().unwrap().is_proven());
    // Nor does the pool wait for the throttle when it goes.
    let ticket = retire(pools::dirty_block(&pool, true));
    work_until(&clock, &ticket, (PIECES + 1) * PIECE);
    drop((ticket, pool));
}

fn what_is_sealed_is_not_handed_back_dirty(page_size: PageSize) {
    let (pool, clock) = crawling_pool(page_size, 2);
    let ticket = retire(pools::dirty_block(&pool, true));
    work_until(&clock, &ticket, (PIECES + 2) * PIECE);
    let Cancelled::Finished(outcome) = ticket.cancel() else {
        panic!("nobody can zero it any more");
    };
    let receipt = outcome.unwrap();
    assert_adds_up(&receipt);
    assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE);
    assert_eq!(receipt.quarantined[0].reason, QuarantineReason::NotReadBack);
    assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
    assert_eq!(pool.withheld().len(), 1);
    // The background, which waits for the throttle in the middle of an attempt, makes way.
    clock.wait_until_asleep();
    assert_eq!(pool.reclaim(), BLOCK_SIZE);
    assert_nothing_dirty_left(&pool);
}

fn reading_back_is_put_aside(page_size: PageSize) {
    let (pool, clock) = crawling_pool(page_size, 3);
    let first = retire(pools::dirty_block(&pool, true));
    work_until(&clock, &first, (PIECES + 2) * PIECE);
    let second = retire(pools::dirty_block(&pool, false));
    second.set_priority(Priority::High);
    work_until(&clock, &second, 3 * PIECE);
    assert_eq!(done(&first), (PIECES + 2) * PIECE);
    pool.set_scrub_rate(None);
    assert!(second.wait_in_background().unwrap().is_proven());
    assert!(first.wait_in_background().unwrap().is_proven());
}

fn what_could_not_be_sealed_is_zeroed_again_at_the_same_pace(page_size: PageSize) {
    let (pool, clock) = crawling_pool(page_size, 2);
    let lease = pools::dirty_block(&pool, true);
    let file: Arc<File> = Arc::clone(lease.file_offsets()[0].1.arc());
    let mut peer = Peer::with(&file);
    drop(file);
    assert_eq!(peer.map(), 0);
    let ticket = retire(lease);
    work_until(&clock, &ticket, (PIECES - 1) * PIECE);
    // The last piece, what is done once more as far as the pause lets it begin, and a part of that.
    for _ in 0..PIECES {
        clock.let_work(SECOND);
    }
    assert_eq!(done(&ticket), BLOCK_SIZE, "zeroing again does not count");
    assert!(!ticket.is_finished());
    let Cancelled::Dirty(memory) = ticket.cancel() else {
        panic!("it is not sealed");
    };
    assert_eq!(pool.accounts().dirty, BLOCK_SIZE);
    peer.kill();
    let receipt = memory.scrub_and_verify().recycle().unwrap();
    assert_adds_up(&receipt);
    assert!(receipt.is_proven());
    assert_nothing_dirty_left(&pool);
}

/// Only a peer may let go in a moment.
fn what_cannot_be_sealed_is_not_tried_again(page_size: PageSize) {
    // Calls fail on this thread, which seals when it waits, unless the background thread, just awake, comes first.
    for _ in 0..100 {
        let (pool, clock) = crawling_pool(page_size, 2);
        let ticket = retire(pools::dirty_block(&pool, true));
        work_until(&clock, &ticket, 2 * PIECE);
        let fault = inject(Call::AddSeals, 0, u32::MAX, libc::EPERM);
        let receipt = ticket.wait().unwrap();
        let tried = fault.hits();
        drop(fault);
        assert_adds_up(&receipt);
        if tried == 0 {
            assert!(receipt.is_proven());
            continue;
        }
        assert_eq!(tried, 1);
        assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE);
        assert_eq!(receipt.quarantined[0].reason, QuarantineReason::NotSealed);
        assert_eq!(pool.reclaim(), BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
        return;
    }
    panic!("the background thread always came first");
}

fn a_second_chance_is_work_like_any_other(page_size: PageSize) {
    let (pool, clock) = crawling(pools::builder(page_size, 1), |builder| {
        build_sabotaged(builder, Sabotage::SkipScrub).unwrap()
    });
    let ticket = retire(pools::dirty_block(&pool, false));
    clock.wait_until_asleep();
    for _ in 0..PIECES - 1 {
        clock.let_work(SECOND);
    }
    assert_eq!(done(&ticket), 0, "what is not zero is not done");
    clock.let_work(SECOND);
    clock.let_work(SECOND);
    assert_eq!(done(&ticket), 2 * PIECE);
    let Cancelled::Dirty(memory) = ticket.cancel() else {
        panic!("not everything had its second chance");
    };
    let receipt = memory.scrub_and_verify().recycle().unwrap();
    assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE);
    assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
}

/// Three blocks, of which one may stay.
#[test]
fn what_is_not_retained_goes_block_by_block() {
    let policy = Policy::new().retain(BLOCK_SIZE);
    let builder = pools::builder(PageSize::Base4K, 4).policy(policy);
    let (pool, clock) = crawling(builder, |builder| builder.build().unwrap());
    let four = || {
        let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
        fill(&lease, 1);
        retire(lease)
    };
    let ticket = four();
    assert_eq!(ticket.progress().bytes_total, 8 * BLOCK_SIZE);
    work_until(&clock, &ticket, 4 * BLOCK_SIZE);
    // One that stays, and one that goes on credit.
    clock.let_work(SECOND);
    assert_eq!(done(&ticket), 6 * BLOCK_SIZE);
    clock.let_work(SECOND);
    assert_eq!(done(&ticket), 6 * BLOCK_SIZE, "a block is eight pieces");
    let Cancelled::Finished(outcome) = ticket.cancel() else {
        panic!("it was proven to be clean");
    };
    let receipt = outcome.unwrap();
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_returned, BLOCK_SIZE);
    assert_eq!(pool.accounts().clean, 4 * BLOCK_SIZE);
    assert_nothing_dirty_left(&pool);

    let ticket = four();
    // What was given back is still being paid for.
    clock.go_on(SECOND * PIECES as u32);
    work_until(&clock, &ticket, 4 * BLOCK_SIZE);
    clock.let_work(SECOND);
    let receipt = ticket.wait().unwrap();
    assert_eq!(receipt.bytes_returned, 3 * BLOCK_SIZE);
    assert_eq!(receipt.bytes_scrubbed, 4 * BLOCK_SIZE);
}
