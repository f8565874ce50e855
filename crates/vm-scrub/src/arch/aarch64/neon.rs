//! 128-bit vectors: zeroing with pairs of them, and verification.
//!
//! Ordering: these are ordinary stores. The release with which the memory is published covers them.

use core::arch::aarch64::{uint8x16_t, vld1q_u8, vmaxvq_u8, vorrq_u8};
use core::arch::asm;

use crate::arch::generic::verify::{self, Vector};
use crate::arch::generic::{LINE, lines};

/// Sets memory to zero with pairs of 128-bit stores.
#[derive(Clone, Copy, Debug)]
pub struct Zero(());

impl Zero {
    /// The name by which [`ZeroLoop::by_name`](crate::arch::ZeroLoop::by_name) knows this loop.
    pub const NAME: &'static str = "neon-pairs";
    /// Whether the zeros bypass the cache: that is up to the processor, so the caller may not rely
    /// on it.
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

    /// Whether this processor has Neon.
    pub fn is_available() -> bool {
        !cfg!(miri) && std::arch::is_aarch64_feature_detected!("neon")
    }

    /// Sets the `len` bytes from `ptr` to zero, and writes nothing else.
    ///
    /// # Safety
    ///
    /// As [`ZeroLoop::zero`](crate::arch::ZeroLoop::zero).
    pub unsafe fn zero(self, ptr: *mut u8, len: usize) {
        // The displacements below are those of a line of 64 bytes.
        const { assert!(LINE == 64) };
        // SAFETY: the caller promises `len` writable bytes that nobody else accesses, so the lines
        // inside them are, too. A `Zero` exists only where Neon does. Every register that changes
        // is declared, and without `nomem` the compiler takes the memory for written.
        let zero_lines = |first: *mut u8, count: usize| unsafe {
            asm!(
                "movi v0.2d, #0",
                "2:",
                "stp q0, q0, [{at}]",
                "stp q0, q0, [{at}, #32]",
                "add {at}, {at}, #64",
                "subs {count}, {count}, #1",
                "b.ne 2b",
                at = inout(reg) first => _,
                count = inout(reg) count => _,
                out("v0") _,
                options(nostack)
            );
        };
        // SAFETY: the caller's promise, and `zero_lines` writes just the lines it is given.
        unsafe { lines::zero(ptr, len, LINE, zero_lines) }
    }
}

/// Finds the first byte that is not zero with Neon.
#[derive(Clone, Copy, Debug)]
pub struct Verify(());

impl Verify {
    /// The name by which [`VerifyLoop::by_name`](crate::arch::VerifyLoop::by_name) knows this loop.
    pub const NAME: &'static str = "neon";

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

    /// Whether this processor has Neon.
    pub fn is_available() -> bool {
        std::arch::is_aarch64_feature_detected!("neon")
    }

    /// The offset of the first byte of the `len` from `ptr` that is not zero, in bytes.
    ///
    /// # Safety
    ///
    /// As [`VerifyLoop::first_nonzero`](crate::arch::VerifyLoop::first_nonzero).
    pub unsafe fn first_nonzero(self, ptr: *const u8, len: usize) -> Option<usize> {
        // SAFETY: a `Verify` exists only where Neon does; the memory is the caller's promise.
        unsafe { first_nonzero(ptr, len) }
    }
}

#[target_feature(enable = "neon")]
unsafe fn first_nonzero(ptr: *const u8, len: usize) -> Option<usize> {
    // SAFETY: the caller promises `len` readable, initialised bytes, and this function has Neon.
    unsafe { verify::first_nonzero::<uint8x16_t>(ptr, len) }
}

impl Vector for uint8x16_t {
    #[inline(always)]
    unsafe fn load(ptr: *const u8) -> Self {
        // SAFETY: the caller promises 16 readable bytes and Neon.
        unsafe { vld1q_u8(ptr) }
    }

    #[inline(always)]
    unsafe fn load_aligned(ptr: *const u8) -> Self {
        // The instruction is the same at any address.
        // SAFETY: the caller promises 16 readable bytes and Neon.
        unsafe { vld1q_u8(ptr) }
    }

    #[inline(always)]
    unsafe fn or(self, other: Self) -> Self {
        // SAFETY: the caller promises Neon.
        unsafe { vorrq_u8(self, other) }
    }

    #[inline(always)]
    unsafe fn is_zero(self) -> bool {
        // SAFETY: the caller promises Neon.
        unsafe { vmaxvq_u8(self) == 0 }
    }
}
