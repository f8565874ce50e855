//! Hugetlb memory: a file with two views. The arena is one, a guest's window the other.
//!
//! Pages stay where they are in the file; granting adds a view and revoking replaces it with inaccessible address space.
//! The file's descriptor never leaves this module, so there are no other views.
//!
//! Which NUMA node a page comes from is decided by the view through which it is first touched, and the kernel reserves pages
//! for a file without asking on which node they are. So where a node is asked for, the arena is bound to it and whoever made
//! it populates it: then every page there will be is on that node, or it is known at once that there are too few.

use super::{
    Backing, NotGranted, NotPrepared, Refilled, Revocation, RevokeBy, Revoked, Window, WindowSpace,
    map_shared,
};
use crate::scrub::{HostPtr, Residency};
use crate::sys::identity::Identity;
use crate::sys::map::Advice;
use crate::sys::memfd::{self, Pages};
use crate::sys::{self, hugetlb, map, numa};
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::Duration;

/// Why a hugetlb arena could not be made.
#[derive(Debug)]
pub(crate) enum HugetlbError {
    /// The host has fewer free pages than were asked for; how many, where it says.
    NoPages { free: Option<u64> },
    /// Something else failed.
    Sys(sys::Error),
}

/// All memory of a pool as one file in hugetlb memory, and the pool's own view of it.
#[derive(Debug)]
pub(crate) struct HugetlbArena {
    // Dropped before the file: the view goes first.
    _view: Window,
    base: HostPtr,
    file: File,
    identity: Identity,
    resident: bool,
}

impl HugetlbArena {
    /// Makes and maps a file of `len` bytes (a multiple of 2 MiB); the kernel reserves its pages now or this fails.
    ///
    /// The pages are going to come from NUMA `node`, if one is given. `resident` says that the caller is going to populate the
    /// arena, as it must for a node: windows are then populated when they are granted.
    pub(crate) fn map(len: usize, resident: bool, node: Option<u32>) -> Result<Self, HugetlbError> {
        let file =
            memfd::private(len as u64, Pages::Huge2M).map_err(|error| match error.errno() {
                // A kernel without hugetlb, or without this page size.
                Some(libc::EINVAL | libc::ENODEV | libc::ENOENT) => {
                    HugetlbError::NoPages { free: None }
                }
                _ => HugetlbError::Sys(error),
            })?;
        let identity = Identity::of(file.as_fd()).map_err(HugetlbError::Sys)?;
        let view = WindowSpace::new(0).open(len).map_err(HugetlbError::Sys)?;
        let base = view.start();
        // SAFETY: the window is a fresh reservation of this length that nobody else knows.
        unsafe {
            map_shared(base.0, len, file.as_fd(), 0).map_err(|error| match error.errno() {
                // The reservation of pages fails with ENOMEM when there are too few.
                Some(libc::ENOMEM) => HugetlbError::NoPages {
                    free: hugetlb::free_2m_pages(None),
                },
                _ => HugetlbError::Sys(error),
            })?;
            if let Some(node) = node {
                numa::bind(base.0, len, node).map_err(HugetlbError::Sys)?;
            }
        }
        Ok(Self {
            _view: view,
            base,
            file,
            identity,
            resident,
        })
    }
}

impl Backing for HugetlbArena {
    fn arena(&self) -> HostPtr {
        self.base
    }

    fn revocation(&self) -> Revocation {
        Revocation::ViewReplaced
    }

    fn prepare(&mut self, by: RevokeBy, _patience: Duration) -> Result<(), NotPrepared> {
        match by {
            RevokeBy::Automatic => Ok(()),
            RevokeBy::Move | RevokeBy::Mremap => Err(NotPrepared::OtherKind),
        }
    }

    unsafe fn grant(&self, offset: usize, window: *mut u8, len: usize) -> Result<(), NotGranted> {
        // SAFETY: the caller says that the range is free and that the window is closed and of this length.
        let granted = unsafe {
            let mapped = self
                .identity
                .check(self.file.as_fd())
                .and_then(|()| map_shared(window, len, self.file.as_fd(), offset as u64));
            mapped.and_then(|()| {
                if self.resident {
                    // The pages are there; this fills in the window's page tables, so that the guest takes no faults.
                    map::populate(window, len)?;
                }
                Ok(())
            })
        };
        granted.map_err(|error| NotGranted {
            error,
            // SAFETY: the window is ours and nobody has seen it.
            stuck: unsafe { map::make_inaccessible(window, len) }.is_err(),
        })
    }

    unsafe fn revoke(&self, _offset: usize, window: *mut u8, len: usize) -> sys::Result<Revoked> {
        // SAFETY: the caller says that the window is this range's and that nobody holds references into it.
        unsafe { map::make_inaccessible(window, len) }?;
        Ok(Revoked::whole(Revocation::ViewReplaced))
    }

    /// Nothing is given back: a page that leaves the file leaves the reservation too, and the next guest could find none.
    fn give_back(&self, _range: Range<usize>) -> sys::Result<u64> {
        Ok(0)
    }

    /// Pages that were reserved and never supplied must be supplied first: only with a page does its reservation go back.
    fn lend(&self, range: Range<usize>) -> sys::Result<()> {
        self.populate(range.clone())?;
        // SAFETY: the range is the arena's, and clean: what is supplied in its place is zero too. No view of it is left.
        unsafe { map::advise(self.base.at(range.start), range.len(), Advice::Remove) }
    }

    fn refill(&self, range: Range<usize>) -> sys::Result<Refilled> {
        self.populate(range)?;
        Ok(Refilled(()))
    }

    /// Everything counts: the kernel tells which pages of a view are mapped, and not which pages of the file exist. A guest
    /// page that was discarded from its view (`MADV_DONTNEED`) is unmapped and still holds its bytes.
    ///
    /// A page that a balloon took out of the file (`MADV_REMOVE`) has lost its reservation too. Touching it again raises
    /// `SIGBUS` if the host has no page left, so the kernel is asked to supply it first, which can be refused with an error.
    fn residency(&self, range: Range<usize>) -> sys::Result<Residency> {
        self.populate(range.clone())?;
        Ok(Residency::all(range))
    }
}
