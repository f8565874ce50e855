//! Models of what threads do to each other, for loom: each runs the code of this crate, not a copy, in every order in which its threads
//! can meet, up to a number of preemptions. `scripts/test-models.sh` runs them; nothing else builds them.
//!
//! | model | what is run |
//! |---|---|
//! | [`index`] | the books and the typed blocks |
//! | [`queue`] | the background queue and its thread, with chores and an errand of the model's own |
//! | [`publish`] | a job and its batches: that whoever sees that it is done sees the zeros |
//! | [`retired`] | a whole pool: a retired lease between its ticket, the background thread and who needs memory |
//!
//! What loom cannot see: streaming stores and `sfence`, which [`memory`] stands in for and `arch/tests/visible.rs` tries on the
//! processor; timeouts (its condition variables wait for ever, so that a notification that is missing is a deadlock here, even where
//! a timeout would hide it); threads of rayon; and the standard library's locks and counters, which the rest of the crate uses and
//! which it takes to be at one place in time.

mod index;
pub(crate) mod memory;
mod publish;
mod queue;
mod retired;

use crate::scrub::{Engine, HostPtr, Job, Policy, Verify, Work};
use std::ops::Range;

/// Runs `model` in every order with at most so many preemptions: switches away from a thread that could go on. Most faults need one
/// or two (Musuvathi and Qadeer, 'Iterative context bounding', 2007), and each one more multiplies the orders by as many as there
/// are steps.
fn check(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let runs = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counted = std::sync::Arc::clone(&runs);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(builder.preemption_bound.unwrap_or(preemptions));
    builder.max_branches = 20_000;
    builder.check(move || {
        counted.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        model();
    });
    eprintln!("{} orders", runs.load(std::sync::atomic::Ordering::Relaxed));
}

/// A job over `ranges` of `memory`, in units of bytes.
fn job(memory: &mut [u8], ranges: &[Range<usize>]) -> Job {
    assert!(ranges.iter().all(|range| range.end <= memory.len()));
    let engine = Engine::immediate(&Policy::default()).unwrap();
    let base = HostPtr(memory.as_mut_ptr());
    // SAFETY: the ranges are disjoint and in memory that whoever calls keeps to the job until the job is dropped.
    unsafe { engine.job(base, ranges, Work::ZeroAndRead, Verify::Full, 0) }
}
