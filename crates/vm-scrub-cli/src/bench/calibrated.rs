//! The loops that vm-scrub chooses on this host.
//!
//! The one place where benchmarks ask for them.

use super::row::Op;
use std::sync::OnceLock;
use std::time::Duration;
use vm_scrub::Calibration;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};

/// What was measured when it was first asked for. A host that was too busy then is not asked again, so that there is one choice
/// for all contenders of a group.
fn calibration() -> &'static Calibration {
    static MEASURED: OnceLock<&'static Calibration> = OnceLock::new();
    MEASURED.get_or_init(vm_scrub::calibration)
}

/// How long measuring took.
pub(crate) fn took() -> Duration {
    calibration().took()
}

/// The zeroing loop where `threads` threads share `bytes` bytes.
pub(crate) fn zero_loop(op: Op, bytes: u64, threads: usize) -> ZeroLoop {
    match op {
        Op::Fused => calibration().fastest_zero_and_verify(bytes, threads).0,
        Op::Zero | Op::Verify | Op::Separate => calibration().fastest_zero(bytes, threads),
    }
}

/// The verification loop where `threads` threads share `bytes` bytes.
pub(crate) fn verify_loop(op: Op, bytes: u64, threads: usize) -> VerifyLoop {
    match op {
        Op::Fused => calibration().fastest_zero_and_verify(bytes, threads).1,
        Op::Zero | Op::Verify | Op::Separate => calibration().fastest_verify(bytes, threads),
    }
}
