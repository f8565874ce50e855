//! Memory to measure on.

use crate::embedder::in_drop;
use crate::sys::map::{self, Advice};

/// The step, in bytes, between addresses that may be in different pages.
const SMALLEST_PAGE: usize = 4 << 10;

/// What a huge page is aligned to, in bytes.
const HUGE_PAGE: usize = 2 << 20;

/// Populated memory of the calling thread's own.
pub(super) struct Scratch {
    reservation: *mut u8,
    reserved: usize,
    start: *mut u8,
    len: usize,
}

impl Scratch {
    /// Maps and populates `len` bytes, in huge pages where there are any. `None` if the kernel refuses.
    pub(super) fn populate(len: usize) -> Option<Self> {
        let reserved = len + HUGE_PAGE;
        let reservation = map::reserve(reserved).ok()?;
        let scratch = Self {
            reservation,
            reserved,
            start: reservation.wrapping_add(reservation.align_offset(HUGE_PAGE)),
            len,
        };
        // SAFETY: the range lies in our own reservation, which nobody else knows.
        unsafe {
            map::map_anonymous(scratch.start, len).ok()?;
            // Where there are no huge pages small ones will do.
            let _ = map::advise(scratch.start, len, Advice::HugePage);
        }
        for page in (0..len).step_by(SMALLEST_PAGE) {
            // SAFETY: mapped and ours. Touching, not asking to populate: it works on every kernel.
            unsafe { scratch.start.wrapping_add(page).write_volatile(0) };
        }
        Some(scratch)
    }

    /// The memory.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped over this length, initialised by the kernel, and only reachable through `self`.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours and nobody refers to it any more.
        if let Err(error) = unsafe { map::unmap(self.reservation, self.reserved) } {
            in_drop(|| log::warn!("the memory for measuring loops stays mapped: {error}"));
        }
    }
}
