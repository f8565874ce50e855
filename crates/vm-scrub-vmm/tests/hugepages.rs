//! Borrowed huge pages are really there.

use std::fs;
use std::io::{Write, stderr};

use vm_scrub_vmm::HugePages;

fn number(name: &str) -> Option<u64> {
    let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[test]
fn borrowed_pages_are_free() {
    let pages = match HugePages::ensure(4) {
        Ok(pages) => pages,
        Err(error) => {
            let _ = writeln!(stderr(), "\nSKIPPED borrowed_pages_are_free: {error}");
            return;
        }
    };
    let (total, free) = (number("nr_hugepages"), number("free_hugepages"));
    assert!(
        total >= Some(pages.added()) && free >= Some(4),
        "{total:?} {free:?}"
    );
}
