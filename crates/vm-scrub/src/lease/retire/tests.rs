//! Who works on a retired lease, and when it is over.

use super::*;
use crate::lease::{LeaseOptions, QuarantineReason};
use crate::scrub::Sabotage;
use crate::sys::fault::{self, Call};
use crate::{BLOCK_SIZE, PageSize, Policy, Pool, PoolBuilder};
use std::sync::Barrier;
use std::time::Duration;
use vm_memory::GuestAddress;

/// A retired lease of one block full of data, to which nothing is done but by the test.
fn retired_in(builder: PoolBuilder) -> (Pool, Ticket) {
    retired_with(builder, LeaseOptions::new())
}

fn retired_with(builder: PoolBuilder, options: LeaseOptions) -> (Pool, Ticket) {
    let builder = builder.capacity(BLOCK_SIZE).threads(1);
    let pool = builder.page_size(PageSize::Base4K).build().unwrap();
    pool.shared.background.end();
    let lease = pool
        .lease_with(&[(GuestAddress(0), BLOCK_SIZE)], options)
        .unwrap();
    let (_, start) = lease.host_addresses()[0];
    // SAFETY: the lease's memory, which nobody else uses, and nobody at all afterwards.
    let quiesced = unsafe {
        start.write_bytes(0xa5, BLOCK_SIZE as usize);
        Quiesced::assert(&lease)
    };
    let ticket = lease.retire(quiesced).unwrap();
    (pool, ticket)
}

fn retaining(bytes: u64) -> PoolBuilder {
    Pool::builder().policy(Policy::new().retain(bytes))
}

#[test]
fn all_counts_twice_only_if_something_may_have_to_go() {
    for (retain, total) in [
        (BLOCK_SIZE - 1, 2 * BLOCK_SIZE),
        (BLOCK_SIZE, BLOCK_SIZE),
        (BLOCK_SIZE + 1, BLOCK_SIZE),
    ] {
        let (_pool, ticket) = retired_in(retaining(retain));
        assert_eq!(ticket.progress().bytes_total, total, "{retain}");
    }
}

#[test]
fn what_is_known_already_is_not_told() {
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let ears = Arc::clone(&told);
    let hears = move |progress: Progress| ears.lock().unwrap().push(progress.bytes_done);
    let (_pool, ticket) = retired_in(Pool::builder().on_progress(hears));
    for done in [7, 7, 5, 8, 2 * BLOCK_SIZE, BLOCK_SIZE] {
        ticket.retired.tell(done);
    }
    assert_eq!(*told.lock().unwrap(), [7, 8, BLOCK_SIZE]);
}

#[test]
fn who_is_stopped_between_two_jobs_comes_back_and_who_is_not_goes_on() {
    let (_pool, ticket) = retired_in(retaining(0));
    let retired = &ticket.retired;
    retired.take_batches(&mut |_| true);
    assert!(retired.proceed(&mut |_| false), "nothing was asked for");
    assert!(!retired.proceed(&mut |_| false), "stopped");
    assert!(!ticket.is_finished());
    assert!(!retired.proceed(&mut |_| true), "that was the last stage");
    assert!(ticket.wait_in_background().unwrap().is_proven());
}

/// Nothing of it would be read back, and it is sealed.
#[test]
fn sealed_memory_about_which_the_kernel_does_not_answer_is_quarantined() {
    let options = LeaseOptions::new().shareable(true);
    let (pool, ticket) = retired_with(Pool::builder(), options);
    let retired = &ticket.retired;
    retired.take_batches(&mut |_| true);
    for next in ["to seal it", "to read it back"] {
        assert!(retired.proceed(&mut |_| true), "{next}");
    }
    let fault = fault::inject(Call::SeekData, 0, 2, libc::EIO);
    retired.take_batches(&mut |_| true);
    assert!(!retired.proceed(&mut |_| true), "that was the last stage");
    assert_eq!(fault.hits(), 2, "asked twice");
    drop(fault);
    let receipt = ticket.wait_in_background().unwrap();
    assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE, "{receipt:?}");
    let lost = &receipt.quarantined[0];
    assert_eq!(lost.reason, QuarantineReason::NotSealed);
    assert!(lost.detail.contains(Call::SeekData.name()), "{lost:?}");
    assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
    assert_eq!(pool.reclaim(), BLOCK_SIZE, "the kernel answers again");
}

#[test]
fn the_background_leaves_alone_what_is_cancelled_or_wanted_or_somebody_elses() {
    let (_pool, ticket) = retired_in(Pool::builder());
    let retired = &ticket.retired;
    assert!(retired.has_work() && !retired.is_wanted());
    let wanted = Wanted::of(retired);
    assert!(!retired.has_work() && retired.is_wanted());
    drop(wanted);
    assert!(retired.has_work() && !retired.is_wanted());
    retired.cancelled.store(true, Ordering::SeqCst);
    assert!(!retired.has_work());
    retired.cancelled.store(false, Ordering::SeqCst);
    let stage = std::mem::replace(&mut *retired.state(), State::Busy);
    assert!(!retired.has_work(), "one thread has it to itself");
    *retired.state() = stage;
    assert!(ticket.wait().unwrap().is_proven());
}

#[test]
fn it_is_as_urgent_as_was_said_last() {
    let (_pool, ticket) = retired_in(Pool::builder());
    assert_eq!(Chore::priority(&*ticket.retired), Priority::Normal);
    for priority in [Priority::Low, Priority::High, Priority::Normal] {
        ticket.set_priority(priority);
        assert_eq!(Chore::priority(&*ticket.retired), priority);
    }
}

/// Pieces that are not zero get a second chance one by one, and whoever looks while the last of them is being taken finds
/// nothing to take, and nothing done.
#[test]
fn what_others_have_taken_is_no_work() {
    let (_pool, ticket) = retired_in(Pool::builder().sabotage(Sabotage::SkipScrub));
    let retired = &ticket.retired;
    let mut has_work = Vec::new();
    retired.take_batches(&mut |_| {
        has_work.push(retired.has_work());
        true
    });
    let last = has_work.pop();
    assert_eq!(last, Some(false));
    assert!(has_work.iter().all(|has_work| *has_work), "{has_work:?}");
    assert!(retired.has_work(), "to conclude it");
}

#[test]
fn who_waits_for_work_does_not_take_what_is_cancelled() {
    let (_pool, ticket) = retired_in(Pool::builder());
    let retired = &ticket.retired;
    assert!(retired.wait_for_work());
    retired.cancelled.store(true, Ordering::SeqCst);
    let begun = Barrier::new(2);
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| {
            begun.wait();
            retired.wait_for_work()
        });
        begun.wait();
        // If it looks only afterwards, there is nothing to be seen, and the answer is the same.
        std::thread::sleep(Duration::from_millis(20));
        retired.give_up();
        assert!(!waits.join().unwrap());
    });
}

#[test]
fn who_leaves_a_lease_leaves_the_next_one_alone_with_it() {
    let (_pool, ticket) = retired_in(Pool::builder());
    let retired = &*ticket.retired;
    let is_busy = || matches!(&*retired.state(), State::Busy);
    let stage = std::mem::replace(&mut *retired.state(), State::Busy);
    // The next one is at it before the first has gone.
    Alone::with(retired).leave(State::Busy);
    assert!(is_busy());
    // One that panics gives it up.
    drop(Alone::with(retired));
    assert!(matches!(&*retired.state(), State::GivenUp));
    drop(stage);
}
