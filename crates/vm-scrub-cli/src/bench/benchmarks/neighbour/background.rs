//! vm-scrub's own background scrubbing: leases of one pool that are retired over and over, at a rate that is set.
//!
//! Several leases wait at any time, so that the pool's background thread always has something to do and only the throttle
//! makes it pause. Both that thread and the one that retires stay on the same processor: the first inherits the affinity of
//! whoever builds the pool.

use super::super::leased;
use super::Scrub;
use super::looping::PIECE;
use crate::bench::cpus::Pinned;
use crate::bench::memory;
use anyhow::{Context, ensure};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use vm_memory::GuestAddress;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Policy, Pool, ScrubRate, Ticket, Verify};

/// Leases that are retired in turn.
const LEASES: u64 = 4;

/// Seconds of the rate that may be made up for at once after a pause: what a thread of the lowest priority may have to wait for
/// a processor.
const BURST: f64 = 0.01;

/// A pool, who scrubbed how much in it, and whether somebody retires its leases. Scrubs of different rates share one and take
/// turns.
pub(super) struct Retiring {
    pool: Arc<Pool>,
    processor: Option<usize>,
    thread: Option<JoinHandle<anyhow::Result<()>>>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
}

/// How much memory the pool has for about `bytes`, in bytes.
pub(super) fn capacity(bytes: u64) -> u64 {
    LEASES * (bytes / LEASES).next_multiple_of(BLOCK_SIZE)
}

impl Retiring {
    /// A pool of about `bytes`, all of which exists, so that all of it is scrubbed each time.
    pub(super) fn new(
        processor: Option<usize>,
        bytes: u64,
        page_size: PageSize,
    ) -> anyhow::Result<Self> {
        let _pinned = processor.map(Pinned::to).transpose()?;
        let done: Arc<AtomicU64> = Arc::default();
        let (total, last) = (Arc::clone(&done), AtomicU64::new(0));
        let pool = Pool::builder()
            .capacity(capacity(bytes))
            .page_size(page_size)
            // Nobody helps: it is the background thread that is paced.
            .threads(1)
            .policy(Policy::new().verify(Verify::Full))
            .populate(true)
            .on_progress(move |progress| {
                // One thread at a time scrubs, one lease after the other: it counts from zero with each.
                let before = last.swap(
                    progress.bytes_done % progress.bytes_total,
                    Ordering::Relaxed,
                );
                let piece = progress.bytes_done.saturating_sub(before);
                total.fetch_add(piece, Ordering::Relaxed);
            })
            .build()
            .context("no pool")?;
        Ok(Self {
            pool: Arc::new(pool),
            processor,
            thread: None,
            stop: Arc::default(),
            done,
        })
    }

    /// Bytes that were scrubbed in this pool so far.
    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn start(&mut self, rate: Option<ScrubRate>) -> anyhow::Result<()> {
        // A run that failed has left it going, and says nothing about the next one.
        self.stop()?;
        self.pool.set_scrub_rate(rate);
        self.stop = Arc::default();
        let (pool, stop, processor) = (
            Arc::clone(&self.pool),
            Arc::clone(&self.stop),
            self.processor,
        );
        self.thread = Some(
            thread::Builder::new()
                .name("retire".into())
                .spawn(move || {
                    let _pinned = processor.map(Pinned::to).transpose()?;
                    retire_until(&pool, &stop)
                })?,
        );
        // What may be done at once is not what the rate makes of it.
        let settled = self.done() + rate.map_or(0, |rate| rate.burst) + PIECE as u64;
        super::wait_for(|| self.done() >= settled || self.has_ended())?;
        if self.has_ended() {
            self.stop()?;
        }
        Ok(())
    }

    fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        self.stop.store(true, Ordering::Relaxed);
        // What is left is done at once.
        self.pool.set_scrub_rate(None);
        thread.join().ok().context("the scrub panicked")?
    }
}

impl Drop for Retiring {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::warn!("a scrub ended badly: {error:#}");
        }
    }
}

/// Leases and retires memory until it is told to stop, and finishes what it has begun.
fn retire_until(pool: &Pool, stop: &AtomicBool) -> anyhow::Result<()> {
    let bytes = pool.capacity() / LEASES;
    let mut tickets = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        if tickets.len() as u64 == LEASES {
            tickets.pop_front().map_or(Ok(()), finish)?;
        }
        let mut lease = pool
            .lease(&[(GuestAddress(0), bytes)])
            .context("no lease")?;
        mark(&mut lease)?;
        tickets.push_back(leased::retire(lease)?);
    }
    tickets.into_iter().try_for_each(finish)
}

/// Waits until the background has scrubbed a lease, all of it.
fn finish(ticket: Ticket) -> anyhow::Result<()> {
    let receipt = ticket.wait_in_background()?;
    ensure!(
        receipt.bytes_verified == receipt.bytes_total,
        "{} of {} bytes were scrubbed",
        receipt.bytes_verified,
        receipt.bytes_total
    );
    Ok(())
}

/// Leaves a byte in each piece, after a look at what the last scrub made of it. Overwriting all of the memory would disturb the
/// neighbour more than the scrub does.
fn mark(lease: &mut Lease) -> anyhow::Result<()> {
    // SAFETY: the harness is the only one who has this lease.
    for region in unsafe { memory::of_lease(lease) } {
        for piece in region.chunks_mut(PIECE) {
            memory::ensure_zero(&piece[..1])?;
            piece[0] = memory::DIRT;
        }
    }
    Ok(())
}

/// A pool's leases are retired at a rate; without one, as fast as the background thread goes.
pub(super) struct Paced {
    retiring: Rc<RefCell<Retiring>>,
    rate: Option<ScrubRate>,
}

impl Paced {
    pub(super) fn new(retiring: &Rc<RefCell<Retiring>>, bytes_per_second: Option<u64>) -> Self {
        Self {
            retiring: Rc::clone(retiring),
            rate: bytes_per_second.map(|bytes_per_second| ScrubRate {
                bytes_per_second,
                burst: (bytes_per_second as f64 * BURST) as u64,
            }),
        }
    }
}

impl Scrub for Paced {
    fn start(&mut self) -> anyhow::Result<()> {
        self.retiring.borrow_mut().start(self.rate)
    }

    fn done(&self) -> u64 {
        self.retiring.borrow().done()
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        self.retiring.borrow_mut().stop()
    }
}

#[cfg(test)]
mod tests;
