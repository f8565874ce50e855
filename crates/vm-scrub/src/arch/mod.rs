//! The loops that set memory to zero, and the loops that find the first byte that is not zero.
//!
//! Which loop is fastest differs from processor to processor and from length to length, and a loop
//! that is broken in a corner leaks one guest's memory to the next. So every loop is reachable by
//! itself: one directory for each architecture, one file for each instruction set, each loop a type
//! of no size that can only be had where it runs. [`ZeroLoop`] and [`VerifyLoop`] are handles to
//! any of them by name; this file is the only place that chooses.
//!
//! | zeroing | needs | bypasses the cache |
//! |---|---|---|
//! | `portable` | nothing: the C library's `memset` | no |
//! | `rep-stosb` | x86-64; fast where the processor says so (ERMS or FSRM) | no |
//! | `prefetchw` | x86-64 with AVX2, since about 2014 | no |
//! | `avx2-stream` | x86-64 with AVX2 | yes |
//! | `avx512-stream` | x86-64 with AVX-512F | yes |
//! | `clzero` | x86-64 by AMD or Hygon, with 64-byte lines | yes |
//! | `dc-zva` | AArch64, unless the system forbids it | up to the processor |
//! | `neon-pairs` | AArch64 with Neon | up to the processor |
//!
//! | verification | needs |
//! |---|---|
//! | `portable` | nothing |
//! | `sse2` | x86-64 |
//! | `avx2` | x86-64 with AVX2 |
//! | `avx512` | x86-64 with AVX-512F |
//! | `neon` | AArch64 with Neon |
//!
//! # When the zeros are there
//!
//! When [`ZeroLoop::zero`] returns, an ordinary publication by the same thread (a release store,
//! unlocking a mutex, sending on a channel, a system call) makes every zero visible to whoever it
//! reaches, whichever loop was used. That needs saying, because streaming stores and their kin are
//! weakly ordered: they wait in write-combining buffers and may reach memory after ordinary stores
//! that come later in the program. Without a fence the pool's word 'this block is clean' could
//! overtake the zeros, and the next guest would read its predecessor's bytes (the class of Xen's
//! XSA-364, where scrubbed pages were handed on before the zeros had left a cache). Only the
//! storing thread can wait for its own buffers; a fence by the thread that publishes on behalf of
//! others is too late. Every loop with such stores therefore fences before it returns.
//!
//! What this does not promise: that the zeros have left the cache for memory, or that devices which
//! are not coherent with the cache see them.
//!
//! # What the compiler may not do
//!
//! Zeros are stored even if the program never looks at the memory again, and verification reads the
//! memory even if the compiler just saw it being zeroed: `barrier` makes it forget.

#[cfg(target_arch = "aarch64")]
pub mod aarch64;
pub mod all;
mod barrier;
mod flush;
mod fused;
mod generic;
mod table;
mod unknown;
#[cfg(target_arch = "x86_64")]
pub mod x86_64;

#[cfg(test)]
mod tests;

pub(crate) use flush::flush_from_cache;
use table::{FirstNonzero, Row, Zero, handle, verify_row, zero_row};
pub use unknown::UnknownLoop;

/// Every zeroing loop of this architecture.
static ZERO: &[Row<Zero>] = &[
    zero_row!(all::portable::Zero),
    #[cfg(target_arch = "x86_64")]
    zero_row!(x86_64::rep_stosb::Zero),
    #[cfg(target_arch = "x86_64")]
    zero_row!(x86_64::prefetchw::Zero),
    #[cfg(target_arch = "x86_64")]
    zero_row!(x86_64::avx2::Stream),
    #[cfg(target_arch = "x86_64")]
    zero_row!(x86_64::avx512::Stream),
    #[cfg(target_arch = "x86_64")]
    zero_row!(x86_64::clzero::Zero),
    #[cfg(target_arch = "aarch64")]
    zero_row!(aarch64::dc_zva::Zero),
    #[cfg(target_arch = "aarch64")]
    zero_row!(aarch64::neon::Zero),
];

