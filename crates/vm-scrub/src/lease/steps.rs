//! A teardown on its way: what the typed steps of [`teardown`](super::teardown) carry along.

use super::account::{Lost, asked_about, held, parts, quarantined_ranges, totals};
use super::receipt::{Outcome, QuarantineReason, ScrubReceipt, StepTimes};
use super::returning::Returning;
use super::{Lease, Quiesced, Refused, Segment, TeardownError, blocks_of};
use crate::BLOCK_SIZE;
use crate::SysError;
use crate::backing::{BLOCK, Backing, Revocation, Revoked};
use crate::pool::blocks::{Blocks, Dirty, Scrubbed, State, Verified};
use crate::pool::{Extent, LeaseId, Owned, OwnedFile, Shared};
use crate::scrub::{
    Answers, Ask, Batches, Broken, Job, Residency, Verdict, Verify, Work, Zeroed, bytes_in,
    fresh_seed, joined, pieces, push_joined,
};
use crate::sys::Call;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How much memory the kernel is asked about in one go, in bytes: the answer takes it as long as waking a thread, or longer.
pub(super) const ASKED_AT_ONCE: usize = 256 << 20;

/// A teardown on its way: the blocks in their state, and what the steps so far have found.
#[derive(Debug)]
pub(super) struct Steps<S: State> {
    pub(super) blocks: Blocks<S>,
    pub(super) pool: Arc<Owned>,
    /// The memory, where it is shareable.
    pub(super) file: Option<Box<OwnedFile>>,
    started: Instant,
    pub(super) segments: Vec<Segment>,
    /// Blocks in the lease at the start.
    leased_blocks: u64,
    /// Ranges of the arena or the file that can hold data, ascending and disjoint. Empty before the residency is known, and
    /// where it is asked for while the work goes on.
    pub(super) populated: Vec<Range<usize>>,
    /// What is to be read back, where that is something else.
    pub(super) to_read: Option<Vec<Range<usize>>>,
    /// How many bytes of each [part](parts) can hold data.
    pub(super) held: Vec<u32>,
    /// How many bytes that is; in a file, with those that are nobody's region.
    pub(super) bytes_held: u64,
    /// How many bytes are to be read back, where that is something else.
    pub(super) bytes_to_read: Option<u64>,
    /// Bytes about which the kernel has said whether they are populated.
    pub(super) answered: u64,
    pub(super) lost: Lost,
    /// What made the blocks it is in be lost, where that is known to the page: what others could still write to when it was
    /// revoked, and what could not be accessed. Arena offsets, ascending and disjoint.
    named: Vec<Range<usize>>,
    /// Decides which lines a sample consists of.
    seed: u64,
    /// Bytes that were to be zeroed and could not be accessed.
    not_zeroed: u64,
    /// Bytes in pieces that were read back and stayed wrong, or could not be accessed.
    failed_bytes: u64,
    /// Filled in step by step.
    pub(super) receipt: ScrubReceipt,
}

/// Revokes every segment of a lease, unless something stands against it.
pub(super) fn take_away(
    mut lease: Lease,
    quiesced: Quiesced,
) -> Result<Steps<Dirty>, TeardownError> {
    if let Some(reason) = lease.refusal(&quiesced) {
        return Err(TeardownError::Refused(Box::new(Refused {
            reason,
            lease,
            quiesced,
        })));
    }
    match lease.blocks.take() {
        Some(blocks) => Ok(take_away_unasked(&mut lease, blocks)),
        // Not possible: whoever takes the blocks owns the lease, as this function does.
        None => Err(TeardownError::Unaccounted {
            lease: lease.id,
            what: "the leased memory",
            expected: lease.bytes(),
            found: 0,
        }),
    }
}

