//! What is chosen after which measurements.

use super::*;
use crate::test_support::skipped;

#[test]
fn what_was_measured_on_is_unmapped() {
    let mut seen = std::collections::BTreeSet::new();
    let address = || Scratch::populate(SMALLEST).unwrap().bytes().as_ptr().addr();
    // Other tests may be given the same addresses meanwhile.
    assert!((0..100).any(|_| !seen.insert(address())));
}

fn two_readers() -> Option<[VerifyLoop; 2]> {
    let mut readers = VerifyLoop::available();
    let two = readers.next().zip(readers.next());
    if two.is_none() {
        skipped("this processor has one verification loop only");
    }
    two.map(|(a, b)| [a, b])
}

fn two_zero_loops() -> Option<[ZeroLoop; 2]> {
    let mut loops = ZeroLoop::available();
    let two = loops.next().zip(loops.next());
    if two.is_none() {
        skipped("this processor has one zeroing loop only");
    }
    two.map(|(a, b)| [a, b])
}

fn measured(loops: Loops, bytes: usize, cost: f64) -> Measured {
    let turns = u32::from(cost.is_finite());
    Measured {
        bytes,
        loops,
        cost,
        turns,
    }
}

fn of(measured: Vec<Measured>) -> Calibration {
    let took = Duration::ZERO;
    Calibration { measured, took }
}

#[test]
fn the_cheapest_loop_of_the_nearest_size_is_chosen() {
    let mut loops = ZeroLoop::available();
    let mut readers = VerifyLoop::available();
    let (Some(a), Some(b)) = (loops.next(), loops.next()) else {
        return skipped("this processor has one zeroing loop only");
    };
    let (Some(narrow), Some(wide)) = (readers.next(), readers.next()) else {
        return skipped("this processor has one verification loop only");
    };
    let calibration = of(vec![
        measured(Loops::Zero(a), IN_CACHE[0], 1.0),
        measured(Loops::Zero(b), IN_CACHE[0], 2.0),
        measured(Loops::Zero(a), BEYOND_CACHES, 2.0),
        measured(Loops::Zero(b), BEYOND_CACHES, 1.0),
        measured(Loops::ZeroAndVerify(b), IN_CACHE[0], 1.0),
        measured(Loops::ZeroAndVerify(a), BEYOND_CACHES, f64::INFINITY),
        measured(Loops::Verify(narrow), IN_CACHE[0], 1.0),
        measured(Loops::Verify(wide), IN_CACHE[0], 2.0),
        measured(Loops::Verify(narrow), BEYOND_CACHES, 2.0),
        measured(Loops::Verify(wide), BEYOND_CACHES, 1.0),
    ]);
    assert_eq!(calibration.fastest_zero(0, 1), a);
    assert_eq!(calibration.fastest_zero(4096, 1), a);
    assert_eq!(calibration.fastest_zero(u64::MAX, 1), b);
    assert_eq!(calibration.fastest_verify(1, 1), narrow);
    assert_eq!(calibration.fastest_verify(1 << 40, 1), wide);
    // The large size was not reached: the small one stands in. Its zeros are read from where they were left.
    assert!(!b.is_streaming());
    assert_eq!(
        calibration.fastest_zero_and_verify(u64::MAX, 1),
        (b, narrow)
    );
    assert_eq!(calibration.rates().count(), 9);
    assert_eq!(calibration.rates_for(Operation::Zero, 1 << 40, 1).len(), 2);
    let both = calibration.rates_for(Operation::ZeroAndVerify, 1 << 40, 1);
    assert_eq!((both.len(), both[0].loop_name.as_str()), (1, b.name()));
}

#[test]
fn nothing_measured_is_what_runs_everywhere_or_the_processors_word() {
    let calibration = of(Vec::new());
    assert_eq!(calibration.fastest_zero(1, 1), ZeroLoop::best_guess());
    assert_eq!(calibration.fastest_verify(1, 1), VerifyLoop::portable());
    let guess = (ZeroLoop::best_guess(), VerifyLoop::portable());
    assert_eq!(calibration.fastest_zero_and_verify(1, 1), guess);
}

#[test]
fn sizes_stand_for_their_neighbourhood() {
    assert_eq!(nearest(0), IN_CACHE[0]);
    assert_eq!(nearest(5000), IN_CACHE[0]);
    assert_eq!(nearest(1 << 20), IN_CACHE[3]);
    assert_eq!(nearest(8 << 20), IN_CACHE[4]);
    assert_eq!(nearest(32 << 20), BEYOND_CACHES);
    assert_eq!(nearest(u64::MAX), BEYOND_CACHES);
}

