//! placeholder
#![cfg_attr(docsrs, feature(doc_cfg))]

pub mod arch;
#[cfg(feature = "vm-memory")]
mod backing;
#[cfg(feature = "kvm")]
pub mod kvm;
#[cfg(feature = "vm-memory")]
pub mod lease;
#[cfg(feature = "vm-memory")]
pub mod pool;
#[cfg_attr(
    not(feature = "vm-memory"),
    expect(dead_code, reason = "parts of the engine serve pools only")
)]
mod scrub;
#[cfg(feature = "vm-memory")]
mod sys;
#[cfg(any(test, feature = "test-support"))]
pub mod test_support;

/// The granularity, in bytes, at which a pool hands out memory, and the alignment of everything that can be huge:
/// the size of a huge page on x86_64, and on aarch64 with 4 KiB base pages.
pub const BLOCK_SIZE: u64 = 2 << 20;

pub use scrub::{Policy, ScrubError, Scrubbed, Verify, scrub, scrub_raw};
#[cfg(feature = "vm-memory")]
pub use {
    backing::Revocation,
    lease::{GuestRegion, Lease, LeaseError, LeaseId, Quiesced, ScrubReceipt, TeardownError},
    pool::{Accounts, Extent, PageSize, Pool, PoolBuilder, PoolError},
    sys::{Call as SysCall, Error as SysError},
};
