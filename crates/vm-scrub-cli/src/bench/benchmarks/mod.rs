//! The questions, one module each, and who answers them.

mod guest;
mod leased;
mod loops;
mod neighbour;
mod scaling;
mod sparse;
mod turnaround;

use super::args::Benchmark;
use super::settings::Settings;
use super::subject::{Built, Plan};
use super::units;
use std::rc::Rc;
use vm_scrub::PageSize;

/// The groups of a benchmark, in the order in which they run.
pub(crate) fn plans(benchmark: Benchmark, settings: &Rc<Settings>) -> Vec<Plan> {
    match benchmark {
        Benchmark::Loops => loops::plans(settings),
        Benchmark::Turnaround => turnaround::plans(settings),
        Benchmark::Sparse => sparse::plans(settings),
        Benchmark::Guest => guest::plans(settings),
        Benchmark::Neighbour => neighbour::plans(settings),
        Benchmark::Scaling => scaling::plans(settings),
    }
}

/// `1 GiB, thp`: what titles of groups begin with.
fn title(bytes: u64, page_size: PageSize) -> String {
    format!("{}, {page_size}", units::size(bytes))
}

/// `1 thread`, `2 threads`.
fn count(threads: usize) -> String {
    match threads {
        1 => "1 thread".into(),
        more => format!("{more} threads"),
    }
}

/// Hugetlb pages that cannot be had fail a group only if they were asked for by name.
fn unless_hugetlb_is_missing(
    settings: &Settings,
    page_size: PageSize,
    result: anyhow::Result<Built>,
) -> anyhow::Result<Built> {
    match result {
        Err(error)
            if page_size == PageSize::Huge2M
                && !settings.insists_on(page_size)
                && matches!(
                    error.downcast_ref(),
                    Some(vm_scrub_vmm::Error::HugePages { .. })
                ) =>
        {
            Ok(Built::Skipped(format!("{error:#}")))
        }
        other => other,
    }
}
