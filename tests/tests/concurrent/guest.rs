//! One guest after the other: what a thread does between leasing memory and getting rid of it, in one of all the ways.

use super::random::Random;
use super::shared::{Arena, check};
use std::thread;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion};
use vm_scrub::lease::LeaseError;
use vm_scrub::{BLOCK_SIZE, Lease, LeaseOptions, PageSize};
use vm_scrub_tests::{PAGE, assert_all_zero, quiesce, regions, teardown};

/// Leases, uses and gives back until it is time.
pub(crate) fn come_and_go(arena: &Arena, me: usize, mut random: Random, end: Instant) {
    let mut round = 0;
    while Instant::now() < end {
        round += 1;
        // No two guests of a pool leave the same traces.
        let mark = (round << 8) | (me as u64 + 1);
        match lease(arena, &mut random) {
            Some(lease) => live(arena, lease, mark, &mut random),
            None => {
                arena.finish_a_ticket(&mut random);
                thread::yield_now();
            }
        }
    }
}

/// A lease of one or two regions, if the pool has room for it.
fn lease(arena: &Arena, random: &mut Random) -> Option<Lease> {
    let pool = arena.pool();
    let step = match pool.page_size() {
        PageSize::Huge2M => BLOCK_SIZE,
        _ => PAGE,
    };
    let mut bytes = || (1 + random.below(3 * BLOCK_SIZE / step)) * step;
    let mut layout = vec![(0, bytes())];
    let second = bytes();
    if random.one_in(2) {
        layout.push((1 << 32, second));
    }
    let blocks: u64 = layout
        .iter()
        .map(|(_, bytes)| bytes.div_ceil(BLOCK_SIZE))
        .sum();
    let options = LeaseOptions::new().shareable(random.one_in(5));
    match pool.lease_with(&regions(&layout), options) {
        Ok(lease) => {
            arena.arrive(lease.blocks());
            Some(lease)
        }
        Err(LeaseError::NotEnough { asked, accounts }) => {
            assert_eq!(asked, blocks * BLOCK_SIZE);
            assert!(accounts.clean < asked, "refused {asked} of {accounts:?}");
            assert_eq!(accounts.total(), super::BLOCKS * BLOCK_SIZE);
            None
        }
        Err(other) => panic!("{other}"),
    }
}

/// A guest's life and end.
fn live(arena: &Arena, lease: Lease, mark: u64, random: &mut Random) {
    if random.one_in(8) {
        // Nobody has seen it, so dropping it is a teardown.
        arena.leave(lease.blocks());
        return drop(lease);
    }
    assert_all_zero(&lease);
    let memory = lease.memory();
    let stride = PAGE << random.below(6);
    write(&lease, &memory, stride, mark);
    for _ in 0..random.below(4) {
        thread::yield_now();
    }
    assert_keeps(&lease, &memory, stride, mark);
    let lease = match random.below(3) {
        0 => {
            let quiesced = quiesce(&lease);
            let refused = lease.teardown(quiesced).unwrap_err();
            refused.into_lease().expect("it is held, so it comes back")
        }
        _ => lease,
    };
    drop(memory);
    if lease.is_shareable() && random.one_in(2) {
        // What a back-end process would have: it keeps the memory from being sealed.
        let (region, file) = lease.file_offsets().swap_remove(0);
        let mapping = MmapRegion::from_file(file, region.bytes as usize).unwrap();
        arena.keep_mapping(mapping);
    }
    end(arena, lease, random);
}

/// Every way in which a guest's memory can be given back, or not be.
fn end(arena: &Arena, lease: Lease, random: &mut Random) {
    let blocks = lease.blocks().to_vec();
    match random.below(16) {
        0 if arena.lose(&blocks) => drop(lease),
        1 if arena.forget(&blocks) => arena.strand(lease),
        2 if arena.lose(&blocks) => {
            let quiesced = quiesce(&lease);
            drop(lease.revoke(quiesced).unwrap());
        }
        3..5 => {
            arena.leave(&blocks);
            let quiesced = quiesce(&lease);
            let dirty = lease.revoke(quiesced).unwrap();
            check(&dirty.scrub().verify().recycle().unwrap());
        }
        5..11 => {
            arena.leave(&blocks);
            let quiesced = quiesce(&lease);
            let ticket = lease.retire(quiesced).unwrap();
            if random.one_in(2) {
                arena.leave_ticket(ticket, &blocks);
            } else {
                let blocks = blocks.iter().map(|extent| extent.blocks).sum();
                arena.finish(ticket, blocks, random);
            }
        }
        _ => {
            arena.leave(&blocks);
            check(&teardown(lease));
        }
    }
}

/// The addresses where a guest leaves its mark.
fn marked(lease: &Lease, stride: u64) -> impl Iterator<Item = GuestAddress> + '_ {
    lease.guest_regions().flat_map(move |region| {
        let last = region.bytes - 8;
        (0..last)
            .step_by(stride as usize)
            .chain([last])
            .map(move |at| GuestAddress(region.guest_address + at))
    })
}

fn write(lease: &Lease, memory: &GuestMemoryMmap, stride: u64, mark: u64) {
    for address in marked(lease, stride) {
        memory.write_obj(mark, address).unwrap();
    }
}

#[track_caller]
fn assert_keeps(lease: &Lease, memory: &GuestMemoryMmap, stride: u64, mark: u64) {
    for address in marked(lease, stride) {
        let found: u64 = memory.read_obj(address).unwrap();
        assert_eq!(found, mark, "another guest wrote into {}", lease.id());
    }
}
