//! Results in files: formats, and when they are written.

mod csv;
mod html;
mod json;
mod markdown;
mod scale;
mod svg;

use super::args::BenchArgs;
use super::results::Results;
use anyhow::Context;
use std::fs;
use std::io;
use std::path::PathBuf;

/// A format.
pub(crate) trait Exporter {
    /// The whole file.
    ///
    /// # Errors
    ///
    /// If the results cannot be expressed in this format.
    fn export(&self, results: &Results) -> anyhow::Result<Vec<u8>>;
}

/// A file was asked for that cannot be written: a bad argument.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot write {} ({error}): nothing was measured; name a file in a directory that exists and that you may write to",
    path.display()
)]
pub(crate) struct NotWritable {
    path: PathBuf,
    error: io::Error,
}

/// The files that were asked for.
pub(crate) struct Exports(Vec<(PathBuf, Box<dyn Exporter>)>);

impl Exports {
    /// Creates the files, empty, so that one that cannot be written is known before anything is measured.
    ///
    /// # Errors
    ///
    /// If there is one.
    pub(crate) fn open(args: &BenchArgs) -> Result<Self, NotWritable> {
        let asked: [(&Option<PathBuf>, Box<dyn Exporter>); 5] = [
            (&args.export_json, Box::new(json::Json)),
            (&args.export_csv, Box::new(csv::Csv)),
            (&args.export_markdown, Box::new(markdown::Markdown)),
            (&args.export_html, Box::new(html::Html)),
            (&args.export_svg, Box::new(svg::Svg)),
        ];
        let mut exports = Vec::new();
        for (path, exporter) in asked {
            if let Some(path) = path {
                fs::write(path, "").map_err(|error| NotWritable {
                    path: path.clone(),
                    error,
                })?;
                exports.push((path.clone(), exporter));
            }
        }
        Ok(Self(exports))
    }

    /// Writes what there is, in place of what was written before.
    pub(crate) fn write(&self, results: &Results) -> anyhow::Result<()> {
        for (path, exporter) in &self.0 {
            let file = exporter.export(results)?;
            fs::write(path, file).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod samples;
