//! `--export-csv`: one line for each row, the same columns for all benchmarks. The single times are left out.

use super::Exporter;
use crate::bench::results::Results;
use serde_json::Value;

pub(crate) struct Csv;

/// The names of fields as in JSON, and their order. `warnings` are their kinds, separated by spaces.
const COLUMNS: &[&str] = &[
    "benchmark",
    "group",
    "name",
    "loop",
    "op",
    "calibrated",
    "verify",
    "revocation",
    "page_size",
    "threads",
    "bytes",
    "touched_bytes",
    "touched_percent",
    "pattern",
    "median_ns",
    "q1_ns",
    "q3_ns",
    "mad_ns",
    "min_ns",
    "max_ns",
    "runs",
    "iterations",
    "warmup_runs",
    "warm",
    "gib_per_s",
    "of_ceiling",
    "of_asked",
    "baseline",
    "ratio",
    "ratio_q1",
    "ratio_q3",
    "accesses",
    "asked_gib_per_s",
    "scrub_gib_per_s",
    "warnings",
];

impl Exporter for Csv {
    fn export(&self, results: &Results) -> anyhow::Result<Vec<u8>> {
        let mut writer = ::csv::Writer::from_writer(Vec::new());
        writer.write_record(COLUMNS)?;
        for row in &results.rows {
            let row = serde_json::to_value(row)?;
            writer.write_record(COLUMNS.iter().map(|column| text(&row[column])))?;
        }
        Ok(writer.into_inner()?)
    }
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(warnings) => {
            let kinds: Vec<&str> = warnings
                .iter()
                .filter_map(|each| each["kind"].as_str())
                .collect();
            kinds.join(" ")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn every_line_has_every_column() {
        let results = samples::results();
        let file = Csv.export(&results).expect("exported");
        let mut reader = ::csv::Reader::from_reader(&file[..]);
        assert_eq!(reader.headers().expect("a heading"), COLUMNS);
        let records: Vec<_> = reader.records().collect::<Result<_, _>>().expect("CSV");
        assert_eq!(records.len(), results.rows.len());
        let field = |record: usize, name: &str| {
            let column = COLUMNS
                .iter()
                .position(|each| *each == name)
                .expect("a column");
            records[record][column].to_owned()
        };
        assert_eq!(field(0, "group"), "1 GiB, thp, 2 threads");
        assert_eq!(
            (field(0, "median_ns"), field(0, "warnings")),
            ("20000000".into(), "noise".into())
        );
        assert_eq!(field(0, "loop"), "");
    }

    #[test]
    fn no_field_of_a_row_is_forgotten() {
        for row in &samples::results().rows {
            let row = serde_json::to_value(row).expect("JSON");
            for name in row.as_object().expect("an object").keys() {
                assert!(
                    name == "times_ns" || COLUMNS.contains(&name.as_str()),
                    "{name}"
                );
            }
        }
    }
}
