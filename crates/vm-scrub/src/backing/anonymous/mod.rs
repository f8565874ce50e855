//! Private anonymous memory: granted and revoked by moving pages between the arena and a window.
//!
//! A page is in exactly one place at any time. `mremap(2)` moves page tables, not bytes, so a gigabyte changes hands in
//! milliseconds and stays populated: the next guest takes no page faults. On the way back the kernel can be asked whether
//! somebody else may still write to a page ([`isolation`](super::isolation)).

use super::isolation::{Isolation, Staged};
use super::{
    BLOCK, Backing, NotGranted, NotPrepared, Refilled, Revocation, RevokeBy, Revoked, Window,
    WindowSpace, keep_private, lock_again, move_pieces, remove_guards,
};
use crate::scrub::{HostPtr, Residency, get_ready};
use crate::sys;
use crate::sys::map::{self, Advice};
use crate::sys::mlock;
use crate::sys::numa;
use std::io;
use std::ops::Range;
use std::time::Duration;

/// All memory of a pool as one private anonymous mapping.
#[derive(Debug)]
pub(crate) struct AnonymousArena {
    window: Option<Window>,
    base: HostPtr,
    huge_pages: bool,
    /// Whether populated pages are locked in memory: those of a range that is granted in its window, all others here. So what
    /// is locked is always as much as the arena, and never more.
    locked: bool,
    /// `None` where pages come home by `mremap` alone.
    isolation: Option<Isolation>,
}

impl AnonymousArena {
    /// Maps `len` bytes (a multiple of 2 MiB), nothing populated, with transparent huge pages or without, bound to a NUMA
    /// `node` if one is given.
    ///
    /// Binding belongs to the mapping and not to its pages, and travels with it: `mremap` gives a window the arena's, and
    /// what a guest touches first in its window comes from the node too. So the arena is all that ever has to be bound.
    pub(crate) fn map(
        len: usize,
        huge_pages: bool,
        node: Option<u32>,
        locked: bool,
    ) -> sys::Result<Self> {
        let window = WindowSpace::new(0).open(len)?;
        let base = window.start();
        // SAFETY: the window is a fresh reservation of this length that nobody else knows.
        unsafe {
            map::map_anonymous(base.0, len)?;
            if let Some(node) = node {
                numa::bind(base.0, len, node)?;
            }
            keep_private(base.0, len);
            // Only so that windows and arena are alike, and join: see `check_anonymous`.
            if let Err(error) = map::advise(base.0, len, Advice::WipeOnFork) {
                log::debug!("the arena is not wiped on fork: {error}");
            }
        }
        let arena = Self {
            window: Some(window),
            base,
            huge_pages,
            locked,
            isolation: None,
        };
        // SAFETY: the range was mapped just now and is ours.
        match unsafe { map::advise(base.0, len, arena.page_advice()) } {
            Ok(()) => {}
            // A kernel without transparent huge pages: small pages are all there is.
            Err(error) if !huge_pages && error.errno() == Some(libc::EINVAL) => {}
            Err(error) => return Err(error),
        }
        arena.keep_mergeable();
        if locked {
            // SAFETY: as above.
            unsafe { mlock::lock(base.0, len) }?;
        }
        get_ready();
        Ok(arena)
    }

    fn page_advice(&self) -> Advice {
        if self.huge_pages {
            Advice::HugePage
        } else {
            Advice::NoHugePage
        }
    }

    /// Lets the kernel join the pieces of the arena again when they come home.
    ///
    /// A mapping that was moved before its first page fault takes the addresses of its new place for its own, and is not
    /// joined with its old neighbours when it comes back: each lease would leave one mapping more, up to one for each block.
    /// After the first write the kernel keeps the numbering with which the arena began.
    fn keep_mergeable(&self) {
        // SAFETY: the arena was mapped just now, writable, nobody refers to it, and it has a block at least. A write may have
        // brought a huge page.
        let discarded = unsafe {
            self.base.0.write_volatile(0);
            map::advise(self.base.0, BLOCK, Advice::Discard)
        };
        if let Err(error) = discarded {
            // A process that locks its memory (`mlockall`). One page is populated then, and counts as such.
            log::debug!("a page of the arena stays populated: {error}");
        }
    }

