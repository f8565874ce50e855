//! The loops that vm-scrub chooses on this host.
//!
//! The one place where benchmarks ask for them.

use vm_scrub::arch::{VerifyLoop, ZeroLoop};
use vm_scrub::{Operation, calibration};

/// The zeroing loop for ranges of `bytes` bytes, read back piece by piece or not.
pub(crate) fn zero_loop(operation: Operation, bytes: u64) -> ZeroLoop {
    calibration().fastest(operation, bytes)
}

/// The verification loop for ranges of `bytes` bytes.
pub(crate) fn verify_loop(_bytes: u64) -> VerifyLoop {
    VerifyLoop::widest()
}
