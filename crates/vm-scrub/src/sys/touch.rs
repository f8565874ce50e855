//! Populating pages one by one, where the kernel cannot be asked for a whole range (before Linux 5.14).
//!
//! To write to a page from here would be simpler, and end in a signal where the page cannot be had: `SIGBUS` for a hugetlb page of
//! which the host has none left. So the kernel writes, on the process's behalf, and says what is wrong.

use super::{Call, Error, Result, fault, map};
use std::ptr;

/// `FUTEX_OP(FUTEX_OP_ADD, 0, FUTEX_OP_CMP_EQ, 0)` of `linux/futex.h`: add 0 to the word, in one step. That is a write, and no
/// byte is another one afterwards, whoever else writes at the same time.
const ADD_NOTHING: libc::c_int = libc::FUTEX_OP_ADD << 28;

/// Faults in every page of `[address, address + len)` for writing. The first page that cannot be had ends it with an error.
///
/// # Safety
/// The range must belong to the caller, begin at a page, and nobody may wait on a futex at the start of one of its pages.
pub(crate) unsafe fn each_page(address: *mut u8, len: usize) -> Result<()> {
    for at in (0..len).step_by(map::host_page_size().max(4096)) {
        // SAFETY: the page lies in the caller's range.
        unsafe { page(address.wrapping_add(at)) }?;
    }
    Ok(())
}

/// # Safety
/// As for [`each_page`], of the page at `address`.
unsafe fn page(address: *mut u8) -> Result<()> {
    fault::check(Call::Touch)?;
    loop {
        // SAFETY: the kernel checks the addresses itself; the word at `address` is aligned, the caller's, and keeps its value.
        // Nobody waits there, so nobody is woken.
        let status = unsafe {
            libc::syscall(
                libc::SYS_futex,
                address,
                libc::FUTEX_WAKE_OP | libc::FUTEX_PRIVATE_FLAG,
                0,
                ptr::null::<libc::timespec>(),
                address,
                ADD_NOTHING,
            )
        };
        if status >= 0 {
            return Ok(());
        }
        let error = Error::last(Call::Touch);
        if error.errno() != Some(libc::EINTR) {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pagemap::Pagemap;

    const PAGES: usize = 16;

    /// The populated pages of `[start, start + PAGES)`.
    fn populated(start: *mut u8) -> Vec<usize> {
        let (page, mut found) = (map::host_page_size(), Vec::new());
        let addresses = start.addr()..start.addr() + PAGES * page;
        let pagemap = Pagemap::open().unwrap();
        pagemap
            .read(addresses, page, |run| {
                found.push((run.start - start.addr()) / page)
            })
            .unwrap();
        found
    }

    #[test]
    fn pages_are_populated_and_keep_what_they_contain() {
        let page = map::host_page_size();
        let start = map::reserve(PAGES * page).unwrap();
        // SAFETY: a reservation of our own, that nobody else knows.
        unsafe {
            map::map_anonymous(start, PAGES * page).unwrap();
            start.wrapping_add(5 * page).write_bytes(0xa5, page);
            map::advise(start, PAGES * page, map::Advice::NoHugePage).unwrap();
            each_page(start.wrapping_add(2 * page), 6 * page).unwrap();
        }
        assert_eq!(populated(start), (2..8).collect::<Vec<_>>());
        for at in 2 * page..8 * page {
            let expected = if at / page == 5 { 0xa5 } else { 0 };
            // SAFETY: mapped above, and ours.
            assert_eq!(unsafe { start.wrapping_add(at).read_volatile() }, expected);
        }
        // SAFETY: ours, and no longer used.
        unsafe { map::unmap(start, PAGES * page) }.unwrap();
    }

    #[test]
    fn what_cannot_be_written_to_is_an_error_and_no_signal() {
        let page = map::host_page_size();
        let start = map::reserve(2 * page).unwrap();
        // SAFETY: a reservation of our own: one page that can be written to, and one that nobody can access.
        let error = unsafe {
            map::map_anonymous(start, page).unwrap();
            each_page(start, 2 * page).unwrap_err()
        };
        assert_eq!(
            (error.call, error.errno()),
            (Call::Touch, Some(libc::EFAULT))
        );
        // SAFETY: ours, and no longer used.
        unsafe { map::unmap(start, 2 * page) }.unwrap();
    }
}
