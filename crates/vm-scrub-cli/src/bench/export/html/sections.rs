//! Which plots a benchmark's results become, and what is said about them.

use super::bars::{Bar, BarPlot};
use super::lines::{Line, LinePlot, Point};
use crate::bench::args::Benchmark;
use crate::bench::row::{Op, Row, gib_per_s};
use crate::bench::table::baseline;
use crate::bench::units;
use maud::{Markup, html};
use vm_scrub::Verify;

/// A benchmark's groups: titles and rows.
type Groups<'a> = [(&'a str, &'a [Row])];

/// What a benchmark is about.
pub(super) fn about(benchmark: Benchmark) -> &'static str {
    match benchmark {
        Benchmark::Loops => {
            "Each loop by itself, over the same memory again and again: what fits into a cache stays there. Fused means that \
             pieces of 256 KiB are zeroed and read back at once. The loop that vm-scrub would choose has the large dots."
        }
        Benchmark::Turnaround => {
            "From memory of which a guest has written every byte to the next guest's memory: zero, resident and in the page \
             tables. Only vm-scrub also takes the memory away from the old guest and reads every byte back."
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
            "A workload on one core follows pointers through its cache while another core zeroes memory without a pause. \
             Shown is what one access takes."
        }
        Benchmark::Scaling => {
            "The turnaround with one thread, and with as many threads as processors, twice and four times as many."
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
fn details(row: &Row) -> String {
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
        (Benchmark::Turnaround, Some(Verify::Full)) => format!("{name}, verified"),
        (Benchmark::Turnaround, _) if is_own(row) => format!("{name}, not verified"),
        _ => name.clone(),
    }
}

/// Whether a contender is vm-scrub, or what vm-scrub would choose.
fn is_own(row: &Row) -> bool {
    match row.benchmark {
        Benchmark::Loops | Benchmark::Neighbour => row.labels.calibrated == Some(true),
        Benchmark::Scaling => true,
        _ => ["vm-scrub", "scrub-raw", "lease", "large-lease", "recycled"]
            .iter()
            .any(|own| row.labels.name.starts_with(own)),
    }
}

/// Rates by size: a plot for each operation, page size and number of threads.
fn loops(groups: &Groups<'_>) -> Vec<LinePlot> {
    let mut plots: Vec<(String, LinePlot)> = Vec::new();
    for row in groups.iter().flat_map(|(_, rows)| rows.iter()) {
        let Some(op) = row.labels.op.filter(|op| *op != Op::Separate) else {
            continue;
        };
        let threads = row.labels.threads;
        let page_size = row.labels.page_size.unwrap_or_default();
        let title = format!(
            "{}, {page_size}, {threads} thread{}",
            op.name(),
            if threads == 1 { "" } else { "s" }
        );
        let (bytes, by_loop) = (
            row.labels.bytes,
            row.labels.by_loop.clone().unwrap_or_default(),
        );
        let rate = |nanos| gib_per_s(bytes, nanos);
        let point = Point {
            x: bytes as f64,
            y: row.gib_per_s,
            spread: (rate(row.q3_ns), rate(row.q1_ns)),
            marked: row.labels.calibrated == Some(true),
            details: format!(
                "{}, {}: {}",
                units::size(bytes),
                units::rate(row.gib_per_s),
                details(row)
            ),
        };
        let plot = entry(&mut plots, title, |title| LinePlot {
            title,
            x_name: "size, all threads together".into(),
            y_name: "GiB/s, more is better".into(),
            y_logarithmic: false,
            y_unit: 1.0,
            x_ticks: Vec::new(),
            lines: Vec::new(),
        });
        add_point(plot, by_loop, point, || {
            units::size(bytes).replace(' ', "\u{a0}")
        });
    }
    plots.into_iter().map(|(_, plot)| plot).collect()
}

/// Zeroing and reading back at once, beside one after the other.
fn fused(groups: &Groups<'_>) -> Vec<BarPlot> {
    groups
        .iter()
        .filter(|(_, rows)| rows.iter().any(|row| row.labels.op == Some(Op::Separate)))
        .map(|(title, rows)| bar_plot(title, rows))
        .collect()
}

/// Times by what was touched: a plot for each kind of page and pattern.
fn sparse(groups: &Groups<'_>) -> Vec<LinePlot> {
    let mut plots: Vec<(String, LinePlot)> = Vec::new();
    // Where everything was touched there is no pattern; the point belongs into every plot.
    for row in groups.iter().flat_map(|(_, rows)| rows.iter()) {
        let (Some(percent), Some(pattern)) = (row.labels.touched_percent, row.labels.pattern)
        else {
            continue;
        };
        let page_size = row.labels.page_size.unwrap_or_default();
        let prefix = format!("{}, {page_size}", units::size(row.labels.bytes));
        let titles: Vec<String> = if percent < 100.0 {
            vec![format!("{prefix}, touched pages {}", pattern.name())]
        } else {
            let of_this =
                |(title, _): &(String, LinePlot)| title.starts_with(&prefix).then(|| title.clone());
            plots.iter().filter_map(of_this).collect()
        };
        for title in titles {
            let point = Point {
                x: percent,
                y: row.median_ns,
                spread: (row.q1_ns, row.q3_ns),
                marked: is_own(row),
                details: format!("{percent} % touched, {}", details(row)),
            };
            let plot = entry(&mut plots, title, |title| LinePlot {
                title,
                x_name: "memory that was touched".into(),
                y_name: "ms, less is better".into(),
                y_logarithmic: true,
                y_unit: 1e6,
                x_ticks: Vec::new(),
                lines: Vec::new(),
            });
            add_point(plot, row.labels.name.clone(), point, || {
                format!("{percent} %")
            });
        }
    }
    plots.into_iter().map(|(_, plot)| plot).collect()
}

fn entry(
    plots: &mut Vec<(String, LinePlot)>,
    title: String,
    make: impl FnOnce(String) -> LinePlot,
) -> &mut LinePlot {
    let at = plots
        .iter()
        .position(|(each, _)| *each == title)
        .unwrap_or_else(|| {
            plots.push((title.clone(), make(title)));
            plots.len() - 1
        });
    &mut plots[at].1
}

fn add_point(plot: &mut LinePlot, name: String, point: Point, tick: impl FnOnce() -> String) {
    if plot.x_ticks.iter().all(|(x, _)| *x != point.x) {
        plot.x_ticks.push((point.x, tick()));
    }
    match plot.lines.iter_mut().find(|line| line.name == name) {
        Some(line) => line.points.push(point),
        None => plot.lines.push(Line {
            name,
            points: vec![point],
        }),
    }
}
