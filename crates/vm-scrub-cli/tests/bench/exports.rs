//! What every benchmark together prints and writes, and how the command ends when something is wrong.

use crate::command::{Directory, bench, rows, short, short_with, skipped, text, texts};
use serde_json::Value;
use std::path::Path;

#[test]
fn all_prints_every_benchmark_and_writes_every_format() {
    let directory = Directory::new("all");
    let [json, csv, markdown, html, svg] =
        ["a.json", "a.csv", "a.md", "a.html", "a.svg"].map(|name| directory.file(name));
    let exports = [
        ["--export-json", text(&json)],
        ["--export-csv", text(&csv)],
        ["--export-markdown", text(&markdown)],
        ["--export-html", text(&html)],
        ["--export-svg", text(&svg)],
        ["--page-size", "4k"],
    ];
    let arguments: Vec<&str> = exports.concat().into_iter().chain(["--json"]).collect();
    let output = short("all", &arguments);
    let rows = rows(&output);
    let read = |path: &Path| std::fs::read_to_string(path).expect("written");
    let exported: Value = serde_json::from_str(&read(&json)).expect("JSON");
    // Zeroing and then reading back is only there to be compared with.
    let (separate, same): (Vec<Value>, Vec<Value>) = exported["results"]
        .as_array()
        .expect("an array")
        .iter()
        .cloned()
        .partition(|row| row["op"] == "separate");
    assert_eq!(same, rows);
    assert!(!separate.is_empty());
    assert_eq!(exported["failed"].as_array().map(Vec::len), Some(0));
    for field in [
        "cpu",
        "kernel",
        "processors",
        "memory_bytes",
        "thp",
        "governor",
        "date",
        "version",
    ] {
        assert!(!exported["setup"][field].is_null(), "{field}");
    }
    let skipped = texts(
        exported["skipped"].as_array().expect("an array"),
        "benchmark",
    );
    let mut benchmarks = texts(&rows, "benchmark");
    // Hosts without KVM, or with one processor, have fewer.
    benchmarks.extend(&skipped);
    let all = [
        "guest",
        "loops",
        "neighbour",
        "scaling",
        "sparse",
        "turnaround",
    ];
    assert_eq!(benchmarks, all.into());
    assert_eq!(read(&csv).lines().count(), rows.len() + separate.len() + 1);
    for expected in ["4 KiB pages", "vm-scrub, every byte read back"] {
        assert!(read(&svg).contains(expected), "{expected}");
    }
    let summary = exported["summary"].as_array().expect("an array");
    let answered = texts(summary, "benchmark");
    assert_eq!(answered, texts(&rows, "benchmark"), "each has a ratio");
    for answer in summary {
        let question = answer["question"].as_str().expect("a question");
        assert!(answer["ratio"].as_f64() > Some(0.0), "{answer}");
        assert!(
            read(&markdown).contains(&format!("\n| {question} |")),
            "{question}"
        );
        assert!(read(&html).contains(question), "{question}");
    }
    for benchmark in texts(&rows, "benchmark") {
        assert!(
            read(&markdown).contains(&format!("\n## {benchmark}\n")),
            "{benchmark}"
        );
        assert!(
            read(&html).contains(&format!("<section id=\"{benchmark}\">")),
            "{benchmark}"
        );
    }
    for name in [
        "lease-teardown",
        "lease-turnaround",
        "scrub-raw",
        "fill",
        "dontneed-touch",
        "small-lease",
        "large-lease",
    ] {
        assert!(
            rows.iter()
                .any(|row| row["benchmark"] == "sparse" && row["name"] == name),
            "{name}"
        );
    }
}

#[test]
fn tables_are_for_people() {
    let output = short("scaling", &["--page-size", "4k"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    for expected in [
        "4 MiB, 4k, verified",
        "contender",
        "6-threads",
        "8-threads",
        "speed, 2-threads = 1",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
}

#[test]
fn bad_arguments_end_with_2() {
    for arguments in [
        &[][..],
        &["everything"],
        &["loops", "--memory", "3M"],
        &["loops", "--page-size", "1g"],
        &["turnaround", "--runs", "1"],
        &["turnaround", "--threads", "0"],
        &["sparse", "--min-time", "soon"],
        &["guest", "--export-json"],
        &["loops", "--export-svg", "/nowhere/at/all.svg"],
        &[
            "all",
            "--export-csv",
            "/nowhere/a",
            "--export-json",
            "/nowhere/a",
        ],
    ] {
        let output = bench(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(
            output.stdout.is_empty() && !output.stderr.is_empty(),
            "{arguments:?}"
        );
    }
}

#[test]
fn what_cannot_be_written_is_found_before_anything_is_measured() {
    let nowhere = short("scaling", &["--export-csv", "/nowhere/at/all.csv"]);
    assert_eq!(nowhere.status.code(), Some(2));
    let error = String::from_utf8_lossy(&nowhere.stderr);
    for expected in [
        "/nowhere/at/all.csv",
        "nothing was measured",
        "a directory that exists",
    ] {
        assert!(error.contains(expected), "{error}");
    }
    assert!(nowhere.stdout.is_empty());
}

#[test]
fn loops_that_the_environment_names_must_exist() {
    for (variable, name, task) in [
        ("VM_SCRUB_LOOP", "fastest", "zeroing"),
        ("VM_SCRUB_VERIFY_LOOP", "rep-stosb", "verification"),
    ] {
        for benchmark in ["loops", "turnaround"] {
            let output = short_with(benchmark, &["--page-size", "4k"], &[(variable, name)]);
            assert_eq!(output.status.code(), Some(2), "{benchmark}");
            let error = String::from_utf8_lossy(&output.stderr);
            let expected = format!("{variable}: there is no {task} loop called `{name}`");
            assert!(
                error.contains(&expected) && error.contains("portable"),
                "{error}"
            );
            assert!(output.stdout.is_empty());
        }
    }
    let named = [
        ("VM_SCRUB_LOOP", "portable"),
        ("VM_SCRUB_VERIFY_LOOP", "portable"),
    ];
    let output = short_with("turnaround", &["--page-size", "4k", "--json"], &named);
    assert!(!rows(&output).is_empty());
    let help = bench(&["--help"]);
    let help = String::from_utf8_lossy(&help.stdout);
    for (variable, _) in named {
        assert!(help.contains(variable), "{help}");
    }
}

#[test]
fn what_cannot_be_done_ends_with_1() {
    // More than a host has: nothing is mapped, and the group fails; what there is, is an empty array.
    let directory = Directory::new("failed");
    let json = directory.file("a.json");
    let too_much = bench(&[
        "turnaround",
        "--memory",
        "64G",
        "--page-size",
        "4k",
        "--json",
        "--export-json",
        text(&json),
    ]);
    if too_much.status.code() == Some(0) {
        skipped("this host has eight times 64 GiB");
        return;
    }
    assert_eq!(too_much.status.code(), Some(1));
    assert_eq!(
        serde_json::from_slice::<Value>(&too_much.stdout).expect("JSON"),
        Value::Array(Vec::new())
    );
    let exported: Value =
        serde_json::from_slice(&std::fs::read(&json).expect("written")).expect("JSON");
    let reason = exported["failed"][0]["reason"].as_str().expect("a reason");
    assert!(reason.contains("use a smaller --memory"), "{reason}");
}
