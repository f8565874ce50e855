//! What the standard library's feature detection does not know about.
//!
//! CPUID leaves the virtual machine, if this is one, which costs microseconds: callers keep the
//! answers.

use core::arch::x86_64::{__cpuid_count, CpuidResult};
#[cfg(not(miri))]
use std::sync::OnceLock;

/// Subleaf 0 of `leaf`, if the processor has that leaf; a leaf beyond the last one would answer
/// with another's content.
pub(super) fn leaf(leaf: u32) -> Option<CpuidResult> {
    // Safe to call since a later Rust than the oldest supported: by a pointer it is the same in both.
    let cpuid: unsafe fn(u32, u32) -> CpuidResult = __cpuid_count;
    // The basic leaves count from 0, the extended ones from 0x8000_0000; the first of each names
    // the last.
    // SAFETY: every x86-64 processor has the instruction, and leaf 0.
    let last = unsafe { cpuid(leaf & 0x8000_0000, 0) }.eax;
    // SAFETY: as above, and the leaf is one that the processor has.
    (leaf <= last).then(|| unsafe { cpuid(leaf, 0) })
}

/// Whether this processor flushes lines without an order among them (leaf 7, EBX bit 23).
#[cfg(not(miri))]
pub(in crate::arch) fn has_clflushopt() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| leaf(7).is_some_and(|leaf| leaf.ebx & (1 << 23) != 0))
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_beyond_the_last_one_is_not_asked_for() {
        for first in [0, 0x8000_0000] {
            let last = leaf(first).expect("the first of its kind").eax;
            assert!(leaf(last).is_some());
            assert!(leaf(last + 1).is_none() && leaf(first + 0x7fff_ffff).is_none());
        }
    }
}
