//! The times of one contender.

use crate::bench::args::Benchmark;
use crate::bench::row::{Comparison, Labels, Row, gib_per_s};
use crate::bench::stats::{Ratio, Summary};

/// The first runs count as slower than the rest from this fraction on.
const COLD: f64 = 0.25;

/// Times in nanoseconds for one iteration.
#[derive(Debug, Clone)]
pub(crate) struct Sample {
    pub(crate) warmup: Vec<f64>,
    pub(crate) times: Vec<f64>,
    pub(crate) iterations: u64,
}

impl Default for Sample {
    fn default() -> Self {
        Self {
            warmup: Vec::new(),
            times: Vec::new(),
            iterations: 1,
        }
    }
}

impl Sample {
    /// Whether the last warm-up run did not improve on the best before by more than this fraction.
    pub(crate) fn has_settled(&self, fraction: f64) -> bool {
        self.warmup.split_last().is_some_and(|(last, before)| {
            let best = before.iter().copied().fold(f64::INFINITY, f64::min);
            best.is_finite() && *last >= best * (1.0 - fraction)
        })
    }

    /// How long all timed runs together took.
    pub(crate) fn timed_nanos(&self) -> f64 {
        self.times.iter().sum::<f64>() * self.iterations as f64
    }

    /// By what fraction the fastest of the first quarter of the timed runs was slower than three quarters of the others; 0 if it
    /// was not, or if there are fewer than four. A busy host makes runs slow here and there, cold memory the first ones.
    pub(crate) fn first_runs_slower(&self) -> f64 {
        let (first, rest) = self.times.split_at(self.times.len() / 4);
        match (Summary::of(first), Summary::of(rest)) {
            (Some(first), Some(rest)) if rest.q3 > 0.0 => (first.min / rest.q3 - 1.0).max(0.0),
            _ => 0.0,
        }
    }

    /// Whether the host was still supplying memory when the clock ran.
    pub(crate) fn is_cold(&self) -> bool {
        self.first_runs_slower() > COLD
    }

    /// How this compares with `baseline`, of which each run was next to one of these.
    pub(crate) fn compared_with(&self, name: &str, baseline: &Self) -> Option<Comparison> {
        let Ratio { ratio, q1, q3 } = Ratio::of(&baseline.times, &self.times)?;
        Some(Comparison {
            baseline: name.to_owned(),
            ratio,
            ratio_q1: q1,
            ratio_q3: q3,
        })
    }

    /// The line of results, without comparison and warnings; `None` if nothing was timed.
    pub(crate) fn row(&self, benchmark: Benchmark, group: &str, labels: &Labels) -> Option<Row> {
        let summary = Summary::of(&self.times)?;
        Some(Row {
            benchmark,
            group: group.to_owned(),
            labels: labels.clone(),
            median_ns: summary.median,
            q1_ns: summary.q1,
            q3_ns: summary.q3,
            mad_ns: summary.mad,
            min_ns: summary.min,
            max_ns: summary.max,
            runs: self.times.len(),
            iterations: self.iterations,
            warmup_runs: self.warmup.len(),
            warm: true,
            gib_per_s: gib_per_s(labels.worked_on(), summary.median),
            of_ceiling: None,
            of_asked: None,
            comparison: None,
            warnings: Vec::new(),
            times_ns: self.times.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(warmup: &[f64], times: &[f64]) -> Sample {
        Sample {
            warmup: warmup.to_vec(),
            times: times.to_vec(),
            iterations: 1,
        }
    }

    #[test]
    fn warm_up_ends_when_it_gets_no_faster() {
        assert!(!sample(&[], &[]).has_settled(0.05));
        assert!(!sample(&[100.0], &[]).has_settled(0.05));
        assert!(!sample(&[100.0, 60.0], &[]).has_settled(0.05));
        assert!(sample(&[100.0, 60.0, 58.0], &[]).has_settled(0.05));
        assert!(
            sample(&[100.0, 130.0], &[]).has_settled(0.05),
            "noise is not warming"
        );
    }

    #[test]
    fn slow_first_runs_are_cold_memory() {
        assert!(sample(&[], &[90.0, 80.0, 50.0, 50.0, 51.0, 50.0, 50.0, 50.0]).is_cold());
        assert!(!sample(&[], &[50.0, 52.0, 50.0, 50.0, 51.0, 50.0, 90.0, 90.0]).is_cold());
        assert!(!sample(&[], &[90.0, 50.0]).is_cold(), "too few to say");
    }

    #[test]
    fn a_ratio_above_one_is_faster_than_the_baseline() {
        let compared = sample(&[], &[10.0, 20.0, 10.0])
            .compared_with("slow", &sample(&[], &[40.0, 40.0, 20.0]))
            .unwrap();
        // 40 / 10; and of 4, 2 and 2 within the rounds.
        assert_eq!(
            (compared.ratio, compared.ratio_q1, compared.ratio_q3),
            (4.0, 2.0, 3.0)
        );
        assert!(
            sample(&[], &[])
                .compared_with("slow", &sample(&[], &[1.0]))
                .is_none()
        );
    }
}
