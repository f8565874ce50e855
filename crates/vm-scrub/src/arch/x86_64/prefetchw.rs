//! Zeroing with ordinary stores, each line asked for well before it is stored to.
//!
//! A store to a line that is not in the cache has the processor fetch the line first, for ownership
//! and for the bytes that the store leaves alone. How many such fetches one processor has under way
//! decides how fast it zeroes what no cache holds. Ordinary stores and `rep stosb` leave that to
//! the depth of the store buffer and to microcode; `prefetchw` asks for lines as early as one
//! likes. On Cascade Lake that is more than 1.5 times as fast as any other way (`bench loops`). The zeros
//! stay in the cache, and what was asked for arrives while they are read back.
//!
//! What is in the second-level cache already is zeroed as fast as stores leave the processor, one
//! in each cycle or two, so they are as wide as AVX2 has them.
//!
//! Ordering: ordinary stores become visible in program order on x86; no fence.
//!
//! The last lines that are asked for lie behind the range. That is a hint: it neither faults nor
//! changes anything, wherever it leads. A neighbour who is working on those lines may have to get
//! them back.

use core::arch::asm;
use core::arch::x86_64::{__m256i, _mm256_setzero_si256, _mm256_store_si256};
use std::sync::OnceLock;

use super::cpuid;
use crate::arch::barrier::forget_contents;
use crate::arch::generic::{LINE, lines};

/// How far ahead of the stores lines are asked for, in bytes. Measured on Cascade Lake: 1 to 4 KiB are
/// alike. A quarter of what is zeroed before it is read back.
const AHEAD: usize = 2 << 10;

/// Sets memory to zero with ordinary stores behind `prefetchw`.
#[derive(Clone, Copy, Debug)]
pub struct Zero(());

impl Zero {
    /// The name by which [`ZeroLoop::by_name`](crate::arch::ZeroLoop::by_name) knows this loop.
    pub const NAME: &'static str = "prefetchw";
    /// Whether the zeros bypass the cache: they stay in it.
    pub const STREAMING: bool = false;

    /// The loop, if this processor has it.
    pub fn new() -> Option<Self> {
        Self::is_available().then_some(Self(()))
    }

    /// The loop, without asking whether this processor has it.
    ///
    /// # Safety
    ///
    /// [`is_available`](Self::is_available) must be true.
    pub unsafe fn new_unchecked() -> Self {
        Self(())
    }

    /// Whether this processor has `prefetchw` (CPUID leaf 8000_0001h, ECX bit 8) and AVX2, and the
    /// kernel saves its registers.
    pub fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE
            .get_or_init(|| !cfg!(miri) && std::is_x86_feature_detected!("avx2") && has_prefetchw())
    }

    /// Sets the `len` bytes from `ptr` to zero, and writes nothing else.
    ///
    /// # Safety
    ///
    /// As [`ZeroLoop::zero`](crate::arch::ZeroLoop::zero).
    pub unsafe fn zero(self, ptr: *mut u8, len: usize) {
        // SAFETY: a `Zero` exists only where AVX2 does; the lines are inside the caller's range.
        let zero_lines = |first, count| unsafe { store(first, count) };
        // SAFETY: the caller's promise, and `store` writes just the lines it is given.
        unsafe { lines::zero(ptr, len, LINE, zero_lines) }
    }
}

/// Zeroes `count` lines from `first`, a multiple of [`LINE`].
///
/// # Safety
///
/// The lines must be writable and nobody else may access them.
#[target_feature(enable = "avx2")]
unsafe fn store(first: *mut u8, count: usize) {
    let zero = _mm256_setzero_si256();
    for line in 0..count {
        let at = first.wrapping_add(line * LINE);
        // SAFETY: a prefetch accesses nothing, by the rules of the language or of the processor.
        unsafe {
            asm!(
                "prefetchw [{at} + {ahead}]",
                at = in(reg) at,
                ahead = const AHEAD,
                options(nostack, preserves_flags)
            );
        }
        let at = at.cast::<__m256i>();
        // SAFETY: `line < count`, so both halves are inside the caller's lines, at multiples of 32.
        unsafe {
            _mm256_store_si256(at, zero);
            _mm256_store_si256(at.wrapping_add(1), zero);
        }
    }
    forget_contents(first);
}

fn has_prefetchw() -> bool {
    cpuid::leaf(0x8000_0001).is_some_and(|leaf| leaf.ecx & (1 << 8) != 0)
}
