//! Taking memory for a lease, and reading it once more before a guest gets it.
//!
//! What is in the clean set was proven to be zero when it entered it, and nobody has been given an address of it since. The
//! check is for those who write without asking: a device that was pinned to the memory all along, a wild pointer in the VMM.

use super::LeaseError;
use crate::pool::Shared;
use crate::pool::blocks::{Blocks, Taken};
use crate::scrub::{Residency, Verdict, Verify, Work, fresh_seed, pieces};
use crate::{BLOCK_SIZE, SysError};
use std::ops::Range;

/// Takes blocks out of the clean set, checked if the pool is to check. Those in which something is found are quarantined, and
/// others taken for them.
pub(super) fn take_checked(shared: &Shared, blocks: u64) -> Result<Blocks<Taken>, LeaseError> {
    let taken = take(shared, blocks)?;
    if !shared.check_on_grant {
        return Ok(taken);
    }
    let (mut taken, mut lost) = check(shared, taken)?;
    while taken.count() < blocks {
        let Ok(more) = take(shared, blocks - taken.count()) else {
            taken.give_back();
            return Err(LeaseError::FoundDirty {
                asked: blocks.saturating_mul(BLOCK_SIZE),
                quarantined: lost * BLOCK_SIZE,
                accounts: shared.ledger.accounts(),
            });
        };
        match check(shared, more) {
            Ok((more, found)) => {
                lost += found;
                taken.join(more);
            }
            Err(error) => {
                taken.give_back();
                return Err(error);
            }
        }
    }
    Ok(taken)
}

/// Reads everything in `taken` that can hold data. Blocks that are not zero are quarantined: what is left, and how many were
/// not.
fn check(shared: &Shared, mut taken: Blocks<Taken>) -> Result<(Blocks<Taken>, u64), LeaseError> {
    let populated = match populated(shared, &taken) {
        Ok(populated) => populated,
        Err(source) => {
            taken.give_back();
            return Err(LeaseError::NotChecked { source });
        }
    };
    let verify = match shared.verify {
        Verify::Memory => Verify::Memory,
        _ => Verify::Full,
    };
    let verdict = read(shared, &populated, verify);
    for failure in verdict.failures() {
        log::error!(
            "block {} quarantined before it was leased: the byte at pool offset {:#x} was zero when the block was recycled and \
             is not any more",
            failure.offset as u64 / BLOCK_SIZE,
            failure.offset
        );
    }
    for broken in verdict.broken() {
        log::error!(
            "block {} quarantined before it was leased: memory error at pool offset {:#x}: {}",
            broken.range.start as u64 / BLOCK_SIZE,
            broken.range.start,
            broken.what
        );
    }
    let before = taken.count();
    let dirty = verdict
        .failures()
        .iter()
        .map(|failure| failure.offset as u64 / BLOCK_SIZE);
    taken.quarantine_blocks(dirty);
    let broken = verdict
        .broken()
        .iter()
        .map(|broken| broken.range.start as u64 / BLOCK_SIZE);
    taken.quarantine_blocks(broken);
    let lost = before - taken.count();
    Ok((taken, lost))
}

/// What can hold data in blocks that were taken: arena offsets.
fn populated(shared: &Shared, taken: &Blocks<Taken>) -> Result<Vec<Range<usize>>, SysError> {
    // No truncation: the pool holds these blocks, so the address space does.
    let held: Vec<Range<usize>> = taken
        .extents()
        .iter()
        .map(|extent| (extent.first * BLOCK_SIZE) as usize..(extent.end() * BLOCK_SIZE) as usize)
        .collect();
    let parts = pieces(&held, super::steps::ASKED_AT_ONCE);
    let ask = |part: usize| shared.backing.residency(parts[part].clone());
    let answers: Vec<Result<Residency, SysError>> = shared.engine.workers().map(parts.len(), ask);
    let mut populated = Vec::new();
    for answer in answers {
        populated.extend(answer?.populated);
    }
    Ok(populated)
}

fn read(shared: &Shared, populated: &[Range<usize>], verify: Verify) -> Verdict {
    let engine = &shared.engine;
    // SAFETY: the ranges are disjoint, populated in the arena, and in blocks that were taken out of the clean set: nobody
    // has any business there but whoever took them.
    let job = unsafe {
        engine.job(
            shared.backing.arena(),
            populated,
            Work::Check,
            verify,
            fresh_seed(),
        )
    };
    engine.run(&job, None);
    let (_, verdict) = job
        .settle(std::time::Duration::ZERO)
        .expect("the workers have done every piece or panicked");
    verdict
}

/// Takes blocks out of the clean set. Where there are too few, what has been retired is scrubbed now, until there are enough;
/// and what other processes had not let go of is asked for again.
pub(super) fn take(shared: &Shared, blocks: u64) -> Result<Blocks<Taken>, LeaseError> {
    let asked = blocks.saturating_mul(BLOCK_SIZE);
    let mut helped = true;
    let mut reclaimed = false;
    loop {
        let accounts = match Blocks::<Taken>::take(&shared.ledger, blocks) {
            Ok(taken) => return Ok(taken),
            Err(accounts) => accounts,
        };
        let possible = accounts.clean.saturating_add(accounts.dirty);
        if !helped || asked > possible {
            if !reclaimed && asked <= possible.saturating_add(shared.reclaimable()) {
                reclaimed = true;
                helped = true;
                shared.reclaim();
                continue;
            }
            return Err(LeaseError::NotEnough { asked, accounts });
        }
        // Where there is nothing to help with any more, somebody may have finished it just now: one more look.
        helped = shared.background.help(shared.engine.workers());
    }
}
