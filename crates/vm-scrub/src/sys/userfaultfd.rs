//! Moving pages with the kernel's leave: `UFFDIO_MOVE` (Linux 6.8).
//!
//! Unlike `mremap(2)` it moves page by page, and refuses a page to which somebody else may still write: one that is pinned
//! for DMA, or shared with another process. Nothing here waits for page faults. Memory is registered because the kernel moves
//! pages into registered memory only, and with `UFFD_FEATURE_SIGBUS`, so that an access to a page that is not there ends in a
//! signal instead of waiting for ever.

use super::identity::Identity;
use super::{Call, Error, Result, fault, fork};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

// linux/userfaultfd.h.
const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const UFFD_FEATURE_SIGBUS: u64 = 1 << 7;
const UFFD_FEATURE_MOVE: u64 = 1 << 16;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
/// Nobody waits for these pages.
const UFFDIO_MOVE_MODE_DONTWAKE: u64 = 1;
/// Pages that are not there are as good as moved.
const UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: u64 = 1 << 1;
/// The bit of `UFFDIO_MOVE` in what a registration says is possible.
const CAN_MOVE: u64 = 1 << 5;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Span {
    start: u64,
    len: u64,
}

/// `struct uffdio_move`.
#[repr(C)]
struct Move {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    moved: i64,
}

const fn iowr(number: u64, size: usize) -> u64 {
    (3 << 30) | ((size as u64) << 16) | (UFFD_API << 8) | number
}

const fn ior(number: u64, size: usize) -> u64 {
    (2 << 30) | ((size as u64) << 16) | (UFFD_API << 8) | number
}

const UFFDIO_API: u64 = iowr(0x3f, size_of::<Api>());
const UFFDIO_REGISTER: u64 = iowr(0x00, size_of::<Register>());
const UFFDIO_UNREGISTER: u64 = ior(0x01, size_of::<Span>());
const UFFDIO_MOVE: u64 = iowr(0x05, size_of::<Move>());
/// `_IO(0xAA, 0)`, on the device.
const USERFAULTFD_IOC_NEW: u64 = UFFD_API << 8;

/// How far a move got.
#[derive(Debug)]
pub(crate) struct Moved {
    /// Bytes from the start that were moved, or that had nothing to be moved.
    pub(crate) bytes: usize,
    /// Why it stopped there. `EAGAIN` after the first byte means 'ask again from there'.
    pub(crate) stopped: Option<Error>,
}

/// A descriptor through which pages of this process can be moved.
#[derive(Debug)]
pub(crate) struct Userfaultfd {
    fd: OwnedFd,
    /// The descriptor speaks of the address space that opened it, also in the hands of a forked child.
    address_space: u64,
    /// A kernel that moves pages has an inode for each.
    identity: Identity,
}

