//! Memory that is shared with other processes: a file whose descriptor goes out, made for one lease and never used again.
//!
//! The other processes can do with the descriptor what they like, so nothing about them is taken on trust: only when the
//! kernel has sealed the file against writing, which it refuses while any mapping or pin is left that could write, does what is
//! read from it prove anything. The file does not change its size, so nobody loses memory under their feet, except to a
//! process that punches holes into it.

use super::{
    Backing, NotGranted, NotPrepared, Revocation, RevokeBy, Revoked, Window, WindowSpace,
    keep_private, map_shared,
};
use crate::embedder::in_drop;
use crate::scrub::{HostPtr, Residency, push_joined};
use crate::sys::identity::Identity;
use crate::sys::memfd::{self, Pages};
use crate::sys::{self, Call, map, mlock, numa};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// What the view shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum View {
    Nothing,
    /// The file from this offset on; in front of it nothing.
    From(usize),
    Writable,
    ReadOnly,
}

/// How much of a view is unmapped in one go, in bytes: taking 1,024 pages of 4 KiB out of the page tables takes the kernel 0.2 ms (Zen 5),
/// four times as many more than 1 ms.
const CLOSED_AT_ONCE: usize = 4 << 20;

/// Whether a file was not sealed because somebody can still write to it.
pub(crate) fn is_still_shared(error: &sys::Error) -> bool {
    error.call == Call::AddSeals && error.errno() == Some(libc::EBUSY)
}

/// A file that other processes may have, and this process's own view of it, through which it is scrubbed.
#[derive(Debug)]
pub(crate) struct SharedFile {
    /// `None` only while it is dropped.
    window: Option<Window>,
    base: HostPtr,
    view: View,
    file: Arc<File>,
    identity: Identity,
    len: usize,
    pages: Pages,
    sealed: bool,
    /// Whether a guest's window is locked in memory. What only another process has touched is not, nor what waits for the scrubber
    /// once the window is closed.
    locked: bool,
}

impl SharedFile {
    /// Makes a file of `len` bytes (a multiple of 2 MiB), on NUMA `node` if one is given, and maps the view. Hugetlb pages are
    /// reserved by that, or it fails.
    ///
    /// `locked` says that guests' windows are locked in memory.
    pub(crate) fn map(
        len: usize,
        huge: bool,
        node: Option<u32>,
        locked: bool,
    ) -> sys::Result<Self> {
        let pages = if huge { Pages::Huge2M } else { Pages::Base };
        let file = memfd::shareable(len as u64, pages)?;
        let identity = Identity::of(file.as_fd())?;
        let window = WindowSpace::new(0).open(len)?;
        let mut shared = Self {
            base: window.start(),
            window: Some(window),
            view: View::Nothing,
            file: Arc::new(file),
            identity,
            len,
            pages,
            sealed: false,
            // Hugetlb pages are never swapped out.
            locked: locked && !huge,
        };
        shared.open()?;
        if let Some(node) = node {
            // SAFETY: the view was mapped just now. Of shared memory the kernel remembers this with the file.
            unsafe { numa::bind(shared.base.0, len, node) }?;
        }
        Ok(shared)
    }

    /// The file, to be given out.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Whether nobody can write to it any more.
    pub(crate) fn is_sealed(&self) -> bool {
        self.sealed
    }

    /// Maps the view: a fresh one, read-only, once the file is sealed.
    pub(crate) fn open(&mut self) -> sys::Result<()> {
        let wanted = if self.sealed {
            View::ReadOnly
        } else {
            View::Writable
        };
        if self.view == wanted {
            return Ok(());
        }
        self.identity.check(self.file.as_fd())?;
        // SAFETY: the window is ours, and nobody but the scrubber, which is not at work, knows where it is.
        unsafe {
            if self.sealed {
                map::map_shared_inaccessible(self.base.0, self.len, self.file.as_fd(), 0)?;
                keep_private(self.base.0, self.len);
                map::make_readable(self.base.0, self.len)?;
            } else {
                map_shared(self.base.0, self.len, self.file.as_fd(), 0)?;
            }
        }
        // Half-way there is nothing that could be accessed.
        self.view = wanted;
        Ok(())
    }

    /// Unmaps the view.
    fn close(&mut self) -> sys::Result<()> {
        if self.view != View::Nothing {
            // SAFETY: as in `open`.
            unsafe { map::make_inaccessible(self.base.0, self.len) }?;
            self.view = View::Nothing;
        }
        Ok(())
    }

