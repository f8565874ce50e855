//! The one place where a system call can be made to fail on purpose.
//!
//! Every function of [`sys`](super) asks [`check`] before it calls the kernel. Without the `test-support` feature (and
//! outside unit tests) that question costs nothing and the answer is always 'go ahead'. Faults are planned per thread, so
//! that tests running side by side do not disturb each other.

use super::Result;

/// A system call that this library makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Call {
    /// `mmap(2)`.
    Mmap,
    /// `munmap(2)`.
    Munmap,
    /// `mremap(2)`.
    Mremap,
    /// `mprotect(2)`.
    Mprotect,
    /// `getrlimit(2)` of `RLIMIT_DATA`, which is `prlimit64` to a seccomp filter.
    Getrlimit,
    /// `madvise(2)` with advice that changes how a range is treated (`DONTFORK`, `DONTDUMP`, `UNMERGEABLE`, huge pages), or that
    /// discards it (`DONTNEED`, `REMOVE`).
    Madvise,
    /// `mmap(2)` and `madvise(2)` with `MADV_WIPEONFORK` of the page by which a forked child is told from its parent.
    WipeOnFork,
    /// `madvise(2)` with `MADV_POPULATE_WRITE`.
    Populate,
    /// `futex(2)` with `FUTEX_WAKE_OP`, which populates one page where `MADV_POPULATE_WRITE` is missing.
    Touch,
    /// `madvise(2)` with `MADV_POPULATE_READ`.
    PopulateRead,
    /// `memfd_create(2)`.
    MemfdCreate,
    /// `ftruncate(2)`.
    Ftruncate,
    /// `fstat(2)`, by which a descriptor is recognised.
    Fstat,
    /// `fcntl(2)` `F_ADD_SEALS`.
    AddSeals,
    /// `lseek(2)` with `SEEK_DATA` or `SEEK_HOLE`.
    SeekData,
    /// `open(2)` of `/proc/self/pagemap`.
    PagemapOpen,
    /// `ioctl(2)` `PAGEMAP_SCAN` on `/proc/self/pagemap`.
    PagemapScan,
    /// `pread(2)` of `/proc/self/pagemap`.
    PagemapRead,
    /// `open(2)` of `/proc/self/maps`.
    MapsOpen,
    /// `ioctl(2)` `PROCMAP_QUERY` on `/proc/self/maps`.
    MapsQuery,
    /// `read(2)` of `/proc/self/maps`.
    MapsRead,
    /// `mlock2(2)`.
    Mlock,
    /// `munlock(2)`.
    Munlock,
    /// `madvise(2)` with `MADV_DONTNEED_LOCKED`.
    DiscardLocked,
    /// `userfaultfd(2)`.
    UffdOpen,
    /// `open(2)` of `/dev/userfaultfd`, and the `ioctl(2)` that makes a descriptor of it.
    UffdDevice,
    /// `ioctl(2)` `UFFDIO_API`.
    UffdApi,
    /// `ioctl(2)` `UFFDIO_REGISTER`.
    UffdRegister,
    /// `ioctl(2)` `UFFDIO_UNREGISTER`.
    UffdUnregister,
    /// `ioctl(2)` `UFFDIO_MOVE`.
    UffdMove,
    /// `rt_sigaction(2)` of `SIGBUS`.
    Sigaction,
    /// `mmap(2)` over memory that raised `SIGBUS`. Planned faults are not counted: they are met in a signal handler.
    MmapOver,
    /// `setpriority(2)` of the background thread.
    SetPriority,
    /// `read(2)` of a list in `/sys/devices/system/node`.
    NodeRead,
    /// `read(2)` of `/proc/thread-self/status`.
    StatusRead,
    /// `mbind(2)`.
    Mbind,
    /// `sched_setaffinity(2)` of a scrubbing thread.
    SchedSetaffinity,
    /// `ioctl(2)` `KVM_SET_USER_MEMORY_REGION` that adds a memslot.
    MemslotAdd,
    /// `ioctl(2)` `KVM_SET_USER_MEMORY_REGION` that deletes a memslot.
    MemslotDelete,
}

