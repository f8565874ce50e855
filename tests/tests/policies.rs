//! What a pool's policy changes: how much is read back, and by which loop memory is zeroed.

use log::Level;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};
use vm_scrub::lease::Outcome;
use vm_scrub::test_support::{Sabotage, build_sabotaged};
use vm_scrub::{
    BLOCK_SIZE, Operation, PageSize, Policy, Pool, PoolError, Rate, ScrubReceipt, Verify,
};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::logs::{heard, listen};
use vm_scrub_tests::{assert_nothing_dirty_left, fill, pools, regions, skipped, teardown};

const ALL: [(u64, u64); 1] = [(0, 4 * BLOCK_SIZE)];

fn generation(pool: &Pool) -> ScrubReceipt {
    let lease = pool.lease(&regions(&ALL)).unwrap();
    fill(&lease, 9);
    teardown(lease)
}

fn with(policy: Policy) -> Pool {
    pools::builder(PageSize::Base4K, 4)
        .policy(policy)
        .build()
        .unwrap()
}

#[test]
fn only_complete_verification_is_called_proven() {
    for (verify, outcome, verified) in [
        (Verify::None, Outcome::Unverified, 0),
        (Verify::Full, Outcome::Proven, 4 * BLOCK_SIZE),
        (Verify::Memory, Outcome::Proven, 4 * BLOCK_SIZE),
        (
            Verify::Sampled { per_mille: 1000 },
            Outcome::Sampled,
            4 * BLOCK_SIZE,
        ),
        // One line of 4,096 in each piece.
        (Verify::Sampled { per_mille: 0 }, Outcome::Sampled, 32 * 64),
    ] {
        let pool = with(Policy::new().verify(verify));
        let receipt = generation(&pool);
        assert_eq!(receipt.outcome, outcome, "{verify:?}");
        assert_eq!(receipt.is_proven(), verify.is_complete());
        assert_eq!(receipt.bytes_verified, verified, "{verify:?}");
        assert_eq!(
            receipt.sample_seed.is_some(),
            matches!(verify, Verify::Sampled { .. })
        );
        assert_nothing_dirty_left(&pool);
    }
}

#[test]
fn every_level_but_none_catches_a_scrubber_that_does_nothing() {
    for verify in [
        Verify::Full,
        Verify::Memory,
        Verify::Sampled { per_mille: 1 },
    ] {
        let builder = pools::builder(PageSize::Base4K, 4).policy(Policy::new().verify(verify));
        let pool = build_sabotaged(builder, Sabotage::SkipScrub).unwrap();
        let receipt = generation(&pool);
        assert_eq!(receipt.bytes_quarantined, 4 * BLOCK_SIZE, "{verify:?}");
        assert_eq!(receipt.outcome, Outcome::Quarantined);
        assert_eq!(pool.accounts().quarantined, 4 * BLOCK_SIZE);
    }
}

#[test]
fn a_measured_loop_comes_with_its_rates_and_a_named_one_without() {
    let receipt = generation(&with(Policy::new()));
    // However busy the machine is, the smallest size is measured. Between what is nearly as fast decides another one.
    let is_nearly_the_fastest = |rates: &[Rate], name: &str| {
        let fastest = rates.iter().map(|rate| rate.bytes_per_second).max();
        let chosen = rates.iter().find(|rate| rate.loop_name == name).unwrap();
        chosen.bytes_per_second as f64 * 1.21 > fastest.unwrap() as f64
    };
    assert!(is_nearly_the_fastest(
        &receipt.calibration,
        &receipt.zero_loop
    ));
    let rates = &receipt.verify_calibration;
    assert!(is_nearly_the_fastest(
        rates,
        receipt.verify_loop.as_ref().unwrap()
    ));
    assert!(rates.iter().all(|rate| rate.operation == Operation::Verify));
    assert_eq!(rates.len(), VerifyLoop::available().count());
    // Nothing zeroes or reads megabytes in a microsecond.
    assert!(receipt.steps.scrub_ns > 1000 && receipt.steps.verify_ns > 1000);

    for zero_loop in ZeroLoop::available() {
        let pool = with(Policy::new().zero_loop(zero_loop));
        let receipt = generation(&pool);
        assert_eq!(receipt.zero_loop, zero_loop.name());
        assert!(receipt.calibration.is_empty() && receipt.is_proven());
        // What reads its zeros back is measured all the same.
        assert!(!receipt.verify_calibration.is_empty());
        assert_nothing_dirty_left(&pool);
    }
    for verify_loop in VerifyLoop::available() {
        let pool = with(Policy::new().verify_loop(verify_loop));
        let receipt = generation(&pool);
        assert_eq!(receipt.verify_loop.as_deref(), Some(verify_loop.name()));
        assert!(receipt.verify_calibration.is_empty() && receipt.is_proven());
        assert!(!receipt.calibration.is_empty());
    }
    let receipt = generation(&with(Policy::new().verify(Verify::None)));
    assert!(receipt.verify_calibration.is_empty(), "nothing was read");
}

