//! Guests that go on writing while their memory is taken away.
//!
//! Nothing stops a vCPU here but the loss of its memory, or a kick long afterwards.

use std::thread;

use vm_scrub::lease::Refusal;
use vm_scrub::{BLOCK_SIZE, PageSize};
use vm_scrub_tests::kvm::{
    ABOVE_HOLE, LIMIT, Vm, assert_out_of_reach, edges, ranges, refused, secret,
};
use vm_scrub_tests::{
    assert_adds_up, assert_all_zero, assert_nothing_dirty_left, kvm_on_every_page_size, pool,
    quiesce, regions, teardown,
};
use vm_scrub_vmm::{Guest, RunningGuest, ThreadGuest, VcpuStop};

kvm_on_every_page_size!(
    memory_goes_while_vcpus_write_and_the_next_guest_meets_none_of_it: 4,
    a_running_guest_with_memslots_is_not_torn_down: 4,
    forgotten_memslots_count_for_ever: 4,
);

const LAYOUT: [(u64, u64); 2] = [(0, 2 * BLOCK_SIZE), (ABOVE_HOLE, 2 * BLOCK_SIZE)];

/// Waits until every vCPU has been through its memory once more: through the rest of it, and all of it.
fn writes_on(running: &mut RunningGuest) {
    running.wait_more_passes(2, LIMIT).expect("it writes");
}

fn assert_no_work_was_finished(stops: &[VcpuStop], vcpus: usize) {
    assert_eq!(stops.len(), vcpus);
    for stop in stops {
        assert!(stop.lost_memory() || *stop == VcpuStop::Kicked, "{stops:?}");
    }
}

fn memory_goes_while_vcpus_write_and_the_next_guest_meets_none_of_it(page_size: PageSize) {
    let layout = regions(&LAYOUT);
    for (round, vcpus) in [1, 2, 4, 2, 1, 2].into_iter().enumerate() {
        let pool = pool(page_size, 4);
        let Vm {
            machine,
            mut memslots,
            lease,
        } = Vm::boot(pool.lease(&layout).unwrap(), vcpus);
        let all = ranges(&lease);
        let mut running = machine.start_fill_forever(&all, secret(1)).unwrap();
        running.wait_passes(1 + round as u64, LIMIT).unwrap();

        // They are writing now, and nobody tells them to stop.
        let quiesced = memslots.remove().unwrap();
        let receipt = lease.teardown(quiesced).unwrap();
        assert!(receipt.is_proven(), "{receipt:?}");
        assert_adds_up(&receipt);
        assert_eq!(receipt.bytes_scrubbed, receipt.bytes_total);

        let next = pool.lease(&layout).unwrap();
        assert_eq!(next.blocks(), receipt.blocks);
        assert_all_zero(&next);
        let host = ThreadGuest::new(next.memory(), 1).unwrap();
        let stops = thread::scope(|scope| {
            let stopping = scope.spawn(|| match round % 2 {
                0 => running.stop(LIMIT),
                // By themselves, because they have no memory.
                _ => running.wait_stopped(LIMIT),
            });
            host.fill(&all, secret(2), LIMIT).unwrap();
            assert_eq!(host.count(&all, secret(2), LIMIT).unwrap(), next.bytes());
            stopping.join().unwrap().unwrap()
        });
        assert_no_work_was_finished(&stops, vcpus);
        assert_eq!(host.count(&all, secret(2), LIMIT).unwrap(), next.bytes());
        drop(host);
        assert_out_of_reach(&machine, &edges(&all));
        assert!(teardown(next).is_proven());

        let last = Vm::boot(pool.lease(&layout).unwrap(), vcpus);
        last.assert_zero();
        assert!(last.teardown().0.is_proven());
    }
}

fn a_running_guest_with_memslots_is_not_torn_down(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let Vm {
        machine,
        mut memslots,
        mut lease,
    } = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 2);
    let all = ranges(&lease);
    let mut running = machine.start_fill_forever(&all, secret(3)).unwrap();
    running.wait_passes(1, LIMIT).unwrap();
    for _ in 0..8 {
        let quiesced = quiesce(&lease);
        (lease, _) = refused(lease, quiesced, Refusal::Registered { memslots: 2 });
        writes_on(&mut running);
    }
    assert_eq!(pool.accounts().leased, pool.capacity());

    let quiesced = memslots.remove().unwrap();
    assert!(lease.teardown(quiesced).unwrap().is_proven());
    assert_no_work_was_finished(&running.wait_stopped(LIMIT).unwrap(), 2);
    assert_nothing_dirty_left(&pool);
}

fn forgotten_memslots_count_for_ever(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let layout = regions(&[(0, BLOCK_SIZE), (ABOVE_HOLE, BLOCK_SIZE)]);
    let Vm {
        machine,
        memslots,
        lease,
    } = Vm::boot(pool.lease(&layout).unwrap(), 2);
    let all = ranges(&lease);
    let mut running = machine.start_fill_forever(&all, secret(4)).unwrap();
    running.wait_passes(1, LIMIT).unwrap();
    // Nobody can remove them any more, whatever is asserted.
    std::mem::forget(memslots);
    let quiesced = quiesce(&lease);
    let (lease, quiesced) = refused(lease, quiesced, Refusal::Registered { memslots: 2 });
    let (lease, _) = refused(lease, quiesced, Refusal::Registered { memslots: 2 });
    drop(lease);
    assert_eq!(pool.accounts().quarantined, 2 * BLOCK_SIZE);
    // The guest neither crashes nor stops, and nobody else gets its memory.
    writes_on(&mut running);
    assert_nothing_dirty_left(&pool);
    writes_on(&mut running);
    let stops = running.stop(LIMIT).unwrap();
    assert_eq!(stops, [VcpuStop::Kicked, VcpuStop::Kicked]);
    assert_eq!(
        machine.count(&all, secret(4), LIMIT).unwrap(),
        2 * BLOCK_SIZE
    );
    assert_eq!(pool.accounts().quarantined, 2 * BLOCK_SIZE);
}
