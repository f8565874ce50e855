//! `vm-scrub bench` from outside: what it prints, what it writes, and how it ends. Memory is tiny, and no figure is looked at.

use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Arguments that keep it short.
const SHORT: [&str; 8] = [
    "--memory",
    "4M",
    "--runs",
    "2",
    "--warmup",
    "1",
    "--threads",
    "2",
];

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vm-scrub"))
        .arg("bench")
        .args(arguments)
        .output()
        .expect("the command runs")
}

fn short(benchmark: &str, arguments: &[&str]) -> Output {
    bench(&[&[benchmark][..], &SHORT, arguments].concat())
}

/// All of standard output as one array.
#[track_caller]
fn rows(output: &Output) -> Vec<Value> {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    match serde_json::from_slice(&output.stdout) {
        Ok(Value::Array(rows)) => rows,
        other => panic!("{other:?} {errors}"),
    }
}

fn texts<'a>(rows: &'a [Value], field: &str) -> BTreeSet<&'a str> {
    rows.iter().filter_map(|row| row[field].as_str()).collect()
}

/// A directory of this test's own, gone afterwards.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("vm-scrub-bench-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a directory");
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a name in UTF-8")
}

#[test]
fn turnaround_prints_an_array_with_everybody_in_it() {
    for page_size in ["4k", "thp"] {
        let rows = rows(&short("turnaround", &["--page-size", page_size, "--json"]));
        let names: Vec<_> = rows
            .iter()
            .map(|row| {
                (
                    row["name"].as_str().unwrap_or("?"),
                    row["verify"].as_str().unwrap_or("?"),
                )
            })
            .collect();
        let expected = [
            ("vm-scrub", "full"),
            ("vm-scrub", "none"),
            ("munmap-mmap-populate", "none"),
            ("dontneed-populate", "none"),
            ("punch-hole-populate", "none"),
            ("write-bytes", "none"),
            ("rayon-fill", "none"),
            ("zeroize", "none"),
        ];
        assert_eq!(names, expected);
        for row in &rows {
            assert_eq!(
                (&row["benchmark"], &row["page_size"]),
                (&"turnaround".into(), &page_size.into())
            );
            assert_eq!(
                (row["bytes"].as_u64(), row["runs"].as_u64()),
                (Some(4 << 20), Some(2))
            );
            let alone = ["write-bytes", "zeroize"].contains(&row["name"].as_str().unwrap_or("?"));
            assert_eq!(
                row["threads"].as_u64(),
                Some(if alone { 1 } else { 2 }),
                "{row}"
            );
            let median = row["median_ns"].as_f64().expect("a number");
            let rate = row["gib_per_s"].as_f64().expect("a number");
            assert!(
                (median * rate / (4.0 / 1024.0 * 1e9) - 1.0).abs() < 0.01,
                "{row}"
            );
            assert_eq!(row["baseline"], "munmap-mmap-populate");
            assert!(
                row["ratio"].as_f64().is_some_and(|ratio| ratio > 0.0),
                "{row}"
            );
            let (min, max) = (row["min_ns"].as_f64(), row["max_ns"].as_f64());
            assert!(min <= Some(median) && Some(median) <= max, "{row}");
            assert!(
                row["warnings"].is_array() && row["warm"].is_boolean(),
                "{row}"
            );
        }
    }
}

#[test]
fn loops_print_an_array_with_every_loop_and_one_choice() {
    let rows = rows(&short("loops", &["--json"]));
    let ops = texts(&rows, "op");
    assert_eq!(ops, ["fused", "separate", "verify", "zero"].into());
    let sizes: BTreeSet<_> = rows
        .iter()
        .filter_map(|row| row["bytes"].as_u64())
        .collect();
    assert_eq!(
        sizes,
        [4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20].into()
    );
    let threads: BTreeSet<_> = rows
        .iter()
        .filter_map(|row| row["threads"].as_u64())
        .collect();
    assert_eq!(threads, [1, 2].into());
    for op in ["zero", "verify", "fused"] {
        for bytes in &sizes {
            for threads in &threads {
                let same: Vec<_> = rows
                    .iter()
                    .filter(|row| {
                        row["op"] == op && row["bytes"] == *bytes && row["threads"] == *threads
                    })
                    .collect();
                assert!(
                    same.iter().any(|row| row["loop"] == "portable"),
                    "{op} {bytes} {threads}"
                );
                let chosen = same.iter().filter(|row| row["calibrated"] == true).count();
                assert_eq!(chosen, 1, "{op} {bytes} {threads}");
                let best = same.iter().filter(|row| row["of_ceiling"] == 1.0).count();
                assert!(best >= 1, "{op} {bytes} {threads}");
            }
        }
    }
    assert!(rows.iter().all(|row| row["gib_per_s"].as_f64() > Some(0.0)));
    let fused = rows.iter().filter(|row| row["baseline"].is_string());
    assert!(fused.clone().all(|row| row["op"] == "fused") && fused.count() > 0);
}

#[test]
fn all_prints_every_benchmark_and_writes_every_format() {
    let directory = Directory::new("all");
    let [json, csv, markdown, html] =
        ["a.json", "a.csv", "a.md", "a.html"].map(|name| directory.file(name));
    let exports = [
        ["--export-json", text(&json)],
        ["--export-csv", text(&csv)],
        ["--export-markdown", text(&markdown)],
        ["--export-html", text(&html)],
        ["--page-size", "4k"],
    ];
    let arguments: Vec<&str> = exports.concat().into_iter().chain(["--json"]).collect();
    let output = short("all", &arguments);
    let rows = rows(&output);
    let read = |path: &Path| std::fs::read_to_string(path).expect("written");
    let exported: Value = serde_json::from_str(&read(&json)).expect("JSON");
    assert_eq!(exported["results"].as_array(), Some(&rows));
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
    assert_eq!(read(&csv).lines().count(), rows.len() + 1);
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
fn what_cannot_be_done_ends_with_1() {
    let nowhere = short("scaling", &["--export-csv", "/nowhere/at/all.csv"]);
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("/nowhere/at/all.csv"));
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
        eprintln!("SKIPPED: this host has six times 64 GiB");
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
