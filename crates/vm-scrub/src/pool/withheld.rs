//! Shared memory in quarantine: what other processes have not let go of, and capacity that has not come back.
//!
//! A shareable lease takes blocks out of the pool as a promise of so many bytes; the memory is a file of its own, which is
//! never leased again. The blocks can come back when that file has been sealed, found to be zero and given back to the
//! kernel: then fresh memory takes its place. Whatever stands against that may pass, so it is tried again: by the background
//! thread, at longer and longer intervals, by whoever asks for memory, and on demand.

use super::background::Errand;
use super::blocks::{self, Blocks};
use super::{LeaseId, Ledger, Pool, Shared};
use crate::backing::{Backing, Refilled, SharedFile, is_still_shared};
use crate::scrub::{Job, Verdict, Work, fresh_seed};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard};
use crate::sys;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How long the background thread waits before it tries for the first time; twice as long after each failure.
const FIRST_RETRY: Duration = Duration::from_millis(50);

/// How often that time is doubled: the longest is 6.4 s, so that a peer that lingers costs next to nothing.
const DOUBLINGS: u32 = 7;

/// Memory of a shareable lease that is in quarantine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Withheld {
    /// The lease.
    pub lease: LeaseId,
    /// The guest's name, if it had one.
    pub guest: Option<String>,
    /// How many bytes are missing from the pool, in whole blocks.
    pub bytes: u64,
    /// What stands against giving it back.
    pub reason: String,
    /// How often that was tried again, in vain.
    pub attempts: u32,
    /// Whether it is not tried again: something in it is not zero and never will be, or nobody knows who uses it.
    pub for_good: bool,
}

/// What is left of a shareable lease.
#[derive(Debug)]
pub(crate) enum Remains {
    /// The file, with unknown content unless it is sealed, and then not yet read back.
    File(SharedFile),
    /// Nothing: it went back to the kernel, which has no memory to take its place.
    Capacity,
}

impl Withheld {
    /// What is missing because of a lease, to be tried again.
    pub(crate) fn new(lease: LeaseId, guest: Option<String>, bytes: u64, reason: String) -> Self {
        Self {
            lease,
            guest,
            bytes,
            reason,
            attempts: 0,
            for_good: false,
        }
    }
}

#[derive(Debug)]
struct Held {
    remains: Remains,
    blocks: Blocks<blocks::Withheld>,
}

/// Why memory stays in quarantine.
#[derive(Debug)]
enum Kept {
    /// For this reason, which may pass.
    Still(String),
    /// For this reason, which does not.
    ForGood(String),
    /// The attempt was broken off.
    Interrupted,
}

impl From<sys::Error> for Kept {
    fn from(error: sys::Error) -> Self {
        Kept::Still(error.to_string())
    }
}

#[derive(Debug)]
struct Entry {
    about: Mutex<(Withheld, Instant)>,
    /// Locked while it is tried. `None` once the blocks are back.
    held: Mutex<Option<Held>>,
}

