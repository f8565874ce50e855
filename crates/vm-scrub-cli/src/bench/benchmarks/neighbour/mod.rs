//! `neighbour`: what a cache-sensitive workload on one core loses while another core zeroes memory.
//!
//! The workload follows pointers through a buffer, each access waiting for the one before, on a core of its own; the buffer is
//! a little smaller than the second-level cache, or than its share of the last-level cache. On another core a thread zeroes a
//! buffer far larger than any cache over and over, in the pieces that the engine uses, by one loop. What the workload takes
//! alone is the baseline; the ratio says how much of its speed is left.

mod scrub;
mod workload;

use super::title;
use crate::bench::calibrated;
use crate::bench::cpus::{self, Pinned};
use crate::bench::memory;
use crate::bench::row::{Labels, Op};
use crate::bench::settings::Settings;
use crate::bench::subject::{Built, Contender, Group, Plan, Subject};
use anyhow::ensure;
use scrub::{PIECE, Pace, Scrub};
use std::cell::RefCell;
use std::rc::Rc;
use vm_scrub::PageSize;
use vm_scrub::arch::ZeroLoop;
use workload::Workload;

/// What the other core zeroes, in bytes: larger than most caches.
const SCRUBBED: u64 = 256 << 20;

const ALONE: &str = "alone";
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
    let keep = memory::reserve(
        page_size,
        bytes + scrubbed * ZeroLoop::available().count() as u64,
    )?;
    let workload = Rc::new(RefCell::new(Workload::new(bytes, page_size)?));
    let labels = |name: String, zero_loop: Option<ZeroLoop>| Labels {
        name,
        by_loop: zero_loop.map(|each| each.name().into()),
        calibrated: zero_loop.map(|each| each == calibrated::zero_loop(Op::Zero, PIECE as u64)),
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
            labels.scrub_gib_per_s = Some(scrub.rate());
        }
    }
}
