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
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::sys;
use std::ops::Range;
use std::sync::{Arc, PoisonError};
use std::thread::{self, ThreadId};
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

/// Where the remains of a lease are.
#[derive(Debug)]
enum Slot {
    Held(Held),
    /// With a thread that tries to get them back.
    Tried(ThreadId),
    /// The blocks are back.
    Empty,
}

#[derive(Debug)]
struct Entry {
    about: Mutex<(Withheld, Instant)>,
    /// Whether the blocks are back, or about to be. Set before the books say so: what is not in quarantine is not listed.
    back: AtomicBool,
    /// Locked to take them out and to put them back, never while memory is touched.
    slot: Mutex<Slot>,
    put_back: Condvar,
}

/// A thread that tries to get something back. What it took is put back whatever happens, also by a panic: the kernel would
/// otherwise get the guest's bytes.
struct Attempt<'a> {
    entry: &'a Entry,
    held: Option<Held>,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            // The others have their turn before this one panics again.
            lock(&self.entry.about).1 = Instant::now() + FIRST_RETRY * (1 << DOUBLINGS);
        }
        *lock(&self.entry.slot) = self.held.take().map_or(Slot::Empty, Slot::Held);
        self.entry.put_back.notify_all();
    }
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

    /// What is in quarantine. An entry stays for a moment when its blocks are back, for those that wait for them.
    fn listed(&self) -> Vec<Withheld> {
        let entries = self.entries();
        let held = entries
            .iter()
            .filter(|entry| !entry.back.load(Ordering::SeqCst));
        held.map(|entry| lock(&entry.about).0.clone()).collect()
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
            back: AtomicBool::new(false),
            slot: Mutex::new(Slot::Held(held)),
            put_back: Condvar::new(),
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
    /// Takes what is held out, unless it is to be tried later than `by`. Without `by`, an attempt that somebody else is at is waited
    /// for.
    fn take(&self, by: Option<Instant>) -> Option<Attempt<'_>> {
        let mut slot = lock(&self.slot);
        let this = thread::current().id();
        while let (Slot::Tried(who), None) = (&*slot, by) {
            // A thread of the VMM's own rayon pool takes other work while it waits for ours, and may come here by that.
            if *who == this {
                return None;
            }
            let waited = self.put_back.wait(slot);
            slot = waited.unwrap_or_else(PoisonError::into_inner);
        }
        let (for_good, due) = {
            let about = lock(&self.about);
            (about.0.for_good, about.1)
        };
        if for_good || by.is_some_and(|by| by < due) {
            return None;
        }
        match std::mem::replace(&mut *slot, Slot::Tried(this)) {
            Slot::Held(held) => Some(Attempt {
                entry: self,
                held: Some(held),
            }),
            other => {
                *slot = other;
                None
            }
        }
    }

    /// When it is to be tried again; `None` if it is not.
    fn due(&self) -> Option<Instant> {
        match &*lock(&self.slot) {
            Slot::Held(_) => {}
            // Whoever is at it says afterwards.
            Slot::Tried(_) => return Some(Instant::now() + FIRST_RETRY),
            Slot::Empty => return None,
        }
        let about = lock(&self.about);
        (!about.0.for_good).then_some(about.1)
    }

    /// Tries once more, unless it is to be tried later than `by`; how many bytes came back.
    fn try_again(&self, pool: &Shared, by: Option<Instant>, run: &mut dyn FnMut(&Job)) -> u64 {
        let Some(mut attempt) = self.take(by) else {
            return 0;
        };
        let Some(held) = attempt.held.as_mut() else {
            return 0;
        };
        // The embedder's logger may ask what is withheld, so no lock is held while it is called.
        match held.settle(pool, run) {
            Err(kept) => {
                let about = self.note(kept);
                log::debug!("{}: still in quarantine: {}", about.lease, about.reason);
                0
            }
            Ok(proofs) => {
                let about = lock(&self.about).0.clone();
                self.back.store(true, Ordering::SeqCst);
                if let Some(held) = attempt.held.take() {
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

    /// Notes what an attempt in vain has found, and when to try again.
    fn note(&self, kept: Kept) -> Withheld {
        let (about, due) = &mut *lock(&self.about);
        *due = Instant::now() + FIRST_RETRY * (1 << about.attempts.min(DOUBLINGS));
        about.for_good = matches!(kept, Kept::ForGood(_));
        if let Kept::Still(reason) | Kept::ForGood(reason) = kept {
            about.attempts += 1;
            about.reason = reason;
        }
        about.clone()
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
    let settled = job.settle(job.thread_time());
    // There is other memory in its place by now, which the next attempt would find in order: also if this one was broken off.
    let lost = match &settled {
        Some((_, verdict)) => verdict.broken().to_vec(),
        None => job.take_broken(),
    };
    if let Some(broken) = lost.first() {
        return Err(Kept::ForGood(format!(
            "memory error at offset {:#x} of the file: {}",
            broken.range.start, broken.what
        )));
    }
    settled.map(|(_, verdict)| verdict).ok_or(Kept::Interrupted)
}

impl Shared {
    /// Takes the remains of a shareable lease into quarantine, to be tried again.
    pub(crate) fn withhold(
        &self,
        about: Withheld,
        remains: Remains,
        blocks: Blocks<blocks::Withheld>,
    ) {
        self.withheld.add(about.clone(), Held { remains, blocks });
        self.background.look_again(FIRST_RETRY);
        // Last: the embedder's logger may panic.
        log::warn!(
            "{}: {} bytes in quarantine, to be tried again: {}",
            about.lease,
            about.bytes,
            about.reason
        );
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
        // Also what is about to be back: whoever asks for it waits for that.
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
            bytes += entry.try_again(self, by, run);
        }
        lock(&self.withheld.entries).retain(|entry| !matches!(&*lock(&entry.slot), Slot::Empty));
        bytes
    }
}

impl Errand for Shared {
    fn run(&self, allow: &mut dyn FnMut(usize) -> bool) -> Option<Duration> {
        self.try_again(Some(Instant::now()), &mut |job| job.work(&mut *allow, None));
        let waiting = self.withheld.entries();
        let next = waiting.iter().filter_map(|entry| entry.due()).min()?;
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
        self.shared.withheld.listed()
    }

    /// Tries now to get back what [`Pool::withheld`] lists, with all threads, and returns how many bytes can be leased again.
    ///
    /// The pool does that by itself too: in the background, and when somebody asks for more memory than there is. Calling it
    /// is worthwhile when a peer is known to have gone. Each attempt scrubs the memory anew.
    ///
    /// In a forked child nothing is tried: the memory is its parent's.
    pub fn reclaim(&self) -> u64 {
        if !self.shared.is_here() {
            return 0;
        }
        self.shared.reclaim()
    }
}

#[cfg(all(test, not(loom)))]
mod tests;