impl Userfaultfd {
    /// Opens a descriptor and agrees with the kernel on what it is for. Needs no privilege.
    ///
    /// Fails with `EINVAL` on kernels without `UFFDIO_MOVE`.
    pub(crate) fn open() -> Result<Self> {
        let address_space = fork::address_space()?;
        // A filter may forbid the system call and leave the device, which whoever may open it may use.
        let fd = by_system_call().or_else(|error| by_device().map_err(|_| error))?;

        fault::check(Call::UffdApi)?;
        let mut api = Api {
            api: UFFD_API,
            features: UFFD_FEATURE_SIGBUS | UFFD_FEATURE_MOVE,
            ioctls: 0,
        };
        // SAFETY: the structure is live and writable for the call.
        let status = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, &raw mut api) };
        if status != 0 {
            return Err(Error::last(Call::UffdApi));
        }
        Ok(Self {
            identity: Identity::of(fd.as_fd())?,
            fd,
            address_space,
        })
    }

    /// Makes `[start, start + len)`, private anonymous memory, a place to which pages can be moved. From now on an access
    /// to a page of it that is not there raises `SIGBUS`.
    ///
    /// # Safety
    /// The range must belong to the caller, who must not access pages of it that are not populated.
    pub(crate) unsafe fn register(&self, start: *mut u8, len: usize) -> Result<()> {
        self.check(Call::UffdRegister)?;
        fault::check(Call::UffdRegister)?;
        let mut register = Register {
            start: start.addr() as u64,
            len: len as u64,
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ioctls: 0,
        };
        // SAFETY: the structure is live and writable for the call; the range is the caller's, who knows what follows.
        let status =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER as _, &raw mut register) };
        if status != 0 {
            return Err(Error::last(Call::UffdRegister));
        }
        if register.ioctls & CAN_MOVE == 0 {
            return Err(Error {
                call: Call::UffdRegister,
                source: io::Error::from_raw_os_error(libc::EOPNOTSUPP),
            });
        }
        Ok(())
    }

    /// Makes `[start, start + len)` ordinary memory again: no page is moved there, and what is not there is supplied when it is
    /// accessed.
    pub(crate) fn unregister(&self, start: *mut u8, len: usize) -> Result<()> {
        self.check(Call::UffdUnregister)?;
        fault::check(Call::UffdUnregister)?;
        let mut span = Span {
            start: start.addr() as u64,
            len: len as u64,
        };
        // SAFETY: the structure is live for the call, which changes no memory.
        let status =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER as _, &raw mut span) };
        if status != 0 {
            return Err(Error::last(Call::UffdUnregister));
        }
        Ok(())
    }

    /// Moves the pages of `[from, from + len)` to `[to, to + len)`, which must be registered and empty, up to the first that
    /// the kernel refuses.
    ///
    /// It refuses with `EBUSY` what is pinned or shared. Where it fails for a page after the first, the answer is `EAGAIN`, and
    /// the reason comes with the next call from there.
    ///
    /// # Safety
    /// Both ranges must belong to the caller, and nobody may hold a Rust reference into either. On kernels up to 6.18 a huge
    /// page that is mapped in parts, and of which a page is pinned, keeps the calling thread in the kernel until the pin goes:
    /// there must be none in the source, and none may come about because the range cuts through one.
    pub(crate) unsafe fn move_pages(&self, from: *mut u8, to: *mut u8, len: usize) -> Moved {
        let stopped = |bytes, error| Moved {
            bytes,
            stopped: Some(error),
        };
        if let Err(error) = self
            .check(Call::UffdMove)
            .and_then(|()| fault::check(Call::UffdMove))
        {
            return stopped(0, error);
        }
        let whole = len;
        let len = fault::shortened(Call::UffdMove, len);
        let mut order = Move {
            dst: to.addr() as u64,
            src: from.addr() as u64,
            len: len as u64,
            mode: UFFDIO_MOVE_MODE_DONTWAKE | UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES,
            moved: 0,
        };
        // SAFETY: the structure is live and writable for the call; both ranges are the caller's.
        let status = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_MOVE as _, &raw mut order) };
        let error = Error::last(Call::UffdMove);
        // A negative number is the error once more.
        let bytes = usize::try_from(order.moved).unwrap_or(0).min(len);
        if status != 0 {
            return stopped(bytes, error);
        }
        if len < whole {
            let source = io::Error::from_raw_os_error(libc::EAGAIN);
            return stopped(
                len,
                Error {
                    call: Call::UffdMove,
                    source,
                },
            );
        }
        Moved {
            bytes: len,
            stopped: None,
        }
    }

    /// A forked child must not move its parent's pages, nor must the pool's memory be registered with a pager of the VMM's.
    fn check(&self, call: Call) -> Result<()> {
        if !fork::is_here(self.address_space) {
            return Err(Error {
                call,
                source: io::Error::from_raw_os_error(libc::ESRCH),
            });
        }
        self.identity.check(self.fd.as_fd())
    }
}

fn by_system_call() -> Result<OwnedFd> {
    fault::check(Call::UffdOpen)?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    owned(Call::UffdOpen, fd as libc::c_int)
}

fn by_device() -> Result<OwnedFd> {
    fault::check(Call::UffdDevice)?;
    let open: io::Result<File> = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd");
    let device = open.map_err(|source| Error {
        call: Call::UffdDevice,
        source,
    })?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags) };
    owned(Call::UffdDevice, fd)
}

fn owned(call: Call, fd: libc::c_int) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(Error::last(call));
    }
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::{in_a_child, map};

    /// Of the memory that is moved, or not.
    const LEN: usize = 64 << 10;

    #[test]
    fn a_forked_child_changes_nothing_of_its_parents() {
        let Ok(userfaultfd) = Userfaultfd::open() else {
            // Linux before 6.8.
            return;
        };
        let len = 2 * LEN;
        let start = map::reserve(len).unwrap();
        // SAFETY: reserved above, and this test's own.
        unsafe {
            map::map_anonymous(start, len).unwrap();
            start.write(7);
        }
        let to = start.wrapping_add(LEN);
        let is_refused =
            |result: Result<()>| result.is_err_and(|error| error.errno() == Some(libc::ESRCH));
        assert!(in_a_child(|| {
            // SAFETY: all of it is to be refused.
            unsafe {
                let moved = userfaultfd.move_pages(start, to, LEN);
                is_refused(userfaultfd.register(to, LEN))
                    && is_refused(userfaultfd.unregister(to, LEN))
                    && moved.bytes == 0
                    && is_refused(moved.stopped.map_or(Ok(()), Err))
            }
        }));
        // SAFETY: this test's own; what was written is still where it was. Then nobody refers to it any more.
        unsafe {
            assert_eq!(start.read(), 7);
            map::unmap(start, len).unwrap();
        }
    }
}
