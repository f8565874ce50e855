//! Mapping memory in pages of a given kind, as a VMM does without vm-scrub.
//!
//! A mapping begins at a multiple of 2 MiB, in address space of its own, so that unmapping and mapping again finds the same
//! place free. Other threads of this process may map memory meanwhile, but never there.

use super::HUGE;
use anyhow::Context;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::unistd::ftruncate;
use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use vm_scrub::PageSize;

/// Memory of this process, readable and writable.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: NonZeroUsize,
    page_size: PageSize,
    file: Option<OwnedFd>,
    /// Whether anything is mapped at `start`: not if mapping again failed.
    mapped: bool,
    reserved: NonNull<c_void>,
    reserved_len: usize,
}

impl Mapping {
    /// Maps `len` bytes of private anonymous memory. `len` is a multiple of the page size.
    pub(crate) fn anonymous(len: usize, page_size: PageSize) -> anyhow::Result<Self> {
        Self::new(len, page_size, None)
    }

    /// Maps `len` bytes of a memfd, shared. `len` is a multiple of the page size.
    pub(crate) fn memfd(len: usize, page_size: PageSize) -> anyhow::Result<Self> {
        let flags = match page_size {
            PageSize::Huge2M => {
                MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB
            }
            _ => MFdFlags::MFD_CLOEXEC,
        };
        let file = memfd_create(c"vm-scrub-bench", flags).context("memfd_create")?;
        ftruncate(&file, i64::try_from(len)?).context("ftruncate of a memfd")?;
        Self::new(len, page_size, Some(file))
    }

    fn new(len: usize, page_size: PageSize, file: Option<OwnedFd>) -> anyhow::Result<Self> {
        let asked = || format!("{len} bytes of {page_size} memory could not be mapped");
        let length = NonZeroUsize::new(len).with_context(asked)?;
        let reserved_len = len.checked_add(HUGE).with_context(asked)?;
        let total = NonZeroUsize::new(reserved_len).with_context(asked)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses the place; nothing that exists is changed.
        let reserved = unsafe { mmap_anonymous(None, total, ProtFlags::PROT_NONE, flags) }
            .with_context(asked)?;
        let aligned = reserved
            .as_ptr()
            .map_addr(|address| address.next_multiple_of(HUGE));
        let mut mapping = Self {
            start: NonNull::new(aligned.cast()).with_context(asked)?,
            len: length,
            page_size,
            file,
            mapped: false,
            reserved,
            reserved_len,
        };
        mapping.map().with_context(asked)?;
        Ok(mapping)
    }

    /// Puts memory at `start`, over whatever is there.
    fn map(&mut self) -> nix::Result<()> {
        let at = Some(self.start.addr());
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let fixed = MapFlags::MAP_FIXED;
        match &self.file {
            // SAFETY: `start..start + len` lies in the address space that `new` reserved for this mapping, and no slice of it
            // is borrowed, because `self` is.
            Some(file) => unsafe {
                mmap(
                    at,
                    self.len,
                    protection,
                    fixed | MapFlags::MAP_SHARED,
                    file,
                    0,
                )
            },
            None => {
                let mut flags = fixed | MapFlags::MAP_PRIVATE;
                if self.page_size == PageSize::Huge2M {
                    flags |= MapFlags::MAP_HUGETLB | MapFlags::MAP_HUGE_2MB;
                }
                // SAFETY: as above.
                unsafe { mmap_anonymous(at, self.len, protection, flags) }
            }
        }?;
        self.mapped = true;
        let advice = match self.page_size {
            PageSize::Base4K => MmapAdvise::MADV_NOHUGEPAGE,
            PageSize::Transparent => MmapAdvise::MADV_HUGEPAGE,
            _ => return Ok(()),
        };
        // SAFETY: the range was mapped just now; the advice changes no byte.
        match unsafe { madvise(self.start.cast(), self.len.get(), advice) } {
            // A kernel without transparent huge pages has nothing to switch off.
            Err(Errno::EINVAL) if self.page_size == PageSize::Base4K => Ok(()),
            result => result,
        }
    }

    /// `munmap`, then `mmap` in the same place: what a VMM does between two guests today. The memory is not populated then.
    pub(crate) fn map_again(&mut self) -> anyhow::Result<()> {
        self.mapped = false;
        // SAFETY: this mapping's own range, of which no slice is borrowed. Were another thread to map something into the hole,
        // it would be lost: the threads of this process are idle while contenders run.
        unsafe { munmap(self.start.cast(), self.len.get()) }.context("munmap")?;
        self.map().context("mmap")
    }

    /// Gives the pages of the whole memfd back to the kernel.
    ///
    /// # Errors
    ///
    /// If the kernel refuses, or the memory is not a memfd's.
    pub(crate) fn punch_hole(&mut self) -> anyhow::Result<()> {
        let file = self.file.as_ref().context("only a memfd can be punched")?;
        let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let len = i64::try_from(self.len.get())?;
        fallocate(file, mode, 0, len).context("punching a hole")
    }

    /// The pages it was asked to consist of.
    pub(crate) fn page_size(&self) -> PageSize {
        self.page_size
    }

    /// The memory.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        let len = if self.mapped { self.len.get() } else { 0 };
        // SAFETY: mapped readable and writable (or of no length), initialised by the kernel, and nobody else's: anonymous and
        // private, or a memfd whose only descriptor is here. The borrow of `self` keeps it mapped.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), len) }
    }
}

// SAFETY: the memory is this value's alone and belongs to the process, not to a thread.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the reservation was made by `new` and covers the mapping; slices borrow `self` and are gone.
        if let Err(error) = unsafe { munmap(self.reserved, self.reserved_len) } {
            log::warn!("{} bytes stay mapped: {error}", self.reserved_len);
        }
    }
}
