//! Hugetlb pages for tests: reserved while they are needed, and given back.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;

/// So many free pages of 2 MiB, for as long as this lives. Drop the pool first.
#[derive(Debug)]
pub struct HugePages {
    _added: vm_scrub_vmm::HugePages,
    _lock: File,
}

impl HugePages {
    /// Sees to it that `pages` pages are free for the caller, or says loudly that the test is skipped.
    #[must_use = "the pages are given back when this is dropped"]
    pub fn reserve(pages: u64) -> Option<Self> {
        Self::reserve_under(lock(libc::LOCK_SH)?, pages)
    }

    /// The same for a test that takes every free page: no other test has any meanwhile.
    #[must_use = "the pages are given back when this is dropped"]
    pub fn reserve_alone(pages: u64) -> Option<Self> {
        Self::reserve_under(lock(libc::LOCK_EX)?, pages)
    }

    fn reserve_under(lock: File, pages: u64) -> Option<Self> {
        match vm_scrub_vmm::HugePages::ensure(pages) {
            Ok(added) => Some(Self {
                _added: added,
                _lock: lock,
            }),
            Err(error) => {
                crate::skipped(&error);
                None
            }
        }
    }
}

/// Each caller opens the file anew, so this keeps threads apart as well as processes. `None`, and a word about it, where the
/// file is another user's.
fn lock(kind: libc::c_int) -> Option<File> {
    let path = std::env::temp_dir().join("vm-scrub-tests.hugetlb.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .inspect_err(|error| crate::skipped(&format!("{}: {error}", path.display())))
        .ok()?;
    // SAFETY: flock on a descriptor that is open.
    let status = unsafe { libc::flock(file.as_raw_fd(), kind) };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    Some(file)
}

/// How many pages nobody has taken or reserved at this moment.
pub fn free() -> u64 {
    let of = |name: &str| -> Option<u64> {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        std::fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    match (of("free_hugepages"), of("resv_hugepages")) {
        (Some(free), Some(promised)) => free.saturating_sub(promised),
        _ => 0,
    }
}
