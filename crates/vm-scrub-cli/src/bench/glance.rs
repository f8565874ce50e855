//! The few figures that matter most, drawn from everything that was measured.
//!
//! Each is a ratio within one group, because times on one host say little about another.

use super::args::Benchmark;
use super::results::Results;
use super::row::{Op, Row};
use super::units;
use vm_scrub::Verify;

/// A figure and what it is about.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Glance {
    pub(crate) benchmark: Benchmark,
    pub(crate) what: String,
    pub(crate) figure: String,
}

/// What there is to see; nothing of benchmarks that were not run.
pub(crate) fn of(results: &Results) -> Vec<Glance> {
    results
        .rows
        .iter()
        .filter_map(of_row)
        .chain(worst_choice(results))
        .collect()
}

fn of_row(row: &Row) -> Option<Glance> {
    let compared = row.comparison.as_ref()?;
    let labels = &row.labels;
    let page_size = labels.page_size.unwrap_or_default();
    let (what, figure) = match (row.benchmark, labels.name.as_str()) {
        (Benchmark::Turnaround, "vm-scrub") => {
            let read_back = match labels.verify {
                Some(Verify::None) => "not verified",
                _ => "every byte verified",
            };
            let what = format!(
                "as fast as munmap + mmap + populate: turnaround, {page_size}, {read_back}"
            );
            (what, units::ratio(compared.ratio))
        }
        (Benchmark::Loops, _)
            if labels.op == Some(Op::Fused) && labels.calibrated == Some(true) =>
        {
            (
                "zero and verify piece by piece, against one after the other".into(),
                units::ratio(compared.ratio),
            )
        }
        (Benchmark::Guest, "recycled") => (
            format!("a guest's first touch of its RAM, {page_size}, recycled against fresh memory"),
            units::ratio(compared.ratio),
        ),
        (Benchmark::Sparse, "scrub-raw") if labels.touched_percent.is_none() => (
            format!(
                "time of scrub_raw, against MADV_DONTNEED and touching again: {}",
                row.group
            ),
            units::ratio(1.0 / compared.ratio),
        ),
        (Benchmark::Sparse, "large-lease") => (
            format!(
                "time of {}, against a lease that is touched all over",
                row.group
            ),
            units::ratio(1.0 / compared.ratio),
        ),
        (Benchmark::Neighbour, name) if labels.calibrated == Some(true) => (
            format!("speed that a neighbour keeps {name}, {}", row.group),
            units::percent(compared.ratio),
        ),
        (Benchmark::Scaling, name)
            if labels.verify == Some(Verify::Full) && compared.baseline != name =>
        {
            (
                format!(
                    "{name} against {}, {page_size}, verified",
                    compared.baseline
                ),
                units::ratio(compared.ratio),
            )
        }
        _ => return None,
    };
    Some(Glance {
        benchmark: row.benchmark,
        what,
        figure,
    })
}

/// Where the loop that vm-scrub chooses falls furthest behind the best.
fn worst_choice(results: &Results) -> Option<Glance> {
    let chosen = results.rows.iter().filter(|row| {
        row.benchmark == Benchmark::Loops
            && row.labels.calibrated == Some(true)
            && row.labels.op != Some(Op::Separate)
    });
    let worst = chosen
        .filter_map(|row| Some((row.of_ceiling?, row)))
        .min_by(|one, other| one.0.total_cmp(&other.0))?;
    Some(Glance {
        benchmark: Benchmark::Loops,
        what: format!(
            "the chosen loop against the best, where it is worst ({})",
            worst.1.group
        ),
        figure: units::percent(worst.0),
    })
}
