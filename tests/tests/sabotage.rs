//! The proof can fail: a scrubber that is broken on purpose is caught by verification, and without verification the next
//! guest really sees the bytes of the last one.

use vm_scrub::arch::{VerifyLoop, ZeroLoop};
use vm_scrub::lease::{Outcome, QuarantineReason};
use vm_scrub::test_support::{Sabotage, build_sabotaged};
use vm_scrub::{BLOCK_SIZE, Extent, PageSize, Policy, Pool, ScrubReceipt, Verify};
use vm_scrub_tests::{
    assert_adds_up, assert_nothing_dirty_left, fill, first_nonzero, on_every_page_size, pools,
    quiesce, regions,
};

on_every_page_size!(
    nothing_is_zeroed_and_all_is_quarantined: 4,
    what_is_not_zero_is_named_by_its_guest_address: 4,
    one_piece_is_left_out_and_its_block_is_quarantined: 4,
    one_byte_is_found_wherever_it_is: 10,
    without_verification_the_next_guest_sees_it: 4,
);

/// The guest begins here, so that guest addresses and pool offsets differ.
const BASE: u64 = 5 * BLOCK_SIZE;
const PIECE: u64 = 256 << 10;

fn broken(page_size: PageSize, sabotage: Sabotage, verify: Verify, threads: usize) -> Pool {
    let builder = pools::builder(page_size, 4)
        .threads(threads)
        .policy(Policy::new().verify(verify));
    build_sabotaged(builder, sabotage).unwrap()
}

