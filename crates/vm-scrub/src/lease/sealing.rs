//! What is different when memory is torn down that other processes may have.
//!
//! The steps are those of any teardown; between scrubbing and reading back the file is sealed, and in the end it goes back to
//! the kernel instead of into the pool. It is all or nothing: a file that is not clean everywhere stays in quarantine as a
//! whole.

use super::Segment;
use super::receipt::{QuarantineReason, ScrubReceipt};
use super::steps::Steps;
use crate::BLOCK_SIZE;
use crate::backing::{Backing, SharedFile, is_still_shared};
use crate::pool::blocks::{Dirty, Scrubbed, State, Verified};
use crate::pool::{OwnedFile, Remains, Withheld, still_shared};
use crate::scrub::{Answers, Job, Verdict, Work, union};
use crate::sys::{self, Call};
use crate::{Revocation, SysError};
use std::io;
use std::thread;
use std::time::Duration;

/// How long to wait before a file that could not be sealed is scrubbed and sealed once more: a peer that was told to let go
/// just before may need a moment. What takes longer is tried again in the background.
pub(super) const PAUSES: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(10)];

/// Whether memory that is lost for this reason is never going to be clean: somebody may have it in a window for ever, it is
/// sealed with something else than zero in it, or it is broken.
fn is_for_good(reason: QuarantineReason) -> bool {
    use QuarantineReason::{MemoryError, NotRevoked, NotZero};
    matches!(reason, MemoryError | NotRevoked | NotZero)
}

impl<S: State> Steps<S> {
    /// All of the memory that is not lost already goes into quarantine for this reason, and is not read back.
    pub(super) fn lose_rest(&mut self, reason: QuarantineReason, detail: &str) {
        for segment in &self.segments {
            for block in segment.blocks() {
                self.lost
                    .entry(block)
                    .or_insert_with(|| (reason, detail.to_owned()));
            }
        }
        self.to_read.get_or_insert_default();
    }

    pub(super) fn with_file<T>(
        &mut self,
        act: impl FnOnce(&mut SharedFile) -> sys::Result<T>,
    ) -> sys::Result<T> {
        match self.file.as_deref_mut().and_then(OwnedFile::get_mut) {
            // The file is a forked child's as well, and what it seals is sealed.
            Some(file) if self.pool.is_here() => act(file),
            // Not possible where the pool is: only the last step takes the file.
            _ => Err(SysError {
                call: Call::AddSeals,
                source: io::Error::other("there is no file"),
            }),
        }
    }

    /// How many of the lost blocks are never going to be clean.
    fn gone_for_good(&self) -> u64 {
        let lost = self.lost.values();
        lost.filter(|(reason, _)| is_for_good(*reason)).count() as u64
    }

    /// How many of the lost blocks the books have in quarantine already. Those of a shareable lease stay together until the
    /// end, but for what is gone for good.
    pub(super) fn set_aside(&self) -> u64 {
        if self.file.is_some() {
            self.gone_for_good()
        } else {
            self.lost.len() as u64
        }
    }
}

impl Steps<Dirty> {
    /// As `find_populated`. The file is asked about as a whole: it has more than the guest's regions, and somebody may have
    /// written there.
    pub(super) fn find_populated_in_file(&mut self) {
        // A retired lease may have been cancelled after its view was unmapped.
        let answer = self.with_file(|file| {
            file.open()?;
            file.residency(0..file.len())
        });
        match answer {
            Ok(residency) => {
                self.populated = residency.populated;
                self.count_populated();
                let lost = |segment: &&Segment| {
                    segment.blocks().any(|block| self.lost.contains_key(&block))
                };
                let asked = self.segments.iter().filter(|segment| !lost(segment));
                self.answered = asked.map(|segment| segment.len as u64).sum();
            }
            Err(error) => {
                self.populated.clear();
                self.count_populated();
                self.answered = 0;
                self.lose_rest(QuarantineReason::ResidencyUnknown, &error.to_string());
            }
        }
    }
}

impl Steps<Scrubbed> {
    /// Seals the file and reads it back.
    pub(super) fn verified_sealed(mut self) -> Steps<Verified> {
        if !self.lost.is_empty() {
            self.lose_rest(
                QuarantineReason::SameFile,
                "a part of the same file is not clean",
            );
        } else if let Err((reason, detail)) = self.seal() {
            self.lose_rest(reason, &detail);
        }
        let job = self.job(Work::ReadSealed);
        let (_, verdict) = self.run(&job);
        self.judged(&verdict)
    }

    /// Nothing is read back, for this reason: all of it goes into quarantine.
    pub(super) fn unread(mut self, reason: QuarantineReason, detail: &str) -> Steps<Verified> {
        self.lose_rest(reason, detail);
        self.to_read = Some(Vec::new());
        let job = self.job(Work::ReadSealed);
        let (_, verdict) = self.run(&job);
        self.verified(&verdict)
    }

    /// A job that reads back what the kernel will say holds data when the work gets there. Holes have no content, and a file that is
    /// sealed gets none.
    pub(super) fn job_reading_sealed(&mut self) -> Job {
        let file = self.file.as_deref().and_then(OwnedFile::get);
        let whole = file.map(|file| 0..file.len());
        self.job_asking(Vec::from_iter(whole), Work::ReadSealed)
    }

    /// What the [job](Self::job_reading_sealed) has found.
    pub(super) fn read_sealed(mut self, verdict: &Verdict, answers: Answers) -> Steps<Verified> {
        self.bytes_to_read = Some(answers.held.iter().copied().map(u64::from).sum());
        if let Some((_, error)) = answers.failed.first() {
            self.lose_rest(QuarantineReason::NotSealed, &error.to_string());
        }
        self.judged(verdict)
    }

