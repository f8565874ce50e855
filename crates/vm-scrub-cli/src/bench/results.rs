//! Everything that one call has found, as it is exported.

use super::args::Benchmark;
use super::row::Row;
use super::setup::Setup;
use super::warning::Warning;
use serde::Serialize;

/// What was measured, on what, and what could not be.
#[derive(Debug)]
pub(crate) struct Results {
    pub(crate) setup: Setup,
    pub(crate) rows: Vec<Row>,
    /// What this host cannot have.
    pub(crate) skipped: Vec<Note>,
    /// What went wrong.
    pub(crate) failed: Vec<Note>,
}

/// A group, or one contender of it, without results.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Note {
    pub(crate) benchmark: Benchmark,
    pub(crate) group: String,
    pub(crate) contender: Option<String>,
    pub(crate) reason: String,
}

impl Note {
    pub(crate) fn new(
        benchmark: Benchmark,
        group: &str,
        contender: Option<String>,
        reason: String,
    ) -> Self {
        Self {
            benchmark,
            group: group.to_owned(),
            contender,
            reason,
        }
    }
}

impl Results {
    pub(crate) fn new(setup: Setup) -> Self {
        Self {
            setup,
            rows: Vec::new(),
            skipped: Vec::new(),
            failed: Vec::new(),
        }
    }

    /// The benchmarks of which there are results, in order.
    pub(crate) fn benchmarks(&self) -> Vec<Benchmark> {
        let mut benchmarks: Vec<Benchmark> = self.rows.iter().map(|row| row.benchmark).collect();
        benchmarks.dedup();
        benchmarks
    }

    /// The groups of a benchmark with their rows, in order.
    pub(crate) fn groups(&self, benchmark: Benchmark) -> Vec<(&str, &[Row])> {
        self.rows
            .chunk_by(|one, next| one.benchmark == next.benchmark && one.group == next.group)
            .filter(|rows| rows[0].benchmark == benchmark)
            .map(|rows| (rows[0].group.as_str(), rows))
            .collect()
    }
}

/// The warnings of `rows`: each kind once, as bad as it gets, and whom it is about.
pub(crate) fn by_warning(rows: &[Row]) -> Vec<(&Warning, String)> {
    let mut found: Vec<(&Warning, Vec<&str>)> = Vec::new();
    for row in rows {
        for warning in &row.warnings {
            let name = row.labels.name.as_str();
            match found
                .iter_mut()
                .find(|(other, _)| other.kind() == warning.kind())
            {
                Some((worst, names)) => {
                    if warning.severity() > worst.severity() {
                        *worst = warning;
                    }
                    names.push(name);
                }
                None => found.push((warning, vec![name])),
            }
        }
    }
    let whom = |mut names: Vec<&str>| {
        if names.len() == rows.len() && rows.len() > 1 {
            return "all".into();
        }
        names.dedup();
        names.join(", ")
    };
    found
        .into_iter()
        .map(|(warning, names)| (warning, whom(names)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::export::samples;

    #[test]
    fn a_kind_of_warning_is_told_once_and_at_its_worst() {
        let mut rows = samples::results().rows;
        rows.truncate(3);
        rows[0].warnings = vec![Warning::Noise { spread: 0.2 }];
        rows[1].warnings = vec![
            Warning::Noise { spread: 0.5 },
            Warning::TooShort { nanos: 10.0 },
        ];
        let found = by_warning(&rows);
        assert_eq!(found.len(), 2);
        assert_eq!(
            found[0],
            (&Warning::Noise { spread: 0.5 }, "vm-scrub".into())
        );
        rows[2].warnings = vec![Warning::Noise { spread: 0.1 }];
        assert_eq!(
            by_warning(&rows)[0],
            (&Warning::Noise { spread: 0.5 }, "all".into())
        );
    }
}
