//! What is chosen after which measurements.

use super::*;

#[test]
fn what_was_measured_on_is_unmapped() {
    let mut seen = std::collections::BTreeSet::new();
    let address = || Scratch::populate(SMALLEST).unwrap().bytes().as_ptr().addr();
    // Other tests may be given the same addresses meanwhile.
    assert!((0..100).any(|_| !seen.insert(address())));
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
        return eprintln!("SKIPPED: this processor has one zeroing loop only");
    };
    let (Some(narrow), Some(wide)) = (readers.next(), readers.next()) else {
        return eprintln!("SKIPPED: this processor has one verification loop only");
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
    assert_eq!(calibration.fastest_zero(0), a);
    assert_eq!(calibration.fastest_zero(4096), a);
    assert_eq!(calibration.fastest_zero(u64::MAX), b);
    assert_eq!(calibration.fastest_verify(1), narrow);
    assert_eq!(calibration.fastest_verify(1 << 40), wide);
    // The large size was not reached: the small one stands in. Its zeros are read from where they were left.
    assert!(!b.is_streaming());
    assert_eq!(calibration.fastest_zero_and_verify(u64::MAX), (b, narrow));
    assert_eq!(calibration.rates().count(), 9);
    assert_eq!(calibration.rates_for(Operation::Zero, 1 << 40).len(), 2);
    let both = calibration.rates_for(Operation::ZeroAndVerify, 1 << 40);
    assert_eq!((both.len(), both[0].loop_name.as_str()), (1, b.name()));
}

#[test]
fn nothing_measured_is_what_runs_everywhere_or_the_processors_word() {
    let calibration = of(Vec::new());
    assert_eq!(calibration.fastest_zero(1), ZeroLoop::best_guess());
    assert_eq!(calibration.fastest_verify(1), VerifyLoop::portable());
    let guess = (ZeroLoop::best_guess(), VerifyLoop::portable());
    assert_eq!(calibration.fastest_zero_and_verify(1), guess);
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
    let (Some(a), Some(b)) = (
        VerifyLoop::available().next(),
        VerifyLoop::available().nth(1),
    ) else {
        return eprintln!("SKIPPED: this processor has one verification loop only");
    };
    let calibration = of(vec![
        measured(Loops::Verify(a), SMALLEST, 2.0),
        measured(Loops::Verify(b), SMALLEST, 1.0),
        measured(Loops::Verify(a), BEYOND_CACHES, 1.0),
        measured(Loops::Verify(b), BEYOND_CACHES, f64::INFINITY),
    ]);
    assert_eq!(calibration.fastest_verify(u64::MAX), b);
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
    let rates = calibration.rates_for(Operation::Verify, u64::MAX);
    assert_eq!(rates.len(), VerifyLoop::available().count());
    let fastest = rates.iter().max_by_key(|rate| rate.bytes_per_second);
    assert_eq!(
        fastest.unwrap().loop_name,
        calibration.fastest_verify(u64::MAX).name()
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
        eprintln!("SKIPPED: this machine is too busy to be measured");
        assert!(std::ptr::eq(first, quick_calibration()));
    }
    assert!(first.rates().all(|rate| rate.bytes_per_second > 0));
}
