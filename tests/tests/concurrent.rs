//! Many guests come and go at the same time in a pool that is too small for all: no block is in two hands, every guest begins
//! with zeros, and the books add up at every moment.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::lease::LeaseError;
use vm_scrub::{BLOCK_SIZE, Extent, PageSize, Pool};
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, on_every_page_size, pool, quiesce, regions, smear,
    teardown,
};

on_every_page_size!(many_guests_at_once: 12);

const BLOCKS: u64 = 12;
const THREADS: usize = 8;
const ROUNDS: usize = 50;

/// Who has which block, as far as the threads themselves know: 0 is nobody.
struct Owners(Vec<AtomicUsize>);

impl Owners {
    fn swap(&self, blocks: &[Extent], from: usize, to: usize) {
        for block in blocks
            .iter()
            .flat_map(|extent| extent.first..extent.first + extent.blocks)
        {
            self.0[block as usize]
                .compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst)
                .unwrap_or_else(|other| panic!("block {block} of {from} belongs to {other}"));
        }
    }
}

fn many_guests_at_once(page_size: PageSize) {
    let pool = pool(page_size, BLOCKS);
    let owners = Owners((0..BLOCKS).map(|_| AtomicUsize::new(0)).collect());
    let done = AtomicBool::new(false);
    let (leased, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        let auditor = scope.spawn(|| {
            while !done.load(Ordering::SeqCst) {
                let accounts = pool.accounts();
                assert_eq!(accounts.total(), BLOCKS * BLOCK_SIZE, "{accounts:?}");
                assert_eq!(accounts.quarantined, 0);
                thread::yield_now();
            }
        });
        let guests: Vec<_> = (1..=THREADS)
            .map(|me| {
                let (pool, owners) = (pool.clone(), &owners);
                let (leased, refused) = (&leased, &refused);
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        if one_guest(&pool, owners, me, round) {
                            leased.fetch_add(1, Ordering::Relaxed);
                        } else {
                            refused.fetch_add(1, Ordering::Relaxed);
                            thread::yield_now();
                        }
                    }
                })
            })
            .collect();
        let guests: Vec<_> = guests.into_iter().map(|guest| guest.join()).collect();
        done.store(true, Ordering::SeqCst);
        auditor.join().unwrap();
        guests.into_iter().for_each(|guest| guest.unwrap());
    });
    let leased = leased.into_inner();
    assert_eq!(leased + refused.into_inner(), THREADS * ROUNDS);
    // Whoever is alone with the pool gets what it asks for, so not all were refused.
    assert!(leased > 0);
    assert_eq!(pool.accounts().clean, BLOCKS * BLOCK_SIZE);
    assert_nothing_dirty_left(&pool);
}

/// One guest from lease to teardown, if the pool has room for it.
fn one_guest(pool: &Pool, owners: &Owners, me: usize, round: usize) -> bool {
    let first = 1 + (me + round) as u64 % 4;
    let second = 1 + (me * round) as u64 % 2;
    let layout = regions(&[(0, first * BLOCK_SIZE), (1 << 32, second * BLOCK_SIZE)]);
    let lease = match pool.lease(&layout) {
        Ok(lease) => lease,
        Err(LeaseError::NotEnough { asked, accounts }) => {
            assert_eq!(asked, (first + second) * BLOCK_SIZE);
            assert!(accounts.clean < asked, "refused {asked} of {accounts:?}");
            assert_eq!(accounts.total(), BLOCKS * BLOCK_SIZE);
            return false;
        }
        Err(other) => panic!("{other}"),
    };
    owners.swap(lease.blocks(), 0, me);
    if round % 8 == 7 {
        // Nobody has seen it, so dropping it is a teardown.
        owners.swap(lease.blocks(), me, 0);
        drop(lease);
        return true;
    }
    assert_all_zero(&lease);
    smear(&lease, me as u8);
    thread::yield_now();
    let memory = lease.memory();
    for region in lease.guest_regions() {
        for page in (0..region.bytes).step_by(8 * 4096) {
            let mark: u8 = memory
                .read_obj(GuestAddress(region.guest_address + page))
                .unwrap();
            assert_eq!(usize::from(mark), me, "another guest wrote into this one");
        }
    }
    let quiesced = quiesce(&lease);
    let lease = lease.teardown(quiesced).unwrap_err().into_lease().unwrap();
    drop(memory);
    // Before teardown: afterwards the blocks may be somebody else's at once.
    owners.swap(lease.blocks(), me, 0);
    if round.is_multiple_of(3) {
        let quiesced = quiesce(&lease);
        let dirty = lease.revoke(quiesced).unwrap();
        assert!(dirty.scrub().verify().recycle().unwrap().is_proven());
    } else {
        assert!(teardown(lease).is_proven());
    }
    true
}
