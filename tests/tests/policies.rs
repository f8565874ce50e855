//! What a pool's policy changes: how much is read back, and by which loop memory is zeroed.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use vm_scrub::lease::Outcome;
use vm_scrub::test_support::{Sabotage, build_sabotaged};
use vm_scrub::{BLOCK_SIZE, PageSize, Policy, Pool, PoolError, ScrubReceipt, Verify};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::{assert_nothing_dirty_left, fill, pools, regions, teardown};

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
    // However busy the machine is, the smallest size is measured.
    let fastest = receipt
        .calibration
        .iter()
        .max_by_key(|rate| rate.bytes_per_second);
    assert_eq!(fastest.unwrap().loop_name, receipt.zero_loop);

    for zero_loop in vm_scrub::arch::ZeroLoop::available() {
        let pool = with(Policy::new().zero_loop(zero_loop));
        let receipt = generation(&pool);
        assert_eq!(receipt.zero_loop, zero_loop.name());
        assert!(receipt.calibration.is_empty() && receipt.is_proven());
        assert_nothing_dirty_left(&pool);
    }
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
