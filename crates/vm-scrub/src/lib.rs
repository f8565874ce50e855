//! Scrubs a guest's memory when the guest goes, and proves it, before another guest gets it.
//!
//! A virtual machine monitor leases each guest's memory from a [`Pool`]. When the guest goes, the lease is torn down: the
//! memory is taken away from every address through which the guest and its devices reached it, every byte that can hold
//! data is set to zero and read back, and only then is it leased again. Each teardown leaves a [`ScrubReceipt`] in which
//! every byte of the guest is accounted for.
//!
#![cfg_attr(feature = "kvm", doc = "```no_run")]
#![cfg_attr(not(feature = "kvm"), doc = "```ignore")]
//! use kvm_ioctls::Kvm;
//! use vm_memory::GuestAddress;
//! use vm_scrub::{Pool, kvm::Memslots};
//!
//! let pool = Pool::builder().capacity(8 << 30).build()?;
//! let vm = Kvm::new()?.create_vm()?;
//!
//! let lease = pool.lease(&[(GuestAddress(0), 3 << 30), (GuestAddress(4 << 30), 1 << 30)])?;
//! let memory = lease.memory();
//! let mut memslots = Memslots::register(&vm, &lease)?;
//! // ... the guest runs, and is stopped ...
//! drop(memory);
//! let quiesced = memslots.remove()?;
//! let receipt = lease.teardown(quiesced)?;
//! assert!(receipt.is_proven());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is promised
//!
//! - **Zero at the start.** Every byte of a lease is zero when the lease is made.
//! - **Nothing unproven is leased.** Memory enters the free list only out of verification: the steps are types, and
//!   'recycled but not verified' does not compile (see [`lease::teardown`]). What cannot be proven clean is quarantined,
//!   counted, and not leased again ([`Pool::withheld`] has the exceptions). So is memory whose lease was dropped or lost in a panic, unless it is certain that
//!   the guest is stopped; then it is torn down on the spot. A lease that is forgotten stays leased.
//! - **Out of reach first.** Before the first zero is written the guest's address window no longer leads to the memory, in
//!   one step of the kernel: a late vCPU, device thread or forgotten pointer faults, and does not meet the next guest.
//! - **Not while in use.** A lease with registered memslots, or of whose guest memory a handle is alive, is not torn down;
//!   the error hands it back.
//! - **Shared memory is never leased again.** The memory of a [shareable](LeaseOptions::shareable) lease, which other processes
//!   have too, is zeroed, sealed against writing by anybody, read back, and given to the kernel; other memory takes its place. While
//!   another process can still write to it, it is quarantined, and tried again later. A process that keeps the descriptor, or a
//!   mapping that can only be read, reads zeros and never another guest's bytes.
//! - **Every byte accounted for.** `scrubbed + never populated + quarantined = leased` in each receipt, and
//!   `clean + leased + dirty + quarantined = capacity` in the pool, at any moment.
//! - **Not optimised away.** The compiler can remove neither the zeros nor the reading back.
//! - **No panics** on any input.
//!
//! # What is not promised
//!
//! - **Copies elsewhere.** Registers, CPU caches of other kinds than data, swap, pages that the kernel migrated, the page
//!   cache, and whatever devices or the VMM copied out of guest memory are not found. Do not swap; keep KSM off.
//! - **DMA, everywhere.** Moving pages away does not unpin them. Pages that are pinned, or shared with another process, when they
//!   are taken away are found and quarantined where the receipt says [`Revocation::Move`] (4 KiB and whole transparent huge
//!   pages, from Linux 6.8 on) or [`Revocation::Sealed`] (shareable leases). Elsewhere, that no device still writes is the VMM's word, part of the [`Quiesced`] statement.
//! - **Back-ends that mean harm.** A process that was given shareable memory can keep it in quarantine for as long as it likes
//!   (by a mapping) or for good (by a write at the last moment, or a seal of its own), and can kill the VMM by punching holes
//!   into memory that the host cannot supply again. It does not reach other guests' memory.
//! - **Power-off and cold-boot attacks**, rowhammer, and side channels.
//! - **Verification reads what the next guest would read**, through the caches ([`Verify::Full`]); broken memory chips that
//!   lose zeros later are not found.
//! - **The VMM itself is trusted.** Code in this process that writes into the pool's private arena through a wild pointer is
//!   not kept out.
//!
//! # Features
//!
//! | feature | on by default | adds |
//! |---|---|---|
//! | `kvm` | yes | [`kvm`]: memslots and the proof that they are gone; turns on `vm-memory` |
//! | `vm-memory` | with `kvm` | [`Pool`], [`Lease`] and everything about them |
//! | `rayon` | yes | scrubbing with several threads |
//! | `serde` | no | receipts and accounts can be serialised |
//! | `test-support` | no | ways to break the scrubber on purpose, for this project's own tests: not for production |
//!
//! Without any, the crate is the scrubber alone, on libc and log: [`scrub`] and [`scrub_raw`], for memory that something else
//! allocated.
//!
//! # Hosts
//!
//! Linux 5.10 and later with 4 KiB pages, on x86_64, with glibc or musl. aarch64 is written for; its unit tests pass under emulation,
//! and nothing was run on hardware yet. What newer kernels have is used where it is there, and the log says what is done
//! instead where it is not: `UFFDIO_MOVE` (Linux 6.8), or `mremap` without the proof that nothing is pinned; `MADV_POPULATE_WRITE` (5.14), or the kernel touches each page (`FUTEX_WAKE_OP`); `PAGEMAP_SCAN`
//! (6.7), or the pagemap is read; `PROCMAP_QUERY` (6.11), or `/proc/self/maps` is read.