impl Call {
    /// Every call, in the order of the definition: what a test of all failures walks through.
    pub const ALL: &'static [Call] = &[
        Call::Mmap,
        Call::Munmap,
        Call::Mremap,
        Call::Mprotect,
        Call::Getrlimit,
        Call::Madvise,
        Call::WipeOnFork,
        Call::Populate,
        Call::Touch,
        Call::PopulateRead,
        Call::MemfdCreate,
        Call::Ftruncate,
        Call::Fstat,
        Call::AddSeals,
        Call::SeekData,
        Call::PagemapOpen,
        Call::PagemapScan,
        Call::PagemapRead,
        Call::MapsOpen,
        Call::MapsQuery,
        Call::MapsRead,
        Call::Mlock,
        Call::Munlock,
        Call::DiscardLocked,
        Call::UffdOpen,
        Call::UffdDevice,
        Call::UffdApi,
        Call::UffdRegister,
        Call::UffdUnregister,
        Call::UffdMove,
        Call::Sigaction,
        Call::MmapOver,
        Call::SetPriority,
        Call::NodeRead,
        Call::StatusRead,
        Call::Mbind,
        Call::SchedSetaffinity,
        Call::MemslotAdd,
        Call::MemslotDelete,
    ];

    /// The call's name as an error message shows it.
    pub fn name(self) -> &'static str {
        match self {
            Call::Mmap => "mmap",
            Call::Munmap => "munmap",
            Call::Mremap => "mremap",
            Call::Mprotect => "mprotect",
            Call::Getrlimit => "getrlimit",
            Call::Madvise => "madvise",
            Call::WipeOnFork => "madvise(MADV_WIPEONFORK)",
            Call::Populate => "madvise(MADV_POPULATE_WRITE)",
            Call::Touch => "futex(FUTEX_WAKE_OP)",
            Call::PopulateRead => "madvise(MADV_POPULATE_READ)",
            Call::MemfdCreate => "memfd_create",
            Call::Ftruncate => "ftruncate",
            Call::Fstat => "fstat",
            Call::AddSeals => "fcntl(F_ADD_SEALS)",
            Call::SeekData => "lseek(SEEK_DATA)",
            Call::PagemapOpen => "open(/proc/self/pagemap)",
            Call::PagemapScan => "ioctl(PAGEMAP_SCAN)",
            Call::PagemapRead => "pread(/proc/self/pagemap)",
            Call::MapsOpen => "open(/proc/self/maps)",
            Call::MapsQuery => "ioctl(PROCMAP_QUERY)",
            Call::MapsRead => "read(/proc/self/maps)",
            Call::Mlock => "mlock2",
            Call::Munlock => "munlock",
            Call::DiscardLocked => "madvise(MADV_DONTNEED_LOCKED)",
            Call::UffdOpen => "userfaultfd",
            Call::UffdDevice => "open(/dev/userfaultfd)",
            Call::UffdApi => "ioctl(UFFDIO_API)",
            Call::UffdRegister => "ioctl(UFFDIO_REGISTER)",
            Call::UffdUnregister => "ioctl(UFFDIO_UNREGISTER)",
            Call::UffdMove => "ioctl(UFFDIO_MOVE)",
            Call::Sigaction => "rt_sigaction",
            Call::MmapOver => "mmap(MAP_FIXED) in a signal handler",
            Call::SetPriority => "setpriority",
            Call::NodeRead => "read(/sys/devices/system/node)",
            Call::StatusRead => "read(/proc/thread-self/status)",
            Call::Mbind => "mbind",
            Call::SchedSetaffinity => "sched_setaffinity",
            Call::MemslotAdd => "ioctl(KVM_SET_USER_MEMORY_REGION)",
            Call::MemslotDelete => "ioctl(KVM_SET_USER_MEMORY_REGION, size 0)",
        }
    }
}

#[cfg(not(any(test, feature = "test-support")))]
mod plan {
    use super::{Call, Result};

    #[inline(always)]
    pub(crate) fn check(_call: Call) -> Result<()> {
        Ok(())
    }

    #[inline(always)]
    pub(crate) fn is_planned(_call: Call) -> bool {
        false
    }

    #[inline(always)]
    pub(crate) fn shortened(_call: Call, len: usize) -> usize {
        len
    }

    #[inline(always)]
    pub(crate) fn spared<T>(work: impl FnOnce() -> T) -> T {
        work()
    }
}

