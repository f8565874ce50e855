//! A teardown on its way: what the typed steps of [`teardown`](super::teardown) carry along. Each step has a file of its own.

mod closing;
mod finding;
mod revoking;
mod working;

pub(super) use finding::ASKED_AT_ONCE;
pub(super) use revoking::{take_away, take_away_unasked};

use super::Segment;
use super::account::{Lost, held};
use super::receipt::{QuarantineReason, ScrubReceipt};
use crate::BLOCK_SIZE;
use crate::backing::{BLOCK, Backing};
use crate::pool::blocks::{Blocks, State};
use crate::pool::{Extent, LeaseId, Owned, OwnedFile, Shared};
use crate::scrub::{Broken, bytes_in, joined};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

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

    /// Quarantines the blocks in which something could not be accessed by a job that was given up.
    pub(super) fn lose_broken(&mut self, broken: &[Broken]) {
        self.lose(broken);
        let shareable = self.file.is_some();
        let blocks = broken
            .iter()
            .map(|broken| broken.range.start as u64 / BLOCK_SIZE);
        let extents = &self.receipt.blocks;
        self.blocks
            .quarantine_blocks(blocks.map(|block| in_books(shareable, extents, block)));
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

fn sum(ranges: &[Range<usize>]) -> u64 {
    ranges.iter().map(|range| range.len() as u64).sum()
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_a_file_stand_for_blocks_of_the_pool() {
        let extents = [
            Extent {
                first: 10,
                blocks: 2,
            },
            Extent {
                first: 40,
                blocks: 3,
            },
        ];
        let of = |block| in_books(true, &extents, block);
        assert_eq!([0, 1, 2, 3, 4].map(of), [10, 11, 40, 41, 42]);
        assert_eq!(of(5), u64::MAX, "no pool has it");
        assert_eq!(in_books(false, &extents, 3), 3);
    }
}
