//! Asking the kernel which pages of this process are populated.
//!
//! `PAGEMAP_SCAN` (Linux 6.7) answers with ranges and tells the shared zero page apart; reading `/proc/self/pagemap` works
//! on every kernel, eight bytes a page, and counts the zero page as populated, which is on the safe side.

use super::identity::Identity;
use super::{Call, Error, Result, fault};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

// linux/fs.h: the categories a page can be in.
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;
const PAGE_IS_HUGE: u64 = 1 << 6;

// Documentation/admin-guide/mm/pagemap.rst: bits of a pagemap entry.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_EXCLUSIVE: u64 = 1 << 56;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 =
    (3 << 30) | ((size_of::<ScanArg>() as u64) << 16) | ((b'f' as u64) << 8) | 16;

/// Ranges asked for in the first call: as many as a guest has that touched little. Room for more would have to be brought into the
/// cache, here and in the kernel, for nothing.
const REGIONS_AT_FIRST: usize = 32;

/// Ranges asked for in every other call: 24 KiB of answers.
const REGIONS_PER_CALL: usize = 1024;

/// Pagemap entries read in one call: 64 KiB, or 32 MiB of 4 KiB pages.
const ENTRIES_PER_READ: usize = 8192;

/// What populated pages are like.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kind {
    /// Huge, and mapped as such: a huge page that is mapped in parts looks like small ones.
    pub(crate) huge: bool,
    /// In memory: neither swapped out, nor something else that takes a page's place, as a guard page does.
    pub(crate) present: bool,
}

/// Whether a page with this entry can hold data.
fn is_populated(entry: u64) -> bool {
    entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0
}

/// `/proc/self/pagemap`, open for reading.
///
/// It stays open for as long as the process lives, and its number may be another file's by then, even that of another process's
/// pagemap. What that one answers must never be taken for 'nothing is populated'.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: File,
    identity: Identity,
}

impl Pagemap {
    /// Opens this process's pagemap.
    pub(crate) fn open() -> Result<Self> {
        fault::check(Call::PagemapOpen)?;
        let file = File::open("/proc/self/pagemap").map_err(|source| Error {
            call: Call::PagemapOpen,
            source,
        })?;
        let identity = Identity::of(file.as_fd())?;
        Ok(Self { file, identity })
    }

    /// Calls `found` with each maximal run of populated pages in `range` (addresses, page aligned), in ascending order.
    ///
    /// Fails with `ENOTTY` (or `ENOSYS`) or `EINVAL` where there is no `PAGEMAP_SCAN`.
    pub(crate) fn scan(
        &self,
        range: Range<usize>,
        mut found: impl FnMut(Range<usize>),
    ) -> Result<()> {
        // No category, so that neighbours of different kinds come back as one range.
        self.walk(range, 0, |region| {
            found(region.start as usize..region.end as usize);
        })
    }

    /// The same as [`Pagemap::scan`], with what the pages of each run have in common.
    pub(crate) fn scan_kinds(
        &self,
        range: Range<usize>,
        mut found: impl FnMut(Range<usize>, Kind),
    ) -> Result<()> {
        self.walk(range, PAGE_IS_HUGE | PAGE_IS_SWAPPED, |region| {
            let kind = Kind {
                huge: region.categories & PAGE_IS_HUGE != 0,
                present: region.categories & PAGE_IS_SWAPPED == 0,
            };
            found(region.start as usize..region.end as usize, kind);
        })
    }

    /// Whether the page at `address` is mapped here and nowhere else. `page` is the host's page size in bytes.
    pub(crate) fn is_exclusive(&self, address: usize, page: usize) -> Result<bool> {
        self.identity.check(self.file.as_fd())?;
        fault::check(Call::PagemapRead)?;
        Ok(self.entry(address, page)? & ENTRY_EXCLUSIVE != 0)
    }

    /// The entry of the page at `address`.
    fn entry(&self, address: usize, page: usize) -> Result<u64> {
        let mut entry = [0_u8; size_of::<u64>()];
        self.file
            .read_exact_at(&mut entry, (address / page * size_of::<u64>()) as u64)
            .map_err(|source| Error {
                call: Call::PagemapRead,
                source,
            })?;
        Ok(u64::from_ne_bytes(entry))
    }