#[test]
fn a_size_at_which_not_every_loop_had_its_turn_does_not_decide() {
    let Some([a, b]) = two_readers() else { return };
    let calibration = of(vec![
        measured(Loops::Verify(a), SMALLEST, 2.0),
        measured(Loops::Verify(b), SMALLEST, 1.0),
        measured(Loops::Verify(a), BEYOND_CACHES, 1.0),
        measured(Loops::Verify(b), BEYOND_CACHES, f64::INFINITY),
    ]);
    assert_eq!(calibration.fastest_verify(u64::MAX, 1), b);
}

#[test]
fn equals_are_decided_by_what_no_cache_holds() {
    let Some([a, b]) = two_zero_loops() else {
        return;
    };
    let (small, medium) = (IN_CACHE[1], IN_CACHE[2]);
    let calibration = of(vec![
        measured(Loops::Zero(a), SMALLEST, 1.0),
        measured(Loops::Zero(b), SMALLEST, 1.03),
        measured(Loops::Zero(a), small, 1.0),
        measured(Loops::Zero(b), small, 1.3),
        measured(Loops::Zero(a), medium, 1.0),
        measured(Loops::Zero(b), medium, 1.1),
        measured(Loops::Zero(a), BEYOND_CACHES, 2.0),
        measured(Loops::Zero(b), BEYOND_CACHES, 1.0),
    ]);
    let fastest = |bytes: usize, threads| calibration.fastest_zero(bytes as u64, threads);
    assert_eq!(fastest(SMALLEST, 1), b);
    assert_eq!(fastest(medium, 1), a);
    // Each of several threads has its share, and not in its own cache.
    assert_eq!(fastest(4 * medium, 4), b);
    assert_eq!(fastest(4 * small, 4), a);
    assert_eq!(fastest(medium, 0), a);
    // What all of them have together no longer fits.
    assert_eq!(fastest(BEYOND_CACHES, 8), b);
    let rates = calibration.rates_for(Operation::Zero, 4 * medium as u64, 4);
    assert!(rates.iter().all(|rate| rate.bytes == medium as u64));
    assert_eq!(rates.len(), 2);
}

#[test]
fn both_sizes_count_by_ratio_between_equals() {
    let Some([a, b]) = two_zero_loops() else {
        return;
    };
    let with = |small: f64, beyond: f64| {
        let calibration = of(vec![
            measured(Loops::Zero(a), SMALLEST, 1e-10),
            measured(Loops::Zero(b), SMALLEST, small),
            measured(Loops::Zero(a), BEYOND_CACHES, 1e-9),
            measured(Loops::Zero(b), BEYOND_CACHES, beyond),
        ]);
        calibration.fastest_zero(SMALLEST as u64, 1)
    };
    assert_eq!(with(1.04e-10, 0.99e-9), a);
    assert_eq!(with(1.04e-10, 0.95e-9), b);
    assert_eq!(with(1.06e-10, 0.1e-9), a);
}

#[test]
fn what_is_far_behind_at_both_ends_is_not_tried_between_them() {
    let Some([a, b]) = two_readers() else { return };
    let between = IN_CACHE[2];
    let may_win = |smallest: f64, largest: f64, larger: f64| {
        let untried = measured(Loops::Verify(b), between, f64::INFINITY);
        let mut calibration = of(vec![
            untried,
            measured(Loops::Verify(a), between, 1.0),
            measured(Loops::Verify(a), SMALLEST, 1.0),
            measured(Loops::Verify(b), SMALLEST, smallest),
            measured(Loops::Verify(a), BEYOND_CACHES, 1.0),
            measured(Loops::Verify(b), BEYOND_CACHES, largest),
            measured(Loops::Verify(a), IN_CACHE[3], 1.0),
            measured(Loops::Verify(b), IN_CACHE[3], larger),
            // Something else is no excuse for it.
            measured(Loops::Zero(ZeroLoop::best_guess()), SMALLEST, 1e-9),
        ]);
        let may_win = calibration.may_win(&untried);
        let rates = calibration.rates().count();
        calibration.forget_hopeless();
        // What was measured is told, whatever came of it.
        assert_eq!(calibration.rates().count(), rates);
        // What may win and had no turn keeps the others from being chosen.
        assert_eq!(
            calibration.is_complete(Operation::Verify, between),
            !may_win
        );
        may_win
    };
    assert!(!may_win(2.0, 2.0, 2.0));
    assert!(!may_win(2.0, 2.0, f64::INFINITY));
    assert!(may_win(1.4, 2.0, 2.0));
    assert!(may_win(2.0, 1.4, 2.0));
    assert!(may_win(2.0, 2.0, 1.4));
    // Nobody knows.
    assert!(may_win(f64::INFINITY, 2.0, 2.0));
    assert!(may_win(2.0, f64::INFINITY, 2.0));
}

