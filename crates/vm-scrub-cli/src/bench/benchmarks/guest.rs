//! `guest`: a KVM guest writes all of its RAM for the first time, by its own code, in memory from a pool that was another
//! guest's before, and in memory that was mapped just now.
//!
//! The memslots are new in both, so that what KVM has to build for itself is built in both. What differs is whether the
//! kernel has to supply and zero each page while the guest waits.

use super::leased;
use super::{title, unless_hugetlb_is_missing};
use crate::bench::memory::{self, Mapping};
use crate::bench::row::Labels;
use crate::bench::settings::Settings;
use crate::bench::subject::{Built, Contender, Group, Plan, Subject};
use anyhow::{Context, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::GuestAddress;
use vm_scrub::kvm::Memslots;
use vm_scrub::{Lease, PageSize, Pool, RevokeBy, Verify};
use vm_scrub_vmm::{Guest, Machine, kvm_usable};

const FRESH: &str = "fresh-mmap";
const RECYCLED: &str = "recycled";

/// What the guest writes.
const WORD: u64 = u64::from_le_bytes(*b"guestRAM");

/// A guest that hangs must not hang the harness.
const LIMIT: Duration = Duration::from_secs(120);

pub(super) fn plans(settings: &Rc<Settings>) -> Vec<Plan> {
    let mut plans = Vec::new();
    for page_size in settings.page_sizes() {
        let settings = Rc::clone(settings);
        plans.push(Plan::new(title(settings.memory, page_size), move || {
            let built = build(&settings, page_size);
            unless_hugetlb_is_missing(&settings, page_size, built)
        }));
    }
    plans
}

fn build(settings: &Settings, page_size: PageSize) -> anyhow::Result<Built> {
    if let Err(error) = kvm_usable() {
        return Ok(Built::Skipped(error.to_string()));
    }
    let keep = memory::reserve(page_size, 2 * settings.memory)?;
    let labels = |name: &str, verify| Labels {
        name: name.into(),
        verify: Some(verify),
        page_size: Some(page_size),
        // One vCPU.
        threads: 1,
        bytes: settings.memory,
        ..Labels::default()
    };
    let recycled = Recycled::new(settings, page_size)?;
    let fresh = Fresh::new(settings.memory, page_size)?;
    Ok(Built::Ready(Group::new(
        vec![
            Contender::new(labels(RECYCLED, Verify::Full), recycled).against(FRESH),
            Contender::new(labels(FRESH, Verify::None), fresh).against(FRESH),
        ],
        keep,
    )))
}

/// RAM as PCs have it: from 0, and what does not fit below 3 GiB from 4 GiB on.
fn layout(memory: u64) -> Vec<(u64, u64)> {
    const BELOW: u64 = 3 << 30;
    const ABOVE: u64 = 4 << 30;
    let mut layout = vec![(0, memory.min(BELOW))];
    if memory > BELOW {
        layout.push((ABOVE, memory - BELOW));
    }
    layout
}

fn first_touch(machine: &Machine, layout: &[(u64, u64)]) -> anyhow::Result<()> {
    Ok(machine.fill(layout, WORD, LIMIT)?)
}

/// The guest sees what it has written, in all of its memory.
fn ensure_written(machine: &Machine, layout: &[(u64, u64)]) -> anyhow::Result<()> {
    let bytes: u64 = layout.iter().map(|region| region.1).sum();
    let found = machine.count(layout, WORD, LIMIT)?;
    ensure!(
        found == bytes,
        "the guest has written {found} bytes of {bytes}"
    );
    Ok(())
}

/// Memory from a pool; between two runs it is torn down and leased again.
struct Recycled {
    layout: Vec<(u64, u64)>,
    running: Option<(Lease, Memslots<Arc<VmFd>>)>,
    machine: Machine,
    pool: Pool,
}

impl Recycled {
    fn new(settings: &Settings, page_size: PageSize) -> anyhow::Result<Self> {
        Ok(Self {
            layout: layout(settings.memory),
            running: None,
            machine: Machine::new(1)?,
            pool: leased::pool(
                settings.memory,
                page_size,
                settings.threads,
                Verify::Full,
                true,
                RevokeBy::Automatic,
            )?,
        })
    }
}

impl Recycled {
    fn stop(&mut self) -> anyhow::Result<()> {
        if let Some((lease, mut memslots)) = self.running.take() {
            let receipt = lease.teardown(memslots.remove()?)?;
            ensure!(receipt.is_proven(), "a teardown was not proven");
        }
        Ok(())
    }
}

impl Drop for Recycled {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::warn!("the last teardown failed: {error:#}");
        }
    }
}

impl Subject for Recycled {
    fn prepare(&mut self) -> anyhow::Result<()> {
        self.stop()?;
        let regions: Vec<_> = self
            .layout
            .iter()
            .map(|&(start, bytes)| (GuestAddress(start), bytes))
            .collect();
        let lease = self.pool.lease(&regions)?;
        let memslots = Memslots::register(Arc::clone(self.machine.vm()), &lease)?;
        self.running = Some((lease, memslots));
        Ok(())
    }

    fn run(&mut self, _: u64) -> anyhow::Result<()> {
        first_touch(&self.machine, &self.layout)
    }

    fn check(&mut self) -> anyhow::Result<()> {
        ensure_written(&self.machine, &self.layout)
    }
}

/// Memory that is mapped anew before each run.
struct Fresh {
    layout: Vec<(u64, u64)>,
    registered: usize,
    // In this order: the virtual machine goes before its memory.
    machine: Machine,
    mapping: Mapping,
}

impl Fresh {
    fn new(memory: u64, page_size: PageSize) -> anyhow::Result<Self> {
        Ok(Self {
            layout: layout(memory),
            registered: 0,
            machine: Machine::new(1)?,
            mapping: Mapping::anonymous(usize::try_from(memory)?, page_size)?,
        })
    }

    /// Registers the first `count` regions, or deletes them if they are to have no memory.
    fn set_memslots(&mut self, count: usize, with_memory: bool) -> anyhow::Result<()> {
        let mut host = self.mapping.bytes().as_mut_ptr().expose_provenance() as u64;
        for (slot, &(guest_phys_addr, bytes)) in self.layout.iter().enumerate().take(count) {
            let region = kvm_userspace_memory_region {
                slot: u32::try_from(slot)?,
                flags: 0,
                guest_phys_addr,
                memory_size: if with_memory { bytes } else { 0 },
                userspace_addr: host,
            };
            // SAFETY: the memory is this contender's own mapping, which outlives the virtual machine and of which no slice is
            // borrowed while a vCPU runs; before it is mapped again the slot is deleted.
            unsafe { self.machine.vm().set_user_memory_region(region) }
                .with_context(|| format!("memslot {slot}"))?;
            host += bytes;
        }
        Ok(())
    }
}

impl Subject for Fresh {
    fn prepare(&mut self) -> anyhow::Result<()> {
        self.set_memslots(self.registered, false)?;
        self.registered = 0;
        self.mapping.map_again()?;
        self.registered = self.layout.len();
        self.set_memslots(self.registered, true)
    }

    fn run(&mut self, _: u64) -> anyhow::Result<()> {
        first_touch(&self.machine, &self.layout)
    }

    fn check(&mut self) -> anyhow::Result<()> {
        ensure_written(&self.machine, &self.layout)
    }
}
