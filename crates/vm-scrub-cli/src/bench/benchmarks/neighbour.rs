//! `neighbour`: what a cache-sensitive workload on one core loses while another core zeroes memory.
//!
//! The workload follows pointers through a buffer, each access waiting for the one before, on a core of its own; the buffer is
//! a little smaller than the second-level cache, or than its share of the last-level cache. On another core a thread zeroes a
//! buffer far larger than any cache over and over, in the pieces that the engine uses, by one loop. What the workload takes
//! alone is the baseline; the ratio says how much of its speed is left.

use super::title;
use crate::bench::calibrated;
use crate::bench::cpus::{self, Pinned};
use crate::bench::memory::{self, Mapping};
use crate::bench::random::Random;
use crate::bench::row::{Labels, gib_per_s};
use crate::bench::settings::Settings;
use crate::bench::subject::{Built, Contender, Group, Plan, Subject};
use crate::bench::team::Team;
use anyhow::{Context, ensure};
use std::cell::RefCell;
use std::hint::black_box;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use vm_scrub::arch::ZeroLoop;
use vm_scrub::{Operation, PageSize};

/// What the other core zeroes, in bytes: larger than most caches.
const SCRUBBED: u64 = 256 << 20;

/// What the engine zeroes at a time, in bytes.
const PIECE: usize = 256 << 10;

/// Bytes between two places that the workload reads: a cache line of x86-64 and most of AArch64.
const LINE: usize = 64;

/// How long to wait for the other core to begin.
const PATIENCE: Duration = Duration::from_secs(10);

const ALONE: &str = "alone";
const SEED: u64 = 0x6e65_6967;

/// How the other core spends its time.
///
/// Unpaced is the worst case. A throttled scrub becomes a second variant, with its rate.
#[derive(Debug, Clone, Copy)]
enum Pace {
    Unpaced,
}

pub(super) fn plans(settings: &Rc<Settings>) -> Vec<Plan> {
    let mut plans = Vec::new();
    let caches = cpus::caches();
    let mut page_sizes = settings.page_sizes_or(&[PageSize::Transparent]);
    // Hugetlb pages make no difference to transparent huge ones here, and are not worth reserving.
    if page_sizes.contains(&PageSize::Huge2M) {
        page_sizes.retain(|size| *size == PageSize::Base4K);
        page_sizes.push(PageSize::Transparent);
    }
    for page_size in page_sizes {
        for (cache, bytes) in [
            ("L2", caches.l2),
            ("share of the last-level cache", caches.last_share),
        ] {
            // Three quarters, because stacks, page tables and code want to be cached as well.
            let bytes = (bytes / 4 * 3).min(settings.memory);
            let settings = Rc::clone(settings);
            let title = format!("{} ({cache})", title(bytes, page_size));
            plans.push(Plan::new(title, move || build(&settings, page_size, bytes)));
        }
    }
    plans
}

fn build(settings: &Settings, page_size: PageSize, bytes: u64) -> anyhow::Result<Built> {
    let Some((own, other)) = cpus::two()? else {
        return Ok(Built::Skipped(
            "this process may use one processor only; give it two (`taskset`)".into(),
        ));
    };
    let scrubbed = SCRUBBED.min(settings.memory);
    let keep = memory::reserve(page_size, bytes + scrubbed)?;
    let workload = Rc::new(RefCell::new(Workload::new(bytes, page_size)?));
    let labels = |name: String, zero_loop: Option<ZeroLoop>| Labels {
        name,
        by_loop: zero_loop.map(|each| each.name().into()),
        calibrated: zero_loop
            .map(|each| each == calibrated::zero_loop(Operation::Zero, PIECE as u64)),
        page_size: Some(page_size),
        threads: 1,
        bytes,
        accesses: Some(workload.borrow().steps),
        ..Labels::default()
    };
    let neighbour = |scrub| Neighbour {
        workload: Rc::clone(&workload),
        own,
        pinned: None,
        scrub,
    };
    let mut contenders =
        vec![Contender::new(labels(ALONE.into(), None), neighbour(None)).against(ALONE)];
    for zero_loop in ZeroLoop::available() {
        let name = format!("beside {zero_loop}");
        let scrub = Scrub::new(zero_loop, Pace::Unpaced, other, scrubbed, page_size)?;
        let subject = neighbour(Some(scrub));
        contenders.push(Contender::new(labels(name, Some(zero_loop)), subject).against(ALONE));
    }
    Ok(Built::Ready(Group::new(contenders, keep)))
}