    fn judged(self, verdict: &Verdict) -> Steps<Verified> {
        let mut steps = self.verified(verdict);
        if !steps.lost.is_empty() {
            steps.lose_rest(
                QuarantineReason::SameFile,
                "a part of the same file is not zero",
            );
        }
        steps
    }

    /// Seals the file and decides what is to be read: what was zeroed, and what holds pages now.
    fn seal(&mut self) -> Result<(), (QuarantineReason, String)> {
        let not_sealed = |error: SysError| (QuarantineReason::NotSealed, error.to_string());
        let mut pauses = PAUSES.iter();
        while let Err(error) = self.with_file(SharedFile::seal) {
            if !is_still_shared(&error) {
                return Err(not_sealed(error));
            }
            let Some(pause) = pauses.next() else {
                return Err((QuarantineReason::StillShared, still_shared(&error)));
            };
            thread::sleep(*pause);
            // Whoever could write may have written.
            self.zero_again().map_err(not_sealed)?;
        }
        self.receipt.revocation = Revocation::Sealed;
        let data = self
            .with_file(|file| {
                file.open()?;
                file.residency(0..file.len())
            })
            .map_err(not_sealed)?;
        // Pages may have come since, by somebody's reading, and gone.
        self.to_read = Some(union(&self.populated, &data.populated));
        Ok(())
    }

    fn zero_again(&mut self) -> Result<(), SysError> {
        self.populated = self
            .with_file(|file| {
                file.open()?;
                file.residency(0..file.len())
            })?
            .populated;
        self.count_populated();
        let job = self.job(Work::Zero);
        let (zeroed, _) = self.run(&job);
        self.zeroed_again(&zeroed);
        Ok(())
    }
}

impl Steps<Verified> {
    /// The last step. A file that is clean goes back to the kernel and its blocks into the pool, with fresh memory behind
    /// them; a file of which one can think that it will be clean is withheld, and any other one is kept for good.
    pub(super) fn part_with(mut self, mut file: OwnedFile) -> ScrubReceipt {
        if self.lost.is_empty() {
            // Closes the descriptor: from here on the memory is the kernel's.
            drop(file.take());
            let Err(error) = self.pool.refill(self.blocks.extents()) else {
                self.close_receipt();
                self.blocks.recycle();
                return self.receipt;
            };
            self.lose_rest(QuarantineReason::NotReplaced, &error.to_string());
            return self.withhold(Remains::Capacity);
        }
        if self.gone_for_good() == 0
            && let Some(file) = file.take()
        {
            return self.withhold(Remains::File(file));
        }
        file.condemn(self.why());
        self.close_receipt();
        self.blocks.quarantine();
        self.receipt
    }

    fn withhold(mut self, remains: Remains) -> ScrubReceipt {
        self.close_receipt();
        let receipt = self.receipt.clone();
        let bytes = self.blocks.count() * BLOCK_SIZE;
        let about = Withheld::new(receipt.lease, receipt.guest.clone(), bytes, self.why());
        self.pool.withhold(about, remains, self.blocks.withhold());
        receipt
    }

    /// What is worst.
    fn why(&self) -> String {
        let lost = || self.lost.values();
        let worst = lost().find(|(reason, _)| is_for_good(*reason));
        worst
            .or_else(|| lost().next())
            .map_or_else(String::new, |(_, detail)| detail.clone())
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::steps::take_away;
    use super::super::{LeaseOptions, Quiesced};
    use super::*;
    use crate::backing::BLOCK;
    use crate::scrub::Sabotage;
    use crate::{PageSize, Policy, Pool};
    use std::os::unix::fs::FileExt;
    use vm_memory::GuestAddress;

    /// A peer writes after the memory was zeroed, to a page of the file's second block that breaks when it is zeroed again. The pool
    /// knows that block by another number.
    #[test]
    fn what_breaks_when_it_is_zeroed_again_is_quarantined_by_its_number() {
        let offset = BLOCK + (300 << 10);
        let breaks = Sabotage::BreakMemory {
            offset,
            late: false,
        };
        let pool = Pool::builder()
            .capacity(4 * BLOCK_SIZE)
            .page_size(PageSize::Base4K)
            .threads(1)
            .policy(Policy::new().probe(true))
            .sabotage(breaks)
            .build()
            .unwrap();
        let other = pool.lease(&[(GuestAddress(0), BLOCK_SIZE)]).unwrap();
        let options = LeaseOptions::new().shareable(true);
        let lease = pool
            .lease_with(&[(GuestAddress(0), 3 * BLOCK_SIZE)], options)
            .unwrap();
        // SAFETY: nobody uses the memory.
        let quiesced = unsafe { Quiesced::assert(&lease) };
        let mut steps = take_away(lease, quiesced).unwrap();
        steps.find_populated();
        let job = steps.job(Work::Zero);
        let (zeroed, _) = steps.run(&job);
        let mut steps = steps.scrubbed(&zeroed);
        steps
            .with_file(|file| {
                file.file().write_all_at(&[1], offset as u64).unwrap();
                Ok(())
            })
            .unwrap();
        steps.zero_again().unwrap();
        let lost: Vec<u64> = steps.lost.keys().copied().collect();
        assert_eq!(lost, [1]);
        let still_held = |block: &u64| {
            let extents = steps.blocks.extents().iter();
            extents
                .clone()
                .any(|held| (held.first..held.end()).contains(block))
        };
        let held: Vec<u64> = (0..4).filter(still_held).collect();
        assert_eq!(held, [1, 3], "block 0 is somebody else's");
        assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
        let receipt = steps.verified_sealed().recycle().unwrap();
        assert_eq!(receipt.bytes_quarantined, 3 * BLOCK_SIZE);
        drop(other);
    }
}
