//! Which lines a sample consists of: a pure function of the piece and the seed, so that a receipt can be checked.

use std::ops::Range;

/// The size of a sampled line in bytes: a cache line on every x86_64 processor and most of aarch64.
pub(crate) const LINE: usize = 64;

/// One round of SplitMix64 (Steele, Lea, Flood 2014): a good mix of 64 bits.
fn mix(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The lines of `piece` that belong to the sample: `per_mille` of 1,000 of them, at least one.
///
/// The piece is divided into as many strata as lines are wanted and a line is drawn from each, so that none is drawn twice
/// and no part of a piece is left out.
pub(crate) fn lines(
    piece: &Range<usize>,
    per_mille: u16,
    seed: u64,
) -> impl Iterator<Item = Range<usize>> + use<> {
    let (start, end) = (piece.start, piece.end);
    let all = piece.len().div_ceil(LINE);
    let wanted = (all * usize::from(per_mille.min(1000)))
        .div_ceil(1000)
        .clamp(1, all.max(1));
    (0..wanted.min(all)).map(move |stratum| {
        let first = all * stratum / wanted;
        let behind = all * (stratum + 1) / wanted;
        let drawn = mix(seed ^ mix((start + first) as u64)) as usize % (behind - first);
        let line = start + (first + drawn) * LINE;
        line..(line + LINE).min(end)
    })
}

/// A seed that differs from run to run.
pub(crate) fn fresh_seed() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library seeds its hash maps from the operating system's random numbers.
    std::collections::hash_map::RandomState::new()
        .build_hasher()
        .finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn samples_are_distinct_lines_of_the_piece_and_as_many_as_asked(
            start in 0..10_000_usize, len in 0..70_000_usize, per_mille in 0..=1200_u16, seed: u64,
        ) {
            let piece = start..start + len;
            let drawn: Vec<_> = lines(&piece, per_mille, seed).collect();
            let all = len.div_ceil(LINE);
            let wanted = (all * usize::from(per_mille.min(1000))).div_ceil(1000).max(1).min(all);
            prop_assert_eq!(drawn.len(), wanted);
            prop_assert!(drawn.iter().all(|line| !line.is_empty() && line.start >= start && line.end <= piece.end));
            prop_assert!(drawn.iter().all(|line| (line.start - start) % LINE == 0));
            prop_assert!(drawn.windows(2).all(|pair| pair[0].end <= pair[1].start));
            prop_assert_eq!(&drawn, &lines(&piece, per_mille, seed).collect::<Vec<_>>());
            if per_mille >= 1000 {
                prop_assert_eq!(drawn.iter().map(Range::len).sum::<usize>(), len);
            }
        }
    }

    /// Whoever checks a receipt draws the lines again, by the published generator.
    #[test]
    fn the_same_seed_draws_the_same_lines_for_ever() {
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
        let piece = 5 * LINE..69 * LINE;
        let drawn: Vec<_> = lines(&piece, 50, 7).map(|line| line.start / LINE).collect();
        assert_eq!(drawn, [17, 21, 44, 57]);
    }

    #[test]
    fn every_line_is_drawn_by_some_seed() {
        let piece = 0..64 * LINE;
        let mut seen = [false; 64];
        for seed in 0..500 {
            for line in lines(&piece, 100, seed) {
                seen[line.start / LINE] = true;
            }
        }
        assert!(seen.iter().all(|seen| *seen));
        assert_ne!(fresh_seed(), fresh_seed());
    }
}
