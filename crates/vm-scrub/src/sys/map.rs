//! Mapping, moving and protecting address ranges.
//!
//! Addresses are passed as pointers that came from `mmap`; lengths are bytes and multiples of the page size. What makes
//! these functions unsafe is always the same: they change mappings that somebody may hold references into.

use super::{Call, Error, Result, done, fault, touch};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a range of memory is to be used for, as `madvise(2)` takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Advice {
    /// A forked child does not get the range.
    DontFork,
    /// A core dump does not contain the range.
    DontDump,
    /// A child that gets the range nevertheless finds it empty. Refused (`EINVAL`) for anything but private anonymous memory.
    WipeOnFork,
    /// The opposite. Refused (`EINVAL`) for memory that the kernel may drop.
    KeepOnFork,
    /// Neither sequential nor random access is expected.
    Normal,
    /// The kernel does not merge its pages with equal ones.
    Unmergeable,
    /// Transparent huge pages are wanted.
    HugePage,
    /// Transparent huge pages are not wanted.
    NoHugePage,
    /// What the range contains goes back to the kernel: private anonymous memory is empty afterwards.
    Discard,
    /// What a range of a file contains goes back to the kernel, for all who have mapped it.
    Remove,
    /// Guard pages, at which every access faults, become ordinary empty pages (Linux 6.13).
    RemoveGuards,
}

/// `MADV_GUARD_REMOVE` of `asm-generic/mman-common.h`.
const MADV_GUARD_REMOVE: libc::c_int = 103;

impl Advice {
    fn raw(self) -> libc::c_int {
        match self {
            Advice::DontFork => libc::MADV_DONTFORK,
            Advice::DontDump => libc::MADV_DONTDUMP,
            Advice::WipeOnFork => libc::MADV_WIPEONFORK,
            Advice::KeepOnFork => libc::MADV_KEEPONFORK,
            Advice::Normal => libc::MADV_NORMAL,
            Advice::Unmergeable => libc::MADV_UNMERGEABLE,
            Advice::HugePage => libc::MADV_HUGEPAGE,
            Advice::NoHugePage => libc::MADV_NOHUGEPAGE,
            Advice::Discard => libc::MADV_DONTNEED,
            Advice::Remove => libc::MADV_REMOVE,
            Advice::RemoveGuards => MADV_GUARD_REMOVE,
        }
    }
}

fn mapped(address: *mut libc::c_void) -> Result<*mut u8> {
    if address == libc::MAP_FAILED {
        return Err(Error::last(Call::Mmap));
    }
    Ok(address.cast())
}

/// Reserves `len` bytes of address space that nobody can access, where the kernel likes.
pub(crate) fn reserve(len: usize) -> Result<*mut u8> {
    fault::check(Call::Mmap)?;
    // SAFETY: without MAP_FIXED the kernel picks a range that nothing else uses.
    mapped(unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    })
}

/// Replaces whatever is mapped at `[address, address + len)` with inaccessible, empty address space, in one step.
///
/// # Safety
/// The range must belong to the caller, and nobody may hold a Rust reference into it.
pub(crate) unsafe fn make_inaccessible(address: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::Mmap)?;
    // SAFETY: the caller owns the range, so replacing what is mapped there touches nothing of anybody else's.
    mapped(unsafe {
        libc::mmap(
            address.cast(),
            len,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    })
    .map(drop)
}

/// Maps fresh private anonymous memory, readable and writable, at `[address, address + len)`.
///
/// # Safety
/// The range must be a reservation of the caller's, and nobody may hold a Rust reference into it.
pub(crate) unsafe fn map_anonymous(address: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::Mmap)?;
    // SAFETY: the caller owns the range.
    mapped(unsafe {
        libc::mmap(
            address.cast(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED,
            -1,
            0,
        )
    })
    .map(drop)
}

