//! `scrub` and `scrub_raw` on memory of all kinds, against a copy of it.

use super::{between, whether};
use crate::PAGE;
use arbitrary::Unstructured;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use vm_scrub::arch::ZeroLoop;
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{Policy, ScrubError, Scrubbed, Verify, scrub, scrub_raw};

const PAGE_LEN: usize = PAGE as usize;

/// The most that is mapped: some pieces of 256 KiB, and enough for the kernel to be asked what is populated.
const MOST_PAGES: usize = 200;

/// Memory with an inaccessible page on each side.
pub(super) struct Guarded {
    start: *mut u8,
    len: usize,
}

impl Guarded {
    /// At least `len` bytes of private anonymous memory, in whole pages.
    pub(super) fn new(len: usize) -> Self {
        Self::with(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)
    }

    fn with(len: usize, flags: libc::c_int, file: Option<&File>) -> Self {
        let len = len.max(1).next_multiple_of(PAGE_LEN);
        let around = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let both = libc::PROT_READ | libc::PROT_WRITE;
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: first a mapping at a place of the kernel's choice, then one in its middle.
        unsafe {
            let map = libc::mmap(
                std::ptr::null_mut(),
                len + 2 * PAGE_LEN,
                libc::PROT_NONE,
                around,
                -1,
                0,
            );
            assert_ne!(map, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            let start = map.cast::<u8>().add(PAGE_LEN);
            let inner = libc::mmap(start.cast(), len, both, flags | libc::MAP_FIXED, fd, 0);
            assert_ne!(
                inner,
                libc::MAP_FAILED,
                "{}",
                std::io::Error::last_os_error()
            );
            Self { start, len }
        }
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: mapped, readable, writable, initialised, and borrowed as long as the result lives.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: exactly what `with` mapped; every borrow of it has ended.
        unsafe { libc::munmap(self.start.sub(PAGE_LEN).cast(), self.len + 2 * PAGE_LEN) };
    }
}

/// A file of so many bytes, none of them zero but where it has holes.
fn file(len: usize, holes: bool) -> File {
    // SAFETY: the name is a NUL-terminated literal, and the descriptor is checked and ours.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0);
        File::from_raw_fd(fd)
    };
    if !holes {
        file.write_all(&vec![0x66; len])
            .expect("a file in memory can be written");
    }
    file.set_len(len as u64)
        .expect("a file in memory can be as long as that");
    file
}

fn policy(input: &mut Unstructured<'_>) -> (Policy, Verify, Option<u64>) {
    let verify = match between(input, 0, 3) {
        0 => Verify::Full,
        1 => Verify::None,
        2 => Verify::Memory,
        _ => Verify::Sampled {
            per_mille: input.arbitrary().unwrap_or(0),
        },
    };
    let mut policy = Policy::new().verify(verify).probe(whether(input));
    if whether(input) {
        let count = ZeroLoop::available().count() - 1;
        let chosen = ZeroLoop::available().nth(between(input, 0, count));
        policy = policy.zero_loop(chosen.expect("below the count"));
    }
    let retain = whether(input).then(|| between(input, 0, MOST_PAGES * PAGE_LEN) as u64);
    (
        retain.into_iter().fold(policy, Policy::retain),
        verify,
        retain,
    )
}

/// What must hold of the evidence.
fn check(done: &Scrubbed, len: usize, verify: Verify, retain: Option<u64>) {
    assert_eq!(
        done.bytes + done.bytes_never_populated,
        len as u64,
        "{done:?}"
    );
    assert!(done.bytes_returned <= done.bytes, "{done:?}");
    assert!(retain.is_some() || done.bytes_returned == 0, "{done:?}");
    match verify {
        Verify::None => assert_eq!((done.bytes_verified, &done.verify_loop), (0, &None)),
        Verify::Sampled { .. } => assert!(done.bytes_verified <= done.bytes, "{done:?}"),
        _ => assert_eq!(done.bytes_verified, done.bytes, "{done:?}"),
    }
}

