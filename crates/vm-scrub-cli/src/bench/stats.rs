//! What a handful of times says: the middle, the spread, and which of them do not belong.
//!
//! Medians and quartiles rather than means and standard deviations, because run times have a hard floor and a long tail:
//! one interruption moves a mean and leaves a median alone.

/// A time whose modified z-score is beyond this does not belong (Iglewicz and Hoaglin, 1993, recommend 3.5).
const OUTLIER: f64 = 3.5;

/// Makes the median of absolute deviations comparable to a standard deviation: the 0.75 quantile of the normal distribution.
const NORMAL_QUARTILE: f64 = 0.6745;

/// The summary of a sample.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    /// Lower quartile: a quarter of the values are below.
    pub(crate) q1: f64,
    /// Upper quartile.
    pub(crate) q3: f64,
    /// Median of the absolute deviations from the median.
    pub(crate) mad: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Summary {
    /// Summarises `sample`; `None` if it is empty. The values must be finite.
    pub(crate) fn of(sample: &[f64]) -> Option<Self> {
        let mut sorted = sample.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let median = quantile(&sorted, 0.5);
        let mut deviations: Vec<f64> = sorted.iter().map(|value| (value - median).abs()).collect();
        deviations.sort_by(f64::total_cmp);
        Some(Self {
            median,
            q1: quantile(&sorted, 0.25),
            q3: quantile(&sorted, 0.75),
            mad: quantile(&deviations, 0.5),
            min,
            max,
        })
    }

    /// The distance between the quartiles as a fraction of the median.
    pub(crate) fn spread(&self) -> f64 {
        if self.median > 0.0 {
            (self.q3 - self.q1) / self.median
        } else {
            0.0
        }
    }

    /// How many values of `sample` lie too far from the median.
    pub(crate) fn outliers(&self, sample: &[f64]) -> usize {
        let far = |value: &&f64| {
            let distance = (**value - self.median).abs();
            // With a MAD of 0 more than half of the values are equal; nothing can be said about the others.
            self.mad > 0.0 && NORMAL_QUARTILE * distance / self.mad > OUTLIER
        };
        sample.iter().filter(far).count()
    }
}

/// How one contender's times compare with another's, of which each run was next to one of these.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Ratio {
    /// The quotient of the medians.
    pub(crate) ratio: f64,
    /// Lower quartile of the quotients within each round of runs.
    pub(crate) q1: f64,
    /// Upper quartile of the same.
    pub(crate) q3: f64,
}

impl Ratio {
    /// `above` divided by `below`; `None` if there is no round with both, or nothing to divide by.
    pub(crate) fn of(above: &[f64], below: &[f64]) -> Option<Self> {
        let rounds = above.iter().zip(below);
        let quotients: Vec<f64> = rounds
            .filter(|(_, below)| **below > 0.0)
            .map(|(above, below)| above / below)
            .collect();
        let spread = Summary::of(&quotients)?;
        let divisor = median(below).filter(|median| *median > 0.0)?;
        Some(Self {
            ratio: median(above)? / divisor,
            q1: spread.q1,
            q3: spread.q3,
        })
    }
}

/// The median; `None` of nothing.
pub(crate) fn median(sample: &[f64]) -> Option<f64> {
    Summary::of(sample).map(|summary| summary.median)
}

/// Linear interpolation between order statistics (type 7 of Hyndman and Fan, 1996: what R and NumPy do by default).
fn quantile(sorted: &[f64], at: f64) -> f64 {
    let position = at * (sorted.len() - 1) as f64;
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * (position - position.floor())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_values() {
        // R: quantile(x), mad(x, constant = 1).
        let sample = [7.0, 15.0, 36.0, 39.0, 40.0, 41.0];
        let summary = Summary::of(&sample).unwrap();
        assert_eq!(
            (summary.q1, summary.median, summary.q3),
            (20.25, 37.5, 39.75)
        );
        assert_eq!((summary.min, summary.max, summary.mad), (7.0, 41.0, 3.0));
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0]), Some(2.5));
        assert_eq!(Summary::of(&[]), None);
        let alone = Summary::of(&[5.0]).unwrap();
        assert_eq!(
            (alone.q1, alone.q3, alone.mad, alone.spread()),
            (5.0, 5.0, 0.0, 0.0)
        );
    }

    #[test]
    fn an_interrupted_run_is_an_outlier_and_ordinary_ones_are_not() {
        let mut sample: Vec<f64> = (0..20).map(|run| 100.0 + f64::from(run % 5)).collect();
        assert_eq!(Summary::of(&sample).unwrap().outliers(&sample), 0);
        sample[7] = 180.0;
        sample[0] = 20.0;
        assert_eq!(Summary::of(&sample).unwrap().outliers(&sample), 2);
        assert_eq!(Summary::of(&[1.0; 9]).unwrap().outliers(&[1.0; 9]), 0);
    }

    #[test]
    fn a_ratio_is_that_of_the_medians_and_spreads_as_the_rounds_do() {
        // 40 / 10; and 4, 2 and 2 within the rounds.
        let ratio = Ratio::of(&[40.0, 40.0, 20.0], &[10.0, 20.0, 10.0]).unwrap();
        assert_eq!((ratio.ratio, ratio.q1, ratio.q3), (4.0, 2.0, 3.0));
        assert_eq!(Ratio::of(&[], &[1.0]), None);
        assert_eq!(Ratio::of(&[1.0], &[]), None);
        assert_eq!(Ratio::of(&[1.0], &[0.0]), None);
        let longer = Ratio::of(&[2.0, 2.0, 9.0], &[1.0, 1.0]).unwrap();
        assert_eq!(
            (longer.q1, longer.q3),
            (2.0, 2.0),
            "a run without its round"
        );
    }

    proptest! {
        #[test]
        fn order_statistics_are_in_order_and_know_no_order(mut sample in prop::collection::vec(0.0..1e12_f64, 1..60)) {
            let summary = Summary::of(&sample).unwrap();
            prop_assert!(summary.min <= summary.q1 && summary.q1 <= summary.median);
            prop_assert!(summary.median <= summary.q3 && summary.q3 <= summary.max);
            prop_assert!(summary.mad >= 0.0 && summary.mad <= summary.max - summary.min);
            let below = sample.iter().filter(|value| **value < summary.median).count();
            let above = sample.iter().filter(|value| **value > summary.median).count();
            prop_assert!(below <= sample.len() / 2 && above <= sample.len() / 2);
            sample.reverse();
            prop_assert_eq!(Summary::of(&sample).unwrap(), summary);
        }

        #[test]
        fn scaling_the_sample_scales_the_summary(sample in prop::collection::vec(1.0..1e6_f64, 2..40)) {
            let summary = Summary::of(&sample).unwrap();
            let doubled: Vec<f64> = sample.iter().map(|value| value * 2.0).collect();
            let twice = Summary::of(&doubled).unwrap();
            prop_assert!((twice.median - 2.0 * summary.median).abs() <= 1e-6);
            prop_assert!((twice.mad - 2.0 * summary.mad).abs() <= 1e-6);
            prop_assert!((twice.spread() - summary.spread()).abs() <= 1e-9);
            prop_assert_eq!(twice.outliers(&doubled), summary.outliers(&sample));
        }
    }
}
