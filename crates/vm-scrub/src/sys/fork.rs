//! Telling a forked child from its parent.
//!
//! Process numbers do not: the first process of a new PID namespace has the number 1, and so may its parent.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The last number given to an address space. A child inherits it, and so counts on from its parent's.
static LAST: AtomicU64 = AtomicU64::new(0);

/// Holds this address space's number, in a page that the kernel empties in every forked child. `None` where the kernel does
/// not do that.
static MARK: OnceLock<Option<&'static AtomicU64>> = OnceLock::new();

/// A number that this address space has and neither its parent nor a child of its own has. `None` where the kernel is too old
/// to tell (before Linux 4.14), or has no memory for it.
pub(crate) fn address_space() -> Option<u64> {
    let mark = (*MARK.get_or_init(mark))?;
    match mark.load(Ordering::Acquire) {
        0 => {
            let fresh = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            let won = mark.compare_exchange(0, fresh, Ordering::AcqRel, Ordering::Acquire);
            Some(won.map_or_else(|other| other, |_| fresh))
        }
        number => Some(number),
    }
}

fn mark() -> Option<&'static AtomicU64> {
    let len = super::map::host_page_size();
    // Not by way of `map`: a planned fault is not to be spent here, where whoever comes first in a process asks.
    // SAFETY: without MAP_FIXED the kernel picks a range that nothing else uses.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: the page is ours, and nobody else knows it.
    if unsafe { libc::madvise(page, len, libc::MADV_WIPEONFORK) } != 0 {
        // SAFETY: as above.
        unsafe { libc::munmap(page, len) };
        return None;
    }
    // SAFETY: the page is mapped for good, aligned, and zero; all access to it is atomic.
    Some(unsafe { AtomicU64::from_ptr(page.cast()) })
}
