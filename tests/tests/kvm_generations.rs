//! KVM guests one after the other in the same memory: each fills all of it, and the next finds none of it.

use vm_memory::{Bytes, GuestAddress};
use vm_scrub::{BLOCK_SIZE, PageSize};
use vm_scrub_tests::kvm::{ABOVE_HOLE, LIMIT, Vm, secret};
use vm_scrub_tests::{PAGE, assert_nothing_dirty_left, kvm_on_every_page_size, pool, regions};
use vm_scrub_vmm::{Guest, write_packets};

kvm_on_every_page_size!(
    each_guest_finds_zeros_where_the_last_one_left_secrets: 8,
    what_a_guest_did_not_touch_is_counted_and_the_rest_is_scrubbed: 6,
    a_neighbour_keeps_what_it_has: 8,
    many_machines_in_turn_share_one_lease_of_memory: 4,
);

fn each_guest_finds_zeros_where_the_last_one_left_secrets(page_size: PageSize) {
    for vcpus in [1, 2, 4] {
        let pool = pool(page_size, 8);
        let layout = regions(&[(0, 5 * BLOCK_SIZE), (ABOVE_HOLE, 3 * BLOCK_SIZE)]);
        let mut blocks = None;
        for generation in 0..4 {
            let name = format!("guest-{generation}");
            let vm = Vm::boot(pool.lease_for(&*name, &layout).unwrap(), vcpus);
            let bytes = vm.lease.bytes();
            vm.assert_zero();

            let (own, device) = (secret(2 * generation), secret(2 * generation + 1));
            vm.fill(own);
            let packets = write_packets(&vm.lease.memory(), device).unwrap();
            let written: u64 = packets.iter().map(|packet| packet.1).sum();
            assert!(written > 0);
            // The guest sees both, and nothing is left between them: all of it has to go.
            assert_eq!(
                (vm.count(own), vm.count(device)),
                (bytes - written, written)
            );

            let (receipt, _machine) = vm.teardown();
            assert!(receipt.is_proven(), "{receipt:?}");
            assert_eq!(receipt.guest, Some(name));
            assert_eq!(
                (receipt.bytes_scrubbed, receipt.bytes_verified),
                (bytes, bytes)
            );
            assert_eq!(receipt.bytes_never_populated, 0);
            let first = blocks.get_or_insert_with(|| receipt.blocks.clone());
            assert_eq!(*first, receipt.blocks, "the pool has no other blocks");
            assert_eq!(pool.accounts().clean, pool.capacity());
        }
        assert_nothing_dirty_left(&pool);
    }
}

fn what_a_guest_did_not_touch_is_counted_and_the_rest_is_scrubbed(page_size: PageSize) {
    let layout = regions(&[(0, 2 * BLOCK_SIZE), (ABOVE_HOLE, 4 * BLOCK_SIZE)]);
    for (number, stride) in [(0, 3), (1, 7), (2, 64)] {
        // Fresh, because pages that were scrubbed stay populated and count again.
        let pool = pool(page_size, 6);
        let vm = Vm::boot(pool.lease(&layout).unwrap(), 2);
        let pages: Vec<(u64, u64)> = (0..2 * BLOCK_SIZE / PAGE)
            .step_by(stride)
            .map(|page| (page * PAGE, PAGE))
            .take(250)
            .collect();
        vm.machine.fill(&pages, secret(number), LIMIT).unwrap();
        // A device writes where no vCPU has been, across a border of pages.
        let buffer = GuestAddress(ABOVE_HOLE + 3 * BLOCK_SIZE - 8);
        vm.lease.memory().write_slice(&[0xff; 16], buffer).unwrap();
        let touched = (pages.len() as u64 + 2) * PAGE;

        let (receipt, _machine) = vm.teardown();
        assert!(receipt.is_proven(), "{receipt:?}");
        match page_size {
            PageSize::Base4K => assert_eq!(receipt.bytes_scrubbed, touched),
            PageSize::Transparent => assert!(receipt.bytes_scrubbed >= touched),
            // Discarded or not, hugetlb pages always count.
            _ => assert_eq!(receipt.bytes_never_populated, 0),
        }
        let next = Vm::boot(pool.lease(&layout).unwrap(), 1);
        next.assert_zero();
        let (receipt, _machine) = next.teardown();
        assert!(
            receipt.is_proven() && receipt.bytes_scrubbed >= touched,
            "{receipt:?}"
        );
    }
}

fn a_neighbour_keeps_what_it_has(page_size: PageSize) {
    let pool = pool(page_size, 8);
    let layout = regions(&[(0, BLOCK_SIZE), (ABOVE_HOLE, BLOCK_SIZE)]);
    let boot = || Vm::boot(pool.lease(&layout).unwrap(), 1);
    let mut vms = vec![boot(), boot(), boot(), boot()];
    for (number, vm) in (0..).zip(&vms) {
        vm.fill(secret(number));
    }
    // In the middle, so that there is a neighbour on either side, and twice, so that the second is in the first's blocks.
    for _ in 0..2 {
        let middle = vms.remove(1);
        let (receipt, _machine) = middle.teardown();
        assert!(receipt.is_proven());
        for (number, vm) in [0, 2, 3].into_iter().zip(&vms) {
            assert_eq!(vm.count(secret(number)), vm.lease.bytes());
        }
        let next = boot();
        assert_eq!(next.lease.blocks(), receipt.blocks);
        next.assert_zero();
        next.fill(secret(100));
        vms.insert(1, next);
    }
    for vm in vms {
        assert!(vm.teardown().0.is_proven());
    }
    assert_nothing_dirty_left(&pool);
}

fn many_machines_in_turn_share_one_lease_of_memory(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let layout = regions(&[(0, 4 * BLOCK_SIZE)]);
    let mut vm = Vm::boot(pool.lease(&layout).unwrap(), 1);
    vm.fill(secret(1));
    // A guest that moves to another machine keeps its memory: only teardown scrubs.
    for vcpus in [2, 1, 4] {
        let Vm {
            machine,
            mut memslots,
            lease,
        } = vm;
        // Not needed: the lease stays.
        let _ = memslots.remove().unwrap();
        drop((memslots, machine));
        vm = Vm::boot(lease, vcpus);
        assert_eq!(vm.count(secret(1)), vm.lease.bytes());
    }
    assert!(vm.teardown().0.is_proven());
    assert_nothing_dirty_left(&pool);
}
