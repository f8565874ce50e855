//! Zeroing and reading back: the jobs for it, and what has come of them.

use super::{Steps, backing, in_books, nanos, sum};
use crate::lease::receipt::QuarantineReason;
use crate::pool::blocks::{Dirty, Scrubbed, State, Verified};
use crate::pool::{OwnedFile, Shared};
use crate::scrub::{Ask, Batches, Job, Verdict, Verify, Work, Zeroed};
use crate::sys::Call;
use crate::{BLOCK_SIZE, SysError};
use std::io;
use std::ops::Range;
use std::time::Instant;

impl<S: State> Steps<S> {
    /// A job over everything that can hold data. It is the caller's to run it to its end before the blocks change hands.
    pub(in crate::lease) fn job(&mut self, work: Work) -> Job {
        let Shared { engine, verify, .. } = &**self.pool;
        if !work.zeroes() {
            self.bytes_to_read = self.to_read.as_deref().map(sum);
        }
        let ranges = match &self.to_read {
            // In a forked child nothing is there, and what lies at those addresses is its own.
            _ if !self.pool.is_here() => &[],
            Some(to_read) if !work.zeroes() => &to_read[..],
            _ => &self.populated[..],
        };
        let arena = backing(&self.pool, self.file.as_deref()).arena();
        // SAFETY: the ranges are disjoint, lie in blocks or a file that this teardown owns, and are mapped writable in the
        // arena or the file's view; read-only, once the file is sealed and its memory only read. Revocation has taken
        // every other address of theirs in this process away, and the blocks stay dirty until the job is settled. Another
        // process may write to memory that is shared with it: zeroing does not depend on what it finds, and what is read
        // back counts only once the kernel has excluded that.
        let job = unsafe { engine.job(arena, ranges, work, *verify, self.seed) };
        self.note_loops(&job, work);
        job
    }

    /// As [`job`](Self::job), over what the kernel will say of the `whole` when the work gets there.
    pub(in crate::lease) fn job_asking(&mut self, whole: Vec<Range<usize>>, work: Work) -> Job {
        let Shared { engine, verify, .. } = &**self.pool;
        let arena = backing(&self.pool, self.file.as_deref()).arena();
        let ask: Box<Ask> = match self.file.as_deref().and_then(OwnedFile::get) {
            Some(file) => {
                let inquiry = file.inquiry();
                Box::new(move |part| Ok(inquiry.residency(part)?.populated))
            }
            None => {
                // Whoever works on the job keeps the pool; the job must not, because the pool's queue keeps the job.
                let pool = self.pool.visit();
                Box::new(move |part| match pool.upgrade() {
                    Some(pool) => Ok(pool.backing.residency(part)?.populated),
                    None => Err(SysError {
                        call: Call::PagemapOpen,
                        source: io::Error::other("there is no pool"),
                    }),
                })
            }
        };
        let batches = Batches::asked_for(whole, ask);
        // SAFETY: as in `job`: what is answered lies in the range that was asked about.
        let job = unsafe { engine.job_of(arena, batches, work, *verify, self.seed) };
        self.note_loops(&job, work);
        job
    }

    fn note_loops(&mut self, job: &Job, work: Work) {
        let Shared { verify, .. } = &**self.pool;
        let choice = job.choice();
        if work.zeroes() {
            self.receipt.zero_loop = choice.zero_loop.name().to_owned();
            self.receipt.calibration.clone_from(&choice.zero_rates);
        }
        if work != Work::Zero && *verify != Verify::None {
            self.receipt.verify_loop = Some(choice.verify_loop.name().to_owned());
            self.receipt
                .verify_calibration
                .clone_from(&choice.verify_rates);
        }
    }

    /// Runs a job with all workers, and settles it.
    pub(in crate::lease) fn run(&mut self, job: &Job) -> (Zeroed, Verdict) {
        let started = Instant::now();
        let watch = self.pool.watch(self.receipt.lease);
        self.receipt.threads = self.pool.engine.run(job, watch.as_deref());
        job.settle(started.elapsed())
            .expect("the workers have done every piece or panicked")
    }
}

impl Steps<Dirty> {
    pub(in crate::lease) fn scrubbed(mut self, zeroed: &Zeroed) -> Steps<Scrubbed> {
        self.not_zeroed = self.lose(zeroed.broken());
        self.receipt.bytes_scrubbed = zeroed.bytes();
        self.receipt.steps.scrub_ns = nanos(zeroed.time());
        let shareable = self.file.is_some();
        let extents = self.receipt.blocks.clone();
        self.with_blocks(|blocks| {
            blocks.scrubbed(zeroed, |block| in_books(shareable, &extents, block))
        })
    }
}

impl Steps<Scrubbed> {
    /// Zeros were written anew to everything that can hold data now.
    pub(in crate::lease) fn zeroed_again(&mut self, zeroed: &Zeroed) {
        self.not_zeroed = self.lose(zeroed.broken());
        self.receipt.bytes_scrubbed = zeroed.bytes();
        let shareable = self.file.is_some();
        let extents = &self.receipt.blocks;
        let broken = zeroed.broken().iter();
        let blocks = broken.map(|broken| broken.range.start as u64 / BLOCK_SIZE);
        self.blocks
            .quarantine_blocks(blocks.map(|block| in_books(shareable, extents, block)));
    }

    pub(in crate::lease) fn verified(mut self, verdict: &Verdict) -> Steps<Verified> {
        self.receipt.bytes_verified = verdict.bytes();
        self.failed_bytes = verdict.failed_bytes() + self.lose(verdict.broken());
        self.receipt.steps.verify_ns = nanos(verdict.time());
        for failure in verdict.failures() {
            let detail = match self.guest_address(failure.offset) {
                Some(address) => format!("the byte at guest address {address:#x} is not zero"),
                None => format!("the byte at pool offset {:#x} is not zero", failure.offset),
            };
            let block = failure.offset as u64 / BLOCK_SIZE;
            self.lost
                .entry(block)
                .or_insert((QuarantineReason::NotZero, detail));
        }
        let shareable = self.file.is_some();
        let extents = self.receipt.blocks.clone();
        self.with_blocks(|blocks| {
            blocks.verified(verdict, |block| in_books(shareable, &extents, block))
        })
    }
}
