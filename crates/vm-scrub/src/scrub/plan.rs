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

    #[test]
    fn the_end_of_the_address_space_is_a_border_too() {
        let last = usize::MAX - 5..usize::MAX;
        assert_eq!(pieces(std::slice::from_ref(&last), 4096), vec![last]);
    }
}