#![cfg_attr(
    not(feature = "kvm"),
    allow(
        rustdoc::broken_intra_doc_links,
        reason = "this page speaks of all features"
    )
)]

pub mod arch;
#[cfg(feature = "vm-memory")]
mod backing;
mod embedder;
#[cfg(feature = "kvm")]
pub mod kvm;
#[cfg(feature = "vm-memory")]
pub mod lease;
pub mod memory_errors;
#[cfg(all(test, loom, feature = "vm-memory"))]
mod models;
#[cfg(feature = "vm-memory")]
pub mod pool;
#[cfg_attr(
    not(feature = "vm-memory"),
    expect(
        dead_code,
        unused_imports,
        reason = "parts of the engine serve pools only"
    )
)]
mod scrub;
#[cfg_attr(
    not(feature = "vm-memory"),
    expect(unused_imports, reason = "only pools wait and have threads")
)]
mod sync;
#[cfg_attr(
    not(feature = "vm-memory"),
    expect(dead_code, reason = "some system calls serve pools only")
)]
mod sys;
#[cfg(any(test, feature = "test-support"))]
pub mod test_support;

/// The granularity, in bytes, at which a pool hands out memory, and the alignment of everything that can be huge:
/// the size of a huge page on x86_64, and on aarch64 with 4 KiB base pages.
pub const BLOCK_SIZE: u64 = 2 << 20;

pub use scrub::{
    Calibration, Operation, Policy, Rate, ScrubError, Scrubbed, Verify, calibration, scrub,
    scrub_raw,
};
pub use sys::{Call as SysCall, Error as SysError};
#[cfg(feature = "vm-memory")]
pub use {
    backing::{Revocation, RevokeBy},
    lease::{
        GuestRegion, Lease, LeaseError, LeaseOptions, Quiesced, ScrubReceipt, TeardownError, Ticket,
    },
    pool::{
        Accounts, Extent, LeaseId, PageSize, Pool, PoolBuilder, PoolError, Priority, Progress,
        ScrubRate, Withheld,
    },
};

/// The examples in the README, compiled.
#[cfg(all(doctest, feature = "kvm"))]
#[doc = include_str!("../../../README.md")]
struct Readme;
