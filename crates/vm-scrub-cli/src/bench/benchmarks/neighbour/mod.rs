//! `neighbour`: what a cache-sensitive workload on one core loses while another core scrubs, by loop and with the throttle.
//!
//! The workload follows pointers through a buffer, each access waiting for the one before, on a core of its own; the buffer is
//! a little smaller than the second-level cache, or than its share of the last-level cache. What it takes alone is the
//! baseline; the ratio says how much of its speed is left beside a scrub on another core. That is either a thread that zeroes
//! a buffer far larger than any cache by one loop, without a pause, in the pieces that the engine uses; or a pool's own
//! background scrubbing, zeroing and reading back, unthrottled and at several rates. Whether the throttle keeps these rates is
//! measured in a group of its own, over two seconds in each run.

mod background;
mod looping;
mod throttle;
mod workload;

use super::{count, title};
use crate::bench::calibrated;
use crate::bench::cpus::{self, Pinned};
use crate::bench::memory;
use crate::bench::row::{Labels, Op, gib_per_s};
use crate::bench::settings::Settings;
use crate::bench::subject::{Built, Contender, Group, Plan, Subject};
use crate::bench::units;
use anyhow::ensure;
use background::{Paced, Retiring};
use looping::{Looping, PIECE};
use std::cell::RefCell;
use std::rc::Rc;
use std::thread;
use std::time::{Duration, Instant};
use vm_scrub::arch::ZeroLoop;
use vm_scrub::{PageSize, Verify};
use workload::Workload;

/// What the other core scrubs, in bytes: larger than most caches.
const SCRUBBED: u64 = 256 << 20;

/// Rates of background scrubbing, in bytes per second: a guest of 4 GiB is clean again after a quarter of a minute, four
/// seconds, or one. One core of any server can reach the last.
const RATES: [u64; 3] = [256 << 20, 1 << 30, 4 << 30];

/// How long to wait for the other core to begin.
const PATIENCE: Duration = Duration::from_secs(10);

/// A run beside a scrub takes this long at least: the lowest rate is one piece in a millisecond.
const RUN: Duration = Duration::from_millis(20);

const ALONE: &str = "alone";

/// What another core does meanwhile.
trait Scrub {
    /// Begins, and returns when it goes at its pace.
    fn start(&mut self) -> anyhow::Result<()>;

    /// Bytes that were scrubbed so far, since some moment before the start.
    fn done(&self) -> u64;

    /// Ends it, and looks at what it has done.
    fn stop(&mut self) -> anyhow::Result<()>;
}

/// Returns when `begun` says so.
///
/// # Errors
///
/// If it does not in [`PATIENCE`].
fn wait_for(begun: impl Fn() -> bool) -> anyhow::Result<()> {
    let asked = Instant::now();
    while !begun() {
        ensure!(asked.elapsed() < PATIENCE, "the other core does not begin");
        thread::yield_now();
    }
    Ok(())
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
        plans.push(throttle::plan(settings, page_size));
    }
    plans
}

/// `vm-scrub at 1 GiB/s`.
fn at(rate: u64) -> String {
    format!("vm-scrub at {}/s", units::size(rate))
}

fn build(settings: &Settings, page_size: PageSize, bytes: u64) -> anyhow::Result<Built> {
    let Some((own, other)) = cpus::two()? else {
        return Ok(Built::Skipped(
            "this process may use one processor only; give it two (`taskset`)".into(),
        ));
    };
    let scrubbed = SCRUBBED.min(settings.memory);
    let keep = memory::reserve(
        page_size,
        bytes + scrubbed * ZeroLoop::available().count() as u64 + background::capacity(scrubbed),
    )?;
    let workload = Rc::new(RefCell::new(Workload::new(bytes, page_size)?));
    let labels = |name: String| Labels {
        name,
        page_size: Some(page_size),
        threads: 1,
        bytes,
        accesses: Some(workload.borrow().steps),
        ..Labels::default()
    };
    let contender = |labels, scrub| {
        let subject = Neighbour {
            workload: Rc::clone(&workload),
            own,
            pinned: None,
            beside: scrub,
            scrubbed: 0,
            time: Duration::ZERO,
        };
        Contender::new(labels, subject).against(ALONE)
    };
    let mut contenders = vec![contender(labels(ALONE.into()), None)];
    for zero_loop in ZeroLoop::available() {
        let chosen = calibrated::zero_loop(Op::Zero, PIECE as u64, 1);
        let labels = Labels {
            by_loop: Some(zero_loop.name().into()),
            calibrated: Some(zero_loop == chosen),
            ..labels(format!("beside {zero_loop}"))
        };
        let scrub = Looping::new(zero_loop, other, scrubbed, page_size)?;
        contenders.push(contender(labels, Some(Box::new(scrub))));
    }
    let retiring = Retiring::new(Some(other), scrubbed, page_size)?;
    let retiring = Rc::new(RefCell::new(retiring));
    for rate in [None].into_iter().chain(RATES.into_iter().rev().map(Some)) {
        let labels = Labels {
            verify: Some(Verify::Full),
            asked_gib_per_s: rate.map(|rate| gib_per_s(rate, 1e9)),
            ..labels(rate.map_or_else(|| "vm-scrub unthrottled".into(), at))
        };
        let scrub = Paced::new(&retiring, rate);
        contenders.push(contender(labels, Some(Box::new(scrub))));
    }
    Ok(Built::Ready(Group::new(contenders, keep)))
}

/// The workload, alone or beside a scrub.
struct Neighbour {
    workload: Rc<RefCell<Workload>>,
    own: usize,
    pinned: Option<Pinned>,
    beside: Option<Box<dyn Scrub>>,
    /// Bytes that were scrubbed while the workload ran, and for how long it ran.
    scrubbed: u64,
    time: Duration,
}

impl Subject for Neighbour {
    fn prepare(&mut self) -> anyhow::Result<()> {
        self.pinned = Some(Pinned::to(self.own)?);
        if let Some(scrub) = &mut self.beside {
            scrub.start()?;
        }
        self.workload.borrow_mut().follow();
        Ok(())
    }

    fn run(&mut self, iterations: u64) -> anyhow::Result<()> {
        let mut workload = self.workload.borrow_mut();
        let done = || self.beside.as_ref().map_or(0, |scrub| scrub.done());
        let (begun, before) = (Instant::now(), done());
        for _ in 0..iterations {
            ensure!(workload.follow() == 0, "the chain is broken");
        }
        self.scrubbed += done() - before;
        self.time += begun.elapsed();
        Ok(())
    }

    fn check(&mut self) -> anyhow::Result<()> {
        self.pinned = None;
        self.beside.as_mut().map_or(Ok(()), |scrub| scrub.stop())
    }

    fn is_repeatable(&self) -> bool {
        true
    }

    fn shortest_run(&self) -> Duration {
        RUN
    }

    fn observe(&self, labels: &mut Labels) {
        if self.beside.is_some() {
            let nanos = self.time.as_nanos() as f64;
            labels.scrub_gib_per_s = Some(gib_per_s(self.scrubbed, nanos));
        }
    }
}
