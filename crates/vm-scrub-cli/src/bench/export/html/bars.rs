//! A plot of bars: one for each contender, with the spread of its times and its figures beside it.

use super::super::scale::{Scale, place};
use crate::bench::units;
use maud::{Markup, html};

/// Widths in the plot's own units, about a pixel each.
const WIDTH: f64 = 720.0;
const LABELS: f64 = 192.0;
const COLUMN: f64 = 84.0;
const GAP: f64 = 12.0;
const ROW: f64 = 27.0;
const BAR: f64 = 15.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 40.0;

/// A contender. Times are in nanoseconds.
#[derive(Debug, Clone)]
pub(super) struct Bar {
    pub(super) label: String,
    /// Whether it is what the plot is about, rather than what it is compared with.
    pub(super) own: bool,
    pub(super) median: f64,
    pub(super) quartiles: (f64, f64),
    pub(super) extremes: (f64, f64),
    /// Figures, one for each heading.
    pub(super) figures: Vec<String>,
    /// What a pointer shows that rests on it.
    pub(super) details: String,
}

/// Bars that may be compared.
#[derive(Debug, Clone)]
pub(super) struct BarPlot {
    pub(super) title: String,
    pub(super) headings: Vec<String>,
    /// Which times are good ones.
    pub(super) aim: &'static str,
    /// What the figures need to be understood; may be empty.
    pub(super) note: String,
    pub(super) bars: Vec<Bar>,
}

impl BarPlot {
    /// Draws it.
    pub(super) fn draw(&self) -> Markup {
        let right = WIDTH - COLUMN * self.headings.len() as f64 - GAP;
        let height = TOP + ROW * self.bars.len() as f64 + BOTTOM;
        let floor = height - BOTTOM;
        // The slowest run of all may be far out; the slowest quarter is what has to fit.
        let longest = self
            .bars
            .iter()
            .map(|bar| bar.quartiles.1)
            .fold(0.0, f64::max);
        let scale = Scale::linear(longest, LABELS + GAP, right);
        let (unit, unit_name) = units::unit_of(longest);
        html! {
            figure {
                figcaption { (self.title) }
                svg viewBox={ "0 0 " (WIDTH) " " (place(height)) } role="img" aria-label=(self.title) {
                    @for (value, text) in scale.ticks(unit) {
                        @let x = place(scale.at(value));
                        line.grid x1=(x) x2=(x) y1=(TOP) y2=(place(floor)) {}
                        text.tick.middle x=(x) y=(place(floor + 15.0)) { (text) }
                    }
                    text.tick.middle x=(place(f64::midpoint(LABELS + GAP, right))) y=(place(floor + 32.0)) { (unit_name) ", " (self.aim) }
                    text.tick.end x=(place(WIDTH)) y=(place(floor + 32.0)) { (self.note) }
                    @for (column, heading) in self.headings.iter().enumerate() {
                        text.tick.end x=(place(right + GAP + COLUMN * (column + 1) as f64)) y=(place(TOP - 10.0)) { (heading) }
                    }
                    @for (row, bar) in self.bars.iter().enumerate() {
                        (draw_bar(bar, TOP + ROW * row as f64, right, &scale))
                    }
                }
            }
        }
    }
}

fn draw_bar(bar: &Bar, top: f64, right: f64, scale: &Scale) -> Markup {
    let middle = top + ROW / 2.0;
    let zero = scale.at(0.0);
    let (low, high) = (scale.at(bar.extremes.0), scale.at(bar.extremes.1));
    let (q1, q3) = (scale.at(bar.quartiles.0), scale.at(bar.quartiles.1));
    html! {
        g.bar.own[bar.own] {
            title { (bar.details) }
            text.label.end x=(place(LABELS)) y=(place(middle + 4.0)) { (bar.label) }
            rect x=(place(zero)) y=(place(middle - BAR / 2.0)) width=(place(scale.at(bar.median) - zero)) height=(place(BAR)) rx="2" {}
            line.range x1=(place(low)) x2=(place(high)) y1=(place(middle)) y2=(place(middle)) {}
            line.quartiles x1=(place(q1)) x2=(place(q3)) y1=(place(middle)) y2=(place(middle)) {}
            @for (column, figure) in bar.figures.iter().enumerate() {
                text.figure.end x=(place(right + GAP + COLUMN * (column + 1) as f64)) y=(place(middle + 4.0)) { (figure) }
            }
        }
    }
}
