//! Loops for x86-64, one file for each instruction set.

pub mod avx2;
pub mod avx512;
pub mod clzero;
mod cpuid;
pub mod prefetchw;
pub mod rep_stosb;
pub mod sse2;

#[cfg(not(miri))]
pub(super) use cpuid::has_clflushopt;
