//! What the kernel says about this process's address space.

use crate::older::release;
use std::fs;
use std::ops::Range;
use vm_scrub::test_support::Call;
use vm_scrub::{PageSize, Revocation};

/// Whether the kernel has `PAGEMAP_SCAN`, which tells the shared zero page from others.
pub fn has_pagemap_scan() -> bool {
    release() >= (6, 7)
}

/// Whether the kernel has `PROCMAP_QUERY`.
pub fn has_procmap_query() -> bool {
    release() >= (6, 11)
}

/// Whether the kernel has `MADV_POPULATE_WRITE`.
pub fn has_populate_write() -> bool {
    release() >= (5, 14)
}

/// Whether the kernel has `UFFDIO_MOVE`.
pub fn has_uffdio_move() -> bool {
    release() >= (6, 8)
}

/// How memory of these pages is taken away from guests here, if nobody says otherwise.
pub fn revocation(page_size: PageSize) -> Revocation {
    match page_size {
        PageSize::Huge2M => Revocation::ViewReplaced,
        _ if has_uffdio_move() => Revocation::Move,
        _ => Revocation::Mremap,
    }
}

/// The call by which this kernel is asked what is populated.
pub fn pagemap_call() -> Call {
    if has_pagemap_scan() {
        Call::PagemapScan
    } else {
        Call::PagemapRead
    }
}

/// The call by which this kernel is asked what is mapped.
pub fn maps_call() -> Call {
    if has_procmap_query() {
        Call::MapsQuery
    } else {
        Call::MapsRead
    }
}

/// One mapping, from `/proc/self/smaps`.
#[derive(Debug, Clone)]
pub struct Mapping {
    /// The addresses.
    pub range: Range<usize>,
    /// `rwxp` or `rwxs`, with dashes.
    pub permissions: String,
    /// Bytes that are populated.
    pub resident: u64,
    /// Bytes that are populated with transparent huge pages.
    pub huge: u64,
    /// Bytes that are populated and locked in memory.
    pub locked: u64,
    /// Two-letter flags: `lo` is locked, `dd` is not dumped, `dc` is not inherited by children, `mg` may be merged.
    pub flags: Vec<String>,
}

impl Mapping {
    /// Whether the mapping has this two-letter flag.
    pub fn has(&self, flag: &str) -> bool {
        self.flags.iter().any(|each| each == flag)
    }
}

/// Every mapping that shares an address with `range`, in ascending order.
pub fn mappings(range: Range<usize>) -> Vec<Mapping> {
    let smaps = fs::read_to_string("/proc/self/smaps").expect("a process can read its own smaps");
    let mut all: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let (key, rest) = line.split_once(' ').unwrap_or((line, ""));
        if let Some(name) = key.strip_suffix(':') {
            let Some(mapping) = all.last_mut() else {
                continue;
            };
            match name {
                "Rss" => mapping.resident = kilobytes(rest),
                // Hugetlb pages are not in Rss.
                "Private_Hugetlb" | "Shared_Hugetlb" => mapping.resident += kilobytes(rest),
                "AnonHugePages" => mapping.huge = kilobytes(rest),
                "Locked" => mapping.locked = kilobytes(rest),
                "VmFlags" => mapping.flags = rest.split_whitespace().map(str::to_owned).collect(),
                _ => {}
            }
        } else if let Some((start, end)) = key.split_once('-') {
            let address = |text| usize::from_str_radix(text, 16).expect("smaps has hex addresses");
            all.push(Mapping {
                range: address(start)..address(end),
                permissions: rest.chars().take(4).collect(),
                resident: 0,
                huge: 0,
                locked: 0,
                flags: Vec::new(),
            });
        }
    }
    all.retain(|mapping| mapping.range.start < range.end && range.start < mapping.range.end);
    all
}

fn kilobytes(text: &str) -> u64 {
    let number = text.trim().trim_end_matches("kB").trim();
    number.parse::<u64>().expect("smaps counts in kB") << 10
}

/// Whether the kernel would let this process read the byte at `address`: asks without touching it.
pub fn is_readable(address: usize) -> bool {
    let mut byte = 0_u8;
    let local = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address),
        iov_len: 1,
    };
    // SAFETY: `local` is a byte of this function's; `remote` is looked at by the kernel, which answers EFAULT.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    assert!(
        read == 1 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT),
        "{}",
        std::io::Error::last_os_error()
    );
    read == 1
}

/// Whether the kernel would let this process write the byte at `address`; if so, the byte becomes `value`.
pub fn is_writable(address: usize, mut value: u8) -> bool {
    let local = libc::iovec {
        iov_base: (&raw mut value).cast(),
        iov_len: 1,
    };
    let remote = libc::iovec {
        iov_base: std::ptr::without_provenance_mut(address),
        iov_len: 1,
    };
    // SAFETY: tests pass addresses in windows of their own leases, to which nobody holds a reference; anything that is not
    // writable is answered with EFAULT.
    let written = unsafe { libc::process_vm_writev(libc::getpid(), &local, 1, &remote, 1, 0) };
    assert!(
        written == 1 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EFAULT),
        "{}",
        std::io::Error::last_os_error()
    );
    written == 1
}

/// Bytes that are populated in `range`, by `/proc/self/pagemap`: present or swapped out.
pub fn populated_bytes(range: Range<usize>) -> u64 {
    // Documentation/admin-guide/mm/pagemap.rst: bit 63 is present, bit 62 is swapped.
    bytes_with(range, 3 << 62)
}

/// Bytes that are swapped out in `range`, or whose pages the hardware has lost.
pub fn swapped_bytes(range: Range<usize>) -> u64 {
    bytes_with(range, 1 << 62)
}

/// Bytes in pages whose entry has one of the `bits`.
fn bytes_with(range: Range<usize>, bits: u64) -> u64 {
    use std::os::unix::fs::FileExt;
    let pagemap = fs::File::open("/proc/self/pagemap").expect("a process can read its own pagemap");
    let mut entries = vec![0_u8; range.len() / 4096 * 8];
    pagemap
        .read_exact_at(&mut entries, (range.start / 4096 * 8) as u64)
        .expect("pagemap has an entry for each page");
    let pages = entries
        .as_chunks::<8>()
        .0
        .iter()
        .filter(|entry| u64::from_ne_bytes(**entry) & bits != 0)
        .count();
    pages as u64 * 4096
}
