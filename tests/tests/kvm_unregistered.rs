//! Memslots that the lease does not know of: a monitor's own code holds the machine too, and registers the raw host address at
//! any moment of a teardown. The lease cannot refuse what it does not see; but such a registration reaches the memory only
//! while it is this guest's, and inaccessible address space from then on.

use std::sync::Arc;
use std::thread::{scope, sleep};
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_scrub::kvm::Memslots;
use vm_scrub::{BLOCK_SIZE, PageSize};
use vm_scrub_tests::kvm::{ABOVE_HOLE, LIMIT, secret};
use vm_scrub_tests::maps::is_readable;
use vm_scrub_tests::numbers::Numbers;
use vm_scrub_tests::{
    assert_adds_up, assert_all_zero, assert_nothing_dirty_left, first_nonzero,
    kvm_on_every_page_size, pool, regions, teardown,
};
use vm_scrub_vmm::{Guest, Machine, ThreadGuest, Touch, VcpuStop};

kvm_on_every_page_size!(a_registration_that_races_a_teardown_reaches_nothing: 2);

const BYTES: u64 = 2 * BLOCK_SIZE;
const GUESTS: u64 = 40;

/// Where and in which slot the other code registers the memory.
const ELSEWHERE: u64 = 2 * ABOVE_HOLE;
const SLOT: u32 = 7;

/// An address that goes to another thread.
#[derive(Clone, Copy)]
struct Host(u64);

/// What a monitor does that has the address from `Lease::host_addresses` and keeps its own list of memslots. No bytes: deletes.
fn register(vm: &VmFd, host: Host, bytes: u64) {
    let entry = kvm_userspace_memory_region {
        slot: SLOT,
        flags: 0,
        guest_phys_addr: ELSEWHERE,
        memory_size: bytes,
        userspace_addr: host.0,
    };
    // SAFETY: the window is reserved for as long as the pool lives. That it may show nothing any more is what is tested.
    unsafe { vm.set_user_memory_region(entry) }.expect("memslot");
}

/// There is a memslot, and nothing behind it.
fn is_without_memory(stop: &VcpuStop) -> bool {
    matches!(stop, VcpuStop::Shutdown | VcpuStop::MemoryFault)
}

fn a_registration_that_races_a_teardown_reaches_nothing(page_size: PageSize) {
    let pool = pool(page_size, 2);
    let machine = Machine::new(2).unwrap();
    let mut numbers = Numbers(0x5eed_0007);
    let mut wrote = 0;
    let (mut guest, mut slow) = (0, 1);
    while guest < GUESTS || (wrote == 0 && slow < 1000) {
        guest += 1;
        if guest % GUESTS == 0 && wrote == 0 {
            // Emulated processors begin later.
            slow *= 10;
        }
        let lease = pool.lease(&regions(&[(0, BYTES)])).unwrap();
        assert_all_zero(&lease);
        let start = lease.host_addresses()[0].1;
        let host = Host(start.expose_provenance() as u64);
        let mut memslots = Memslots::register(Arc::clone(machine.vm()), &lease).unwrap();
        let [registering, removing, between] = [1_500, 1_500, 300].map(|most| numbers.below(most));
        let (mut running, receipt) = scope(|scope| {
            let other = scope.spawn(|| {
                sleep(Duration::from_micros(registering));
                register(machine.vm(), host, BYTES);
                // One vCPU writes through the lease's memslot, while there is one, and one behind its back.
                let both = [(0, BYTES), (ELSEWHERE, BYTES)];
                machine.start_fill_forever(&both, secret(guest)).unwrap()
            });
            sleep(Duration::from_micros(removing));
            let quiesced = memslots.remove().unwrap();
            sleep(Duration::from_micros(slow * between));
            let receipt = lease.teardown(quiesced).unwrap();
            (other.join().unwrap(), receipt)
        });
        assert_adds_up(&receipt);
        assert!(receipt.is_proven(), "{receipt:?}");
        assert!(!is_readable(start.addr()) && !is_readable(start.addr() + BYTES as usize - 1));
        let stops = running.wait_stopped(LIMIT).unwrap();
        let [registered, behind] = &stops[..] else {
            panic!("{stops:?}")
        };
        assert!(matches!(registered, VcpuStop::Mmio { .. }), "{stops:?}");
        assert!(is_without_memory(behind), "{stops:?}");
        wrote += u64::from(running.passes().unwrap()[1] > 0);

        // The next guest's memory is elsewhere, and the memslot, which is still there, leads to nothing.
        let next = pool.lease(&regions(&[(0, BYTES)])).unwrap();
        assert_eq!(next.blocks(), receipt.blocks);
        let edges = [ELSEWHERE, ELSEWHERE + BYTES - 8];
        let assert_nothing = || {
            for address in edges {
                let touch = machine.touch(address, LIMIT).unwrap();
                let gone = matches!(&touch, Touch::Stopped(stop) if is_without_memory(stop));
                assert!(gone, "{touch:?}");
            }
        };
        assert_nothing();
        assert_eq!(first_nonzero(&next), None);
        let all = [(0, BYTES)];
        let host_guest = ThreadGuest::new(next.memory(), 1).unwrap();
        host_guest.fill(&all, secret(0), LIMIT).unwrap();
        assert_nothing();
        assert_eq!(host_guest.count(&all, secret(0), LIMIT).unwrap(), BYTES);
        drop(host_guest);
        assert!(teardown(next).is_proven());
        register(machine.vm(), host, 0);
    }
    assert!(wrote > 0, "no vCPU wrote behind the lease's back");
    assert!(wrote < guest, "no registration came too late");
    assert_nothing_dirty_left(&pool);
}
