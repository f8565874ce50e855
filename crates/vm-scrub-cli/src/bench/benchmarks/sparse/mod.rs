//! `sparse`: memory of which a guest touched only a part.
//!
//! Touched pages are dirty in every byte, the others are not there. `lease-teardown` ends when the lease is torn down,
//! `lease-turnaround` when the next guest has the memory; the others clean an embedder's own private mapping, in one thread.
//! Those of them that are over in microseconds when little was touched run once more, uncounted, before each timed run: `fill` between
//! them would leave the code of one of them cold and the page-fault path that the other uses warm.
//! With the default of 1 GiB of memory the last groups are the cases that were promised: 1 GiB of 4 KiB pages with 64 KiB,
//! 1 MiB and 256 MiB dirty, and a lease of 8 GiB of which 256 MiB were touched beside one of 256 MiB.

mod contenders;
mod touched;

use super::{title, unless_hugetlb_is_missing};
use crate::bench::memory::{self, Mapping};
use crate::bench::row::{Labels, Pattern};
use crate::bench::settings::Settings;
use crate::bench::subject::{Built, Contender, Group, Plan};
use contenders::{DONTNEED_TOUCH, FILL, Leased, Mapped, SCRUB_RAW};
use std::cell::RefCell;
use std::rc::Rc;
use touched::Touched;
use vm_scrub::{BLOCK_SIZE, PageSize, Verify};

/// How much was touched, in percent.
const PERCENT: [f64; 5] = [0.01, 1.0, 5.0, 25.0, 100.0];

/// How much of an embedder's mapping is dirty: 64 KiB, 1 MiB and 256 MiB of 1 GiB.
const DIRTY: [u64; 3] = [1 << 14, 1 << 10, 1 << 2];

/// How many times as large as memory the large lease is, and what part of memory is touched of it.
const LARGE: (u64, u64) = (8, 4);

/// What everybody who cleans memory is compared with.
const BASELINE: &str = DONTNEED_TOUCH.0;

/// A lease that is touched all over: what a large one with as much touched is compared with.
const SMALL_LEASE: &str = "small-lease";

pub(super) fn plans(settings: &Rc<Settings>) -> Vec<Plan> {
    let mut plans = Vec::new();
    let memory = settings.memory;
    let mut plan =
        |title: String, case: Case, build: fn(&Settings, Case) -> anyhow::Result<Built>| {
            let settings = Rc::clone(settings);
            plans.push(Plan::new(title, move || {
                let built = build(&settings, case);
                unless_hugetlb_is_missing(&settings, case.page_size, built)
            }));
        };
    for page_size in settings.page_sizes() {
        for percent in PERCENT {
            for &pattern in patterns(percent) {
                let case = Case {
                    page_size,
                    pattern,
                    percent: Some(percent),
                    dirty: (memory as f64 * percent / 100.0) as u64,
                };
                let title = format!(
                    "{}, {percent} % {}",
                    title(memory, page_size),
                    pattern.name()
                );
                plan(title, case, all_contenders);
            }
        }
    }
    if settings.page_sizes().contains(&PageSize::Base4K) {
        for part in DIRTY {
            for pattern in [Pattern::Scattered, Pattern::Contiguous] {
                let case = Case {
                    page_size: PageSize::Base4K,
                    pattern,
                    percent: None,
                    dirty: memory / part,
                };
                let dirty = crate::bench::units::size(case.dirty.max(4096));
                let title = format!(
                    "{}, {dirty} {}",
                    title(memory, case.page_size),
                    pattern.name()
                );
                plan(title, case, own_mapping);
            }
        }
    }
    for page_size in settings.page_sizes() {
        // Which pages of a hugetlb file exist is not known, so all of them count.
        if page_size != PageSize::Huge2M {
            let case = Case {
                page_size,
                pattern: Pattern::Contiguous,
                percent: None,
                dirty: (memory / LARGE.1).next_multiple_of(BLOCK_SIZE),
            };
            let dirty = crate::bench::units::size(case.dirty);
            let title = format!(
                "{}, teardown with {dirty} touched",
                title(memory * LARGE.0, page_size)
            );
            plan(title, case, large_and_small);
        }
    }
    plans
}

