//! Hugetlb pages for tests: reserved while they are needed, and given back.
//!
//! Tests of one process run side by side, and so do processes. What the kernel has free is one number for all, so whoever
//! needs some holds a lock on a file in the temporary directory meanwhile.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;

const RESERVED: &str = "/proc/sys/vm/nr_hugepages";

/// So many free pages of 2 MiB, for as long as this lives. Drop the pool first.
#[derive(Debug)]
pub struct HugePages {
    added: u64,
    _lock: File,
}

impl HugePages {
    /// Sees to it that `pages` pages are free, or says loudly that the test is skipped.
    #[must_use = "the pages are given back when this is dropped"]
    pub fn reserve(pages: u64) -> Option<Self> {
        let lock = lock();
        let missing = pages.saturating_sub(free());
        if missing > 0 {
            let before = read(RESERVED).unwrap_or(0);
            // Where this is not allowed there is less than was asked for, and that is checked below.
            let _ = fs::write(RESERVED, (before + missing).to_string());
        }
        let reserved = Self {
            added: missing,
            _lock: lock,
        };
        if free() < pages {
            eprintln!(
                "SKIPPED: {pages} free hugetlb pages of 2 MiB are needed and {} are there: run as root or set \
                 vm.nr_hugepages",
                free()
            );
            return None;
        }
        Some(reserved)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.added > 0 {
            let now = read(RESERVED).unwrap_or(0);
            let _ = fs::write(RESERVED, now.saturating_sub(self.added).to_string());
        }
    }
}

fn lock() -> File {
    let path = std::env::temp_dir().join("vm-scrub-tests.hugetlb.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    // SAFETY: flock on a descriptor that is open. Each caller has opened the file anew, so this also keeps threads apart.
    let status = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    file
}

/// How many pages nobody has taken or reserved.
pub fn free() -> u64 {
    let of = |name: &str| read(&format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}"));
    match (of("free_hugepages"), of("resv_hugepages")) {
        (Some(free), Some(promised)) => free.saturating_sub(promised),
        _ => 0,
    }
}

fn read(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}
