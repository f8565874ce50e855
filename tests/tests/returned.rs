//! What is beyond the memory that a policy retains goes back to the kernel: that much and no more, and no byte of it is left.

use vm_scrub::test_support::{Sabotage, build_sabotaged};
use vm_scrub::{BLOCK_SIZE, PageSize, Policy, scrub, scrub_raw};
use vm_scrub_tests::{
    PAGE, assert_nothing_dirty_left, fill, on_small_page_sizes, pools, quiesce, regions, teardown,
};

on_small_page_sizes!(a_pool_keeps_what_is_retained, what_is_quarantined_is_kept);

fn a_pool_keeps_what_is_retained(page_size: PageSize) {
    for retain in [0, PAGE, 3 * BLOCK_SIZE / 2, 4 * BLOCK_SIZE, u64::MAX] {
        let pool = pools::builder(page_size, 4)
            .policy(Policy::new().retain(retain))
            .build()
            .unwrap();
        let all = regions(&[(0, 4 * BLOCK_SIZE)]);
        let lease = pool.lease(&all).unwrap();
        fill(&lease, 1);
        let receipt = teardown(lease);
        assert!(receipt.is_proven());
        assert_eq!(receipt.bytes_scrubbed, 4 * BLOCK_SIZE);
        let kept = retain.min(4 * BLOCK_SIZE);
        assert_eq!(receipt.bytes_returned, 4 * BLOCK_SIZE - kept);

        // The next guest touches nothing: what is populated is what was kept.
        let receipt = teardown(pool.lease(&all).unwrap());
        assert_eq!(receipt.bytes_scrubbed, kept);
        assert_eq!(receipt.bytes_returned, 0);
        assert_nothing_dirty_left(&pool);
    }
}

fn what_is_quarantined_is_kept(page_size: PageSize) {
    let builder = pools::builder(page_size, 4).policy(Policy::new().retain(BLOCK_SIZE));
    let pool = build_sabotaged(builder, Sabotage::SkipChunk).unwrap();
    let lease = pool.lease(&regions(&[(0, 4 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let quiesced = quiesce(&lease);
    let receipt = lease.teardown(quiesced).unwrap();
    assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE);
    assert_eq!(receipt.bytes_scrubbed, 3 * BLOCK_SIZE);
    // One of the three that are clean is retained; the one that is not does not count.
    assert_eq!(receipt.bytes_returned, 2 * BLOCK_SIZE);
}

/// Memory of an allocator's is seldom page aligned.
#[test]
fn a_range_keeps_what_is_retained_wherever_it_begins() {
    const LEN: usize = 8 << 20;
    let mut memory = vec![0_u8; LEN];
    for start in [0, 1, 64, 4095, 4096, 5000] {
        for retain in [0, 1, 4096, 5000, 1 << 20, 8 << 20] {
            memory.fill(0x5e);
            let part = &mut memory[start..LEN - 100];
            let len = part.len() as u64;
            let done = scrub(part, &Policy::new().retain(retain)).unwrap();
            assert!(part.iter().all(|byte| *byte == 0));
            assert_eq!(done.bytes, len);
            // Only whole pages can be given back: at both ends, and where the retained part ends.
            let most = len.saturating_sub(retain);
            assert!(
                done.bytes_returned <= most && done.bytes_returned + 3 * PAGE > most,
                "{retain} of {len} bytes from {start}: {} returned",
                done.bytes_returned
            );
            let outside = memory[..start].iter().chain(&memory[LEN - 100..]);
            assert!(outside.copied().all(|byte| byte == 0x5e));
        }
    }
}

/// Pages here and there, in a range that begins inside a page.
#[test]
fn each_run_of_pages_of_a_range_is_given_back() {
    const LEN: usize = 4 << 20;
    // SAFETY: a mapping at a place of the kernel's choice; without huge pages, which would fill the gaps.
    let start: *mut u8 = unsafe {
        let start = libc::mmap(
            std::ptr::null_mut(),
            LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        assert_ne!(start, libc::MAP_FAILED);
        let _ = libc::madvise(start, LEN, libc::MADV_NOHUGEPAGE);
        start.cast()
    };
    let scrubbed = |retain| {
        for run in 1..8 {
            // SAFETY: four pages of the mapping.
            unsafe { start.add(run << 19).write_bytes(1, 4 * PAGE as usize) };
        }
        // SAFETY: mapped, writable and this test's own.
        unsafe { scrub_raw(start.add(100), LEN - 200, &Policy::new().retain(retain)) }.unwrap()
    };
    let first = scrubbed(u64::MAX);
    // The pages at both ends are the caller's in part only, and count.
    let ends = 2 * (PAGE - 100);
    assert_eq!(
        (first.bytes, first.bytes_returned),
        (7 * 4 * PAGE + ends, 0)
    );
    assert_eq!(scrubbed(0).bytes_returned, 7 * 4 * PAGE);
    let some = scrubbed(6 * PAGE).bytes_returned;
    assert!((21 * PAGE..=23 * PAGE).contains(&some), "{some}");
    // SAFETY: this test's own, and no longer used.
    assert_eq!(unsafe { libc::munmap(start.cast(), LEN) }, 0);
}