/// Lets a guest fill three blocks of the pool's four and tears it down, in one go or step by step.
fn one_guest(pool: &Pool, in_steps: bool) -> ScrubReceipt {
    let lease = pool.lease(&regions(&[(BASE, 3 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let quiesced = quiesce(&lease);
    let receipt = if in_steps {
        let dirty = lease.revoke(quiesced).unwrap();
        dirty.scrub().verify().recycle()
    } else {
        lease.teardown(quiesced)
    };
    let receipt = receipt.unwrap();
    assert_adds_up(&receipt);
    assert_eq!(receipt.bytes_total, 3 * BLOCK_SIZE);
    assert_eq!(pool.accounts().quarantined, receipt.bytes_quarantined);
    receipt
}

const EVERY_WAY: [(usize, bool); 4] = [(1, false), (2, false), (1, true), (2, true)];

fn nothing_is_zeroed_and_all_is_quarantined(page_size: PageSize) {
    for (threads, in_steps) in EVERY_WAY {
        let pool = broken(page_size, Sabotage::SkipScrub, Verify::Full, threads);
        let receipt = one_guest(&pool, in_steps);
        assert!(!receipt.is_proven());
        assert_eq!(receipt.outcome, Outcome::Quarantined);
        assert_eq!(receipt.bytes_quarantined, 3 * BLOCK_SIZE);
        assert_eq!((receipt.bytes_scrubbed, receipt.bytes_verified), (0, 0));
        let [range] = &receipt.quarantined[..] else {
            panic!("neighbours with the same reason are one: {receipt:?}");
        };
        assert_eq!((range.guest_address, range.bytes), (BASE, 3 * BLOCK_SIZE));
        assert_eq!(range.reason, QuarantineReason::NotZero);
        let place = format!("the byte at guest address {BASE:#x} is not zero");
        assert!(range.detail.contains(&place), "{range:?}");
        // One block is left, and no guest was ever in it. It is leased here without being written.
        assert_eq!(pool.accounts().clean, BLOCK_SIZE);
        let rest = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
        assert_eq!(first_nonzero(&rest), None);
        assert!(pool.lease(&regions(&[(0, 4096)])).is_err());
    }
}

/// Guest addresses, not places in the pool: the guest lies in pieces behind somebody else's block, its second region first.
fn what_is_not_zero_is_named_by_its_guest_address(page_size: PageSize) {
    let pool = broken(page_size, Sabotage::SkipScrub, Verify::Full, 2);
    let first = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let layout = [(BASE, BLOCK_SIZE), (1 << 40, 2 * BLOCK_SIZE)];
    let lease = pool.lease(&regions(&layout)).unwrap();
    assert_eq!(
        lease.blocks(),
        [Extent {
            first: 1,
            blocks: 3
        }]
    );
    fill(&lease, 1);
    let quiesced = quiesce(&lease);
    let receipt = lease.teardown(quiesced).unwrap();
    assert_adds_up(&receipt);
    let places: Vec<(u64, u64)> = receipt
        .quarantined
        .iter()
        .map(|range| (range.guest_address, range.bytes))
        .collect();
    assert_eq!(places, layout);
    for range in &receipt.quarantined {
        let place = format!("guest address {:#x} ", range.guest_address);
        assert!(range.detail.contains(&place), "{range:?}");
    }
    drop(first);
}

fn one_piece_is_left_out_and_its_block_is_quarantined(page_size: PageSize) {
    for (threads, in_steps) in EVERY_WAY {
        let pool = broken(page_size, Sabotage::SkipChunk, Verify::Full, threads);
        let receipt = one_guest(&pool, in_steps);
        assert!(!receipt.is_proven());
        assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE);
        assert_eq!(receipt.bytes_scrubbed, 2 * BLOCK_SIZE);
        assert_eq!(receipt.bytes_verified, 2 * BLOCK_SIZE);
        let [range] = &receipt.quarantined[..] else {
            panic!("one block: {receipt:?}");
        };
        assert_eq!((range.guest_address, range.bytes), (BASE, BLOCK_SIZE));
        assert_eq!(range.reason, QuarantineReason::NotZero);
        let place = format!("guest address {:#x}", BASE + BLOCK_SIZE - PIECE);
        assert!(range.detail.contains(&place), "{range:?}");
        assert_eq!(pool.accounts().clean, 3 * BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    }
}

/// At the borders of what is zeroed and read back in one go: in the cache, past it, a piece, a batch.
fn one_byte_is_found_wherever_it_is(page_size: PageSize) {
    let places = [
        0,
        1,
        4095,
        8191,
        8192,
        65_536,
        PIECE - 1,
        PIECE,
        BLOCK_SIZE - 1,
    ];
    let loops: Vec<_> = if page_size == PageSize::Base4K {
        ZeroLoop::available()
            .flat_map(|zero| VerifyLoop::available().map(move |verify| (zero, Some(verify))))
            .collect()
    } else {
        // Two of the loops that turn round often, and one that does not, with what the pool chooses.
        let cached = ["portable", "rep-stosb"].map(|name| ZeroLoop::by_name(name).ok());
        let streaming = ZeroLoop::available().find(|zero_loop| zero_loop.is_streaming());
        let each = cached.into_iter().chain([streaming]).flatten();
        each.map(|zero| (zero, None)).collect()
    };
    for (zero_loop, verify_loop) in loops {
        let mut policy = Policy::new().zero_loop(zero_loop);
        if let Some(verify_loop) = verify_loop {
            policy = policy.verify_loop(verify_loop);
        }
        // Each place costs a block.
        let builder = pools::builder(page_size, places.len() as u64 + 1).policy(policy);
        let pool = build_sabotaged(builder, Sabotage::SkipScrub).unwrap();
        for place in places {
            let lease = pool.lease(&regions(&[(BASE, BLOCK_SIZE)])).unwrap();
            let (_, start) = lease.host_addresses()[0];
            // SAFETY: the lease's memory, which nobody else uses. All of it is to be populated, and almost all of it zero.
            unsafe {
                start.write_bytes(0, BLOCK_SIZE as usize);
                start.add(place as usize).write(1);
            }
            let quiesced = quiesce(&lease);
            let receipt = lease.teardown(quiesced).unwrap();
            let used = format!("{place} {} {:?}", receipt.zero_loop, receipt.verify_loop);
            assert_eq!(receipt.zero_loop, zero_loop.name());
            if let Some(verify_loop) = verify_loop {
                assert_eq!(receipt.verify_loop.as_deref(), Some(verify_loop.name()));
            }
            assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE, "{used}");
            let found = &receipt.quarantined[0];
            let address = format!("{:#x} is not zero", BASE + place);
            assert!(found.detail.contains(&address), "{used}: {found:?}");
        }
        assert_nothing_dirty_left(&pool);
    }
}

fn without_verification_the_next_guest_sees_it(page_size: PageSize) {
    for (threads, in_steps) in EVERY_WAY {
        let cases = [
            (Sabotage::SkipScrub, BASE),
            (Sabotage::SkipChunk, BASE + BLOCK_SIZE - PIECE),
        ];
        for (sabotage, dirty) in cases {
            let pool = broken(page_size, sabotage, Verify::None, threads);
            let receipt = one_guest(&pool, in_steps);
            assert_eq!(receipt.outcome, Outcome::Unverified);
            assert!(!receipt.is_proven(), "nobody has looked");
            assert_eq!((receipt.bytes_verified, receipt.verify_loop), (0, None));
            let next = pool.lease(&regions(&[(BASE, 3 * BLOCK_SIZE)])).unwrap();
            assert_eq!(first_nonzero(&next), Some(dirty), "{sabotage:?}");
        }
    }
}

/// The same without sabotage: what is not read back is still zeroed.
#[test]
fn without_verification_a_sound_scrubber_is_trusted() {
    for (threads, in_steps) in EVERY_WAY {
        let pool = pools::builder(PageSize::Base4K, 4)
            .threads(threads)
            .policy(Policy::new().verify(Verify::None))
            .build()
            .unwrap();
        let receipt = one_guest(&pool, in_steps);
        assert_eq!(receipt.outcome, Outcome::Unverified);
        assert_eq!(receipt.bytes_scrubbed, 3 * BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    }
}
