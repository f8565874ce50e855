//! Leases, memslots, machines and pools that are dropped without a word, in any order.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::kvm::Memslots;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool};
use vm_scrub_tests::kvm::{ABOVE_HOLE, LIMIT, Vm, assert_out_of_reach, edges, ranges, secret};
use vm_scrub_tests::{assert_nothing_dirty_left, kvm_on_every_page_size, pool, regions};
use vm_scrub_vmm::{Guest, Machine};

kvm_on_every_page_size!(
    a_lease_dropped_with_memslots_is_quarantined_and_its_guest_runs_on: 6,
    memslots_that_are_dropped_are_deleted: 6,
    // Half of the orders leave the memory mapped until the process ends.
    everything_is_dropped_in_every_order: 13 * 3,
);

const LAYOUT: [(u64, u64); 2] = [(0, 2 * BLOCK_SIZE), (ABOVE_HOLE, 2 * BLOCK_SIZE)];
const BYTES: u64 = 4 * BLOCK_SIZE;

fn a_lease_dropped_with_memslots_is_quarantined_and_its_guest_runs_on(page_size: PageSize) {
    let pool = pool(page_size, 6);
    let Vm {
        machine,
        mut memslots,
        lease,
    } = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 2);
    let all = ranges(&lease);
    machine.fill(&all, secret(1), LIMIT).unwrap();
    let mut running = machine.start_fill_forever(&all[..1], secret(2)).unwrap();
    running.wait_passes(1, LIMIT).unwrap();
    drop(lease);
    assert_eq!(pool.accounts().quarantined, BYTES);
    running.wait_more_passes(2, LIMIT).unwrap();
    running.stop(LIMIT).unwrap();
    assert_eq!(machine.count(&all, secret(2), LIMIT).unwrap(), BYTES / 2);
    assert_eq!(machine.count(&all, secret(1), LIMIT).unwrap(), BYTES / 2);
    assert_nothing_dirty_left(&pool);
    // Too late for the memory, but not an error.
    let _ = memslots.remove().unwrap();
    assert_out_of_reach(&machine, &edges(&all));
    assert_eq!(pool.accounts().quarantined, BYTES);
    assert_nothing_dirty_left(&pool);
}

fn memslots_that_are_dropped_are_deleted(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let layout = regions(&LAYOUT);
    for with_handle in [false, true] {
        let Vm {
            machine,
            memslots,
            lease,
        } = Vm::boot(pool.lease(&layout).unwrap(), 2);
        let all = ranges(&lease);
        machine.fill(&all, secret(1), LIMIT).unwrap();
        let memory = with_handle.then(|| lease.memory());
        drop(memslots);
        assert_out_of_reach(&machine, &edges(&all));
        drop(memory);
        // The guest is stopped for certain: torn down on the spot.
        drop(lease);
        assert_eq!(pool.accounts().clean, pool.capacity());
        let next = Vm::on(machine, pool.lease(&layout).unwrap());
        next.assert_zero();
        assert!(next.teardown().0.is_proven());
    }
    // But not while somebody has the memory.
    let Vm {
        machine,
        memslots,
        lease,
    } = Vm::boot(pool.lease(&layout).unwrap(), 1);
    machine.fill(&ranges(&lease), secret(1), LIMIT).unwrap();
    let memory = lease.memory();
    drop(memslots);
    drop(lease);
    assert_eq!(pool.accounts().quarantined, pool.capacity());
    let word: u64 = memory.read_obj(GuestAddress(ABOVE_HOLE)).unwrap();
    assert_eq!(word, secret(1));
}

/// What there is of a guest, to be dropped one by one.
enum Part {
    Machine(Machine),
    Memslots(Memslots<Arc<VmFd>>),
    Lease(Lease),
    Pool(Pool),
}

fn everything_is_dropped_in_every_order(page_size: PageSize) {
    let mut orders = Vec::new();
    for code in 0..256_usize {
        let order = [code & 3, code >> 2 & 3, code >> 4 & 3, code >> 6];
        if (0..4).all(|part| order.contains(&part)) {
            orders.push(order);
        }
    }
    assert_eq!(orders.len(), 24);
    let layout = regions(&[(0, BLOCK_SIZE), (ABOVE_HOLE, BLOCK_SIZE)]);
    for order in orders {
        let pool = pool(page_size, 3);
        let Vm {
            machine,
            memslots,
            lease,
        } = Vm::boot(pool.lease(&layout).unwrap(), 2);
        machine.fill(&ranges(&lease), secret(1), LIMIT).unwrap();
        // One that sees the accounts at the end, and one whose drop is tried out.
        let observer = pool.clone();
        let mut parts = [
            Some(Part::Machine(machine)),
            Some(Part::Memslots(memslots)),
            Some(Part::Lease(lease)),
            Some(Part::Pool(pool)),
        ];
        for part in order {
            match parts[part].take().unwrap() {
                Part::Machine(machine) => drop(machine),
                Part::Memslots(memslots) => drop(memslots),
                Part::Lease(lease) => drop(lease),
                Part::Pool(pool) => drop(pool),
            }
        }
        let place = |part| order.iter().position(|at| *at == part).unwrap();
        let quarantined = if place(2) < place(1) {
            2 * BLOCK_SIZE
        } else {
            0
        };
        assert_eq!(observer.accounts().quarantined, quarantined, "{order:?}");
        assert_nothing_dirty_left(&observer);
    }
}
