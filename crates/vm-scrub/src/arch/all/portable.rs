//! Zeroing and verification without any instruction the compiler would not choose by itself.
//!
//! Zeroing is `memset`, which the C library implements for the processor it finds. Verification is
//! plain integer arithmetic that the compiler may vectorise for the target's baseline. Assumes
//! nothing about the processor.

use crate::arch::barrier::forget_contents;
use crate::arch::generic::verify::{self, Vector};

/// Sets memory to zero with the C library's `memset`.
#[derive(Clone, Copy, Debug)]
pub struct Zero(());

impl Zero {
    /// The name by which [`ZeroLoop::by_name`](crate::arch::ZeroLoop::by_name) knows this loop.
    pub const NAME: &'static str = "portable";
    /// Whether the zeros bypass the cache: as far as the caller may rely on it, they do not.
    pub const STREAMING: bool = false;

    /// The loop; never `None`.
    pub fn new() -> Option<Self> {
        Some(Self(()))
    }

    /// The loop, without asking whether this processor has it.
    ///
    /// # Safety
    ///
    /// None to uphold; `unsafe` to be of one shape with the loops that need a processor feature.
    pub unsafe fn new_unchecked() -> Self {
        Self(())
    }

    /// Whether this processor can run the loop: always.
    pub fn is_available() -> bool {
        true
    }

    /// Sets the `len` bytes from `ptr` to zero, and writes nothing else.
    ///
    /// # Safety
    ///
    /// As [`ZeroLoop::zero`](crate::arch::ZeroLoop::zero).
    pub unsafe fn zero(self, ptr: *mut u8, len: usize) {
        // SAFETY: the caller's promise is the one `zero` asks for.
        unsafe { zero(ptr, len) }
    }
}

/// Finds the first byte that is not zero with 64-bit integers.
#[derive(Clone, Copy, Debug)]
pub struct Verify(());

impl Verify {
    /// The name by which [`VerifyLoop::by_name`](crate::arch::VerifyLoop::by_name) knows this loop.
    pub const NAME: &'static str = "portable";

    /// The loop; never `None`.
    pub fn new() -> Option<Self> {
        Some(Self(()))
    }

    /// The loop, without asking whether this processor has it.
    ///
    /// # Safety
    ///
    /// None to uphold; `unsafe` to be of one shape with the loops that need a processor feature.
    pub unsafe fn new_unchecked() -> Self {
        Self(())
    }

    /// Whether this processor can run the loop: always.
    pub fn is_available() -> bool {
        true
    }

    /// The offset of the first byte of the `len` from `ptr` that is not zero, in bytes.
    ///
    /// # Safety
    ///
    /// As [`VerifyLoop::first_nonzero`](crate::arch::VerifyLoop::first_nonzero).
    pub unsafe fn first_nonzero(self, ptr: *const u8, len: usize) -> Option<usize> {
        // SAFETY: the caller promises `len` readable, initialised bytes; 64-bit integers need no
        // processor feature.
        unsafe { verify::first_nonzero::<u64>(ptr, len) }
    }
}

/// Ordinary stores of zero that the compiler can't leave out; also the heads and tails of the other
/// loops.
///
/// # Safety
///
/// As [`ZeroLoop::zero`](crate::arch::ZeroLoop::zero).
#[inline(always)]
pub(in crate::arch) unsafe fn zero(ptr: *mut u8, len: usize) {
    if len == 0 {
        return;
    }
    // SAFETY: the caller promises `len` writable bytes that nobody else accesses; any byte pattern
    // is a valid `u8`.
    unsafe { ptr.write_bytes(0, len) };
    forget_contents(ptr);
}

impl Vector for u64 {
    #[inline(always)]
    unsafe fn load(ptr: *const u8) -> Self {
        // SAFETY: the caller promises eight readable bytes; `read_unaligned` asks for no alignment.
        unsafe { ptr.cast::<u64>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_aligned(ptr: *const u8) -> Self {
        // SAFETY: the caller promises eight readable bytes at a multiple of eight.
        unsafe { ptr.cast::<u64>().read() }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        self | other
    }

    #[inline(always)]
    unsafe fn is_zero(self) -> bool {
        self == 0
    }
}
