//! Writing cache lines back to memory and dropping them, so that the next read comes from memory.

/// The stride, in bytes, at which lines are flushed: the line of every x86-64 processor, and the smallest one that AArch64
/// processors have had.
const STRIDE: usize = if cfg!(target_arch = "x86_64") { 64 } else { 32 };

/// Writes every cache line of `[ptr, ptr + len)` back to memory and drops it from all caches. On return the flushes are done.
///
/// On processors other than x86_64 and aarch64 nothing happens.
///
/// # Safety
/// The range must be mapped readable.
pub(crate) unsafe fn flush_from_cache(ptr: *const u8, len: usize) {
    if len == 0 {
        return;
    }
    let first = ptr.wrapping_sub(ptr.addr() % STRIDE);
    let lines = (ptr.addr() % STRIDE + len).div_ceil(STRIDE);
    // SAFETY: each line holds at least one byte of the caller's range, so it is mapped.
    unsafe { flush_lines(first, lines) };
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
unsafe fn flush_lines(first: *const u8, lines: usize) {
    let weakly_ordered = super::x86_64::has_clflushopt();
    for line in 0..lines {
        let line = first.wrapping_add(line * STRIDE);
        // SAFETY: the caller says that the line is mapped; flushing changes no content. The instruction without an order, an
        // order of magnitude faster, was announced by the processor; the other one is part of SSE2 and so of x86-64.
        unsafe {
            if weakly_ordered {
                core::arch::asm!("clflushopt [{line}]", line = in(reg) line, options(nostack, preserves_flags));
            } else {
                core::arch::x86_64::_mm_clflush(line);
            }
        }
    }
    // SAFETY: SSE2 is part of x86-64, and a fence touches no memory.
    unsafe { core::arch::x86_64::_mm_mfence() };
}

#[cfg(all(target_arch = "aarch64", not(miri)))]
unsafe fn flush_lines(first: *const u8, lines: usize) {
    for line in 0..lines {
        let line = first.wrapping_add(line * STRIDE);
        // SAFETY: the caller says that the line is mapped; cleaning and invalidating it by address is allowed to programs on
        // Linux and changes no content.
        unsafe {
            core::arch::asm!("dc civac, {line}", line = in(reg) line, options(nostack, preserves_flags));
        }
    }
    // SAFETY: a barrier touches no memory.
    unsafe { core::arch::asm!("dsb sy", options(nostack, preserves_flags)) };
}

#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
unsafe fn flush_lines(_first: *const u8, _lines: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flushing_changes_nothing_and_stays_in_its_pages() {
        let memory: Vec<u8> = (0..4200_u32).map(|byte| byte as u8).collect();
        for (start, len) in [(0, 0), (0, 1), (63, 2), (1, 4199), (4096, 64)] {
            // SAFETY: the range lies in the vector.
            unsafe { flush_from_cache(memory[start..].as_ptr(), len) };
        }
        assert!(
            memory
                .iter()
                .enumerate()
                .all(|(at, byte)| *byte == at as u8)
        );
    }
}
