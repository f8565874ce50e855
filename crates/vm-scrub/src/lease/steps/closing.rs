//! The last step: closing the account, and giving the memory back to the pool.

use super::{Steps, nanos};
use crate::BLOCK_SIZE;
use crate::lease::TeardownError;
use crate::lease::account::{asked_about, quarantined_ranges, totals};
use crate::lease::receipt::{Outcome, ScrubReceipt};
use crate::lease::returning::Returning;
use crate::pool::blocks::Verified;
use crate::scrub::Verify;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

impl Steps<Verified> {
    /// Puts what is clean into the pool and closes the account.
    pub(in crate::lease) fn recycle(self) -> Result<ScrubReceipt, TeardownError> {
        let recycling = Instant::now();
        if !self.pool.is_here() {
            let lease = self.lease();
            // The parent's, which goes on with it.
            std::mem::forget(self);
            return Err(TeardownError::Forked { lease });
        }
        let mut steps = self.checked()?;
        let mut returning = Returning::default();
        while let Some(excess) = steps.next_excess(&mut returning) {
            steps.give_back(&excess);
        }
        Ok(steps.finish(recycling))
    }

    /// Compares what the steps did with what there was to do. If the numbers do not add up, everything is quarantined.
    pub(in crate::lease) fn checked(self) -> Result<Self, TeardownError> {
        match self.check_account() {
            Ok(()) => Ok(self),
            Err(error) => {
                log::error!("{error}");
                self.blocks.quarantine();
                Err(error)
            }
        }
    }

    /// The last step, after [`checked`](Self::checked), which began at `recycling`.
    pub(in crate::lease) fn finish(mut self, recycling: Instant) -> ScrubReceipt {
        let started = self.started;
        let mut receipt = match self.file.take() {
            Some(file) => self.part_with(*file),
            None => {
                self.close_receipt();
                self.blocks.recycle();
                self.receipt
            }
        };
        receipt.steps.recycle_ns = nanos(recycling.elapsed());
        receipt.elapsed_ns = nanos(started.elapsed());
        receipt.ended_unix_ms = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| {
                u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
            });
        log::debug!(
            "{}: {:?}, {} bytes scrubbed, {} never populated, {} quarantined",
            receipt.lease,
            receipt.outcome,
            receipt.bytes_scrubbed,
            receipt.bytes_never_populated,
            receipt.bytes_quarantined
        );
        receipt
    }

    /// Compares what the steps did with what there was to do.
    fn check_account(&self) -> Result<(), TeardownError> {
        let receipt = &self.receipt;
        let lease = receipt.lease;
        let check = |what, expected, found| {
            if expected == found {
                return Ok(());
            }
            Err(TeardownError::Unaccounted {
                lease,
                what,
                expected,
                found,
            })
        };
        let asked = asked_about(&self.segments, &self.lost);
        check("what the kernel was asked about", asked, self.answered)?;
        let populated = self.bytes_held;
        let treated = receipt.bytes_scrubbed + self.not_zeroed;
        check("what was scrubbed", populated, treated)?;

        let totals = totals(&self.segments, &self.held, &self.lost);
        let held = self.blocks.count() + self.set_aside();
        check(
            "the blocks of the lease",
            self.leased_blocks * BLOCK_SIZE,
            held * BLOCK_SIZE,
        )?;
        let parts = totals.scrubbed + totals.never_populated + totals.quarantined;
        check("the sum of all parts", receipt.bytes_total, parts)?;
        if receipt.verify.is_complete() {
            let read = receipt.bytes_verified + self.failed_bytes;
            let to_read = self.bytes_to_read.unwrap_or(populated);
            check("what was read back", to_read, read)?;
        }
        Ok(())
    }

    /// Fills in the receipt's totals.
    pub(in crate::lease) fn close_receipt(&mut self) {
        let totals = totals(&self.segments, &self.held, &self.lost);
        let receipt = &mut self.receipt;
        // What was read in blocks that are lost nevertheless does not count.
        receipt.bytes_verified = receipt.bytes_verified.min(totals.scrubbed);
        if let Verify::Sampled { .. } = receipt.verify {
            receipt.sample_seed = Some(self.seed);
        }
        receipt.bytes_scrubbed = totals.scrubbed;
        receipt.bytes_never_populated = totals.never_populated;
        receipt.bytes_quarantined = totals.quarantined;
        receipt.quarantined = quarantined_ranges(&self.segments, &self.lost, &self.named);
        receipt.outcome = match (totals.quarantined, receipt.verify) {
            (1.., _) => Outcome::Quarantined,
            (0, Verify::None) => Outcome::Unverified,
            (0, Verify::Sampled { .. }) => Outcome::Sampled,
            (0, Verify::Full | Verify::Memory) => Outcome::Proven,
        };
    }
}
