//! What fuzzing runs: one function for each target, from any bytes to a panic or none.
//!
//! They are here, and not with the targets, so that the kept corpora are also replayed by `cargo test`, which needs no
//! libFuzzer.

mod loops;
mod pool;
mod scrub;
mod text;

use arbitrary::Unstructured;

/// A target: takes bytes, and panics or crashes if something is wrong.
pub type Target = fn(&[u8]);

/// Every target, by the name of its corpus.
pub const TARGETS: [(&str, Target); 4] = [
    ("loops", loops::run),
    ("pool", pool::run),
    ("scrub", scrub::run),
    ("text", text::run),
];

pub use loops::run as loops;
pub use pool::run as pool;
pub use scrub::run as scrub;
pub use text::run as text;

/// Numbers from `low` to `high`, or `low` when there are no bytes left.
fn between(input: &mut Unstructured<'_>, low: usize, high: usize) -> usize {
    input.int_in_range(low..=high).unwrap_or(low)
}

/// Whether; no, when there are no bytes left.
fn whether(input: &mut Unstructured<'_>) -> bool {
    input.arbitrary().unwrap_or(false)
}
