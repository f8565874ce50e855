//! What is left to do to a retired lease, stage by stage.
//!
//! The stages are the steps of any teardown, cut so that whoever is at one can be stopped within a millisecond: those that zero or
//! read are jobs, which any number of threads take batches of; the others are one thread's, which looks up between two parts. A
//! stage that is stopped is the stage that is gone on with.

use super::receipt::QuarantineReason;
use super::returning::Returning;
use super::sealing::PAUSES;
use super::steps::Steps;
use super::{ScrubReceipt, TeardownError};
use crate::backing::{SharedFile, is_still_shared};
use crate::pool::blocks::{Dirty, Scrubbed, Verified};
use crate::pool::still_shared;
use crate::scrub::{Job, Work, Zeroed};
use crate::{Revocation, SysError};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long a thread that waits until it is time to seal once more does not look up.
const NAP: Duration = Duration::from_micros(500);

/// A stage, and what it works on.
#[derive(Debug)]
pub(super) enum Stage {
    /// Zeroing; and reading back, unless the memory is shared: for the time after so many attempts to seal it.
    Zero(Box<Steps<Dirty>>, Arc<Job>, usize),
    /// Unmapping what was zeroed, and sealing it.
    Seal(Box<Steps<Dirty>>, Zeroed, usize),
    /// Somebody could still write to it: waiting, to zero and seal it once more.
    Pause(Box<Steps<Dirty>>, Zeroed, Pause),
    /// Reading back what is sealed.
    Read(Box<Steps<Scrubbed>>, Arc<Job>),
    /// Giving back what is not to stay populated.
    GiveBack(Box<Steps<Verified>>, Returning),
}

/// How long to wait, and for which attempt to seal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pause {
    until: Instant,
    attempt: usize,
}

/// What a teardown ends with.
pub(super) type End = Result<ScrubReceipt, TeardownError>;

/// What comes after a stage.
#[derive(Debug)]
pub(super) enum Next {
    /// This one: another, or the same if it was stopped.
    Stage(Stage),
    Over(Box<End>),
}

/// What is left of a lease whose scrubbing is given up.
#[derive(Debug)]
pub(super) enum Left {
    Dirty(Box<Steps<Dirty>>),
    Over(Box<End>),
}

/// Closes the account of memory of which nothing is left to be done.
fn over(steps: Steps<Verified>) -> Next {
    let recycling = Instant::now();
    let end = steps.checked().map(|steps| steps.finish(recycling));
    Next::Over(Box::new(end))
}

impl Stage {
    /// The first stage of memory that has been taken away from its guest.
    pub(super) fn first(steps: Steps<Dirty>) -> Self {
        Self::zero(Box::new(steps), 0)
    }

    fn zero(mut steps: Box<Steps<Dirty>>, attempt: usize) -> Self {
        // Shared memory is sealed before it is read back.
        let work = if steps.file.is_some() {
            Work::Zero
        } else {
            Work::ZeroAndRead
        };
        let job = Arc::new(steps.job_later(work));
        Stage::Zero(steps, job, attempt)
    }

    /// The job of this stage, if it is one for many threads.
    pub(super) fn job(&self) -> Option<&Arc<Job>> {
        match self {
            Stage::Zero(_, job, _) | Stage::Read(_, job) => Some(job),
            Stage::Seal(..) | Stage::Pause(..) | Stage::GiveBack(..) => None,
        }
    }

    /// Whether its job, if it is one, is done, so that one thread can [proceed](Self::proceed).
    pub(super) fn is_for_one(&self) -> bool {
        self.job().is_none_or(|job| job.is_done())
    }

    /// Whether there is something that one more thread could do.
    pub(super) fn has_work(&self) -> bool {
        self.job()
            .is_none_or(|job| job.has_batches() || job.is_done())
    }

    /// How many bytes were done in the stages before, if what is done in each is `bytes` bytes. `None` if what is done in this one
    /// does not count: zeroing once more.
    pub(super) fn done_before(&self, bytes: u64) -> Option<u64> {
        match self {
            Stage::Zero(_, _, 0) => Some(0),
            Stage::Zero(..) | Stage::Seal(..) | Stage::Pause(..) => None,
            Stage::Read(..) | Stage::GiveBack(..) => Some(bytes),
        }
    }

    /// Goes on by one stage, or as far as `go_on`, asked with how many bytes are to be worked on, allows; `tell` hears how many bytes
    /// are done in this stage.
    pub(super) fn proceed(self, go_on: &mut dyn FnMut(usize) -> bool, tell: &dyn Fn(u64)) -> Next {
        match self {
            Stage::Zero(steps, job, attempt) => zeroed(steps, job, attempt),
            Stage::Seal(steps, zeroed, attempt) => seal(steps, zeroed, attempt, go_on),
            Stage::Pause(steps, zeroed, pause) => wait(steps, zeroed, pause, go_on),
            Stage::Read(steps, job) => match job.settle(job.thread_time()) {
                Some((_, verdict)) => over(steps.read_sealed(&verdict, job.take_answers())),
                None => Next::Stage(Stage::Read(steps, job)),
            },
            Stage::GiveBack(steps, returning) => give_back(steps, returning, go_on, tell),
        }
    }

    /// Does nothing more: the memory is dirty. What is sealed cannot be zeroed any more, and is withheld until somebody has read it
    /// back. What was proven to be clean is, and stays populated.
    pub(super) fn give_up(self) -> Left {
        let steps = match self {
            Stage::Zero(mut steps, job, _) => {
                // What could not be accessed has other memory in its place now, which is not what has to be zeroed.
                steps.lose_broken(&job.take_broken());
                return Left::Dirty(steps);
            }
            Stage::Seal(mut steps, zeroed, _) | Stage::Pause(mut steps, zeroed, _) => {
                steps.lose_broken(zeroed.broken());
                return Left::Dirty(steps);
            }
            Stage::Read(steps, _) => steps.unread(
                QuarantineReason::NotReadBack,
                "cancelled after it was sealed, before it was read back",
            ),
            Stage::GiveBack(steps, _) => *steps,
        };
        match over(steps) {
            Next::Over(end) => Left::Over(end),
            // Not possible: that was the end.
            Next::Stage(stage) => stage.give_up(),
        }
    }
}

