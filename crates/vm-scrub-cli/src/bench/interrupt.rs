//! Ctrl-C: what has been measured so far is kept, and reserved huge pages are given back.

use crate::signals::{REQUESTS, is_ignored};
use anyhow::Context;
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether somebody wants this to end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Listens for what ends a process and is meant as a request: Ctrl-C, a terminal that is closed. The second one ends the
    /// process at once. One that is ignored (as with `nohup`) stays ignored.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let requested = Arc::new(AtomicBool::new(false));
        for request in REQUESTS {
            if is_ignored(request)? {
                continue;
            }
            let signal = request as i32;
            // In this order: the first signal finds the flag still unset.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&requested))
                .and_then(|_| flag::register(signal, Arc::clone(&requested)))
                .context("no handler for signals")?;
        }
        Ok(Self(requested))
    }

    /// Nobody can interrupt this.
    #[cfg(test)]
    pub(crate) fn never() -> Self {
        Self::default()
    }

    pub(crate) fn is_requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