/// Scrubs a part of some memory, and compares all of it with what was there.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let input = &mut input;
    let pages = if whether(input) {
        between(input, 1, MOST_PAGES)
    } else {
        between(input, 1, 3)
    };
    let (policy, verify, retain) = policy(input);
    let len = pages * PAGE_LEN;
    let kind = between(input, 0, 5);
    let holes = kind == 4;
    let file = (1..=4).contains(&kind).then(|| file(len, holes));
    let mut memory = match kind {
        0 | 5 => Guarded::new(len),
        1 => Guarded::with(len, libc::MAP_PRIVATE, file.as_ref()),
        _ => Guarded::with(len, libc::MAP_SHARED, file.as_ref()),
    };
    // Some pages are written; in anonymous memory the others stay unpopulated.
    let mut model = vec![if file.is_some() && !holes { 0x66 } else { 0 }; len];
    for _ in 0..between(input, 0, 12) {
        let first = between(input, 0, len - 1);
        let end = (first + between(input, 1, 3 * PAGE_LEN)).min(len);
        let tag = input.arbitrary().unwrap_or(1);
        memory.bytes()[first..end].fill(tag);
        model[first..end].fill(tag);
    }
    // And some are discarded again: in anonymous memory they are gone, in others the file's bytes come back.
    if whether(input) {
        let page = between(input, 0, pages - 1);
        // SAFETY: a page of our own, to which nobody holds a reference.
        let status = unsafe {
            libc::madvise(
                memory.start.add(page * PAGE_LEN).cast(),
                PAGE_LEN,
                libc::MADV_DONTNEED,
            )
        };
        assert_eq!(status, 0);
        let shown = memory.bytes()[page * PAGE_LEN..][..PAGE_LEN].to_vec();
        model[page * PAGE_LEN..][..PAGE_LEN].copy_from_slice(&shown);
    }
    let start = between(input, 0, len);
    let count = between(input, 0, len - start);
    let (start, count) = match between(input, 0, 3) {
        0 => (0, len),
        1 => (start, len - start),
        _ => (start, count),
    };
    // The kernel does not answer what is populated, or mapped: then everything counts as populated.
    let call = [
        Call::PagemapScan,
        Call::PagemapRead,
        Call::MapsQuery,
        Call::MapsRead,
        Call::Madvise,
        Call::MapsOpen,
    ];
    let call = call.get(between(input, 0, 2 * call.len()));
    let skip = between(input, 0, 3) as u32;
    let faults = call.map(|call| inject(*call, skip, u32::MAX, libc::ENOMEM));
    let result = if kind == 5 {
        scrub(&mut memory.bytes()[start..start + count], &policy)
    } else {
        // SAFETY: inside one mapping of our own, readable and writable, and nobody else knows it.
        unsafe { scrub_raw(memory.start.add(start), count, &policy) }
    };
    drop(faults);
    let done =
        result.unwrap_or_else(|error| panic!("{error}: {count} bytes at {start} of kind {kind}"));
    check(&done, count, verify, retain);
    if file.is_some() {
        // What has no content in memory has it in the file.
        assert_eq!(
            (done.bytes_never_populated, done.bytes_returned),
            (0, 0),
            "{done:?}"
        );
    }
    model[start..start + count].fill(0);
    let all = memory.bytes();
    if *all != model[..] {
        let at = all
            .iter()
            .zip(&model)
            .position(|(found, expected)| found != expected);
        panic!(
            "kind {kind}, {count} bytes at {start}: the byte at {at:?} is not what it should be"
        );
    }
    wrong_ranges(input, &policy);
}

/// Ranges that are none are refused, and nothing is touched.
fn wrong_ranges(input: &mut Unstructured<'_>, policy: &Policy) {
    let (address, len) = (input.arbitrary::<usize>(), input.arbitrary::<usize>());
    let (address, len) = (address.unwrap_or(0), len.unwrap_or(usize::MAX));
    let none = address == 0 || address.checked_add(len).is_none() || len > isize::MAX as usize;
    if none {
        // SAFETY: the call refuses this range without touching it.
        let result = unsafe { scrub_raw(std::ptr::without_provenance_mut(address), len, policy) };
        assert_eq!(result, Err(ScrubError::InvalidRange { address, len }));
    }
}
