//! Moving pages by `mremap(2)`, whatever a VMM has done to its guest's memory.

use super::BLOCK;
use crate::sys;
use crate::sys::map::{self, Advice};

/// The smallest piece, in bytes, that a move is split into: any host page size divides it or is this.
const SMALLEST_MOVE: usize = 4096;

/// Makes guard pages, which a VMM may have put into its guest's memory, ordinary empty ones.
///
/// # Safety
/// The range must be the caller's.
pub(super) unsafe fn remove_guards(address: *mut u8, len: usize) -> sys::Result<()> {
    // SAFETY: passed on to the caller.
    match unsafe { map::advise(address, len, Advice::RemoveGuards) } {
        // A kernel without guard pages has none to remove.
        Err(error) if error.errno() != Some(libc::EINVAL) => Err(error),
        _ => Ok(()),
    }
}

/// Moves `len` bytes of pages, in halves where they are not one mapping. On failure it says how many bytes, from the start,
/// were moved.
///
/// Before Linux 6.17 `mremap` moves within one mapping only. A VMM that has bound parts of its guest's memory to different
/// nodes, for one, has made a border that nothing removes.
///
/// # Safety
/// As for [`map::move_pages`]; and what is behind the source must be the caller's too.
pub(super) unsafe fn move_pieces(
    from: *mut u8,
    to: *mut u8,
    len: usize,
) -> Result<(), (usize, sys::Error)> {
    let mut moved = 0;
    let mut piece = len;
    while moved < len {
        piece = piece.min(len - moved);
        let at = from.wrapping_add(moved);
        // SAFETY: each piece lies in the caller's ranges.
        unsafe {
            if piece > SMALLEST_MOVE && !map::is_one_mapping(at, piece).map_err(|e| (moved, e))? {
                // Through a huge page only where there is a border within it: it would be cut.
                let whole = if piece > BLOCK { BLOCK } else { SMALLEST_MOVE };
                piece = (piece / 2).next_multiple_of(whole);
                continue;
            }
            map::move_pages(at, to.wrapping_add(moved), piece).map_err(|error| (moved, error))?;
        }
        moved += piece;
        // The rest may be one mapping again.
        piece = len - moved;
    }
    Ok(())
}
