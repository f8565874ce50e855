//! Verification with the 128-bit vectors that every x86-64 processor has.

use core::arch::x86_64::{
    __m128i, _mm_cmpeq_epi8, _mm_load_si128, _mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128,
    _mm_setzero_si128,
};

use crate::arch::generic::verify::{self, Vector};

/// Finds the first byte that is not zero with SSE2.
#[derive(Clone, Copy, Debug)]
pub struct Verify(());

impl Verify {
    /// The name by which [`VerifyLoop::by_name`](crate::arch::VerifyLoop::by_name) knows this loop.
    pub const NAME: &'static str = "sse2";

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

    /// Whether this processor can run the loop: always, except for targets built without SSE2.
    pub fn is_available() -> bool {
        cfg!(target_feature = "sse2")
    }

    /// The offset of the first byte of the `len` from `ptr` that is not zero, in bytes.
    ///
    /// # Safety
    ///
    /// As [`VerifyLoop::first_nonzero`](crate::arch::VerifyLoop::first_nonzero).
    pub unsafe fn first_nonzero(self, ptr: *const u8, len: usize) -> Option<usize> {
        // SAFETY: a `Verify` exists only where SSE2 does; the memory is the caller's promise.
        unsafe { first_nonzero(ptr, len) }
    }
}

#[target_feature(enable = "sse2")]
unsafe fn first_nonzero(ptr: *const u8, len: usize) -> Option<usize> {
    // SAFETY: the caller promises `len` readable, initialised bytes, and this function has SSE2.
    unsafe { verify::first_nonzero::<__m128i>(ptr, len) }
}

impl Vector for __m128i {
    #[inline(always)]
    unsafe fn load(ptr: *const u8) -> Self {
        // SAFETY: the caller promises 16 readable bytes and SSE2.
        unsafe { _mm_loadu_si128(ptr.cast()) }
    }

    #[inline(always)]
    unsafe fn load_aligned(ptr: *const u8) -> Self {
        // SAFETY: the caller promises 16 readable bytes at a multiple of 16, and SSE2.
        unsafe { _mm_load_si128(ptr.cast()) }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        // SAFETY: the caller promises SSE2.
        unsafe { _mm_or_si128(self, other) }
    }

    #[inline(always)]
    unsafe fn is_zero(self) -> bool {
        // SAFETY: the caller promises SSE2.
        unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(self, _mm_setzero_si128())) == 0xffff }
    }
}
