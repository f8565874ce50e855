//! The smallest virtual machine monitor that can show what vm-scrub is for.
//!
//! Its guests fill their memory with secrets, look for the secrets of whoever had the memory before, and misbehave:
//! they keep writing while they are torn down, never exit, or come back afterwards. The demonstration and the
//! integration tests run on it, and it is meant to be read as an example by those who embed vm-scrub in a monitor of
//! their own. It boots no operating system: a guest is a few dozen instructions.
//!
//! - [`Machine`] is a KVM virtual machine. The embedder registers RAM on [`Machine::vm`]; the guest's own code and page
//!   tables live in a memslot of their own just below 4 GiB ([`RESERVED`]), so a guest can fill *every* byte of its
//!   RAM.
//! - [`RunningGuest`] is a guest that keeps writing in the background, to be stopped, or to lose its memory.
//! - [`ThreadGuest`] does the same work with threads, for hosts without `/dev/kvm`.
//! - [`write_packets`] is a device that behaves; [`StrayDevice`] is one that does not.
//! - [`HugePages`] borrows huge pages from the host and gives them back.
//!
//! RAM is named by `(guest-physical address, length)`, both in bytes and multiples of [`WORD`]. Every run has a time
//! limit; running out of it is [`Error::TimedOut`], never a hang. vCPU threads are interrupted with [`KICK_SIGNAL`].
//!
//! ```no_run
//! use std::time::Duration;
//! use vm_scrub_vmm::{Guest, Machine};
//!
//! let machine = Machine::new(2)?;
//! // ... register the RAM of a lease on machine.vm() ...
//! let ram = [(0, 64 << 20)];
//! let limit = Duration::from_secs(10);
//! let found = machine.scan(&ram, limit)?;
//! assert_eq!(found.nonzero_bytes, 0, "{:?}", found.first_nonzero);
//! machine.fill(&ram, 0x5ec4_e75e_c4e7_5ec4, limit)?;
//! # Ok::<(), vm_scrub_vmm::Error>(())
//! ```

#[cfg_attr(target_arch = "x86_64", path = "x86_64/mod.rs")]
#[cfg_attr(not(target_arch = "x86_64"), path = "no_guest.rs")]
mod arch;
mod device;
mod error;
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "what only a guest reads, and there is none")
)]
mod firmware;
mod guest;
mod hugepages;
mod kick;
mod kvm;
mod machine;
mod ranges;
mod running;
mod stray_device;
mod threads;
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(dead_code, reason = "what only a guest reads, and there is none")
)]
mod vcpu;
mod vcpu_thread;

pub use device::{PACKET_BYTES, write_packets};
pub use error::Error;
pub use firmware::{FIRMWARE_SLOT, MAX_RANGES, MAX_VCPUS, RESERVED};
pub use guest::{Guest, NonzeroWord, Scan};
pub use hugepages::{HugePages, memory_available};
pub use kick::KICK_SIGNAL;
pub use kvm::kvm_usable;
pub use machine::{Machine, Touch};
pub use ranges::{ADDRESS_LIMIT, WORD, check_ranges};
pub use running::RunningGuest;
pub use stray_device::{Deliveries, StrayDevice};
pub use threads::ThreadGuest;
pub use vcpu::VcpuStop;