    /// Refuses a window over which something was mapped that is not private anonymous memory: a snapshot's file, or memory
    /// shared with a device. Its pages would come home with the rest, and those of a file that nobody has touched yet are not
    /// populated: they would be skipped, and the next guest would read the file.
    ///
    /// Also memory that the kernel may drop when it likes (`MAP_DROPPABLE`, Linux 6.11), which would be the next guest's.
    ///
    /// `MADV_WIPEONFORK` is refused for all mappings of the first kind and its opposite for those of the second, and neither changes
    /// anything for memory that no child inherits anyway.
    ///
    /// # Safety
    /// The window must be the caller's.
    unsafe fn check_anonymous(window: *mut u8, len: usize) -> sys::Result<()> {
        // SAFETY: passed on to the caller.
        let advised = unsafe {
            map::advise(window, len, Advice::KeepOnFork)
                .and_then(|()| map::advise(window, len, Advice::WipeOnFork))
        };
        match advised {
            Err(error) if error.errno() == Some(libc::EINVAL) => Err(sys::Error {
                call: error.call,
                source: io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "something that is not ordinary private anonymous memory was mapped over the guest's memory",
                ),
            }),
            result => result,
        }
    }

    /// Undoes what the guest's side may have done to its window, where it would outlive the lease or stop the scrubber:
    /// protection, sharing with children, merging, dumping, how it is read ahead, the kind of pages.
    ///
    /// # Safety
    /// The window must be the caller's.
    unsafe fn make_uniform(&self, window: *mut u8, len: usize) -> sys::Result<()> {
        // SAFETY: passed on to the caller.
        unsafe {
            map::make_writable(window, len)?;
            keep_private(window, len);
            for advice in [Advice::Normal, self.page_advice()] {
                if let Err(error) = map::advise(window, len, advice) {
                    log::debug!("{advice:?} is not in force for a part of the arena: {error}");
                }
            }
        }
        Ok(())
    }

    /// Moves a window's pages home by `mremap`, without the guard pages, and closes the window.
    ///
    /// # Safety
    /// `[offset, offset + len)` must have been granted at `window`, and nobody may hold a Rust reference into it.
    unsafe fn take_back(&self, offset: usize, window: *mut u8, len: usize) -> sys::Result<Revoked> {
        let home = self.base.at(offset);
        // SAFETY: the arena's own range is empty and ours, and nobody holds references. After the move a stray access to the
        // window can reach only fresh pages of the window itself, and the next call throws those away and closes it.
        unsafe {
            remove_guards(window, len)?;
            move_pieces(window, home, len).map_err(|(_, error)| error)?;
            if let Some(isolation) = &self.isolation {
                isolation.register_again(home, len)?;
            }
            map::make_inaccessible(window, len)?;
        }
        Ok(Revoked::whole(Revocation::Mremap))
    }

    /// Moves a range's pages into a window.
    ///
    /// # Safety
    /// As for [`Backing::grant`].
    unsafe fn show(&self, offset: usize, window: *mut u8, len: usize) -> Result<(), NotGranted> {
        let home = self.base.at(offset);
        // The kernel unmaps the window before it finds that a limit on writable memory does not allow the move, and what another
        // thread maps there meanwhile would be lost with the window. So the window becomes such memory first: that fails
        // before anything has changed, and afterwards the move takes no more of it than there is. By changing its protection:
        // a new mapping over it may be more than the limit allows by as much as lies there already.
        let writable = map::data_is_limited();
        if writable {
            // SAFETY: the caller says that the window is closed and ours.
            unsafe { map::make_writable(window, len) }.map_err(|error| NotGranted {
                error,
                stuck: false,
            })?;
        }
        // SAFETY: the caller says that the range is free and that the window is closed, so both are ours alone. The
        // arena's range stays mapped and empty, which keeps its address space from anybody else.
        let Err((moved, error)) = (unsafe { move_pieces(home, window, len) }) else {
            return Ok(());
        };
        // SAFETY: what was moved was granted at `window`, and nobody has seen it.
        let mut stuck = moved > 0 && unsafe { self.take_back(offset, window, moved) }.is_err();
        if writable {
            // SAFETY: as above; what was moved is back, and the rest never had anything in it.
            let rest = unsafe { map::make_inaccessible(window.wrapping_add(moved), len - moved) };
            stuck |= rest.is_err();
        }
        Err(NotGranted { error, stuck })
    }

    /// Takes a window's pages home in the best way there is.
    ///
    /// # Safety
    /// As for [`Backing::revoke`].
    unsafe fn bring_home(
        &self,
        offset: usize,
        window: *mut u8,
        len: usize,
    ) -> sys::Result<Revoked> {
        // SAFETY: the caller says that the range was granted at `window`, so the arena's own range is empty and ours, and
        // nobody holds references.
        unsafe {
            Self::check_anonymous(window, len)?;
            self.make_uniform(window, len)?;
            let Some(isolation) = &self.isolation else {
                return self.take_back(offset, window, len);
            };
            if let Staged::No(error) = isolation.stage(offset, window, len)? {
                // Before anything has changed: the embedder's logger may panic.
                log::warn!(
                    "revoking {len} bytes without proof: RLIMIT_DATA, vm.overcommit_memory or vm.max_map_count leaves no room for one \
                     more mapping of them: {error}"
                );
                return self.take_back(offset, window, len);
            }
            // What a stray access reaches now is fresh, and goes with the window.
            let closed = map::make_inaccessible(window, len);
            let home = isolation.bring_home(offset, len)?;
            closed.map(|()| home)
        }
    }
}

