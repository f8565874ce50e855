//! What there is to do in a job, handed out a batch at a time.
//!
//! A batch is at most 256 KiB, which bounds the time until a thread looks up from its work, and as close to that as whole
//! pieces allow: a guest that touched every tenth page makes pieces of 4 KiB, and going back for each would cost as much as
//! zeroing it.
//!
//! Either all ranges are known, or the kernel is asked for them block by block, when the work gets there: what waits needs next to
//! no memory then, however finely its pages are scattered.

use super::plan::PIECE;
use crate::sync::{Mutex, MutexGuard};
use crate::{BLOCK_SIZE, sys};
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// What is asked about at once, in bytes.
const PART: usize = BLOCK_SIZE as usize;

/// Says which ranges of a part can hold data: disjoint, and within the part.
pub(crate) type Ask = dyn Fn(Range<usize>) -> sys::Result<Vec<Range<usize>>> + Send + Sync;

/// What the kernel has said so far.
#[derive(Debug, Default)]
pub(crate) struct Answers {
    /// How many bytes of each part can hold data, in the order of the parts; 0 where there was no answer.
    pub(crate) held: Vec<u32>,
    /// Where there was no answer.
    pub(crate) failed: Vec<(Range<usize>, sys::Error)>,
    /// How long asking took, all threads together.
    pub(crate) time: Duration,
}

/// What there is to do, and how far it has been handed out.
pub(crate) struct Batches {
    /// What is to be asked about.
    parts: Vec<Range<usize>>,
    ask: Option<Box<Ask>>,
    bytes: u64,
    /// Locked to move on, never while memory is touched or the kernel is asked.
    queue: Mutex<Queue>,
}

#[derive(Debug, Default)]
struct Queue {
    /// How far `parts` have been asked about.
    asked: Position,
    /// Known ranges that have not been handed out entirely: at most one list for each thread, if they were asked for.
    open: Vec<Open>,
    answers: Answers,
}

#[derive(Debug)]
struct Open {
    ranges: Arc<[Range<usize>]>,
    next: Position,
}

/// What a thread can do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Upcoming {
    /// A batch of so many bytes, more than 0.
    Batch(usize),
    /// To ask about the next part.
    Question,
    Nothing,
}

