//! 256-bit vectors: zeroing past the cache, and verification.
//!
//! Ordering: a streaming store (`vmovntdq`) waits in a write-combining buffer and is not ordered
//! before ordinary stores that come later in the program (Intel SDM, volume 1, 'Caching of temporal
//! vs. non-temporal data'), so a later store of 'this memory is clean' could be seen first. The
//! `sfence` at the end, by the thread that zeroed, makes every zero globally visible before the
//! loop returns. It is also what Rust's memory model asks for: without it even the same thread may
//! not rely on these stores.

use core::arch::asm;
use core::arch::x86_64::{
    __m256i, _mm256_load_si256, _mm256_loadu_si256, _mm256_or_si256, _mm256_setzero_si256,
    _mm256_stream_si256, _mm256_testz_si256,
};

use crate::arch::barrier::forget_contents;
use crate::arch::generic::verify::{self, Vector};
use crate::arch::generic::{LINE, lines};

/// Sets memory to zero with AVX2's streaming stores.
#[derive(Clone, Copy, Debug)]
pub struct Stream(());

impl Stream {
    /// The name by which [`ZeroLoop::by_name`](crate::arch::ZeroLoop::by_name) knows this loop.
    pub const NAME: &'static str = "avx2-stream";
    /// Whether the zeros bypass the cache: they do.
    pub const STREAMING: bool = true;

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
        // The interpreter has no streaming stores.
        !cfg!(miri) && std::is_x86_feature_detected!("avx2")
    }

    /// Sets the `len` bytes from `ptr` to zero, and writes nothing else.
    ///
    /// # Safety
    ///
    /// As [`ZeroLoop::zero`](crate::arch::ZeroLoop::zero).
    pub unsafe fn zero(self, ptr: *mut u8, len: usize) {
        // SAFETY: a `Stream` exists only where AVX2 does; the lines are inside the caller's range.
        let zero_lines = |first, count| unsafe { stream(first, count) };
        // SAFETY: the caller's promise, and `stream` writes just the lines it is given.
        unsafe { lines::zero(ptr, len, LINE, zero_lines) }
    }
}

/// Zeroes `count` lines from `first`, a multiple of [`LINE`], and fences.
///
/// # Safety
///
/// The lines must be writable and nobody else may access them.
#[target_feature(enable = "avx2")]
unsafe fn stream(first: *mut u8, count: usize) {
    let zero = _mm256_setzero_si256();
    for line in 0..count {
        // SAFETY: `line < count`, so both halves are inside the caller's lines, at multiples of 32.
        unsafe {
            let line = first.add(line * LINE).cast::<__m256i>();
            _mm256_stream_si256(line, zero);
            _mm256_stream_si256(line.add(1), zero);
        }
    }
    // SAFETY: `sfence` is part of x86-64 and touches nothing. Not its intrinsic: that is unsafe for the MSRV's compiler and safe for
    // younger ones, which warn of a block around it.
    unsafe { asm!("sfence", options(nostack, preserves_flags)) };
    forget_contents(first);
}

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
