//! The other core: a thread that zeroes memory as fast as it is allowed to.

use crate::bench::cpus::Pinned;
use crate::bench::memory::{self, Mapping};
use crate::bench::row::gib_per_s;
use crate::bench::team::Team;
use anyhow::{Context, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use vm_scrub::PageSize;
use vm_scrub::arch::ZeroLoop;

/// What the engine zeroes at a time, in bytes.
pub(super) const PIECE: usize = 256 << 10;

/// How long to wait for the other core to begin.
const PATIENCE: Duration = Duration::from_secs(10);

/// How the other core spends its time.
///
/// Unpaced is the worst case. A throttled scrub becomes a second variant, with its rate.
#[derive(Debug, Clone, Copy)]
pub(super) enum Pace {
    Unpaced,
}

/// A thread on another core that zeroes memory until it is stopped.
pub(super) struct Scrub {
    zero_loop: ZeroLoop,
    pace: Pace,
    processor: usize,
    memory: Option<Mapping>,
    thread: Option<JoinHandle<(Mapping, anyhow::Result<()>)>>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    begun: Option<(Instant, u64)>,
    bytes: u64,
    time: Duration,
}

impl Scrub {
    pub(super) fn new(
        zero_loop: ZeroLoop,
        pace: Pace,
        processor: usize,
        bytes: u64,
        page_size: PageSize,
    ) -> anyhow::Result<Self> {
        let mut memory = Mapping::anonymous(usize::try_from(bytes)?, page_size)?;
        memory::populate(memory.bytes())?;
        Ok(Self {
            zero_loop,
            pace,
            processor,
            memory: Some(memory),
            thread: None,
            stop: Arc::default(),
            done: Arc::default(),
            begun: None,
            bytes: 0,
            time: Duration::ZERO,
        })
    }

    /// Starts the thread, and waits until it has zeroed something.
    pub(super) fn start(&mut self) -> anyhow::Result<()> {
        let mut memory = self.memory.take().context("the last scrub did not end")?;
        memory::dirty(&Team::new(1)?, memory.bytes());
        self.stop = Arc::default();
        self.done = Arc::default();
        let (stop, done) = (Arc::clone(&self.stop), Arc::clone(&self.done));
        let (zero_loop, pace, processor) = (self.zero_loop, self.pace, self.processor);
        self.thread = Some(thread::Builder::new().name("scrub".into()).spawn(move || {
            let result = Pinned::to(processor).map(|_pinned| {
                zero_until(&stop, &done, zero_loop, pace, memory.bytes());
            });
            (memory, result)
        })?);
        let asked = Instant::now();
        while self.done.load(Ordering::Relaxed) == 0 {
            ensure!(asked.elapsed() < PATIENCE, "the other core does not begin");
            thread::yield_now();
        }
        Ok(())
    }

    pub(super) fn note_begin(&mut self) {
        self.begun = Some((Instant::now(), self.done.load(Ordering::Relaxed)));
    }

    pub(super) fn note_end(&mut self) {
        if let Some((begun, bytes)) = self.begun.take() {
            self.time += begun.elapsed();
            self.bytes += self.done.load(Ordering::Relaxed) - bytes;
        }
    }

    /// How much it zeroed while the workload ran, in GiB/s.
    pub(super) fn rate(&self) -> f64 {
        gib_per_s(self.bytes, self.time.as_nanos() as f64)
    }

    /// Ends the thread, and looks at what it has done.
    pub(super) fn stop(&mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let (mut memory, result) = thread.join().ok().context("the scrub panicked")?;
        result?;
        let zeroed = usize::try_from(self.done.load(Ordering::Relaxed))?.min(memory.bytes().len());
        ensure!(zeroed > 0, "the scrub did nothing");
        memory::ensure_zero(&memory.bytes()[..zeroed])?;
        self.memory = Some(memory);
        Ok(())
    }
}

impl Drop for Scrub {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::warn!("a scrub ended badly: {error:#}");
        }
    }
}

fn zero_until(
    stop: &AtomicBool,
    done: &AtomicU64,
    zero_loop: ZeroLoop,
    pace: Pace,
    memory: &mut [u8],
) {
    let Pace::Unpaced = pace;
    while !stop.load(Ordering::Relaxed) {
        for piece in memory.chunks_mut(PIECE) {
            // SAFETY: an exclusively borrowed slice.
            unsafe { zero_loop.zero(piece.as_mut_ptr(), piece.len()) };
            done.fetch_add(piece.len() as u64, Ordering::Relaxed);
            if stop.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}
