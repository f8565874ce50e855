//! Keeps the compiler's hands off memory whose content matters after Rust has stopped looking at
//! it.
//!
//! A store that nothing reads again is dead to an optimiser, and a load straight after a store of
//! zero has a known result. Scrubbing is the first and verification is the second, so both need a
//! point where the compiler must give up what it knows. This module may assume nothing about the
//! memory; it never touches it.

/// Makes the compiler forget what it knows about the memory behind `ptr`, and finish every store to
/// it first.
///
/// The empty assembly takes the pointer and has no `nomem` or `readonly` option: as far as the
/// compiler can tell it reads and writes everything reachable from `ptr`. No instruction is
/// executed. This orders nothing between processors; loops that need that fence by themselves.
#[inline(always)]
pub(super) fn forget_contents(ptr: *const u8) {
    #[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri)))]
    // SAFETY: the template is empty, so nothing is executed, no register, flag or stack slot
    // changes, and the pointer is never dereferenced: it may be dangling.
    unsafe {
        core::arch::asm!("/* {0} */", in(reg) ptr, options(nostack, preserves_flags));
    }
    #[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(miri))))]
    {
        // The interpreter knows no assembly and eliminates no store; `black_box` is the closest it
        // understands.
        core::hint::black_box(ptr);
        core::sync::atomic::compiler_fence(core::sync::atomic::Ordering::SeqCst);
    }
}
