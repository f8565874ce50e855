//! A job's ranges, handed out a batch at a time.
//!
//! A batch is at most 256 KiB, which bounds the time until a thread looks up from its work, and as close to that as whole
//! pieces allow: a guest that touched every tenth page makes pieces of 4 KiB, and going back for each would cost as much as
//! zeroing it. What is kept besides the ranges is one position.

use super::plan::PIECE;
use crate::sync::Mutex;
use std::ops::Range;
use std::sync::PoisonError;

/// Ranges, and how far they have been handed out.
#[derive(Debug)]
pub(crate) struct Batches {
    ranges: Vec<Range<usize>>,
    /// Locked to move on, never while memory is touched.
    next: Mutex<Position>,
}

/// Some of the pieces, for whoever took it alone.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch<'a> {
    ranges: &'a [Range<usize>],
    from: Position,
    to: Position,
    /// What all its pieces have together, in bytes; more than 0.
    pub(crate) bytes: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Position {
    /// The index of a range; as many as there are at the end.
    range: usize,
    /// Bytes of that range that have been handed out.
    done: usize,
}

impl Batches {
    /// Nothing of `ranges`, which are disjoint, has been handed out.
    pub(crate) fn new(mut ranges: Vec<Range<usize>>) -> Self {
        ranges.retain(|range| !range.is_empty());
        Self {
            ranges,
            next: Mutex::default(),
        }
    }

    /// All bytes, handed out or not.
    pub(crate) fn bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.len() as u64).sum()
    }

    /// How many bytes the next batch has; 0 if there is none.
    pub(crate) fn upcoming(&self) -> usize {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.batch(*next).map_or(0, |batch| batch.bytes)
    }

    /// Hands the next batch out.
    pub(crate) fn take(&self) -> Option<Batch<'_>> {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let batch = self.batch(*next)?;
        *next = batch.to;
        Some(batch)
    }

    fn batch(&self, from: Position) -> Option<Batch<'_>> {
        let (first, mut to) = piece_at(&self.ranges, from)?;
        let mut bytes = first.len();
        while let Some((piece, behind)) = piece_at(&self.ranges, to)
            && bytes + piece.len() <= PIECE
        {
            bytes += piece.len();
            to = behind;
        }
        Some(Batch {
            ranges: &self.ranges,
            from,
            to,
            bytes,
        })
    }
}

impl Batch<'_> {
    /// Its pieces: none crosses a multiple of 256 KiB, and so none a block's border.
    pub(crate) fn pieces(self) -> impl Iterator<Item = Range<usize>> {
        let mut at = self.from;
        std::iter::from_fn(move || {
            if at == self.to {
                return None;
            }
            let (piece, behind) = piece_at(self.ranges, at)?;
            at = behind;
            Some(piece)
        })
    }
}

/// The piece at a position, and the position behind it.
fn piece_at(ranges: &[Range<usize>], at: Position) -> Option<(Range<usize>, Position)> {
    let range = ranges.get(at.range)?;
    let start = range.start + at.done;
    let border = (start / PIECE + 1).saturating_mul(PIECE);
    let behind = if border < range.end {
        Position {
            range: at.range,
            done: border - range.start,
        }
    } else {
        Position {
            range: at.range + 1,
            done: 0,
        }
    };
    Some((start..border.min(range.end), behind))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scrub::plan;
    use proptest::prelude::*;

    fn pages() -> impl Strategy<Value = Vec<Range<usize>>> {
        prop::collection::vec((0..90_usize, 0..200_usize), 0..40).prop_map(|gaps_and_runs| {
            let mut at = 0;
            gaps_and_runs
                .into_iter()
                .map(|(gap, run)| {
                    let start = at + gap;
                    at = start + run;
                    start * 4096..at * 4096
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn every_piece_is_handed_out_once_in_batches_as_large_as_may_be(ranges in pages()) {
            let batches = Batches::new(ranges.clone());
            let mut handed_out = Vec::new();
            let mut last = PIECE;
            loop {
                let upcoming = batches.upcoming();
                let Some(batch) = batches.take() else {
                    prop_assert_eq!(upcoming, 0);
                    break;
                };
                let pieces: Vec<Range<usize>> = batch.pieces().collect();
                prop_assert_eq!(pieces.iter().map(Range::len).sum::<usize>(), batch.bytes);
                prop_assert_eq!(upcoming, batch.bytes);
                prop_assert!((1..=PIECE).contains(&batch.bytes));
                prop_assert!(last + pieces[0].len() > PIECE, "the batch before had room for this piece");
                last = batch.bytes;
                handed_out.extend(pieces);
            }
            let bytes: usize = handed_out.iter().map(Range::len).sum();
            prop_assert_eq!(bytes as u64, batches.bytes());
            prop_assert_eq!(handed_out, plan::pieces(&ranges, PIECE));
        }
    }

    #[test]
    fn the_end_of_the_address_space_is_a_border_too() {
        let last = usize::MAX - 5..usize::MAX;
        let batches = Batches::new(vec![0..0, last.clone()]);
        let pieces: Vec<_> = batches.take().unwrap().pieces().collect();
        assert_eq!(pieces, [last]);
        assert!(batches.take().is_none());
    }
}
