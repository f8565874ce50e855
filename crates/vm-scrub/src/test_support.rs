//! Ways to break things on purpose: for demonstrations that the proof can fail, and for tests. Not for production.
//!
//! Behind the feature `test-support`, which nothing but this project's own command and tests should turn on.

pub use crate::scrub::Sabotage;
pub use crate::sys::fault::{Call, FaultGuard, inject, inject_short};
pub use crate::sys::features::names as kernel_features;
#[cfg(feature = "vm-memory")]
use crate::{Pool, PoolBuilder, PoolError};

/// Builds a pool whose scrubber is broken.
///
/// # Errors
///
/// As for [`PoolBuilder::build`].
#[cfg(feature = "vm-memory")]
pub fn build_sabotaged(builder: PoolBuilder, sabotage: Sabotage) -> Result<Pool, PoolError> {
    builder.sabotage(sabotage).build()
}

/// Says that the calling test leaves something out, past the test harness, which keeps to itself what passes.
#[cfg(test)]
pub(crate) fn skipped(reason: impl std::fmt::Display) {
    use std::io::Write;
    let name = std::thread::current().name().unwrap_or("test").to_owned();
    // In one piece: the harness writes meanwhile. Nothing can be done about a closed standard error.
    let line = format!("\nSKIPPED {name}: {reason}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}

/// Where the pool's private arena begins: for tests that write behind its back.
#[cfg(feature = "vm-memory")]
pub fn arena_address(pool: &Pool) -> *mut u8 {
    pool.shared.backing.arena().0
}

/// Checks a guest's layout as [`Pool::lease`] does, without a pool.
///
/// # Errors
///
/// What is wrong with the layout.
#[cfg(feature = "vm-memory")]
pub fn check_regions(
    regions: &[(vm_memory::GuestAddress, u64)],
    granularity: u64,
) -> Result<Vec<crate::GuestRegion>, crate::LeaseError> {
    crate::lease::check_regions(regions, granularity)
}

/// What the library reads out of a line of `/proc/self/maps`: the addresses, and whether it is private anonymous memory.
pub fn parse_mapping(line: &str) -> Option<(std::ops::Range<usize>, bool)> {
    let mapping = crate::sys::procmap::parse(line)?;
    Some((mapping.range, mapping.private_anonymous))
}

/// What the library reads out of a list of nodes or processors.
pub fn parse_list(list: &str) -> Option<Vec<u32>> {
    Some(crate::sys::numa::parse_list(list)?.into_iter().collect())
}

/// Puts memory at `address` that raises `SIGBUS`: one page of 4 KiB, or of 2 MiB where the memory consists of hugetlb pages. Says
/// nothing where that fails.
pub(crate) fn break_memory(address: *mut u8) {
    for (page, huge) in [(4096, 0), (2 << 20, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB)] {
        let at = address.map_addr(|address| address & !(page - 1));
        // SAFETY: the page is the pool's, which is to lose it; the file's descriptor is this function's own.
        unsafe {
            let file = libc::memfd_create(c"broken".as_ptr(), libc::MFD_CLOEXEC | huge);
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            libc::ftruncate(file, page as libc::off_t);
            let mapped = libc::mmap(at.cast(), page, protection, flags, file, 0);
            libc::ftruncate(file, 0);
            libc::close(file);
            if mapped != libc::MAP_FAILED {
                return;
            }
        }
    }
}