/// Revokes every segment of a lease that nobody uses any more.
pub(super) fn take_away_unasked(
    lease: &mut Lease,
    mut blocks: Blocks<super::Leased>,
) -> Steps<Dirty> {
    let started = Instant::now();
    let pool = Arc::clone(&lease.pool);
    let leased_blocks = blocks.count();
    let receipt = open_receipt(lease, &pool);
    let file = lease.file.take();
    let backing = backing(&pool, file.as_deref());
    let mut segments = Vec::new();
    let mut lost = Lost::new();
    let mut pinned: Vec<Range<usize>> = Vec::new();
    let mut unlocked = 0;
    let mut by = backing.revocation();
    let mut proofs: Vec<Revoked> = Vec::new();
    for region in std::mem::take(&mut lease.regions) {
        let mut closed = true;
        for segment in region.segments {
            // SAFETY: the segment was granted at this address when the lease was made. No handle is left and the guest
            // is quiesced, so nobody holds a reference; a stray pointer is what revocation is for.
            match unsafe {
                backing.revoke(
                    segment.offset,
                    segment.window.0,
                    segment.len,
                    pool.engine.workers(),
                )
            } {
                Ok(revoked) => {
                    if revoked.by == Revocation::Mremap {
                        by = Revocation::Mremap;
                    }
                    for range in &revoked.pinned {
                        log::error!(
                            "{}: {} bytes pinned or shared, quarantined: {}",
                            lease.id,
                            range.len(),
                            revoked.refusal
                        );
                        let why = (QuarantineReason::PinnedOrShared, revoked.refusal.clone());
                        let blocks = blocks_of(range.start, range.end);
                        lost.extend(blocks.map(|block| (block, why.clone())));
                    }
                    pinned.extend(revoked.pinned.iter().cloned());
                    unlocked += revoked.unlocked as u64;
                    proofs.push(revoked);
                }
                Err(error) => {
                    closed = false;
                    log::error!(
                        "{}: {} bytes not revoked and quarantined: {error}",
                        lease.id,
                        segment.len
                    );
                    let why = (QuarantineReason::NotRevoked, error.to_string());
                    lost.extend(segment.blocks().map(|block| (block, why.clone())));
                }
            }
            segments.push(segment);
        }
        if closed {
            pool.windows.retire(region.window);
        } else {
            region.window.leak();
        }
    }
    let shareable = file.is_some();
    blocks.quarantine_blocks(
        lost.keys()
            .map(|block| in_books(shareable, &receipt.blocks, *block)),
    );
    pinned.sort_by_key(|range| range.start);
    let mut steps = Steps {
        blocks: blocks.revoked(proofs),
        pool,
        file,
        started,
        segments,
        leased_blocks,
        populated: Vec::new(),
        to_read: None,
        held: Vec::new(),
        bytes_held: 0,
        bytes_to_read: None,
        answered: 0,
        lost,
        named: pinned,
        seed: fresh_seed(),
        not_zeroed: 0,
        failed_bytes: 0,
        receipt,
    };
    steps.receipt.revocation = by;
    steps.receipt.bytes_unlocked = unlocked;
    steps.receipt.steps.revoke_ns = nanos(started.elapsed());
    steps
}

/// Where the memory is: in a file of its own, if it is shareable.
fn backing<'a>(pool: &'a Shared, file: Option<&'a OwnedFile>) -> &'a dyn Backing {
    match file.and_then(OwnedFile::get) {
        Some(file) => file,
        None => pool.backing.as_ref(),
    }
}

/// The number by which the books know block number `block` of a lease's memory: its own, or that of the block in the pool that
/// a shareable lease took in its stead.
fn in_books(shareable: bool, extents: &[Extent], mut block: u64) -> u64 {
    if !shareable {
        return block;
    }
    for extent in extents {
        if block < extent.blocks {
            return extent.first + block;
        }
        block -= extent.blocks;
    }
    // Not possible: the lease took as many blocks as its file has. No pool has this one.
    u64::MAX
}

/// A receipt with everything that is known before the first step.
fn open_receipt(lease: &Lease, pool: &Shared) -> ScrubReceipt {
    ScrubReceipt {
        lease: lease.id,
        guest: lease.guest.clone(),
        regions: lease.guest_regions().collect(),
        blocks: lease.extents.clone(),
        page_size: lease.page_size(),
        revocation: backing(pool, lease.file.as_deref()).revocation(),
        verify: pool.verify,
        bytes_total: lease.bytes(),
        bytes_scrubbed: 0,
        bytes_never_populated: 0,
        bytes_quarantined: 0,
        bytes_verified: 0,
        quarantined: Vec::new(),
        bytes_unlocked: 0,
        bytes_returned: 0,
        // The loops depend on how much there is to do.
        zero_loop: String::new(),
        verify_loop: None,
        sample_seed: None,
        calibration: Vec::new(),
        verify_calibration: Vec::new(),
        threads: pool.engine.workers().threads(),
        elapsed_ns: 0,
        steps: StepTimes::default(),
        ended_unix_ms: 0,
        // Until the opposite is proven.
        outcome: Outcome::Quarantined,
    }
}

