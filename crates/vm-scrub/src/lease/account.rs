//! Where a lease's bytes ended up: pure functions over segments, populated ranges and lost blocks.

use super::Segment;
use super::receipt::{QuarantineReason, QuarantinedRange};
use crate::BLOCK_SIZE;
use crate::scrub::intersections;
use std::collections::BTreeMap;
use std::ops::Range;

/// Quarantined blocks: why, and what was seen.
pub(super) type Lost = BTreeMap<u64, (QuarantineReason, String)>;

/// Where a lease's bytes ended up.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) scrubbed: u64,
    pub(super) never_populated: u64,
    pub(super) quarantined: u64,
}

/// How many bytes of each of the [`parts`] are populated. `populated` is ascending and disjoint.
pub(super) fn held(segments: &[Segment], populated: &[Range<usize>]) -> Vec<u32> {
    let held = |part: Range<usize>| -> usize {
        let both = intersections(&part, populated);
        both.map(|range| range.len()).sum()
    };
    // No truncation: a part is not longer than a block.
    parts(segments).map(|(_, part)| held(part) as u32).collect()
}

/// Sorts a lease's bytes: in a lost block, else populated, else never populated. `held` says of each of the [`parts`] how many bytes
/// of it are populated; of those that are missing none is.
pub(super) fn totals(segments: &[Segment], held: &[u32], lost: &Lost) -> Totals {
    let mut totals = Totals::default();
    let mut held = held.iter();
    for (_, part) in parts(segments) {
        let bytes = part.len() as u64;
        let held = u64::from(held.next().copied().unwrap_or(0)).min(bytes);
        if lost.contains_key(&(part.start as u64 / BLOCK_SIZE)) {
            totals.quarantined += bytes;
            continue;
        }
        totals.scrubbed += held;
        totals.never_populated += bytes - held;
    }
    totals
}

/// How many bytes the kernel must have been asked about: all but those in blocks that were lost before or for want of an
/// answer.
pub(super) fn asked_about(segments: &[Segment], lost: &Lost) -> u64 {
    let unanswered = |block| {
        lost.get(&block).is_some_and(|(reason, _)| {
            use QuarantineReason::{NotRevoked, PinnedOrShared, ResidencyUnknown};
            matches!(reason, NotRevoked | PinnedOrShared | ResidencyUnknown)
        })
    };
    parts(segments)
        .filter(|(_, part)| !unanswered(part.start as u64 / BLOCK_SIZE))
        .map(|(_, part)| part.len() as u64)
        .sum()
}

/// Each segment's share of each block it lies in, as arena offsets.
pub(super) fn parts(segments: &[Segment]) -> impl Iterator<Item = (&Segment, Range<usize>)> {
    segments.iter().flat_map(|segment| {
        let end = segment.offset + segment.len;
        let block = BLOCK_SIZE as usize;
        (segment.offset..end)
            .step_by(block)
            .map(move |start| (segment, start..end.min(start + block)))
    })
}

