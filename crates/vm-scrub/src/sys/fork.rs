//! Telling a forked child from its parent.
//!
//! Process numbers do not: the first process of a new PID namespace has the number 1, and so may its parent.

use super::{Call, Error, Result, done, fault, map};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// The last number given to an address space. A child inherits it, and so counts on from its parent's.
static LAST: AtomicU64 = AtomicU64::new(0);

/// Holds this address space's number, in a page that the kernel empties in every forked child.
static MARK: OnceLock<&'static AtomicU64> = OnceLock::new();

/// A number that this address space has and neither its parent nor a child of its own has.
///
/// Fails only if none has been asked for before, where the kernel has no page for it, or does not empty pages for a child (before
/// Linux 4.14).
pub(crate) fn address_space() -> Result<u64> {
    let mark = match MARK.get() {
        Some(mark) if !fault::is_planned(Call::WipeOnFork) => mark,
        _ => {
            let fresh = map_mark()?;
            let mark = *MARK.get_or_init(|| fresh);
            if !ptr::eq(mark, fresh) {
                unmap_mark(fresh);
            }
            mark
        }
    };
    Ok(number(mark))
}

/// Whether `space` is the number of this address space.
pub(crate) fn is_here(space: u64) -> bool {
    MARK.get().is_some_and(|mark| number(mark) == space)
}

fn number(mark: &AtomicU64) -> u64 {
    match mark.load(Ordering::Acquire) {
        0 => {
            let fresh = LAST.fetch_add(1, Ordering::Relaxed) + 1;
            let won = mark.compare_exchange(0, fresh, Ordering::AcqRel, Ordering::Acquire);
            won.map_or_else(|other| other, |_| fresh)
        }
        number => number,
    }
}

fn map_mark() -> Result<&'static AtomicU64> {
    fault::check(Call::WipeOnFork)?;
    let len = map::host_page_size();
    // Not by way of `map`: a fault of its calls is not to be spent here, where whoever comes first in a process asks.
    // SAFETY: without MAP_FIXED the kernel picks a range that nothing else uses.
    let page = unsafe {
        libc::mmap(
            ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(Error::last(Call::WipeOnFork));
    }
    // SAFETY: the page is mapped until `unmap_mark`, aligned, and zero; all access to it is atomic.
    let mark = unsafe { AtomicU64::from_ptr(page.cast()) };
    // SAFETY: the page is ours, and nobody else knows it.
    let emptied = unsafe { libc::madvise(page, len, libc::MADV_WIPEONFORK) };
    done(Call::WipeOnFork, emptied).inspect_err(|_| unmap_mark(mark))?;
    Ok(mark)
}

/// Unmaps what [`map_mark`] has made, and what nobody else has seen. A page stays mapped where that fails.
fn unmap_mark(mark: &'static AtomicU64) {
    // SAFETY: it fills a page of its own, to which there is no other reference; this one is not used any more.
    unsafe { libc::munmap(mark.as_ptr().cast(), map::host_page_size()) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::in_a_child;

    #[test]
    fn a_child_has_another_number_than_its_parent_and_keeps_it() {
        let mine = address_space().unwrap();
        assert!(is_here(mine));
        assert_eq!(address_space().unwrap(), mine);
        assert!(in_a_child(|| {
            let childs = address_space().unwrap();
            childs != mine && !is_here(mine) && is_here(childs)
        }));
        assert!(is_here(mine));
    }

    #[test]
    fn without_a_mark_there_is_no_number_and_what_is_known_stays() {
        let mine = address_space().unwrap();
        let fault = fault::inject(Call::WipeOnFork, 0, 1, libc::EINVAL);
        let error = address_space().unwrap_err();
        assert_eq!(
            (error.call, error.errno()),
            (Call::WipeOnFork, Some(libc::EINVAL))
        );
        assert!(is_here(mine));
        drop(fault);
        // One that is mapped anew, for the fault to come, does not take the place of the first.
        let _fault = fault::inject(Call::WipeOnFork, 1, 1, libc::EINVAL);
        assert_eq!(address_space().unwrap(), mine);
        assert!(address_space().is_err());
    }
}
