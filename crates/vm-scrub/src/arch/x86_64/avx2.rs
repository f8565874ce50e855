//! Verification with 256-bit vectors.

use core::arch::x86_64::{
    __m256i, _mm256_load_si256, _mm256_loadu_si256, _mm256_or_si256, _mm256_testz_si256,
};

use crate::arch::generic::verify::{self, Vector};

/// Finds the first byte that is not zero with AVX2.
#[derive(Clone, Copy, Debug)]
pub struct Verify(());

impl Verify {
    /// The name by which [`VerifyLoop::by_name`](crate::arch::VerifyLoop::by_name) knows this loop.
    pub const NAME: &'static str = "avx2";

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

    /// Whether this processor has AVX2 and the kernel saves its registers.
    pub fn is_available() -> bool {
        std::is_x86_feature_detected!("avx2")
    }

    /// The offset of the first byte of the `len` from `ptr` that is not zero, in bytes.
    ///
    /// # Safety
    ///
    /// As [`VerifyLoop::first_nonzero`](crate::arch::VerifyLoop::first_nonzero).
    pub unsafe fn first_nonzero(self, ptr: *const u8, len: usize) -> Option<usize> {
        // SAFETY: a `Verify` exists only where AVX2 does; the memory is the caller's promise.
        unsafe { first_nonzero(ptr, len) }
    }
}

#[target_feature(enable = "avx2")]
unsafe fn first_nonzero(ptr: *const u8, len: usize) -> Option<usize> {
    // SAFETY: the caller promises `len` readable, initialised bytes, and this function has AVX2.
    unsafe { verify::first_nonzero::<__m256i>(ptr, len) }
}

impl Vector for __m256i {
    #[inline(always)]
    unsafe fn load(ptr: *const u8) -> Self {
        // SAFETY: the caller promises 32 readable bytes and AVX2.
        unsafe { _mm256_loadu_si256(ptr.cast()) }
    }

    #[inline(always)]
    unsafe fn load_aligned(ptr: *const u8) -> Self {
        // SAFETY: the caller promises 32 readable bytes at a multiple of 32, and AVX2.
        unsafe { _mm256_load_si256(ptr.cast()) }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        // SAFETY: the caller promises AVX2.
        unsafe { _mm256_or_si256(self, other) }
    }

    #[inline(always)]
    unsafe fn is_zero(self) -> bool {
        // SAFETY: the caller promises AVX2.
        unsafe { _mm256_testz_si256(self, self) == 1 }
    }
}
