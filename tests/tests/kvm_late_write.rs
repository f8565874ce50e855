//! A device that keeps host pointers into a guest's memory and goes on writing: during the teardown, after it, and while the
//! next guests live in the same blocks.

use vm_scrub::{BLOCK_SIZE, PageSize, Verify};
use vm_scrub_tests::kvm::{ABOVE_HOLE, LIMIT, Vm, secret};
use vm_scrub_tests::{PAGE, kvm_on_every_page_size, pool, regions};
use vm_scrub_vmm::{Guest, StrayDevice, ThreadGuest};

kvm_on_every_page_size!(
    a_late_device_reaches_no_later_guest: 6,
    devices_of_many_guests_pile_up: 4,
);

const STRAY: u64 = u64::from_le_bytes(*b"STRAYDEV");

/// Where device buffers are: both ends of each region, across pages, across blocks, and one large one.
fn buffers(ranges: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut buffers = Vec::new();
    for &(start, bytes) in ranges {
        buffers.extend([
            (start, 64),
            (start + PAGE - 32, 64),
            (start + bytes - PAGE, PAGE),
        ]);
        if bytes > BLOCK_SIZE {
            buffers.extend([
                (start + BLOCK_SIZE - 8, 16),
                (start + BLOCK_SIZE / 2, BLOCK_SIZE / 4),
            ]);
        }
    }
    buffers
}

fn a_late_device_reaches_no_later_guest(page_size: PageSize) {
    let layout = regions(&[(0, 3 * BLOCK_SIZE), (ABOVE_HOLE, 3 * BLOCK_SIZE)]);
    for _ in 0..3 {
        let pool = pool(page_size, 6);
        let vm = Vm::boot(pool.lease(&layout).unwrap(), 2);
        let buffers = buffers(&vm.ranges());
        // SAFETY: the window stays reserved for as long as the pool exists, and the device is stopped before that.
        let device = unsafe { StrayDevice::start(&vm.lease.memory(), &buffers, STRAY) }.unwrap();
        vm.fill(secret(1));
        let before = device.round(LIMIT).unwrap();
        assert!(
            before.landed >= buffers.len() as u64 && before.refused == 0,
            "{before:?}"
        );
        assert!(vm.count(STRAY) > 0, "the device does write into the guest");

        // The device writes on, into the scrubber's work if it can.
        let (receipt, _machine) = vm.teardown();
        let revoked = device.snapshot();
        assert_eq!(receipt.verify, Verify::Full);
        assert!(receipt.is_proven(), "{receipt:?}");
        for number in 2..4 {
            let next = Vm::boot(pool.lease(&layout).unwrap(), 2);
            assert_eq!(next.lease.blocks(), receipt.blocks);
            next.assert_zero();
            let after = device.round(LIMIT).unwrap();
            assert!(
                after.landed == 0 && after.refused >= buffers.len() as u64,
                "{after:?}"
            );
            next.assert_zero();
            next.fill(secret(number));
            device.round(LIMIT).unwrap();
            assert_eq!(next.count(secret(number)), next.lease.bytes());
            assert!(next.teardown().0.is_proven());
        }
        let all = device.stop().since(revoked);
        assert_eq!(all.landed, 0);
        assert!(all.refused >= 4 * buffers.len() as u64, "{all:?}");
    }
}

fn devices_of_many_guests_pile_up(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let layout = regions(&[(0, 3 * BLOCK_SIZE), (ABOVE_HOLE, BLOCK_SIZE)]);
    let mut devices: Vec<(StrayDevice, u64)> = Vec::new();
    for number in 0..5 {
        let vm = Vm::boot(pool.lease(&layout).unwrap(), 1);
        vm.assert_zero();
        let memory = vm.lease.memory();
        vm.fill(secret(number));
        // SAFETY: as above.
        let device = unsafe { StrayDevice::start(&memory, &buffers(&vm.ranges()), STRAY) }.unwrap();
        assert!(device.round(LIMIT).unwrap().landed > 0);
        drop(memory);
        assert!(vm.teardown().0.is_proven());
        let landed = device.snapshot().landed;
        devices.push((device, landed));
        for (device, landed) in &devices {
            let after = device.round(LIMIT).unwrap();
            assert!(after.landed == 0 && after.refused > 0, "{after:?}");
            assert_eq!(device.snapshot().landed, *landed);
        }
    }
    let lease = pool.lease(&layout).unwrap();
    let host = ThreadGuest::new(lease.memory(), 1).unwrap();
    let found = host
        .scan(&vm_scrub_tests::kvm::ranges(&lease), LIMIT)
        .unwrap();
    assert_eq!((found.bytes_read, found.nonzero_bytes), (4 * BLOCK_SIZE, 0));
    for (device, landed) in devices {
        assert_eq!(device.stop().landed, landed);
    }
}
