//! A plot of lines: how something changes along an axis, one line for each contender, named at its end.

use super::super::scale::{Scale, place};
use maud::{Markup, html};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 330.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 126.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 44.0;
/// Names at line ends are at least this far apart.
const NAME: f64 = 15.0;

/// Colours that the page's styles have for lines.
const COLOURS: usize = 6;

/// What was measured at one place.
#[derive(Debug, Clone)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    /// Quartiles.
    pub(super) spread: (f64, f64),
    /// Whether it is to stand out.
    pub(super) marked: bool,
    /// What a pointer shows that rests on it.
    pub(super) details: String,
}

/// A contender's points, by ascending x.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) points: Vec<Point>,
}

/// Lines that may be compared. x is logarithmic.
#[derive(Debug, Clone)]
pub(super) struct LinePlot {
    pub(super) title: String,
    /// What the axes show.
    pub(super) x_name: String,
    pub(super) y_name: String,
    /// Whether y is logarithmic, too.
    pub(super) y_logarithmic: bool,
    /// What y is divided by for the numbers at its axis.
    pub(super) y_unit: f64,
    /// Numbers at the x axis.
    pub(super) x_ticks: Vec<(f64, String)>,
    pub(super) lines: Vec<Line>,
}

impl LinePlot {
    /// Draws it.
    pub(super) fn draw(&self) -> Markup {
        let points = || self.lines.iter().flat_map(|line| &line.points);
        let least = |of: fn(&Point) -> f64| points().map(of).fold(f64::INFINITY, f64::min);
        let most = |of: fn(&Point) -> f64| points().map(of).fold(0.0, f64::max);
        let (right, floor) = (WIDTH - RIGHT, HEIGHT - BOTTOM);
        let x = Scale::logarithmic(
            least(|point| point.x),
            most(|point| point.x),
            LEFT + 14.0,
            right - 10.0,
        );
        let y = if self.y_logarithmic {
            Scale::logarithmic(
                least(|point| point.spread.0) * 0.8,
                most(|point| point.spread.1) * 1.2,
                floor,
                TOP,
            )
        } else {
            Scale::linear(most(|point| point.spread.1), floor, TOP)
        };
        html! {
            figure {
                figcaption { (self.title) }
                svg viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(self.title) {
                    @for (value, text) in y.ticks(self.y_unit) {
                        @let at = y.at(value);
                        line.grid x1=(LEFT) x2=(place(right)) y1=(place(at)) y2=(place(at)) {}
                        text.tick.end x=(LEFT - 8.0) y=(place(at + 4.0)) { (text) }
                    }
                    text.tick.middle x="13" y=(place(floor / 2.0)) transform={ "rotate(-90 13 " (place(floor / 2.0)) ")" } { (self.y_name) }
                    @for (value, text) in &self.x_ticks {
                        text.tick.middle x=(place(x.at(*value))) y=(place(floor + 17.0)) { (text) }
                    }
                    text.tick.middle x=(place(f64::midpoint(LEFT, right))) y=(place(HEIGHT - 8.0)) { (self.x_name) }
                    @for (number, line) in self.lines.iter().enumerate() {
                        (draw_line(line, number, &x, &y))
                    }
                    @for (number, at) in self.name_places(&y, floor).into_iter().enumerate() {
                        text class={ "name c" (number % COLOURS) } x=(place(right + 6.0)) y=(place(at + 4.0)) { (self.lines[number].name) }
                    }
                }
            }
        }
    }

    /// Where each line's name goes: as high as the line ends, but not over another name.
    fn name_places(&self, y: &Scale, floor: f64) -> Vec<f64> {
        let wanted: Vec<f64> = self
            .lines
            .iter()
            .map(|line| line.points.last().map_or(floor, |point| y.at(point.y)))
            .collect();
        let mut order: Vec<usize> = (0..wanted.len()).collect();
        order.sort_by(|one, other| wanted[*one].total_cmp(&wanted[*other]));
        let mut places = wanted.clone();
        let mut free = TOP;
        for &line in &order {
            places[line] = wanted[line].max(free);
            free = places[line] + NAME;
        }
        // What was pushed below the floor goes up again, and pushes.
        // Above the numbers at the axis.
        let mut ceiling = floor - 6.0;
        for &line in order.iter().rev() {
            places[line] = places[line].min(ceiling);
            ceiling = places[line] - NAME;
        }
        places
    }
}

fn draw_line(line: &Line, number: usize, x: &Scale, y: &Scale) -> Markup {
    let path: Vec<String> = line
        .points
        .iter()
        .map(|point| format!("{},{}", place(x.at(point.x)), place(y.at(point.y))))
        .collect();
    html! {
        g class={ "line c" (number % COLOURS) } {
            polyline points=(path.join(" ")) {}
            @for point in &line.points {
                @let (across, up) = (x.at(point.x), y.at(point.y));
                g {
                    title { (point.details) }
                    line x1=(place(across)) x2=(place(across)) y1=(place(y.at(point.spread.0))) y2=(place(y.at(point.spread.1))) {}
                    circle.marked[point.marked] cx=(place(across)) cy=(place(up)) r=(if point.marked { "5" } else { "3" }) {}
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_do_not_lie_on_each_other() {
        let line = |y| Line {
            name: "a".into(),
            points: vec![Point {
                x: 1.0,
                y,
                spread: (y, y),
                marked: false,
                details: String::new(),
            }],
        };
        let plot = LinePlot {
            title: String::new(),
            x_name: String::new(),
            y_name: String::new(),
            y_logarithmic: false,
            y_unit: 1.0,
            x_ticks: Vec::new(),
            lines: vec![line(1.0), line(1.0), line(100.0), line(1.1), line(0.0)],
        };
        let floor = 300.0;
        let mut places = plot.name_places(&Scale::linear(100.0, floor, TOP), floor);
        places.sort_by(f64::total_cmp);
        assert!(
            places
                .windows(2)
                .all(|pair| pair[1] - pair[0] >= NAME - 0.01),
            "{places:?}"
        );
        assert!(places[0] >= TOP && places[4] <= floor, "{places:?}");
    }
}
