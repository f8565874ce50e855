//! Which bytes to touch and in which pieces: pure functions over offsets.

use std::ops::Range;

/// The largest piece, in bytes, that is zeroed and read back in one go.
///
/// Small enough to stay in a core's L2 cache between the two, large enough that handing it to a thread costs nothing
/// beside it, and a divisor of the block size, so that every piece lies in one block.
pub(crate) const PIECE: usize = 256 << 10;

/// Cuts `ranges` into pieces that do not cross a multiple of `piece` bytes.
pub(crate) fn pieces(ranges: &[Range<usize>], piece: usize) -> Vec<Range<usize>> {
    let mut cut = Vec::new();
    for range in ranges {
        let mut start = range.start;
        while start < range.end {
            let border = (start / piece + 1).saturating_mul(piece);
            let end = border.min(range.end);
            cut.push(start..end);
            start = end;
        }
    }
    cut
}

/// Appends `range` to ascending `ranges`, joining it to the last one where they touch.
pub(crate) fn push_joined(ranges: &mut Vec<Range<usize>>, range: Range<usize>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// The bytes that are in one of two sets of ascending, disjoint ranges, or in both.
pub(crate) fn union(one: &[Range<usize>], other: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut all = [one, other].concat();
    all.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::with_capacity(all.len());
    for range in all {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// What is left of ascending `ranges` behind their first `keep` bytes, from the next page border on.
pub(crate) fn beyond(ranges: &[Range<usize>], keep: u64) -> Vec<Range<usize>> {
    const PAGE: usize = 4096;
    let mut kept = 0;
    let mut rest = Vec::new();
    for range in ranges {
        let room = usize::try_from(keep.saturating_sub(kept)).unwrap_or(usize::MAX);
        kept += range.len() as u64;
        if room >= range.len() {
            continue;
        }
        let start = (range.start + room).next_multiple_of(PAGE);
        if start < range.end {
            rest.push(start..range.end);
        }
    }
    rest
}

/// The parts of `range` that lie in one of the ascending, disjoint `others`.
pub(crate) fn intersections(
    range: &Range<usize>,
    others: &[Range<usize>],
) -> impl Iterator<Item = Range<usize>> {
    let first = others.partition_point(|other| other.end <= range.start);
    let (start, end) = (range.start, range.end);
    others[first..]
        .iter()
        .take_while(move |other| other.start < end)
        .map(move |other| other.start.max(start)..other.end.min(end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Disjoint ascending ranges, from lengths of gaps and runs.
    fn ranges() -> impl Strategy<Value = Vec<Range<usize>>> {
        prop::collection::vec((0..300_usize, 1..700_usize), 0..12).prop_map(|gaps_and_runs| {
            let mut at = 0;
            gaps_and_runs
                .into_iter()
                .map(|(gap, run)| {
                    let start = at + gap;
                    at = start + run;
                    start..at
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn pieces_cover_exactly_the_ranges_and_never_cross_a_border(ranges in ranges(), piece in 1..300_usize) {
            let cut = pieces(&ranges, piece);
            for each in &cut {
                prop_assert!(!each.is_empty());
                prop_assert_eq!(each.start / piece, (each.end - 1) / piece);
            }
            let bytes: Vec<usize> = cut.into_iter().flatten().collect();
            let expected: Vec<usize> = ranges.into_iter().flatten().collect();
            prop_assert_eq!(bytes, expected);
        }

        #[test]
        fn joining_keeps_the_bytes_and_leaves_no_touching_ranges(ranges in ranges()) {
            let mut joined = Vec::new();
            for range in ranges.clone() {
                push_joined(&mut joined, range);
            }
            prop_assert!(joined.windows(2).all(|pair| pair[0].end < pair[1].start));
            let bytes: Vec<usize> = joined.into_iter().flatten().collect();
            prop_assert_eq!(bytes, ranges.into_iter().flatten().collect::<Vec<_>>());
        }
    }

    proptest! {
        #[test]
        fn what_is_beyond_is_whole_pages_behind_the_kept_bytes(ranges in ranges(), keep in 0..5_000_u64) {
            let pages: Vec<Range<usize>> = ranges.iter().map(|range| range.start * 4096..range.end * 4096).collect();
            let total: usize = pages.iter().map(Range::len).sum();
            let rest = beyond(&pages, keep * 1000);
            let left: usize = rest.iter().map(Range::len).sum();
            prop_assert!(total - left >= (keep as usize * 1000).min(total), "more was given back than allowed");
            prop_assert!(left + keep as usize * 1000 + 4096 > total || left == total, "too little was given back");
            prop_assert!(rest.iter().all(|range| range.start % 4096 == 0 && !range.is_empty()));
        }

        #[test]
        fn a_union_has_each_byte_of_both_once(one in ranges(), other in ranges()) {
            let joined = union(&one, &other);
            prop_assert!(joined.windows(2).all(|pair| pair[0].end < pair[1].start));
            let bytes: Vec<usize> = joined.into_iter().flatten().collect();
            let both: std::collections::BTreeSet<usize> = one.into_iter().chain(other).flatten().collect();
            prop_assert_eq!(bytes, both.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn intersections_are_the_bytes_that_are_in_both(ranges in ranges(), start in 0..4_000_usize, len in 0..3_000_usize) {
            let one = start..start + len;
            let both: Vec<usize> = intersections(&one, &ranges).flatten().collect();
            let expected: Vec<usize> = ranges.into_iter().flatten().filter(|byte| one.contains(byte)).collect();
            prop_assert_eq!(both, expected);
        }
    }

    #[test]
    fn the_end_of_the_address_space_is_a_border_too() {
        let last = usize::MAX - 5..usize::MAX;
        assert_eq!(pieces(std::slice::from_ref(&last), 4096), vec![last]);
    }
}
