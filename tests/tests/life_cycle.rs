//! A guest's memory from lease to receipt and on to the next guest, on every kind of page and for every shape of guest.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vm_scrub::{BLOCK_SIZE, Extent, Lease, PageSize, Revocation, Verify};
use vm_scrub_tests::maps::revocation;
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, fill, first_nonzero, on_every_page_size,
    on_small_page_sizes, pool, quiesce, regions, teardown,
};

on_every_page_size!(
    the_next_guest_gets_the_same_blocks_and_none_of_the_bytes: 8,
    holes_and_bases_and_disorder: 8,
    a_guest_spread_over_fragments: 16,
    the_steps_one_by_one: 4,
    many_generations: 4,
);
on_small_page_sizes!(sizes_that_fill_no_block);

fn the_next_guest_gets_the_same_blocks_and_none_of_the_bytes(page_size: PageSize) {
    let pool = pool(page_size, 8);
    let layout = regions(&[(0, 8 * BLOCK_SIZE)]);
    assert_eq!(pool.page_size(), page_size);
    let lease = pool.lease_for("first", &layout).unwrap();
    assert_eq!(lease.guest(), Some("first"));
    assert_eq!(
        (pool.accounts().leased, pool.accounts().clean),
        (8 * BLOCK_SIZE, 0)
    );
    assert_all_zero(&lease);
    fill(&lease, 1);
    assert_eq!(
        first_nonzero(&lease),
        Some(0),
        "the guest's writes are there"
    );

    let first = teardown(lease);
    assert!(first.is_proven());
    assert_eq!(first.guest.as_deref(), Some("first"));
    assert_eq!(
        first.blocks,
        [Extent {
            first: 0,
            blocks: 8
        }]
    );
    assert_eq!(first.bytes_scrubbed, 8 * BLOCK_SIZE);
    assert_eq!(first.bytes_verified, 8 * BLOCK_SIZE);
    assert_eq!((first.page_size, first.verify), (page_size, Verify::Full));
    assert_eq!(first.threads, 2);
    // Some kernels give a guest that reads before it writes small pages for huge ones, which are moved without proof.
    let in_parts = page_size == PageSize::Transparent && first.revocation == Revocation::Mremap;
    assert!(in_parts || first.revocation == revocation(page_size));
    assert_eq!(pool.revocation(), revocation(page_size));
    assert_eq!(pool.accounts().clean, pool.capacity());

    let lease = pool.lease(&layout).unwrap();
    assert_eq!(lease.guest(), None);
    assert_eq!(lease.blocks(), first.blocks, "no other blocks exist");
    assert!(lease.id() > first.lease);
    assert_all_zero(&lease);
    assert!(teardown(lease).is_proven());
}

fn holes_and_bases_and_disorder(page_size: PageSize) {
    let pool = pool(page_size, 8);
    // The last one ends as high as a region can, one hugetlb page below 2^64.
    let high = u64::MAX - 2 * BLOCK_SIZE + 1;
    let asked = [
        (high, BLOCK_SIZE),
        (5 * BLOCK_SIZE, 2 * BLOCK_SIZE),
        (BLOCK_SIZE, 3 * BLOCK_SIZE),
        (7 * BLOCK_SIZE, BLOCK_SIZE),
    ];
    let lease = pool.lease(&regions(&asked)).unwrap();
    let mut sorted = asked;
    sorted.sort_unstable();
    let in_lease: Vec<(u64, u64)> = lease
        .guest_regions()
        .map(|region| (region.guest_address, region.bytes))
        .collect();
    assert_eq!(in_lease, sorted);
    let memory = lease.memory();
    let in_memory: Vec<(u64, u64)> = memory
        .iter()
        .map(|region| (region.start_addr().0, region.len()))
        .collect();
    assert_eq!(in_memory, sorted);
    // What vm-memory says about mappings that it has not made.
    let huge = page_size == PageSize::Huge2M;
    let flags = match huge {
        true => libc::MAP_SHARED,
        false => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
    };
    for region in memory.iter() {
        assert_eq!(region.prot(), libc::PROT_READ | libc::PROT_WRITE);
        assert_eq!(region.flags(), flags);
        assert_eq!(region.is_hugetlbfs(), Some(huge));
    }
    drop(memory);

    assert_all_zero(&lease);
    fill(&lease, 2);
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    let in_receipt: Vec<(u64, u64)> = receipt
        .regions
        .iter()
        .map(|region| (region.guest_address, region.bytes))
        .collect();
    assert_eq!(in_receipt, sorted);
    assert_eq!(receipt.bytes_scrubbed, 7 * BLOCK_SIZE);
    assert_nothing_dirty_left(&pool);
}