/// Unlocks memory that the VMM has locked, by itself or with all that it has. Else the kernel would count it as locked twice after the
/// move, for good, and move it without proof, unless its place in the arena is locked as well.
///
/// # Safety
/// The range must be the caller's.
unsafe fn unlock_before_moving(address: *mut u8, len: usize) {
    // SAFETY: passed on to the caller.
    if let Err(error) = unsafe { mlock::unlock(address, len) } {
        log::debug!("{len} bytes stay locked, and count as locked for good: {error}");
    }
}

impl Backing for AnonymousArena {
    fn arena(&self) -> HostPtr {
        self.base
    }

    fn revocation(&self) -> Revocation {
        match self.isolation {
            Some(_) => Revocation::Move,
            None => Revocation::Mremap,
        }
    }

    fn prepare(&mut self, by: RevokeBy, patience: Duration) -> Result<(), NotPrepared> {
        let len = self.window.as_ref().map_or(0, Window::len);
        if by == RevokeBy::Mremap || len == 0 {
            return Ok(());
        }
        // SAFETY: the arena is ours, mapped for as long as we live, and nobody looks at pages of it that are not populated: the
        // scrubber asks which are.
        match unsafe { Isolation::new(self.base, len, !self.huge_pages, patience) } {
            Ok(isolation) => self.isolation = Some(isolation),
            Err(error) if by == RevokeBy::Move => return Err(NotPrepared::Sys(error)),
            Err(error) => {
                log::info!("pages pinned for DMA or shared will not be found: {error}");
            }
        }
        Ok(())
    }

    unsafe fn grant(&self, offset: usize, window: *mut u8, len: usize) -> Result<(), NotGranted> {
        let home = self.base.at(offset);
        if !self.locked {
            // SAFETY: passed on to the caller.
            return unsafe {
                unlock_before_moving(home, len);
                self.show(offset, window, len)
            };
        }
        // SAFETY: the caller says that the range is free and that the window is closed, so both are ours alone; what is in the
        // range is zero, and may be swapped out for a moment.
        unsafe {
            let unlocked = mlock::unlock(home, len).map_err(|error| NotGranted {
                error,
                stuck: false,
            });
            let granted = unlocked.and_then(|()| {
                self.show(offset, window, len)?;
                mlock::lock(window, len).map_err(|error| NotGranted {
                    error,
                    // Nobody has seen the window.
                    stuck: self.take_back(offset, window, len).is_err(),
                })
            });
            if granted.is_err() {
                lock_again(home, len);
            }
            granted
        }
    }

