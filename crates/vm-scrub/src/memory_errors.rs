//! Going on where memory is broken.
//!
//! When a thread touches memory that the host cannot give it, because the hardware has lost it, because a mapped file has become
//! shorter, or because there is no huge page left, the kernel sends `SIGBUS`, and by default that is the end of the process and
//! of every guest in it. With [`install`] it is not while vm-scrub zeroes memory or reads it back:
//!
//! - In a [`Pool`](crate::Pool) the page goes to quarantine with its block, the receipt names it
//!   ([`QuarantineReason::MemoryError`](crate::lease::QuarantineReason::MemoryError)), and everything else is scrubbed and can be
//!   leased. [`check_on_grant`](crate::PoolBuilder::check_on_grant) does not lease it.
//! - [`scrub`](crate::scrub) and [`scrub_raw`](crate::scrub_raw) scrub everything else and say where it was
//!   ([`ScrubError::MemoryError`](crate::ScrubError::MemoryError)).
//!
//! # What is promised
//!
//! - Only a signal that this thread's own access raised, within the memory that this thread is scrubbing or verifying at that
//!   moment, is dealt with. Every other `SIGBUS` (another thread's, another address, one that was sent by `kill(2)`, an
//!   alignment error) goes where it went before: to the handler that was there, with the same `siginfo_t` and
//!   context, on the stack and with the mask that it asked for; or, if there was none, the process ends with the same signal.
//! - What raised the signal never counts as scrubbed, nor as verified.
//! - The handler allocates nothing, takes no lock and unwinds nothing: the thread goes on where it was. `errno` is kept.
//! - Memory errors that are reported without an access (`BUS_MCEERR_AO`) go where they went before, unless the thread is at
//!   work on the very address.
//!
//! # What is not
//!
//! - The page is replaced: its place in the address space has nothing to do with what was mapped there any more. In a pool
//!   nobody comes there again. Of memory given to [`scrub_raw`](crate::scrub_raw) that place is inaccessible afterwards, so
//!   that nobody takes zeros for what was there. A huge page (hugetlb) is replaced as a whole, also what of it lies outside the
//!   range, which could not be accessed either.
//! - Where the kernel does not allow the replacement (a limit on mappings or on address space, a seccomp filter that forbids
//!   `mmap(2)`), the signal goes where it went before. So it does for hugetlb memory that is given to `scrub_raw` on kernels
//!   that refuse to replace a part of a huge page in the same words (6.1 does; 6.12 does not).
//! - A thread that blocks `SIGBUS` is ended by the kernel whatever handler there is. A pool's threads inherit the mask of the
//!   thread that builds the pool; the thread that tears a lease down works with them, with a mask of its own.
//! - Guests that run on broken memory, and the VMM's own accesses to it: that is the VMM's to handle. So is a handler that is
//!   installed later without handing on what is not its own.
//! - Broken memory that does not report itself.
//!
//! Without it, [`Policy::probe`](crate::Policy::probe) asks the kernel before each access, and finds what the kernel knows
//! already.

use crate::sys;

/// Installs the handler of `SIGBUS`, for the whole process and for good. Calling it again does nothing.
///
/// Call it once, after whatever else installs a handler of `SIGBUS` (a language's runtime, the VMM itself), and before threads
/// are put under a seccomp filter. When a memory error is met the handler makes the call `mmap(2)`; to end a process that
/// had no handler, `rt_sigaction(2)`, `getpid(2)`, `gettid(2)` and `rt_tgsigqueueinfo(2)`.
///
/// # Errors
///
/// If `rt_sigaction(2)` fails, or if another handler was installed over this one since the first call: it is not replaced.
pub fn install() -> Result<(), sys::Error> {
    sys::sigbus::install()
}