    /// Unmaps the view and has the kernel refuse every write from now on. `Ok` is its word that no process has a mapping
    /// that could be written to, and that no page is pinned. See [`is_still_shared`].
    pub(crate) fn seal(&mut self) -> sys::Result<()> {
        self.close()?;
        self.identity.check(self.file.as_fd())?;
        memfd::seal_writing(&self.file)?;
        self.sealed = true;
        Ok(())
    }

    /// Closes the view in parts, from its beginning on: whether there is nothing left of it.
    pub(crate) fn close_part(&mut self) -> sys::Result<bool> {
        let from = match self.view {
            View::Nothing => return Ok(true),
            View::From(at) => at,
            View::Writable | View::ReadOnly => 0,
        };
        let to = self.len.min(from + CLOSED_AT_ONCE);
        // SAFETY: as in `open`.
        unsafe { map::make_inaccessible(self.base.at(from), to - from) }?;
        self.view = if to == self.len {
            View::Nothing
        } else {
            View::From(to)
        };
        Ok(to == self.len)
    }

    /// What can be asked about the file as its view is now, by any thread, for as long as the file is there and the view is not
    /// changed.
    pub(crate) fn inquiry(&self) -> Inquiry {
        Inquiry {
            file: Arc::downgrade(&self.file),
            identity: self.identity,
            base: self.base,
            view: self.view,
            pages: self.pages,
            known: Mutex::default(),
        }
    }
}

/// Finds out what of a file holds data, part by part.
#[derive(Debug)]
pub(crate) struct Inquiry {
    /// Not kept open by this: its memory is the kernel's when it is closed.
    file: Weak<File>,
    identity: Identity,
    base: HostPtr,
    view: View,
    pages: Pages,
    /// Data that an earlier answer was about: the kernel looks through data until its end, which may be far.
    known: Mutex<Range<usize>>,
}

impl Inquiry {
    /// As [`Backing::residency`]. What was a hole when it was asked about may have become data, not the other way.
    pub(crate) fn residency(&self, range: Range<usize>) -> sys::Result<Residency> {
        if self.pages == Pages::Base {
            return self.data(range);
        }
        let at = self.base.at(range.start);
        // SAFETY: the view is mapped over its whole length, and the scrubber's.
        let supplied = unsafe {
            if self.view == View::ReadOnly {
                map::populate_readable(at, range.len())
            } else {
                map::populate(at, range.len())
            }
        };
        match supplied {
            // Before Linux 5.14 there is no such question.
            Err(error) if error.errno() != Some(libc::EINVAL) => Err(error),
            _ => Ok(Residency::all(range)),
        }
    }

    fn known(&self) -> MutexGuard<'_, Range<usize>> {
        // Changed by single assignments only.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the file has pages, in ranges. A page that is swapped out is one; a hole has no content.
    fn data(&self, range: Range<usize>) -> sys::Result<Residency> {
        let Some(file) = self.file.upgrade() else {
            return Err(sys::Error {
                call: Call::SeekData,
                source: io::Error::other("the file is closed"),
            });
        };
        self.identity.check(file.as_fd())?;
        let mut populated = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let known = self.known().clone();
            let run = if known.contains(&at) {
                at..known.end
            } else {
                let Some(data) = memfd::seek_data(file.as_fd(), at as u64)? else {
                    break;
                };
                // No truncation, here and below: both lie in the file, whose length is a `usize`.
                if data as usize >= range.end {
                    break;
                }
                // The end of the file is a hole, so there is one; if it is gone, the file ends at the data.
                let hole = memfd::seek_hole(file.as_fd(), data)?;
                let run = data as usize..hole.map_or(range.end, |hole| hole as usize);
                *self.known() = run.clone();
                run
            };
            at = run.end;
            push_joined(&mut populated, run.start..run.end.min(range.end));
        }
        let bytes: usize = populated.iter().map(Range::len).sum();
        Ok(Residency {
            populated,
            never_populated: (range.len() - bytes) as u64,
        })
    }
}

impl Backing for SharedFile {
    fn arena(&self) -> HostPtr {
        self.base
    }

    fn revocation(&self) -> Revocation {
        if self.sealed {
            Revocation::Sealed
        } else {
            Revocation::ViewReplaced
        }
    }