    unsafe fn revoke(&self, offset: usize, window: *mut u8, len: usize) -> sys::Result<Revoked> {
        if !self.locked {
            // SAFETY: passed on to the caller.
            return unsafe {
                unlock_before_moving(window, len);
                // `mlockall(2)` locks also the place to which the memory goes, and the kernel moves between like and like.
                unlock_before_moving(self.base.at(offset), len);
                self.bring_home(offset, window, len)
            };
        }
        let range = offset..offset + len;
        // SAFETY: as in `bring_home`; unlocked, the bytes stay where they are. The arena's own range is empty and not locked,
        // unless the VMM has locked everything since.
        unsafe {
            let unlocked =
                mlock::unlock(window, len).and_then(|()| mlock::unlock(self.base.at(offset), len));
            let mut brought = unlocked.and_then(|()| self.bring_home(offset, window, len));
            // Where pages are is known only of what was revoked. The rest is quarantined, and locked wherever it may be.
            if brought.is_err() {
                lock_again(window, len);
                lock_again(self.base.at(offset), len);
            }
            let kept = match &brought {
                Ok(revoked) => &revoked.pinned[..],
                Err(_) => std::slice::from_ref(&range),
            };
            let unlocked = match &self.isolation {
                Some(isolation) => isolation.lock_again(&range, kept),
                None => lock_again(self.base.at(offset), len),
            };
            if let Ok(revoked) = &mut brought {
                revoked.unlocked = unlocked;
            }
            brought
        }
    }

    fn residency(&self, range: Range<usize>) -> sys::Result<Residency> {
        Residency::of_private_mapping(self.base, range)
    }

    fn give_back(&self, range: Range<usize>) -> sys::Result<u64> {
        let (start, len) = (self.base.at(range.start), range.len());
        // SAFETY: the range is the arena's, and clean: private anonymous memory that is populated again is zero too.
        unsafe {
            if !self.locked {
                map::advise(start, len, Advice::Discard)?;
            } else if let Err(error) = mlock::discard(start, len) {
                if error.errno() != Some(libc::EINVAL) {
                    return Err(error);
                }
                // Linux before 5.18.
                mlock::unlock(start, len)?;
                let discarded = map::advise(start, len, Advice::Discard);
                lock_again(start, len);
                discarded?;
            }
        }
        Ok(len as u64)
    }

    fn populate(&self, range: Range<usize>) -> sys::Result<()> {
        let (start, len) = (self.base.at(range.start), range.len());
        // SAFETY: the range is the arena's, mapped writable.
        unsafe {
            match &self.isolation {
                Some(isolation) => isolation.populate(start, len),
                None => map::populate(start, len),
            }
        }
    }

    /// What takes the place of lent memory is locked instead of it.
    fn lend(&self, range: Range<usize>) -> sys::Result<()> {
        let (start, len) = (self.base.at(range.start), range.len());
        // SAFETY: the range is the arena's, and clean, as for giving it back.
        unsafe {
            if self.locked {
                mlock::unlock(start, len)?;
            }
            map::advise(start, len, Advice::Discard)
        }
    }

    fn refill(&self, range: Range<usize>) -> sys::Result<Refilled> {
        if self.locked {
            // SAFETY: the range is the arena's.
            unsafe { mlock::lock(self.base.at(range.start), range.len()) }?;
        }
        Ok(Refilled(()))
    }
}

impl Drop for AnonymousArena {
    fn drop(&mut self) {
        // First the way into the arena, then the arena with its guards, both unmapped. Granted ranges live in other windows and stay what they are.
        self.isolation = None;
        drop(self.window.take());
    }
}

#[cfg(test)]
mod tests;
