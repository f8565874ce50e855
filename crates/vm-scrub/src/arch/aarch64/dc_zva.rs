//! Zeroing a block at a time with `DC ZVA`, the cache maintenance instruction for it.
//!
//! It zeroes an aligned block without reading it first. How long the block is, and whether the
//! instruction may be used at all, the system says in a register that programs may read: 64 bytes
//! is common, the architecture allows up to 2048, QEMU's default processor has 512; and a system
//! can forbid it.
//!
//! Ordering: `DC ZVA` counts as stores to every byte of the block and is ordered as those are (Arm
//! ARM, 'Ordering and completion of data and instruction cache instructions'), so the release with
//! which the memory is published covers it.
//!
//! The memory must be of the Normal kind, as all RAM mapped by Linux is; on Device memory the
//! instruction faults.

use core::arch::asm;

use crate::arch::all::portable;
use crate::arch::generic::lines;

/// Sets memory to zero with `DC ZVA`.
#[derive(Clone, Copy, Debug)]
pub struct Zero(());

impl Zero {
    /// The name by which [`ZeroLoop::by_name`](crate::arch::ZeroLoop::by_name) knows this loop.
    pub const NAME: &'static str = "dc-zva";
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

    /// Whether programs may use the instruction here.
    pub fn is_available() -> bool {
        block().is_some()
    }

    /// Sets the `len` bytes from `ptr` to zero, and writes nothing else.
    ///
    /// # Safety
    ///
    /// As [`ZeroLoop::zero`](crate::arch::ZeroLoop::zero).
    pub unsafe fn zero(self, ptr: *mut u8, len: usize) {
        // Asked each time: the register costs a few cycles, and a stale answer would zero beyond
        // the range.
        let Some(block) = block() else {
            // SAFETY: the caller's promise.
            return unsafe { portable::zero(ptr, len) };
        };
        // SAFETY: the caller promises `len` writable bytes that nobody else accesses, so the blocks
        // inside them are, too. The instruction may be used and writes one block of the length the
        // processor reports. Every register that changes is declared, and without `nomem` the
        // compiler takes the memory for written.
        let zero_blocks = |first: *mut u8, count: usize| unsafe {
            asm!(
                "2:",
                "dc zva, {at}",
                "add {at}, {at}, {block}",
                "subs {count}, {count}, #1",
                "b.ne 2b",
                at = inout(reg) first => _,
                count = inout(reg) count => _,
                block = in(reg) block,
                options(nostack)
            );
        };
        // SAFETY: the caller's promise; a block is a power of two, and `zero_blocks` writes just
        // those it is given.
        unsafe { lines::zero(ptr, len, block, zero_blocks) }
    }
}

/// Bytes that one `DC ZVA` zeroes, or `None` where it is forbidden (or there is no assembly).
///
/// DCZID_EL0: bit 4 forbids; bits 3 to 0 are the power of two of the block's length in words of
/// four bytes.
fn block() -> Option<usize> {
    #[cfg(miri)]
    return None;
    #[cfg(not(miri))]
    {
        let dczid: u64;
        // SAFETY: every processor of this architecture lets programs read the register; nothing
        // else changes.
        unsafe {
            asm!("mrs {}, dczid_el0", out(reg) dczid, options(nomem, nostack, preserves_flags));
        }
        (dczid & 1 << 4 == 0).then_some(4 << (dczid & 0xf))
    }
}