/// Maps `len` bytes of `file` from `offset` as shared memory, not accessible yet, at `address`.
///
/// # Safety
/// The range must be a reservation of the caller's, and nobody may hold a Rust reference into it.
pub(crate) unsafe fn map_shared_inaccessible(
    address: *mut u8,
    len: usize,
    file: BorrowedFd<'_>,
    offset: u64,
) -> Result<()> {
    fault::check(Call::Mmap)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| Error {
        call: Call::Mmap,
        source: std::io::Error::from_raw_os_error(libc::EOVERFLOW),
    })?;
    // SAFETY: the caller owns the range.
    mapped(unsafe {
        libc::mmap(
            address.cast(),
            len,
            libc::PROT_NONE,
            libc::MAP_SHARED | libc::MAP_FIXED,
            file.as_raw_fd(),
            offset,
        )
    })
    .map(drop)
}

/// Gives `[address, address + len)` back to the kernel.
///
/// # Safety
/// The range must belong to the caller, and nobody may use it afterwards.
pub(crate) unsafe fn unmap(address: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::Munmap)?;
    // SAFETY: the caller owns the range and gives it up.
    done(Call::Munmap, unsafe { libc::munmap(address.cast(), len) })
}

/// Whether one mapping holds all of `[address, address + len)`; the neighbour behind must be mapped too.
///
/// Asks to let the range grow by a page where it is. There is no room for that, and before the kernel looks for room it
/// answers `EFAULT` if the range crosses into another mapping: the answer that [`move_pages`] would give too, but only
/// after it had unmapped the destination, into which another thread's `mmap` could then have fallen.
///
/// # Safety
/// The range and the page behind it must belong to the caller.
pub(crate) unsafe fn is_one_mapping(address: *mut u8, len: usize) -> Result<bool> {
    fault::check(Call::Mremap)?;
    let longer = len.saturating_add(host_page_size());
    // SAFETY: without MREMAP_MAYMOVE the range stays where it is, and it cannot grow into what is mapped behind it.
    let grown = unsafe { libc::mremap(address.cast(), len, longer, 0) };
    if grown == libc::MAP_FAILED {
        return Ok(io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT));
    }
    // Nothing was mapped behind after all: what was added is taken away again.
    // SAFETY: the page was mapped just now, by us.
    unsafe { unmap(address.wrapping_add(len), longer - len) }.map(|()| true)
}

/// Moves the pages of `[from, from + len)` to `[to, to + len)`, replacing what was mapped there.
///
/// Before Linux 6.17 the source must be [one mapping](is_one_mapping).
///
/// `from` stays mapped with the same protection, and empty (`MREMAP_DONTUNMAP`, Linux 5.7). The page tables change hands
/// under the kernel's lock: no other thread sees the pages at both places or at none.
///
/// # Safety
/// Both ranges must belong to the caller, must not overlap, and nobody may hold a Rust reference into either.
pub(crate) unsafe fn move_pages(from: *mut u8, to: *mut u8, len: usize) -> Result<()> {
    // SAFETY: passed on to the caller.
    let moved = unsafe { try_move(from, to, len) };
    if moved.is_err() {
        reserve_if_unmapped(to, len);
    }
    moved
}

/// # Safety
/// As for [`move_pages`].
unsafe fn try_move(from: *mut u8, to: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::Mremap)?;
    // SAFETY: the caller owns both ranges; MREMAP_FIXED replaces only `[to, to + len)`.
    mapped(unsafe {
        libc::mremap(
            from.cast(),
            len,
            len,
            libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP,
            to,
        )
    })
    .map(drop)
    .map_err(|error| Error {
        call: Call::Mremap,
        ..error
    })
}