fn a_guest_spread_over_fragments(page_size: PageSize) {
    let pool = pool(page_size, 16);
    let one = regions(&[(0, BLOCK_SIZE)]);
    let mut small: Vec<Option<Lease>> = (0..16).map(|_| Some(pool.lease(&one).unwrap())).collect();
    for lease in small.iter().flatten() {
        fill(lease, 3);
    }
    for lease in small.iter_mut().step_by(2) {
        assert!(teardown(lease.take().unwrap()).is_proven());
    }
    // Eight blocks are free and no two of them touch.
    let layout = regions(&[(0, 3 * BLOCK_SIZE), (8 * BLOCK_SIZE, 5 * BLOCK_SIZE)]);
    let large = pool.lease(&layout).unwrap();
    assert_eq!(large.blocks().len(), 8);
    assert!(large.blocks().iter().all(|extent| extent.blocks == 1));
    assert_all_zero(&large);
    fill(&large, 4);
    for lease in small.iter().flatten() {
        assert_eq!(first_nonzero(lease), Some(0), "the neighbours keep theirs");
    }
    let receipt = teardown(large);
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_scrubbed, 8 * BLOCK_SIZE);
    assert_eq!(receipt.blocks.len(), 8);

    for lease in small.into_iter().flatten() {
        assert_eq!(first_nonzero(&lease), Some(0), "the neighbours keep theirs");
        assert!(teardown(lease).is_proven());
    }
    // All together again, though every block has come home by itself.
    let all = pool.lease(&regions(&[(0, 16 * BLOCK_SIZE)])).unwrap();
    assert_eq!(
        all.blocks(),
        [Extent {
            first: 0,
            blocks: 16
        }]
    );
    assert_all_zero(&all);
    fill(&all, 5);
    assert!(teardown(all).is_proven());
    assert_nothing_dirty_left(&pool);
}

fn sizes_that_fill_no_block(page_size: PageSize) {
    let pool = pool(page_size, 6);
    let pages = |count| count * vm_scrub_tests::PAGE;
    // One page; a block and a page; a block less a page: 1 + 2 + 1 blocks.
    let layout = regions(&[
        (pages(3), pages(1)),
        (pages(100), pages(513)),
        (pages(700), pages(511)),
    ]);
    let lease = pool.lease(&layout).unwrap();
    assert_eq!(lease.bytes(), pages(1 + 513 + 511));
    assert_eq!(pool.accounts().leased, 4 * BLOCK_SIZE);
    assert_all_zero(&lease);
    fill(&lease, 6);
    let receipt = teardown(lease);
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_total, pages(1025));
    assert_eq!(receipt.bytes_scrubbed, pages(1025));
    // The same blocks as whole ones: what lay behind the regions' ends, too.
    let whole = pool.lease(&regions(&[(0, 6 * BLOCK_SIZE)])).unwrap();
    assert_all_zero(&whole);
    fill(&whole, 7);
    assert!(teardown(whole).is_proven());
    assert_nothing_dirty_left(&pool);
}

fn the_steps_one_by_one(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let lease = pool.lease(&regions(&[(0, 3 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 8);
    let quiesced = quiesce(&lease);
    let dirty = lease.revoke(quiesced).unwrap();
    let account = |pool: &vm_scrub::Pool| (pool.accounts().leased, pool.accounts().dirty);
    assert_eq!(account(&pool), (0, 3 * BLOCK_SIZE));
    let scrubbed = dirty.scrub();
    assert_eq!(account(&pool), (0, 3 * BLOCK_SIZE));
    let verified = scrubbed.verify();
    assert_eq!(
        account(&pool),
        (0, 3 * BLOCK_SIZE),
        "not clean before it is recycled"
    );
    let receipt = verified.recycle().unwrap();
    vm_scrub_tests::assert_adds_up(&receipt);
    assert!(receipt.is_proven());
    assert_eq!(pool.accounts().clean, pool.capacity());
    assert_nothing_dirty_left(&pool);
}

/// What a teardown does to mappings must not pile up and stop a later one.
fn many_generations(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let whole = regions(&[(0, 4 * BLOCK_SIZE)]);
    let parts = regions(&[(0, BLOCK_SIZE), (2 * BLOCK_SIZE, 3 * BLOCK_SIZE)]);
    for generation in 0..24 {
        let layout = if generation % 2 == 0 { &whole } else { &parts };
        let lease = pool.lease(layout).unwrap();
        assert_all_zero(&lease);
        fill(&lease, generation);
        assert!(teardown(lease).is_proven());
    }
}
