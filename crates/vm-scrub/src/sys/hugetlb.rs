//! Files in hugetlb memory, and how much of it the host has left.

use super::{Call, Error, Result, fault};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

/// Makes an anonymous file of `len` bytes whose pages are 2 MiB hugetlb pages.
pub(crate) fn memfd_2m(len: u64) -> Result<File> {
    fault::check(Call::MemfdCreate)?;
    // SAFETY: the name is a NUL-terminated string literal; the call touches no other memory of ours.
    let fd = unsafe {
        libc::memfd_create(
            c"vm-scrub".as_ptr(),
            libc::MFD_CLOEXEC | libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
        )
    };
    if fd < 0 {
        return Err(Error::last(Call::MemfdCreate));
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    let file = unsafe { File::from_raw_fd(fd) };

    fault::check(Call::Ftruncate)?;
    let len = libc::off_t::try_from(len).map_err(|_| Error {
        call: Call::Ftruncate,
        source: std::io::Error::from_raw_os_error(libc::EFBIG),
    })?;
    // SAFETY: ftruncate on a descriptor we own.
    if unsafe { libc::ftruncate(file.as_raw_fd(), len) } != 0 {
        return Err(Error::last(Call::Ftruncate));
    }
    Ok(file)
}

/// Where the kernel counts the 2 MiB hugetlb pages of a NUMA node, or of the host.
pub(crate) fn directory_2m(node: Option<u32>) -> String {
    let of = match node {
        Some(node) => format!("devices/system/node/node{node}"),
        None => "kernel/mm".to_owned(),
    };
    format!("/sys/{of}/hugepages/hugepages-2048kB")
}

/// How many 2 MiB hugetlb pages of a NUMA node nobody has taken, or of the host nobody has taken or reserved (reservations
/// belong to no node). `None` where the kernel does not say.
pub(crate) fn free_2m_pages(node: Option<u32>) -> Option<u64> {
    let directory = directory_2m(node);
    let read = |name: &str| -> Option<u64> {
        let text = std::fs::read_to_string(format!("{directory}/{name}")).ok()?;
        text.trim().parse().ok()
    };
    let free = read("free_hugepages")?;
    match node {
        Some(_) => Some(free),
        None => Some(free.saturating_sub(read("resv_hugepages")?)),
    }
}
