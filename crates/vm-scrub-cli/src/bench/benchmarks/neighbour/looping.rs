//! A thread on the other core that zeroes memory by one loop, as fast as it goes: the worst that a loop can do to others.

use super::Scrub;
use crate::bench::cpus::Pinned;
use crate::bench::memory::{self, Mapping};
use crate::bench::team::Team;
use anyhow::{Context, ensure};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use vm_scrub::PageSize;
use vm_scrub::arch::ZeroLoop;

/// What the engine zeroes at a time, in bytes.
pub(super) const PIECE: usize = 256 << 10;

/// A loop without a pause.
pub(super) struct Looping {
    zero_loop: ZeroLoop,
    processor: usize,
    memory: Option<Mapping>,
    thread: Option<JoinHandle<(Mapping, anyhow::Result<()>)>>,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
}

impl Looping {
    pub(super) fn new(
        zero_loop: ZeroLoop,
        processor: usize,
        bytes: u64,
        page_size: PageSize,
    ) -> anyhow::Result<Self> {
        let mut memory = Mapping::anonymous(usize::try_from(bytes)?, page_size)?;
        memory::populate(memory.bytes())?;
        Ok(Self {
            zero_loop,
            processor,
            memory: Some(memory),
            thread: None,
            stop: Arc::default(),
            done: Arc::default(),
        })
    }
}

impl Scrub for Looping {
    fn start(&mut self) -> anyhow::Result<()> {
        let mut memory = self.memory.take().context("the last scrub did not end")?;
        memory::dirty(&Team::new(1)?, memory.bytes());
        self.stop = Arc::default();
        self.done = Arc::default();
        let (stop, done) = (Arc::clone(&self.stop), Arc::clone(&self.done));
        let (zero_loop, processor) = (self.zero_loop, self.processor);
        self.thread = Some(thread::Builder::new().name("scrub".into()).spawn(move || {
            let result = Pinned::to(processor).map(|_pinned| {
                zero_until(&stop, &done, zero_loop, memory.bytes());
            });
            (memory, result)
        })?);
        super::wait_for(|| self.done() > 0)
    }

    fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    fn stop(&mut self) -> anyhow::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let (mut memory, result) = thread.join().ok().context("the scrub panicked")?;
        result?;
        let zeroed = usize::try_from(self.done())?.min(memory.bytes().len());
        ensure!(zeroed > 0, "the scrub did nothing");
        memory::ensure_zero(&memory.bytes()[..zeroed])?;
        self.memory = Some(memory);
        Ok(())
    }
}

impl Drop for Looping {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::warn!("a scrub ended badly: {error:#}");
        }
    }
}

fn zero_until(stop: &AtomicBool, done: &AtomicU64, zero_loop: ZeroLoop, memory: &mut [u8]) {
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
