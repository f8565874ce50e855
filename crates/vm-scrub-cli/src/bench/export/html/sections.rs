//! Which plots a benchmark's results become, and what is said about them.

use super::bars::{Bar, BarPlot};
use super::curves::{loops, sparse};
use crate::bench::args::Benchmark;
use crate::bench::row::{Op, Row};
use crate::bench::table::baseline;
use crate::bench::units;
use maud::{Markup, html};
use vm_scrub::Verify;

/// A benchmark's groups: titles and rows.
pub(super) type Groups<'a> = [(&'a str, &'a [Row])];

/// What a benchmark is about.
pub(super) fn about(benchmark: Benchmark) -> &'static str {
    match benchmark {
        Benchmark::Loops => {
            "Each loop by itself, over the same memory again and again: what fits into a cache stays there. Fused means that \
             pieces are zeroed and read back while a cache still holds them. The loop that vm-scrub would choose has the large dots."
        }
        Benchmark::Turnaround => {
            "From memory of which a guest has written every byte to the next guest's memory: zero, resident and in the page \
             tables. Only vm-scrub reads every byte back (where it says verified), and only it takes the memory away from whoever \
             still has its addresses without giving it to the kernel."
        }
        Benchmark::Sparse => {
            "Memory of which a guest touched only a part. A lease is torn down (and leased again); the others clean an \
             embedder's own mapping in one thread, and afterwards the touched pages are there again, zero."
        }
        Benchmark::Guest => {
            "A KVM guest writes all of its RAM for the first time, by its own code: in memory that another guest had before \
             and that was scrubbed, and in memory that was mapped just now."
        }
        Benchmark::Neighbour => {
            "A workload on one core follows pointers through its cache while another core zeroes memory by one loop without a \
             pause, or while vm-scrub scrubs retired leases in the background there, with and without a throttle. Shown is \
             what one access takes; and, in plots of their own, how long the throttle takes for what it should let through in two seconds."
        }
        Benchmark::Scaling => {
            "The turnaround with one thread, and with as many threads as processors, and two, three and four times as many."
        }
    }
}

/// The plots of a benchmark.
pub(super) fn plots(benchmark: Benchmark, groups: &Groups<'_>) -> Markup {
    let (mut lines, mut bars) = (Vec::new(), Vec::new());
    match benchmark {
        Benchmark::Loops => {
            lines = loops(groups);
            bars = fused(groups);
        }
        Benchmark::Sparse => {
            lines = sparse(groups);
            let cases = groups
                .iter()
                .filter(|(_, rows)| rows[0].labels.touched_percent.is_none());
            bars.extend(cases.map(|(title, rows)| bar_plot(title, rows)));
        }
        _ => bars.extend(groups.iter().map(|(title, rows)| bar_plot(title, rows))),
    }
    html! {
        div.plots {
            @for plot in lines { (plot.draw()) }
            @for plot in bars { (plot.draw()) }
        }
    }
}

/// What a pointer shows.
pub(super) fn details(row: &Row) -> String {
    format!(
        "{}: median {}, quartiles {} to {}, {} to {} in {} runs",
        row.labels.name,
        units::time(row.median_ns),
        units::time(row.q1_ns),
        units::time(row.q3_ns),
        units::time(row.min_ns),
        units::time(row.max_ns),
        row.runs
    )
}

fn bar_plot(title: &str, rows: &[Row]) -> BarPlot {
    let rated = rows
        .iter()
        .all(|row| row.labels.accesses.is_none() && row.labels.touched_bytes.is_none());
    let compared = rows.iter().any(|row| row.comparison.is_some());
    let mut headings = vec!["median".into()];
    if rated {
        headings.push("rate".into());
    }
    if compared {
        headings.push("speed".into());
    }
    let asked = rows.iter().any(|row| row.of_asked.is_some());
    if asked {
        headings.push("of asked".into());
    }
    let bar = |row: &Row| {
        // A neighbour's time is that of one access, so that buffers of different sizes can be compared.
        let per = row.labels.accesses.unwrap_or(1).max(1) as f64;
        let mut figures = vec![units::time(row.median_ns / per)];
        if rated {
            figures.push(units::rate(row.gib_per_s));
        }
        if compared {
            let ratio = row
                .comparison
                .as_ref()
                .map(|compared| units::ratio(compared.ratio));
            figures.push(ratio.unwrap_or_default());
        }
        if asked {
            figures.push(
                row.of_asked
                    .map(|share| format!("{:.1} %", share * 100.0))
                    .unwrap_or_default(),
            );
        }
        Bar {
            label: label(row),
            own: is_own(row),
            median: row.median_ns / per,
            quartiles: (row.q1_ns / per, row.q3_ns / per),
            extremes: (row.min_ns / per, row.max_ns / per),
            figures,
            details: details(row),
        }
    };
    BarPlot {
        title: title.to_owned(),
        headings,
        aim: if asked {
            "as asked for is best"
        } else {
            "less is better"
        },
        note: if compared {
            format!("speed: {}", baseline(rows))
        } else {
            String::new()
        },
        bars: rows.iter().map(bar).collect(),
    }
}

fn label(row: &Row) -> String {
    let name = &row.labels.name;
    match (row.benchmark, row.labels.verify) {
        (Benchmark::Turnaround, verify) if is_own(row) => {
            let not = if verify == Some(Verify::Full) {
                ""
            } else {
                "not "
            };
            // Beside the plot there is room for so much; the heading says who that is.
            let who = match row.labels.unusual_revocation() {
                Some(_) => "by mremap",
                None => name,
            };
            format!("{who}, {not}verified")
        }
        _ => name.clone(),
    }
}

/// Whether a contender is vm-scrub, or what vm-scrub would choose.
pub(super) fn is_own(row: &Row) -> bool {
    match row.benchmark {
        Benchmark::Loops => {
            row.labels.calibrated == Some(true) && row.labels.op != Some(Op::Separate)
        }
        Benchmark::Neighbour => row.labels.name.starts_with("vm-scrub"),
        Benchmark::Scaling => true,
        _ => ["vm-scrub", "scrub-raw", "lease", "large-lease", "recycled"]
            .iter()
            .any(|own| row.labels.name.starts_with(own)),
    }
}

/// Zeroing and reading back at once, beside one after the other.
fn fused(groups: &Groups<'_>) -> Vec<BarPlot> {
    groups
        .iter()
        .filter(|(_, rows)| rows.iter().any(|row| row.labels.op == Some(Op::Separate)))
        .map(|(title, rows)| bar_plot(title, rows))
        .collect()
}
