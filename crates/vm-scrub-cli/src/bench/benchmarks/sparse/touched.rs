//! Which pages a guest has touched.

use crate::bench::memory;
use crate::bench::random::Random;
use crate::bench::row::Pattern;
use std::ops::Range;
use vm_scrub::PageSize;

/// Any number; the same pages are touched in every run and by every release.
const SEED: u64 = 0x7061_6765;

/// Pages of a guest's memory, as ascending ranges of offsets in bytes that do not touch each other.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Touched {
    pub(crate) ranges: Vec<Range<usize>>,
    /// The page that one touch makes the kernel supply, in bytes.
    unit: usize,
    is_hugetlb: bool,
}

impl Touched {
    /// `bytes` of `memory` bytes in such pages, rounded up to whole pages, and at least one.
    pub(crate) fn new(memory: usize, bytes: usize, pattern: Pattern, page_size: PageSize) -> Self {
        let unit = memory::touch_unit(page_size);
        let all = (memory / unit).max(1);
        let count = bytes.div_ceil(unit).clamp(1, all);
        let pages = match pattern {
            Pattern::Contiguous => (0..count).collect(),
            Pattern::Scattered => Random::seeded(SEED).choose(count, all),
        };
        let mut ranges: Vec<Range<usize>> = Vec::new();
        for page in pages {
            let (start, end) = (page * unit, (page + 1) * unit);
            match ranges.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => ranges.push(start..end),
            }
        }
        Self {
            ranges,
            unit,
            is_hugetlb: page_size == PageSize::Huge2M,
        }
    }

    /// How much that is.
    pub(crate) fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len() as u64).sum()
    }

    /// Has the kernel supply these pages, and overwrites every byte of them with something else than zero.
    ///
    /// # Errors
    ///
    /// If the kernel has no memory for them.
    pub(crate) fn dirty(&self, memory: &mut [u8]) -> nix::Result<()> {
        self.each(memory, |range| {
            memory::populate(range)?;
            range.fill(memory::DIRT);
            Ok(())
        })
    }

    /// Writes one byte to each page, a zero; hugetlb pages are asked for, because after `MADV_DONTNEED` nothing is promised, and
    /// writing to one that cannot be had would be a signal.
    ///
    /// # Errors
    ///
    /// If the kernel has no memory for them, where it says so.
    pub(crate) fn touch(&self, memory: &mut [u8]) -> nix::Result<()> {
        self.each(memory, |range| {
            if self.is_hugetlb {
                return memory::populate(range);
            }
            for page in range.chunks_mut(self.unit) {
                // SAFETY: the first byte of a borrowed slice that is not empty. Volatile, because the touch is the point.
                unsafe { page.as_mut_ptr().write_volatile(0) };
            }
            Ok(())
        })
    }

    /// # Errors
    ///
    /// If a byte of these pages is not zero.
    pub(crate) fn ensure_zero(&self, memory: &[u8]) -> anyhow::Result<()> {
        self.ranges
            .iter()
            .try_for_each(|range| memory::ensure_zero(&memory[range.clone()]))
    }

    /// # Errors
    ///
    /// If one of these pages is not in the page tables.
    pub(crate) fn ensure_resident(&self, memory: &[u8]) -> anyhow::Result<()> {
        self.ranges
            .iter()
            .try_for_each(|range| memory::ensure_resident(&memory[range.clone()]))
    }

    fn each(
        &self,
        memory: &mut [u8],
        mut work: impl FnMut(&mut [u8]) -> nix::Result<()>,
    ) -> nix::Result<()> {
        self.ranges
            .iter()
            .try_for_each(|range| work(&mut memory[range.clone()]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::memory::Mapping;
    use proptest::prelude::*;

    #[test]
    fn shares_are_rounded_up_to_pages() {
        let touched = |bytes, pattern, size| Touched::new(16 << 20, bytes, pattern, size);
        let few = touched(0, Pattern::Scattered, PageSize::Base4K);
        assert_eq!((few.bytes(), few.ranges.len()), (4096, 1));
        let half = touched(8 << 20, Pattern::Contiguous, PageSize::Base4K);
        assert_eq!(half.ranges.as_slice(), std::slice::from_ref(&(0..8 << 20)));
        let huge = touched(1, Pattern::Contiguous, PageSize::Transparent);
        assert_eq!(huge.ranges.as_slice(), std::slice::from_ref(&(0..2 << 20)));
        let all = touched(usize::MAX, Pattern::Scattered, PageSize::Huge2M);
        assert_eq!(all.ranges.as_slice(), std::slice::from_ref(&(0..16 << 20)));
    }

    proptest! {
        #[test]
        fn ranges_are_ascending_apart_and_inside(pages in 1..400_usize, bytes in 0..2_000_000_usize) {
            let memory = pages * 4096;
            let touched = Touched::new(memory, bytes, Pattern::Scattered, PageSize::Base4K);
            prop_assert!(touched.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            prop_assert!(touched.ranges.iter().all(|range| range.start < range.end && range.end <= memory));
            prop_assert_eq!(touched.bytes() as usize, bytes.div_ceil(4096).clamp(1, pages) * 4096);
        }

        #[test]
        fn what_is_dirty_is_found_until_it_is_zero(pages in 1..50_usize, bytes in 0..200_000_usize) {
            let touched = Touched::new(pages * 4096, bytes, Pattern::Scattered, PageSize::Base4K);
            let mut mapping = Mapping::anonymous(pages * 4096, PageSize::Base4K).expect("mapped");
            let memory = mapping.bytes();
            touched.dirty(memory).expect("populated");
            prop_assert!(touched.ensure_zero(memory).is_err());
            prop_assert_eq!(memory.iter().filter(|byte| **byte != 0).count() as u64, touched.bytes());
            touched.touch(memory).expect("touched");
            prop_assert!(touched.ensure_zero(memory).is_err(), "a touch is one byte");
            memory.fill(0);
            prop_assert!(touched.ensure_zero(memory).is_ok());
        }
    }
}
