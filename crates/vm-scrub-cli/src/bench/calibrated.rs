//! The loops that vm-scrub would choose on this host.
//!
//! The one place where benchmarks ask for them.

use vm_scrub::arch::{VerifyLoop, ZeroLoop};

/// The zeroing loop for ranges of `bytes` bytes.
pub(crate) fn zero_loop(_bytes: u64) -> ZeroLoop {
    ZeroLoop::best_guess()
}

/// The verification loop for ranges of `bytes` bytes.
pub(crate) fn verify_loop(_bytes: u64) -> VerifyLoop {
    VerifyLoop::widest()
}
