//! What there is to do: which pages of a lease can hold data, as the kernel says, at once or while the work goes on.

use super::{Steps, nanos};
use crate::backing::BLOCK;
use crate::lease::Segment;
use crate::lease::account::parts;
use crate::lease::receipt::QuarantineReason;
use crate::pool::OwnedFile;
use crate::pool::blocks::Dirty;
use crate::scrub::{Answers, Job, Residency, Work, bytes_in, joined, pieces, push_joined};
use crate::{BLOCK_SIZE, SysError};
use std::ops::Range;
use std::time::Instant;

/// How much memory the kernel is asked about in one go, in bytes: the answer takes it as long as waking a thread, or longer.
pub(in crate::lease) const ASKED_AT_ONCE: usize = 256 << 20;

impl Steps<Dirty> {
    /// Asks the kernel which pages can hold data, about large leases from several threads. Where it does not say, the blocks
    /// are quarantined.
    pub(in crate::lease) fn find_populated(&mut self) {
        // In a forked child nothing is there, and what lies at those addresses is its own.
        if !self.pool.is_here() {
            return;
        }
        let begun = Instant::now();
        if self.file.is_some() {
            self.find_populated_in_file();
            self.receipt.steps.residency_ns = nanos(begun.elapsed());
            return;
        }
        let mut populated = Vec::new();
        let mut broken: Vec<Range<usize>> = Vec::new();
        // Known without asking: found by a job that was given up.
        let mut answered = self.bytes_known_to_be_broken();
        let mut answer = |residency: Residency| {
            let held: usize = residency.populated.iter().map(Range::len).sum();
            answered += held as u64 + residency.never_populated;
            populated.extend(residency.populated);
        };
        let parts = self.parts_to_ask_about();
        let backing = &self.pool.backing;
        let ask = |part: usize| backing.residency(parts[part].clone());
        let answers = self.pool.engine.workers().map(parts.len(), ask);
        let mut unanswered = Vec::new();
        for (part, answered) in parts.iter().zip(answers) {
            if let Ok(residency) = answered {
                answer(residency);
                continue;
            }
            // Once more, block by block: one page that the kernel cannot supply must not cost the whole guest's memory.
            for one in pieces(std::slice::from_ref(part), BLOCK) {
                let block = one.start as u64 / BLOCK_SIZE;
                let whole = one.clone();
                match self.pool.backing.residency(one) {
                    Ok(residency) => answer(residency),
                    Err(error) => {
                        if is_broken(&error) {
                            broken.push(whole);
                        }
                        unanswered.push((block, error));
                    }
                }
            }
        }
        self.quarantine_unanswered(&unanswered);
        self.answered = answered + bytes_in(broken.iter().cloned());
        self.named = joined(self.named.drain(..).chain(broken));
        populated.sort_by_key(|range| range.start);
        self.populated = populated;
        self.count_populated();
        self.receipt.steps.residency_ns = nanos(begun.elapsed());
    }

    /// Quarantines blocks about which the kernel did not say what is populated.
    fn quarantine_unanswered(&mut self, unanswered: &[(u64, SysError)]) {
        for (block, error) in unanswered {
            let reason = if is_broken(error) {
                QuarantineReason::MemoryError
            } else {
                QuarantineReason::ResidencyUnknown
            };
            self.lost.insert(*block, (reason, error.to_string()));
            self.blocks.quarantine_blocks([*block]);
        }
        // One line for all in a row with the same answer: where there is no `/proc` that is the whole guest.
        let same = |one: &(u64, SysError), next: &(u64, SysError)| {
            one.0 + 1 == next.0 && one.1.to_string() == next.1.to_string()
        };
        for row in unanswered.chunk_by(same) {
            let ((first, error), blocks) = (&row[0], row.len());
            let what = if is_broken(error) {
                "memory error"
            } else {
                "residency unknown"
            };
            log::error!("{blocks} blocks from {first} on quarantined, {what}: {error}");
        }
    }

    /// A job over everything that can hold data, which the kernel is asked about when the work gets there.
    pub(in crate::lease) fn job_later(&mut self, work: Work) -> Job {
        let whole = match self.file.as_deref().and_then(OwnedFile::get) {
            Some(file) => whole_file(&self.segments, file.len()),
            None => self.ranges_to_ask_about(),
        };
        self.job_asking(whole, work)
    }

    /// Takes down what the kernel has said while the [job](Self::job_later) was done.
    pub(in crate::lease) fn take_answers(&mut self, answers: Answers) {
        let is_file = self.file.is_some();
        let mut each = answers.held.iter().copied();
        self.held.clear();
        let mut answered = 0;
        for (_, part) in parts(&self.segments) {
            let lost = self.lost.contains_key(&(part.start as u64 / BLOCK_SIZE));
            // All of a file is asked about, but not what else is lost.
            let held = if lost && !is_file {
                0
            } else {
                each.next().unwrap_or(0)
            };
            self.held.push(held);
            if !lost {
                answered += part.len() as u64;
            }
        }
        self.answered = answered;
        self.bytes_held = answers.held.iter().copied().map(u64::from).sum();
        self.receipt.steps.residency_ns = nanos(answers.time);
        if is_file {
            if let Some((_, error)) = answers.failed.first() {
                self.answered = 0;
                self.lose_rest(QuarantineReason::ResidencyUnknown, &error.to_string());
            }
            return;
        }
        let mut unanswered = Vec::new();
        for (part, error) in answers.failed {
            if is_broken(&error) {
                self.named = joined(self.named.drain(..).chain([part.clone()]));
            } else {
                self.answered -= part.len() as u64;
            }
            unanswered.push((part.start as u64 / BLOCK_SIZE, error));
        }
        self.quarantine_unanswered(&unanswered);
    }

    /// How many bytes are in blocks of which something could not be accessed.
    fn bytes_known_to_be_broken(&self) -> u64 {
        let is_broken = |part: &Range<usize>| {
            let lost = self.lost.get(&(part.start as u64 / BLOCK_SIZE));
            lost.is_some_and(|(reason, _)| *reason == QuarantineReason::MemoryError)
        };
        let parts = parts(&self.segments).map(|(_, part)| part);
        parts.filter(is_broken).map(|part| part.len() as u64).sum()
    }

    /// The lease's memory in parts for one question each, without what is lost already.
    fn parts_to_ask_about(&self) -> Vec<Range<usize>> {
        pieces(&self.ranges_to_ask_about(), ASKED_AT_ONCE)
    }

    /// The lease's memory, in the order of its parts, without what is lost already.
    fn ranges_to_ask_about(&self) -> Vec<Range<usize>> {
        let mut there = Vec::new();
        for (_, part) in parts(&self.segments) {
            if !self.lost.contains_key(&(part.start as u64 / BLOCK_SIZE)) {
                push_joined(&mut there, part);
            }
        }
        there
    }
}

/// Whether this is the kernel's answer about memory that it has found broken.
fn is_broken(error: &SysError) -> bool {
    error.errno() == Some(libc::EHWPOISON)
}

/// All of a file of `len` bytes: first the parts of its segments in their order, then what is between and behind them.
fn whole_file(segments: &[Segment], len: usize) -> Vec<Range<usize>> {
    let mut whole: Vec<Range<usize>> = segments
        .iter()
        .map(|segment| segment.offset..segment.offset + segment.len)
        .collect();
    let mut at = 0;
    for taken in joined(whole.iter().cloned()) {
        whole.push(at..taken.start);
        at = taken.end;
    }
    whole.push(at..len);
    whole.retain(|range| !range.is_empty());
    whole
}
