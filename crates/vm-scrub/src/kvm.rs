//! A lease's regions as memslots of a KVM virtual machine, and the proof that they are gone.

use crate::embedder::in_drop;
use crate::lease::{Lease, Quiesced, Registrations};
use crate::pool::LeaseId;
use crate::sys::{Call, fault};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use std::fmt;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

/// The memslots of one lease on one virtual machine.
///
/// `V` is how the machine is held: `&VmFd`, `Arc<VmFd>`, or anything else that leads to it. While this value exists the
/// lease cannot be torn down. Dropping it deletes the memslots as well, but gives no [`Quiesced`].
///
/// To register takes the lease, and to tear it down takes it away, so neither can come while the other is going on:
///
/// ```compile_fail,E0382
/// # use vm_scrub::{Lease, Quiesced, kvm::Memslots};
/// # fn late(vm: &kvm_ioctls::VmFd, lease: Lease, quiesced: Quiesced) {
/// let receipt = lease.teardown(quiesced);
/// let memslots = Memslots::register(vm, &lease);
/// # }
/// ```
#[must_use = "dropping it deletes the memslots"]
pub struct Memslots<V: Deref<Target = VmFd>> {
    vm: V,
    /// The machine's file descriptor. What `vm` leads to is for the embedder's code to say, each time it is asked; memslots
    /// are deleted where they were registered or not at all.
    machine: RawFd,
    lease: LeaseId,
    registrations: Arc<Registrations>,
    /// Slot number and guest address of each memslot that is registered.
    slots: Vec<(u32, u64)>,
}

/// How memslots are registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct MemslotOptions {
    first_slot: u32,
    log_dirty_pages: bool,
}

impl MemslotOptions {
    /// Slots from number 0, without a dirty log.
    pub fn new() -> Self {
        Self::default()
    }

    /// The number of the first region's slot; the others follow. For machines that have memslots of their own.
    #[must_use]
    pub fn first_slot(mut self, slot: u32) -> Self {
        self.first_slot = slot;
        self
    }

    /// Whether KVM logs which pages the guest writes (`KVM_MEM_LOG_DIRTY_PAGES`), for live migration. The log never decides
    /// what is scrubbed.
    #[must_use]
    pub fn log_dirty_pages(mut self, log: bool) -> Self {
        self.log_dirty_pages = log;
        self
    }
}

/// Why a lease's regions could not be registered. None of them is by this call.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The slot numbers do not fit into 32 bits.
    #[error(
        "{regions} regions from slot {first_slot} on do not fit into 32-bit slot numbers: begin with a lower slot"
    )]
    SlotNumbers {
        /// The first slot that was asked for.
        first_slot: u32,
        /// How many regions there are.
        regions: usize,
    },
    /// The slot shows this region of the lease already. KVM takes the same memslot twice without a word, and then deletes it
    /// once.
    #[error(
        "memslot {slot} of this machine is registered for {lease} already: use the `Memslots` of the first registration"
    )]
    Registered {
        /// The lease.
        lease: LeaseId,
        /// The slot's number.
        slot: u32,
    },
    /// KVM refused a memslot.
    #[error(
        "KVM refused memslot {slot} with {bytes:#x} bytes at guest address {guest_address:#x} ({source}): EEXIST means that \
         another slot has these guest addresses, EINVAL that the slot is in use with another size or its number is too high; \
         `register_with` and `MemslotOptions::first_slot` choose other slots"
    )]
    Refused {
        /// The slot's number.
        slot: u32,
        /// Where the region begins in guest physical memory.
        guest_address: u64,
        /// Its length in bytes.
        bytes: u64,
        /// What KVM answered.
        r#source: io::Error,
    },
}

/// Why memslots could not be deleted. Those before it are; the lease cannot be torn down while one is left.
#[derive(Debug, thiserror::Error)]
#[error(
    "KVM did not delete memslot {slot} of {lease} ({source}): stop the vCPUs and call `remove` again"
)]
#[non_exhaustive]
pub struct RemoveError {
    /// The lease whose memory the slot shows.
    pub lease: LeaseId,
    /// The slot that KVM did not delete.
    pub slot: u32,
    /// What KVM answered.
    pub r#source: io::Error,
}

impl<V: Deref<Target = VmFd>> Memslots<V> {
    /// Registers the regions of `lease` with `vm`: one memslot each, from slot 0.
    ///
    /// # Errors
    ///
    /// [`RegisterError`] if KVM refuses one of them; those before it are deleted again.
    pub fn register(vm: V, lease: &Lease) -> Result<Self, RegisterError> {
        Self::register_with(vm, lease, MemslotOptions::new())
    }

