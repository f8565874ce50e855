//! Address space in which one region of one guest appears.
//!
//! Every region gets a window of its own, aligned to 2 MiB so that huge pages stay huge, with inaccessible guard space on
//! both sides so that an access that runs off either end faults. A window whose guest is gone stays reserved and
//! inaccessible for as long as there is room ([`WindowSpace`]): a pointer that somebody forgot must fault, and not find the
//! next guest at the same address.

use super::BLOCK;
use crate::scrub::HostPtr;
use crate::sys::{self, map};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// A closed (inaccessible) stretch of reserved address space with guard space around it.
///
/// Dropping it gives the address space back; a window that still shows memory must be [leaked](Window::leak) instead.
#[derive(Debug)]
pub(crate) struct Window {
    reservation: HostPtr,
    reserved: usize,
    start: HostPtr,
    len: usize,
}

impl Window {
    /// Reserves a window of `len` bytes. Nothing is accessible in it yet.
    fn reserve(len: usize) -> sys::Result<Self> {
        let too_large = || sys::Error {
            call: sys::Call::Mmap,
            source: std::io::Error::from_raw_os_error(libc::ENOMEM),
        };
        // A guard block before, a guard block behind, and what aligning the start can cost.
        let reserved = len
            .checked_next_multiple_of(BLOCK)
            .and_then(|len| len.checked_add(3 * BLOCK))
            .ok_or_else(too_large)?;
        let reservation = map::reserve(reserved)?;
        let guard = BLOCK + reservation.align_offset(BLOCK);
        Ok(Self {
            reservation: HostPtr(reservation),
            reserved,
            start: HostPtr(reservation.wrapping_add(guard)),
            len,
        })
    }

    /// Where the window begins. Aligned to 2 MiB.
    pub(crate) fn start(&self) -> HostPtr {
        self.start
    }

    /// The window's length in bytes, without the guards.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Keeps the address space for ever: for a window that may still show memory to somebody.
    pub(crate) fn leak(self) {
        std::mem::forget(self);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours, and a window is dropped only when it is closed, so nothing is reachable in it.
        if let Err(error) = unsafe { map::unmap(self.reservation.0, self.reserved) } {
            log::warn!(
                "{} bytes of address space stay reserved: {error}",
                self.reserved
            );
        }
    }
}

/// Where windows come from, and where they rest when their guest is gone.
#[derive(Debug)]
pub(crate) struct WindowSpace {
    /// How many bytes of address space may be kept by windows of guests that are gone.
    budget: usize,
    retired: Mutex<Retired>,
}

#[derive(Debug, Default)]
struct Retired {
    oldest_first: VecDeque<Window>,
    bytes: usize,
}

impl WindowSpace {
    /// Makes a source of windows that keeps at most `budget` bytes of used ones closed and reserved.
    pub(crate) fn new(budget: usize) -> Self {
        Self {
            budget,
            retired: Mutex::default(),
        }
    }

    fn retired(&self) -> std::sync::MutexGuard<'_, Retired> {
        // Nothing in the critical sections below can leave the queue half changed.
        self.retired.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves a window of `len` bytes; where address space is short, retired windows are given up, the oldest first.
    pub(crate) fn open(&self, len: usize) -> sys::Result<Window> {
        loop {
            let error = match Window::reserve(len) {
                Ok(window) => return Ok(window),
                Err(error) => error,
            };
            if error.errno() != Some(libc::ENOMEM) || self.release_oldest().is_none() {
                return Err(error);
            }
        }
    }

    /// Keeps a closed window reserved, and gives up the oldest ones beyond the budget.
    pub(crate) fn retire(&self, window: Window) {
        let mut given_up = Vec::new();
        {
            let mut retired = self.retired();
            retired.bytes += window.reserved;
            retired.oldest_first.push_back(window);
            while retired.bytes > self.budget {
                let Some(oldest) = retired.oldest_first.pop_front() else {
                    break;
                };
                retired.bytes -= oldest.reserved;
                given_up.push(oldest);
            }
        }
        // Unmapped here, outside the lock.
        drop(given_up);
    }

    fn release_oldest(&self) -> Option<()> {
        let oldest = {
            let mut retired = self.retired();
            let oldest = retired.oldest_first.pop_front()?;
            retired.bytes -= oldest.reserved;
            oldest
        };
        drop(oldest);
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fault;

    fn addresses(window: &Window) -> std::ops::Range<usize> {
        let start = window.start().0.addr();
        start..start + window.len()
    }

    #[test]
    fn windows_are_aligned_and_guarded() {
        let space = WindowSpace::new(0);
        for len in [4096, BLOCK, 3 * BLOCK + 4096] {
            let window = space.open(len).unwrap();
            let range = addresses(&window);
            let reservation = window.reservation.0.addr();
            assert_eq!(range.start % BLOCK, 0);
            assert_eq!(range.len(), len);
            assert!(range.start - reservation >= BLOCK, "no guard before");
            assert!(
                reservation + window.reserved - range.end >= BLOCK,
                "no guard behind"
            );
        }
    }

    #[test]
    fn a_retired_window_is_not_given_out_again_while_there_is_room() {
        let space = WindowSpace::new(1 << 40);
        let mut seen: Vec<std::ops::Range<usize>> = Vec::new();
        for _ in 0..64 {
            let window = space.open(BLOCK).unwrap();
            let range = addresses(&window);
            assert!(
                seen.iter()
                    .all(|old| old.end <= range.start || range.end <= old.start)
            );
            seen.push(range);
            space.retire(window);
        }
    }

    #[test]
    fn the_budget_bounds_what_is_kept() {
        let space = WindowSpace::new(8 * BLOCK);
        for _ in 0..16 {
            let window = space.open(BLOCK).unwrap();
            space.retire(window);
            assert!(space.retired().bytes <= 8 * BLOCK);
        }
        assert_eq!(space.retired().oldest_first.len(), 2);
    }

    #[test]
    fn short_of_address_space_the_oldest_go_first() {
        let space = WindowSpace::new(1 << 40);
        space.retire(space.open(BLOCK).unwrap());
        space.retire(space.open(BLOCK).unwrap());
        let second = addresses(&space.retired().oldest_first[1]);

        let once = fault::inject(fault::Call::Mmap, 0, 1, libc::ENOMEM);
        space.retire(space.open(BLOCK).unwrap());
        drop(once);
        assert_eq!(space.retired().oldest_first.len(), 2);
        assert_eq!(addresses(&space.retired().oldest_first[0]), second);

        let _always = fault::inject(fault::Call::Mmap, 0, u32::MAX, libc::ENOMEM);
        let error = space.open(BLOCK).unwrap_err();
        assert_eq!(error.errno(), Some(libc::ENOMEM));
        assert_eq!(space.retired().oldest_first.len(), 0);
    }

    #[test]
    fn lengths_that_no_address_space_holds_are_refused() {
        assert!(WindowSpace::new(0).open(usize::MAX - 4095).is_err());
    }
}
