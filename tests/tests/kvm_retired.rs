//! KVM guests whose memory is taken away at once and scrubbed later, while other guests run.

use vm_scrub::lease::Cancelled;
use vm_scrub::pool::ScrubRate;
use vm_scrub::{BLOCK_SIZE, Extent, PageSize, Pool};
use vm_scrub_tests::kvm::{ABOVE_HOLE, LIMIT, Vm, assert_out_of_reach, edges, secret};
use vm_scrub_tests::{
    assert_adds_up, assert_nothing_dirty_left, kvm_on_every_page_size, pool, pools, regions,
};

kvm_on_every_page_size!(
    the_next_guest_comes_while_the_last_one_is_scrubbed: 4,
    a_neighbour_runs_on_while_the_background_scrubs: 12,
    what_is_retired_and_not_scrubbed_is_out_of_reach: 8,
);

const LAYOUT: [(u64, u64); 2] = [(0, 2 * BLOCK_SIZE), (ABOVE_HOLE, 2 * BLOCK_SIZE)];

fn the_next_guest_comes_while_the_last_one_is_scrubbed(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let mut machine = None;
    for number in 0..6 {
        // Whoever asks for memory that is not clean yet helps to scrub it.
        let lease = pool.lease(&regions(&LAYOUT)).unwrap();
        let vm = Vm::boot(lease, 2);
        vm.assert_zero();
        let all = vm.ranges();
        let Vm {
            machine: next,
            mut memslots,
            lease,
        } = vm;
        let mut running = next.start_fill_forever(&all, secret(number)).unwrap();
        running.wait_passes(1, LIMIT).unwrap();
        if let Some(last) = &machine {
            assert_out_of_reach(last, &edges(&all));
        }
        let quiesced = memslots.remove().unwrap();
        // Dropped: what becomes of it is the pool's business.
        drop(lease.retire(quiesced).unwrap());
        let stops = running.wait_stopped(LIMIT).unwrap();
        assert!(stops.iter().all(|stop| stop.lost_memory()), "{stops:?}");
        machine = Some(next);
    }
    let all = pool.lease(&regions(&LAYOUT)).unwrap();
    vm_scrub_tests::assert_all_zero(&all);
    assert_eq!(pool.accounts().quarantined, 0);
}

fn a_neighbour_runs_on_while_the_background_scrubs(page_size: PageSize) {
    let pool = pool(page_size, 12);
    let neighbour = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 1);
    let mut own = 1000;
    for number in 0..4 {
        let vm = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 1);
        vm.assert_zero();
        vm.fill(secret(number));
        let Vm {
            mut memslots,
            lease,
            ..
        } = vm;
        let ticket = lease.retire(memslots.remove().unwrap()).unwrap();
        while !ticket.is_finished() {
            own += 1;
            neighbour.fill(secret(own));
            assert_eq!(neighbour.count(secret(own)), neighbour.lease.bytes());
        }
        let receipt = ticket.wait().unwrap();
        assert_adds_up(&receipt);
        assert_eq!(receipt.bytes_scrubbed, receipt.bytes_total);
        neighbour.fill(secret(own));
        assert_eq!(neighbour.count(secret(own)), neighbour.lease.bytes());
    }
    assert!(neighbour.teardown().0.is_proven());
    assert_nothing_dirty_left(&pool);
}

/// A pool whose background does as good as nothing.
fn lazy_pool(page_size: PageSize, blocks: u64) -> Pool {
    let pool = pools::builder(page_size, blocks).build().unwrap();
    pool.set_scrub_rate(Some(ScrubRate {
        bytes_per_second: 1,
        burst: 0,
    }));
    pool
}

fn what_is_retired_and_not_scrubbed_is_out_of_reach(page_size: PageSize) {
    let pool = lazy_pool(page_size, 8);
    for scrub in [true, false] {
        let vm = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 2);
        vm.fill(secret(1));
        let all = vm.ranges();
        let Vm {
            machine,
            mut memslots,
            lease,
        } = vm;
        let blocks = lease.blocks().to_vec();
        let ticket = lease.retire(memslots.remove().unwrap()).unwrap();
        assert_out_of_reach(&machine, &edges(&all));
        assert_eq!(pool.accounts().dirty, 4 * BLOCK_SIZE);
        // There is clean memory, and this guest gets that.
        let other = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 2);
        let taken = |blocks: &[Extent]| -> Vec<u64> {
            let numbers = |extent: &Extent| extent.first..extent.first + extent.blocks;
            blocks.iter().flat_map(numbers).collect()
        };
        let waiting = taken(&blocks);
        assert!(
            taken(other.lease.blocks())
                .iter()
                .all(|block| !waiting.contains(block))
        );
        other.assert_zero();
        other.fill(secret(2));
        let Cancelled::Dirty(dirty) = ticket.cancel() else {
            panic!("at a byte in a second it cannot be finished");
        };
        assert_out_of_reach(&machine, &edges(&all));
        assert_eq!(pool.accounts().dirty, 4 * BLOCK_SIZE);
        if scrub {
            let receipt = dirty.scrub_and_verify().recycle().unwrap();
            assert!(receipt.is_proven(), "{receipt:?}");
        } else {
            drop(dirty);
            assert_eq!(pool.accounts().quarantined, 4 * BLOCK_SIZE);
        }
        assert_eq!(other.count(secret(2)), other.lease.bytes());
        assert!(other.teardown().0.is_proven());
        assert_nothing_dirty_left(&pool);
    }
}
