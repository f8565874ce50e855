//! Anonymous files: making them, sealing them, and asking what they hold.
//!
//! A seal is a promise of the kernel's about the file, whoever has its descriptor: no new size, no writing. Seals are never
//! taken off.

use super::{Call, Error, Result, fault};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// `MFD_NOEXEC_SEAL` of `linux/memfd.h` (Linux 6.3): the file cannot be executed, and never made executable.
const MFD_NOEXEC_SEAL: libc::c_uint = 0x0008;

/// Set once the kernel has said that it has no `MFD_NOEXEC_SEAL`.
static NO_NOEXEC_SEAL: AtomicBool = AtomicBool::new(false);

/// What an anonymous file's pages are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pages {
    /// 4 KiB, supplied when they are touched.
    Base,
    /// 2 MiB hugetlb pages, reserved when they are mapped.
    Huge2M,
}

/// Makes an anonymous file of `len` bytes that nobody else is going to know: it takes no seals.
pub(crate) fn private(len: u64, pages: Pages) -> Result<File> {
    let file = create(c"vm-scrub", libc::MFD_CLOEXEC, pages)?;
    set_len(&file, len)?;
    Ok(file)
}

/// Makes an anonymous file of `len` bytes to be shared with other processes: it neither shrinks nor grows, so that nobody who
/// has mapped it loses memory, and other seals can be added.
pub(crate) fn shareable(len: u64, pages: Pages) -> Result<File> {
    let file = sealable(pages, &NO_NOEXEC_SEAL)?;
    set_len(&file, len)?;
    add_seals(&file, libc::F_SEAL_SHRINK | libc::F_SEAL_GROW)?;
    Ok(file)
}

/// An empty file that takes seals, and cannot be executed unless the kernel has `no_noexec_seal`.
fn sealable(pages: Pages, no_noexec_seal: &AtomicBool) -> Result<File> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let noexec = !no_noexec_seal.load(Ordering::Relaxed);
    let noexec_flag = if noexec { MFD_NOEXEC_SEAL } else { 0 };
    let name = c"vm-scrub-shared";
    match create(name, flags | noexec_flag, pages) {
        Err(error) if noexec && error.errno() == Some(libc::EINVAL) => {
            let file = create(name, flags, pages)?;
            no_noexec_seal.store(true, Ordering::Relaxed);
            Ok(file)
        }
        result => result,
    }
}

/// An empty file that cannot be executed. Fails with `EINVAL` where the kernel has no such files.
pub(super) fn not_executable() -> Result<File> {
    create(
        c"vm-scrub",
        libc::MFD_CLOEXEC | MFD_NOEXEC_SEAL,
        Pages::Base,
    )
}