/// A chain of pointers through all lines of a buffer, in random order.
struct Workload {
    mapping: Mapping,
    steps: u64,
}

impl Workload {
    fn new(bytes: u64, page_size: PageSize) -> anyhow::Result<Self> {
        let len = usize::try_from(bytes)?.next_multiple_of(memory::HUGE);
        let mut mapping = Mapping::anonymous(len, page_size)?;
        memory::populate(mapping.bytes())?;
        let lines = usize::try_from(bytes)? / LINE;
        for (line, next) in Random::seeded(SEED).cycle(lines).into_iter().enumerate() {
            let at = line * LINE;
            mapping.bytes()[at..at + 8].copy_from_slice(&((next * LINE) as u64).to_ne_bytes());
        }
        let steps = lines as u64;
        Ok(Self { mapping, steps })
    }

    /// Once around, from the first line; says where it has ended.
    fn follow(&mut self) -> u64 {
        let memory = self.mapping.bytes();
        let mut at = 0;
        for _ in 0..self.steps {
            let word = memory[at..].first_chunk::<8>();
            at = word.map_or(usize::MAX, |word| u64::from_ne_bytes(*word) as usize);
        }
        black_box(at as u64)
    }
}

/// The workload, alone or beside a scrub.
struct Neighbour {
    workload: Rc<RefCell<Workload>>,
    own: usize,
    pinned: Option<Pinned>,
    scrub: Option<Scrub>,
}

impl Subject for Neighbour {
    fn prepare(&mut self) -> anyhow::Result<()> {
        self.pinned = Some(Pinned::to(self.own)?);
        if let Some(scrub) = &mut self.scrub {
            scrub.start()?;
        }
        self.workload.borrow_mut().follow();
        Ok(())
    }

    fn run(&mut self, iterations: u64) -> anyhow::Result<()> {
        let mut workload = self.workload.borrow_mut();
        if let Some(scrub) = &mut self.scrub {
            scrub.note_begin();
        }
        for _ in 0..iterations {
            ensure!(workload.follow() == 0, "the chain is broken");
        }
        if let Some(scrub) = &mut self.scrub {
            scrub.note_end();
        }
        Ok(())
    }

    fn check(&mut self) -> anyhow::Result<()> {
        self.pinned = None;
        self.scrub.as_mut().map_or(Ok(()), Scrub::stop)
    }

    fn is_repeatable(&self) -> bool {
        true
    }

    fn observe(&self, labels: &mut Labels) {
        if let Some(scrub) = &self.scrub {
            labels.scrub_gib_per_s = Some(gib_per_s(scrub.bytes, scrub.time.as_nanos() as f64));
        }
    }
}

/// A thread on another core that zeroes memory until it is stopped.
struct Scrub {
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
    fn new(
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
    fn start(&mut self) -> anyhow::Result<()> {
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

    fn note_begin(&mut self) {
        self.begun = Some((Instant::now(), self.done.load(Ordering::Relaxed)));
    }

    fn note_end(&mut self) {
        if let Some((begun, bytes)) = self.begun.take() {
            self.time += begun.elapsed();
            self.bytes += self.done.load(Ordering::Relaxed) - bytes;
        }
    }

    /// Ends the thread, and looks at what it has done.
    fn stop(&mut self) -> anyhow::Result<()> {
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
