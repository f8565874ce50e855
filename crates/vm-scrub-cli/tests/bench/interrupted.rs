//! Whoever wants it to end gets what was measured so far, and the host gets its huge pages back.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use crate::command::{Directory, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// The signals that a process has handlers for, one bit each.
fn handled(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    line.map_or(0, |line| u64::from_str_radix(line.trim(), 16).unwrap())
}

/// As `head` does. What was measured is kept, and nothing is measured that nobody would read.
#[test]
fn a_reader_that_goes_away_is_no_reason_to_panic() {
    let directory = Directory::new("unread");
    let kept = directory.file("kept.json");
    let mut child = Command::new(env!("CARGO_BIN_EXE_vm-scrub"))
        .args(["bench", "sparse", "--memory", "4M", "--page-size", "4k"])
        .args(["--runs", "2", "--export-json", text(&kept)])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!errors.contains("panicked"), "{errors}");
    assert!(errors.contains("nobody reads"), "{errors}");
    let kept = serde_json::from_slice::<serde_json::Value>(&fs::read(&kept).unwrap()).unwrap();
    assert!(!kept["results"].as_array().unwrap().is_empty());
    assert!(!kept["failed"].as_array().unwrap().is_empty());
}

#[test]
fn every_request_to_end_is_heard() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let child = Command::new(env!("CARGO_BIN_EXE_vm-scrub"))
            .args(["bench", "sparse", "--memory", "4M", "--page-size", "4k"])
            .args(["--runs", "10000", "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let process = child.id();
        // All are listened for one after the other, at the beginning.
        while handled(process) >> (Signal::SIGTERM as i32 - 1) & 1 == 0 {
            sleep(Duration::from_millis(1));
        }
        sleep(Duration::from_millis(100));
        kill(Pid::from_raw(process as i32), signal).unwrap();
        let output = child.wait_with_output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{signal}: {output:?}");
        assert!(
            errors.contains("what there is was kept"),
            "{signal}: {errors}"
        );
        let kept = serde_json::from_slice::<Vec<serde_json::Value>>(&output.stdout);
        assert!(kept.is_ok(), "{signal}: {kept:?}");
    }
}
