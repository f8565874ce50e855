//! Taking pages home only if nobody else can write to them.
//!
//! A guest's pages leave its window in one step, by `mremap(2)`, to a place that nobody knows: the *lock*, address space as
//! large as the arena and laid out like it. From there the kernel moves them into the arena one by one ([`moving`]
//! (super::moving)), and refuses those that are pinned for DMA or shared with another process. Pages that stay refused stay
//! in the lock for good, inaccessible; the arena has nothing at their place, and their blocks are never leased again, so that
//! neither place is used again.
//!
//! Not from the window itself, because a guest that is still running would go on touching it: its accesses bring fresh pages
//! and, by reading, the kernel's huge zero page, which Linux 6.16 and 6.17 move wrongly.

use super::moving::Round;
use super::{Revocation, Revoked, Window, WindowSpace, lock_again, move_pieces, remove_guards};
use crate::scrub::{HostPtr, pagemap};
use crate::sys::userfaultfd::Userfaultfd;
use crate::sys::{self, map};
use std::ops::Range;
use std::time::{Duration, Instant};

/// The rest between two attempts to move pages that were refused.
const REST: Duration = Duration::from_millis(1);

/// What moving with the kernel's leave takes.
#[derive(Debug)]
pub(crate) struct Isolation {
    pub(super) userfaultfd: Userfaultfd,
    pub(super) arena: HostPtr,
    pub(super) lock: HostPtr,
    /// Whether the arena's pages are always small, unless the VMM has advised otherwise.
    pub(super) small_pages: bool,
    patience: Duration,
    _lock: Window,
}

/// Whether a window's pages are in the lock.
#[derive(Debug)]
pub(super) enum Staged {
    Yes,
    /// Nothing was moved.
    No(sys::Error),
}

impl Isolation {
    /// Makes the arena a place to which pages can be moved, if this kernel does such things. Pages of the arena that are not
    /// populated must not be accessed from now on.
    ///
    /// `patience` is for how long pages that are refused are tried again.
    ///
    /// # Safety
    /// `[arena, arena + len)` must be private anonymous memory of the caller's, aligned to 2 MiB, mapped for as long as this
    /// lives.
    pub(super) unsafe fn new(
        arena: HostPtr,
        len: usize,
        small_pages: bool,
        patience: Duration,
    ) -> sys::Result<Self> {
        let userfaultfd = Userfaultfd::open()?;
        // Older than what is asked for here, but a filter may forbid it.
        let start = arena.0.addr();
        pagemap()?.scan_kinds(start..start + super::BLOCK, |_, _| {})?;
        let lock = WindowSpace::new(0).open(len)?;
        // SAFETY: the caller owns the arena, and says that it does not access what is not populated.
        unsafe { userfaultfd.register(arena.0, len) }?;
        Ok(Self {
            userfaultfd,
            arena,
            lock: lock.start(),
            small_pages,
            patience,
            _lock: lock,
        })
    }

    /// Moves the pages of a window into the lock, in one step for each mapping. [`Staged::No`] if there may not be so much writable
    /// memory, or not one more mapping.
    ///
    /// # Safety
    /// The window must be the caller's, and have been granted `[offset, offset + len)` of the arena.
    pub(super) unsafe fn stage(
        &self,
        offset: usize,
        window: *mut u8,
        len: usize,
    ) -> sys::Result<Staged> {
        let staged = self.lock.at(offset);
        // SAFETY: this part of the lock is empty and goes with the arena's range, which the caller has been granted; the
        // window is the caller's. It is closed only where nothing was moved to it, so it is still empty.
        unsafe {
            // As for granting: a move that fails for that limit has unmapped its destination.
            let is_limited = map::data_is_limited();
            if is_limited && let Err(error) = map::make_writable(staged, len) {
                return Ok(Staged::No(error));
            }
            match move_pieces(window, staged, len) {
                Ok(()) => Ok(Staged::Yes),
                Err((moved, error)) => {
                    // What was made writable would count against the limit.
                    if is_limited && moved == 0 {
                        self.close(&(offset..offset + len), &[]);
                    }
                    // The kernel keeps account of what could be written (`vm.overcommit_memory`), and of mappings (`vm.max_map_count`).
                    if moved == 0 && error.errno() == Some(libc::ENOMEM) {
                        Ok(Staged::No(error))
                    } else {
                        Err(error)
                    }
                }
            }
        }
    }

    /// Moves what is in the lock into the arena, as far as the kernel lets go of it, and closes the lock.
    ///
    /// # Safety
    /// `[offset, offset + len)` must have been staged, and nobody may hold a Rust reference into it.
    pub(super) unsafe fn bring_home(&self, offset: usize, len: usize) -> sys::Result<Revoked> {
        let range = offset..offset + len;
        // SAFETY: passed on to the caller.
        let brought = unsafe { self.bring(range.clone()) };
        let kept: &[Range<usize>] = match &brought {
            Ok(revoked) => &revoked.pinned,
            Err(_) => std::slice::from_ref(&range),
        };
        // SAFETY: nothing but what is kept is in this part of the lock, and nobody knows its address.
        unsafe { self.close(&range, kept) };
        brought
    }

