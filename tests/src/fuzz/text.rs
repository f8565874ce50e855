//! What comes from outside and is looked at by pure functions: layouts, names, and what the kernel writes into files.

use super::whether;
use crate::model::{Region, check_layout};
use arbitrary::Unstructured;
use vm_scrub::PageSize;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};
use vm_scrub::test_support::{parse_list, parse_mapping};

/// Takes a layout, and a text.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let granularity = if whether(&mut input) { 2 << 20 } else { 4096 };
    let regions: Vec<Region> = if whether(&mut input) {
        let count = input.int_in_range(0..=8).unwrap_or(0);
        (0..count).filter_map(|_| input.arbitrary().ok()).collect()
    } else {
        Vec::new()
    };
    check_layout(&regions, granularity);
    let rest = input.take_rest();
    let text = String::from_utf8_lossy(rest);
    check_list(&text);
    check_mapping(&text);
    // A name is the only one that is understood as itself.
    if let Ok(size) = text.parse::<PageSize>() {
        assert_eq!(size.to_string(), text);
    }
    if let Ok(found) = ZeroLoop::by_name(&text) {
        assert_eq!(found.name(), text);
    }
    if let Ok(found) = VerifyLoop::by_name(&text) {
        assert_eq!(found.name(), text);
    }
}

/// A list is understood if it consists of numbers and ascending ranges of them, and then as these.
fn check_list(text: &str) {
    let found = parse_list(text);
    let mut expected = std::collections::BTreeSet::new();
    let mut fine = true;
    for part in text.trim().split(',').filter(|_| !text.trim().is_empty()) {
        let ends: Vec<Option<u32>> = part
            .splitn(2, '-')
            .map(|number| number.parse().ok())
            .collect();
        match ends[..] {
            [Some(only)] if only < 65_536 => drop(expected.insert(only)),
            [Some(first), Some(last)] if first <= last && last < 65_536 => {
                expected.extend(first..=last)
            }
            _ => fine = false,
        }
    }
    assert_eq!(
        found,
        fine.then(|| expected.into_iter().collect()),
        "{text:?}"
    );
}

/// A line that calls memory private and anonymous says so: no file, no sharing.
fn check_mapping(text: &str) {
    let line = text.lines().next().unwrap_or("");
    let Some((range, private_anonymous)) = parse_mapping(line) else {
        return;
    };
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (start, end) = fields[0].split_once('-').expect("a range has a dash");
    assert_eq!(
        usize::from_str_radix(start, 16),
        Ok(range.start),
        "{line:?}"
    );
    assert_eq!(usize::from_str_radix(end, 16), Ok(range.end), "{line:?}");
    if private_anonymous {
        assert!(
            fields[1].ends_with('p') && fields[3] == "00:00" && fields[4] == "0",
            "{line:?}"
        );
    }
}
