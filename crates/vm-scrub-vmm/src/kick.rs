//! How a vCPU thread is made to leave `KVM_RUN`: by a signal.
//!
//! A signal whose handler does nothing is enough, because `KVM_RUN` returns `EINTR` when one is delivered. A signal
//! that arrives between the thread's look at its stop flag and its entry into `KVM_RUN` is lost. So nobody may send
//! one kick and wait: whoever stops a vCPU repeats the kick until the vCPU's thread has reported.

use std::sync::OnceLock;
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::libc::{self, c_int};
use nix::sys::pthread::pthread_kill;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::os::unix::thread::JoinHandleExt;

use crate::error::Error;

/// The signal that interrupts vCPU threads. Its handler belongs to this crate from the first run of a guest: a process
/// that uses [`crate::Machine`] must not use this signal for anything else.
pub const KICK_SIGNAL: Signal = Signal::SIGUSR1;

extern "C" fn do_nothing(_signal: c_int) {}

/// Installs the handler, once per process. Must come before the first kick, whose default action ends the process.
pub(crate) fn install_handler() -> Result<(), Error> {
    static INSTALLED: OnceLock<Result<(), Errno>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        // Without SA_RESTART, so that other system calls of a kicked thread return as well.
        let action = SigAction::new(
            SigHandler::Handler(do_nothing),
            SaFlags::empty(),
            SigSet::empty(),
        );
        // SAFETY: the handler is async-signal-safe, since it does nothing at all, and lives as long as the process.
        unsafe { sigaction(KICK_SIGNAL, &action) }.map(|_| ())
    });
    installed.map_err(|errno| thread_error("install the handler of the kick signal", errno))
}

/// Lets the calling thread be kicked, whatever signal mask it inherited.
pub(crate) fn unblock() -> Result<(), Error> {
    let mut mask = SigSet::empty();
    mask.add(KICK_SIGNAL);
    mask.thread_unblock()
        .map_err(|errno| thread_error("unblock the kick signal", errno))
}

/// Sends one kick. A thread that has ended already is not an error: its report is on the way.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) -> Result<(), Error> {
    // The handle is neither joined nor detached yet, so its thread id is still valid.
    match pthread_kill(thread.as_pthread_t() as libc::pthread_t, KICK_SIGNAL) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(thread_error("kick a vCPU", errno)),
    }
}

fn thread_error(doing: &'static str, errno: Errno) -> Error {
    Error::Thread {
        doing,
        source: errno.into(),
    }
}
