//! The publish edge: whoever sees that a job is done sees all zeros and all counts, whichever threads wrote them.
//!
//! Under the memory model of C11, which loom follows for its atomics: a relaxed load may see an old value, and an access to memory that
//! no release store orders is found even if this processor would not have reordered it.

use super::memory::{self, Stores};
use super::{check, job};
use crate::scrub::{Job, PIECE};
use crate::sync::thread;
use std::sync::Arc;

/// Two batches: a second piece of one line does not fit into the first.
const LEN: usize = PIECE + 64;

fn new_job() -> (Vec<u8>, Arc<Job>) {
    let mut bytes = vec![0xa5; LEN];
    let job = job(&mut bytes, &[0..PIECE, PIECE..LEN]);
    (bytes, Arc::new(job))
}

/// What is certain once a job is done.
fn look_if_done(job: &Job) {
    if !job.is_done() {
        return;
    }
    memory::read_all();
    let (zeroed, verdict) = job.settle(job.thread_time()).unwrap();
    assert_eq!(zeroed.bytes(), LEN as u64, "an old count was seen");
    assert_eq!(verdict.bytes(), LEN as u64, "an old count was seen");
    assert_eq!(verdict.failed_bytes(), 0);
}

/// Two threads share the batches, and whoever finds the job done looks at what was done.
fn two_at_work(stores: Stores) {
    memory::model(stores);
    let (bytes, job) = new_job();
    let other = thread::spawn({
        let job = Arc::clone(&job);
        move || {
            job.work(|_| true, None);
            look_if_done(&job);
        }
    });
    job.work(|_| true, None);
    look_if_done(&job);
    other.join().unwrap();
    assert!(job.is_done());
    assert!(bytes.iter().all(|byte| *byte == 0));
}

#[test]
fn whoever_finishes_a_job_sees_what_others_did() {
    check(3, || two_at_work(Stores::Ordinary));
}

#[test]
fn whoever_finishes_a_job_sees_what_others_stored_past_the_cache() {
    check(2, || two_at_work(Stores::Streaming));
}

/// That the model above could fail: the loop's fence is left out.
#[test]
#[should_panic = "Causality violation"]
fn stores_past_the_cache_that_are_not_fenced_are_found() {
    check(2, || two_at_work(Stores::Unfenced));
}

/// Somebody who has done nothing of the job looks once, at any time.
#[test]
fn whoever_looks_on_sees_all_or_not_done() {
    check(3, || {
        memory::model(Stores::Ordinary);
        let (_bytes, job) = new_job();
        let workers = [(); 2].map(|()| {
            let job = Arc::clone(&job);
            thread::spawn(move || job.work(|_| true, None))
        });
        look_if_done(&job);
        for worker in workers {
            worker.join().unwrap();
        }
        look_if_done(&job);
        assert!(job.is_done());
    });
}
