//! Memory between two pages that nobody may touch, so that a loop which leaves its range by one
//! byte crashes the test.

use std::ptr;

/// Whole pages of readable and writable memory with a `PROT_NONE` page on each side.
pub(super) struct Guarded {
    start: *mut u8,
    len: usize,
}

#[cfg(not(miri))]
impl Guarded {
    /// At least `len` bytes, rounded up to whole pages.
    pub(super) fn new(len: usize) -> Self {
        let page = page_size();
        let len = len.max(1).next_multiple_of(page);
        // SAFETY: a new anonymous mapping at an address of the kernel's choice replaces nothing.
        let map = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len + 2 * page,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(map, libc::MAP_FAILED, "no room for {len} guarded bytes");
        // SAFETY: the mapping is two pages longer than `len`.
        let start = unsafe { map.cast::<u8>().add(page) };
        // SAFETY: the pages from `start` on are inside the mapping made above, which nothing else
        // uses.
        let granted =
            unsafe { libc::mprotect(start.cast(), len, libc::PROT_READ | libc::PROT_WRITE) };
        assert_eq!(granted, 0, "the kernel refused access to a new mapping");
        Self { start, len }
    }
}

#[cfg(not(miri))]
impl Drop for Guarded {
    fn drop(&mut self) {
        let page = page_size();
        // SAFETY: exactly the mapping that `new` made; every borrow of it has ended.
        unsafe { libc::munmap(self.start.sub(page).cast(), self.len + 2 * page) };
    }
}

#[cfg(not(miri))]
fn page_size() -> usize {
    // SAFETY: `sysconf` only reads a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(page).expect("a page has a size")
}

// The interpreter maps no pages without access, but sees every access outside an allocation by
// itself.
#[cfg(miri)]
impl Guarded {
    pub(super) fn new(len: usize) -> Self {
        let bytes = vec![0_u8; len.max(1)].into_boxed_slice();
        let len = bytes.len();
        let start = Box::into_raw(bytes).cast::<u8>();
        Self { start, len }
    }
}

#[cfg(miri)]
impl Drop for Guarded {
    fn drop(&mut self) {
        let bytes = ptr::slice_from_raw_parts_mut(self.start, self.len);
        // SAFETY: the allocation that `new` leaked; every borrow of it has ended.
        drop(unsafe { Box::from_raw(bytes) });
    }
}

impl Guarded {
    /// The first byte after the lower guard page.
    pub(super) fn start(&mut self) -> *mut u8 {
        self.start
    }

    /// Bytes between the guard pages.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Everything between the guard pages.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `len` bytes from `start` are mapped, readable and writable, initialised (new
        // pages are zero), and borrowed as long as the result lives.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}