/// The lost blocks as guest ranges; neighbours with the same reason are one. Of a block that was lost for what is pinned or broken
/// in it, the `named` ranges (arena offsets, ascending, disjoint) are told from the rest.
pub(super) fn quarantined_ranges(
    segments: &[Segment],
    lost: &Lost,
    named: &[Range<usize>],
) -> Vec<QuarantinedRange> {
    let mut ranges: Vec<QuarantinedRange> = Vec::new();
    let mut add = |guest_address, bytes, reason, detail: &str| match ranges.last_mut() {
        Some(last) if last.reason == reason && last.guest_address + last.bytes == guest_address => {
            last.bytes += bytes;
        }
        _ => ranges.push(QuarantinedRange {
            guest_address,
            bytes,
            reason,
            detail: detail.to_owned(),
        }),
    };
    for (segment, part) in parts(segments) {
        let Some((reason, detail)) = lost.get(&(part.start as u64 / BLOCK_SIZE)) else {
            continue;
        };
        let mut add = |range: Range<usize>, reason| {
            if !range.is_empty() {
                let guest_address = segment.guest_address + (range.start - segment.offset) as u64;
                add(guest_address, range.len() as u64, reason, detail);
            }
        };
        let beside = match reason {
            QuarantineReason::PinnedOrShared => QuarantineReason::BesidePinned,
            QuarantineReason::MemoryError => QuarantineReason::BesideMemoryError,
            _ => {
                add(part, *reason);
                continue;
            }
        };
        let mut at = part.start;
        for cause in intersections(&part, named) {
            add(at..cause.start, beside);
            at = cause.end;
            add(cause, *reason);
        }
        add(at..part.end, beside);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scrub::HostPtr;
    use proptest::prelude::*;

    const BLOCK: usize = BLOCK_SIZE as usize;
    const PAGE: usize = 4096;
    /// Of a segment, at most; an interpreter has time for little more than a block.
    const PAGES: usize = if cfg!(miri) { 600 } else { 1500 };

    fn segment(guest_address: u64, first_block: usize, len: usize) -> Segment {
        Segment {
            guest_address,
            offset: first_block * BLOCK,
            window: HostPtr(std::ptr::null_mut()),
            len,
        }
    }

    proptest! {
        /// The model sorts page by page.
        #[test]
        fn every_page_is_counted_once_and_where_it_belongs(
            lens in prop::collection::vec(1..PAGES, 1..4),
            runs in prop::collection::vec((1..700_usize, 1..700_usize), 0..8),
            lost in prop::collection::btree_set(0..12_u64, 0..4),
        ) {
            let mut first_block = 0;
            let mut segments = Vec::new();
            for pages in lens {
                segments.push(segment(0, first_block, pages * PAGE));
                first_block += (pages * PAGE).div_ceil(BLOCK);
            }
            let mut at = 0;
            let mut populated = Vec::new();
            for (gap, run) in runs {
                populated.push((at + gap) * PAGE..(at + gap + run) * PAGE);
                at += gap + run;
            }
            let lost: Lost =
                lost.into_iter().map(|block| (block, (QuarantineReason::NotZero, String::new()))).collect();

            let mut expected = Totals::default();
            for segment in &segments {
                for page in (segment.offset..segment.offset + segment.len).step_by(PAGE) {
                    let count = if lost.contains_key(&(page as u64 / BLOCK_SIZE)) {
                        &mut expected.quarantined
                    } else if populated.iter().any(|range| range.contains(&page)) {
                        &mut expected.scrubbed
                    } else {
                        &mut expected.never_populated
                    };
                    *count += PAGE as u64;
                }
            }
            prop_assert_eq!(totals(&segments, &held(&segments, &populated), &lost), expected);
            let in_ranges: u64 = quarantined_ranges(&segments, &lost, &[]).iter().map(|range| range.bytes).sum();
            prop_assert_eq!(in_ranges, totals(&segments, &held(&segments, &populated), &lost).quarantined);
        }
    }

    #[test]
    fn blocks_that_were_not_revoked_are_not_asked_about() {
        use QuarantineReason::{MemoryError, NotRevoked, PinnedOrShared, ResidencyUnknown};
        let segments = [segment(0, 2, 4 * BLOCK), segment(0, 9, BLOCK + PAGE)];
        let all = 5 * BLOCK_SIZE + PAGE as u64;
        assert_eq!(asked_about(&segments, &Lost::new()), all);
        for reason in [NotRevoked, PinnedOrShared, ResidencyUnknown] {
            let lost = |block| Lost::from([(block, (reason, String::new()))]);
            assert_eq!(asked_about(&segments, &lost(3)), all - BLOCK_SIZE);
            assert_eq!(asked_about(&segments, &lost(10)), all - PAGE as u64);
            // Not of this lease.
            assert_eq!(asked_about(&segments, &lost(0)), all);
        }
        // The kernel has said that it is broken.
        let broken = Lost::from([(3, (MemoryError, String::new()))]);
        assert_eq!(asked_about(&segments, &broken), all);
    }

    #[test]
    fn neighbours_with_the_same_reason_are_one_range() {
        let segments = [
            segment(1 << 30, 4, 3 * BLOCK),
            segment((1 << 30) + 3 * BLOCK_SIZE, 0, BLOCK + PAGE),
        ];
        let why = |reason| (reason, "seen".to_owned());
        let lost: Lost = [
            (4, why(QuarantineReason::NotZero)),
            (6, why(QuarantineReason::NotRevoked)),
            (0, why(QuarantineReason::NotRevoked)),
            (1, why(QuarantineReason::NotZero)),
        ]
        .into();
        let ranges = quarantined_ranges(&segments, &lost, &[]);
        let seen: Vec<(u64, u64, QuarantineReason)> = ranges
            .iter()
            .map(|range| (range.guest_address, range.bytes, range.reason))
            .collect();
        let block = BLOCK_SIZE;
        assert_eq!(
            seen,
            vec![
                (1 << 30, block, QuarantineReason::NotZero),
                (
                    (1 << 30) + 2 * block,
                    2 * block,
                    QuarantineReason::NotRevoked
                ),
                (
                    (1 << 30) + 4 * block,
                    PAGE as u64,
                    QuarantineReason::NotZero
                ),
            ]
        );
    }

    #[test]
    fn what_is_pinned_is_told_from_the_rest_of_its_block() {
        let base = 1 << 30;
        let segments = [segment(base, 2, 3 * BLOCK)];
        let lost: Lost = (2..4)
            .map(|block| (block, (QuarantineReason::PinnedOrShared, "busy".to_owned())))
            .collect();
        // The last page of one block and the first of the next, and another one.
        let pinned = [
            3 * BLOCK - PAGE..3 * BLOCK + PAGE,
            3 * BLOCK + 8 * PAGE..3 * BLOCK + 9 * PAGE,
        ];
        let ranges = quarantined_ranges(&segments, &lost, &pinned);
        let seen: Vec<(u64, u64, QuarantineReason)> = ranges
            .iter()
            .map(|range| (range.guest_address - base, range.bytes, range.reason))
            .collect();
        let (block, page) = (BLOCK_SIZE, PAGE as u64);
        assert_eq!(
            seen,
            vec![
                (0, block - page, QuarantineReason::BesidePinned),
                (block - page, 2 * page, QuarantineReason::PinnedOrShared),
                (block + page, 7 * page, QuarantineReason::BesidePinned),
                (block + 8 * page, page, QuarantineReason::PinnedOrShared),
                (
                    block + 9 * page,
                    block - 9 * page,
                    QuarantineReason::BesidePinned
                ),
            ]
        );
    }
}
