//! Which rows answer which question.
//!
//! Contenders are found by their labels. A group in which one of them is missing, because it failed or was not asked for,
//! answers nothing.

use super::Answer;
use crate::bench::args::Benchmark;
use crate::bench::row::{Op, Pattern, Row, gib_per_s};
use crate::bench::units;
use vm_scrub::{PageSize, Verify};

/// What the groups of a benchmark say.
pub(super) fn answers(benchmark: Benchmark, groups: &[(&str, &[Row])]) -> Vec<Answer> {
    let each =
        |of: fn(&[Row]) -> Vec<Answer>| groups.iter().flat_map(|(_, rows)| of(rows)).collect();
    match benchmark {
        Benchmark::Loops => {
            let chosen = [Op::Zero, Op::Verify, Op::Fused]
                .into_iter()
                .filter_map(|op| furthest_behind(groups, op));
            chosen.chain(each(fused)).collect()
        }
        Benchmark::Turnaround => each(turnaround),
        Benchmark::Sparse => each(sparse),
        Benchmark::Guest => each(guest),
        Benchmark::Neighbour => each(neighbour),
        Benchmark::Scaling => each(scaling),
    }
}

fn named<'a>(rows: &'a [Row], name: &str) -> Option<&'a Row> {
    rows.iter().find(|row| row.labels.name == name)
}

/// What `row` is compared with, if it is not that itself.
fn baseline<'a>(rows: &'a [Row], row: &Row) -> Option<&'a Row> {
    let name = &row.comparison.as_ref()?.baseline;
    named(rows, name).filter(|_| row.labels.name != *name)
}

fn of_op(rows: &[Row], op: Op) -> impl Iterator<Item = &Row> {
    rows.iter().filter(move |row| row.labels.op == Some(op))
}

fn chosen(rows: &[Row], op: Op) -> Option<&Row> {
    of_op(rows, op).find(|row| row.labels.calibrated == Some(true))
}

fn fastest(rows: &[Row], op: Op) -> Option<&Row> {
    of_op(rows, op).min_by(|one, other| one.median_ns.total_cmp(&other.median_ns))
}

fn pages(row: &Row) -> &'static str {
    match row.labels.page_size.unwrap_or_default() {
        PageSize::Base4K => "4 KiB pages",
        PageSize::Transparent => "THP",
        _ => "hugetlb pages",
    }
}

fn verified(row: &Row) -> &'static str {
    match row.labels.verify {
        Some(Verify::None) | None => "not verified",
        Some(Verify::Sampled { .. }) => "a sample verified",
        Some(_) => "verified",
    }
}

/// Where the loop that vm-scrub chooses is furthest behind the best.
fn furthest_behind(groups: &[(&str, &[Row])], op: Op) -> Option<Answer> {
    let work = match op {
        Op::Zero => "zeroing",
        Op::Verify => "reading back",
        Op::Fused | Op::Separate => "zeroing and reading back",
    };
    let question = format!(
        "{work}: speed of the chosen loop against the fastest, where it is furthest behind"
    );
    groups
        .iter()
        .filter_map(|(_, rows)| {
            Answer::speed(question.as_str(), chosen(rows, op)?, fastest(rows, op)?)
        })
        .min_by(|one, other| one.ratio.total_cmp(&other.ratio))
}

/// Zeroing and reading back piece by piece, against one after the other: by the same zeroing loop, and by whichever is fastest so.
fn fused(rows: &[Row]) -> Vec<Answer> {
    let question = "zeroing and reading back piece by piece: speed against one after the other";
    let Some(fused) = chosen(rows, Op::Fused) else {
        return Vec::new();
    };
    let same = of_op(rows, Op::Separate).find(|row| row.labels.by_loop == fused.labels.by_loop);
    [
        (same, "by the same zeroing loop"),
        (fastest(rows, Op::Separate), "by the fastest"),
    ]
    .into_iter()
    .filter_map(|(separate, by)| Answer::speed(format!("{question}, {by}"), fused, separate?))
    .collect()
}

