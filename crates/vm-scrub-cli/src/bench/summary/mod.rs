//! The ratios that matter most, drawn from everything that was measured.
//!
//! Each is a ratio within one group, of contenders that took turns, because times on one host say little about another. There
//! are no targets here: what is good enough is the reader's to say.

mod questions;

use super::args::Benchmark;
use super::results::Results;
use super::row::Row;
use super::stats::Ratio;
use super::table::Table;
use super::units;
use serde::Serialize;

/// What a reader has to know about the figures.
pub(crate) const ABOUT: &str = "Each figure is a ratio of medians within the group that is named, whose contenders took turns; \
     the quartiles are those of the ratios within each round.";

/// A question and the ratio that answers it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Answer {
    pub(crate) benchmark: Benchmark,
    pub(crate) question: String,
    pub(crate) of: Quantity,
    pub(crate) ratio: f64,
    /// Lower quartile of the ratios within each round of runs.
    pub(crate) ratio_q1: f64,
    /// Upper quartile of the same.
    pub(crate) ratio_q3: f64,
    /// Where it comes from.
    pub(crate) group: String,
    /// The kinds of doubts about the times it was computed from.
    pub(crate) warnings: Vec<&'static str>,
}

/// What was divided by what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Quantity {
    /// More is better.
    Speed,
    /// Less is better.
    Time,
    /// 1 is best.
    Rate,
}

impl Quantity {
    /// All of them, the most frequent first.
    pub(crate) const ALL: [Self; 3] = [Quantity::Speed, Quantity::Time, Quantity::Rate];

    /// What it is called, and which figures are good.
    pub(crate) fn aim(self) -> &'static str {
        match self {
            Quantity::Speed => "speed: above 1 is better",
            Quantity::Time => "time: below 1 is better",
            Quantity::Rate => "rate: 1 is what was asked for",
        }
    }
}

/// Whether a ratio is a good one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    Good,
    /// As good as what it is compared with, to within [`EVEN`].
    Even,
    Bad,
}

/// How far from 1 a ratio may be to count as neither better nor worse: less than the spread of most groups.
const EVEN: f64 = 0.05;

/// What there is to say; nothing of benchmarks that were not run.
pub(crate) fn of(results: &Results) -> Vec<Answer> {
    results
        .benchmarks()
        .into_iter()
        .flat_map(|benchmark| questions::answers(benchmark, &results.groups(benchmark)))
        .collect()
}

/// One line for each answer.
pub(crate) fn table(answers: &[Answer]) -> Table {
    let headings = ["question", "measured", "quartiles", "from", "warnings"];
    let line = |answer: &Answer| {
        vec![
            answer.question.clone(),
            answer.figure(),
            format!(
                "{} to {}",
                units::ratio(answer.ratio_q1),
                units::ratio(answer.ratio_q3)
            ),
            format!("{}: {}", answer.benchmark, answer.group),
            answer.warnings.join(", "),
        ]
    };
    Table {
        headings: headings.map(Into::into).into(),
        rows: answers.iter().map(line).collect(),
    }
}

impl Answer {
    /// `6.12×`.
    pub(crate) fn figure(&self) -> String {
        units::ratio(self.ratio)
    }

    /// Whether it is a good one.
    pub(crate) fn standing(&self) -> Standing {
        let better = match self.of {
            Quantity::Speed => self.ratio - 1.0,
            Quantity::Time => 1.0 - self.ratio,
            Quantity::Rate if (self.ratio - 1.0).abs() <= EVEN => return Standing::Good,
            Quantity::Rate => return Standing::Bad,
        };
        if better.abs() <= EVEN {
            Standing::Even
        } else if better > 0.0 {
            Standing::Good
        } else {
            Standing::Bad
        }
    }

    /// How many times as fast as `other` `row` is.
    fn speed(question: impl Into<String>, row: &Row, other: &Row) -> Option<Self> {
        let ratio = Ratio::of(&other.times_ns, &row.times_ns)?;
        Some(Self::new(question, Quantity::Speed, ratio, &[row, other]))
    }

    /// How many times as long as `other` `row` takes.
    fn time(question: impl Into<String>, row: &Row, other: &Row) -> Option<Self> {
        let ratio = Ratio::of(&row.times_ns, &other.times_ns)?;
        Some(Self::new(question, Quantity::Time, ratio, &[row, other]))
    }

    /// What part of the rate that was asked for `row` has reached.
    fn rate(question: impl Into<String>, row: &Row) -> Option<Self> {
        let asked = row.labels.asked_gib_per_s.filter(|asked| *asked > 0.0)?;
        let wanted = row.labels.bytes as f64 / (asked * (1_u64 << 30) as f64) * 1e9;
        let ratio = Ratio::of(&vec![wanted; row.times_ns.len()], &row.times_ns)?;
        Some(Self::new(question, Quantity::Rate, ratio, &[row]))
    }

    fn new(question: impl Into<String>, of: Quantity, ratio: Ratio, rows: &[&Row]) -> Self {
        let mut warnings: Vec<&str> = rows
            .iter()
            .flat_map(|row| &row.warnings)
            .map(|warning| warning.kind())
            .collect();
        warnings.sort_unstable();
        warnings.dedup();
        Self {
            benchmark: rows[0].benchmark,
            question: question.into(),
            of,
            ratio: ratio.ratio,
            ratio_q1: ratio.q1,
            ratio_q3: ratio.q3,
            group: rows[0].group.clone(),
            warnings,
        }
    }
}

#[cfg(test)]
mod tests;
