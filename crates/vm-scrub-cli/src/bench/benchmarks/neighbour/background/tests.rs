//! What is scrubbed is counted, comes back clean, and what goes wrong is told.

use super::*;
use std::time::{Duration, Instant};

const BYTES: u64 = LEASES * BLOCK_SIZE;

fn retiring() -> Rc<RefCell<Retiring>> {
    let retiring = Retiring::new(None, BYTES, PageSize::Base4K).expect("a pool");
    Rc::new(RefCell::new(retiring))
}

#[test]
fn whole_leases_are_counted_and_come_back_clean() {
    let retiring = retiring();
    let mut before = 0;
    for rate in [None, Some(1 << 30), None] {
        let mut scrub = Paced::new(&retiring, rate);
        scrub.start().expect("started");
        assert!(scrub.done() > before, "it returns when it is under way");
        scrub.stop().expect("stopped");
        scrub.stop().expect("stopping twice is nothing");
        let done = scrub.done() - before;
        assert!(done > 0 && done.is_multiple_of(BLOCK_SIZE), "{done}");
        before += done;
        assert_eq!(retiring.borrow().pool.accounts().clean, BYTES);
    }
}

#[test]
fn who_comes_next_ends_what_was_left_going() {
    let retiring = retiring();
    for rate in [1 << 17, 1 << 30] {
        // A run that fails is not stopped.
        Paced::new(&retiring, Some(rate)).start().expect("started");
    }
    Paced::new(&retiring, None).stop().expect("stopped");
    assert_eq!(retiring.borrow().pool.accounts().clean, BYTES);
}

#[test]
fn it_begins_when_the_burst_is_over() {
    let retiring = retiring();
    let mut scrub = Paced::new(&retiring, Some(1 << 30));
    scrub.start().expect("started");
    assert!(scrub.done() > (1 << 30) / 100);
    scrub.stop().expect("stopped");
}

#[test]
fn what_is_left_in_the_end_is_done_without_the_throttle() {
    let retiring = retiring();
    // At this rate it would take a minute.
    let mut scrub = Paced::new(&retiring, Some(1 << 17));
    scrub.start().expect("started");
    let asked = Instant::now();
    scrub.stop().expect("stopped");
    assert!(
        asked.elapsed() < Duration::from_secs(40),
        "it was throttled"
    );
    assert_eq!(retiring.borrow().pool.accounts().clean, BYTES);
}

#[test]
fn a_lease_that_is_not_clean_is_found_out() {
    let retiring = retiring();
    let pool = Arc::clone(&retiring.borrow().pool);
    let mut lease = leased::lease_all(&pool).expect("all of it");
    mark(&mut lease).expect("clean");
    let error = mark(&mut lease).expect_err("marked").to_string();
    assert!(error.contains("did not do its work"), "{error}");
    leased::end(Some(lease));
}

#[test]
fn an_error_of_the_one_who_retires_is_told() {
    let retiring = retiring();
    let pool = Arc::clone(&retiring.borrow().pool);
    let lease = leased::lease_all(&pool).expect("all of it");
    let error = Paced::new(&retiring, None).start().expect_err("no memory");
    assert!(format!("{error:#}").contains("no lease"), "{error:#}");
    leased::end(Some(lease));
}
