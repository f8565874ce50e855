//! A group as a table, which the terminal, Markdown and HTML show each in its own way.

use super::row::Row;
use super::units;
use comfy_table::{Cell, CellAlignment, presets};
use vm_scrub::Verify;

/// Columns with a heading, and cells as text.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Table {
    pub(crate) headings: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

/// A column: its heading, and what a row has in it.
type Column = (String, fn(&Row) -> String);

impl Table {
    /// The columns of which at least one of `rows` has something.
    pub(crate) fn of(rows: &[Row]) -> Self {
        let columns: Vec<Column> = columns(rows)
            .into_iter()
            .filter(|(_, cell)| rows.iter().any(|row| !cell(row).is_empty()))
            .collect();
        Self {
            rows: rows
                .iter()
                .map(|row| columns.iter().map(|(_, cell)| cell(row)).collect())
                .collect(),
            headings: columns.into_iter().map(|(heading, _)| heading).collect(),
        }
    }

    /// Drawn with lines.
    pub(crate) fn for_terminal(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(&self.headings);
        for row in &self.rows {
            table.add_row(row.iter().enumerate().map(|(column, text)| {
                let alignment = if is_text(column, text) {
                    CellAlignment::Left
                } else {
                    CellAlignment::Right
                };
                Cell::new(text).set_alignment(alignment)
            }));
        }
        table.to_string()
    }
}

/// Whether a cell is read as text; numbers are aligned to the right.
pub(crate) fn is_text(column: usize, text: &str) -> bool {
    column == 0 || !text.starts_with(|first: char| first.is_ascii_digit())
}

fn columns(rows: &[Row]) -> Vec<Column> {
    fn optional<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
        value.map_or(String::new(), show)
    }
    vec![
        ("contender".into(), |row| row.labels.name.clone()),
        ("verified".into(), |row| match row.labels.verify {
            None | Some(Verify::None) => String::new(),
            Some(verify) => format!("{verify:?}").to_lowercase(),
        }),
        ("revoked by".into(), |row| match row.labels.revocation {
            None => String::new(),
            // By the name that it has in JSON and in the README.
            Some(way) => serde_json::to_value(way)
                .ok()
                .and_then(|name| Some(name.as_str()?.to_owned()))
                .unwrap_or_default(),
        }),
        ("threads".into(), |row| row.labels.threads.to_string()),
        ("touched".into(), |row| {
            optional(row.labels.touched_bytes, crate::bench::units::size)
        }),
        ("median".into(), |row| units::time(row.median_ns)),
        ("± MAD".into(), |row| units::time(row.mad_ns)),
        ("min".into(), |row| units::time(row.min_ns)),
        ("max".into(), |row| units::time(row.max_ns)),
        ("rate".into(), |row| {
            match (row.labels.accesses, row.labels.touched_bytes) {
                // Of memory that nobody has touched, or that the workload reads here and there, a rate says nothing.
                (None, None) => units::rate(row.gib_per_s),
                _ => String::new(),
            }
        }),
        ("of the best".into(), |row| {
            optional(row.of_ceiling, units::percent)
        }),
        ("asked for".into(), |row| {
            optional(row.labels.asked_gib_per_s, units::rate)
        }),
        ("of that".into(), |row| {
            optional(row.of_asked, |share| format!("{:.2} %", share * 100.0))
        }),
        ("an access".into(), |row| {
            optional(row.ns_per_access(), units::time)
        }),
        ("scrub meanwhile".into(), |row| {
            optional(row.labels.scrub_gib_per_s, units::rate)
        }),
        (against(rows), |row| {
            optional(row.comparison.as_ref(), |compared| {
                units::ratio(compared.ratio)
            })
        }),
        ("runs".into(), |row| row.runs.to_string()),
        ("".into(), |row| match row.labels.calibrated {
            Some(true) => "chosen".into(),
            _ => String::new(),
        }),
        ("warnings".into(), |row| {
            let kinds: Vec<&str> = row.warnings.iter().map(|warning| warning.kind()).collect();
            kinds.join(", ")
        }),
    ]
}

/// The heading over the ratios.
fn against(rows: &[Row]) -> String {
    format!("speed, {}", baseline(rows))
}

/// What the ratios of a group say: `munmap-mmap-populate = 1`.
pub(crate) fn baseline(rows: &[Row]) -> String {
    let mut baselines: Vec<&str> = rows
        .iter()
        .filter_map(|row| Some(row.comparison.as_ref()?.baseline.as_str()))
        .collect();
    baselines.sort_unstable();
    baselines.dedup();
    match baselines[..] {
        [one] => format!("{one} = 1"),
        // Fused loops are compared each with its own.
        _ => "separate = 1".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::args::Benchmark;
    use crate::bench::export::samples;
    use crate::bench::row::Labels;
    use vm_scrub::Revocation;

    #[test]
    fn ways_to_revoke_have_the_names_that_json_has() {
        let labels = Labels {
            revocation: Some(Revocation::ViewReplaced),
            ..samples::labels("vm-scrub", Verify::Full)
        };
        let row = samples::row(Benchmark::Turnaround, "1 GiB, 2m", labels, [1.0; 4]);
        let table = Table::of(&[row]);
        assert!(table.rows[0].contains(&"view-replaced".into()), "{table:?}");
    }
}
