//! One guest of the demonstration, on KVM or with threads: what an embedder's code around a lease looks like.

use super::secrets;
use anyhow::Context;
use kvm_ioctls::VmFd;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;
use vm_scrub::kvm::Memslots;
use vm_scrub::{Lease, Quiesced};
use vm_scrub_vmm::{Guest, Machine, Scan, StrayDevice, ThreadGuest, write_packets};

/// What runs a guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum GuestKind {
    /// A virtual machine with vCPUs.
    Kvm,
    /// Threads of this process, where there is no KVM.
    Threads,
}

/// What holds the leased memory while the guest runs.
enum Runner {
    Kvm {
        memslots: Memslots<Arc<VmFd>>,
        machine: Machine,
    },
    Threads(ThreadGuest),
}

/// A guest with its memory.
pub(crate) struct RunningGuest {
    // In the order in which they must go where an error drops them: the memslots are deleted while the machine is there,
    // and when the lease goes nobody has its memory.
    runner: Runner,
    memory: GuestMemoryMmap,
    ranges: Vec<(u64, u64)>,
    lease: Lease,
}

impl RunningGuest {
    /// Makes a guest of `vcpus` vCPUs in the memory of `lease`.
    pub(crate) fn boot(kind: GuestKind, vcpus: usize, lease: Lease) -> anyhow::Result<Self> {
        let memory = lease.memory();
        let runner = match kind {
            GuestKind::Kvm => {
                let machine = Machine::new(vcpus)?;
                let memslots = Memslots::register(Arc::clone(machine.vm()), &lease)?;
                Runner::Kvm { machine, memslots }
            }
            GuestKind::Threads => Runner::Threads(ThreadGuest::new(memory.clone(), vcpus)?),
        };
        let ranges = lease
            .guest_regions()
            .map(|region| (region.guest_address, region.bytes))
            .collect();
        Ok(Self {
            runner,
            memory,
            ranges,
            lease,
        })
    }

    fn guest(&self) -> &dyn Guest {
        match &self.runner {
            Runner::Kvm { machine, .. } => machine,
            Runner::Threads(threads) => threads,
        }
    }

    /// Guest number `number` reads every byte of its memory, before it has written any.
    pub(crate) fn look_for_leftovers(&self, number: u32, limit: Duration) -> anyhow::Result<Scan> {
        let found = self
            .guest()
            .scan(&self.ranges, limit)
            .with_context(|| format!("guest-{number} could not read its memory"))?;
        // A guest that had read less could not say that nothing leaked.
        anyhow::ensure!(
            found.bytes_read == self.lease.bytes(),
            "guest-{number} read {} bytes of {}",
            found.bytes_read,
            self.lease.bytes()
        );
        Ok(found)
    }

    /// Guest number `number` fills its memory with its secret, and a device writes another into it. Returns how many bytes
    /// of secrets the VMM then finds through vm-memory.
    pub(crate) fn fill_with_secrets(&self, number: u32, limit: Duration) -> anyhow::Result<u64> {
        let (guest, device) = (secrets::of_guest(number), secrets::of_device(number));
        self.guest()
            .fill(&self.ranges, guest, limit)
            .with_context(|| format!("guest-{number} could not fill its memory"))?;
        write_packets(&self.memory, device)?;
        let eyes = ThreadGuest::new(self.memory.clone(), 1)?;
        Ok(eyes.count(&self.ranges, guest, limit)? + eyes.count(&self.ranges, device, limit)?)
    }

    /// Starts a device that takes host pointers to the beginning and the end of the memory and never lets go of them.
    ///
    /// # Safety
    ///
    /// As for [`StrayDevice::start`].
    pub(crate) unsafe fn start_stray_device(&self) -> anyhow::Result<StrayDevice> {
        let buffers: Vec<(u64, u64)> = self
            .ranges
            .iter()
            .flat_map(|&(start, bytes)| [(start, 4096), (start + bytes - 4096, 4096)])
            .collect();
        // SAFETY: passed on to the caller.
        Ok(unsafe { StrayDevice::start(&self.memory, &buffers, secrets::OF_STRAY_DEVICE) }?)
    }

    /// Stops the guest and lets go of its memory: what teardown asks for.
    pub(crate) fn stop(self) -> anyhow::Result<(Lease, Quiesced)> {
        // Every handle to the memory goes first; teardown is refused while one is left.
        drop(self.memory);
        let quiesced = match self.runner {
            Runner::Kvm {
                machine,
                mut memslots,
            } => {
                let quiesced = memslots.remove()?;
                drop(machine);
                quiesced
            }
            Runner::Threads(threads) => {
                drop(threads);
                // SAFETY: the guest's threads ended with each of its jobs. What a stray device still has are addresses of
                // the lease's windows, which fault after revocation.
                unsafe { Quiesced::assert(&self.lease) }
            }
        };
        Ok((self.lease, quiesced))
    }
}