fn turnaround(rows: &[Row]) -> Vec<Answer> {
    let Some(kernel) = named(rows, "munmap-mmap-populate") else {
        return Vec::new();
    };
    let own = rows.iter().filter(|row| row.labels.name == "vm-scrub");
    own.filter_map(|row| {
        let (pages, verified) = (pages(row), verified(row));
        let way = row.labels.unusual_revocation();
        let way = way.map_or(String::new(), |way| format!(", {way}"));
        let question =
            format!("turnaround, {pages}, {verified}{way}: speed against munmap + mmap + populate");
        Answer::speed(question, row, kernel)
    })
    .collect()
}

/// How much of a lease was touched in the case that stands for all that are plotted, in percent.
const PLOTTED: f64 = 1.0;

/// Leases of which a little was touched, and an embedder's mappings of which a little is dirty. Of the parts in percent, for which
/// there are plots, one.
fn sparse(rows: &[Row]) -> Vec<Answer> {
    let touched = |row: &Row| units::size(row.labels.touched_bytes.unwrap_or(0));
    let pattern = |row: &Row| row.labels.pattern.map_or("", Pattern::name);
    let all = |row: &Row| units::size(row.labels.bytes);
    rows.iter()
        .filter_map(|row| {
            let (all, touched, pages) = (all(row), touched(row), pages(row));
            let pattern = pattern(row);
            let name = row.labels.name.as_str();
            match row.labels.touched_percent {
                Some(PLOTTED) if name == "lease-teardown" => {
                    let question = format!(
                        "teardown, {all} of {pages}, {touched} touched, {pattern}: time against MADV_DONTNEED and touching again"
                    );
                    return Answer::time(question, row, baseline(rows, row)?);
                }
                Some(_) => return None,
                None => {}
            }
            match name {
                "large-lease" | "large-lease-scattered" => {
                    let small = baseline(rows, row)?;
                    let question = format!(
                        "teardown, {all} of {pages}, {touched} touched, {pattern}: time against {} all touched",
                        units::size(small.labels.bytes)
                    );
                    Answer::time(question, row, small)
                }
                "scrub-raw" => {
                    let question = format!(
                        "scrub_raw, {all} of {pages}, {touched} dirty, {pattern}, {}: time against MADV_DONTNEED \
                         and touching again",
                        verified(row)
                    );
                    Answer::time(question, row, baseline(rows, row)?)
                }
                _ => None,
            }
        })
        .collect()
}

fn guest(rows: &[Row]) -> Vec<Answer> {
    let answer = || {
        let recycled = named(rows, "recycled")?;
        let fresh = baseline(rows, recycled)?;
        let pages = pages(recycled);
        let question = format!(
            "a guest's first touch of its RAM, {pages}: speed in recycled against fresh memory"
        );
        Answer::speed(question, recycled, fresh)
    };
    answer().into_iter().collect()
}

/// What a neighbour keeps beside the loop that vm-scrub would choose and beside its background scrubbing, and whether that keeps
/// to its rate.
fn neighbour(rows: &[Row]) -> Vec<Answer> {
    let of_row = |row: &Row| {
        let name = &row.labels.name;
        if row.of_asked.is_some() {
            let seconds = gib_per_s(row.labels.bytes, 1e9) / row.labels.asked_gib_per_s?;
            let seconds = units::plain(seconds);
            return Answer::rate(
                format!("{name}: rate against the one asked for, over {seconds} s"),
                row,
            );
        }
        if row.labels.calibrated != Some(true) && row.labels.verify.is_none() {
            return None;
        }
        let beside = name.trim_start_matches("beside ");
        let bytes = units::size(row.labels.bytes);
        let question =
            format!("neighbour that works in {bytes}, beside {beside}: speed against alone");
        Answer::speed(question, row, baseline(rows, row)?)
    };
    rows.iter().filter_map(of_row).collect()
}

/// What as many threads as were tried lose against as many as were asked for.
fn scaling(rows: &[Row]) -> Vec<Answer> {
    let answer = || {
        let most = rows.iter().max_by_key(|row| row.labels.threads)?;
        let base = baseline(rows, most)?;
        let (threads, fewer) = (most.labels.threads, base.labels.threads);
        let question = format!(
            "turnaround with {threads} threads, {}, {}: speed against {fewer} thread{}",
            pages(most),
            verified(most),
            if fewer == 1 { "" } else { "s" }
        );
        Answer::speed(question, most, base)
    };
    answer().into_iter().collect()
}