    fn prepare(&mut self, by: RevokeBy, _patience: Duration) -> Result<(), NotPrepared> {
        match by {
            RevokeBy::Automatic => Ok(()),
            RevokeBy::Move | RevokeBy::Mremap => Err(NotPrepared::OtherKind),
        }
    }

    unsafe fn grant(&self, offset: usize, window: *mut u8, len: usize) -> Result<(), NotGranted> {
        let granted = self.identity.check(self.file.as_fd()).and_then(|()| {
            // SAFETY: the caller says that the window is closed and of this length.
            unsafe { map_shared(window, len, self.file.as_fd(), offset as u64) }
        });
        granted.map_err(|error| NotGranted {
            error,
            // SAFETY: the window is ours and nobody has seen it.
            stuck: unsafe { map::make_inaccessible(window, len) }.is_err(),
        })?;
        // SAFETY: mapped just now; nobody has seen it.
        unsafe {
            if self.locked
                && let Err(error) = mlock::lock(window, len)
            {
                let stuck = map::make_inaccessible(window, len).is_err();
                return Err(NotGranted { error, stuck });
            }
        }
        Ok(())
    }

    unsafe fn revoke(&self, _offset: usize, window: *mut u8, len: usize) -> sys::Result<Revoked> {
        // SAFETY: the caller says that the window is this range's and that nobody holds references into it.
        unsafe { map::make_inaccessible(window, len) }?;
        let mut revoked = Revoked::whole(Revocation::ViewReplaced);
        revoked.unlocked = if self.locked { len } else { 0 };
        Ok(revoked)
    }

    /// Of hugetlb everything counts, because there is no way to ask. A page that another process has punched out of the file
    /// is supplied again: touching it would raise `SIGBUS` if the host has no page left, asking for it is an error then.
    fn residency(&self, range: Range<usize>) -> sys::Result<Residency> {
        self.inquiry().residency(range)
    }

    /// The file goes back as a whole or not at all.
    fn give_back(&self, _range: Range<usize>) -> sys::Result<u64> {
        Ok(0)
    }
}

