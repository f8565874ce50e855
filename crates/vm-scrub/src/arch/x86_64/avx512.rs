//! 512-bit vectors, one store or load for each cache line: zeroing past the cache, and
//! verification.
//!
//! In assembly, because the intrinsics and the target feature are younger than the oldest Rust this
//! crate supports. Only instructions of the foundation set (AVX-512F) are used, and only registers
//! 16 and up: they have no older, shorter selves, so the code around needs no `vzeroupper`.
//!
//! Ordering: as in [`avx2`](super::avx2), streaming stores are not ordered before later ordinary
//! ones. The `sfence` at the end, by the thread that zeroed, makes every zero globally visible
//! before the loop returns.

use core::arch::asm;
use core::arch::x86_64::__m128i;

use crate::arch::generic::verify::{self, BLOCK_LINES, Scan};
use crate::arch::generic::{LINE, lines};

/// Sets memory to zero with AVX-512's streaming stores.
#[derive(Clone, Copy, Debug)]
pub struct Stream(());

impl Stream {
    /// The name by which [`ZeroLoop::by_name`](crate::arch::ZeroLoop::by_name) knows this loop.
    pub const NAME: &'static str = "avx512-stream";
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

    /// Whether this processor has AVX-512F and the kernel saves its registers.
    pub fn is_available() -> bool {
        !cfg!(miri) && std::is_x86_feature_detected!("avx512f")
    }

    /// Sets the `len` bytes from `ptr` to zero, and writes nothing else.
    ///
    /// # Safety
    ///
    /// As [`ZeroLoop::zero`](crate::arch::ZeroLoop::zero).
    pub unsafe fn zero(self, ptr: *mut u8, len: usize) {
        // SAFETY: the caller promises `len` writable bytes that nobody else accesses, so the lines
        // inside them are, too, and `lines::zero` passes a count above 0 and a multiple of 64,
        // which a 64-byte `vmovntdq` needs. A `Stream` exists only where AVX-512F does. Every
        // register that changes is declared, and without `nomem` the compiler takes the memory for
        // written.
        let zero_lines = |first: *mut u8, count: usize| unsafe {
            asm!(
                "vpxorq zmm16, zmm16, zmm16",
                "2:",
                "vmovntdq [{at}], zmm16",
                "add {at}, {line}",
                "dec {count}",
                "jnz 2b",
                "sfence",
                at = inout(reg) first => _,
                count = inout(reg) count => _,
                line = const LINE,
                out("zmm16") _,
                options(nostack)
            );
        };
        // SAFETY: the caller's promise, and `zero_lines` writes just the lines it is given.
        unsafe { lines::zero(ptr, len, LINE, zero_lines) }
    }
}

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
        // SAFETY: the caller promises AVX-512F and `count` readable blocks of 512 bytes at a
        // multiple of 64, which `vmovdqa64` needs. A block is read only while the counter is not
        // zero, and nothing is written. Every register the code changes is declared. `readonly` and
        // not `pure`: the reads happen each time.
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
