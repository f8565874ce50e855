//! The guest's firmware: its code, its page tables and one mailbox per vCPU, in a small memslot of the monitor's own.
//!
//! It is kept apart from RAM for the sake of the tests: a guest that had to spare its own code and page tables could
//! not fill every byte of its RAM, and RAM that is taken away would take the code with it. With its code in place, a
//! guest that loses its memory stops at its next access to that memory and not for some other reason.

use std::ops::Range;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

use crate::arch;
use crate::error::Error;
use crate::ranges::WORD;

/// Guest-physical addresses where there can be no RAM: the firmware (2 MiB), then 2 MiB for the pages that KVM itself
/// needs on Intel processors. The last 4 MiB below 4 GiB are no RAM on real machines either.
pub const RESERVED: Range<u64> = 0xFFC0_0000..0x1_0000_0000;

/// The memslot number of the firmware. RAM can have all numbers below.
pub const FIRMWARE_SLOT: u32 = 64;

/// The most vCPUs a [`crate::Machine`] can have: each has a page for its mailbox.
pub const MAX_VCPUS: usize = 256;

/// The most ranges one vCPU can work on in one run.
pub const MAX_RANGES: usize = ((MAILBOX_BYTES - MAILBOX_TABLE) / RANGE_BYTES) as usize;

/// Size of the firmware's memslot: 2 MiB.
const FIRMWARE_BYTES: usize = 0x20_0000;

/// Code stands at the very beginning, and the page tables between it and the mailboxes (see [`arch`]).
const CODE: u64 = 0;
const MAILBOXES: u64 = 0x10_0000;
const MAILBOX_BYTES: u64 = 4096;

/// In a mailbox: a word that counts finished passes, then the ranges to work on (address, number of words).
const MAILBOX_PASSES: u64 = 0;
const MAILBOX_TABLE: u64 = 16;
const RANGE_BYTES: u64 = 16;

/// The firmware's memory on the host. The guest can write to it; nothing on the host believes what stands in it.
#[derive(Debug)]
pub(crate) struct Firmware {
    memory: MmapRegion,
}

/// Where a vCPU finds its mailbox, as guest-physical addresses.
#[derive(Debug, Clone)]
pub(crate) struct Mailbox {
    /// The word that counts finished passes.
    pub(crate) passes: u64,
    /// The ranges to work on.
    pub(crate) table: Range<u64>,
}

impl Firmware {
    /// Maps the firmware and writes code and page tables to it.
    pub(crate) fn new() -> Result<Self, Error> {
        let memory =
            MmapRegion::new(FIRMWARE_BYTES).map_err(|error| Error::Firmware(error.to_string()))?;
        let firmware = Self { memory };
        firmware.write(CODE, arch::code())?;
        arch::write_tables(&firmware)?;
        Ok(firmware)
    }

    /// Makes the firmware visible to the guest.
    ///
    /// # Safety
    ///
    /// `self` must outlive every run of `vm`'s vCPUs.
    pub(crate) unsafe fn register(&self, vm: &VmFd) -> Result<(), Error> {
        let region = kvm_userspace_memory_region {
            slot: FIRMWARE_SLOT,
            flags: 0,
            guest_phys_addr: RESERVED.start,
            memory_size: self.memory.size() as u64,
            userspace_addr: self.memory.as_ptr() as u64,
        };
        // SAFETY: address and size are those of a live private mapping that only volatile accesses are made to; the
        // caller keeps it alive while a vCPU runs.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(Error::kvm("register the firmware's memslot"))
    }

    /// Writes `bytes` at `offset` from the firmware's beginning.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        self.memory
            .as_volatile_slice()
            .write_slice(bytes, offset as usize)
            .map_err(|error| Error::Firmware(error.to_string()))
    }

    /// Writes the ranges that vCPU `vcpu` shall work on, and sets its count of passes to zero.
    pub(crate) fn post(&self, vcpu: usize, ranges: &[(u64, u64)]) -> Result<Mailbox, Error> {
        if ranges.len() > MAX_RANGES {
            return Err(Error::TooManyRanges {
                given: ranges.len(),
                max: MAX_RANGES,
            });
        }
        let mailbox = MAILBOXES + vcpu as u64 * MAILBOX_BYTES;
        let table: Vec<u8> = ranges
            .iter()
            .flat_map(|&(gpa, bytes)| [gpa, bytes / WORD])
            .flat_map(u64::to_le_bytes)
            .collect();
        self.write(mailbox + MAILBOX_TABLE, &table)?;
        self.write(mailbox + MAILBOX_PASSES, &[0; 8])?;
        let first = RESERVED.start + mailbox + MAILBOX_TABLE;
        Ok(Mailbox {
            passes: RESERVED.start + mailbox + MAILBOX_PASSES,
            table: first..first + table.len() as u64,
        })
    }

    /// How often vCPU `vcpu` has been through its ranges, as the guest says.
    pub(crate) fn passes(&self, vcpu: usize) -> Result<u64, Error> {
        let mailbox = MAILBOXES + vcpu as u64 * MAILBOX_BYTES;
        self.memory
            .as_volatile_slice()
            .read_obj((mailbox + MAILBOX_PASSES) as usize)
            .map_err(|error| Error::Firmware(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_mailbox_stays_in_its_page_and_a_fuller_one_is_refused() {
        let Ok(firmware) = Firmware::new() else {
            return;
        };
        let ranges = vec![(0x1000, 0x2000); MAX_RANGES + 1];
        let mailbox = firmware.post(MAX_VCPUS - 1, &ranges[1..]).expect("fits");
        assert_eq!(mailbox.table.end, RESERVED.start + FIRMWARE_BYTES as u64);
        assert!(matches!(
            firmware.post(0, &ranges),
            Err(Error::TooManyRanges {
                given: 256,
                max: 255
            })
        ));
    }

    #[test]
    fn passes_are_counted_from_the_start_of_a_run() {
        let Ok(firmware) = Firmware::new() else {
            return;
        };
        let left = MAILBOXES + MAILBOX_BYTES + MAILBOX_PASSES;
        firmware
            .write(left, &[7, 0, 0, 0, 0, 0, 0, 0])
            .expect("written");
        assert_eq!(firmware.passes(1).expect("read"), 7);
        firmware.post(1, &[(0, 8)]).expect("posted");
        assert_eq!(firmware.passes(1).expect("read"), 0);
    }
}
