//! `--export-json`: everything, every single time included, with the setup and the summary.
//!
//! Each result is on a line of its own: files with thousands of times stay small, and two of them can be compared by line.

use super::Exporter;
use crate::bench::results::Results;
use crate::bench::summary;
use serde::Serialize;

pub(crate) struct Json;

impl Exporter for Json {
    fn export(&self, results: &Results) -> anyhow::Result<Vec<u8>> {
        let parts = [
            ("setup", serde_json::to_string(&results.setup)?),
            ("summary", lines(&summary::of(results))?),
            ("results", lines(&results.rows)?),
            ("skipped", lines(&results.skipped)?),
            ("failed", lines(&results.failed)?),
        ];
        let parts = parts.map(|(name, value)| format!("\"{name}\": {value}"));
        Ok(format!("{{\n{}\n}}\n", parts.join(",\n")).into_bytes())
    }
}

/// An array with a line for each element.
fn lines(elements: &[impl Serialize]) -> serde_json::Result<String> {
    let elements: Vec<String> = elements
        .iter()
        .map(serde_json::to_string)
        .collect::<Result<_, _>>()?;
    Ok(match elements.is_empty() {
        true => "[]".into(),
        false => format!("[\n{}\n]", elements.join(",\n")),
    })
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    #[test]
    fn the_setup_and_every_time_are_there() {
        let file = Json.export(&samples::results()).expect("exported");
        let value: serde_json::Value = serde_json::from_slice(&file).expect("JSON");
        assert!(value["setup"]["cpu"].is_string());
        let first = &value["results"][0];
        assert_eq!(first["benchmark"], "turnaround");
        assert_eq!(first["name"], "vm-scrub");
        assert_eq!(first["verify"], "full");
        assert_eq!(first["page_size"], "thp");
        assert_eq!(first["median_ns"], 20_000_000);
        assert_eq!(first["times_ns"].as_array().map(Vec::len), Some(4));
        assert_eq!(first["baseline"], "munmap-mmap-populate");
        assert_eq!(first["ratio"], 2.0);
        assert_eq!(first["warnings"][0]["kind"], "noise");
        assert!(first.get("op").is_none(), "what makes no sense is left out");
        assert_eq!(value["skipped"][0]["benchmark"], "guest");
        assert_eq!(value["failed"].as_array().map(Vec::len), Some(0));
        let answers = summary::of(&samples::results()).len();
        assert_eq!(value["summary"].as_array().map(Vec::len), Some(answers));
    }

    #[test]
    fn each_result_is_one_line() {
        let results = samples::results();
        let file = String::from_utf8(Json.export(&results).expect("exported")).expect("text");
        let rows = file.lines().filter(|line| line.contains("\"times_ns\""));
        assert_eq!(rows.count(), results.rows.len());
    }
}