#[test]
fn without_a_pool_one_page_is_measured_and_before_much_work_the_host() {
    alone(
        "without_a_pool_one_page_is_measured_and_before_much_work_the_host",
        || {
            let scrub = |bytes: usize, policy: &Policy| {
                let mut memory = vec![1_u8; bytes];
                vm_scrub::scrub(&mut memory, policy).unwrap()
            };
            let named = Policy::new()
                .zero_loop(ZeroLoop::best_guess())
                .verify_loop(VerifyLoop::portable());
            let done = scrub(64 << 20, &named);
            assert!(done.calibration.is_empty() && done.verify_calibration.is_empty());

            let fastest = |rates: &[Rate]| {
                let fastest = rates.iter().max_by_key(|rate| rate.bytes_per_second);
                fastest.expect("measured").loop_name.clone()
            };
            let small = |rates: &[Rate]| rates.iter().all(|rate| rate.bytes == 4096);
            let done = scrub(1 << 20, &Policy::new());
            assert_eq!(done.zero_loop, fastest(&done.calibration));
            assert_eq!(done.verify_loop, Some(fastest(&done.verify_calibration)));
            assert!(small(&done.calibration) && small(&done.verify_calibration));

            listen();
            let done = scrub(64 << 20, &Policy::new());
            if heard(Level::Warn, "not measured beyond") {
                return skipped(&"the host is too busy to be measured");
            }
            assert_eq!(done.zero_loop, fastest(&done.calibration));
            assert!(!small(&done.calibration));
            for operation in ["zero,", "verify,", "zero-and-verify,"] {
                for size in [4096, 64 << 20] {
                    let line = format!("{operation} {size} bytes: portable ");
                    assert!(heard(Level::Info, &line), "{line}");
                }
            }
            assert!(heard(Level::Info, "loops measured in "));
            // It was the only time.
            listen();
            let _ = with(Policy::new());
            assert!(!heard(Level::Info, "loops measured"));
        },
    );
}

#[test]
fn the_environment_names_the_loop() {
    alone("the_environment_names_the_loop", || {
        // SAFETY: this process has one test, and no other thread reads the environment.
        unsafe { std::env::set_var("VM_SCRUB_LOOP", "portable") };
        assert_eq!(generation(&with(Policy::new())).zero_loop, "portable");
        // SAFETY: as above.
        unsafe { std::env::set_var("VM_SCRUB_LOOP", "fastest") };
        let error = pools::builder(PageSize::Base4K, 1).build().unwrap_err();
        assert!(matches!(error, PoolError::UnknownLoop(_)));
        let text = error.to_string();
        assert!(
            text.contains("VM_SCRUB_LOOP") && text.contains("fastest") && text.contains("portable"),
            "{text}"
        );
        // SAFETY: as above.
        unsafe { std::env::set_var("VM_SCRUB_LOOP", "") };
        // SAFETY: as above.
        unsafe { std::env::set_var("VM_SCRUB_VERIFY_LOOP", "portable") };
        let receipt = generation(&with(Policy::new()));
        assert_eq!(receipt.verify_loop.as_deref(), Some("portable"));
        // SAFETY: as above.
        unsafe { std::env::set_var("VM_SCRUB_VERIFY_LOOP", "rep-stosb") };
        let error = pools::builder(PageSize::Base4K, 1).build().unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("VM_SCRUB_VERIFY_LOOP: there is no verification loop"),
            "{text}"
        );
        // SAFETY: as above.
        unsafe { std::env::remove_var("VM_SCRUB_VERIFY_LOOP") };
        // SAFETY: as above.
        unsafe { std::env::set_var("VM_SCRUB_LOOP", "fastest") };
        let mut memory = [1_u8; 64];
        let error = vm_scrub::scrub(&mut memory, &Policy::new()).unwrap_err();
        assert!(error.to_string().contains("VM_SCRUB_LOOP"), "{error}");
        assert_eq!(memory, [1; 64], "nothing was written");
        // SAFETY: as above.
        unsafe { std::env::set_var("VM_SCRUB_LOOP", OsStr::from_bytes(b"portable\xff")) };
        let error = pools::builder(PageSize::Base4K, 1).build().unwrap_err();
        assert!(matches!(error, PoolError::UnknownLoop(_)), "no name at all");
    });
}
