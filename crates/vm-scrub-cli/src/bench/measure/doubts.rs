//! What a sample and the load meanwhile give reason to doubt.

use super::{Load, Sample};
use crate::bench::stats::Summary;
use crate::bench::warning::Warning;

/// Quartiles that are further apart than this fraction of the median are noise.
const SPREAD: f64 = 0.10;

/// More outliers than this fraction of the runs are worth a warning. A single one never is: it is why medians are used.
const OUTLIERS: f64 = 0.1;

/// Runs below this many nanoseconds are short beside waking a thread up, which takes about 10 microseconds.
const SHORT: f64 = 50_000.0;

/// Processors used by others from which on they matter.
const BUSY: f64 = 0.2;

/// Everything that speaks against `sample`, of which `wanted` runs were wanted.
pub(crate) fn warnings(sample: &Sample, wanted: usize, load: Load) -> Vec<Warning> {
    let mut warnings = Vec::new();
    let Some(summary) = Summary::of(&sample.times) else {
        return warnings;
    };
    let runs = sample.times.len();
    let slower = sample.first_runs_slower();
    if sample.is_cold() {
        warnings.push(Warning::ColdMemory { slower });
    }
    if summary.spread() > SPREAD {
        let spread = summary.spread();
        warnings.push(Warning::Noise { spread });
    }
    let outliers = summary.outliers(&sample.times);
    if outliers > 1 && outliers as f64 > OUTLIERS * runs as f64 {
        warnings.push(Warning::Outliers { outliers, runs });
    }
    let nanos = summary.median * sample.iterations as f64;
    if nanos < SHORT {
        warnings.push(Warning::TooShort { nanos });
    }
    if runs < wanted {
        warnings.push(Warning::FewerRuns { runs, wanted });
    }
    if load.others > BUSY {
        let processors = load.others;
        warnings.push(Warning::OtherLoad { processors });
    }
    if load.stolen > BUSY {
        let processors = load.stolen;
        warnings.push(Warning::Stolen { processors });
    }
    warnings
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: Load = Load {
        others: 0.0,
        stolen: 0.0,
    };

    fn kinds(times: &[f64], wanted: usize, load: Load) -> Vec<&'static str> {
        let sample = Sample {
            times: times.to_vec(),
            ..Sample::default()
        };
        warnings(&sample, wanted, load)
            .iter()
            .map(Warning::kind)
            .collect()
    }

    #[test]
    fn good_runs_raise_no_doubts() {
        let times: Vec<f64> = (0..10).map(|run| 1e7 + 1e4 * f64::from(run % 4)).collect();
        assert!(kinds(&times, 10, QUIET).is_empty());
        assert!(kinds(&[], 10, QUIET).is_empty());
    }

    #[test]
    fn each_doubt_is_raised() {
        assert_eq!(kinds(&[1e7, 2e7, 1e7, 2e7], 4, QUIET), ["noise"]);
        assert_eq!(kinds(&[1e4; 5], 5, QUIET), ["too-short"]);
        assert_eq!(kinds(&[1e7; 5], 6, QUIET), ["fewer-runs"]);
        let cold = [5e7, 5e7, 1e7, 1e7, 1e7, 1e7, 1e7, 1e7, 1e7, 1e7];
        assert_eq!(kinds(&cold, 10, QUIET), ["cold-memory"]);
        let odd = [
            1.00e7, 1.01e7, 1.02e7, 1.0e7, 1.01e7, 9e7, 1.02e7, 1.01e7, 8e7, 1.01e7,
        ];
        assert_eq!(kinds(&odd, 10, QUIET), ["outliers"]);
        let load = Load {
            others: 0.5,
            stolen: 0.3,
        };
        assert_eq!(kinds(&[1e7; 5], 5, load), ["other-load", "stolen"]);
    }
}
