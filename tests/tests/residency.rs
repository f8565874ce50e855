//! Pages that were never populated are skipped, counted and left alone; everything else is scrubbed, whatever a guest or its
//! balloon did to make it look empty.

use log::Level;
use std::collections::BTreeSet;
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::lease::QuarantineReason;
use vm_scrub::test_support::{Call, arena_address, inject};
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, RevokeBy};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::maps::{has_pagemap_scan, pagemap_call, populated_bytes};
use vm_scrub_tests::{
    HugePages, PAGE, assert_all_zero, assert_nothing_dirty_left, fill, huge_pages, logs,
    on_every_page_size, pool, pools, quiesce, regions, skipped, teardown,
};

on_every_page_size!(
    an_untouched_guest: 4,
    a_pool_that_is_populated_up_front: 4,
    what_a_balloon_discards_is_scrubbed_or_gone: 4,
);

fn window(lease: &Lease) -> Range<usize> {
    let (region, start) = lease.host_addresses().remove(0);
    start.addr()..start.addr() + region.bytes as usize
}

fn write_pages(lease: &Lease, pages: impl IntoIterator<Item = u64>) -> u64 {
    let memory = lease.memory();
    let touched: BTreeSet<u64> = pages.into_iter().collect();
    for page in &touched {
        // Not at the start of the page, and differently in each.
        let address = GuestAddress(page * PAGE + page % PAGE);
        memory.write_obj(0x5a_u8, address).unwrap();
    }
    touched.len() as u64 * PAGE
}

fn whole(pool: &Pool) -> Lease {
    pool.lease(&regions(&[(0, pool.capacity())])).unwrap()
}

#[test]
fn a_large_guest_is_asked_about_in_parts_and_nothing_is_lost_between_them() {
    const PART: u64 = (256 << 20) / PAGE;
    let pool = pools::builder(PageSize::Base4K, 512)
        .threads(4)
        .build()
        .unwrap();
    let lease = whole(&pool);
    let pages = (1..4).flat_map(|part| [part * PART - 1, part * PART]);
    let written = write_pages(&lease, pages.chain([0, 4 * PART - 1]));
    let receipt = teardown(lease);
    assert_eq!(receipt.bytes_scrubbed, written);
    assert_eq!(receipt.bytes_verified, written);
    assert_eq!(receipt.bytes_never_populated, 512 * BLOCK_SIZE - written);
    assert_all_zero(&whole(&pool));
    assert_nothing_dirty_left(&pool);
}

#[test]
fn exactly_the_pages_that_were_written_are_scrubbed() {
    let pages = 8 * BLOCK_SIZE / PAGE;
    // As many runs as the kernel is asked for at first, one more and one less, up to the last page.
    let runs = |count| (0..count).map(|run| pages - 1 - 2 * run).collect();
    let patterns: [Vec<u64>; 8] = [
        runs(31),
        runs(32),
        runs(33),
        vec![],
        vec![0],
        vec![pages - 1],
        // Around the borders of pieces and blocks.
        vec![63, 64, 127, 511, 512, 513, 1535, 1536],
        // More runs than the kernel reports at once.
        (0..pages).step_by(3).collect(),
    ];
    for pattern in patterns {
        let pool = pool(PageSize::Base4K, 8);
        let lease = whole(&pool);
        let written = write_pages(&lease, pattern.iter().copied());
        assert_eq!(populated_bytes(window(&lease)), written);
        let receipt = teardown(lease);
        assert_eq!(receipt.bytes_scrubbed, written, "{} pages", pattern.len());
        assert_eq!(receipt.bytes_verified, written);
        assert_eq!(receipt.bytes_never_populated, receipt.bytes_total - written);
        assert!(receipt.is_proven());

        // The scrubber has made no page that was not there, and the pages that were keep their place.
        let next = whole(&pool);
        assert_eq!(populated_bytes(window(&next)), written);
        assert!(teardown(next).is_proven());
        assert_nothing_dirty_left(&pool);
    }
}