impl<S: State> Steps<S> {
    fn with_blocks<T: State>(self, change: impl FnOnce(Blocks<S>) -> Blocks<T>) -> Steps<T> {
        Steps {
            blocks: change(self.blocks),
            pool: self.pool,
            file: self.file,
            started: self.started,
            segments: self.segments,
            leased_blocks: self.leased_blocks,
            populated: self.populated,
            to_read: self.to_read,
            held: self.held,
            bytes_held: self.bytes_held,
            bytes_to_read: self.bytes_to_read,
            answered: self.answered,
            lost: self.lost,
            named: self.named,
            seed: self.seed,
            not_zeroed: self.not_zeroed,
            failed_bytes: self.failed_bytes,
            receipt: self.receipt,
        }
    }

    /// A job over everything that can hold data. It is the caller's to run it to its end before the blocks change hands.
    pub(super) fn job(&mut self, work: Work) -> Job {
        let Shared { engine, verify, .. } = &**self.pool;
        if !work.zeroes() {
            self.bytes_to_read = self.to_read.as_deref().map(sum);
        }
        let ranges = match &self.to_read {
            Some(to_read) if !work.zeroes() => to_read,
            _ => &self.populated,
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
    pub(super) fn job_asking(&mut self, whole: Vec<Range<usize>>, work: Work) -> Job {
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
    pub(super) fn run(&mut self, job: &Job) -> (Zeroed, Verdict) {
        let started = Instant::now();
        let watch = self.pool.watch(self.receipt.lease);
        self.receipt.threads = self.pool.engine.run(job, watch.as_deref());
        job.settle(started.elapsed())
            .expect("the workers have done every piece or panicked")
    }

    /// Counts how much can hold data, once the ranges are known.
    pub(super) fn count_populated(&mut self) {
        self.held = held(&self.segments, &self.populated);
        self.bytes_held = sum(&self.populated);
    }

    /// The lease that is torn down.
    pub(super) fn lease(&self) -> LeaseId {
        self.receipt.lease
    }

    /// Remembers what could not be accessed; returns how many bytes of what there was to do that is.
    fn lose(&mut self, broken: &[Broken]) -> u64 {
        for broken in broken {
            let block = broken.range.start as u64 / BLOCK_SIZE;
            let detail = match self.guest_address(broken.range.start) {
                Some(address) => format!("at guest address {address:#x}: {}", broken.what),
                None => format!("at pool offset {:#x}: {}", broken.range.start, broken.what),
            };
            log::error!("{}: memory error {detail}", self.receipt.lease);
            self.lost
                .entry(block)
                .or_insert((QuarantineReason::MemoryError, detail));
        }
        let reported = broken.iter().map(|broken| {
            let block = broken.range.start / BLOCK * BLOCK;
            broken.reported.start.max(block)..broken.reported.end.min(block + BLOCK)
        });
        self.named = joined(self.named.drain(..).chain(reported));
        bytes_in(broken.iter().map(|broken| broken.range.clone()))
    }

    /// The guest address of an arena offset that belongs to this lease.
    fn guest_address(&self, offset: usize) -> Option<u64> {
        let segment = self
            .segments
            .iter()
            .find(|segment| (segment.offset..segment.offset + segment.len).contains(&offset))?;
        Some(segment.guest_address + (offset - segment.offset) as u64)
    }
}

impl Steps<Dirty> {
    /// Asks the kernel which pages can hold data, about large leases from several threads. Where it does not say, the blocks
    /// are quarantined.
    pub(super) fn find_populated(&mut self) {
        let begun = Instant::now();
        if self.file.is_some() {
            self.find_populated_in_file();
            self.receipt.steps.residency_ns = nanos(begun.elapsed());
            return;
        }
        let mut populated = Vec::new();
        let mut broken: Vec<Range<usize>> = Vec::new();
        let mut answered = 0;
        let mut answer = |residency: Residency| {
            let held: usize = residency.populated.iter().map(Range::len).sum();
            answered += held as u64 + residency.never_populated;
            populated.extend(residency.populated);
        };
        let parts = self.parts_to_ask_about();
        let backing = &self.pool.backing;
        let ask = |part: usize| backing.residency(parts[part].clone());
        let answers = self.pool.engine.workers().map(parts.len(), ask);
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
                    Err(error) if self.unanswered(block, &error) => broken.push(whole),
                    Err(_) => {}
                }
            }
        }
        self.answered = answered + bytes_in(broken.iter().cloned());
        self.named = joined(self.named.drain(..).chain(broken));
        populated.sort_by_key(|range| range.start);
        self.populated = populated;
        self.count_populated();
        self.receipt.steps.residency_ns = nanos(begun.elapsed());
    }

