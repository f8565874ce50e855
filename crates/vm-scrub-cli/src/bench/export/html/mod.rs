//! `--export-html`

use super::Exporter;
use crate::bench::results::Results;

pub(crate) struct Html;

impl Exporter for Html {
    fn export(&self, _: &Results) -> anyhow::Result<Vec<u8>> {
        Ok(Vec::new())
    }
}