/// Reading maps the kernel's zero page, which holds nothing of anybody's.
#[test]
fn pages_that_were_only_read_count_as_never_populated() {
    if !has_pagemap_scan() {
        skipped(&"without PAGEMAP_SCAN (Linux 6.7) the zero page counts as populated");
        return;
    }
    let pool = pool(PageSize::Base4K, 4);
    let lease = whole(&pool);
    assert_all_zero(&lease);
    let written = write_pages(&lease, [3, 700]);
    let receipt = teardown(lease);
    assert_eq!(receipt.bytes_scrubbed, written);
    assert_eq!(receipt.bytes_never_populated, receipt.bytes_total - written);
}

#[test]
fn a_kernel_without_pagemap_scan_is_asked_page_by_page() {
    alone(
        "a_kernel_without_pagemap_scan_is_asked_page_by_page",
        || {
            // Remembered by the whole process, so the fault is needed only once.
            let fault = inject(Call::PagemapScan, 0, 1, libc::ENOTTY);
            for _ in 0..3 {
                // Such a kernel has no other way to revoke.
                let builder = pools::builder(PageSize::Base4K, 4);
                let pool = builder.revoke_by(RevokeBy::Mremap).build().unwrap();
                let lease = whole(&pool);
                let written = write_pages(&lease, (0..2048).step_by(5));
                // Reading counts here: the pagemap does not tell the zero page from others.
                let memory = lease.memory();
                let _: u8 = memory.read_obj(GuestAddress(PAGE)).unwrap();
                drop(memory);
                let receipt = teardown(lease);
                assert_eq!(receipt.bytes_scrubbed, written + PAGE);
                assert!(receipt.is_proven());
                assert_nothing_dirty_left(&pool);
            }
            drop(fault);
            let fault = inject(Call::PagemapScan, 0, u32::MAX, libc::EIO);
            let pool = pool(PageSize::Base4K, 1);
            assert!(
                teardown(whole(&pool)).is_proven(),
                "asked for PAGEMAP_SCAN again"
            );
            drop(fault);
        },
    );
}

fn an_untouched_guest(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let receipt = teardown(whole(&pool));
    assert!(receipt.is_proven());
    // Of a hugetlb file the kernel does not tell which pages exist, so all of them count.
    let scrubbed = match page_size {
        PageSize::Huge2M => pool.capacity(),
        _ => 0,
    };
    assert_eq!(receipt.bytes_scrubbed, scrubbed);
    assert_eq!(receipt.bytes_never_populated, pool.capacity() - scrubbed);
}

fn a_pool_that_is_populated_up_front(page_size: PageSize) {
    let pool = pools::builder(page_size, 4).populate(true).build().unwrap();
    for _ in 0..2 {
        let lease = whole(&pool);
        let window = window(&lease);
        assert_eq!(populated_bytes(window.clone()), window.len() as u64);
        assert_all_zero(&lease);
        let receipt = teardown(lease);
        assert_eq!(receipt.bytes_scrubbed, pool.capacity());
        assert_eq!(receipt.bytes_never_populated, 0);
        assert!(receipt.is_proven());
    }
    assert_nothing_dirty_left(&pool);
}

/// The threads populate it in chunks of 64 MiB. Here the last one is a part.
#[test]
fn every_part_of_a_large_pool_is_populated_up_front() {
    let builder = pools::builder(PageSize::Base4K, 48).populate(true);
    let pool = builder.build().unwrap();
    let arena = arena_address(&pool).addr();
    let all = arena..arena + pool.capacity() as usize;
    assert_eq!(populated_bytes(all), pool.capacity());
}

/// `MADV_DONTNEED` empties a private mapping. Of a hugetlb file it only closes the view: the bytes are still there.
fn what_a_balloon_discards_is_scrubbed_or_gone(page_size: PageSize) {
    let pool = pool(page_size, 4);
    for advice in [libc::MADV_DONTNEED, libc::MADV_FREE, libc::MADV_REMOVE] {
        let lease = whole(&pool);
        fill(&lease, 1);
        let (_, start) = lease.host_addresses().remove(0);
        let len = 2 * BLOCK_SIZE as usize;
        // SAFETY: the range lies in the lease's window, to which nobody holds a reference. Where the kernel refuses the
        // advice for this kind of memory nothing changes.
        let status = unsafe { libc::madvise(start.wrapping_add(len / 2).cast(), len, advice) };
        // Of hugetlb memory the kernel discards nothing before Linux 5.18.
        if advice == libc::MADV_DONTNEED && page_size != PageSize::Huge2M {
            assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
        }
        let receipt = teardown(lease);
        assert!(receipt.is_proven(), "advice {advice}: {receipt:?}");
        let next = whole(&pool);
        assert_all_zero(&next);
        assert!(teardown(next).is_proven());
    }
    assert_nothing_dirty_left(&pool);
}