    /// Quarantines a block about which the kernel did not say what is populated. Whether it said why: it is broken.
    fn unanswered(&mut self, block: u64, error: &SysError) -> bool {
        let broken = error.errno() == Some(libc::EHWPOISON);
        let reason = if broken {
            log::error!("block {block} quarantined: {error}");
            QuarantineReason::MemoryError
        } else {
            log::error!("block {block} quarantined, residency unknown: {error}");
            QuarantineReason::ResidencyUnknown
        };
        self.lost.insert(block, (reason, error.to_string()));
        self.blocks.quarantine_blocks([block]);
        broken
    }

    /// A job over everything that can hold data, which the kernel is asked about when the work gets there.
    pub(super) fn job_later(&mut self, work: Work) -> Job {
        let whole = match self.file.as_deref().and_then(OwnedFile::get) {
            Some(file) => whole_file(&self.segments, file.len()),
            None => self.ranges_to_ask_about(),
        };
        self.job_asking(whole, work)
    }

    /// Takes down what the kernel has said while the [job](Self::job_later) was done.
    pub(super) fn take_answers(&mut self, answers: Answers) {
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
        for (part, error) in answers.failed {
            let block = part.start as u64 / BLOCK_SIZE;
            if self.unanswered(block, &error) {
                self.named = joined(self.named.drain(..).chain([part]));
            } else {
                self.answered -= part.len() as u64;
            }
        }
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

    pub(super) fn scrubbed(mut self, zeroed: &Zeroed) -> Steps<Scrubbed> {
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
    pub(super) fn zeroed_again(&mut self, zeroed: &Zeroed) {
        self.not_zeroed = self.lose(zeroed.broken());
        self.receipt.bytes_scrubbed = zeroed.bytes();
        let shareable = self.file.is_some();
        let extents = &self.receipt.blocks;
        let broken = zeroed.broken().iter();
        let blocks = broken.map(|broken| broken.range.start as u64 / BLOCK_SIZE);
        self.blocks
            .quarantine_blocks(blocks.map(|block| in_books(shareable, extents, block)));
    }

    pub(super) fn verified(mut self, verdict: &Verdict) -> Steps<Verified> {
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

impl Steps<Verified> {
    /// Puts what is clean into the pool and closes the account.
    pub(super) fn recycle(self) -> Result<ScrubReceipt, TeardownError> {
        let recycling = Instant::now();
        let mut steps = self.checked()?;
        let mut returning = Returning::default();
        while let Some(excess) = steps.next_excess(&mut returning) {
            steps.give_back(&excess);
        }
        Ok(steps.finish(recycling))
    }

    /// Compares what the steps did with what there was to do. If the numbers do not add up, everything is quarantined.
    pub(super) fn checked(self) -> Result<Self, TeardownError> {
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
    pub(super) fn finish(mut self, recycling: Instant) -> ScrubReceipt {
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
    pub(super) fn close_receipt(&mut self) {
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

fn sum(ranges: &[Range<usize>]) -> u64 {
    ranges.iter().map(|range| range.len() as u64).sum()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