#[cfg(any(test, feature = "test-support"))]
mod plan {
    use super::super::Error;
    use super::{Call, Result};
    use std::cell::RefCell;
    use std::io;
    use std::marker::PhantomData;

    #[derive(Debug)]
    struct Fault {
        call: Call,
        skip: u32,
        times: u32,
        kind: Kind,
        hits: u32,
    }

    #[derive(Debug, Clone, Copy)]
    enum Kind {
        /// The call fails with this error.
        Errno(i32),
        /// The call does this many bytes of what it is asked for, and says so.
        Short(usize),
    }

    thread_local! {
        static PLAN: RefCell<Vec<Fault>> = const { RefCell::new(Vec::new()) };
    }

    /// Faults planned on this thread; dropping it forgets all of them.
    #[derive(Debug)]
    #[must_use = "the faults are forgotten when this is dropped"]
    pub struct FaultGuard {
        // Not `Send`: the plan belongs to the thread that made it.
        thread_bound: PhantomData<*const ()>,
    }

    impl FaultGuard {
        /// How many calls on this thread have failed so far because of the faults that are planned.
        pub fn hits(&self) -> u32 {
            PLAN.with_borrow(|plan| plan.iter().map(|fault| fault.hits).sum())
        }
    }

    impl Drop for FaultGuard {
        fn drop(&mut self) {
            PLAN.with_borrow_mut(Vec::clear);
        }
    }

    /// Makes `call` fail with `errno` on this thread: after `skip` successful calls, `times` times.
    pub fn inject(call: Call, skip: u32, times: u32, errno: i32) -> FaultGuard {
        plan(call, skip, times, Kind::Errno(errno))
    }

    /// Makes `call` succeed in part on this thread: after `skip` calls, `times` times, it does at most the first `bytes` bytes
    /// (a multiple of the page size). Calls that are done as a whole or not at all are not changed.
    pub fn inject_short(call: Call, skip: u32, times: u32, bytes: usize) -> FaultGuard {
        plan(call, skip, times, Kind::Short(bytes))
    }

    fn plan(call: Call, skip: u32, times: u32, kind: Kind) -> FaultGuard {
        PLAN.with_borrow_mut(|plan| {
            plan.push(Fault {
                call,
                skip,
                times,
                kind,
                hits: 0,
            });
        });
        FaultGuard {
            thread_bound: PhantomData,
        }
    }

    /// Whether a fault of `call` is still to come on this thread: then what would spare the call must not.
    pub(crate) fn is_planned(call: Call) -> bool {
        PLAN.with_borrow(|plan| {
            plan.iter()
                .any(|fault| fault.call == call && fault.times > 0)
        })
    }

    pub(crate) fn check(call: Call) -> Result<()> {
        let errno = next(call, |kind| match kind {
            Kind::Errno(errno) => Some(errno),
            Kind::Short(_) => None,
        });
        errno.map_or(Ok(()), |errno| {
            Err(Error {
                call,
                source: io::Error::from_raw_os_error(errno),
            })
        })
    }

    /// How much of `len` bytes the call is to be asked for.
    pub(crate) fn shortened(call: Call, len: usize) -> usize {
        let bytes = next(call, |kind| match kind {
            Kind::Short(bytes) if bytes < len => Some(bytes),
            _ => None,
        });
        bytes.unwrap_or(len)
    }

    /// Does `work` as if nothing were planned on this thread.
    pub(crate) fn spared<T>(work: impl FnOnce() -> T) -> T {
        let planned = PLAN.take();
        let done = work();
        PLAN.set(planned);
        done
    }

    /// The fault that this call meets, of those of which `of` makes something.
    fn next<T>(call: Call, of: impl Fn(Kind) -> Option<T>) -> Option<T> {
        PLAN.with_borrow_mut(|plan| {
            for fault in plan.iter_mut().filter(|fault| fault.call == call) {
                let Some(found) = of(fault.kind) else {
                    continue;
                };
                if fault.skip > 0 {
                    fault.skip -= 1;
                } else if fault.times > 0 {
                    fault.times -= 1;
                    fault.hits += 1;
                    return Some(found);
                }
            }
            None
        })
    }
}

#[cfg(any(test, feature = "test-support"))]
pub use plan::{FaultGuard, inject, inject_short};
pub(crate) use plan::{check, is_planned, shortened, spared};
