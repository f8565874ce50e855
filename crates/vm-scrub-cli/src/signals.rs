//! What is borrowed from the host is given back when the command is told to end.
//!
//! Huge pages are counted for the whole host, and nobody else knows that they were ours. So Ctrl-C must not end the process
//! before they are given back.

use nix::sys::signal::{SigSet, Signal, raise};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

/// What ends a process and is meant as a request. All others have a core dump for an answer, or none.
pub(crate) const REQUESTS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Requests to end that wait until somebody asks for them.
pub(crate) struct HeldBack {
    requests: SigSet,
}

impl HeldBack {
    /// Holds them back from now on, in this thread and those that it will start: call it before there are others.
    ///
    /// A request that is ignored (as with `nohup`) stays ignored.
    pub(crate) fn new() -> io::Result<Self> {
        let mut requests = SigSet::empty();
        for request in REQUESTS {
            if !is_ignored(request)? {
                requests.add(request);
            }
        }
        requests.thread_block()?;
        Ok(Self { requests })
    }

    /// Has `borrowed` dropped before the process ends by one of the requests.
    pub(crate) fn lend<T: Send + 'static>(self, borrowed: T) -> io::Result<Lent<T>> {
        let shared = Arc::new(Mutex::new(Some(borrowed)));
        let lent = Lent(Arc::clone(&shared));
        thread::Builder::new()
            .name("requests".into())
            .spawn(move || {
                let Ok(request) = self.requests.wait() else {
                    return;
                };
                // Held to the end, so that the main thread does not give back what is being given back.
                let mut borrowed = lock(&shared);
                drop(borrowed.take());
                // And now what would have happened at once: whoever waits for this process sees the signal.
                let _ = self.requests.thread_unblock();
                let _ = raise(request);
            })?;
        Ok(lent)
    }
}

/// Something borrowed. It is given back when this is dropped, or before a signal ends the process.
pub(crate) struct Lent<T>(Arc<Mutex<Option<T>>>);

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        drop(lock(&self.0).take());
    }
}

/// What is in there is taken out in one step, so a panic cannot have left it half-way.
fn lock<T>(shared: &Mutex<Option<T>>) -> MutexGuard<'_, Option<T>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether somebody wants this signal to be ignored.
pub(crate) fn is_ignored(signal: Signal) -> io::Result<bool> {
    let mut action = std::mem::MaybeUninit::<nix::libc::sigaction>::uninit();
    // SAFETY: without a new action the old one is written to where the pointer points, and nothing is changed.
    let status =
        unsafe { nix::libc::sigaction(signal as i32, std::ptr::null(), action.as_mut_ptr()) };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it was written.
    let action = unsafe { action.assume_init() };
    Ok(action.sa_sigaction == nix::libc::SIG_IGN)
}
