//! Results that lie along an axis: rates by size, and times by how much was touched.

use super::lines::{Line, LinePlot, Point};
use super::sections::{Groups, details, is_own};
use crate::bench::row::{Op, gib_per_s};
use crate::bench::units;

/// Rates by size: a plot for each operation, page size and number of threads.
pub(super) fn loops(groups: &Groups<'_>) -> Vec<LinePlot> {
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

/// Times by what was touched: a plot for each kind of page and pattern.
pub(super) fn sparse(groups: &Groups<'_>) -> Vec<LinePlot> {
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
