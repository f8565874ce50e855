//! Standard output and standard error, around a bar that shows how far it has come.

use anyhow::Context;
use indicatif::ProgressBar;
use std::cell::RefCell;
use std::fmt::{self, Display};
use std::io::{self, Write};

/// Where results go, and everything about them.
pub(crate) struct Output {
    pub(crate) bar: ProgressBar,
    /// Why nothing more is written to standard output, once it has failed.
    failure: RefCell<Option<io::Error>>,
}

/// Standard output was a pipe, and its reader has gone.
#[derive(Debug)]
pub(crate) struct NobodyReads;

impl Display for NobodyReads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nobody reads the results")
    }
}

impl std::error::Error for NobodyReads {}

impl Output {
    pub(crate) fn around(bar: ProgressBar) -> Self {
        Self {
            bar,
            failure: RefCell::new(None),
        }
    }

    /// Writes a line to standard output, if that still works.
    pub(crate) fn print(&self, line: impl Display) {
        let mut failure = self.failure.borrow_mut();
        if failure.is_none() {
            // Around the bar, so that neither garbles the other.
            let written = self.bar.suspend(|| {
                let mut out = io::stdout().lock();
                writeln!(out, "{line}").and_then(|()| out.flush())
            });
            *failure = written.err();
        }
    }

    /// Writes a line to standard error. Nothing depends on it, so it does not matter if nobody reads it.
    pub(crate) fn remark(&self, line: impl Display) {
        self.bar.suspend(|| {
            let _ = writeln!(io::stderr(), "{line}");
        });
    }

    /// Whether standard output has failed.
    pub(crate) fn has_failed(&self) -> bool {
        self.failure.borrow().is_some()
    }

    /// Fails with [`NobodyReads`] if the reader of the results has gone, and with what happened if they cannot be written.
    pub(crate) fn ensure_somebody_reads(&self) -> anyhow::Result<()> {
        match self.failure.borrow_mut().take() {
            None => Ok(()),
            Some(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(NobodyReads.into()),
            Some(error) => Err(error).context("the results cannot be written"),
        }
    }
}