    /// The same as [`Memslots::register`], with a choice of slot numbers and of the dirty log.
    ///
    /// # Errors
    ///
    /// As for [`Memslots::register`].
    pub fn register_with(
        vm: V,
        lease: &Lease,
        options: MemslotOptions,
    ) -> Result<Self, RegisterError> {
        let first_slot = options.first_slot;
        let regions = lease.guest_regions().len();
        if u32::try_from(regions)
            .ok()
            .and_then(|regions| first_slot.checked_add(regions))
            .is_none()
        {
            return Err(RegisterError::SlotNumbers {
                first_slot,
                regions,
            });
        }
        let mut memslots = Self {
            machine: vm.as_raw_fd(),
            vm,
            lease: lease.id(),
            registrations: Arc::clone(lease.registrations()),
            slots: Vec::with_capacity(regions),
        };
        for (slot, (region, host)) in (first_slot..).zip(lease.windows()) {
            // Counted before the kernel knows it: a teardown that sees no memslots must be right.
            if !memslots.registrations.add(memslots.machine, slot) {
                let lease = memslots.lease;
                return Err(RegisterError::Registered { lease, slot });
            }
            let added = fault::check(Call::MemslotAdd)
                .map_err(|error| error.source)
                .and_then(|()| memslots.machine())
                .and_then(|vm| {
                    let entry = kvm_userspace_memory_region {
                        slot,
                        flags: if options.log_dirty_pages {
                            KVM_MEM_LOG_DIRTY_PAGES
                        } else {
                            0
                        },
                        guest_phys_addr: region.guest_address,
                        memory_size: region.bytes,
                        userspace_addr: host.0.expose_provenance() as u64,
                    };
                    // SAFETY: the window is mapped over its whole length and belongs to the lease, which refuses teardown
                    // while this registration is counted and leaves the window mapped if it is dropped.
                    unsafe { vm.set_user_memory_region(entry) }.map_err(into_io)
                });
            match added {
                Ok(()) => {
                    memslots.registrations.taken();
                    memslots.slots.push((slot, region.guest_address));
                }
                Err(source) => {
                    memslots.registrations.remove(memslots.machine, slot);
                    return Err(RegisterError::Refused {
                        slot,
                        guest_address: region.guest_address,
                        bytes: region.bytes,
                        source,
                    });
                }
            }
        }
        Ok(memslots)
    }

    /// Deletes the memslots. From then on no vCPU of the machine reaches the lease's memory: KVM has waited for those that
    /// were about to.
    ///
    /// # Errors
    ///
    /// [`RemoveError`] if KVM does not delete one of them. It can be tried again.
    pub fn remove(&mut self) -> Result<Quiesced, RemoveError> {
        let lease = self.lease;
        self.delete().map_err(|(slot, source)| RemoveError {
            lease,
            slot,
            source,
        })?;
        Ok(Quiesced::of(lease))
    }

    /// The machine, if `vm` still leads to it.
    fn machine(&self) -> io::Result<&VmFd> {
        let vm: &VmFd = &self.vm;
        if vm.as_raw_fd() == self.machine {
            Ok(vm)
        } else {
            Err(io::Error::other("this is another machine now"))
        }
    }

    fn delete(&mut self) -> Result<(), (u32, io::Error)> {
        while let Some(&(slot, guest_phys_addr)) = self.slots.last() {
            fault::check(Call::MemslotDelete).map_err(|error| (slot, error.source))?;
            let entry = kvm_userspace_memory_region {
                slot,
                guest_phys_addr,
                // What deletes a memslot.
                memory_size: 0,
                userspace_addr: 0,
                flags: 0,
            };
            let vm = self.machine().map_err(|error| (slot, error))?;
            // SAFETY: a memslot of no size gives the guest no memory.
            unsafe { vm.set_user_memory_region(entry) }.map_err(|error| (slot, into_io(error)))?;
            self.slots.pop();
            self.registrations.remove(self.machine, slot);
        }
        Ok(())
    }
}

fn into_io(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

impl<V: Deref<Target = VmFd>> Drop for Memslots<V> {
    fn drop(&mut self) {
        if let Err((slot, error)) = self.delete() {
            in_drop(|| {
                log::error!(
                    "memslot {slot} of {} is not deleted and keeps it from being torn down: {error}",
                    self.lease
                );
            });
        }
    }
}

impl<V: Deref<Target = VmFd>> fmt::Debug for Memslots<V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memslots")
            .field("lease", &self.lease)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}
