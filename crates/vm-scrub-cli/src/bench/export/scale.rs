//! From values to places in a plot, and where to put the numbers at the axes.

use crate::bench::units::plain;

/// A place in a plot: tenths are fine enough, and keep pages short.
pub(super) fn place(at: f64) -> String {
    format!("{at:.1}")
}

/// An axis that shows values between two bounds on a stretch of a plot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Scale {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    logarithmic: bool,
}

impl Scale {
    /// From 0 to `high`, or a little more, so that it ends at a round number.
    pub(super) fn linear(high: f64, from: f64, to: f64) -> Self {
        let step = step(high);
        let high = if high > 0.0 {
            (high / step).ceil() * step
        } else {
            1.0
        };
        Self {
            low: 0.0,
            high,
            from,
            to,
            logarithmic: false,
        }
    }

    /// From `low` to `high`, which are greater than 0: equal ratios are equally far apart.
    pub(super) fn logarithmic(low: f64, high: f64, from: f64, to: f64) -> Self {
        let low = if low > 0.0 { low } else { 1.0 };
        Self {
            low,
            // Not empty, even if there is one value only.
            high: high.max(low * 1.001),
            from,
            to,
            logarithmic: true,
        }
    }

    /// Where `value` is, or the end that is nearest.
    pub(super) fn at(&self, value: f64) -> f64 {
        let share = if self.logarithmic {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            value / self.high
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// Round values along the axis with their text, in `unit`s.
    pub(super) fn ticks(&self, unit: f64) -> Vec<(f64, String)> {
        let values: Vec<f64> = if self.logarithmic {
            let (low, high) = (
                self.low.log10().ceil() as i32,
                self.high.log10().floor() as i32,
            );
            (low..=high).map(|power| 10_f64.powi(power)).collect()
        } else {
            let step = step(self.high);
            let count = (self.high / step).round() as u32;
            (0..=count).map(|each| f64::from(each) * step).collect()
        };
        values
            .into_iter()
            .map(|value| (value, plain(value / unit)))
            .collect()
    }
}

/// A round distance, of which three to six fit up to `high`.
fn step(high: f64) -> f64 {
    if high <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf((high / 4.0).log10().floor());
    let factor = match high / 4.0 / power {
        small if small < 1.5 => 1.0,
        small if small < 3.5 => 2.0,
        medium if medium < 7.5 => 5.0,
        _ => 10.0,
    };
    factor * power
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn round_numbers_at_the_axis() {
        let texts = |high: f64| -> Vec<String> {
            let ticks = Scale::linear(high, 0.0, 100.0).ticks(1.0);
            ticks.into_iter().map(|(_, text)| text).collect()
        };
        assert_eq!(texts(100.0), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(texts(0.9), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        assert_eq!(
            texts(0.0).last().map(String::as_str),
            Some("1"),
            "not empty"
        );
        let powers = Scale::logarithmic(50.0, 2e6, 0.0, 1.0).ticks(1000.0);
        let texts: Vec<_> = powers.into_iter().map(|(_, text)| text).collect();
        assert_eq!(texts, ["0.1", "1", "10", "100", "1000"]);
    }

    proptest! {
        #[test]
        fn larger_values_are_further_and_none_leaves_the_plot(low in 1e-3..1e9_f64, more in 1.0..1e6_f64, value in 0.0..1e12_f64) {
            for scale in [Scale::linear(low * more, 10.0, 500.0), Scale::logarithmic(low, low * more, 10.0, 500.0)] {
                let at = scale.at(value);
                prop_assert!((10.0..=500.0).contains(&at));
                prop_assert!(scale.at(value * 2.0) >= at);
                let ticks = scale.ticks(1.0);
                prop_assert!(ticks.len() <= 12);
                prop_assert!(ticks.windows(2).all(|pair| pair[0].0 < pair[1].0));
            }
        }
    }
}