/// Closes the hole that `mremap` leaves at its destination where it finds too late that it may not move (a limit, an account of memory
/// that may not be overcommitted): what another thread mapped there would be taken for the pool's. What is mapped there stays as it is:
/// the caller's, unless that other thread was quicker, which nothing tells apart.
fn reserve_if_unmapped(address: *mut u8, len: usize) {
    let reserved = fault::check(Call::Mmap).and_then(|()| {
        // SAFETY: MAP_FIXED_NOREPLACE (Linux 4.17) changes nothing that is mapped.
        mapped(unsafe {
            libc::mmap(
                address.cast(),
                len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE
                    | libc::MAP_ANONYMOUS
                    | libc::MAP_NORESERVE
                    | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        })
    });
    match reserved {
        Err(error) if error.errno() != Some(libc::EEXIST) => {
            log::error!("{len} bytes of address space of the pool's own may be unmapped: {error}");
        }
        _ => {}
    }
}

/// Makes `[address, address + len)` readable and writable, for every thread: also where memory had a protection key (`pkeys(7)`), by
/// which a VMM keeps its own threads from its guest's memory.
///
/// # Safety
/// The range must belong to the caller.
pub(crate) unsafe fn make_writable(address: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::Mprotect)?;
    // SAFETY: passed on to the caller.
    if unsafe { make_writable_without_key(address, len) }.is_ok() {
        return Ok(());
    }
    // A kernel without keys, or a filter that forbids the call.
    // SAFETY: the caller owns the range.
    done(Call::Mprotect, unsafe {
        libc::mprotect(address.cast(), len, libc::PROT_READ | libc::PROT_WRITE)
    })
}

/// # Safety
/// As for [`make_writable`].
pub(super) unsafe fn make_writable_without_key(address: *mut u8, len: usize) -> Result<()> {
    /// The key that all memory has for which nobody asked for another one.
    const NO_KEY: libc::c_int = 0;
    let writable = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: passed on to the caller.
    let status = unsafe { libc::syscall(libc::SYS_pkey_mprotect, address, len, writable, NO_KEY) };
    done(Call::Mprotect, status as libc::c_int)
}

/// Makes `[address, address + len)`, which was not accessible, readable.
///
/// # Safety
/// The range must belong to the caller.
pub(crate) unsafe fn make_readable(address: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::Mprotect)?;
    // SAFETY: the caller owns the range.
    done(Call::Mprotect, unsafe {
        libc::mprotect(address.cast(), len, libc::PROT_READ)
    })
}

/// Takes all access to `[address, address + len)` away; what it contains stays.
///
/// # Safety
/// The range must belong to the caller, and nobody may hold a Rust reference into it.
pub(crate) unsafe fn forbid_access(address: *mut u8, len: usize) -> Result<()> {
    fault::check(Call::Mprotect)?;
    // SAFETY: the caller owns the range.
    done(Call::Mprotect, unsafe {
        libc::mprotect(address.cast(), len, libc::PROT_NONE)
    })
}

/// Tells the kernel how `[address, address + len)` is to be treated.
///
/// # Safety
/// The range must belong to the caller, and with [`Advice::Discard`] so must what it contains: to be thrown away.
pub(crate) unsafe fn advise(address: *mut u8, len: usize, advice: Advice) -> Result<()> {
    fault::check(Call::Madvise)?;
    // SAFETY: the caller owns the range; the only advice that changes what the memory contains is what the caller wants.
    done(Call::Madvise, unsafe {
        libc::madvise(address.cast(), len, advice.raw())
    })
}

/// Faults in every page of `[address, address + len)` for writing, without changing what they contain: all at once where the kernel
/// has `MADV_POPULATE_WRITE` (Linux 5.14), [one by one](touch::each_page) where it has not.
///
/// # Safety
/// As for [`touch::each_page`].
pub(crate) unsafe fn populate(address: *mut u8, len: usize) -> Result<()> {
    // SAFETY: passed on to the caller.
    match unsafe { populate_at_once(address, len) } {
        // The answer of kernels without it; also of those with it about memory that cannot be written to, and then
        // touching it fails as well.
        Err(error) if error.errno() == Some(libc::EINVAL) => {
            // No lock: the embedder's logger may come here again, or panic.
            static SAID: AtomicBool = AtomicBool::new(false);
            if !SAID.swap(true, Ordering::Relaxed) {
                log::info!("{error}: populating page by page instead");
            }
            // SAFETY: passed on to the caller.
            unsafe { touch::each_page(address, len) }
        }
        result => result,
    }
}