/// Some of the pieces, for whoever took it alone.
#[derive(Debug)]
pub(crate) struct Batch {
    ranges: Arc<[Range<usize>]>,
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
        let bytes = ranges.iter().map(|range| range.len() as u64).sum();
        let mut queue = Queue::default();
        queue.open(ranges);
        Self {
            parts: Vec::new(),
            ask: None,
            bytes,
            queue: Mutex::new(queue),
        }
    }

    /// Nothing is known of `whole`, which is disjoint ranges, but what `ask` will say of its parts: what of a range lies in one
    /// block is a part.
    pub(crate) fn asked_for(mut whole: Vec<Range<usize>>, ask: Box<Ask>) -> Self {
        whole.retain(|range| !range.is_empty());
        Self {
            bytes: whole.iter().map(|range| range.len() as u64).sum(),
            parts: whole,
            ask: Some(ask),
            queue: Mutex::default(),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Changed by single calls only.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All bytes, handed out or not; those that hold no data too, where that is asked.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What there is to be taken.
    pub(crate) fn upcoming(&self) -> Upcoming {
        let queue = self.queue();
        if let Some(open) = queue.open.last() {
            return Upcoming::Batch(open.batch().map_or(0, |batch| batch.bytes));
        }
        match piece_at(&self.parts, queue.asked, PART) {
            Some(_) => Upcoming::Question,
            None => Upcoming::Nothing,
        }
    }

    /// Hands the next batch out.
    pub(crate) fn take(&self) -> Option<Batch> {
        let mut queue = self.queue();
        let open = queue.open.last_mut()?;
        let batch = open.batch();
        if let Some(batch) = &batch {
            open.next = batch.to;
        }
        if open.batch().is_none() {
            queue.open.pop();
        }
        batch
    }

    /// Asks about the next part, without keeping others from doing the same about those behind it. How many bytes need not be
    /// done; `None` if there is no part left. An answer that does not come is asked for once more.
    pub(crate) fn ask(&self) -> Option<u64> {
        let ask = self.ask.as_ref()?;
        let (part, number) = {
            let mut queue = self.queue();
            let (part, behind) = piece_at(&self.parts, queue.asked, PART)?;
            queue.asked = behind;
            let number = queue.answers.held.len();
            queue.answers.held.push(0);
            (part, number)
        };
        let begun = Instant::now();
        let answer = ask(part.clone()).or_else(|_| ask(part.clone()));
        let mut queue = self.queue();
        queue.answers.time += begun.elapsed();
        let mut held = 0;
        match answer {
            Ok(mut ranges) => {
                ranges.retain(|range| !range.is_empty());
                held = ranges.iter().map(Range::len).sum();
                // No truncation: a part is not longer than a block.
                queue.answers.held[number] = held as u32;
                queue.open(ranges);
            }
            Err(error) => queue.answers.failed.push((part.clone(), error)),
        }
        Some((part.len() - held) as u64)
    }

    /// What the kernel has said, for whoever wants it when all is done.
    pub(crate) fn take_answers(&self) -> Answers {
        std::mem::take(&mut self.queue().answers)
    }
}

impl Queue {
    fn open(&mut self, ranges: Vec<Range<usize>>) {
        if !ranges.is_empty() {
            self.open.push(Open {
                ranges: ranges.into(),
                next: Position::default(),
            });
        }
    }
}

impl Open {
    fn batch(&self) -> Option<Batch> {
        let from = self.next;
        let (first, mut to) = piece_at(&self.ranges, from, PIECE)?;
        let mut bytes = first.len();
        while let Some((piece, behind)) = piece_at(&self.ranges, to, PIECE)
            && bytes + piece.len() <= PIECE
        {
            bytes += piece.len();
            to = behind;
        }
        Some(Batch {
            ranges: Arc::clone(&self.ranges),
            from,
            to,
            bytes,
        })
    }
}

impl Batch {
    /// Its pieces: none crosses a multiple of 256 KiB, and so none a block's border.
    pub(crate) fn pieces(self) -> impl Iterator<Item = Range<usize>> {
        let mut at = self.from;
        std::iter::from_fn(move || {
            if at == self.to {
                return None;
            }
            let (piece, behind) = piece_at(&self.ranges, at, PIECE)?;
            at = behind;
            Some(piece)
        })
    }
}

/// The piece at a position, which does not cross a multiple of `longest` bytes, and the position behind it.
fn piece_at(
    ranges: &[Range<usize>],
    at: Position,
    longest: usize,
) -> Option<(Range<usize>, Position)> {
    let range = ranges.get(at.range)?;
    let start = range.start + at.done;
    let border = (start / longest + 1).saturating_mul(longest);
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
        // An interpreter takes a second for each.
        let most = if cfg!(miri) { 6 } else { 40 };
        prop::collection::vec((0..90_usize, 0..200_usize), 0..most).prop_map(|gaps_and_runs| {
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
                    prop_assert_eq!(upcoming, Upcoming::Nothing);
                    break;
                };
                let bytes = batch.bytes;
                let pieces: Vec<Range<usize>> = batch.pieces().collect();
                prop_assert_eq!(pieces.iter().map(Range::len).sum::<usize>(), bytes);
                prop_assert_eq!(upcoming, Upcoming::Batch(bytes));
                prop_assert!((1..=PIECE).contains(&bytes));
                prop_assert!(last + pieces[0].len() > PIECE, "the batch before had room for this piece");
                last = bytes;
                handed_out.extend(pieces);
            }
            let bytes: usize = handed_out.iter().map(Range::len).sum();
            prop_assert_eq!(bytes as u64, batches.bytes());
            prop_assert_eq!(handed_out, plan::pieces(&ranges, PIECE));
        }
    }

    proptest! {
        /// Whoever stops between two batches leaves the rest to others.
        #[test]
        fn what_is_asked_for_is_handed_out_like_what_is_known(ranges in pages(), begin in 0..3000_usize) {
            let begin = begin * 4096;
            let whole = vec![0..begin, begin..90 * 40 * 4096 + 200 * 40 * 4096];
            let known = ranges.clone();
            let ask = move |part: Range<usize>| Ok(plan::intersections(&part, &known).collect());
            let batches = Batches::asked_for(whole.clone(), Box::new(ask));
            let mut handed_out = Vec::new();
            let mut nothing = 0;
            loop {
                match batches.upcoming() {
                    Upcoming::Question => nothing += batches.ask().unwrap(),
                    Upcoming::Batch(_) => handed_out.extend(batches.take().unwrap().pieces()),
                    Upcoming::Nothing => break,
                }
            }
            let bytes: usize = handed_out.iter().map(Range::len).sum();
            prop_assert_eq!(bytes as u64 + nothing, batches.bytes());
            let parts = plan::pieces(&whole, PART);
            let mut cut = Vec::new();
            let mut held = Vec::new();
            for part in parts {
                let found: Vec<_> = plan::intersections(&part, &ranges).collect();
                held.push(found.iter().map(Range::len).sum::<usize>() as u32);
                cut.extend(plan::pieces(&found, PIECE));
            }
            prop_assert_eq!(handed_out, cut);
            prop_assert_eq!(batches.take_answers().held, held);
        }
    }

    #[test]
    fn a_question_is_asked_twice_and_then_counts_as_a_failure() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        let refusals = |times: usize| {
            let asked = AtomicUsize::new(0);
            let ask = move |part: Range<usize>| {
                if asked.fetch_add(1, Ordering::Relaxed) < times {
                    return Err(sys::Error {
                        call: sys::Call::PagemapScan,
                        source: std::io::Error::from_raw_os_error(libc::ENOMEM),
                    });
                }
                Ok(vec![part])
            };
            Batches::asked_for(Vec::from_iter(Some(0..PART)), Box::new(ask))
        };
        let once = refusals(1);
        assert_eq!(once.ask(), Some(0));
        assert!(once.take_answers().failed.is_empty());
        let twice = refusals(2);
        assert_eq!(twice.ask(), Some(PART as u64), "nothing to be done there");
        assert_eq!(twice.upcoming(), Upcoming::Nothing);
        assert_eq!(twice.take_answers().failed[0].0, 0..PART);
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
