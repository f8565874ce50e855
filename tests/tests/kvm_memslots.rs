//! Memslots that KVM does not add or does not delete: nothing is left half-way, and nothing is forgotten.

use std::cell::Cell;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use vm_scrub::kvm::{MemslotOptions, Memslots, RegisterError};
use vm_scrub::lease::Refusal;
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool};
use vm_scrub_tests::kvm::{
    ABOVE_HOLE, LIMIT, Vm, assert_out_of_reach, edges, ranges, refused, run, secret,
};
use vm_scrub_tests::{assert_nothing_dirty_left, pool, quiesce, regions, teardown};
use vm_scrub_vmm::{FIRMWARE_SLOT, Guest, Machine, Touch};

const LAYOUT: [(u64, u64); 2] = [(0, 2 * BLOCK_SIZE), (ABOVE_HOLE, 2 * BLOCK_SIZE)];
const BYTES: u64 = 4 * BLOCK_SIZE;

/// After a registration that failed nothing of the lease is registered, and it can be torn down at once.
fn assert_nothing_is_registered(machine: &Machine, lease: Lease) {
    assert_out_of_reach(machine, &edges(&ranges(&lease)));
    assert!(teardown(lease).is_proven());
}

#[test]
fn a_memslot_that_cannot_be_added_leaves_none() {
    run(PageSize::Transparent, |page_size| {
        let pool = pool(page_size, 6);
        let layout = regions(&[
            (0, BLOCK_SIZE),
            (ABOVE_HOLE, BLOCK_SIZE),
            (2 * ABOVE_HOLE, BLOCK_SIZE),
        ]);
        let machine = Machine::new(1).unwrap();
        for skip in 0..3 {
            let lease = pool.lease(&layout).unwrap();
            let fault = inject(Call::MemslotAdd, skip, 1, libc::ENOMEM);
            let error = Memslots::register(Arc::clone(machine.vm()), &lease).unwrap_err();
            drop(fault);
            let RegisterError::Refused {
                slot,
                guest_address,
                bytes,
                source,
            } = error
            else {
                panic!("{error}")
            };
            assert_eq!((slot, source.raw_os_error()), (skip, Some(libc::ENOMEM)));
            assert_eq!(
                (guest_address, bytes),
                (u64::from(skip) * ABOVE_HOLE, BLOCK_SIZE)
            );
            // The slots are free for others, and those are gone again afterwards.
            let vm = Vm::on(Machine::new(1).unwrap(), pool.lease(&layout).unwrap());
            assert!(vm.teardown().0.is_proven());
            assert_nothing_is_registered(&machine, lease);
        }
        // The same where the deletion of those before fails too: they stay counted, and the memory is not torn down.
        let lease = pool.lease(&layout).unwrap();
        let fault = inject(Call::MemslotAdd, 2, 1, libc::ENOMEM);
        let _fault = inject(Call::MemslotDelete, 0, 1, libc::EIO);
        assert!(Memslots::register(Arc::clone(machine.vm()), &lease).is_err());
        drop(fault);
        let quiesced = quiesce(&lease);
        let (lease, _) = refused(lease, quiesced, Refusal::Registered { memslots: 2 });
        drop(lease);
        assert_eq!(
            machine.touch(0, LIMIT).unwrap(),
            Touch::Completed,
            "still mapped"
        );
        assert_eq!(pool.accounts().quarantined, 3 * BLOCK_SIZE);
        assert_nothing_dirty_left(&pool);
    });
}