    /// # Safety
    /// As for [`Isolation::bring_home`].
    unsafe fn bring(&self, range: Range<usize>) -> sys::Result<Revoked> {
        let mut by = Revocation::Move;
        let mut deadline = None;
        // The gaps that earlier rounds have left in the lock must not cover what has come home from them.
        let mut is_first = true;
        // SAFETY: passed on to the caller; nothing has been moved yet.
        let mut round = match unsafe { self.first_look(&range) } {
            Ok(round) => round,
            Err(error) => {
                log::warn!("{} bytes are revoked without proof: {error}", range.len());
                // SAFETY: as above.
                unsafe { self.bring_unproven(std::slice::from_ref(&range)) }?;
                return Ok(Revoked::whole(Revocation::Mremap));
            }
        };
        loop {
            if round.is_empty() {
                return Ok(Revoked::whole(by));
            }
            // SAFETY: passed on to the caller; what the round found is in the lock, so its place in the arena is empty.
            unsafe { round.go(self) };
            let mut left = Round::look(self, range.clone())?;
            let unproven = left.forget(round.unproven(), !is_first);
            is_first = false;
            if !unproven.is_empty() {
                by = Revocation::Mremap;
                // SAFETY: as above.
                unsafe { self.bring_unproven(&unproven) }?;
            }
            if left.is_empty() {
                return Ok(Revoked::whole(by));
            }
            let now = Instant::now();
            // A patience that no clock holds has no end.
            let deadline = *deadline.get_or_insert(now.checked_add(self.patience));
            if deadline.is_some_and(|deadline| now >= deadline) {
                let pinned = left.ranges();
                return Ok(Revoked::new(by, pinned, round.refusal()));
            }
            // A device lets go of its pins a little after it was closed.
            std::thread::sleep(REST);
            round = left;
        }
    }

    /// What is in the lock, where there are no guard pages any more. To remove them takes the kernel as long as to move a tenth of
    /// the pages, so it is asked first whether there can be any.
    ///
    /// # Safety
    /// As for [`Isolation::bring_home`].
    unsafe fn first_look(&self, range: &Range<usize>) -> sys::Result<Round> {
        let round = Round::look(self, range.clone())?;
        if round.all_present {
            return Ok(round);
        }
        // SAFETY: passed on to the caller.
        unsafe { remove_guards(self.lock.at(range.start), range.len()) }?;
        Round::look(self, range.clone())
    }

    /// Moves ranges of the lock into the arena without asking whether anybody else can write to them.
    ///
    /// # Safety
    /// As for [`Isolation::bring_home`], for each range; none of their pages may have been moved yet.
    unsafe fn bring_unproven(&self, ranges: &[Range<usize>]) -> sys::Result<()> {
        for range in ranges {
            let home = self.arena.at(range.start);
            // SAFETY: passed on to the caller.
            unsafe {
                remove_guards(self.lock.at(range.start), range.len())?;
                move_pieces(self.lock.at(range.start), home, range.len())
                    .map_err(|(_, error)| error)?;
                self.register_again(home, range.len())?;
            }
        }
        Ok(())
    }

    /// Tells the kernel again about a part of the arena that `mremap` has replaced.
    ///
    /// Fails if another descriptor is told of what happens there: a pager of the VMM's that follows its memory
    /// (`UFFD_FEATURE_EVENT_REMAP`) would supply the next guest with pages.
    ///
    /// # Safety
    /// The range must be the arena's.
    pub(super) unsafe fn register_again(&self, home: *mut u8, len: usize) -> sys::Result<()> {
        // SAFETY: passed on to the caller.
        match unsafe { self.userfaultfd.register(home, len) } {
            Err(error) if error.errno() == Some(libc::EBUSY) => Err(error),
            Err(error) => {
                log::warn!("{len} bytes will be revoked without proof next time: {error}");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// Populates a part of the arena. The kernel does not where an access to what is not there is a signal.
    ///
    /// # Safety
    /// The range must be the arena's.
    pub(super) unsafe fn populate(&self, home: *mut u8, len: usize) -> sys::Result<()> {
        self.userfaultfd.unregister(home, len)?;
        // SAFETY: passed on to the caller.
        unsafe {
            let populated = map::populate(home, len);
            // A range that stays off the register is revoked without proof next time.
            self.register_again(home, len)
                .or_else(|_| self.register_again(home, len))?;
            populated
        }
    }

    /// Locks in memory what was brought home to `range` of the arena and, where it was kept, what is in the lock. Returns how
    /// many bytes the kernel did not lock.
    ///
    /// # Safety
    /// `kept` (ascending) must lie in the range, and the range must be the caller's.
    pub(super) unsafe fn lock_again(&self, range: &Range<usize>, kept: &[Range<usize>]) -> usize {
        let (mut at, mut unlocked) = (range.start, 0);
        for keep in kept.iter().chain([&(range.end..range.end)]) {
            // SAFETY: passed on to the caller.
            unsafe {
                unlocked += lock_again(self.arena.at(at), keep.start - at);
                unlocked += lock_again(self.lock.at(keep.start), keep.len());
            }
            at = keep.end;
        }
        unlocked
    }

    /// Makes `range` of the lock inaccessible, and empty but for what is kept.
    ///
    /// # Safety
    /// Nothing but `kept` (ascending) may be in the range, and nobody may hold a Rust reference into it.
    unsafe fn close(&self, range: &Range<usize>, kept: &[Range<usize>]) {
        let mut at = range.start;
        for keep in kept.iter().chain([&(range.end..range.end)]) {
            // SAFETY: passed on to the caller.
            let closed = unsafe {
                let gap = (at < keep.start)
                    .then(|| map::make_inaccessible(self.lock.at(at), keep.start - at));
                let kept = (!keep.is_empty())
                    .then(|| map::forbid_access(self.lock.at(keep.start), keep.len()));
                gap.unwrap_or(Ok(())).and(kept.unwrap_or(Ok(())))
            };
            if let Err(error) = closed {
                // Nobody knows the address.
                log::warn!("address space of the pool's own stays accessible: {error}");
            }
            at = keep.end;
        }
    }
}
