//! One line of results: what was measured, how long it took, and what to make of it.

use super::args::Benchmark;
use super::warning::Warning;
use serde::{Serialize, Serializer};
use vm_scrub::{PageSize, Revocation, Verify};

/// What a contender is. Fields that make no sense for it are left out of the results.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Labels {
    pub(crate) name: String,
    /// The loop, where loops are compared.
    #[serde(rename = "loop", skip_serializing_if = "Option::is_none")]
    pub(crate) by_loop: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) op: Option<Op>,
    /// Whether vm-scrub would choose this loop here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) calibrated: Option<bool>,
    /// How much is read back.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) verify: Option<Verify>,
    /// How vm-scrub took the memory away from the guest before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) revocation: Option<Revocation>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) page_size: Option<PageSize>,
    /// How many threads do the work.
    pub(crate) threads: usize,
    /// How much memory one run is about, all threads together, in bytes.
    pub(crate) bytes: u64,
    /// How much of it the guest had touched, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) touched_bytes: Option<u64>,
    /// The same in percent, as it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) touched_percent: Option<f64>,
    /// Where the touched pages lie.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) pattern: Option<Pattern>,
    /// How often the neighbour reads memory in one run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) accesses: Option<u64>,
    /// How fast scrubbing in the background was to be, in GiB/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) asked_gib_per_s: Option<f64>,
    /// How fast the other core zeroed meanwhile, in GiB/s.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) scrub_gib_per_s: Option<f64>,
}

/// What a loop, or two, are used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Op {
    /// All bytes are set to zero.
    Zero,
    /// All bytes are read, and are zero.
    Verify,
    /// Pieces are set to zero and read back while a cache still holds them.
    Fused,
    /// All bytes are set to zero, and then all are read back.
    Separate,
}

impl Op {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Op::Zero => "zero",
            Op::Verify => "verify",
            Op::Fused => "fused",
            Op::Separate => "separate",
        }
    }
}

/// Where touched pages lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pattern {
    /// Fixed pseudo-random pages.
    Scattered,
    /// One range from the start.
    Contiguous,
}

impl Pattern {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Pattern::Scattered => "scattered",
            Pattern::Contiguous => "contiguous",
        }
    }
}

/// How a contender compares with its baseline.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Comparison {
    pub(crate) baseline: String,
    /// How many times as fast as the baseline: its median time divided by this one's.
    pub(crate) ratio: f64,
    /// Lower quartile of the ratios within each round of runs.
    pub(crate) ratio_q1: f64,
    /// Upper quartile of the same.
    pub(crate) ratio_q3: f64,
}

/// One line of results. Times are in nanoseconds, for one run or one iteration of it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    pub(crate) benchmark: Benchmark,
    /// What was run in turn with it and may be compared.
    pub(crate) group: String,
    #[serde(flatten)]
    pub(crate) labels: Labels,
    #[serde(serialize_with = "nanos")]
    pub(crate) median_ns: f64,
    #[serde(serialize_with = "nanos")]
    pub(crate) q1_ns: f64,
    #[serde(serialize_with = "nanos")]
    pub(crate) q3_ns: f64,
    #[serde(serialize_with = "nanos")]
    pub(crate) mad_ns: f64,
    #[serde(serialize_with = "nanos")]
    pub(crate) min_ns: f64,
    #[serde(serialize_with = "nanos")]
    pub(crate) max_ns: f64,
    pub(crate) runs: usize,
    /// How often each run repeated the work; times are divided by it.
    pub(crate) iterations: u64,
    pub(crate) warmup_runs: usize,
    /// Whether the memory was warm: further warm-up had stopped making it faster, and the first runs were no slower.
    pub(crate) warm: bool,
    /// What was [worked on](Labels::worked_on) by the median time.
    pub(crate) gib_per_s: f64,
    /// The rate as a fraction of the best that any contender of this group reached in the same operation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) of_ceiling: Option<f64>,
    /// The rate as a fraction of the one that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) of_asked: Option<f64>,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub(crate) comparison: Option<Comparison>,
    pub(crate) warnings: Vec<Warning>,
    /// Every time that was taken, in order.
    #[serde(serialize_with = "all_nanos")]
    pub(crate) times_ns: Vec<f64>,
}

impl Labels {
    /// The bytes for which there is something to do: all, but where a guest has touched only a part.
    pub(crate) fn worked_on(&self) -> u64 {
        self.touched_bytes.unwrap_or(self.bytes)
    }

    /// How the memory was taken away, if it was not in the usual way.
    pub(crate) fn unusual_revocation(&self) -> Option<&'static str> {
        // Where vm-scrub has a choice, it takes the way that proves more.
        let has_choice = self.page_size != Some(PageSize::Huge2M);
        (has_choice && self.revocation == Some(Revocation::Mremap)).then_some("revoked by mremap")
    }
}

impl Row {
    /// The median time of one of the neighbour's accesses, in nanoseconds.
    pub(crate) fn ns_per_access(&self) -> Option<f64> {
        self.labels
            .accesses
            .map(|accesses| self.median_ns / accesses.max(1) as f64)
    }
}

/// Bytes in a number of nanoseconds, as GiB/s.
pub(crate) fn gib_per_s(bytes: u64, nanos: f64) -> f64 {
    if nanos > 0.0 {
        bytes as f64 / (1_u64 << 30) as f64 / (nanos / 1e9)
    } else {
        0.0
    }
}

/// Whole nanoseconds as an integer; below a microsecond, where repetition makes them mean something, with hundredths.
#[derive(Serialize)]
#[serde(untagged)]
enum Nanos {
    Whole(u64),
    Fraction(f64),
}

impl From<f64> for Nanos {
    fn from(nanos: f64) -> Self {
        if nanos >= 1000.0 {
            Nanos::Whole(nanos.round() as u64)
        } else {
            Nanos::Fraction((nanos * 100.0).round() / 100.0)
        }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn nanos<S: Serializer>(nanos: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    Nanos::from(*nanos).serialize(serializer)
}

fn all_nanos<S: Serializer>(times: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(times.iter().copied().map(Nanos::from))
}
