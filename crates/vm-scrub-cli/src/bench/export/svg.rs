//! `--export-svg`: the turnaround in one picture, for a README or a slide.
//!
//! A file of its own: no scripts, no fonts, nothing from elsewhere. It brings its background along, because nobody knows on
//! which page it will lie, and follows the reader's preference for light or dark where that is known. Rates rather than times,
//! so that pages of all sizes fit on one axis.

use super::Exporter;
use super::scale::{Scale, place};
use crate::bench::args::Benchmark;
use crate::bench::results::Results;
use crate::bench::row::{Row, gib_per_s};
use crate::bench::units;
use maud::{Markup, PreEscaped, html};
use vm_scrub::{PageSize, Verify};

pub(crate) struct Svg;

/// The picture's own units, about a pixel each.
const WIDTH: f64 = 800.0;
const MARGIN: f64 = 20.0;
const LABELS: f64 = 240.0;
const COLUMN: f64 = 78.0;
const HEADER: f64 = 92.0;
const PANEL: f64 = 30.0;
const ROW: f64 = 20.0;
const BAR: f64 = 13.0;
const FOOTER: f64 = 58.0;
/// Where bars begin and may end.
const LEFT: f64 = MARGIN + LABELS + 10.0;
const RIGHT: f64 = WIDTH - MARGIN - 2.0 * COLUMN - 6.0;

/// Literal colours in rules without variables, which programs other than browsers do not know either.
const STYLES: &str = "\
text{font:13px system-ui,'Segoe UI',Roboto,'Noto Sans','DejaVu Sans',sans-serif;fill:#1d2126}\
.page{fill:#fff;stroke:#d5d9de}.title{font-size:16px;font-weight:600}.soft{font-size:12px;fill:#5c6670}\
.panel{font-weight:600}.end{text-anchor:end}.middle{text-anchor:middle}.grid{stroke:#e3e5e8}\
.bar{fill:#b4bcc4}.own .bar{fill:#5aa9a4}.full .bar{fill:#0b7a75}.own text{font-weight:600}.spread{stroke:#22303a;stroke-width:1.5}\
@media(prefers-color-scheme:dark){text{fill:#e6e9ec}.page{fill:#1c2024;stroke:#3a4148}.soft{fill:#9aa4ae}.grid{stroke:#30363c}\
.bar{fill:#56616b}.own .bar{fill:#1d7f78}.full .bar{fill:#2bb3a8}.spread{stroke:#e6e9ec}}";

impl Exporter for Svg {
    fn export(&self, results: &Results) -> anyhow::Result<Vec<u8>> {
        Ok((picture(results).into_string() + "\n").into_bytes())
    }
}

/// The first group of each page size.
fn panels(results: &Results) -> Vec<(PageSize, &[Row])> {
    let mut panels: Vec<(PageSize, &[Row])> = Vec::new();
    for (_, rows) in results.groups(Benchmark::Turnaround) {
        let page_size = rows[0].labels.page_size.unwrap_or_default();
        if panels.iter().all(|(other, _)| *other != page_size) {
            panels.push((page_size, rows));
        }
    }
    panels
}

fn picture(results: &Results) -> Markup {
    let panels = panels(results);
    let rows = || panels.iter().flat_map(|(_, rows)| rows.iter());
    let highest = rows().map(|row| rate(row, row.q1_ns)).fold(0.0, f64::max);
    let scale = Scale::linear(highest, LEFT, RIGHT);
    let bottoms: Vec<f64> = panels
        .iter()
        .scan(HEADER, |top, (_, rows)| {
            *top += PANEL + ROW * rows.len() as f64;
            Some(*top)
        })
        .collect();
    let floor = bottoms.last().copied().unwrap_or(HEADER) + 6.0;
    let height = floor + FOOTER;
    let title = "From a dirty guest to the next guest's memory: zero and resident";
    let setup = &results.setup;
    html! {
        svg xmlns="http://www.w3.org/2000/svg" viewBox={ "0 0 " (WIDTH) " " (place(height)) } width=(WIDTH) height=(place(height)) role="img" aria-label=(title) {
            title { (title) }
            style { (PreEscaped(STYLES)) }
            rect.page x="0.5" y="0.5" width=(WIDTH - 1.0) height=(place(height - 1.0)) rx="8" {}
            text.title x=(MARGIN) y="32" { (title) }
            text.soft x=(MARGIN) y="52" { (subtitle(rows().next())) }
            text.soft x=(MARGIN) y="68" {
                "Only vm-scrub reads back; the last three of each leave the memory where the old guest can write to it."
            }
            @for (value, text) in scale.ticks(1.0) {
                @let x = place(scale.at(value));
                line.grid x1=(x) x2=(x) y1=(HEADER) y2=(place(floor)) {}
                text class="soft middle" x=(x) y=(place(floor + 16.0)) { (text) }
            }
            text class="soft middle" x=(place(f64::midpoint(LEFT, RIGHT))) y=(place(floor + 33.0)) { "GiB/s, more is better" }
            text class="soft end" x=(WIDTH - MARGIN) y=(place(floor + 16.0)) { "speed: munmap = 1" }
            text.soft x=(MARGIN) y=(place(floor + 46.0)) { (setup.cpu) ", Linux " (setup.kernel) }
            @for ((page_size, rows), bottom) in panels.iter().zip(&bottoms) {
                @let top = bottom - ROW * rows.len() as f64;
                text.panel x=(MARGIN) y=(place(top - 8.0)) { (pages(*page_size)) }
                @for (number, row) in rows.iter().enumerate() {
                    (bar(row, top + ROW * number as f64, &scale))
                }
            }
        }
    }
}

