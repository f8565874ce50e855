//! What the kernel is told about threads.

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
