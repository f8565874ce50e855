//! Guests that misbehave, and guests whose memory is taken away: how they stop, and that they always stop.

#[expect(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::time::Duration;

use nix::sys::signal::SigSet;

use common::{LIMIT, MIB, machine, memory, register, set_access, unregister};
use vm_memory::{Bytes, GuestAddress};
use vm_scrub_vmm::{Error, Guest, StrayDevice, Touch, VcpuStop};

const PATTERN: u64 = 0x8877_6655_4433_2211;
const RAM: [(u64, u64); 1] = [(0, 16 * MIB)];

/// For limits that are meant to run out.
const SHORT: Duration = Duration::from_millis(50);

fn lost(touch: &Touch) -> bool {
    matches!(touch, Touch::Stopped(stop) if stop.lost_memory())
}

#[test]
fn a_guest_that_never_exits_is_stopped_at_its_limit() {
    let Some(machine) = machine(2) else { return };
    for _ in 0..20 {
        let mut running = machine.start_spin().expect("started");
        let error = running
            .wait_stopped(Duration::from_millis(2))
            .expect_err("it never stops");
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        let stops = running.stop(LIMIT).expect("stopped");
        assert_eq!(stops, [VcpuStop::Kicked, VcpuStop::Kicked]);
    }
}

#[test]
fn kicks_that_come_at_once_are_not_lost() {
    let Some(machine) = machine(2) else { return };
    for _ in 0..200 {
        let running = machine.start_spin().expect("started");
        assert_eq!(running.stop(LIMIT).expect("stopped").len(), 2);
        drop(machine.start_spin().expect("the vCPUs are back"));
    }
}

#[test]
fn a_guest_started_under_a_signal_mask_is_stopped_all_the_same() {
    let Some(machine) = machine(1) else { return };
    SigSet::all().thread_block().expect("signal mask");
    let mut running = machine.start_spin().expect("started");
    // By then it is in the guest, where only a signal reaches it.
    assert!(matches!(
        running.wait_stopped(SHORT),
        Err(Error::TimedOut { .. })
    ));
    assert_eq!(running.stop(LIMIT).expect("stopped"), [VcpuStop::Kicked]);
}

#[test]
fn one_run_at_a_time() {
    let Some(machine) = machine(1) else { return };
    let memory = memory(&RAM);
    register(machine.vm(), &memory);
    let running = machine.start_spin().expect("started");
    assert!(matches!(machine.scan(&RAM, LIMIT), Err(Error::Busy)));
    assert!(matches!(machine.touch(0, LIMIT), Err(Error::Busy)));
    drop(running);
    assert_eq!(machine.touch(0, LIMIT).expect("touched"), Touch::Completed);
}

#[test]
fn a_touch_is_seen_by_the_host_until_the_memslot_is_gone() {
    let Some(machine) = machine(1) else { return };
    let memory = memory(&RAM);
    register(machine.vm(), &memory);
    let gpa = 5 * MIB + 8;
    assert_eq!(
        machine.touch(gpa, LIMIT).expect("touched"),
        Touch::Completed
    );
    assert_ne!(memory.read_obj::<u64>(GuestAddress(gpa)).expect("read"), 0);

    memory.write_obj(0u64, GuestAddress(gpa)).expect("cleared");
    unregister(machine.vm(), &memory);
    for _ in 0..3 {
        let touch = machine.touch(gpa, LIMIT).expect("ran");
        assert!(lost(&touch), "{touch:?}");
    }
    assert_eq!(memory.read_obj::<u64>(GuestAddress(gpa)).expect("read"), 0);

    register(machine.vm(), &memory);
    assert_eq!(
        machine.touch(gpa, LIMIT).expect("touched"),
        Touch::Completed
    );
    assert_eq!(machine.scan(&RAM, LIMIT).expect("scanned").nonzero_bytes, 8);
}

#[test]
fn a_touch_of_protected_memory_stops_the_guest() {
    let Some(machine) = machine(2) else { return };
    let memory = memory(&RAM);
    register(machine.vm(), &memory);
    machine.fill(&RAM, PATTERN, LIMIT).expect("filled");
    set_access(&memory, false);
    for gpa in [0, 8 * MIB, 16 * MIB - 8] {
        let touch = machine.touch(gpa, LIMIT).expect("ran");
        assert!(lost(&touch), "{touch:?}");
    }
    let error = machine.scan(&RAM, LIMIT).expect_err("no memory");
    assert!(matches!(error, Error::GuestStopped { .. }), "{error}");
    set_access(&memory, true);
    assert_eq!(
        machine.count(&RAM, PATTERN, LIMIT).expect("counted"),
        16 * MIB
    );
}

