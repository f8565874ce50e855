//! Asking the kernel for pages, and giving them back.
//!
//! Taking a mutable slice makes these safe: whatever the kernel does to the content of those pages, nobody else looks.

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, madvise};
use std::ptr::NonNull;

/// Has the kernel supply every page of `memory`, writable, and enter it into the page tables (`MADV_POPULATE_WRITE`, Linux
/// 5.14). The content stays.
pub(crate) fn populate(memory: &mut [u8]) -> nix::Result<()> {
    advise(memory, MmapAdvise::MADV_POPULATE_WRITE)
}

/// Gives every page of `memory` back to the kernel (`MADV_DONTNEED`). Private anonymous memory reads as zero afterwards.
pub(crate) fn discard(memory: &mut [u8]) -> nix::Result<()> {
    advise(memory, MmapAdvise::MADV_DONTNEED)
}

fn advise(memory: &mut [u8], advice: MmapAdvise) -> nix::Result<()> {
    // The kernel rounds lengths up to whole pages; beyond the slice, memory is somebody else's.
    if !memory.len().is_multiple_of(4096) {
        return Err(Errno::EINVAL);
    }
    let len = memory.len();
    // SAFETY: the pages lie in an exclusively borrowed slice; both kinds of advice leave them mapped, and every content that
    // they can have afterwards is valid for bytes.
    unsafe { madvise(NonNull::from(memory).cast(), len, advice) }
}

#[cfg(test)]
mod tests {
    use super::super::{Mapping, ensure_resident, ensure_zero};
    use super::*;
    use vm_scrub::PageSize;

    #[test]
    fn pages_come_and_go() {
        let mut mapping = Mapping::anonymous(64 << 10, PageSize::Base4K).expect("mapped");
        let memory = mapping.bytes();
        assert!(ensure_resident(memory).is_err());
        populate(memory).expect("populated");
        ensure_resident(memory).expect("resident");
        memory.fill(7);
        discard(memory).expect("discarded");
        assert!(ensure_resident(memory).is_err());
        ensure_zero(memory).expect("zero");
        assert_eq!(
            populate(&mut memory[..5000]),
            Err(Errno::EINVAL),
            "half a page"
        );
        assert_eq!(
            populate(&mut memory[1..4097]),
            Err(Errno::EINVAL),
            "not at a page"
        );
    }
}
