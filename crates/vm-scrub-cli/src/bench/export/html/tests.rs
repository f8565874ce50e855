//! The page is well-formed, needs nothing from elsewhere, and draws inside its plots.

use super::super::samples;
use super::*;
use crate::bench::row::{Labels, Pattern};
use roxmltree::Document;
use vm_scrub::{PageSize, Revocation, Verify};

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
fn ratios_are_grouped_by_what_they_are_of_and_bad_ones_do_not_look_good() {
    let mut results = samples::results();
    // A benchmark's rows are one behind the other.
    results
        .rows
        .retain(|row| row.benchmark != Benchmark::Neighbour);
    for (name, touched, ms) in [
        ("small-lease", 64 << 20, 10.0),
        ("large-lease", 1 << 30, 30.0),
    ] {
        let labels = Labels {
            bytes: touched,
            touched_bytes: Some(64 << 20),
            pattern: Some(Pattern::Scattered),
            ..samples::labels(name, Verify::Full)
        };
        let group = "1 GiB, thp, teardown with 64 MiB touched";
        let row = samples::row(Benchmark::Sparse, group, labels, [ms; 4]);
        results
            .rows
            .push(samples::against(row, "small-lease", 10.0 / ms));
    }
    let page = String::from_utf8(Html.export(&results).expect("exported")).expect("text");
    let xml = as_xml(&page);
    let page = Document::parse(&xml).expect("well-formed");
    let summary = page
        .descendants()
        .find(|node| node.attribute("id") == Some("summary"))
        .expect("a summary");
    let mut found = Vec::new();
    for node in summary.children().filter(|node| node.is_element()) {
        match node.tag_name().name() {
            "h3" => found.push((node.text().unwrap_or_default(), Vec::new())),
            "div" => {
                let rows = node.descendants().filter_map(|row| row.attribute("class"));
                let rows = rows.filter(|class| ["good", "even", "bad"].contains(class));
                found.last_mut().expect("a heading").1.extend(rows);
            }
            _ => {}
        }
    }
    let found: Vec<_> = found
        .iter()
        .map(|(heading, rows)| (*heading, rows.as_slice()))
        .collect();
    // Turnaround with and without verification; a chosen loop that is slower than another; a large lease that takes longer.
    let expected = [
        (
            "speed: above 1 is better",
            ["good", "good", "bad"].as_slice(),
        ),
        ("time: below 1 is better", ["bad"].as_slice()),
    ];
    assert_eq!(found, expected);
    let bad = page
        .descendants()
        .filter(|node| node.attribute("class") == Some("card bad"));
    assert_eq!(bad.count(), 2);
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

#[test]
fn labels_have_room_beside_their_bars() {
    // A letter of the font in use, on average, if it is bold.
    const LETTER: f64 = 7.3;
    let mut results = samples::results();
    for verify in [Verify::Full, Verify::None] {
        let labels = Labels {
            revocation: Some(Revocation::Mremap),
            page_size: Some(PageSize::Base4K),
            ..samples::labels("vm-scrub", verify)
        };
        let group = "1 GiB, 4k, 2 threads";
        let row = samples::row(
            Benchmark::Turnaround,
            group,
            labels,
            [9.0, 10.0, 10.0, 12.0],
        );
        results.rows.push(row);
    }
    let page = String::from_utf8(Html.export(&results).expect("exported")).expect("text");
    let xml = as_xml(&page);
    let page = Document::parse(&xml).expect("well-formed");
    let labels: Vec<_> = page
        .descendants()
        .filter(|node| {
            node.attribute("class")
                .is_some_and(|class| class == "label end")
        })
        .collect();
    let text = |label: &roxmltree::Node<'_, '_>| label.text().unwrap_or_default().to_owned();
    assert!(
        labels.iter().any(|label| text(label).contains("by mremap")),
        "{:?}",
        labels.iter().map(text).collect::<Vec<_>>()
    );
    for label in &labels {
        let end: f64 = label
            .attribute("x")
            .expect("a place")
            .parse()
            .expect("a number");
        let width = text(label).chars().count() as f64 * LETTER;
        assert!(width <= end, "`{}` begins outside of the plot", text(label));
    }
}