impl Drop for SharedFile {
    fn drop(&mut self) {
        let closed = self.close();
        if let (Err(error), Some(window)) = (closed, self.window.take()) {
            window.leak();
            in_drop(|| log::warn!("a view of shared memory stays mapped: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::BLOCK;
    use super::*;
    use crate::sys::fault;
    use std::os::unix::fs::FileExt;

    const PAGE: usize = 4096;

    #[test]
    fn pages_that_anybody_wrote_are_found_and_holes_are_not() {
        let shared = SharedFile::map(2 * BLOCK, false, None, false).unwrap();
        assert_eq!(
            shared.residency(0..2 * BLOCK).unwrap(),
            Residency {
                populated: vec![],
                never_populated: 2 * BLOCK as u64
            }
        );
        // SAFETY: the view is mapped, writable and this test's own.
        unsafe { shared.arena().at(3 * PAGE).write_volatile(1) };
        shared.file().write_all_at(&[1], 600 * PAGE as u64).unwrap();
        let last = 2 * BLOCK - PAGE;
        shared.file().write_all_at(&[1], last as u64).unwrap();
        let found = shared.residency(0..2 * BLOCK).unwrap();
        let expected = [3 * PAGE, 600 * PAGE, last].map(|page| page..page + PAGE);
        assert_eq!(found.populated, expected);
        let part = shared.residency(PAGE..600 * PAGE).unwrap();
        assert_eq!(part.populated, expected[..1]);
        assert_eq!(part.never_populated as usize, 598 * PAGE);
    }

    #[test]
    fn what_was_populated_is_there() {
        let shared = SharedFile::map(3 * BLOCK, false, None, false).unwrap();
        shared.populate(BLOCK..2 * BLOCK).unwrap();
        let found = shared.residency(0..3 * BLOCK).unwrap();
        assert_eq!(found.populated, std::slice::from_ref(&(BLOCK..2 * BLOCK)));
    }

    #[test]
    fn a_sealed_file_is_read_through_another_view() {
        let mut shared = SharedFile::map(BLOCK, false, None, false).unwrap();
        // SAFETY: the view is mapped, writable and this test's own.
        unsafe { shared.arena().at(0).write_volatile(7) };
        assert_eq!(shared.revocation(), Revocation::ViewReplaced);
        shared.seal().unwrap();
        assert_eq!(shared.revocation(), Revocation::Sealed);
        // SAFETY: the view is ours. That populating fails is how one sees what it is without touching it.
        assert!(unsafe { map::populate_readable(shared.base.0, BLOCK) }.is_err());
        shared.open().unwrap();
        // SAFETY: as above; then it is mapped readable.
        unsafe {
            assert!(map::populate(shared.base.0, BLOCK).is_err());
            assert_eq!(shared.arena().at(0).read_volatile(), 7);
        }
    }

    #[test]
    fn what_the_kernel_cannot_supply_is_not_said_to_be_there() {
        let mut shared = SharedFile::map(BLOCK, false, None, false).unwrap();
        // Hugetlb pages would be asked for in the same way.
        shared.pages = Pages::Huge2M;
        for call in [Call::Populate, Call::PopulateRead] {
            // Before Linux 5.14 there is no such question.
            let missing = fault::inject(call, 0, 1, libc::EINVAL);
            let all = shared.residency(0..BLOCK).unwrap();
            assert_eq!(all, Residency::all(0..BLOCK));
            assert_eq!(missing.hits(), 1);
            drop(missing);
            let _refused = fault::inject(call, 0, 1, libc::ENOMEM);
            let error = shared.residency(0..BLOCK).unwrap_err();
            assert_eq!((error.call, error.errno()), (call, Some(libc::ENOMEM)));
            // Then it is asked about through the other view.
            shared.seal().unwrap();
            shared.open().unwrap();
        }
    }

    /// A VMM that closes descriptors which it does not know, and opens others.
    #[test]
    fn a_descriptor_that_leads_elsewhere_is_not_sealed() {
        let mut shared = SharedFile::map(BLOCK, false, None, false).unwrap();
        let other = Arc::new(memfd::shareable(BLOCK as u64, Pages::Base).unwrap());
        shared.file = Arc::clone(&other);
        let refused = shared.seal().unwrap_err();
        assert!(refused.call != Call::AddSeals && !shared.is_sealed());
        other.write_all_at(&[1], 0).unwrap();
    }

    /// What is zeroed through a view of it, or read, would be somebody else's.
    #[test]
    fn the_scrubber_gets_no_view_of_another_file() {
        for sealed in [false, true] {
            let mut shared = SharedFile::map(BLOCK, false, None, false).unwrap();
            shared.close().unwrap();
            if sealed {
                shared.seal().unwrap();
            }
            shared.file = Arc::new(memfd::shareable(BLOCK as u64, Pages::Base).unwrap());
            let refused = shared.open().unwrap_err();
            assert_eq!(refused.call, Call::Fstat, "{refused}");
            // SAFETY: the window is ours. That populating fails is how one sees what it is without touching it.
            assert!(unsafe { map::populate_readable(shared.base.0, BLOCK) }.is_err());
        }
    }

    /// What is in it would be the guest's, and what the guest writes would be in it.
    #[test]
    fn a_guest_gets_no_window_onto_another_file() {
        let mut shared = SharedFile::map(BLOCK, false, None, false).unwrap();
        shared.file = Arc::new(memfd::shareable(BLOCK as u64, Pages::Base).unwrap());
        let window = WindowSpace::new(0).open(BLOCK).unwrap();
        // SAFETY: the window is closed, and this test's own.
        let refused = unsafe { shared.grant(0, window.start().0, BLOCK) }.unwrap_err();
        assert_eq!(refused.error.call, Call::Fstat, "{refused:?}");
        assert!(!refused.stuck);
        // SAFETY: as above, and closed as it was.
        assert!(unsafe { map::populate_readable(window.start().0, BLOCK) }.is_err());
    }

    #[test]
    fn a_second_view_keeps_it_from_being_sealed() {
        let mut shared = SharedFile::map(BLOCK, false, None, false).unwrap();
        let window = WindowSpace::new(0).open(BLOCK).unwrap();
        // SAFETY: the window is closed, and then this test's own.
        unsafe { shared.grant(0, window.start().0, BLOCK).unwrap() };
        let refused = shared.seal().unwrap_err();
        assert!(
            is_still_shared(&refused) && !shared.is_sealed(),
            "{refused}"
        );
        // SAFETY: as above.
        unsafe { shared.revoke(0, window.start().0, BLOCK).unwrap() };
        shared.seal().unwrap();
    }
}
