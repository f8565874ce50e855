//! Address space in which one region of one guest appears.
//!
//! Every region gets a window of its own, aligned to 2 MiB so that huge pages stay huge, with inaccessible guard space on
//! both sides so that an access that runs off either end faults. A window whose guest is gone stays reserved and
//! inaccessible for as long as there is room ([`WindowSpace`]): a pointer that somebody forgot must fault, and not find the
//! next guest at the same address.
//!
//! Windows are cut from large reservations, one behind the other. To the kernel, closed windows that touch are one mapping;
//! if each had a place of its own, somewhere between the mappings of the VMM, every guest that is gone would count towards
//! `vm.max_map_count`, and after 65,530 small ones there would be no more mappings for anybody.

use super::BLOCK;
use crate::embedder::in_drop;
use crate::scrub::HostPtr;
use crate::sys::{self, map};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The budget for windows of guests that are gone is this many reservations large. A reservation is given back as a whole,
/// so this is also how finely the budget is kept.
const RESERVATIONS: usize = 64;

/// The most that is reserved at once, in bytes, however large the budget: 16 GiB, a 64th of the default budget.
const LARGEST: usize = 16 << 30;

/// Address space of this process that nothing else is mapped to.
#[derive(Debug)]
struct Reservation {
    start: HostPtr,
    len: usize,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the reservation is ours. Windows hold it, and are dropped only when they are closed, so nothing is
        // reachable in it.
        if let Err(error) = unsafe { map::unmap(self.start.0, self.len) } {
            in_drop(|| log::warn!("{} bytes of address space stay reserved: {error}", self.len));
        }
    }
}

/// A closed (inaccessible) stretch of reserved address space with guard space around it.
///
/// Dropping it gives the address space back, together with the others of its reservation; a window that still shows memory
/// must be [leaked](Window::leak) instead.
#[derive(Debug)]
pub(crate) struct Window {
    #[cfg_attr(
        not(test),
        expect(dead_code, reason = "held so that the address space stays reserved")
    )]
    reservation: Arc<Reservation>,
    start: HostPtr,
    len: usize,
}

impl Window {
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

    /// How much address space the window takes, with the guard block behind it.
    fn taken(&self) -> usize {
        // No overflow: it was computed when the window was cut.
        self.len.next_multiple_of(BLOCK) + BLOCK
    }
}

/// A reservation of which windows are cut, from the start.
#[derive(Debug)]
struct Uncut {
    reservation: Arc<Reservation>,
    /// Where the next window begins, in bytes from the start.
    next: usize,
}

impl Uncut {
    /// Reserves room for windows that take `bytes` together.
    fn reserve(bytes: usize) -> sys::Result<Self> {
        // A guard block before the first one, and what aligning its start can cost.
        let len = bytes.checked_add(2 * BLOCK).ok_or_else(too_large)?;
        let start = map::reserve(len)?;
        Ok(Self {
            next: BLOCK + start.align_offset(BLOCK),
            reservation: Arc::new(Reservation {
                start: HostPtr(start),
                len,
            }),
        })
    }

    /// The next window, if there is room for it.
    fn cut(&mut self, len: usize) -> Option<Window> {
        let window = Window {
            reservation: Arc::clone(&self.reservation),
            start: HostPtr(self.reservation.start.at(self.next)),
            len,
        };
        let end = self.next.checked_add(window.taken())?;
        if end > self.reservation.len {
            return None;
        }
        self.next = end;
        Some(window)
    }
}

/// Where windows come from, and where they rest when their guest is gone.
#[derive(Debug)]
pub(crate) struct WindowSpace {
    /// How many bytes of address space may be kept by windows of guests that are gone.
    budget: usize,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    uncut: Option<Uncut>,
    oldest_first: VecDeque<Window>,
    /// What the windows in the queue take.
    bytes: usize,
}

