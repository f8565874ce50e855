//! What is measured, and what is measured together.

use super::row::Labels;
use super::warning::Warning;
use std::any::Any;
use std::time::Duration;

/// What is repeatable is repeated for at least this long in one run: 40,000 times the clock's resolution of about 50 ns.
const SHORTEST_RUN: Duration = Duration::from_millis(2);

/// Something whose time is taken.
///
/// A run is `prepare`, then `run` under the clock, then `check`. The check looks at what the run has left behind, so that a
/// contender that did not do its work has no time at all rather than a good one.
pub(crate) trait Subject {
    /// Makes everything as it is before each run. Not timed.
    fn prepare(&mut self) -> anyhow::Result<()>;

    /// What is timed. `iterations` is 1 unless [`Subject::is_repeatable`].
    fn run(&mut self, iterations: u64) -> anyhow::Result<()>;

    /// Makes sure that the run did what it should have. Not timed.
    fn check(&mut self) -> anyhow::Result<()>;

    /// Whether a run can be repeated without `prepare`, so that what is short can be timed many times in a row.
    fn is_repeatable(&self) -> bool {
        false
    }

    /// How long a run of something repeatable takes at least.
    fn shortest_run(&self) -> Duration {
        SHORTEST_RUN
    }

    /// Whether a run takes seconds because that is the question. Then a few runs are enough, and none is for warming up.
    fn is_long(&self) -> bool {
        false
    }

    /// Whether each timed run comes right after one that is not counted: for what is over in microseconds, and would else be measured
    /// with caches that the others have emptied.
    fn is_rehearsed(&self) -> bool {
        false
    }

    /// Adds to the labels what was observed besides the time, when all runs are over.
    fn observe(&self, _labels: &mut Labels) {}

    /// What else stands against the figures, when all runs are over.
    fn doubts(&mut self) -> Vec<Warning> {
        Vec::new()
    }
}

/// A subject among others.
pub(crate) struct Contender {
    pub(crate) labels: Labels,
    /// The name of the contender in the same group that it is compared with.
    pub(crate) baseline: Option<String>,
    pub(crate) subject: Box<dyn Subject>,
}

impl Contender {
    pub(crate) fn new(labels: Labels, subject: impl Subject + 'static) -> Self {
        Self {
            labels,
            baseline: None,
            subject: Box::new(subject),
        }
    }

    pub(crate) fn against(mut self, baseline: impl Into<String>) -> Self {
        self.baseline = Some(baseline.into());
        self
    }
}

/// Contenders that take turns, so that whatever else happens on the host happens to all of them.
pub(crate) struct Group {
    // Dropped in this order: contenders first, then what they rely on.
    pub(crate) contenders: Vec<Contender>,
    /// What has to live as long: reserved huge pages.
    _keep: Box<dyn Any>,
}

impl Group {
    pub(crate) fn new(contenders: Vec<Contender>, keep: impl Any) -> Self {
        Self {
            contenders,
            _keep: Box::new(keep),
        }
    }
}

/// What became of the attempt to set a group up.
pub(crate) enum Built {
    Ready(Group),
    /// This host cannot have it, which is no failure: the reason, and what to do about it.
    Skipped(String),
}

/// A group that is set up when its turn comes, because groups together have more memory than most hosts.
pub(crate) struct Plan {
    /// What the contenders have in common: `1 GiB, thp, 2 threads`.
    pub(crate) title: String,
    pub(crate) build: Box<dyn FnOnce() -> anyhow::Result<Built>>,
}

impl Plan {
    pub(crate) fn new(
        title: impl Into<String>,
        build: impl FnOnce() -> anyhow::Result<Built> + 'static,
    ) -> Self {
        Self {
            title: title.into(),
            build: Box::new(build),
        }
    }
}