/// # Safety
/// The range must belong to the caller.
pub(super) unsafe fn populate_at_once(address: *mut u8, len: usize) -> Result<()> {
    // SAFETY: passed on to the caller.
    unsafe { fault_in(Call::Populate, address, len, libc::MADV_POPULATE_WRITE) }
}

/// Faults in every page of `[address, address + len)` for reading (`MADV_POPULATE_READ`, Linux 5.14; `EINVAL` before).
///
/// # Safety
/// The range must be mapped readable and belong to the caller.
pub(crate) unsafe fn populate_readable(address: *mut u8, len: usize) -> Result<()> {
    // SAFETY: passed on to the caller.
    unsafe { fault_in(Call::PopulateRead, address, len, libc::MADV_POPULATE_READ) }
}

/// # Safety
/// The range must belong to the caller.
unsafe fn fault_in(call: Call, address: *mut u8, len: usize, advice: libc::c_int) -> Result<()> {
    fault::check(call)?;
    loop {
        // SAFETY: the caller owns the range; populating does not change what the memory contains.
        match done(call, unsafe { libc::madvise(address.cast(), len, advice) }) {
            // A signal arrived: what is populated stays so, and going over it again is cheap.
            Err(error) if error.errno() == Some(libc::EINTR) => {}
            result => return result,
        }
    }
}

/// Whether this process has a limit on writable private memory (`RLIMIT_DATA`). What cannot be asked is taken for one.
pub(crate) fn data_is_limited() -> bool {
    if fault::check(Call::Getrlimit).is_err() {
        return true;
    }
    let mut limit = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: the structure is live and writable for the call.
    let status = unsafe { libc::getrlimit(libc::RLIMIT_DATA, &raw mut limit) };
    status != 0 || limit.rlim_cur != libc::RLIM_INFINITY
}

/// The size in bytes of the host's smallest page.
pub(crate) fn host_page_size() -> usize {
    // SAFETY: sysconf reads a constant.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::in_a_child;

    const LEN: usize = 64 << 10;

    fn is_mapped(address: *mut u8) -> bool {
        // SAFETY: nothing is changed, whatever is there.
        unsafe { libc::msync(address.cast(), LEN, libc::MS_ASYNC) == 0 }
    }

    #[test]
    fn what_a_move_that_fails_has_left_alone_stays() {
        let start = reserve(2 * LEN).unwrap();
        let to = start.wrapping_add(LEN);
        // SAFETY: reserved above, and this test's own.
        unsafe {
            map_anonymous(start, 2 * LEN).unwrap();
            start.write(7);
            to.write(9);
            let _fault = fault::inject(Call::Mremap, 0, 1, libc::ENOMEM);
            move_pages(start, to, LEN).unwrap_err();
            assert_eq!((start.read(), to.read()), (7, 9));
            to.write(8);
            unmap(start, 2 * LEN).unwrap();
        }
    }

    #[test]
    fn a_move_that_fails_leaves_no_hole() {
        let start = reserve(2 * LEN).unwrap();
        let to = start.wrapping_add(LEN);
        // SAFETY: reserved above, and this test's own.
        unsafe {
            map_anonymous(start, LEN).unwrap();
            start.write(7);
        }
        assert!(in_a_child(|| {
            let none = libc::rlimit {
                rlim_cur: 0,
                rlim_max: 0,
            };
            // SAFETY: of the child's limit, and of ranges that nobody else refers to.
            unsafe {
                let limited = libc::setrlimit(libc::RLIMIT_DATA, &raw const none) == 0;
                let refused = move_pages(start, to, LEN).is_err();
                limited && refused && is_mapped(to) && start.read() == 7
            }
        }));
        // SAFETY: this test's own, and nobody refers to it any more.
        unsafe { unmap(start, 2 * LEN) }.unwrap();
        assert!(!is_mapped(start));
    }
}
