//! `--export-html`: one page that shows everything, and needs nothing but a browser.
//!
//! No scripts, no fonts, no images from elsewhere: styles and plots are in the page. Plots are drawn here rather than by a
//! library, so that they take their colours from the page's styles, for light and dark, and their text can be selected.

mod bars;
mod curves;
mod lines;
mod sections;

use super::Exporter;
use crate::bench::args::Benchmark;
use crate::bench::results::{Note, Results};
use crate::bench::row::Row;
use crate::bench::summary::{self, Answer, Quantity, Standing};
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
    let answers = summary::of(results);
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
                        @if !answers.is_empty() { a href="#summary" { "summary" } }
                        @for benchmark in &benchmarks {
                            a href={ "#" (benchmark) } { (benchmark) }
                        }
                        a href="#setup" { "setup" }
                    }
                }
                main {
                    @if !answers.is_empty() {
                        section id="summary" {
                            h2 { "summary" }
                            p {
                                (summary::ABOUT) " Green is better than what it is compared with, red is worse, and what "
                                "is within 5 % of it has no colour; a rate is green if it is that near to the one asked for."
                            }
                            @for of in Quantity::ALL { (ratios(of, &answers)) }
                        }
                    }
                    @for benchmark in benchmarks {
                        (section(results, benchmark, &answers))
                    }
                    (setup(results))
                }
            }
        }
    }
}

fn section(results: &Results, benchmark: Benchmark, answers: &[Answer]) -> Markup {
    let groups = results.groups(benchmark);
    html! {
        section id=(benchmark) {
            h2 { (benchmark) }
            p { (sections::about(benchmark)) }
            div.cards {
                @for answer in answers.iter().filter(|answer| answer.benchmark == benchmark) {
                    div.card.(class(answer)) {
                        strong { (answer.figure()) }
                        small { (answer.of.aim()) }
                        span { (answer.question) }
                    }
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

/// The answers that are ratios of the same quantity.
fn ratios(of: Quantity, answers: &[Answer]) -> Markup {
    let answers: Vec<Answer> = answers
        .iter()
        .filter(|answer| answer.of == of)
        .cloned()
        .collect();
    html! {
        @if !answers.is_empty() {
            h3 { (of.aim()) }
            (table_with(&summary::table(&answers), |row| class(&answers[row])))
        }
    }
}

/// What the page's styles call a ratio's standing.
fn class(answer: &Answer) -> &'static str {
    match answer.standing() {
        Standing::Good => "good",
        Standing::Even => "even",
        Standing::Bad => "bad",
    }
}

fn table(table: &Table) -> Markup {
    table_with(table, |_| "")
}

/// A table of which each row has a class.
fn table_with(table: &Table, class: impl Fn(usize) -> &'static str) -> Markup {
    html! {
        div.scroll {
            table {
                thead { tr { @for heading in &table.headings { th { (heading) } } } }
                tbody {
                    @for (number, row) in table.rows.iter().enumerate() {
                        @let class = Some(class(number)).filter(|class| !class.is_empty());
                        tr class=[class] {
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
mod tests;
