//! Zeroing a cache line at a time with AMD's `clzero` (Zen and later, and Hygon).
//!
//! The instruction zeroes the line that holds the address in RAX without reading it first, past the
//! cache. It takes no length: the line must be known, and what is not a whole line is zeroed with
//! ordinary stores.
//!
//! Ordering: `clzero` is weakly ordered with respect to every other store (AMD64 APM, volume 3,
//! 'CLZERO'), so a later store of 'this memory is clean' could be seen first. The `sfence` at the
//! end, by the thread that zeroed, makes every zero globally visible before the loop returns.

use core::arch::asm;
use std::sync::OnceLock;

use super::cpuid;
use crate::arch::generic::{LINE, lines};

/// Sets memory to zero with `clzero`.
#[derive(Clone, Copy, Debug)]
pub struct Zero(());

impl Zero {
    /// The name by which [`ZeroLoop::by_name`](crate::arch::ZeroLoop::by_name) knows this loop.
    pub const NAME: &'static str = "clzero";
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

    /// Whether this processor has `clzero` (CPUID leaf 8000_0008h, EBX bit 0) and lines of 64
    /// bytes.
    pub fn is_available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| !cfg!(miri) && has_clzero() && has_lines_of(LINE))
    }

    /// Sets the `len` bytes from `ptr` to zero, and writes nothing else.
    ///
    /// # Safety
    ///
    /// As [`ZeroLoop::zero`](crate::arch::ZeroLoop::zero).
    pub unsafe fn zero(self, ptr: *mut u8, len: usize) {
        // SAFETY: the caller promises `len` writable bytes that nobody else accesses, so the lines
        // inside them are, too. A `Zero` exists only where `clzero` does, with lines as long as
        // those it is given here: each instruction writes one of them and nothing else. Every
        // register it changes is declared, and without `nomem` the compiler takes the memory for
        // written.
        let zero_lines = |first: *mut u8, count: usize| unsafe {
            asm!(
                "2:",
                "clzero",
                "add rax, {line}",
                "dec {count}",
                "jnz 2b",
                "sfence",
                line = const LINE,
                count = inout(reg) count => _,
                inout("rax") first => _,
                options(nostack)
            );
        };
        // SAFETY: the caller's promise, and `zero_lines` writes just the lines it is given.
        unsafe { lines::zero(ptr, len, LINE, zero_lines) }
    }
}

fn has_clzero() -> bool {
    cpuid::leaf(0x8000_0008).is_some_and(|leaf| leaf.ebx & 1 != 0)
}

/// Whether the processor says that its cache lines have `bytes` bytes.
///
/// Two places say it: the CLFLUSH line size (leaf 1, EBX bits 15 to 8, in units of 8 bytes) and the
/// first-level data cache (leaf 8000_0005h, ECX bits 7 to 0, in bytes; hypervisors may leave it 0).
/// No processor with `clzero` has had anything but 64. One that has, or that contradicts itself, is
/// refused: a line longer than assumed would be zeroed beyond the end of the range.
fn has_lines_of(bytes: usize) -> bool {
    let clflush = cpuid::leaf(1).map_or(0, |leaf| (leaf.ebx >> 8 & 0xff) as usize * 8);
    let cache = cpuid::leaf(0x8000_0005).map_or(0, |leaf| (leaf.ecx & 0xff) as usize);
    clflush == bytes && (cache == 0 || cache == bytes)
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;

    #[test]
    fn lines_have_one_length() {
        // Whether or not there is `clzero`: every x86-64 processor flushes lines and says how long they are, and none has had
        // anything but 64 bytes.
        assert!(has_lines_of(64));
        assert!(!has_lines_of(32) && !has_lines_of(128) && !has_lines_of(0));
    }
}
