//! `--export-json`: everything, every single time included, with the setup.

use super::Exporter;
use crate::bench::results::Results;

pub(crate) struct Json;

impl Exporter for Json {
    fn export(&self, results: &Results) -> anyhow::Result<Vec<u8>> {
        let mut file = serde_json::to_vec_pretty(results)?;
        file.push(b'\n');
        Ok(file)
    }
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
    }
}
