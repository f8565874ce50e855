//! Taking a guest's memory back, step by step.
//!
//! Each step is a type, and each type has only the next step:
//!
//! ```text
//! Lease --revoke--> DirtyMemory --scrub--> ScrubbedMemory --verify--> VerifiedMemory --recycle--> ScrubReceipt
//! ```
//!
//! [`Lease::teardown`] takes all of them, with zeroing and reading back fused. Whoever stops half-way, by dropping one of
//! these values or by a panic, leaves the blocks in quarantine.
//!
//! ```
//! # use vm_scrub::{Pool, Quiesced};
//! # use vm_memory::GuestAddress;
//! let pool = Pool::builder().capacity(2 << 20).build()?;
//! let lease = pool.lease(&[(GuestAddress(0), 2 << 20)])?;
//! // SAFETY: nothing ever got the memory's address.
//! let quiesced = unsafe { Quiesced::assert(&lease) };
//! let receipt = lease.revoke(quiesced)?.scrub().verify().recycle()?;
//! assert!(receipt.is_proven());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Memory that was not scrubbed, or not verified, has no way into the pool:
//!
//! ```compile_fail,E0599
//! # use vm_scrub::{Pool, Quiesced};
//! # use vm_memory::GuestAddress;
//! # let pool = Pool::builder().capacity(2 << 20).build()?;
//! # let lease = pool.lease(&[(GuestAddress(0), 2 << 20)])?;
//! # // SAFETY: nothing ever got the memory's address.
//! # let quiesced = unsafe { Quiesced::assert(&lease) };
//! let receipt = lease.revoke(quiesced)?.recycle()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! ```compile_fail,E0599
//! # use vm_scrub::{Pool, Quiesced};
//! # use vm_memory::GuestAddress;
//! # let pool = Pool::builder().capacity(2 << 20).build()?;
//! # let lease = pool.lease(&[(GuestAddress(0), 2 << 20)])?;
//! # // SAFETY: nothing ever got the memory's address.
//! # let quiesced = unsafe { Quiesced::assert(&lease) };
//! let receipt = lease.revoke(quiesced)?.scrub().recycle()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use super::receipt::{Outcome, QuarantineReason, QuarantinedRange, ScrubReceipt, StepTimes};
use super::{Lease, Quiesced, Refused, Segment, TeardownError};
use crate::BLOCK_SIZE;
use crate::backing::Revoked;
use crate::pool::Shared;
use crate::pool::blocks::{Blocks, Dirty, Scrubbed, State, Verified};
use crate::scrub::{Verdict, Verify, Zeroed};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Out of the guest's reach, with the guest's bytes in it.
#[derive(Debug)]
#[must_use = "dropping it quarantines the memory"]
pub struct DirtyMemory {
    steps: Steps<Dirty>,
}

/// Zeros were written; nobody has read them back.
#[derive(Debug)]
#[must_use = "dropping it quarantines the memory"]
pub struct ScrubbedMemory {
    steps: Steps<Scrubbed>,
}

/// Read back as the pool's policy says.
#[derive(Debug)]
#[must_use = "dropping it quarantines the memory"]
pub struct VerifiedMemory {
    steps: Steps<Verified>,
}

/// A teardown on its way: the blocks in their state, and what the steps so far have found.
#[derive(Debug)]
struct Steps<S: State> {
    blocks: Blocks<S>,
    pool: Arc<Shared>,
    started: Instant,
    segments: Vec<Segment>,
    /// Blocks in the lease at the start.
    leased_blocks: u64,
    /// Ranges of the arena that can hold data, ascending and disjoint. Empty before the residency is known.
    populated: Vec<Range<usize>>,
    /// Quarantined blocks: why, and what was seen.
    lost: BTreeMap<u64, (QuarantineReason, String)>,
    /// Bytes in pieces that were read back and stayed wrong.
    failed_bytes: u64,
    /// Filled in step by step.
    receipt: ScrubReceipt,
}

impl Lease {
    /// Takes the memory away from the guest, sets every byte to zero, reads every byte back, and puts it into the pool.
    ///
    /// The receipt accounts for every byte. Memory that could not be proven clean is quarantined and listed in it: look
    /// at [`ScrubReceipt::is_proven`].
    ///
    /// # Errors
    ///
    /// [`TeardownError::Refused`] while memslots or handles are left, or if `quiesced` is about another lease: nothing was
    /// done, and the error hands both back. [`TeardownError::Unaccounted`] if the numbers do not add up.
    pub fn teardown(self, quiesced: Quiesced) -> Result<ScrubReceipt, TeardownError> {
        self.revoke(quiesced)?.scrub_and_verify().recycle()
    }