#[test]
fn slots_and_addresses_that_kvm_does_not_take() {
    run(PageSize::Base4K, |page_size| {
        let pool = pool(page_size, 6);
        let machine = Machine::new(1).unwrap();
        let register = |lease: &Lease, first| {
            let options = MemslotOptions::new().first_slot(first);
            Memslots::register_with(Arc::clone(machine.vm()), lease, options)
        };
        let lease = || pool.lease(&regions(&LAYOUT)).unwrap();

        // Numbers beyond 32 bits, beyond KVM's limit, and one that the machine's firmware has.
        for first in [u32::MAX, u32::MAX - 1] {
            let lease = lease();
            let error = register(&lease, first).unwrap_err();
            assert!(
                matches!(error, RegisterError::SlotNumbers { first_slot, regions: 2 } if first_slot == first),
                "{error}"
            );
            assert_nothing_is_registered(&machine, lease);
        }
        for (first, refused) in [
            (u32::MAX - 2, u32::MAX - 2),
            (0xffff, 0xffff),
            (FIRMWARE_SLOT - 1, FIRMWARE_SLOT),
        ] {
            let lease = lease();
            let error = register(&lease, first).unwrap_err();
            assert!(
                matches!(&error, RegisterError::Refused { slot, source, .. }
                    if *slot == refused && source.raw_os_error() == Some(libc::EINVAL)),
                "{error}"
            );
            assert_nothing_is_registered(&machine, lease);
        }

        // The second region is where another lease's memory is.
        let mut others = lease_at(&pool, ABOVE_HOLE + BLOCK_SIZE);
        let mut slots = register(&others, 10).unwrap();
        machine.touch(ABOVE_HOLE + BLOCK_SIZE, LIMIT).unwrap();
        let lease = lease();
        let error = register(&lease, 0).unwrap_err();
        assert!(
            matches!(&error, RegisterError::Refused { slot: 1, guest_address: ABOVE_HOLE, source, .. }
                if source.raw_os_error() == Some(libc::EEXIST)),
            "{error}"
        );
        assert_out_of_reach(&machine, &[0, 2 * BLOCK_SIZE - 8, ABOVE_HOLE]);
        assert!(teardown(lease).is_proven());
        // The other one has lost nothing.
        let touched = machine.touch(ABOVE_HOLE + BLOCK_SIZE, LIMIT).unwrap();
        assert_eq!(touched, Touch::Completed);
        let quiesced = quiesce(&others);
        (others, _) = refused(others, quiesced, Refusal::Registered { memslots: 1 });
        let quiesced = slots.remove().unwrap();
        assert!(others.teardown(quiesced).unwrap().is_proven());
        assert_nothing_dirty_left(&pool);
    });
}

/// KVM takes a memslot that it has already, without an error. Whose would it be to delete?
#[test]
fn a_lease_is_registered_once_in_the_slots_of_a_machine() {
    run(PageSize::Transparent, |page_size| {
        let pool = pool(page_size, 4);
        let Vm {
            machine,
            mut memslots,
            lease,
        } = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 1);
        let vm: &VmFd = machine.vm();
        for log in [false, true] {
            let options = MemslotOptions::new().log_dirty_pages(log);
            let again = Memslots::register_with(vm, &lease, options).unwrap_err();
            assert!(
                matches!(again, RegisterError::Registered { lease: of, slot: 0 } if of == lease.id()),
                "{again}"
            );
        }
        // The first region in the slot of the second, and both in slots of their own.
        let options = MemslotOptions::new().first_slot(1);
        let shifted = Memslots::register_with(vm, &lease, options).unwrap_err();
        assert!(
            matches!(shifted, RegisterError::Registered { slot: 1, .. }),
            "{shifted}"
        );
        let options = MemslotOptions::new().first_slot(2);
        let twice = Memslots::register_with(vm, &lease, options).unwrap_err();
        assert!(
            matches!(&twice, RegisterError::Refused { slot: 2, source, .. }
                if source.raw_os_error() == Some(libc::EEXIST)),
            "{twice}"
        );
        // The first registration has lost nothing.
        machine.fill(&ranges(&lease), secret(1), LIMIT).unwrap();
        let quiesced = quiesce(&lease);
        let (lease, _) = refused(lease, quiesced, Refusal::Registered { memslots: 2 });
        let _ = memslots.remove().unwrap();
        assert_out_of_reach(&machine, &edges(&ranges(&lease)));
        // And the slots are free again.
        let mut again = Memslots::register(vm, &lease).unwrap();
        machine.fill(&ranges(&lease), secret(2), LIMIT).unwrap();
        let quiesced = again.remove().unwrap();
        assert!(lease.teardown(quiesced).unwrap().is_proven());
    });
}

fn lease_at(pool: &Pool, address: u64) -> Lease {
    pool.lease(&regions(&[(address, BLOCK_SIZE)])).unwrap()
}