#[test]
fn a_guest_fills_until_it_is_stopped() {
    let Some(machine) = machine(2) else { return };
    let memory = memory(&RAM);
    register(machine.vm(), &memory);
    let mut running = machine.start_fill_forever(&RAM, PATTERN).expect("started");
    running.wait_passes(1, LIMIT).expect("it writes");
    // Both ends belong to different vCPUs: what is cleared comes back.
    for gpa in [0, 16 * MIB - 8] {
        memory.write_obj(0u64, GuestAddress(gpa)).expect("cleared");
    }
    running.wait_more_passes(2, LIMIT).expect("it writes on");
    for gpa in [0, 16 * MIB - 8] {
        assert_eq!(
            memory.read_obj::<u64>(GuestAddress(gpa)).expect("read"),
            PATTERN
        );
    }
    assert!(matches!(
        running.wait_stopped(SHORT),
        Err(Error::TimedOut { .. })
    ));
    let stops = running.stop(LIMIT).expect("stopped");
    assert_eq!(stops, [VcpuStop::Kicked, VcpuStop::Kicked]);
    memory.write_obj(0u64, GuestAddress(0)).expect("cleared");
    let scan = machine.scan(&RAM, LIMIT).expect("scanned");
    assert_eq!(scan.nonzero_bytes, 16 * MIB - 8, "nobody writes any more");
}

#[test]
fn memory_taken_away_in_the_middle_stops_every_vcpu() {
    let Some(machine) = machine(2) else { return };
    let memory = memory(&RAM);
    for by_memslot in [false, true] {
        register(machine.vm(), &memory);
        let mut running = machine.start_fill_forever(&RAM, PATTERN).expect("started");
        running.wait_passes(2, LIMIT).expect("it writes");
        if by_memslot {
            unregister(machine.vm(), &memory);
        } else {
            set_access(&memory, false);
        }
        let stops = running
            .wait_stopped(LIMIT)
            .expect("they stop by themselves");
        assert_eq!(stops.len(), 2);
        assert!(stops.iter().all(VcpuStop::lost_memory), "{stops:?}");
        let error = running
            .wait_passes(u64::MAX, LIMIT)
            .expect_err("it has stopped");
        assert!(matches!(error, Error::GuestStopped { .. }), "{error}");
        assert_eq!(running.stop(LIMIT).expect("stopped"), stops);
        if !by_memslot {
            unregister(machine.vm(), &memory);
            set_access(&memory, true);
        }
    }
}

#[test]
fn a_stray_device_writes_until_its_addresses_are_revoked() {
    let memory = memory(&RAM);
    // Inside a page, across pages, and at the very end.
    let buffers = [(64, 64), (8 * MIB - 32, 4096), (16 * MIB - 8, 8)];
    // SAFETY: the mapping stays until the device is stopped, protected or not.
    let device = unsafe { StrayDevice::start(&memory, &buffers, PATTERN) }.expect("started");
    let before = device.round(LIMIT).expect("round");
    assert!(before.landed >= 3 && before.refused == 0, "{before:?}");
    for (gpa, bytes) in buffers {
        for offset in (0..bytes).step_by(8) {
            let word: u64 = memory.read_obj(GuestAddress(gpa + offset)).expect("read");
            assert_eq!(word, PATTERN);
        }
    }

    set_access(&memory, false);
    let revoked = device.snapshot();
    let after = device.round(LIMIT).expect("round");
    assert!(after.landed == 0 && after.refused >= 3, "{after:?}");
    let all = device.stop();
    assert_eq!(all.landed, revoked.landed);
    assert!(all.refused >= revoked.refused + after.refused);
    set_access(&memory, true);
}

#[test]
fn a_stray_device_needs_buffers_inside_guest_memory() {
    let memory = memory(&RAM);
    for buffer in [(16 * MIB - 8, 16), (32 * MIB, 8)] {
        // SAFETY: it does not start; and the mapping would stay.
        let device = unsafe { StrayDevice::start(&memory, &[buffer], PATTERN) };
        assert!(matches!(device, Err(Error::GuestMemory { .. })));
    }
}

#[test]
fn machines_need_a_possible_number_of_vcpus() {
    if machine(1).is_some() {
        for vcpus in [0, 100_000] {
            let machine = vm_scrub_vmm::Machine::new(vcpus);
            assert!(matches!(machine, Err(Error::Vcpus { .. })));
        }
    }
}
