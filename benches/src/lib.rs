//! What the benches share: a lease that was used, memory that was not, and how much of either.
//!
//! These benches are for working on the code: small, quick, each by itself, compared with the last run by criterion. What
//! vm-scrub is compared with, and the figures that are published, come from `vm-scrub bench`.

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use vm_memory::GuestAddress;
use vm_scrub::{Lease, PageSize, Policy, Pool, Quiesced, ScrubReceipt, Verify};

/// Guest memory, in bytes: larger than most caches, small enough for short runs.
pub const MEMORY: usize = 64 << 20;

/// What a guest leaves behind.
const DIRT: u8 = 0xa5;

/// A pool of [`MEMORY`] bytes.
///
/// # Panics
///
/// If the host has no such memory.
pub fn pool(page_size: PageSize, verify: Verify, threads: usize, populate: bool) -> Pool {
    Pool::builder()
        .capacity(MEMORY as u64)
        .page_size(page_size)
        .policy(Policy::new().verify(verify))
        .threads(threads)
        .populate(populate)
        .build()
        .expect("memory for a small pool")
}

/// A lease of all of `pool`, of which the first `touched` bytes were written.
///
/// # Panics
///
/// If the pool is in use.
pub fn used_lease(pool: &Pool, touched: usize) -> Lease {
    let lease = pool
        .lease(&[(GuestAddress(0), pool.capacity())])
        .expect("nothing else is leased");
    for (region, start) in lease.host_addresses() {
        let len = touched.min(region.bytes as usize);
        // SAFETY: the lease's own memory, mapped writable over the region's length; nobody else has it.
        unsafe { start.write_bytes(DIRT, len) };
    }
    lease
}

/// Tears down a lease that nobody uses.
///
/// # Panics
///
/// If a byte of it was quarantined.
pub fn teardown(lease: Lease) -> ScrubReceipt {
    // SAFETY: the benches give no guest and no device this memory.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    let receipt = lease.teardown(quiesced).expect("nobody holds it");
    assert_eq!(receipt.bytes_quarantined, 0);
    receipt
}

/// A workload that needs its cache: it follows pointers through a buffer that fits into the second level.
#[derive(Debug)]
pub struct Neighbour {
    /// Where to go from each place; one circle through all of them.
    next: Vec<u32>,
    at: u32,
}

impl Neighbour {
    /// Words in 256 KiB.
    const WORDS: u32 = 64 << 10;

    /// Lays a pseudo-random circle through the buffer, the same each time.
    pub fn new() -> Self {
        let mut next: Vec<u32> = (0..Self::WORDS).collect();
        let mut random = 1_u64;
        // Sattolo's algorithm: swapping each with an earlier one, never itself, leaves a single circle.
        for last in (1..next.len()).rev() {
            // The multiplier of Knuth's MMIX; its upper bits are the random ones.
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            next.swap(last, (random >> 33) as usize % last);
        }
        Self { next, at: 0 }
    }

    /// Follows the pointers once through a quarter of the buffer.
    pub fn work(&mut self) {
        for _ in 0..Self::WORDS / 4 {
            self.at = self.next[self.at as usize];
        }
        std::hint::black_box(self.at);
    }
}

impl Default for Neighbour {
    fn default() -> Self {
        Self::new()
    }
}

/// An embedder's own private mapping of [`MEMORY`] bytes, in 4 KiB pages.
#[derive(Debug)]
pub struct OwnMemory(NonNull<c_void>);

impl OwnMemory {
    /// Maps it. Nothing is populated.
    ///
    /// # Panics
    ///
    /// If the host has no address space for it.
    pub fn map() -> Self {
        let len = const { NonZeroUsize::new(MEMORY).expect("not zero") };
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses the place; nothing that exists is changed.
        let start = unsafe { mmap_anonymous(None, len, protection, MapFlags::MAP_PRIVATE) };
        let memory = Self(start.expect("address space"));
        memory.advise(MmapAdvise::MADV_NOHUGEPAGE);
        memory
    }

    /// The memory.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped over this length, initialised by the kernel, and only reachable through `self`.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_ptr().cast(), MEMORY) }
    }

    /// Gives all pages back to the kernel; then the first `touched` bytes are written.
    pub fn use_anew(&mut self, touched: usize) {
        self.advise(MmapAdvise::MADV_DONTNEED);
        self.bytes()[..touched].fill(DIRT);
    }

    fn advise(&self, advice: MmapAdvise) {
        // SAFETY: this value's own mapping, of which no slice is borrowed; both kinds of advice leave it mapped.
        let advised = unsafe { madvise(self.0, MEMORY, advice) };
        // A kernel without huge pages has none to switch off.
        if advice == MmapAdvise::MADV_DONTNEED {
            advised.expect("private anonymous memory can be discarded");
        }
    }
}

impl Drop for OwnMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by `map`; slices borrow `self` and are gone.
        let _ = unsafe { munmap(self.0, MEMORY) };
    }
}
