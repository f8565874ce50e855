//! `--export-html`: one page that shows everything, and needs nothing but a browser.
//!
//! No scripts, no fonts, no images from elsewhere: styles and plots are in the page. Plots are drawn here rather than by a
//! library, so that they take their colours from the page's styles, for light and dark, and their text can be selected.

mod bars;
mod lines;
mod scale;
mod sections;

use super::Exporter;
use crate::bench::args::Benchmark;
use crate::bench::glance::{self, Glance};
use crate::bench::results::{Note, Results};
use crate::bench::row::Row;
use crate::bench::table::{Table, is_text};
use maud::{DOCTYPE, Markup, PreEscaped, html};

pub(crate) struct Html;

impl Exporter for Html {
    fn export(&self, results: &Results) -> anyhow::Result<Vec<u8>> {
        Ok(page(results).into_string().into_bytes())
    }
}

/// The page's styles. Nothing in them loads anything.
const STYLES: &str = include_str!("page.css");

fn page(results: &Results) -> Markup {
    let benchmarks = results.benchmarks();
    let glances = glance::of(results);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "vm-scrub bench: " (results.setup.cpu) }
                style { (PreEscaped(STYLES)) }
            }
            body {
                header {
                    h1 { "vm-scrub bench" }
                    p.lead { (results.setup.cpu) ", Linux " (results.setup.kernel) ", " (results.setup.date) }
                    nav {
                        @for benchmark in &benchmarks {
                            a href={ "#" (benchmark) } { (benchmark) }
                        }
                        a href="#setup" { "setup" }
                    }
                }
                main {
                    @for benchmark in benchmarks {
                        (section(results, benchmark, &glances))
                    }
                    (setup(results))
                }
            }
        }
    }
}

fn section(results: &Results, benchmark: Benchmark, glances: &[Glance]) -> Markup {
    let groups = results.groups(benchmark);
    html! {
        section id=(benchmark) {
            h2 { (benchmark) }
            p { (sections::about(benchmark)) }
            div.cards {
                @for glance in glances.iter().filter(|glance| glance.benchmark == benchmark) {
                    div.card { strong { (glance.figure) } span { (glance.what) } }
                }
            }
            (sections::plots(benchmark, &groups))
            details {
                summary { "All figures" }
                @for (title, rows) in &groups {
                    h3 { (title) }
                    (table(&Table::of(rows)))
                    (warnings(rows))
                }
            }
        }
    }
}

fn table(table: &Table) -> Markup {
    html! {
        div.scroll {
            table {
                thead { tr { @for heading in &table.headings { th { (heading) } } } }
                tbody {
                    @for row in &table.rows {
                        tr {
                            @for (column, cell) in row.iter().enumerate() {
                                td.text[is_text(column, cell)] { (cell) }
                            }
                        }
                    }
                }
            }
        }
    }
}

fn warnings(rows: &[Row]) -> Markup {
    html! {
        @let warnings = crate::bench::results::by_warning(rows);
        @if !warnings.is_empty() {
            ul.warnings {
                @for (warning, whom) in warnings {
                    li { (whom) ": " (warning) ". " span { (warning.advice()) "." } }
                }
            }
        }
    }
}

fn setup(results: &Results) -> Markup {
    html! {
        section id="setup" {
            h2 { "setup" }
            p {
                "Contenders of a group took turns (A B A B) after warm-up, and what each left behind was looked at after each run. "
                "Figures are medians; thick marks are quartiles, thin ones the fastest and the slowest run. Compare within a "
                "group: times on one machine say little about another."
            }
            dl {
                @for (what, fact) in results.setup.facts() {
                    div { dt { (what) } dd { (fact) } }
                }
            }
            (notes("Skipped", &results.skipped))
            (notes("Failed", &results.failed))
        }
    }
}

fn notes(heading: &str, notes: &[Note]) -> Markup {
    html! {
        @if !notes.is_empty() {
            h3 { (heading) }
            ul {
                @for note in notes {
                    li {
                        (note.benchmark) ", " (note.group)
                        @if let Some(contender) = &note.contender { ", " (contender) }
                        ": " (note.reason)
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;
    use roxmltree::Document;

    fn exported() -> String {
        String::from_utf8(Html.export(&samples::results()).expect("exported")).expect("text")
    }

    /// HTML's elements without an end become XML's, and everything else must be well-formed as it is.
    fn as_xml(page: &str) -> String {
        let mut xml = String::new();
        for (at, part) in page
            .trim_start_matches("<!DOCTYPE html>")
            .split("<meta ")
            .enumerate()
        {
            if at > 0 {
                let (attributes, rest) = part.split_once('>').expect("an end");
                xml.push_str(&format!("<meta {attributes}/>{rest}"));
            } else {
                xml.push_str(part);
            }
        }
        xml
    }

    #[test]
    fn the_page_is_well_formed_and_has_a_plot_for_each_benchmark() {
        let xml = as_xml(&exported());
        let page = Document::parse(&xml).expect("well-formed");
        for benchmark in samples::results().benchmarks() {
            let section = page
                .descendants()
                .find(|node| node.attribute("id") == Some(benchmark.name()))
                .expect("a section");
            let plots = section
                .descendants()
                .filter(|node| node.has_tag_name("svg"));
            assert!(plots.count() > 0, "{benchmark}");
        }
        let ids: Vec<_> = page
            .descendants()
            .filter_map(|node| node.attribute("id"))
            .collect();
        for link in page.descendants().filter_map(|node| node.attribute("href")) {
            assert!(ids.contains(&&link[1..]), "{link} leads nowhere");
        }
    }

    #[test]
    fn nothing_is_loaded_from_anywhere() {
        let text = exported();
        for never in [
            "http:",
            "https:",
            "//",
            "url(",
            "@import",
            "<script",
            "<link",
            "<img",
            "src=",
            "javascript:",
            "onload",
        ] {
            assert!(!text.contains(never), "{never}");
        }
    }

    #[test]
    fn text_is_escaped() {
        let text = exported();
        assert!(text.contains("a&lt;b&gt;&amp;&quot;c&quot;"), "{text}");
        assert!(text.contains("no /dev/kvm &lt;here&gt;"));
        assert!(!text.contains("a<b>"));
    }

    #[test]
    fn every_coordinate_is_inside_its_plot() {
        let xml = as_xml(&exported());
        let page = Document::parse(&xml).expect("well-formed");
        for plot in page.descendants().filter(|node| node.has_tag_name("svg")) {
            let view: Vec<f64> = plot
                .attribute("viewBox")
                .expect("a view")
                .split(' ')
                .map(|number| number.parse().expect("a number"))
                .collect();
            for node in plot.descendants() {
                for (name, limit) in [
                    ("x", view[2]),
                    ("x1", view[2]),
                    ("x2", view[2]),
                    ("y", view[3]),
                    ("y1", view[3]),
                    ("y2", view[3]),
                    ("width", view[2]),
                ] {
                    if let Some(value) = node.attribute(name) {
                        let value: f64 = value.parse().expect("a number, not NaN");
                        assert!((0.0..=limit).contains(&value), "{name}={value} in {view:?}");
                    }
                }
            }
        }
    }
}
