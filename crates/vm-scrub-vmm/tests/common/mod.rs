//! RAM for the guests of these tests: plain anonymous memory, registered by hand.

use std::io::{Write, stderr};
use std::time::Duration;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vm_scrub_vmm::{Machine, kvm_usable};

/// Long enough for a loaded machine, short enough to notice a hang.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);

pub(crate) const MIB: u64 = 1 << 20;
pub(crate) const GIB: u64 = 1 << 30;

/// A machine, or `None` with a message that the test harness does not hide.
pub(crate) fn machine(vcpus: usize) -> Option<Machine> {
    if let Err(error) = kvm_usable() {
        let name = std::thread::current().name().unwrap_or("test").to_owned();
        let _ = writeln!(stderr(), "\nSKIPPED {name}: {error}");
        return None;
    }
    Some(Machine::new(vcpus).expect("machine"))
}

/// Guest memory with these ranges (guest-physical address, bytes).
pub(crate) fn memory(ranges: &[(u64, u64)]) -> GuestMemoryMmap {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|&(gpa, bytes)| (GuestAddress(gpa), bytes as usize))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).expect("guest memory")
}

/// Registers region i of `memory` in slot i.
pub(crate) fn register(vm: &VmFd, memory: &GuestMemoryMmap) {
    for (slot, region) in memory.iter().enumerate() {
        let (gpa, bytes) = (region.start_addr().0, region.len());
        set_slot(vm, slot as u32, gpa, bytes, host(memory, gpa) as u64);
    }
}

/// Removes region i of `memory` from slot i.
pub(crate) fn unregister(vm: &VmFd, memory: &GuestMemoryMmap) {
    for slot in 0..memory.num_regions() {
        set_slot(vm, slot as u32, 0, 0, 0);
    }
}

fn set_slot(vm: &VmFd, slot: u32, gpa: u64, bytes: u64, userspace_addr: u64) {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: gpa,
        memory_size: bytes,
        userspace_addr,
    };
    // SAFETY: either an empty region, or one of guest memory that the tests keep longer than their guests.
    unsafe { vm.set_user_memory_region(region) }.expect("memslot");
}

/// Takes all of `memory` away from everybody who has it mapped by address, or gives it back.
pub(crate) fn set_access(memory: &GuestMemoryMmap, allowed: bool) {
    let protection = if allowed {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        libc::PROT_NONE
    };
    for region in memory.iter() {
        let address = host(memory, region.start_addr().0).cast();
        // SAFETY: a whole live mapping; the tests do not access it while it is not allowed.
        let result = unsafe { libc::mprotect(address, region.len() as usize, protection) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }
}

fn host(memory: &GuestMemoryMmap, gpa: u64) -> *mut u8 {
    memory.get_host_address(GuestAddress(gpa)).expect("mapped")
}