fn create(name: &CStr, flags: libc::c_uint, pages: Pages) -> Result<File> {
    fault::check(Call::MemfdCreate)?;
    let huge = match pages {
        Pages::Base => 0,
        Pages::Huge2M => libc::MFD_HUGETLB | libc::MFD_HUGE_2MB,
    };
    // SAFETY: the name is a NUL-terminated string; the call touches no other memory of ours.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags | huge) };
    if fd < 0 {
        return Err(Error::last(Call::MemfdCreate));
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn set_len(file: &File, len: u64) -> Result<()> {
    fault::check(Call::Ftruncate)?;
    let len = libc::off_t::try_from(len).map_err(|_| Error {
        call: Call::Ftruncate,
        source: io::Error::from_raw_os_error(libc::EFBIG),
    })?;
    // SAFETY: ftruncate on a descriptor we own.
    if unsafe { libc::ftruncate(file.as_raw_fd(), len) } != 0 {
        return Err(Error::last(Call::Ftruncate));
    }
    Ok(())
}

fn add_seals(file: &File, seals: libc::c_int) -> Result<()> {
    fault::check(Call::AddSeals)?;
    // SAFETY: fcntl on a descriptor we own, with a command that takes a number.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } != 0 {
        return Err(Error::last(Call::AddSeals));
    }
    Ok(())
}

/// Has the kernel refuse every write to the file from now on, by anybody and on any way. `EBUSY` while there is a mapping,
/// in whatever process, that could be written to, or a page that is pinned.
pub(crate) fn seal_writing(file: &File) -> Result<()> {
    add_seals(file, libc::F_SEAL_WRITE)
}

/// The first offset from `offset` on that holds data, swapped out or not; `None` behind the last. Not for hugetlb.
pub(crate) fn seek_data(file: BorrowedFd<'_>, offset: u64) -> Result<Option<u64>> {
    seek(file, offset, libc::SEEK_DATA)
}

/// The first offset from `offset` on that holds none; the end of the file counts. Not for hugetlb.
pub(crate) fn seek_hole(file: BorrowedFd<'_>, offset: u64) -> Result<Option<u64>> {
    seek(file, offset, libc::SEEK_HOLE)
}

fn seek(file: BorrowedFd<'_>, offset: u64, whence: libc::c_int) -> Result<Option<u64>> {
    fault::check(Call::SeekData)?;
    let offset = libc::off_t::try_from(offset).map_err(|_| Error {
        call: Call::SeekData,
        source: io::Error::from_raw_os_error(libc::EOVERFLOW),
    })?;
    // SAFETY: lseek on a descriptor that is open for the call. It moves the file's position, which nobody here uses.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    if let Ok(found) = u64::try_from(found) {
        return Ok(Some(found));
    }
    let error = Error::last(Call::SeekData);
    if error.errno() == Some(libc::ENXIO) {
        return Ok(None);
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> Option<i32> {
        result.unwrap_err().raw_os_error()
    }

    #[test]
    fn a_shareable_file_keeps_its_size_and_can_be_sealed_against_writing() {
        let file = shareable(1 << 20, Pages::Base).unwrap();
        assert_eq!(errno(file.set_len(1 << 19)), Some(libc::EPERM));
        assert_eq!(errno(file.set_len(1 << 21)), Some(libc::EPERM));
        file.write_all_at(b"before", 0).unwrap();
        seal_writing(&file).unwrap();
        assert_eq!(errno(file.write_at(b"after", 0)), Some(libc::EPERM));
    }

    #[test]
    fn a_private_file_takes_no_seals() {
        let file = private(1 << 20, Pages::Base).unwrap();
        assert_eq!(seal_writing(&file).unwrap_err().errno(), Some(libc::EPERM));
    }

    #[test]
    fn a_kernel_without_noexec_seals_gets_a_file_without() {
        // Its own: on a kernel that has none, other tests have found that out.
        let missing = AtomicBool::new(false);
        let fault = fault::inject(Call::MemfdCreate, 0, 1, libc::EINVAL);
        let file = sealable(Pages::Base, &missing).unwrap();
        assert_eq!((fault.hits(), missing.load(Ordering::Relaxed)), (1, true));
        drop(fault);
        add_seals(&file, libc::F_SEAL_SHRINK).unwrap();
        // SAFETY: fcntl on a descriptor we own, with a command without an argument.
        let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
        assert_eq!(
            seals,
            libc::F_SEAL_SHRINK,
            "it is not sealed against execution"
        );

        // Asked once: what is invalid now is something else.
        let fault = fault::inject(Call::MemfdCreate, 0, 1, libc::EINVAL);
        let error = sealable(Pages::Base, &missing).unwrap_err();
        assert_eq!((fault.hits(), error.errno()), (1, Some(libc::EINVAL)));
    }

    #[test]
    fn data_and_holes() {
        let file = private(16 * 4096, Pages::Base).unwrap();
        assert_eq!(seek_data(file.as_fd(), 0).unwrap(), None);
        file.write_all_at(&[1], 5 * 4096 + 7).unwrap();
        assert_eq!(seek_data(file.as_fd(), 0).unwrap(), Some(5 * 4096));
        assert_eq!(seek_hole(file.as_fd(), 5 * 4096).unwrap(), Some(6 * 4096));
        assert_eq!(seek_data(file.as_fd(), 6 * 4096).unwrap(), None);
    }
}