impl WindowSpace {
    /// Makes a source of windows that keeps at most `budget` bytes of used ones closed and reserved.
    pub(crate) fn new(budget: usize) -> Self {
        Self {
            budget,
            inner: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing in the critical sections below can leave the queue half changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reserves a window of `len` bytes; where address space is short, retired windows are given up, the oldest first.
    pub(crate) fn open(&self, len: usize) -> sys::Result<Window> {
        let taken = len
            .checked_next_multiple_of(BLOCK)
            .and_then(|len| len.checked_add(BLOCK))
            .ok_or_else(too_large)?;
        loop {
            let error = match self.try_open(len, taken) {
                Ok(window) => return Ok(window),
                Err(error) => error,
            };
            if error.errno() != Some(libc::ENOMEM) || !self.make_room() {
                return Err(error);
            }
        }
    }

    fn try_open(&self, len: usize, taken: usize) -> sys::Result<Window> {
        let shared = (self.budget / RESERVATIONS).min(LARGEST);
        // A window that is large itself would leave too much of a shared reservation unused.
        if taken <= shared / 4 {
            let mut inner = self.lock();
            if let Some(window) = inner.uncut.as_mut().and_then(|uncut| uncut.cut(len)) {
                return Ok(window);
            }
            // A limit on address space may leave room for the window and not for so much more.
            if let Ok(mut uncut) = Uncut::reserve(shared) {
                let window = uncut.cut(len);
                inner.uncut = Some(uncut);
                return window.ok_or_else(too_large);
            }
        }
        Uncut::reserve(taken)?.cut(len).ok_or_else(too_large)
    }

    /// Keeps a closed window reserved, and gives up the oldest ones beyond the budget.
    pub(crate) fn retire(&self, window: Window) {
        let mut given_up = Vec::new();
        {
            let mut inner = self.lock();
            inner.bytes += window.taken();
            inner.oldest_first.push_back(window);
            while inner.bytes > self.budget {
                let Some(oldest) = inner.oldest_first.pop_front() else {
                    break;
                };
                inner.bytes -= oldest.taken();
                given_up.push(oldest);
            }
        }
        // Unmapped here, outside the lock.
        drop(given_up);
    }

    /// Gives up the oldest retired window or, if there is none, the common reservation once no window is in it any more.
    /// `false` if there is nothing to give up.
    fn make_room(&self) -> bool {
        let mut inner = self.lock();
        if let Some(oldest) = inner.oldest_first.pop_front() {
            inner.bytes -= oldest.taken();
            // Unmapped outside the lock.
            drop(inner);
            drop(oldest);
            return true;
        }
        // Windows are cut under the lock, so a count of one stays one.
        let unused = inner
            .uncut
            .take_if(|uncut| Arc::strong_count(&uncut.reservation) == 1);
        drop(inner);
        unused.is_some()
    }
}

fn too_large() -> sys::Error {
    sys::Error {
        call: sys::Call::Mmap,
        source: std::io::Error::from_raw_os_error(libc::ENOMEM),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::fault;

    /// A budget with which small windows share reservations of 64 blocks.
    const SHARED: usize = RESERVATIONS * 64 * BLOCK;

    fn addresses(window: &Window) -> std::ops::Range<usize> {
        let start = window.start().0.addr();
        start..start + window.len()
    }

    /// How many mappings of this process have an address in `range`.
    fn mappings(range: &std::ops::Range<usize>) -> usize {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .filter(|line| {
                let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
                let number = |text| usize::from_str_radix(text, 16).unwrap();
                number(start) < range.end && range.start < number(end)
            })
            .count()
    }

    #[test]
    fn windows_are_aligned_and_guarded() {
        for budget in [0, SHARED] {
            let space = WindowSpace::new(budget);
            let mut behind = 0;
            for len in [4096, BLOCK, 3 * BLOCK + 4096] {
                let window = space.open(len).unwrap();
                let range = addresses(&window);
                let start = window.reservation.start.0.addr();
                let end = start + window.reservation.len;
                assert_eq!(range.start % BLOCK, 0);
                assert_eq!(range.len(), len);
                assert!(range.start - start >= BLOCK, "no guard before");
                assert!(end - range.end >= BLOCK, "no guard behind");
                if budget > 0 {
                    assert!(range.start >= behind + BLOCK, "no guard between");
                    behind = range.end;
                }
                space.retire(window);
            }
        }
    }

    /// Somebody may still have it, whatever becomes of the others of its reservation.
    #[test]
    fn a_window_that_is_leaked_stays_reserved() {
        for budget in [0, SHARED] {
            let space = WindowSpace::new(budget);
            let window = space.open(BLOCK).unwrap();
            let range = addresses(&window);
            window.leak();
            drop(space);
            assert_eq!(mappings(&range), 1);
        }
    }

    #[test]
    fn a_retired_window_is_not_given_out_again_while_there_is_room() {
        for budget in [SHARED, 1 << 40] {
            let space = WindowSpace::new(budget);
            let mut seen: Vec<std::ops::Range<usize>> = Vec::new();
            for number in 0..256 {
                let window = space.open((number % 5 + 1) * BLOCK).unwrap();
                let range = addresses(&window);
                assert!(
                    seen.iter()
                        .all(|old| old.end <= range.start || range.end <= old.start)
                );
                seen.push(range);
                space.retire(window);
            }
        }
    }

    #[test]
    fn the_first_window_is_aligned_wherever_the_kernel_puts_the_reservation() {
        let odd = BLOCK + 4096;
        let mut starts = Vec::new();
        for _ in 0..8 {
            let uncut = Uncut::reserve(odd).unwrap();
            let start = uncut.reservation.start.0.addr();
            assert!((start + uncut.next).is_multiple_of(BLOCK));
            assert!((BLOCK..2 * BLOCK).contains(&uncut.next));
            assert!(uncut.next + odd <= uncut.reservation.len);
            starts.push((start, uncut));
        }
        assert!(starts.iter().any(|(start, _)| !start.is_multiple_of(BLOCK)));
    }

    #[test]
    fn a_window_that_is_larger_than_a_shared_reservation_has_its_own() {
        let space = WindowSpace::new(SHARED);
        let window = space.open(100 * BLOCK).unwrap();
        assert_eq!(window.len(), 100 * BLOCK);
    }

    #[test]
    fn windows_that_are_gone_are_few_mappings() {
        let space = WindowSpace::new(SHARED);
        for _ in 0..256 {
            let window = space.open(4096).unwrap();
            // What granting and revoking leave behind.
            // SAFETY: the window is ours.
            unsafe {
                map::map_anonymous(window.start().0, 4096).unwrap();
                map::make_inaccessible(window.start().0, 4096).unwrap();
            }
            space.retire(window);
        }
        // 256 windows of a block and a guard are eight reservations.
        let mut starts: Vec<usize> = Vec::new();
        for window in &space.lock().oldest_first {
            let start = window.reservation.start.0.addr();
            if !starts.contains(&start) {
                starts.push(start);
                assert_eq!(mappings(&(start..start + window.reservation.len)), 1);
            }
        }
        assert_eq!(starts.len(), 8);
    }

    #[test]
    fn the_budget_bounds_what_is_kept() {
        let space = WindowSpace::new(8 * BLOCK);
        for _ in 0..16 {
            let window = space.open(BLOCK).unwrap();
            space.retire(window);
            assert!(space.lock().bytes <= 8 * BLOCK);
        }
        assert_eq!(space.lock().oldest_first.len(), 4);
    }

    #[test]
    fn a_reservation_goes_with_the_last_of_its_windows() {
        let space = WindowSpace::new(SHARED);
        let (first, last) = (space.open(BLOCK).unwrap(), space.open(BLOCK).unwrap());
        let reservation = Arc::downgrade(&first.reservation);
        assert!(Arc::ptr_eq(&first.reservation, &last.reservation));
        space.retire(first);
        drop(space);
        assert_eq!(reservation.strong_count(), 1, "a window is still in use");
        drop(last);
        assert_eq!(reservation.strong_count(), 0);
    }

    #[test]
    fn short_of_address_space_the_oldest_go_first() {
        // Windows with reservations of their own.
        let space = WindowSpace::new(8 * BLOCK);
        space.retire(space.open(BLOCK).unwrap());
        space.retire(space.open(BLOCK).unwrap());
        let second = addresses(&space.lock().oldest_first[1]);

        let once = fault::inject(fault::Call::Mmap, 0, 1, libc::ENOMEM);
        space.retire(space.open(BLOCK).unwrap());
        drop(once);
        assert_eq!(space.lock().oldest_first.len(), 2);
        assert_eq!(addresses(&space.lock().oldest_first[0]), second);
        let kept: usize = space.lock().oldest_first.iter().map(Window::taken).sum();
        assert_eq!(space.lock().bytes, kept);

        let _always = fault::inject(fault::Call::Mmap, 0, u32::MAX, libc::ENOMEM);
        let error = space.open(BLOCK).unwrap_err();
        assert_eq!(error.errno(), Some(libc::ENOMEM));
        assert_eq!(space.lock().oldest_first.len(), 0);
        assert_eq!(space.lock().bytes, 0, "nothing is kept");
    }

    #[test]
    fn where_a_large_reservation_does_not_fit_a_small_one_may() {
        let space = WindowSpace::new(SHARED);
        let _once = fault::inject(fault::Call::Mmap, 0, 1, libc::ENOMEM);
        let window = space.open(BLOCK).unwrap();
        assert_eq!(window.reservation.len, 4 * BLOCK);
    }

    #[test]
    fn lengths_that_no_address_space_holds_are_refused() {
        for budget in [0, SHARED, usize::MAX] {
            assert!(WindowSpace::new(budget).open(usize::MAX - 4095).is_err());
            assert!(WindowSpace::new(budget).open(usize::MAX / 2).is_err());
        }
    }
}
