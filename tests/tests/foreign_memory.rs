//! `scrub_raw` on memory that somebody else mapped: what was never populated is skipped only where that means 'no content'.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{Policy, Scrubbed, Verify, scrub_raw};
use vm_scrub_tests::maps::{maps_call, pagemap_call};

const PAGE: usize = 4096;
const LEN: usize = 8 << 20;

/// A mapping of this test's own.
struct Mapping {
    start: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(len: usize, flags: libc::c_int, file: Option<&File>) -> Self {
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: without MAP_FIXED the kernel picks a free range.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, fd, 0) };
        assert_ne!(
            start,
            libc::MAP_FAILED,
            "{}",
            std::io::Error::last_os_error()
        );
        let mapping = Self {
            start: start.cast(),
            len,
        };
        // SAFETY: the range was mapped just now. Huge pages would populate neighbours.
        let _ = unsafe { libc::madvise(start, len, libc::MADV_NOHUGEPAGE) };
        mapping
    }

    fn anonymous(len: usize) -> Self {
        Self::new(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
    }

    fn touch(&self, page: usize) {
        assert!(page * PAGE < self.len);
        // SAFETY: mapped, writable and ours.
        unsafe { self.start.add(page * PAGE).write_volatile(0x77) };
    }

    fn scrub(&self, policy: &Policy) -> Scrubbed {
        // SAFETY: mapped, writable, and nobody else knows it.
        unsafe { scrub_raw(self.start, self.len, policy) }.unwrap()
    }

    fn assert_zero(&self) {
        // SAFETY: mapped, readable, and nobody writes to it.
        let bytes = unsafe { std::slice::from_raw_parts(self.start, self.len) };
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    /// How many pages of it are in memory.
    fn resident(&self) -> usize {
        let mut pages = vec![0_u8; self.len / PAGE];
        // SAFETY: the vector has a byte for each page.
        let status = unsafe { libc::mincore(self.start.cast(), self.len, pages.as_mut_ptr()) };
        assert_eq!(status, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours, and no longer used.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// A file of `len` bytes, none of them zero.
fn full_file(len: usize) -> File {
    // SAFETY: the name is a NUL-terminated literal, and the descriptor is checked and ours.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"full".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    file.write_all(&vec![0x66; len]).unwrap();
    file
}

#[test]
fn of_anonymous_memory_only_what_was_touched_is_scrubbed() {
    let memory = Mapping::anonymous(LEN);
    for page in [0, 1, 700, 2047] {
        memory.touch(page);
    }
    let done = memory.scrub(&Policy::new());
    assert_eq!(done.bytes as usize, 4 * PAGE);
    assert_eq!(done.bytes_verified, done.bytes);
    assert_eq!(done.bytes_never_populated as usize, LEN - 4 * PAGE);
    assert_eq!(memory.resident(), 4, "scrubbing populated pages");
    memory.assert_zero();
}

#[test]
fn a_private_mapping_of_a_file_has_content_where_nothing_is_populated() {
    let file = full_file(LEN);
    let memory = Mapping::new(LEN, libc::MAP_PRIVATE, Some(&file));
    memory.touch(5);
    let done = memory.scrub(&Policy::new());
    assert_eq!((done.bytes as usize, done.bytes_never_populated), (LEN, 0));
    memory.assert_zero();
}

#[test]
fn shared_memory_has_content_where_nothing_is_populated() {
    let file = full_file(LEN);
    let memory = Mapping::new(LEN, libc::MAP_SHARED, Some(&file));
    assert_eq!(memory.scrub(&Policy::new()).bytes as usize, LEN);
    memory.assert_zero();
    let again = Mapping::new(LEN, libc::MAP_SHARED, Some(&file));
    again.assert_zero();

    let anonymous = Mapping::new(LEN, libc::MAP_SHARED | libc::MAP_ANONYMOUS, None);
    anonymous.touch(9);
    // Its pages may have been discarded from this view and still be there.
    // SAFETY: ours; that the bytes come back is the point.
    let status = unsafe { libc::madvise(anonymous.start.cast(), LEN, libc::MADV_DONTNEED) };
    assert_eq!(status, 0);
    assert_eq!(anonymous.scrub(&Policy::new()).bytes as usize, LEN);
    anonymous.assert_zero();
}

#[test]
fn a_range_over_several_mappings_is_taken_piece_by_piece() {
    let memory = Mapping::anonymous(LEN);
    let file = full_file(LEN / 4);
    memory.touch(0);
    memory.touch(2047);
    // SAFETY: the middle of our own mapping is replaced by a view of the file.
    unsafe {
        let middle = memory.start.add(LEN / 2).cast();
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
        let mapped = libc::mmap(middle, LEN / 4, protection, flags, file.as_raw_fd(), 0);
        assert_eq!(mapped, middle);
    }
    let done = memory.scrub(&Policy::new());
    assert_eq!(done.bytes as usize, LEN / 4 + 2 * PAGE);
    memory.assert_zero();
}

#[test]
fn pages_that_belong_to_the_range_in_part_are_scrubbed_in_that_part() {
    let memory = Mapping::anonymous(LEN);
    for page in [0, 1, 1023, 2047] {
        memory.touch(page);
    }
    let inner = LEN - 2 * 100;
    // SAFETY: part of our own mapping.
    let done = unsafe { scrub_raw(memory.start.add(100), inner, &Policy::new()) }.unwrap();
    assert_eq!(done.bytes as usize, 4 * PAGE - 200);
    assert_eq!((done.bytes + done.bytes_never_populated) as usize, inner);
    // SAFETY: mapped and ours.
    let first = unsafe { memory.start.read_volatile() };
    assert_eq!(first, 0x77, "a byte before the range was written");
}

#[test]
fn what_the_kernel_does_not_answer_is_scrubbed() {
    for call in [
        Call::MapsOpen,
        maps_call(),
        Call::PagemapOpen,
        pagemap_call(),
    ] {
        let memory = Mapping::anonymous(LEN);
        memory.touch(3);
        let fault = inject(call, 0, u32::MAX, libc::EACCES);
        let done = memory.scrub(&Policy::new());
        assert!(fault.hits() > 0, "{call:?}");
        drop(fault);
        assert_eq!(done.bytes as usize, LEN, "{call:?}");
        memory.assert_zero();
    }
}

#[test]
fn what_is_beyond_the_retained_bytes_goes_back_to_the_kernel() {
    for (retain, kept) in [(0, 0), (PAGE, 1), (10 * PAGE, 10), (LEN, 64)] {
        let memory = Mapping::anonymous(LEN);
        (0..64).for_each(|page| memory.touch(page * 3));
        let done = memory.scrub(&Policy::new().retain(retain as u64));
        assert_eq!(done.bytes as usize, 64 * PAGE);
        assert_eq!(
            done.bytes_returned as usize,
            (64 - kept) * PAGE,
            "retain {retain}"
        );
        assert_eq!(memory.resident(), kept);
        memory.assert_zero();
    }
    let file = full_file(LEN);
    let memory = Mapping::new(LEN, libc::MAP_PRIVATE, Some(&file));
    let done = memory.scrub(&Policy::new().retain(0));
    assert_eq!(done.bytes_returned, 0, "the file's bytes would come back");
    memory.assert_zero();
}

#[test]
fn levels_of_verification_read_what_they_say() {
    let verified = |verify| {
        let memory = Mapping::anonymous(LEN);
        (0..2048).for_each(|page| memory.touch(page));
        let done = memory.scrub(&Policy::new().verify(verify));
        assert_eq!(done.bytes as usize, LEN);
        memory.assert_zero();
        (done.bytes_verified as usize, done.sample_seed.is_some())
    };
    assert_eq!(verified(Verify::None), (0, false));
    assert_eq!(verified(Verify::Full), (LEN, false));
    assert_eq!(verified(Verify::Memory), (LEN, false));
    assert_eq!(verified(Verify::Sampled { per_mille: 1000 }), (LEN, true));
    let (bytes, seed) = verified(Verify::Sampled { per_mille: 10 });
    assert!(seed);
    // 41 of the 4,096 lines of each piece of 256 KiB.
    assert_eq!(bytes, 32 * 41 * 64);
}
