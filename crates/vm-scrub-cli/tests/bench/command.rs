//! Running the command with tiny memory, and what it prints.

use serde_json::Value;
use std::collections::BTreeSet;
use std::io::{Write, stderr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

/// Arguments that keep it short.
const SHORT: [&str; 8] = [
    "--memory",
    "4M",
    "--runs",
    "2",
    "--warmup",
    "0",
    "--threads",
    "2",
];

/// Says that the calling test leaves something out, past the test harness, which would keep it to itself.
pub(crate) fn skipped(reason: &str) {
    let name = thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(stderr(), "\nSKIPPED {name}: {reason}");
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vm-scrub"));
    command.arg("bench").args(arguments);
    command
}

pub(crate) fn bench(arguments: &[&str]) -> Output {
    command(arguments).output().expect("the command runs")
}

pub(crate) fn short(benchmark: &str, arguments: &[&str]) -> Output {
    short_with(benchmark, arguments, &[])
}

/// The same with these environment variables.
pub(crate) fn short_with(
    benchmark: &str,
    arguments: &[&str],
    environment: &[(&str, &str)],
) -> Output {
    command(&[&[benchmark][..], &SHORT, arguments].concat())
        .envs(environment.iter().copied())
        .output()
        .expect("the command runs")
}

/// All of standard output as one array.
#[track_caller]
pub(crate) fn rows(output: &Output) -> Vec<Value> {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    match serde_json::from_slice(&output.stdout) {
        Ok(Value::Array(rows)) => rows,
        other => panic!("{other:?} {errors}"),
    }
}

pub(crate) fn texts<'a>(rows: &'a [Value], field: &str) -> BTreeSet<&'a str> {
    rows.iter().filter_map(|row| row[field].as_str()).collect()
}

/// A directory of this test's own, gone afterwards.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("vm-scrub-bench-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a name in UTF-8")
}
