//! Kernels of older releases, played by the one that is there: what an older one does not have is answered as it would answer. What
//! differs otherwise, only a real one shows.

use crate::seccomp::{self, Refused};
use std::io;

/// The variable with the release that is played, such as `5.10`: for tests that ask what the kernel has.
pub const RELEASE: &str = "VM_SCRUB_TEST_RELEASE";

/// A version of Linux: major and minor.
pub type Release = (u32, u32);

// linux/fs.h: `_IOWR('f', 16, struct pm_scan_arg)` of 96 bytes, `_IOWR('f', 17, struct procmap_query)` of 104.
const PAGEMAP_SCAN: u32 = 0xc060_6610;
const PROCMAP_QUERY: u32 = 0xc068_6611;
// linux/userfaultfd.h: `_IOWR(0xaa, 0x3f, struct uffdio_api)` of 24 bytes.
const UFFDIO_API: u32 = 0xc018_aa3f;
// asm-generic/mman-common.h.
const MADV_GUARD_INSTALL: u32 = 102;
const MADV_GUARD_REMOVE: u32 = 103;
// linux/mman.h.
const MAP_TYPE: u32 = 0x0f;
const MAP_DROPPABLE: u32 = 0x08;

/// What came with a release of Linux, as the answer of those before.
const NEWS: [(Release, Refused); 10] = [
    ((5, 14), advice(libc::MADV_POPULATE_READ as u32)),
    ((5, 14), advice(libc::MADV_POPULATE_WRITE as u32)),
    ((5, 18), advice(libc::MADV_DONTNEED_LOCKED as u32)),
    (
        (6, 3),
        Refused {
            call: libc::SYS_memfd_create,
            argument: 1,
            mask: libc::MFD_NOEXEC_SEAL,
            value: libc::MFD_NOEXEC_SEAL,
            errno: libc::EINVAL,
        },
    ),
    ((6, 7), request(PAGEMAP_SCAN, libc::ENOTTY)),
    // Whoever asks for `UFFDIO_MOVE` there asks for what the kernel does not know. A filter does not see what is asked for, so
    // nobody else has a userfaultfd either.
    ((6, 8), request(UFFDIO_API, libc::EINVAL)),
    ((6, 11), request(PROCMAP_QUERY, libc::ENOTTY)),
    (
        (6, 11),
        Refused {
            call: libc::SYS_mmap,
            argument: 3,
            mask: MAP_TYPE,
            value: MAP_DROPPABLE,
            errno: libc::EINVAL,
        },
    ),
    ((6, 13), advice(MADV_GUARD_INSTALL)),
    ((6, 13), advice(MADV_GUARD_REMOVE)),
];

const fn advice(value: u32) -> Refused {
    Refused {
        call: libc::SYS_madvise,
        argument: 2,
        mask: u32::MAX,
        value,
        errno: libc::EINVAL,
    }
}

const fn request(value: u32, errno: i32) -> Refused {
    Refused {
        call: libc::SYS_ioctl,
        argument: 1,
        mask: u32::MAX,
        value,
        errno,
    }
}

/// Has this process and what it executes meet a kernel of that release from now on. [`RELEASE`] is for the caller to set.
///
/// # Errors
/// As for [`seccomp::refuse`].
pub fn play(release: Release) -> io::Result<()> {
    let news = NEWS.iter().filter(|(since, _)| *since > release);
    let refused: Vec<Refused> = news.map(|(_, refused)| *refused).collect();
    seccomp::refuse(&refused)
}

/// Major and minor version of the kernel, or of the one that is played.
///
/// # Panics
/// If there is no `/proc`.
pub fn release() -> Release {
    let played = std::env::var(RELEASE).ok();
    let release = played.unwrap_or_else(|| {
        std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("Linux says its release")
    });
    parse(&release).expect("a release has two numbers")
}

/// The first two numbers of a release such as `6.1.0-40-amd64`.
pub fn parse(release: &str) -> Option<Release> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some((number()?, number()?))
}