#[test]
fn what_was_tried_and_is_far_behind_gets_one_more_short_turn_at_most() {
    let zero = ZeroLoop::best_guess();
    let reader = VerifyLoop::portable();
    let Some(other) = VerifyLoop::available().find(|other| *other != reader) else {
        return skipped("this processor has one verification loop only");
    };
    let calibration = of(vec![
        measured(Loops::Verify(reader), SMALLEST, 1e-10),
        measured(Loops::Zero(zero), SMALLEST, 1e-20),
    ]);
    let may_win = |bytes: usize, cost: f64, turns: u32| {
        let mut one = measured(Loops::Verify(other), bytes, cost);
        one.turns = turns;
        calibration.may_win(&one)
    };
    assert!(may_win(SMALLEST, 1.4e-10, 9));
    assert!(may_win(SMALLEST, 2e-10, 1));
    assert!(!may_win(SMALLEST, 2e-10, 2));
    // A turn that takes long is not repeated.
    assert!(!may_win(SMALLEST, 1e-6, 1));
}

#[test]
fn without_any_time_nothing_is_called_measured() {
    assert!(Calibration::measure(Duration::ZERO).is_none());
}

#[test]
fn one_page_is_measured_by_every_loop_and_stands_for_all_sizes() {
    let calibration = Calibration::quick();
    assert!(calibration.took() > Duration::ZERO);
    let loops = 2 * ZeroLoop::available().count() + VerifyLoop::available().count();
    assert_eq!(calibration.rates().count(), loops);
    assert!(
        calibration
            .rates()
            .all(|rate| rate.bytes == SMALLEST as u64)
    );
    let rates = calibration.rates_for(Operation::Verify, u64::MAX, 1);
    assert_eq!(rates.len(), VerifyLoop::available().count());
    let fastest = rates.iter().max_by_key(|rate| rate.bytes_per_second);
    assert_eq!(
        fastest.unwrap().loop_name,
        calibration.fastest_verify(u64::MAX, 1).name()
    );
}

#[test]
fn this_host_is_measured_once() {
    // A machine that is too busy is asked again, and not for ever. Other tests ask, too.
    for _ in 0..=TRIES {
        assert!(calibration().rates().count() > 0, "a page at least");
    }
    let first = calibration();
    assert!(std::ptr::eq(first, calibration()));
    assert!(std::ptr::eq(first, calibration_for(1)));
    if CALIBRATION.get().is_none() {
        skipped("this machine is too busy to be measured");
        assert!(std::ptr::eq(first, quick_calibration()));
    }
    assert!(first.rates().all(|rate| rate.bytes_per_second > 0));
}

#[test]
fn so_much_faster_is_far_behind() {
    let Some([a, b]) = two_readers() else { return };
    let calibration = of(vec![
        measured(Loops::Verify(a), SMALLEST, 2.0),
        // At another size, and another operation.
        measured(Loops::Verify(a), BEYOND_CACHES, 1.0),
        measured(Loops::Zero(ZeroLoop::best_guess()), SMALLEST, 1.0),
    ]);
    for (cost, is_far_behind) in [(1.0, false), (3.0, false), (3.5, true)] {
        let one = measured(Loops::Verify(b), SMALLEST, cost);
        assert_eq!(calibration.is_far_behind(&one), is_far_behind, "{cost}");
    }
}

#[test]
fn a_share_counts_as_long_as_its_threads_own_caches_can_hold_it() {
    assert_eq!(share(1 << 20, 2), 512 << 10);
    assert_eq!(share(2 << 20, 2), 1 << 20);
    assert_eq!(share((2 << 20) + 2, 2), (2 << 20) + 2);
    assert_eq!(share(7, 0), 7);
}
