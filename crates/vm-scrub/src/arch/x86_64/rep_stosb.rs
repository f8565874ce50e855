//! Zeroing with the processor's own string store.
//!
//! `rep stosb` hands the whole range to microcode, which knows the line size and chooses by itself
//! between filling the cache and bypassing it. On processors that announce it as fast it is among
//! the best loops at every length, and the zeros of a piece that fits the cache are still there to
//! be read back.
//!
//! Ordering: the stores of one string instruction may appear in any order among themselves, but
//! every later store of the same thread comes after all of them (Intel SDM, volume 3, 'Fast-string
//! operation and out-of-order stores'; AMD64 APM, volume 2, 'Memory ordering'). A flag that is
//! published with an ordinary store afterwards is enough; no fence.
//!
//! The direction flag decides which way the string grows. The System V ABI and the rules for Rust's
//! inline assembly both have it clear here, and `rep stosb` leaves it so.

use core::arch::asm;
use std::sync::OnceLock;

use super::cpuid;

/// Sets memory to zero with `rep stosb`.
#[derive(Clone, Copy, Debug)]
pub struct Zero(());

impl Zero {
    /// The name by which [`ZeroLoop::by_name`](crate::arch::ZeroLoop::by_name) knows this loop.
    pub const NAME: &'static str = "rep-stosb";
    /// Whether the zeros bypass the cache: microcode may do so for long ranges, but pieces that fit
    /// the cache stay in it.
    pub const STREAMING: bool = false;

    /// The loop; `None` only where there is no assembly (Miri).
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

    /// Whether this processor can run the loop: every x86-64 processor can.
    /// [`is_fast`](Self::is_fast) says whether it should.
    pub fn is_available() -> bool {
        !cfg!(miri)
    }

    /// Whether the processor announces that `rep stosb` is fast: ERMS (enhanced, for long ranges;
    /// CPUID leaf 7, EBX bit 9) or FSRM (short ones too; the same leaf, EDX bit 4). Without either
    /// it can be many times slower than `memset`.
    pub fn is_fast() -> bool {
        static FAST: OnceLock<bool> = OnceLock::new();
        *FAST.get_or_init(|| Self::is_available() && announces_fast_strings())
    }

    /// Sets the `len` bytes from `ptr` to zero, and writes nothing else.
    ///
    /// # Safety
    ///
    /// As [`ZeroLoop::zero`](crate::arch::ZeroLoop::zero).
    pub unsafe fn zero(self, ptr: *mut u8, len: usize) {
        // SAFETY: the caller promises `len` writable bytes that nobody else accesses, and the
        // instruction writes exactly RCX bytes upwards from RDI because the direction flag is clear
        // by the ABI. Both registers are declared as changed; flags are not touched. Without
        // `nomem` the compiler takes the memory for read and written.
        unsafe {
            asm!(
                "rep stosb",
                inout("rcx") len => _,
                inout("rdi") ptr => _,
                in("al") 0_u8,
                options(nostack, preserves_flags)
            );
        }
    }
}

fn announces_fast_strings() -> bool {
    const ERMS: u32 = 1 << 9;
    const FSRM: u32 = 1 << 4;
    cpuid::leaf(7).is_some_and(|leaf| leaf.ebx & ERMS != 0 || leaf.edx & FSRM != 0)
}
