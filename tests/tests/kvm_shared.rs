//! KVM guests in memory that a back-end in another process has too.

use std::sync::Arc;
use vm_scrub::lease::QuarantineReason;
use vm_scrub::{BLOCK_SIZE, Lease, LeaseOptions, PageSize, Pool, Revocation};
use vm_scrub_tests::kvm::{ABOVE_HOLE, Vm, assert_out_of_reach, edges, secret};
use vm_scrub_tests::peer::{self, Peer};
use vm_scrub_tests::{assert_nothing_dirty_left, kvm_on_every_page_size, pool, regions};

kvm_on_every_page_size!(
    guests_with_a_back_end_follow_each_other: 12,
    a_back_end_that_lingers_meets_no_other_guest: 12,
);

#[test]
fn peer() {
    peer::serve();
}

fn lease(pool: &Pool) -> Lease {
    let layout = regions(&[(0, 2 * BLOCK_SIZE), (ABOVE_HOLE, 2 * BLOCK_SIZE)]);
    let options = LeaseOptions::new().shareable(true);
    pool.lease_with(&layout, options).unwrap()
}

/// A back-end process that has mapped all of the lease's memory.
fn back_end(lease: &Lease) -> Peer {
    let mut peer = Peer::with(&Arc::clone(lease.file_offsets()[0].1.arc()));
    assert_eq!(peer.map(), 0);
    peer
}

fn guests_with_a_back_end_follow_each_other(page_size: PageSize) {
    let pool = pool(page_size, 4);
    for generation in 0..3 {
        let vm = Vm::boot(lease(&pool), 2);
        vm.assert_zero();
        let mut peer = back_end(&vm.lease);
        vm.fill(secret(generation));
        assert_eq!(
            peer.count_mapped(),
            vm.lease.bytes(),
            "no byte of a secret is zero"
        );
        peer.fill();
        assert!(vm.count(secret(generation)) < vm.lease.bytes());
        peer.unmap();

        let edges = edges(&vm.ranges());
        let (receipt, machine) = vm.teardown();
        assert!(receipt.is_proven(), "{receipt:?}");
        assert_eq!(receipt.revocation, Revocation::Sealed);
        assert_eq!(receipt.bytes_scrubbed, receipt.bytes_total);
        assert_out_of_reach(&machine, &edges);
        assert_eq!(peer.count(), 0);
        peer.kill();
        pool.reclaim();
        assert_eq!(pool.accounts().clean, pool.capacity());
    }
    assert_nothing_dirty_left(&pool);
}

fn a_back_end_that_lingers_meets_no_other_guest(page_size: PageSize) {
    // Room for two guests: one block more would have to come out of quarantine.
    let pool = pool(page_size, 8);
    let vm = Vm::boot(lease(&pool), 2);
    let mut peer = back_end(&vm.lease);
    vm.fill(secret(1));
    let (receipt, _machine) = vm.teardown();
    assert_eq!(receipt.bytes_quarantined, receipt.bytes_total);
    assert_eq!(receipt.quarantined[0].reason, QuarantineReason::StillShared);

    let next = Vm::boot(lease(&pool), 2);
    next.assert_zero();
    next.fill(secret(2));
    assert_eq!(peer.count_mapped(), 0);
    peer.fill();
    assert_eq!(next.count(secret(2)), next.lease.bytes());
    assert!(pool.lease(&regions(&[(0, BLOCK_SIZE)])).is_err());
    assert!(next.teardown().0.is_proven());
    peer.kill();
    pool.reclaim();
    assert_eq!(pool.accounts().clean, pool.capacity());
    assert_nothing_dirty_left(&pool);
}
