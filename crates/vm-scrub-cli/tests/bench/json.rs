//! What `vm-scrub bench --json` prints: programs rely on these names. No figure is looked at.

use crate::command::{rows, short, skipped, texts};
use std::collections::BTreeSet;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};

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
        let mut expected = vec![("vm-scrub", "full"), ("vm-scrub", "none")];
        let ways: BTreeSet<_> = texts(&rows, "revocation");
        if page_size == "4k" && ways.len() == 2 {
            // Taken away with and without the proof that nothing is pinned.
            expected.extend_from_within(..);
        }
        expected.extend([
            ("munmap-mmap-populate", "none"),
            ("dontneed-populate", "none"),
            ("punch-hole-populate", "none"),
            ("write-bytes", "none"),
            ("rayon-fill", "none"),
            ("zeroize", "none"),
        ]);
        assert_eq!(names, expected);
        assert!(page_size == "4k" || ways.len() == 1, "{ways:?}");
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
    // No other: programs that read this know three.
    assert_eq!(ops, ["fused", "verify", "zero"].into());
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
    let zero: BTreeSet<_> = ZeroLoop::available().map(ZeroLoop::name).collect();
    let verify: BTreeSet<_> = VerifyLoop::available().map(VerifyLoop::name).collect();
    // A fused loop is called by the part that zeroes.
    for (op, loops) in [("zero", &zero), ("verify", &verify), ("fused", &zero)] {
        for bytes in &sizes {
            // Nobody hands less than a page to a thread.
            for threads in threads.iter().filter(|threads| bytes / *threads >= 4096) {
                let same: Vec<_> = rows
                    .iter()
                    .filter(|row| {
                        row["op"] == op && row["bytes"] == *bytes && row["threads"] == *threads
                    })
                    .collect();
                let names: BTreeSet<_> =
                    same.iter().filter_map(|row| row["loop"].as_str()).collect();
                assert_eq!(names, *loops, "{op} {bytes} {threads}");
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
fn neighbours_are_beside_every_loop_and_beside_paced_scrubbing() {
    let rows = rows(&short("neighbour", &["--json"]));
    let at = ["256 MiB", "1 GiB", "4 GiB"].map(|rate| format!("vm-scrub at {rate}/s"));
    let (throttled, beside): (Vec<_>, Vec<_>) =
        rows.iter().partition(|row| row["of_asked"].is_number());
    assert_eq!(throttled.len(), at.len());
    for row in throttled {
        assert!(at.iter().any(|name| row["name"] == *name), "{row}");
        let (asked, rate) = (row["asked_gib_per_s"].as_f64(), row["gib_per_s"].as_f64());
        let share = rate.expect("a number") / asked.expect("a number");
        assert!(
            (row["of_asked"].as_f64().expect("a number") - share).abs() < 1e-9,
            "{row}"
        );
        assert_eq!(
            row["bytes"].as_f64(),
            asked.map(|asked| asked * 2.0 * f64::from(1 << 30)),
            "two seconds"
        );
    }
    if beside.is_empty() {
        skipped("this host has one processor");
        return;
    }
    let names: BTreeSet<_> = beside
        .iter()
        .filter_map(|row| row["name"].as_str())
        .collect();
    for name in
        at.iter()
            .map(String::as_str)
            .chain(["alone", "beside portable", "vm-scrub unthrottled"])
    {
        assert!(names.contains(name), "{name}");
    }
    for row in beside {
        assert_eq!(row["baseline"], "alone");
        let scrubbed = row["scrub_gib_per_s"].as_f64();
        let name = row["name"].as_str().unwrap_or_default();
        if name.starts_with("vm-scrub") {
            // At the lowest priority, which on a busy host gets no processor in so short a time.
            assert!(scrubbed.is_some(), "{row}");
        } else {
            assert_eq!(scrubbed > Some(0.0), name != "alone", "{row}");
        }
    }
}