/// Every verification loop of this architecture, from narrow to wide.
static VERIFY: &[Row<FirstNonzero>] = &[
    verify_row!(all::portable::Verify),
    #[cfg(target_arch = "x86_64")]
    verify_row!(x86_64::sse2::Verify),
    #[cfg(target_arch = "x86_64")]
    verify_row!(x86_64::avx2::Verify),
    #[cfg(target_arch = "x86_64")]
    verify_row!(x86_64::avx512::Verify),
    #[cfg(target_arch = "aarch64")]
    verify_row!(aarch64::neon::Verify),
];

/// The names of every zeroing loop of any architecture.
const ZERO_NAMES: &[&str] = &[
    "portable",
    "rep-stosb",
    "prefetchw",
    "avx2-stream",
    "avx512-stream",
    "clzero",
    "dc-zva",
    "neon-pairs",
];

/// The names of every verification loop of any architecture.
const VERIFY_NAMES: &[&str] = &["portable", "sse2", "avx2", "avx512", "neon"];

/// A loop that sets memory to zero and that this processor can run.
///
/// Parses from and prints as its name. There is no way to have a handle to a loop that is not
/// available.
#[derive(Clone, Copy)]
pub struct ZeroLoop(&'static Row<Zero>);

handle!(ZeroLoop, "zeroing", ZERO, ZERO_NAMES);

impl ZeroLoop {
    /// A good loop without measuring: `rep-stosb` where the processor announces it as fast (ERMS or
    /// FSRM), else `portable`.
    pub fn best_guess() -> Self {
        #[cfg(target_arch = "x86_64")]
        if x86_64::rep_stosb::Zero::is_fast() {
            return Self(const { &zero_row!(x86_64::rep_stosb::Zero) });
        }
        Self(const { &zero_row!(all::portable::Zero) })
    }

    /// Whether the zeros bypass the cache, so that reading them back comes from memory.
    pub fn is_streaming(self) -> bool {
        self.0.streaming
    }

    /// Sets the `len` bytes from `ptr` to zero, and writes nothing else.
    ///
    /// Any alignment and any length will do. With `len` 0 nothing is accessed and `ptr` may be
    /// anything. On return every zero is ordered before whatever this thread publishes next; see
    /// the [module](self#when-the-zeros-are-there).
    ///
    /// # Safety
    ///
    /// The `len` bytes from `ptr` must be valid for writes and lie inside one mapping or
    /// allocation, and nothing else (thread, guest, device or Rust reference) may access them
    /// during the call.
    pub unsafe fn zero(self, ptr: *mut u8, len: usize) {
        // SAFETY: the row came from a list filtered by availability, or from `best_guess`, which
        // asked; the memory is the caller's promise.
        unsafe { (self.0.run)(ptr, len) }
    }
}

/// A loop that finds the first byte that is not zero and that this processor can run.
///
/// Parses from and prints as its name. There is no way to have a handle to a loop that is not
/// available.
#[derive(Clone, Copy)]
pub struct VerifyLoop(&'static Row<FirstNonzero>);

handle!(VerifyLoop, "verification", VERIFY, VERIFY_NAMES);

impl VerifyLoop {
    /// The loop that runs everywhere.
    pub fn portable() -> Self {
        Self(const { &verify_row!(all::portable::Verify) })
    }

    /// The offset of the first byte of the `len` from `ptr` that is not zero, in bytes; `None` if
    /// all are zero.
    ///
    /// Any alignment and any length will do. With `len` 0 nothing is accessed and `ptr` may be
    /// anything. Nothing outside the range is read, and every byte up to the one that is returned
    /// really is.
    ///
    /// # Safety
    ///
    /// The `len` bytes from `ptr` must be valid for reads, initialised, and lie inside one mapping
    /// or allocation, and nothing may write to them during the call.
    pub unsafe fn first_nonzero(self, ptr: *const u8, len: usize) -> Option<usize> {
        // SAFETY: the row came from a list filtered by availability; the memory is the caller's
        // promise.
        unsafe { (self.0.run)(ptr, len) }
    }
}
