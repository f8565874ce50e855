//! What stands against believing a figure, and what to do about it.

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};
use std::fmt;

/// A doubt about a figure.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Warning {
    /// The times differ much: the distance between the quartiles as a fraction of the median.
    Noise { spread: f64 },
    /// Some runs took a time that does not fit the others.
    Outliers { outliers: usize, runs: usize },
    /// Only this part of the memory consists of huge pages, although it was meant to.
    SmallPages { huge: f64 },
    /// A run is so short that the clock and the start of threads are a good part of it.
    TooShort { nanos: f64 },
    /// The first runs were slower than the rest, or warm-up had not ended: how much slower.
    ColdMemory { slower: f64 },
    /// Other programs used this many processors meanwhile.
    OtherLoad { processors: f64 },
    /// The hypervisor under this machine gave this many of its processors to others meanwhile.
    Stolen { processors: f64 },
    /// The time limit, or somebody, ended the runs.
    FewerRuns { runs: usize, wanted: usize },
}

impl Warning {
    /// A name for machines.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Warning::Noise { .. } => "noise",
            Warning::Outliers { .. } => "outliers",
            Warning::SmallPages { .. } => "small-pages",
            Warning::TooShort { .. } => "too-short",
            Warning::ColdMemory { .. } => "cold-memory",
            Warning::OtherLoad { .. } => "other-load",
            Warning::Stolen { .. } => "stolen",
            Warning::FewerRuns { .. } => "fewer-runs",
        }
    }

    /// How bad it is, among warnings of one kind.
    pub(crate) fn severity(&self) -> f64 {
        match self {
            Warning::Noise { spread } => *spread,
            Warning::Outliers { outliers, runs } => *outliers as f64 / (*runs).max(1) as f64,
            Warning::SmallPages { huge } => -huge,
            Warning::TooShort { nanos } => -nanos,
            Warning::ColdMemory { slower } => *slower,
            Warning::OtherLoad { processors } | Warning::Stolen { processors } => *processors,
            Warning::FewerRuns { runs, wanted } => *wanted as f64 - *runs as f64,
        }
    }

    /// What can be done about it.
    pub(crate) fn advice(&self) -> &'static str {
        match self {
            Warning::Noise { .. } => {
                "close other programs, or take more --runs; compare the quartiles, not only the medians"
            }
            Warning::Outliers { .. } => {
                "something interrupted these runs; take more --runs if the quartiles are far apart, too"
            }
            Warning::SmallPages { .. } => {
                "for a memfd write `advise` to /sys/kernel/mm/transparent_hugepage/shmem_enabled; otherwise memory is fragmented"
            }
            Warning::TooShort { .. } => {
                "use more --memory, or read this figure as an upper bound on the time"
            }
            Warning::ColdMemory { .. } => {
                "raise --warmup: the host may still be supplying memory to this machine"
            }
            Warning::OtherLoad { .. } => "wait until the machine is idle and run it again",
            Warning::Stolen { .. } => {
                "run it on a machine whose processors are its own, or at another time"
            }
            Warning::FewerRuns { .. } => "raise --max-time, or use less --memory",
        }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warning::Noise { spread } => {
                write!(
                    f,
                    "noise: the middle half of the times is {:.0} % apart",
                    spread * 100.0
                )
            }
            Warning::Outliers { outliers, runs } => {
                write!(
                    f,
                    "outliers: {outliers} of {runs} times do not fit the others"
                )
            }
            Warning::SmallPages { huge } => {
                write!(
                    f,
                    "small pages: {:.0} % of the memory is in huge pages",
                    huge * 100.0
                )
            }
            Warning::TooShort { nanos } => {
                write!(f, "too short to measure well: {:.1} µs", nanos / 1e3)
            }
            Warning::ColdMemory { slower } => {
                write!(
                    f,
                    "cold memory: the first runs were {:.0} % slower",
                    slower * 100.0
                )
            }
            Warning::OtherLoad { processors } => {
                write!(
                    f,
                    "other load: other programs used {processors:.1} processors meanwhile"
                )
            }
            Warning::Stolen { processors } => {
                write!(
                    f,
                    "stolen time: {processors:.1} processors of this virtual machine ran something else"
                )
            }
            Warning::FewerRuns { runs, wanted } => {
                write!(f, "fewer runs: {runs} of at least {wanted} before the end")
            }
        }
    }
}

impl Serialize for Warning {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut warning = serializer.serialize_struct("Warning", 3)?;
        warning.serialize_field("kind", self.kind())?;
        warning.serialize_field("message", &self.to_string())?;
        warning.serialize_field("advice", self.advice())?;
        warning.end()
    }
}