/// All that a pool withholds.
#[derive(Debug, Default)]
pub(crate) struct WithheldSet {
    entries: Mutex<Vec<Arc<Entry>>>,
    /// How many threads want an answer now.
    waiting: AtomicUsize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Everything in here is put in by single assignments; a file that was being tried says itself how far it is.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl WithheldSet {
    fn entries(&self) -> Vec<Arc<Entry>> {
        lock(&self.entries).clone()
    }

    /// Keeps a file for good whose blocks somebody else has quarantined.
    pub(crate) fn keep(&self, about: Withheld, file: SharedFile, ledger: &Arc<Ledger>) {
        let held = Held {
            remains: Remains::File(file),
            blocks: Blocks::none(ledger),
        };
        self.add(about, held);
    }

    fn add(&self, about: Withheld, held: Held) {
        lock(&self.entries).push(Arc::new(Entry {
            about: Mutex::new((about, Instant::now() + FIRST_RETRY)),
            held: Mutex::new(Some(held)),
        }));
    }
}

/// A thread that wants an answer now.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn of(set: &'a WithheldSet) -> Self {
        set.waiting.fetch_add(1, Ordering::SeqCst);
        Self(&set.waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Entry {
    fn is_for_good(&self) -> bool {
        lock(&self.about).0.for_good
    }

    /// Tries once more, unless it was to be tried later than `by`; how many bytes came back.
    fn try_again(&self, pool: &Shared, by: Option<Instant>, run: &mut dyn FnMut(&Job)) -> u64 {
        let mut slot = lock(&self.held);
        let early = |due| by.is_some_and(|by| by < due);
        let Some(held) = slot.as_mut().filter(|_| !early(lock(&self.about).1)) else {
            return 0;
        };
        let result = held.settle(pool, run);
        let (about, due) = &mut *lock(&self.about);
        match result {
            Err(kept) => {
                *due = Instant::now() + FIRST_RETRY * (1 << about.attempts.min(DOUBLINGS));
                about.for_good = matches!(kept, Kept::ForGood(_));
                if let Kept::Still(reason) | Kept::ForGood(reason) = kept {
                    log::debug!("{}: still in quarantine: {reason}", about.lease);
                    about.attempts += 1;
                    about.reason = reason;
                }
                0
            }
            Ok(proofs) => {
                if let Some(held) = slot.take() {
                    held.blocks.replaced(proofs);
                }
                log::info!(
                    "{}: {} bytes are back after {} attempts in vain",
                    about.lease,
                    about.bytes,
                    about.attempts
                );
                about.bytes
            }
        }
    }
}

impl Held {
    fn settle(&mut self, pool: &Shared, run: &mut dyn FnMut(&Job)) -> Result<Vec<Refilled>, Kept> {
        if let Remains::File(file) = &mut self.remains {
            prove_zero(pool, file, run)?;
            // The descriptor is closed by this: the memory is the kernel's, and nobody in this process can lease it.
            self.remains = Remains::Capacity;
        }
        Ok(pool.refill(self.blocks.extents())?)
    }
}

/// Does to a file what a teardown does: zeroes it, seals it, reads all of it back. Nothing that was done before counts, except
/// that the file is sealed: whoever could write may have written.
fn prove_zero(pool: &Shared, file: &mut SharedFile, run: &mut dyn FnMut(&Job)) -> Result<(), Kept> {
    if !file.is_sealed() {
        file.open()?;
        let populated = file.residency(0..file.len())?.populated;
        scan(pool, file, &populated, Work::Zero, run)?;
        file.seal().map_err(|error| {
            if is_still_shared(&error) {
                Kept::Still(still_shared(&error))
            } else {
                error.into()
            }
        })?;
    }
    file.open()?;
    let populated = file.residency(0..file.len())?.populated;
    let verdict = scan(pool, file, &populated, Work::ReadSealed, run)?;
    match verdict.failures().first() {
        None => Ok(()),
        Some(failure) => Err(Kept::ForGood(format!(
            "the byte at offset {:#x} of the file is not zero",
            failure.offset
        ))),
    }
}

/// What is said about memory that somebody can still write to.
pub(crate) fn still_shared(error: &sys::Error) -> String {
    format!("another process can still write to it, or it is pinned: {error}")
}

fn scan(
    pool: &Shared,
    file: &SharedFile,
    ranges: &[Range<usize>],
    work: Work,
    run: &mut dyn FnMut(&Job),
) -> Result<Verdict, Kept> {
    // SAFETY: the ranges are disjoint and lie in the view, which is mapped, writable unless the file is sealed, and the
    // caller's alone in this process. Another process may write to what is not sealed; zeroing does not depend on what it
    // finds, and its outcome is not relied on.
    let job = unsafe {
        pool.engine
            .job(file.arena(), ranges, work, pool.verify, fresh_seed())
    };
    run(&job);
    match job.settle(job.thread_time()) {
        Some((_, verdict)) => match verdict.broken().first() {
            None => Ok(verdict),
            Some(broken) => Err(Kept::ForGood(format!(
                "memory error at offset {:#x} of the file: {}",
                broken.range.start, broken.what
            ))),
        },
        None => Err(Kept::Interrupted),
    }
}

impl Shared {
    /// Takes the remains of a shareable lease into quarantine, to be tried again.
    pub(crate) fn withhold(
        &self,
        about: Withheld,
        remains: Remains,
        blocks: Blocks<blocks::Withheld>,
    ) {
        log::warn!(
            "{}: {} bytes in quarantine, to be tried again: {}",
            about.lease,
            about.bytes,
            about.reason
        );
        self.withheld.add(about, Held { remains, blocks });
        self.background.look_again(FIRST_RETRY);
    }

    /// Tries all that is withheld once more, with all threads. How many bytes came back.
    pub(crate) fn reclaim(&self) -> u64 {
        // The background thread, which may be pausing in the middle of an attempt, makes way.
        let _waiting = Waiting::of(&self.withheld);
        let mut run = |job: &Job| {
            self.engine.run(job, None);
        };
        self.try_again(None, &mut run)
    }

    /// How many bytes may come back by [`reclaim`](Self::reclaim).
    pub(crate) fn reclaimable(&self) -> u64 {
        let entries = self.withheld.entries();
        let about = entries.iter().map(|entry| lock(&entry.about).0.clone());
        about
            .filter(|about| !about.for_good)
            .map(|about| about.bytes)
            .sum()
    }

    fn try_again(&self, by: Option<Instant>, run: &mut dyn FnMut(&Job)) -> u64 {
        let mut bytes = 0;
        for entry in self.withheld.entries() {
            if !entry.is_for_good() {
                bytes += entry.try_again(self, by, run);
            }
        }
        // Whatever is being tried right now is not back.
        lock(&self.withheld.entries)
            .retain(|entry| entry.held.try_lock().map_or(true, |held| held.is_some()));
        bytes
    }
}

impl Errand for Shared {
    fn run(&self, allow: &mut dyn FnMut(usize) -> bool) -> Option<Duration> {
        self.try_again(Some(Instant::now()), &mut |job| job.work(&mut *allow, None));
        let waiting = self.withheld.entries();
        let next = waiting
            .iter()
            .filter(|entry| !entry.is_for_good())
            .map(|entry| lock(&entry.about).1)
            .min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }

    fn is_wanted(&self) -> bool {
        self.withheld.waiting.load(Ordering::SeqCst) > 0
    }
}

impl Pool {
    /// Memory of shareable leases that is in quarantine, and why: because another process has not let go of it, most likely.
    /// It is part of [`Accounts::quarantined`](super::Accounts::quarantined).
    pub fn withheld(&self) -> Vec<Withheld> {
        let entries = self.shared.withheld.entries();
        entries
            .iter()
            .map(|entry| lock(&entry.about).0.clone())
            .collect()
    }

    /// Tries now to get back what [`Pool::withheld`] lists, with all threads, and returns how many bytes can be leased again.
    ///
    /// The pool does that by itself too: in the background, and when somebody asks for more memory than there is. Calling it
    /// is worthwhile when a peer is known to have gone. Each attempt scrubs the memory anew.
    pub fn reclaim(&self) -> u64 {
        self.shared.reclaim()
    }
}
