//! A teardown that is refused hands the lease back, and the guest goes on with it.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vm_scrub::kvm::Memslots;
use vm_scrub::lease::Refusal;
use vm_scrub::{BLOCK_SIZE, PageSize};
use vm_scrub_tests::kvm::{
    ABOVE_HOLE, LIMIT, Vm, assert_out_of_reach, edges, ranges, refused, secret,
};
use vm_scrub_tests::{
    assert_nothing_dirty_left, kvm_on_every_page_size, pool, quiesce, regions, teardown,
};
use vm_scrub_vmm::{Guest, Machine};

kvm_on_every_page_size!(a_teardown_that_is_refused_hands_a_working_lease_back: 6);

const LAYOUT: [(u64, u64); 2] = [(0, 2 * BLOCK_SIZE), (ABOVE_HOLE, 2 * BLOCK_SIZE)];
const BYTES: u64 = 4 * BLOCK_SIZE;

fn a_teardown_that_is_refused_hands_a_working_lease_back(page_size: PageSize) {
    let pool = pool(page_size, 6);
    let layout = regions(&LAYOUT);
    let Vm {
        machine,
        mut memslots,
        lease,
    } = Vm::boot(pool.lease(&layout).unwrap(), 2);
    let all = ranges(&lease);
    let works = |machine: &Machine, number| {
        machine.fill(&all, secret(number), LIMIT).unwrap();
        assert_eq!(machine.count(&all, secret(number), LIMIT).unwrap(), BYTES);
    };
    works(&machine, 1);
    let asserted = quiesce(&lease);
    let (lease, _) = refused(lease, asserted, Refusal::Registered { memslots: 2 });
    works(&machine, 2);

    // On a second machine as well: the first one's proof is not enough.
    let other = Machine::new(1).unwrap();
    let mut others = Memslots::register(Arc::clone(other.vm()), &lease).unwrap();
    assert_eq!(other.count(&all, secret(2), LIMIT).unwrap(), BYTES);
    let asserted = quiesce(&lease);
    let (lease, _) = refused(lease, asserted, Refusal::Registered { memslots: 4 });
    let quiesced = memslots.remove().unwrap();
    let (lease, quiesced) = refused(lease, quiesced, Refusal::Registered { memslots: 2 });
    works(&other, 3);
    assert_out_of_reach(&machine, &edges(&all));
    drop(others.remove().unwrap());

    // Memory handed out, once and twice.
    let memory = lease.memory();
    let (lease, quiesced) = refused(lease, quiesced, Refusal::Held { holders: 1 });
    let clone = memory.clone();
    let (lease, quiesced) = refused(lease, quiesced, Refusal::Held { holders: 2 });
    drop(memory);
    let (lease, quiesced) = refused(lease, quiesced, Refusal::Held { holders: 1 });
    clone
        .write_slice(b"still there", GuestAddress(ABOVE_HOLE))
        .unwrap();
    drop(clone);

    // A proof about somebody else.
    let small = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let elsewhere = quiesce(&small);
    let reason = Refusal::OtherLease {
        lease: lease.id(),
        quiesced: small.id(),
    };
    let (lease, _) = refused(lease, elsewhere, reason);

    // And after all that it goes on another machine, and away.
    let vm = Vm::on(machine, lease);
    works(&vm.machine, 4);
    let (lease, quiesced) = refused(vm.lease, quiesced, Refusal::Registered { memslots: 2 });
    let mut memslots = vm.memslots;
    let _ = memslots.remove().unwrap();
    let receipt = lease.teardown(quiesced).unwrap();
    assert!(receipt.is_proven());
    assert_eq!(receipt.bytes_scrubbed, BYTES);
    assert!(teardown(small).is_proven());
    assert_nothing_dirty_left(&pool);
}
