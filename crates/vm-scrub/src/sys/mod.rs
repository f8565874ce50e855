//! Every system call the library makes, and nothing else.
//!
//! Kept in one place so that an auditor can list them, a seccomp filter can be written from them, and a test can make
//! each one fail ([`fault`]). Functions here add no policy: they take exact ranges, call the kernel once (again only on
//! `EINTR`), and say which call failed.

pub(crate) mod fault;
pub(crate) mod features;
pub(crate) mod fork;
pub(crate) mod hugetlb;
pub(crate) mod identity;
pub(crate) mod map;
pub(crate) mod memfd;
pub(crate) mod mlock;
pub(crate) mod numa;
pub(crate) mod pagemap;
pub(crate) mod procmap;
pub(crate) mod sigbus;
pub(crate) mod thread;
pub(crate) mod touch;
pub(crate) mod userfaultfd;
pub(crate) mod watched;

use std::fmt;
use std::io;

pub use fault::Call;

/// A system call that failed: which one, and the error the kernel gave.
#[derive(Debug)]
pub struct Error {
    /// The call that failed.
    pub call: Call,
    /// What the kernel answered.
    pub source: io::Error,
}

/// What a function of this module returns.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Wraps `errno` as the failure of `call`.
    pub(crate) fn last(call: Call) -> Self {
        Self {
            call,
            source: io::Error::last_os_error(),
        }
    }

    /// The error number, where the kernel gave one.
    pub(crate) fn errno(&self) -> Option<i32> {
        self.source.raw_os_error()
    }

    /// Whether this is what is answered to an `ioctl(2)` that there is not: by the kernel, or by what stands in for one (a
    /// sandbox, a user-mode emulator).
    pub(crate) fn is_no_such_ioctl(&self) -> bool {
        matches!(self.errno(), Some(libc::ENOTTY | libc::ENOSYS))
    }
}

/// What a call answered that says 0 for success.
fn done(call: Call, status: libc::c_int) -> Result<()> {
    if status == 0 {
        Ok(())
    } else {
        Err(Error::last(call))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.call.name(), self.source)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// Does `work` in a forked child and says whether it came to the end of it. A panic would end the thread that forked, which is the
/// child's only one, and that is a success.
#[cfg(test)]
pub(crate) fn in_a_child(work: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child calls nothing that waits for other threads of this process, and ends itself.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "{}", io::Error::last_os_error());
        if child == 0 {
            libc::_exit(i32::from(!crate::embedder::survive(work).unwrap_or(false)));
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0
    }
}
