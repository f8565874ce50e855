//! Telling whether a descriptor still leads to the file for which it was opened.
//!
//! A VMM that closes descriptors it does not know, as daemons do, or one twice, gives the number away to some other file. So a file
//! is recognised before it is taken for what it was.

use super::{Call, Error, Result, fault};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

/// By what a file is known to the kernel, whatever its descriptor's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// Of the file to which the descriptor leads now.
    pub(crate) fn of(file: BorrowedFd<'_>) -> Result<Self> {
        fault::check(Call::Fstat)?;
        let mut stat = MaybeUninit::<libc::stat>::zeroed();
        // Not by the C library, some of which make another call of it.
        // SAFETY: the kernel fills in the structure, which is as it knows it on 64-bit architectures.
        let status = unsafe { libc::syscall(libc::SYS_fstat, file.as_raw_fd(), stat.as_mut_ptr()) };
        if status != 0 {
            return Err(Error::last(Call::Fstat));
        }
        // SAFETY: zeroed is a valid value of it, and the kernel has filled it in.
        let stat = unsafe { stat.assume_init() };
        Ok(Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        })
    }

    /// Whether the descriptor still leads to this file. If not, that is an error.
    pub(crate) fn check(self, file: BorrowedFd<'_>) -> Result<()> {
        if Self::of(file)? == self {
            return Ok(());
        }
        Err(Error {
            call: Call::Fstat,
            source: io::Error::other(
                "another file has the descriptor's number: something in this process has closed it",
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::memfd::{Pages, private};
    use std::os::fd::AsFd;

    #[test]
    fn another_file_by_the_same_number_is_found_out() {
        let file = private(4096, Pages::Base).unwrap();
        let identity = Identity::of(file.as_fd()).unwrap();
        identity.check(file.as_fd()).unwrap();
        identity.check(file.try_clone().unwrap().as_fd()).unwrap();
        let other = private(4096, Pages::Base).unwrap();
        // SAFETY: both descriptors are this test's; `file` is closed as what it is then.
        assert!(unsafe { libc::dup2(other.as_raw_fd(), file.as_raw_fd()) } >= 0);
        assert!(identity.check(file.as_fd()).is_err());
    }
}
