//! What a machine can still reach after its memory was taken away: nothing, whether its memslots are gone or stale.

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize};
use vm_scrub_tests::kvm::{ABOVE_HOLE, LIMIT, Vm, assert_out_of_reach, edges, ranges, secret};
use vm_scrub_tests::maps::revocation;
use vm_scrub_tests::{assert_adds_up, kvm_on_every_page_size, pool, quiesce, regions};
use vm_scrub_vmm::{Guest, Machine, Touch, VcpuStop};

kvm_on_every_page_size!(
    a_machine_that_runs_again_reaches_neither_its_memory_nor_the_next_guests: 6,
    stale_memslots_lead_nowhere: 6,
    stale_memslots_lead_nowhere_while_vcpus_write: 6,
    a_machine_gets_new_memory_in_the_slots_of_the_old: 6,
);

const LAYOUT: [(u64, u64); 2] = [(BLOCK_SIZE, 4 * BLOCK_SIZE), (ABOVE_HOLE, 2 * BLOCK_SIZE)];

/// Boots the next guest in the memory of the last one and checks that it has it alone, while `last` is run again.
fn next_guest_is_alone(last: &Machine, lease: Lease) {
    let next = Vm::boot(lease, 2);
    let edges = edges(&next.ranges());
    next.assert_zero();
    assert_out_of_reach(last, &edges);
    next.assert_zero();
    next.fill(secret(2));
    assert_out_of_reach(last, &edges);
    let error = last.fill(&next.ranges(), secret(3), LIMIT);
    assert!(error.is_err(), "there is nothing to fill");
    assert_eq!(next.count(secret(2)), next.lease.bytes());
    assert!(next.teardown().0.is_proven());
}

fn a_machine_that_runs_again_reaches_neither_its_memory_nor_the_next_guests(page_size: PageSize) {
    let pool = pool(page_size, 6);
    let first = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 2);
    first.fill(secret(1));
    let edges = edges(&first.ranges());
    let Vm {
        machine,
        mut memslots,
        lease,
    } = first;
    let memory = lease.memory();
    let quiesced = memslots.remove().unwrap();
    // Out of reach when the memslots are gone, before anything is revoked, and what is there stays as it is.
    assert_out_of_reach(&machine, &edges);
    let host = vm_scrub_vmm::ThreadGuest::new(memory, 1).unwrap();
    assert_eq!(
        host.count(&ranges(&lease), secret(1), LIMIT).unwrap(),
        lease.bytes()
    );
    drop(host);

    assert!(lease.teardown(quiesced).unwrap().is_proven());
    assert_out_of_reach(&machine, &edges);
    next_guest_is_alone(&machine, pool.lease(&regions(&LAYOUT)).unwrap());
}

/// Registers the lease's regions without its knowledge, as a monitor with its own code for memslots would.
fn register_behind_its_back(machine: &Machine, lease: &Lease) {
    for (slot, (region, host)) in (0..).zip(lease.host_addresses()) {
        let entry = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.guest_address,
            memory_size: region.bytes,
            userspace_addr: host.expose_provenance() as u64,
        };
        // SAFETY: the region is mapped over its whole length. That it is used after teardown is what is tested: the window
        // stays reserved and inaccessible then.
        unsafe { machine.vm().set_user_memory_region(entry) }.expect("memslot");
    }
}

/// As `assert_out_of_reach`, but the memslot is there and what is missing is the memory behind it.
fn assert_memory_is_gone(machine: &Machine, addresses: &[u64]) {
    for &gpa in addresses {
        let touch = machine.touch(gpa, LIMIT).expect("the vCPU ran");
        assert!(
            matches!(
                touch,
                Touch::Stopped(VcpuStop::Shutdown | VcpuStop::MemoryFault)
            ),
            "a write to {gpa:#x}: {touch:?}"
        );
    }
}

fn stale_memslots_lead_nowhere(page_size: PageSize) {
    let pool = pool(page_size, 6);
    let lease = pool.lease(&regions(&LAYOUT)).unwrap();
    let machine = Machine::new(2).unwrap();
    register_behind_its_back(&machine, &lease);
    let all = ranges(&lease);
    machine.fill(&all, secret(1), LIMIT).unwrap();

    // Nobody told the lease.
    let quiesced = quiesce(&lease);
    let old = lease.host_addresses();
    let receipt = lease.teardown(quiesced).unwrap();
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_scrubbed, receipt.bytes_total);
    assert_memory_is_gone(&machine, &edges(&all));

    let next = pool.lease(&regions(&LAYOUT)).unwrap();
    for ((_, old), (region, new)) in old.iter().zip(next.host_addresses()) {
        let distance = old.addr().abs_diff(new.addr()) as u64;
        assert!(
            distance >= region.bytes,
            "the next guest is where the stale memslots point"
        );
    }
    next_guest_is_alone(&machine, next);
    assert_memory_is_gone(&machine, &edges(&all));
}

fn stale_memslots_lead_nowhere_while_vcpus_write(page_size: PageSize) {
    for round in 0..6 {
        let pool = pool(page_size, 6);
        let lease = pool.lease(&regions(&LAYOUT)).unwrap();
        let machine = Machine::new(2).unwrap();
        register_behind_its_back(&machine, &lease);
        let all = ranges(&lease);
        let mut running = machine.start_fill_forever(&all, secret(1)).unwrap();
        running.wait_passes(1 + round, LIMIT).unwrap();

        // A false statement: two vCPUs are writing. What they write may be lost, and must not stay.
        let quiesced = quiesce(&lease);
        let receipt = lease.teardown(quiesced).unwrap();
        assert_adds_up(&receipt);
        assert!(receipt.is_proven(), "{receipt:?}");
        // Nobody else than the vCPUs could write, and they cannot any more.
        assert_eq!(receipt.revocation, revocation(page_size));
        let next = pool.lease(&regions(&LAYOUT)).unwrap();
        assert_eq!(next.blocks(), receipt.blocks);
        let next = Vm::boot(next, 2);
        next.assert_zero();
        let stops = running
            .wait_stopped(LIMIT)
            .expect("they stop by themselves");
        for stop in &stops {
            assert!(
                matches!(stop, VcpuStop::Shutdown | VcpuStop::MemoryFault),
                "{stops:?}"
            );
        }
        next.assert_zero();
        assert_memory_is_gone(&machine, &edges(&all));
        next.assert_zero();
        assert!(next.teardown().0.is_proven());
    }
}

fn a_machine_gets_new_memory_in_the_slots_of_the_old(page_size: PageSize) {
    let pool = pool(page_size, 6);
    let mut machine = Machine::new(2).unwrap();
    let shapes = [
        LAYOUT.to_vec(),
        vec![(0, 6 * BLOCK_SIZE)],
        vec![
            (0, BLOCK_SIZE),
            (ABOVE_HOLE, 2 * BLOCK_SIZE),
            (2 * ABOVE_HOLE, 3 * BLOCK_SIZE),
        ],
    ];
    for (number, shape) in (0..).zip(shapes.iter().cycle().take(6)) {
        let vm = Vm::on(machine, pool.lease(&regions(shape)).unwrap());
        vm.assert_zero();
        vm.fill(secret(number));
        assert_eq!(vm.count(secret(number)), vm.lease.bytes());
        let ranges = vm.ranges();
        let (receipt, same) = vm.teardown();
        assert!(receipt.is_proven());
        assert_out_of_reach(&same, &edges(&ranges));
        machine = same;
    }
    assert_eq!(
        Arc::strong_count(machine.vm()),
        1,
        "memslots let go of the machine"
    );
    assert_eq!(pool.accounts().clean, pool.capacity());
}
