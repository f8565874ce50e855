//! A bar on standard error while a benchmark runs; nothing where that is no terminal.

use crate::output::Output;
use indicatif::{ProgressBar, ProgressStyle};
use std::fmt::Display;
use std::time::Duration;

/// How far it has come: one step for each group.
pub(crate) struct Progress(Output);

impl Progress {
    /// `groups` groups are to be measured.
    pub(crate) fn new(groups: usize) -> Self {
        let bar = ProgressBar::new(groups as u64);
        if let Ok(style) =
            ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {prefix} {msg}")
        {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(100));
        Self(Output::around(bar))
    }

    #[cfg(test)]
    pub(crate) fn hidden() -> Self {
        Self(Output::around(ProgressBar::hidden()))
    }

    pub(crate) fn group(&self, title: &str) {
        self.0.bar.set_prefix(title.to_owned());
        self.0.bar.set_message("preparing");
    }

    pub(crate) fn turn(&self, contender: &str, what: &str) {
        self.0.bar.set_message(format!("{contender}: {what}"));
    }

    pub(crate) fn group_done(&self) {
        self.0.bar.inc(1);
    }

    /// Prints to standard output, around the bar.
    pub(crate) fn say(&self, text: impl Display) {
        self.0.print(text);
    }

    /// Prints to standard error, around the bar.
    pub(crate) fn note(&self, text: impl Display) {
        self.0.remark(text);
    }

    /// Whether what is said cannot be read any more.
    pub(crate) fn is_in_vain(&self) -> bool {
        self.0.has_failed()
    }

    /// Fails if results could not be printed.
    pub(crate) fn ensure_somebody_reads(&self) -> anyhow::Result<()> {
        self.0.ensure_somebody_reads()
    }

    pub(crate) fn finish(&self) {
        self.0.bar.finish_and_clear();
    }
}
