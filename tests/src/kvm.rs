//! KVM guests for tests: a lease, a machine whose RAM it is, and the end of both.
//!
//! Every run of a guest has a time limit, and every test another one above it: a guest that hangs, or a system call that
//! never returns, ends the test process with a message instead of hanging it.

use std::io::{Write, stderr};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use kvm_ioctls::VmFd;
use vm_scrub::kvm::{MemslotOptions, Memslots};
use vm_scrub::lease::Refusal;
use vm_scrub::{Lease, PageSize, Quiesced, ScrubReceipt, TeardownError};
use vm_scrub_vmm::{Guest, Machine, Touch, kvm_usable};

use crate::assert_adds_up;

/// How long one run of a guest may take: enough for an emulated host, and an end for one that hangs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How long a whole test may take.
const TEST_LIMIT: Duration = Duration::from_secs(240);

/// 4 GiB, where guest memory goes on above the hole.
pub const ABOVE_HOLE: u64 = 4 << 30;

/// Runs a test of KVM guests in memory of these pages, or says that it is skipped and why.
pub fn run(page_size: PageSize, test: impl FnOnce(PageSize)) {
    if let Err(error) = kvm_usable() {
        return crate::skipped(&error);
    }
    let _watchdog = watchdog(TEST_LIMIT);
    test(page_size);
}

/// Ends the process if what is returned is not dropped within `limit`.
#[must_use = "the clock is stopped by dropping this"]
pub fn watchdog(limit: Duration) -> mpsc::Sender<()> {
    let name = crate::skip::name();
    let (alive, watched) = mpsc::channel();
    thread::spawn(move || {
        if watched.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            let _ = writeln!(stderr(), "\n{name} hangs: not over after {limit:?}");
            std::process::abort();
        }
    });
    alive
}

/// Makes three tests out of a function that takes a [`PageSize`]: one for each size, with the number of hugetlb pages it
/// needs at most. See [`run`].
#[macro_export]
macro_rules! kvm_on_every_page_size {
    ($($name:ident: $huge_pages:expr),+ $(,)?) => {$(
        mod $name {
            #[test]
            fn base_4k() {
                $crate::kvm::run(vm_scrub::PageSize::Base4K, super::$name);
            }

            #[test]
            fn transparent() {
                $crate::kvm::run(vm_scrub::PageSize::Transparent, super::$name);
            }

            #[test]
            fn huge_2m() {
                let test = concat!(stringify!($name), "::huge_2m");
                $crate::child::with_huge_pages(test, $huge_pages, || {
                    $crate::kvm::run(vm_scrub::PageSize::Huge2M, super::$name);
                });
            }
        }
    )+};
}

/// A word that guest number `number` fills its memory with: no byte of it is zero, and no two guests have the same.
pub fn secret(number: u64) -> u64 {
    // Each byte is at least 0x80, and has seven bits of the number.
    (0..8).fold(0, |word, byte| {
        word | ((number >> (7 * byte) & 0x7f) | 0x80) << (8 * byte)
    })
}

/// The number whose [`secret`] this word is, if it is one.
pub fn number_of(word: u64) -> Option<u64> {
    let number = (0..8).fold(0, |number, byte| {
        number | (word >> (8 * byte) & 0x7f) << (7 * byte)
    });
    (secret(number) == word).then_some(number)
}

/// The regions of a lease as guests take them: guest address and length in bytes.
pub fn ranges(lease: &Lease) -> Vec<(u64, u64)> {
    lease
        .guest_regions()
        .map(|region| (region.guest_address, region.bytes))
        .collect()
}

/// The first and the last word of every region: what a stray access would hit.
pub fn edges(ranges: &[(u64, u64)]) -> Vec<u64> {
    ranges
        .iter()
        .flat_map(|&(start, bytes)| [start, start + bytes - 8])
        .collect()
}

/// A machine whose RAM is a lease.
#[derive(Debug)]
pub struct Vm {
    /// The machine.
    pub machine: Machine,
    /// The lease's memslots on it.
    pub memslots: Memslots<Arc<VmFd>>,
    /// The memory.
    pub lease: Lease,
}

impl Vm {
    /// A new machine with `vcpus` vCPUs in the memory of `lease`.
    pub fn boot(lease: Lease, vcpus: usize) -> Self {
        Self::on(Machine::new(vcpus).expect("machine"), lease)
    }

    /// A machine there is already.
    pub fn on(machine: Machine, lease: Lease) -> Self {
        Self::with(machine, lease, MemslotOptions::new())
    }

    /// The same, with a choice of how memslots are registered.
    pub fn with(machine: Machine, lease: Lease, options: MemslotOptions) -> Self {
        let memslots = Memslots::register_with(Arc::clone(machine.vm()), &lease, options)
            .expect("memslots of a new lease");
        Self {
            machine,
            memslots,
            lease,
        }
    }

    /// All of its memory.
    pub fn ranges(&self) -> Vec<(u64, u64)> {
        ranges(&self.lease)
    }

    /// The guest reads every byte by its own code; panics if one is not zero.
    #[track_caller]
    pub fn assert_zero(&self) {
        let found = self.machine.scan(&self.ranges(), LIMIT).expect("scanned");
        assert_eq!(found.bytes_read, self.lease.bytes());
        assert_eq!(
            (found.nonzero_bytes, found.first_nonzero),
            (0, None),
            "{} in {:?}",
            self.lease.id(),
            self.lease.blocks()
        );
    }

    /// The guest writes every word by its own code.
    #[track_caller]
    pub fn fill(&self, secret: u64) {
        self.machine
            .fill(&self.ranges(), secret, LIMIT)
            .expect("filled");
    }

    /// How many bytes of `secret` the guest reads in its memory.
    #[track_caller]
    pub fn count(&self, secret: u64) -> u64 {
        self.machine
            .count(&self.ranges(), secret, LIMIT)
            .expect("counted")
    }

    /// Removes the memslots and tears the lease down. The machine is left, without RAM.
    #[track_caller]
    pub fn teardown(mut self) -> (ScrubReceipt, Machine) {
        let (id, bytes) = (self.lease.id(), self.lease.bytes());
        let blocks = self.lease.blocks().to_vec();
        let quiesced = self.memslots.remove().expect("memslots are deleted");
        let receipt = self
            .lease
            .teardown(quiesced)
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            (receipt.lease, receipt.bytes_total, &receipt.blocks),
            (id, bytes, &blocks)
        );
        assert_adds_up(&receipt);
        (receipt, self.machine)
    }
}

/// Panics if one of the machine's vCPUs can still write at one of these guest addresses.
#[track_caller]
pub fn assert_out_of_reach(machine: &Machine, addresses: &[u64]) {
    for &gpa in addresses {
        let touch = machine.touch(gpa, LIMIT).expect("the vCPU ran");
        assert!(
            matches!(&touch, Touch::Stopped(stop) if stop.lost_memory()),
            "a write to {gpa:#x}: {touch:?}"
        );
    }
}

/// Asks for a teardown that must be refused for this reason, and hands back what it was asked with.
#[track_caller]
pub fn refused(lease: Lease, quiesced: Quiesced, reason: Refusal) -> (Lease, Quiesced) {
    match lease.teardown(quiesced) {
        Err(TeardownError::Refused(refused)) => {
            assert_eq!(refused.reason, reason);
            (refused.lease, refused.quiesced)
        }
        other => panic!("{other:?}"),
    }
}
