//! Private anonymous memory: granted and revoked by moving pages between the arena and a window.
//!
//! A page is in exactly one place at any time. `mremap(2)` moves page tables, not bytes, so a gigabyte changes hands in
//! milliseconds and stays populated: the next guest takes no page faults.

use super::{Backing, Revocation, Revoked, Window, WindowSpace, keep_private};
use crate::scrub::{HostPtr, Residency};
use crate::sys;
use crate::sys::map::{self, Advice};
use std::ops::Range;

/// The smallest piece, in bytes, that a move is split into: any host page size divides it or is this.
const SMALLEST_MOVE: usize = 4096;

/// All memory of a pool as one private anonymous mapping.
#[derive(Debug)]
pub(crate) struct AnonymousArena {
    window: Option<Window>,
    base: HostPtr,
}

impl AnonymousArena {
    /// Maps `len` bytes (a multiple of 2 MiB), nothing populated, with transparent huge pages or without.
    pub(crate) fn map(len: usize, huge_pages: bool) -> sys::Result<Self> {
        let window = WindowSpace::new(0).open(len)?;
        let base = window.start();
        // SAFETY: the window is a fresh reservation of this length that nobody else knows.
        unsafe {
            map::map_anonymous(base.0, len)?;
            keep_private(base.0, len);
        }
        let advice = if huge_pages {
            Advice::HugePage
        } else {
            Advice::NoHugePage
        };
        // SAFETY: the range was mapped just now and is ours.
        match unsafe { map::advise(base.0, len, advice) } {
            Ok(()) => {}
            // A kernel without transparent huge pages: small pages are all there is.
            Err(error) if !huge_pages && error.errno() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
        Ok(Self {
            window: Some(window),
            base,
        })
    }
}

impl Backing for AnonymousArena {
    fn arena(&self) -> HostPtr {
        self.base
    }

    fn revocation(&self) -> Revocation {
        Revocation::Mremap
    }

    unsafe fn grant(&self, offset: usize, window: *mut u8, len: usize) -> sys::Result<()> {
        // SAFETY: the caller says that the range is free and that the window is closed, so both are ours alone. The
        // arena's range stays mapped and empty, which keeps its address space from anybody else.
        unsafe { map::move_pages(self.base.at(offset), window, len) }
    }

    unsafe fn revoke(&self, offset: usize, window: *mut u8, len: usize) -> sys::Result<Revoked> {
        let home = self.base.at(offset);
        // SAFETY: the caller says that the range was granted at `window`, so the arena's own range is empty and ours, and
        // nobody holds references. After the move a stray access to the window can reach only fresh pages of the window
        // itself, and the next call throws those away and closes it. The guest's side may have changed the protection of
        // its memory, and pages keep theirs when they move, so the arena's is set again.
        unsafe {
            move_pieces(window, home, len)?;
            map::make_inaccessible(window, len)?;
            map::make_writable(home, len)?;
        }
        Ok(Revoked(()))
    }

    fn residency(&self, range: Range<usize>) -> sys::Result<Residency> {
        Residency::of_private_mapping(self.base, range)
    }
}

impl Drop for AnonymousArena {
    fn drop(&mut self) {
        // Unmaps the arena with its guards. Granted ranges live in other windows and stay what they are.
        drop(self.window.take());
    }
}

/// Moves `len` bytes of pages, in halves where the kernel will not do it in one go.
///
/// Before Linux 6.17 `mremap` moves within one mapping only, and answers `EFAULT` across a border. A VMM that has advised or
/// protected a part of its guest's memory differently has made such borders.
///
/// # Safety
/// As for [`map::move_pages`].
unsafe fn move_pieces(from: *mut u8, to: *mut u8, len: usize) -> sys::Result<()> {
    // SAFETY: passed on to the caller.
    match unsafe { map::move_pages(from, to, len) } {
        Err(error) if error.errno() == Some(libc::EFAULT) && len > SMALLEST_MOVE => {
            let half = (len / 2).next_multiple_of(SMALLEST_MOVE);
            // SAFETY: both halves lie in the caller's ranges.
            unsafe {
                move_pieces(from, to, half)?;
                move_pieces(from.wrapping_add(half), to.wrapping_add(half), len - half)
            }
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::super::BLOCK;
    use super::*;
    use crate::sys::fault;

    fn fill(start: *mut u8, len: usize, byte: u8) {
        // SAFETY: tests pass mapped, writable ranges of their own.
        unsafe { start.write_bytes(byte, len) };
    }

    fn read(at: *mut u8) -> u8 {
        // SAFETY: tests pass mapped, readable addresses of their own.
        unsafe { at.read_volatile() }
    }

    #[test]
    fn bytes_come_back_to_the_arena_and_the_window_is_closed() {
        let arena = AnonymousArena::map(2 * BLOCK, false).unwrap();
        let window = WindowSpace::new(0).open(BLOCK).unwrap();
        let start = window.start().0;
        // SAFETY: the range is free and the window closed; then it is granted and nobody refers to it.
        unsafe {
            arena.grant(BLOCK, start, BLOCK).unwrap();
            fill(start, BLOCK, 0xa5);
            assert_eq!(
                read(arena.base.at(BLOCK)),
                0,
                "the arena still sees the guest's pages"
            );
            arena.revoke(BLOCK, start, BLOCK).unwrap();
        }
        assert_eq!(read(arena.base.at(BLOCK)), 0xa5);
        assert_eq!(read(arena.base.at(2 * BLOCK - 1)), 0xa5);
        // SAFETY: the window is ours. That populating fails is how one sees that it is closed without touching it.
        assert!(unsafe { map::populate(start, BLOCK) }.is_err());
    }

    #[test]
    fn borders_that_the_vmm_made_do_not_stop_revocation() {
        let arena = AnonymousArena::map(2 * BLOCK, true).unwrap();
        let window = WindowSpace::new(0).open(2 * BLOCK).unwrap();
        let start = window.start().0;
        // SAFETY: as above; mprotect and madvise are applied to the window, which is ours.
        unsafe {
            arena.grant(0, start, 2 * BLOCK).unwrap();
            fill(start, 2 * BLOCK, 0x5a);
            let page = start.wrapping_add(BLOCK + 3 * 4096);
            assert_eq!(libc::mprotect(page.cast(), 4096, libc::PROT_READ), 0);
            map::advise(start, 8192, Advice::NoHugePage).unwrap();
            arena.revoke(0, start, 2 * BLOCK).unwrap();
            assert_eq!(read(arena.base.at(BLOCK + 3 * 4096)), 0x5a);
            // Writable everywhere again, or the scrubber would fault.
            fill(arena.base.0, 2 * BLOCK, 0);
        }
    }

    #[test]
    fn each_step_that_fails_is_reported() {
        let cases = [
            (fault::Call::Mremap, 0, libc::ENOMEM),
            (fault::Call::Mmap, 0, libc::ENOMEM),
            (fault::Call::Mprotect, 0, libc::EACCES),
        ];
        for (call, skip, errno) in cases {
            let arena = AnonymousArena::map(BLOCK, false).unwrap();
            let window = WindowSpace::new(0).open(BLOCK).unwrap();
            // SAFETY: the range is free and the window closed; then it is granted and nobody refers to it.
            let error = unsafe {
                arena.grant(0, window.start().0, BLOCK).unwrap();
                let _fault = fault::inject(call, skip, 1, errno);
                arena.revoke(0, window.start().0, BLOCK).unwrap_err()
            };
            assert_eq!((error.call, error.errno()), (call, Some(errno)));
        }
    }
}