#[test]
fn a_memslot_that_is_not_deleted_can_be_deleted_later() {
    run(PageSize::Transparent, |page_size| {
        for skip in 0..2 {
            let pool = pool(page_size, 4);
            let Vm {
                machine,
                mut memslots,
                lease,
            } = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 1);
            machine.fill(&ranges(&lease), secret(1), LIMIT).unwrap();
            let fault = inject(Call::MemslotDelete, skip, 1, libc::EIO);
            let error = memslots.remove().unwrap_err();
            drop(fault);
            assert_eq!((error.lease, error.slot), (lease.id(), 1 - skip));
            assert_eq!(error.source.raw_os_error(), Some(libc::EIO));
            // What is left is counted and still works.
            let left = 2 - skip as usize;
            let quiesced = quiesce(&lease);
            let (lease, _) = refused(lease, quiesced, Refusal::Registered { memslots: left });
            assert_eq!(machine.touch(0, LIMIT).unwrap(), Touch::Completed);

            let quiesced = memslots.remove().unwrap();
            assert_out_of_reach(&machine, &edges(&ranges(&lease)));
            let receipt = lease.teardown(quiesced).unwrap();
            assert!(receipt.is_proven());
            assert_eq!(receipt.bytes_scrubbed, BYTES);
            // Nothing is left to be done.
            let _ = memslots.remove().unwrap();
            drop(memslots);
            assert_nothing_dirty_left(&pool);
        }
    });
}

#[test]
fn memslots_that_are_dropped_and_not_deleted_keep_the_memory() {
    run(PageSize::Transparent, |page_size| {
        let pool = pool(page_size, 6);
        let Vm {
            machine,
            memslots,
            lease,
        } = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 1);
        let all = ranges(&lease);
        machine.fill(&all, secret(1), LIMIT).unwrap();
        let fault = inject(Call::MemslotDelete, 0, u32::MAX, libc::EIO);
        drop(memslots);
        drop(fault);
        let quiesced = quiesce(&lease);
        let (lease, _) = refused(lease, quiesced, Refusal::Registered { memslots: 2 });
        drop(lease);
        assert_eq!(pool.accounts().quarantined, BYTES);
        assert_eq!(machine.count(&all, secret(1), LIMIT).unwrap(), BYTES);
        machine.fill(&all, secret(2), LIMIT).unwrap();
        assert_nothing_dirty_left(&pool);
    });
}

/// Leads to the second machine every fourth time, from the second time on.
struct Changing<'a>(&'a VmFd, &'a VmFd, Cell<u32>);

impl std::ops::Deref for Changing<'_> {
    type Target = VmFd;

    fn deref(&self) -> &VmFd {
        let asked = self.2.replace(self.2.get() + 1);
        if asked % 4 == 1 { self.1 } else { self.0 }
    }
}

/// No proof is given while a machine that was ever led to shows the memory.
#[test]
fn memslots_are_deleted_where_they_were_registered() {
    run(PageSize::Transparent, |page_size| {
        let pool = pool(page_size, 2);
        let (first, second) = (Machine::new(1).unwrap(), Machine::new(1).unwrap());
        // A slot that has the number that is going to be used, on the first machine.
        let bystander = lease_at(&pool, BLOCK_SIZE);
        let _slot = Memslots::register(first.vm().as_ref(), &bystander).unwrap();
        let lease = lease_at(&pool, 0);
        let region = edges(&ranges(&lease));
        for asked in 0..4 {
            let changing = Changing(first.vm(), second.vm(), Cell::new(asked));
            let Ok(mut memslots) = Memslots::register(changing, &lease) else {
                continue;
            };
            while memslots.remove().is_err() {}
            assert_out_of_reach(&second, &region);
        }
        drop(lease);
        assert_eq!(pool.accounts().quarantined, 0);
    });
}

/// KVM never took a memslot, so its word that the guest is stopped is not there.
#[test]
fn a_registration_that_failed_says_nothing_about_the_guest() {
    run(PageSize::Transparent, |page_size| {
        let pool = pool(page_size, 2);
        let machine = Machine::new(1).unwrap();
        let lease = lease_at(&pool, 0);
        let _somewhere_else = lease.host_addresses();
        let fault = inject(Call::MemslotAdd, 0, 1, libc::EEXIST);
        assert!(Memslots::register(machine.vm().as_ref(), &lease).is_err());
        drop(fault);
        drop(lease);
        assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
    });
}
