//! The page is well-formed, needs nothing from elsewhere, and draws inside its plots.

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