    /// Calls `found` with each maximal run of populated pages that are alike in the categories of `return_mask`.
    fn walk(
        &self,
        range: Range<usize>,
        return_mask: u64,
        mut found: impl FnMut(&PageRegion),
    ) -> Result<()> {
        self.identity.check(self.file.as_fd())?;
        let mut few = [PageRegion::default(); REGIONS_AT_FIRST];
        let mut many = Vec::new();
        let mut regions: &mut [PageRegion] = &mut few;
        let mut start = range.start as u64;
        while start < range.end as u64 {
            fault::check(Call::PagemapScan)?;
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start,
                end: range.end as u64,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                // Not the zero page, and present or swapped out.
                category_inverted: PAGE_IS_PFNZERO,
                category_mask: PAGE_IS_PFNZERO,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask,
                ..ScanArg::default()
            };
            // SAFETY: `arg` and the vector it points to are live and writable for the call, and `vec_len` is the vector's
            // length.
            let count =
                unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut arg) };
            let Ok(count) = usize::try_from(count) else {
                let error = Error::last(Call::PagemapScan);
                if error.errno() == Some(libc::EINTR) {
                    continue;
                }
                return Err(error);
            };
            // Linux 6.18 was seen to give a `walk_end` that lies before the last region when the vector is full just where
            // the range ends. What has been reported has been walked, so it is not asked about again.
            let mut walked = arg.walk_end;
            for region in regions.iter().take(count) {
                found(region);
                walked = walked.max(region.end);
            }
            if walked <= start {
                // The kernel made no progress: better an error than a loop or a page that is taken for empty.
                return Err(Error {
                    call: Call::PagemapScan,
                    source: io::Error::other("the scan made no progress"),
                });
            }
            start = walked;
            if count == REGIONS_AT_FIRST {
                many.resize(REGIONS_PER_CALL, PageRegion::default());
                regions = &mut many;
            }
        }
        Ok(())
    }

    /// The same as [`Pagemap::scan`] by reading one entry per page; `page` is the host's page size in bytes.
    pub(crate) fn read(
        &self,
        range: Range<usize>,
        page: usize,
        mut found: impl FnMut(Range<usize>),
    ) -> Result<()> {
        let mut buffer = vec![0_u8; ENTRIES_PER_READ * size_of::<u64>()];
        let mut address = range.start;
        self.identity.check(self.file.as_fd())?;
        while address < range.end {
            let pages = ((range.end - address) / page).clamp(1, ENTRIES_PER_READ);
            let bytes = &mut buffer[..pages * size_of::<u64>()];
            fault::check(Call::PagemapRead)?;
            self.file
                .read_exact_at(bytes, (address / page * size_of::<u64>()) as u64)
                .map_err(|source| Error {
                    call: Call::PagemapRead,
                    source,
                })?;
            for entry in bytes.as_chunks::<8>().0 {
                if is_populated(u64::from_ne_bytes(*entry)) {
                    found(address..address + page);
                }
                address += page;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::sys::map;
    use crate::test_support::skipped;
    use std::hint::black_box;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const PAGE: usize = 4096;

    #[test]
    fn what_another_file_says_is_not_believed() {
        let own = Pagemap::open().unwrap();
        let written = black_box([1_u8]);
        let page = written.as_ptr().addr() / PAGE * PAGE;
        let range = page..page + PAGE;
        let ask = |pagemap: &Pagemap| {
            let found = AtomicUsize::new(0);
            let count = |_: Range<usize>| {
                found.fetch_add(1, Ordering::Relaxed);
            };
            let scanned = pagemap.scan(range.clone(), count);
            let read = pagemap.read(range.clone(), PAGE, count);
            let exclusive = pagemap.is_exclusive(page, PAGE);
            (scanned, read, exclusive, found.into_inner())
        };
        let (scanned, read, _, _) = ask(&own);
        read.unwrap();
        assert!(scanned.is_ok() || scanned.unwrap_err().is_no_such_ioctl());
        // Another process's has nothing there, and would say so.
        let others = [File::open("/dev/zero"), File::open("/proc/1/pagemap")];
        for other in others.into_iter().flatten() {
            let file = own.file.try_clone().unwrap();
            let identity = own.identity;
            // SAFETY: both descriptors are this test's.
            assert!(unsafe { libc::dup2(other.as_raw_fd(), file.as_raw_fd()) } >= 0);
            let (scanned, read, exclusive, found) = ask(&Pagemap { file, identity });
            for error in [
                scanned.unwrap_err(),
                read.unwrap_err(),
                exclusive.unwrap_err(),
            ] {
                assert_eq!(error.call, Call::Fstat, "{error}");
                assert!(!error.is_no_such_ioctl() && error.errno() != Some(libc::EINVAL));
            }
            assert_eq!(found, 0);
        }
    }

    /// What takes a page's place in the page table counts, as what is swapped out does.
    #[test]
    fn a_guard_page_is_found_as_something_that_is_not_in_memory() {
        /// `MADV_GUARD_INSTALL` of `asm-generic/mman-common.h`, Linux 6.13.
        const MADV_GUARD_INSTALL: libc::c_int = 102;
        let memory = map::reserve(4 * PAGE).unwrap();
        // SAFETY: the range was reserved just now.
        let guarded = unsafe {
            map::map_anonymous(memory, 4 * PAGE).unwrap();
            libc::madvise(memory.wrapping_add(PAGE).cast(), PAGE, MADV_GUARD_INSTALL)
        };
        let start = memory.addr();
        let (mut found, mut present) = (Vec::new(), Vec::new());
        let pagemap = Pagemap::open().unwrap();
        let scanned = pagemap.scan(start..start + 4 * PAGE, |range| found.push(range));
        let kinds = pagemap.scan_kinds(start..start + 4 * PAGE, |_, kind| {
            present.push(kind.present);
        });
        // SAFETY: as above, and nobody refers to it.
        unsafe { map::unmap(memory, 4 * PAGE) }.unwrap();
        if guarded != 0 || scanned.is_err() {
            return skipped("this kernel has no guard pages, or no PAGEMAP_SCAN");
        }
        kinds.unwrap();
        assert_eq!(
            found,
            std::slice::from_ref(&(start + PAGE..start + 2 * PAGE))
        );
        assert_eq!(present, [false]);
    }

    #[test]
    fn what_is_swapped_out_can_hold_data() {
        assert!(is_populated(1 << 63) && is_populated(1 << 62));
        // A file's or a shared page, soft-dirty, exclusive: none of it without one of the two.
        assert!(!is_populated(!(0b11 << 62)));
    }
}
