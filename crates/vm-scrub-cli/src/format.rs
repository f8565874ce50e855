//! Numbers for people.

use indicatif::BinaryBytes;
use std::time::Duration;

/// Bytes with a binary unit: `1.00 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    match bytes {
        0 => "0".into(),
        bytes => BinaryBytes(bytes).to_string(),
    }
}

/// A duration in milliseconds: `23.4 ms`.
pub(crate) fn millis(nanos: u64) -> String {
    format!("{:.1} ms", Duration::from_nanos(nanos).as_secs_f64() * 1e3)
}