fn patterns(percent: f64) -> &'static [Pattern] {
    if percent < 100.0 {
        &[Pattern::Scattered, Pattern::Contiguous]
    } else {
        &[Pattern::Contiguous]
    }
}

#[derive(Debug, Clone, Copy)]
struct Case {
    page_size: PageSize,
    pattern: Pattern,
    percent: Option<f64>,
    dirty: u64,
}

impl Case {
    fn touched(&self, memory: u64) -> anyhow::Result<Touched> {
        let (memory, dirty) = (usize::try_from(memory)?, usize::try_from(self.dirty)?);
        Ok(Touched::new(memory, dirty, self.pattern, self.page_size))
    }

    fn labels(
        &self,
        name: &str,
        verify: Verify,
        threads: usize,
        bytes: u64,
        touched: &Touched,
    ) -> Labels {
        Labels {
            name: name.into(),
            verify: Some(verify),
            page_size: Some(self.page_size),
            threads,
            bytes,
            touched_bytes: Some(touched.bytes()),
            touched_percent: self.percent,
            pattern: Some(self.pattern),
            ..Labels::default()
        }
    }
}

/// Leases and an embedder's own mapping.
fn all_contenders(settings: &Settings, case: Case) -> anyhow::Result<Built> {
    let memory = settings.memory;
    let keep = memory::reserve(case.page_size, 3 * memory)?;
    let touched = case.touched(memory)?;
    let mut contenders = Vec::new();
    for (name, again) in [("lease-teardown", false), ("lease-turnaround", true)] {
        let labels = case.labels(name, Verify::Full, settings.threads, memory, &touched);
        let subject = Leased::new(&labels, &touched, again)?;
        contenders.push(Contender::new(labels, subject).against(BASELINE));
    }
    contenders.extend(mapped(memory, case, &touched)?);
    Ok(Built::Ready(Group::new(contenders, keep)))
}

/// An embedder's own mapping.
fn own_mapping(settings: &Settings, case: Case) -> anyhow::Result<Built> {
    let keep = memory::reserve(case.page_size, settings.memory)?;
    let touched = case.touched(settings.memory)?;
    let contenders = mapped(settings.memory, case, &touched)?;
    Ok(Built::Ready(Group::new(contenders, keep)))
}

fn mapped(memory: u64, case: Case, touched: &Touched) -> anyhow::Result<Vec<Contender>> {
    let mapping = Mapping::anonymous(usize::try_from(memory)?, case.page_size)?;
    let mapping = Rc::new(RefCell::new(mapping));
    let contenders = [SCRUB_RAW, FILL, DONTNEED_TOUCH].map(|(name, verify, clean)| {
        let labels = case.labels(name, verify, 1, memory, touched);
        let subject = Mapped::new(&mapping, touched, clean, name != FILL.0);
        Contender::new(labels, subject).against(BASELINE)
    });
    Ok(contenders.into())
}

/// A large lease of which a part was touched, beside a small one of that size.
fn large_and_small(settings: &Settings, case: Case) -> anyhow::Result<Built> {
    let large = settings.memory * LARGE.0;
    let keep = memory::reserve(case.page_size, 3 * case.dirty)?;
    let mut contenders = Vec::new();
    for (name, bytes, pattern) in [
        (SMALL_LEASE, case.dirty, Pattern::Contiguous),
        ("large-lease", large, Pattern::Contiguous),
        ("large-lease-scattered", large, Pattern::Scattered),
    ] {
        let case = Case { pattern, ..case };
        let touched = case.touched(bytes)?;
        let labels = case.labels(name, Verify::Full, settings.threads, bytes, &touched);
        let subject = Leased::new(&labels, &touched, false)?;
        contenders.push(Contender::new(labels, subject).against(SMALL_LEASE));
    }
    Ok(Built::Ready(Group::new(contenders, keep)))
}
