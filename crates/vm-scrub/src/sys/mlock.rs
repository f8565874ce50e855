//! Keeping memory from being swapped out.
//!
//! The kernel counts what is locked by address space, populated or not, and holds it against `RLIMIT_MEMLOCK`. Moving a locked
//! range with `MREMAP_DONTUNMAP` has it counted twice, for good (seen on Linux 6.18): ranges are unlocked before they move.

use super::{Call, Result, done, fault};

/// `MLOCK_ONFAULT` of `asm-generic/mman.h`: pages are locked when they are populated, and not populated to be locked.
const MLOCK_ONFAULT: libc::c_uint = 1;

/// `MADV_DONTNEED_LOCKED` of `asm-generic/mman-common.h`.
const MADV_DONTNEED_LOCKED: libc::c_int = 24;

/// Keeps what is populated in `[address, address + len)`, now and later, from being swapped out (Linux 4.4).
///
/// # Safety
/// The range must belong to the caller.
pub(crate) unsafe fn lock(address: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::Mlock)?;
    // SAFETY: the caller owns the range; locking does not change what the memory contains.
    let status = unsafe { libc::syscall(libc::SYS_mlock2, address, len, MLOCK_ONFAULT) };
    done(Call::Mlock, status as libc::c_int)
}

/// Lets `[address, address + len)` be swapped out again, if it was locked.
///
/// # Safety
/// The range must belong to the caller.
pub(crate) unsafe fn unlock(address: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::Munlock)?;
    // SAFETY: the caller owns the range; unlocking does not change what the memory contains.
    done(Call::Munlock, unsafe { libc::munlock(address.cast(), len) })
}

/// Gives what a locked range of private anonymous memory contains back to the kernel; it stays locked, and is empty (Linux
/// 5.18, `EINVAL` before).
///
/// # Safety
/// The range and what it contains must belong to the caller.
pub(crate) unsafe fn discard(address: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::DiscardLocked)?;
    // SAFETY: the caller owns the range, and wants what it contains to be thrown away.
    done(Call::DiscardLocked, unsafe {
        libc::madvise(address.cast(), len, MADV_DONTNEED_LOCKED)
    })
}
