//! Saying that a test is skipped where everybody sees it: past the test harness, which keeps to itself what passes.

use std::io::{Write, stderr};
use std::thread;

/// Says that the calling test is skipped, and why.
pub fn skipped(reason: &dyn std::fmt::Display) {
    // In one piece: the harness writes meanwhile.
    let line = format!("\nSKIPPED {}: {reason}\n", name());
    let _ = stderr().write_all(line.as_bytes());
}

/// The name of the calling test.
pub(crate) fn name() -> String {
    // With one thread for all tests the harness runs them on the main one; a child has its test's name in its environment.
    let child = crate::child::running();
    let thread = || thread::current().name().unwrap_or("test").to_owned();
    child.unwrap_or_else(thread)
}
