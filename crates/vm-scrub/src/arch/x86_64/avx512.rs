//! Verification with 512-bit vectors: one load for each cache line.
//!
//! In assembly, because the intrinsics and the target feature are younger than the oldest Rust this crate supports. Only
//! instructions of the foundation set (AVX-512F) are used, and only registers 16 and up: they have no older, shorter
//! selves, so the code around needs no `vzeroupper`.

use core::arch::asm;
use core::arch::x86_64::__m128i;

use crate::arch::generic::verify::{self, BLOCK_LINES, Scan};

/// Finds the first byte that is not zero with AVX-512.
#[derive(Clone, Copy, Debug)]
pub struct Verify(());

impl Verify {
    /// The name by which [`VerifyLoop::by_name`](crate::arch::VerifyLoop::by_name) knows this loop.
    pub const NAME: &'static str = "avx512";

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

    /// Whether this processor has AVX-512F and the kernel saves its registers.
    pub fn is_available() -> bool {
        !cfg!(miri) && cfg!(target_feature = "sse2") && std::is_x86_feature_detected!("avx512f")
    }

    /// The offset of the first byte of the `len` from `ptr` that is not zero, in bytes.
    ///
    /// # Safety
    ///
    /// As [`VerifyLoop::first_nonzero`](crate::arch::VerifyLoop::first_nonzero).
    pub unsafe fn first_nonzero(self, ptr: *const u8, len: usize) -> Option<usize> {
        // SAFETY: a `Verify` exists only where AVX-512F does; the memory is the caller's promise.
        unsafe { verify::first_nonzero::<Zmm>(ptr, len) }
    }
}

enum Zmm {}

impl Scan for Zmm {
    #[inline(always)]
    unsafe fn line_is_zero(ptr: *const u8) -> bool {
        // A handful of single lines for each call: the baseline's vectors do.
        // SAFETY: the caller promises a readable line; SSE2 was checked together with AVX-512F.
        unsafe { <__m128i as Scan>::line_is_zero(ptr) }
    }

    #[inline(always)]
    unsafe fn zero_blocks(ptr: *const u8, count: usize) -> usize {
        // The displacements below are those of eight lines.
        const { assert!(BLOCK_LINES == 8) };
        let left: usize;
        // SAFETY: the caller promises AVX-512F and `count` readable blocks of 512 bytes at a multiple of 64, which
        // `vmovdqa64` needs. A block is read only while the counter is not zero, and nothing is written. Every register
        // the code changes is declared. `readonly` and not `pure`: the reads happen each time.
        unsafe {
            asm!(
                "test {left}, {left}",
                "jz 3f",
                "2:",
                "vmovdqa64 zmm16, [{at}]",
                "vmovdqa64 zmm17, [{at} + 64]",
                "vmovdqa64 zmm18, [{at} + 128]",
                "vmovdqa64 zmm19, [{at} + 192]",
                "vporq zmm16, zmm16, [{at} + 256]",
                "vporq zmm17, zmm17, [{at} + 320]",
                "vporq zmm18, zmm18, [{at} + 384]",
                "vporq zmm19, zmm19, [{at} + 448]",
                // Truth table 0xfe: any of the three.
                "vpternlogq zmm16, zmm17, zmm18, 0xfe",
                "vporq zmm16, zmm16, zmm19",
                "vptestmq k1, zmm16, zmm16",
                "kortestw k1, k1",
                "jnz 3f",
                "add {at}, 512",
                "dec {left}",
                "jnz 2b",
                "3:",
                at = inout(reg) ptr => _,
                left = inout(reg) count => left,
                out("zmm16") _, out("zmm17") _, out("zmm18") _, out("zmm19") _,
                out("k1") _,
                options(nostack, readonly)
            );
        }
        count - left
    }
}