fn zeroed(mut steps: Box<Steps<Dirty>>, job: Arc<Job>, attempt: usize) -> Next {
    // Threads came and went: what counts is how long they worked, all together.
    let Some((zeroed, verdict)) = job.settle(job.thread_time()) else {
        return Next::Stage(Stage::Zero(steps, job, attempt));
    };
    steps.take_answers(job.take_answers());
    drop(job);
    if steps.file.is_some() {
        if steps.lost.is_empty() && zeroed.broken().is_empty() {
            return Next::Stage(Stage::Seal(steps, zeroed, attempt));
        }
        let detail = "a part of the same file is not clean";
        let steps = steps.scrubbed(&zeroed);
        return over(steps.unread(QuarantineReason::SameFile, detail));
    }
    match steps.scrubbed(&zeroed).verified(&verdict).checked() {
        Ok(steps) => Next::Stage(Stage::GiveBack(Box::new(steps), Returning::default())),
        Err(error) => Next::Over(Box::new(Err(error))),
    }
}

fn seal(
    mut steps: Box<Steps<Dirty>>,
    zeroed: Zeroed,
    attempt: usize,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Next {
    loop {
        match steps.with_file(SharedFile::close_part) {
            Ok(true) => break,
            Ok(false) if go_on(0) => {}
            Ok(false) => return Next::Stage(Stage::Seal(steps, zeroed, attempt)),
            Err(error) => return not_sealed(steps, &zeroed, &error),
        }
    }
    match steps.with_file(SharedFile::seal) {
        Ok(()) => {}
        Err(error) if !is_still_shared(&error) => return not_sealed(steps, &zeroed, &error),
        Err(error) => {
            let Some(pause) = PAUSES.get(attempt) else {
                let steps = steps.scrubbed(&zeroed);
                return over(steps.unread(QuarantineReason::StillShared, &still_shared(&error)));
            };
            let pause = Pause {
                until: Instant::now() + *pause,
                attempt: attempt + 1,
            };
            return Next::Stage(Stage::Pause(steps, zeroed, pause));
        }
    }
    steps.receipt.revocation = Revocation::Sealed;
    if let Err(error) = steps.with_file(SharedFile::open) {
        return not_sealed(steps, &zeroed, &error);
    }
    let mut steps = Box::new(steps.scrubbed(&zeroed));
    let job = Arc::new(steps.job_reading_sealed());
    Next::Stage(Stage::Read(steps, job))
}

fn not_sealed(steps: Box<Steps<Dirty>>, zeroed: &Zeroed, error: &SysError) -> Next {
    let steps = steps.scrubbed(zeroed);
    over(steps.unread(QuarantineReason::NotSealed, &error.to_string()))
}

fn wait(
    mut steps: Box<Steps<Dirty>>,
    zeroed: Zeroed,
    pause: Pause,
    go_on: &mut dyn FnMut(usize) -> bool,
) -> Next {
    while Instant::now() < pause.until {
        if !go_on(0) {
            return Next::Stage(Stage::Pause(steps, zeroed, pause));
        }
        thread::sleep(NAP);
    }
    match steps.with_file(SharedFile::open) {
        // Whoever could write may have written.
        Ok(()) => Next::Stage(Stage::zero(steps, pause.attempt)),
        Err(error) => not_sealed(steps, &zeroed, &error),
    }
}

fn give_back(
    mut steps: Box<Steps<Verified>>,
    mut returning: Returning,
    go_on: &mut dyn FnMut(usize) -> bool,
    tell: &dyn Fn(u64),
) -> Next {
    while let Some(excess) = steps.next_excess(&mut returning) {
        if !go_on(excess.bytes) {
            returning.put_back(excess);
            return Next::Stage(Stage::GiveBack(steps, returning));
        }
        steps.give_back(&excess);
        tell(returning.done);
    }
    over(*steps)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::super::steps::take_away;
    use super::super::{LeaseOptions, Quiesced};
    use super::*;
    use crate::{BLOCK_SIZE, PageSize, Pool};
    use vm_memory::GuestAddress;

    #[test]
    fn who_waits_to_seal_once_more_looks_up_again_and_again() {
        let builder = Pool::builder().capacity(BLOCK_SIZE).threads(1);
        let pool = builder.page_size(PageSize::Base4K).build().unwrap();
        let options = LeaseOptions::new().shareable(true);
        let lease = pool
            .lease_with(&[(GuestAddress(0), BLOCK_SIZE)], options)
            .unwrap();
        // SAFETY: nobody uses the memory.
        let quiesced = unsafe { Quiesced::assert(&lease) };
        let mut steps = take_away(lease, quiesced).unwrap();
        steps.find_populated();
        let job = steps.job(Work::Zero);
        let (zeroed, _) = steps.run(&job);
        let pause = Pause {
            until: Instant::now() + Duration::from_secs(3600),
            attempt: 1,
        };
        let mut asked = 0;
        let mut go_on = |_| {
            asked += 1;
            asked < 3
        };
        let next = Stage::Pause(Box::new(steps), zeroed, pause).proceed(&mut go_on, &|_| ());
        assert!(matches!(next, Next::Stage(Stage::Pause(..))), "{next:?}");
        assert_eq!(asked, 3);
    }
}
