//! Is memory that was to have transparent huge pages made of them? The kernel promises nothing: it takes small pages where
//! memory is fragmented, and for a memfd unless it was told otherwise.

use crate::bench::warning::Warning;
use std::fs;
use std::ops::Range;
use vm_scrub::PageSize;

/// Less than this part in huge pages is worth a warning.
const ENOUGH: f64 = 0.95;

/// What is to be said about `memory`, all of which is populated. Nothing if it was not to have transparent huge pages.
pub(crate) fn small_pages(memory: &[u8], page_size: PageSize) -> Option<Warning> {
    if page_size != PageSize::Transparent || memory.is_empty() {
        return None;
    }
    let smaps = fs::read_to_string("/proc/self/smaps").ok()?;
    let start = memory.as_ptr().addr();
    let huge = huge_bytes(&smaps, start..start + memory.len())? as f64 / memory.len() as f64;
    (huge < ENOUGH).then_some(Warning::SmallPages { huge })
}

/// Bytes in huge pages of the mappings that lie within `range` (proc_pid_smaps(5)).
fn huge_bytes(smaps: &str, range: Range<usize>) -> Option<u64> {
    let mut inside = false;
    let mut huge = None;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match (words.next(), words.next()) {
            (Some("AnonHugePages:" | "ShmemPmdMapped:"), Some(kibibytes)) if inside => {
                let bytes = kibibytes.parse::<u64>().ok()? * 1024;
                huge = Some(huge.unwrap_or(0) + bytes);
            }
            (Some(addresses), _) if !addresses.ends_with(':') => {
                let (start, end) = addresses.split_once('-')?;
                let start = usize::from_str_radix(start, 16).ok()?;
                let end = usize::from_str_radix(end, 16).ok()?;
                inside = range.start <= start && end <= range.end;
            }
            _ => {}
        }
    }
    huge
}

#[cfg(test)]
mod tests {
    use super::super::{HUGE, Mapping, populate};
    use super::*;

    #[test]
    fn mappings_inside_are_summed() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0 \nSize: 8 kB\nAnonHugePages:      4 kB\n\
                     3000-5000 rw-p 0 00:00 0\nAnonHugePages: 2 kB\nShmemPmdMapped: 1 kB\nVmFlags: rd wr\n\
                     5000-6000 rw-p 0 00:00 0 [heap]\nAnonHugePages: 9 kB\n";
        assert_eq!(huge_bytes(smaps, 0x1000..0x5000), Some(7 << 10));
        assert_eq!(huge_bytes(smaps, 0x2000..0x2800), None);
    }

    #[test]
    fn small_pages_are_noticed_where_huge_ones_were_wanted() {
        let mut mapping = Mapping::anonymous(2 * HUGE, PageSize::Base4K).expect("mapped");
        populate(mapping.bytes()).expect("populated");
        assert_eq!(small_pages(mapping.bytes(), PageSize::Base4K), None);
        let found = small_pages(mapping.bytes(), PageSize::Transparent);
        assert_eq!(found, Some(Warning::SmallPages { huge: 0.0 }));
    }
}