/// A page that a balloon took out of a hugetlb file goes to whoever asks first. If the host has none left, scrubbing it
/// would end in SIGBUS.
#[test]
fn a_hugetlb_page_that_somebody_else_has_got_is_quarantined() {
    let Some(_reserved) = HugePages::reserve_alone(4) else {
        return;
    };
    let pool = pool(PageSize::Huge2M, 4);
    let lease = whole(&pool);
    fill(&lease, 1);
    let (_, start) = lease.host_addresses().remove(0);
    let third = start.wrapping_add(2 * BLOCK_SIZE as usize);
    // SAFETY: the range lies in the lease's window, to which nobody holds a reference.
    let status = unsafe { libc::madvise(third.cast(), BLOCK_SIZE as usize, libc::MADV_REMOVE) };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    let everything = huge_pages::free();
    let other = pools::builder(PageSize::Huge2M, everything)
        .build()
        .unwrap();

    let receipt = teardown(lease);
    assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE, "{receipt:?}");
    let range = &receipt.quarantined[0];
    assert_eq!(range.guest_address, 2 * BLOCK_SIZE);
    assert_eq!(range.reason, QuarantineReason::ResidencyUnknown);
    let asked = [Call::Populate, Call::Touch].map(Call::name);
    assert!(
        asked.iter().any(|call| range.detail.contains(call)),
        "{range:?}"
    );
    drop(other);
    assert_nothing_dirty_left(&pool);
}

/// Eight blocks in a row with their lines in the log, after `refuse` has made questions fail.
fn logged<T>(refuse: impl FnOnce() -> T) -> Vec<String> {
    let pool = pools::builder(PageSize::Base4K, 8)
        .threads(1)
        .revoke_by(RevokeBy::Mremap)
        .build()
        .unwrap();
    let lease = whole(&pool);
    fill(&lease, 1);
    let quiesced = quiesce(&lease);
    let dirty = lease.revoke(quiesced).unwrap();
    logs::listen();
    let refused = refuse();
    let scrubbed = dirty.scrub();
    drop(refused);
    let lines = logs::lines(Level::Error, "quarantined, ");
    assert!(scrubbed.verify().recycle().unwrap().bytes_quarantined > 0);
    assert_nothing_dirty_left(&pool);
    lines
}

/// Where nothing can be asked, that is the whole guest.
#[test]
fn blocks_in_a_row_with_the_same_answer_are_one_line_in_the_log() {
    let question = pagemap_call();
    let [line] = &logged(|| inject(question, 0, u32::MAX, libc::EIO))[..] else {
        panic!("not one line");
    };
    let all = "8 blocks from 0 on quarantined, residency unknown: ";
    assert!(line.starts_with(all), "{line}");

    // All at once, then block by block: the kernel answers about the fourth only, and knows the last two to be broken.
    let lines = logged(|| {
        [
            inject(question, 0, 4, libc::EIO),
            inject(question, 1, 2, libc::EIO),
            inject(question, 1, 2, libc::EHWPOISON),
        ]
    });
    let expected = [
        "3 blocks from 0 on quarantined, residency unknown: ",
        "2 blocks from 4 on quarantined, residency unknown: ",
        "2 blocks from 6 on quarantined, memory error: ",
    ];
    assert_eq!(lines.len(), expected.len(), "{lines:?}");
    for (line, expected) in lines.iter().zip(expected) {
        assert!(line.starts_with(expected), "{line}");
    }
}

/// A VMM that has no descriptor left, or cannot open files any more, when its first guest goes.
#[test]
fn what_a_teardown_needs_is_opened_when_the_pool_is_built() {
    alone(
        "what_a_teardown_needs_is_opened_when_the_pool_is_built",
        || {
            let pool = pool(PageSize::Base4K, 4);
            let lease = whole(&pool);
            fill(&lease, 1);
            let files: Vec<std::fs::File> =
                std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
            let receipt = teardown(lease);
            drop(files);
            assert!(receipt.is_proven(), "{receipt:?}");
        },
    );
}