    /// The first step alone: takes the memory out of the guest's windows, which fault from then on.
    ///
    /// # Errors
    ///
    /// [`TeardownError::Refused`], as for [`Lease::teardown`]. A range that cannot be revoked is quarantined and does not
    /// stop the rest.
    pub fn revoke(mut self, quiesced: Quiesced) -> Result<DirtyMemory, TeardownError> {
        match self.refusal(&quiesced) {
            None => {}
            Some(reason) => {
                return Err(TeardownError::Refused(Box::new(Refused {
                    reason,
                    lease: self,
                    quiesced,
                })));
            }
        }
        // Not possible: only this function and `abandon` take the blocks, and both own the lease.
        let Some(blocks) = self.blocks.take() else {
            return Err(TeardownError::Unaccounted {
                lease: self.id,
                what: "the leased memory",
                expected: self.bytes(),
                found: 0,
            });
        };
        Ok(DirtyMemory {
            steps: take_away(&mut self, blocks),
        })
    }
}

/// Revokes every segment of a lease that nobody uses any more.
fn take_away(lease: &mut Lease, mut blocks: Blocks<super::Leased>) -> Steps<Dirty> {
    let started = Instant::now();
    let pool = Arc::clone(&lease.pool);
    let leased_blocks = blocks.count();
    let receipt = open_receipt(lease, &pool);
    let mut segments = Vec::new();
    let mut lost = BTreeMap::new();
    let mut proofs: Vec<Revoked> = Vec::new();
    for region in std::mem::take(&mut lease.regions) {
        let mut closed = true;
        for segment in region.segments {
            // SAFETY: the segment was granted at this address when the lease was made. No handle is left and the guest
            // is quiesced, so nobody holds a reference; a stray pointer is what revocation is for.
            match unsafe {
                pool.backing
                    .revoke(segment.offset, segment.window.0, segment.len)
            } {
                Ok(proof) => proofs.push(proof),
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
    blocks.quarantine_blocks(lost.keys().copied());
    let mut steps = Steps {
        blocks: blocks.revoked(proofs),
        pool,
        started,
        segments,
        leased_blocks,
        populated: Vec::new(),
        lost,
        failed_bytes: 0,
        receipt,
    };
    steps.receipt.steps.revoke_ns = nanos(started.elapsed());
    steps
}

/// A receipt with everything that is known before the first step.
fn open_receipt(lease: &Lease, pool: &Shared) -> ScrubReceipt {
    ScrubReceipt {
        lease: lease.id,
        guest: lease.guest.clone(),
        regions: lease.guest_regions().collect(),
        blocks: lease.extents.clone(),
        page_size: pool.page_size,
        revocation: pool.backing.revocation(),
        verify: pool.verify,
        bytes_total: lease.bytes(),
        bytes_scrubbed: 0,
        bytes_never_populated: 0,
        bytes_quarantined: 0,
        bytes_verified: 0,
        quarantined: Vec::new(),
        zero_loop: pool.engine.zero_loop().name().to_owned(),
        verify_loop: (pool.verify != Verify::None)
            .then(|| pool.engine.verify_loop().name().to_owned()),
        threads: pool.engine.workers().threads(),
        elapsed_ns: 0,
        steps: StepTimes::default(),
        ended_unix_ms: 0,
        // Until the opposite is proven.
        outcome: Outcome::Quarantined,
    }
}

impl DirtyMemory {
    /// Sets every byte that can hold data to zero, in parallel. Pages that were never populated are skipped.
    pub fn scrub(self) -> ScrubbedMemory {
        let mut steps = self.steps;
        steps.find_populated();
        // SAFETY: the ranges are disjoint, lie in blocks that this teardown owns, and are mapped writable in the arena.
        // Revocation has taken every other address of theirs away.
        let zeroed = unsafe {
            steps
                .pool
                .engine
                .zero(steps.pool.backing.arena(), &steps.populated)
        };
        ScrubbedMemory {
            steps: steps.scrubbed(&zeroed),
        }
    }

    /// Zeroes and reads back piece by piece, while each piece is in the cache: the same as [`scrub`](Self::scrub) and
    /// [`verify`](ScrubbedMemory::verify), and faster.
    pub fn scrub_and_verify(self) -> VerifiedMemory {
        let mut steps = self.steps;
        steps.find_populated();
        let shared = &steps.pool;
        // SAFETY: as in `scrub`.
        let (zeroed, verdict) = unsafe {
            shared
                .engine
                .zero_and_verify(shared.backing.arena(), &steps.populated, shared.verify)
        };
        VerifiedMemory {
            steps: steps.scrubbed(&zeroed).verified(&verdict),
        }
    }
}

impl ScrubbedMemory {
    /// Reads back as much as the pool's policy says. What is not zero is scrubbed once more, then quarantined.
    pub fn verify(self) -> VerifiedMemory {
        let steps = self.steps;
        let shared = &steps.pool;
        // SAFETY: as in `DirtyMemory::scrub`.
        let verdict = unsafe {
            shared
                .engine
                .verify(shared.backing.arena(), &steps.populated, shared.verify)
        };
        VerifiedMemory {
            steps: steps.verified(&verdict),
        }
    }
}

impl VerifiedMemory {
    /// Puts what is clean into the pool and closes the account.
    ///
    /// # Errors
    ///
    /// [`TeardownError::Unaccounted`] if the numbers of the steps do not add up; everything is quarantined then.
    pub fn recycle(self) -> Result<ScrubReceipt, TeardownError> {
        let mut steps = self.steps;
        let recycling = Instant::now();
        if let Err(error) = steps.close_account() {
            log::error!("{error}");
            steps.blocks.quarantine();
            return Err(error);
        }
        let mut receipt = steps.receipt;
        steps.blocks.recycle();
        receipt.steps.recycle_ns = nanos(recycling.elapsed());
        receipt.elapsed_ns = nanos(steps.started.elapsed());
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
        Ok(receipt)
    }
}

impl<S: State> Steps<S> {
    fn with_blocks<T: State>(self, change: impl FnOnce(Blocks<S>) -> Blocks<T>) -> Steps<T> {
        Steps {
            blocks: change(self.blocks),
            pool: self.pool,
            started: self.started,
            segments: self.segments,
            leased_blocks: self.leased_blocks,
            populated: self.populated,
            lost: self.lost,
            failed_bytes: self.failed_bytes,
            receipt: self.receipt,
        }
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
    /// Asks the kernel which pages can hold data. Where it does not say, the blocks are quarantined.
    fn find_populated(&mut self) {
        let begun = Instant::now();
        let mut populated = Vec::new();
        for segment in &self.segments {
            // A segment is revoked as a whole or not at all.
            if segment.blocks().any(|block| self.lost.contains_key(&block)) {
                continue;
            }
            let all = segment.offset..segment.offset + segment.len;
            if let Ok(residency) = self.pool.backing.residency(all) {
                populated.extend(residency.populated);
                continue;
            }
            // Once more, block by block: one page that the kernel cannot supply must not cost the whole guest's memory.
            for (_, part) in parts(std::slice::from_ref(segment)) {
                let block = part.start as u64 / BLOCK_SIZE;
                match self.pool.backing.residency(part) {
                    Ok(residency) => populated.extend(residency.populated),
                    Err(error) => {
                        log::error!("block {block} quarantined, residency unknown: {error}");
                        let why = (QuarantineReason::ResidencyUnknown, error.to_string());
                        self.lost.insert(block, why);
                        self.blocks.quarantine_blocks([block]);
                    }
                }
            }
        }
        populated.sort_by_key(|range| range.start);
        self.populated = populated;
        self.receipt.steps.residency_ns = nanos(begun.elapsed());
    }

    fn scrubbed(mut self, zeroed: &Zeroed) -> Steps<Scrubbed> {
        self.receipt.bytes_scrubbed = zeroed.bytes();
        self.receipt.steps.scrub_ns = nanos(zeroed.time());
        self.with_blocks(|blocks| blocks.scrubbed(zeroed))
    }
}

impl Steps<Scrubbed> {
    fn verified(mut self, verdict: &Verdict) -> Steps<Verified> {
        self.receipt.bytes_verified = verdict.bytes();
        self.failed_bytes = verdict.failed_bytes();
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
        self.with_blocks(|blocks| blocks.verified(verdict))
    }
}

impl Steps<Verified> {
    /// Compares what the steps did with what there was to do, and fills in the receipt's totals.
    fn close_account(&mut self) -> Result<(), TeardownError> {
        let receipt = &mut self.receipt;
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
        let populated: u64 = self.populated.iter().map(|range| range.len() as u64).sum();
        check("what was scrubbed", populated, receipt.bytes_scrubbed)?;

        let totals = totals(&self.segments, &self.populated, &self.lost);
        let held = self.blocks.count() + self.lost.len() as u64;
        check(
            "the blocks of the lease",
            self.leased_blocks * BLOCK_SIZE,
            held * BLOCK_SIZE,
        )?;
        let sum = totals.scrubbed + totals.never_populated + totals.quarantined;
        check("the sum of all parts", receipt.bytes_total, sum)?;
        if receipt.verify != Verify::None {
            let read = receipt.bytes_verified + self.failed_bytes;
            check("what was read back", populated, read)?;
            receipt.bytes_verified = totals.scrubbed;
        }
        receipt.bytes_scrubbed = totals.scrubbed;
        receipt.bytes_never_populated = totals.never_populated;
        receipt.bytes_quarantined = totals.quarantined;
        receipt.quarantined = quarantined_ranges(&self.segments, &self.lost);
        receipt.outcome = match (totals.quarantined, receipt.verify) {
            (1.., _) => Outcome::Quarantined,
            (0, Verify::None) => Outcome::Unverified,
            (0, Verify::Full) => Outcome::Proven,
        };
        Ok(())
    }
}

/// Where a lease's bytes ended up.
#[derive(Debug, Default, PartialEq, Eq)]
struct Totals {
    scrubbed: u64,
    never_populated: u64,
    quarantined: u64,
}

type Lost = BTreeMap<u64, (QuarantineReason, String)>;

/// Sorts a lease's bytes: in a lost block, else populated, else never populated. `populated` is ascending and disjoint.
fn totals(segments: &[Segment], populated: &[Range<usize>], lost: &Lost) -> Totals {
    let mut totals = Totals::default();
    for (segment, part) in parts(segments) {
        let bytes = part.len() as u64;
        if lost.contains_key(&(part.start as u64 / BLOCK_SIZE)) {
            totals.quarantined += bytes;
            continue;
        }
        debug_assert!(part.end <= segment.offset + segment.len);
        let first = populated.partition_point(|range| range.end <= part.start);
        let held: usize = populated[first..]
            .iter()
            .take_while(|range| range.start < part.end)
            .map(|range| range.end.min(part.end) - range.start.max(part.start))
            .sum();
        totals.scrubbed += held as u64;
        totals.never_populated += bytes - held as u64;
    }
    totals
}

/// Each segment's share of each block it lies in, as arena offsets.
fn parts(segments: &[Segment]) -> impl Iterator<Item = (&Segment, Range<usize>)> {
    segments.iter().flat_map(|segment| {
        let end = segment.offset + segment.len;
        let block = BLOCK_SIZE as usize;
        (segment.offset..end)
            .step_by(block)
            .map(move |start| (segment, start..end.min(start + block)))
    })
}

/// The lost blocks as guest ranges; neighbours with the same reason are one.
fn quarantined_ranges(segments: &[Segment], lost: &Lost) -> Vec<QuarantinedRange> {
    let mut ranges: Vec<QuarantinedRange> = Vec::new();
    for (segment, part) in parts(segments) {
        let Some((reason, detail)) = lost.get(&(part.start as u64 / BLOCK_SIZE)) else {
            continue;
        };
        let guest_address = segment.guest_address + (part.start - segment.offset) as u64;
        match ranges.last_mut() {
            Some(last)
                if last.reason == *reason && last.guest_address + last.bytes == guest_address =>
            {
                last.bytes += part.len() as u64;
            }
            _ => ranges.push(QuarantinedRange {
                guest_address,
                bytes: part.len() as u64,
                reason: *reason,
                detail: detail.clone(),
            }),
        }
    }
    ranges
}

/// What happens to a lease that is dropped.
pub(super) fn abandon(lease: &mut Lease) {
    let Some(blocks) = lease.blocks.take() else {
        return;
    };
    let id = lease.id;
    let memslots = lease.registrations.count();
    let holders = lease.handles.holders();
    if memslots > 0 || holders > 0 {
        // Somebody may be using the memory right now. Unmapping it would crash them; leaving it mapped and never leasing
        // it again harms nobody.
        log::error!(
            "{id} dropped with {memslots} memslots and {holders} owners left: quarantined, and left mapped"
        );
        blocks.quarantine();
        for region in std::mem::take(&mut lease.regions) {
            region.window.leak();
        }
        return;
    }
    let stopped = lease.registrations.all_deleted() || !lease.handles.exposed();
    let memory = DirtyMemory {
        steps: take_away(lease, blocks),
    };
    if !stopped || std::thread::panicking() {
        log::error!("{id} dropped without a teardown: quarantined");
        memory.steps.blocks.quarantine();
        return;
    }
    match memory.scrub_and_verify().recycle() {
        Ok(receipt) => log::warn!(
            "{id} dropped without a teardown: torn down now, outcome {:?}",
            receipt.outcome
        ),
        Err(error) => log::error!("{id} dropped without a teardown: {error}"),
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