fn subtitle(row: Option<&Row>) -> String {
    row.map_or("not measured".into(), |row| {
        let bytes = units::size(row.labels.bytes);
        let threads = match row.labels.threads {
            1 => "1 thread".into(),
            more => format!("{more} threads where not said otherwise"),
        };
        format!("{bytes}, {threads}; lines: the middle half of the runs")
    })
}

fn bar(row: &Row, top: f64, scale: &Scale) -> Markup {
    let middle = top + ROW / 2.0;
    let zero = scale.at(0.0);
    let (low, high) = (
        scale.at(rate(row, row.q3_ns)),
        scale.at(rate(row, row.q1_ns)),
    );
    let own = row.labels.name == "vm-scrub";
    let full = own && row.labels.verify == Some(Verify::Full);
    let text = place(middle + 4.5);
    html! {
        g.own[own].full[full] {
            text.end x=(LEFT - 10.0) y=(text) { (label(row)) }
            rect.bar x=(place(zero)) y=(place(middle - BAR / 2.0)) width=(place(scale.at(row.gib_per_s) - zero)) height=(BAR) rx="2" {}
            line.spread x1=(place(low)) x2=(place(high)) y1=(place(middle)) y2=(place(middle)) {}
            text.end x=(WIDTH - MARGIN - COLUMN + 12.0) y=(text) { (units::rate(row.gib_per_s)) }
            @if let Some(compared) = &row.comparison {
                text.end x=(WIDTH - MARGIN) y=(text) { (units::ratio(compared.ratio)) }
            }
        }
    }
}

fn rate(row: &Row, nanos: f64) -> f64 {
    gib_per_s(row.labels.bytes, nanos)
}

fn pages(page_size: PageSize) -> &'static str {
    match page_size {
        PageSize::Base4K => "4 KiB pages",
        PageSize::Transparent => "Transparent huge pages",
        _ => "hugetlb pages of 2 MiB",
    }
}

fn label(row: &Row) -> String {
    let mremap = row.labels.unusual_revocation().is_some();
    match (row.labels.name.as_str(), row.labels.verify) {
        ("vm-scrub", Some(Verify::Full)) if mremap => "by mremap, every byte read back".into(),
        ("vm-scrub", Some(Verify::Full)) => "vm-scrub, every byte read back".into(),
        ("vm-scrub", _) if mremap => "by mremap, not read back".into(),
        ("vm-scrub", _) => "vm-scrub, not read back".into(),
        ("munmap-mmap-populate", _) => "munmap + mmap + populate".into(),
        ("dontneed-populate", _) => "MADV_DONTNEED + populate".into(),
        ("punch-hole-populate", _) => "memfd punch-hole + populate".into(),
        ("write-bytes", _) => "write_bytes, 1 thread".into(),
        ("rayon-fill", _) => "rayon fill(0)".into(),
        ("zeroize", _) => "zeroize, 1 thread".into(),
        (other, _) => other.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;
    use roxmltree::Document;

    fn exported(results: &Results) -> String {
        String::from_utf8(Svg.export(results).expect("exported")).expect("text")
    }

    /// The usual results, and the same in small pages.
    fn results() -> Results {
        let mut results = samples::results();
        let small = results.rows[..3].iter().cloned().map(|mut row| {
            row.labels.page_size = Some(PageSize::Base4K);
            row.group = "1 GiB, 4k, 2 threads".into();
            row
        });
        let small: Vec<Row> = small.collect();
        results.rows.splice(0..0, small);
        results
    }

    #[test]
    fn every_turnaround_has_a_bar_as_long_as_its_rate() {
        let text = exported(&results());
        let picture = Document::parse(&text).expect("well-formed");
        let bars: Vec<f64> = picture
            .descendants()
            .filter(|node| node.attribute("class") == Some("bar"))
            .map(|bar| {
                bar.attribute("width")
                    .expect("a width")
                    .parse()
                    .expect("a number")
            })
            .collect();
        assert_eq!(bars.len(), 6);
        assert!((bars[1] / bars[0] - 2.0).abs() < 0.01, "{bars:?}");
        assert!((bars[0] / bars[2] - 2.0).abs() < 0.01, "{bars:?}");
        let texts: Vec<_> = picture
            .descendants()
            .filter_map(|node| node.text())
            .collect();
        for expected in [
            "4 KiB pages",
            "Transparent huge pages",
            "vm-scrub, not read back",
            "50.0 GiB/s",
            "4.00×",
        ] {
            assert!(texts.contains(&expected), "{expected}: {texts:?}");
        }
    }

    #[test]
    fn it_stands_alone_and_draws_inside_its_frame() {
        let text = exported(&results());
        let body = text.replacen("xmlns=\"http://www.w3.org/2000/svg\"", "", 1);
        for never in [
            "http", "//", "url(", "@import", "<script", "<image", "href", "var(",
        ] {
            assert!(!body.contains(never), "{never}");
        }
        let picture = Document::parse(&text).expect("well-formed");
        let height: f64 = picture
            .root_element()
            .attribute("height")
            .expect("a height")
            .parse()
            .expect("a number");
        for node in picture.descendants() {
            for (name, limit) in [
                ("x", WIDTH),
                ("x1", WIDTH),
                ("x2", WIDTH),
                ("y", height),
                ("y1", height),
                ("y2", height),
            ] {
                if let Some(value) = node.attribute(name) {
                    let value: f64 = value.parse().expect("a number, not NaN");
                    assert!((0.0..=limit).contains(&value), "{name}={value}");
                }
            }
        }
    }

    #[test]
    fn without_a_turnaround_it_says_so() {
        let mut results = samples::results();
        results.rows.clear();
        let text = exported(&results);
        assert!(text.contains("not measured"), "{text}");
        assert!(Document::parse(&text).is_ok());
    }
}
