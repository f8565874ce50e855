//! What the kernel is told about threads.

use super::numa::{self, Numbers};
use super::{Call, Error, Result, fault};

/// The lowest priority a thread can have: `nice` 19.
const LOWEST: libc::c_int = 19;

/// Gives the calling thread the lowest priority.
pub(crate) fn lowest_priority() -> Result<()> {
    fault::check(Call::SetPriority)?;
    // SAFETY: two calls that touch no memory. On Linux priorities belong to threads, and 0 is the calling one.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS as _, 0, LOWEST) } != 0 {
        return Err(Error::last(Call::SetPriority));
    }
    Ok(())
}

/// The number by which the kernel knows the calling thread.
pub(crate) fn id() -> libc::pid_t {
    // SAFETY: the call touches no memory and cannot fail. A thread's number fits its type.
    unsafe { libc::syscall(libc::SYS_gettid) as libc::pid_t }
}

/// Lets `thread`, one of this process, run on `cpus` and nowhere else.
pub(crate) fn pin(thread: libc::pid_t, cpus: &Numbers) -> Result<()> {
    fault::check(Call::SchedSetaffinity)?;
    let mask = numa::mask(cpus);
    // SAFETY: the mask is live, and the kernel reads as many bytes of it as it is told, be it shorter than a `cpu_set_t` or
    // longer.
    let status =
        unsafe { libc::sched_setaffinity(thread, size_of_val(&*mask), mask.as_ptr().cast()) };
    if status != 0 {
        return Err(Error::last(Call::SchedSetaffinity));
    }
    Ok(())
}

/// The processors on which the calling thread may run, by its own account.
#[cfg(all(test, feature = "rayon"))]
pub(crate) fn cpus_of_this_thread() -> Numbers {
    numa::allowed((0..1024).collect(), "Cpus_allowed_list").unwrap()
}
