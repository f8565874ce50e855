//! Results as they might be, for the exporters' tests.

use crate::bench::args::Benchmark;
use crate::bench::results::{Note, Results};
use crate::bench::row::{Comparison, Labels, Op, Pattern, Row};
use crate::bench::setup::Setup;
use crate::bench::stats::Summary;
use crate::bench::warning::Warning;
use vm_scrub::{PageSize, Verify};

/// A row with `millis` as its times.
pub(crate) fn row(benchmark: Benchmark, group: &str, labels: Labels, millis: [f64; 4]) -> Row {
    let times_ns = millis.map(|ms| ms * 1e6).to_vec();
    let summary = Summary::of(&times_ns).expect("four times");
    Row {
        benchmark,
        group: group.into(),
        gib_per_s: crate::bench::row::gib_per_s(labels.worked_on(), summary.median),
        labels,
        median_ns: summary.median,
        q1_ns: summary.q1,
        q3_ns: summary.q3,
        mad_ns: summary.mad,
        min_ns: summary.min,
        max_ns: summary.max,
        runs: 4,
        iterations: 1,
        warmup_runs: 2,
        warm: true,
        of_ceiling: None,
        of_asked: None,
        comparison: None,
        warnings: Vec::new(),
        times_ns,
    }
}

/// Compares a row with another one.
pub(crate) fn against(mut row: Row, baseline: &str, ratio: f64) -> Row {
    row.comparison = Some(Comparison {
        baseline: baseline.into(),
        ratio,
        ratio_q1: ratio * 0.9,
        ratio_q3: ratio * 1.1,
    });
    row
}

/// What turnarounds have in common.
pub(crate) fn labels(name: &str, verify: Verify) -> Labels {
    Labels {
        name: name.into(),
        verify: Some(verify),
        page_size: Some(PageSize::Transparent),
        threads: 2,
        bytes: 1 << 30,
        ..Labels::default()
    }
}

/// One or two groups of every benchmark.
pub(crate) fn results() -> Results {
    let mut results = Results::new(Setup::of_this_host());
    let turnaround = "1 GiB, thp, 2 threads";
    let populate = "munmap-mmap-populate";
    let full = row(
        Benchmark::Turnaround,
        turnaround,
        labels("vm-scrub", Verify::Full),
        [18.0, 20.0, 20.0, 24.0],
    );
    let mut full = against(full, populate, 2.0);
    full.warnings = vec![Warning::Noise { spread: 0.2 }];
    let none = row(
        Benchmark::Turnaround,
        turnaround,
        labels("vm-scrub", Verify::None),
        [9.0, 10.0, 10.0, 12.0],
    );
    results.rows.extend([full, against(none, populate, 4.0)]);
    let kernel = row(
        Benchmark::Turnaround,
        turnaround,
        labels(populate, Verify::None),
        [39.0, 40.0, 40.0, 42.0],
    );
    results.rows.push(against(kernel, populate, 1.0));

    for (bytes, group) in [
        (4096, "zero, 4 KiB, thp, 1 thread"),
        (1 << 30, "zero, 1 GiB, thp, 1 thread"),
    ] {
        for (name, ms) in [("portable", 14.0), ("a<b>&\"c\"", 12.0)] {
            let labels = Labels {
                by_loop: Some(name.into()),
                op: Some(Op::Zero),
                calibrated: Some(name == "portable"),
                verify: None,
                threads: 1,
                bytes,
                ..labels(name, Verify::None)
            };
            let mut row = row(
                Benchmark::Loops,
                group,
                labels,
                [ms, ms, ms + 1.0, ms + 1.0],
            );
            row.of_ceiling = Some(12.0 / ms);
            results.rows.push(row);
        }
    }
    for percent in [0.01, 25.0] {
        for (name, ratio) in [("scrub-raw", 4.0), ("dontneed-touch", 1.0)] {
            let labels = Labels {
                touched_bytes: Some(1 << 20),
                touched_percent: Some(percent),
                pattern: Some(Pattern::Scattered),
                ..labels(name, Verify::Full)
            };
            let group = format!("1 GiB, 4k, {percent} % scattered");
            let row = row(
                Benchmark::Sparse,
                &group,
                labels,
                [1.0 / ratio, 1.0, 1.0, 2.0],
            );
            results.rows.push(against(row, "dontneed-touch", ratio));
        }
    }
    let neighbour = Labels {
        by_loop: Some("portable".into()),
        calibrated: Some(true),
        verify: None,
        accesses: Some(12_288),
        scrub_gib_per_s: Some(30.0),
        ..labels("beside portable", Verify::None)
    };
    let row = row(
        Benchmark::Neighbour,
        "768 KiB, thp (L2)",
        neighbour,
        [2.0, 2.0, 2.1, 2.2],
    );
    results.rows.push(against(row, "alone", 0.8));
    results.skipped.push(Note::new(
        Benchmark::Guest,
        "1 GiB, 2m",
        None,
        "no /dev/kvm <here>".into(),
    ));
    results
}
