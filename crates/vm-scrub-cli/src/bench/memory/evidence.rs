//! Looking at the memory after a run: is it zero, and is it there?
//!
//! Written without vm-scrub's loops, which are what is being measured. A contender that does nothing is found out here.

use anyhow::{Context, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt;

const PAGE: usize = 4096;

/// Documentation/admin-guide/mm/pagemap.rst: one word for each page, of which bit 63 says that it is present.
const ENTRY: usize = 8;
const PRESENT: u64 = 1 << 63;

/// # Errors
///
/// If a byte is not zero; the error says where the first one is.
pub(crate) fn ensure_zero(memory: &[u8]) -> anyhow::Result<()> {
    for (index, page) in memory.chunks(PAGE).enumerate() {
        // Or-ing all bytes is what the compiler turns into vector code; `all` would stop at each.
        if page.iter().fold(0, |all, byte| all | byte) != 0 {
            let at = page.iter().position(|byte| *byte != 0).unwrap_or(0);
            anyhow::bail!(
                "the byte at offset {:#x} is {:#04x}, not zero: this contender did not do its work",
                index * PAGE + at,
                page[at]
            );
        }
    }
    Ok(())
}

/// # Errors
///
/// If a page of `memory`, which begins at a page, is not in this process's page tables.
pub(crate) fn ensure_resident(memory: &[u8]) -> anyhow::Result<()> {
    let resident = resident_pages(memory).context("/proc/self/pagemap")?;
    let pages = memory.len().div_ceil(PAGE);
    ensure!(
        resident == pages,
        "{resident} of {pages} pages are resident: this contender leaves the rest to the next guest"
    );
    Ok(())
}

fn resident_pages(memory: &[u8]) -> std::io::Result<usize> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let pages = memory.len().div_ceil(PAGE);
    let first = memory.as_ptr().addr() / PAGE;
    let mut entries = vec![0_u8; pages.min(1 << 16) * ENTRY];
    let (mut done, mut resident) = (0, 0);
    while done < pages {
        let now = (pages - done).min(1 << 16);
        let entries = &mut entries[..now * ENTRY];
        pagemap.read_exact_at(entries, ((first + done) * ENTRY) as u64)?;
        let entries = entries.as_chunks::<ENTRY>().0.iter();
        resident += entries
            .filter(|entry| u64::from_ne_bytes(**entry) & PRESENT != 0)
            .count();
        done += now;
    }
    Ok(resident)
}

#[cfg(test)]
mod tests {
    use super::super::Mapping;
    use super::*;
    use vm_scrub::PageSize;

    #[test]
    fn one_byte_anywhere_is_found() {
        let mut memory = vec![0_u8; 3 * PAGE + 5];
        ensure_zero(&memory).expect("zero");
        for at in [0, 1, PAGE - 1, PAGE, 2 * PAGE + 77, 3 * PAGE + 4] {
            memory[at] = 0x80;
            let error = ensure_zero(&memory).expect_err("not zero").to_string();
            assert!(
                error.contains(&format!("offset {at:#x} is 0x80")),
                "{error}"
            );
            memory[at] = 0;
        }
    }

    #[test]
    fn one_page_that_is_not_there_is_found() {
        let mut mapping = Mapping::anonymous(8 * PAGE, PageSize::Base4K).expect("mapped");
        let memory = mapping.bytes();
        for page in [0, 1, 2, 3, 4, 6, 7] {
            memory[page * PAGE] = 1;
        }
        let error = ensure_resident(memory).expect_err("page 5").to_string();
        assert!(error.contains("7 of 8 pages"), "{error}");
        ensure_resident(&memory[..5 * PAGE]).expect("resident");
        memory[5 * PAGE] = 1;
        ensure_resident(memory).expect("resident");
    }
}
