//! A range that is being worked on by any number of threads, in pieces.
//!
//! Threads take the next batch when they have done one, so none idles while another has a queue, and stop between two batches
//! when they are told to. A piece that is not zero when it is read back gets a second chance like any other work, and is done when
//! it had that. The job is done when all bytes are; whoever sees that first may [settle](Job::settle) it.

use super::batches::{Answers, Batches, Upcoming};
use super::broken::Broken;
use super::engine::Choice;
use super::pass::{Pass, Suspect, Tally, Work};
use super::workers::Workers;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Proof that zeros were written to a job's every piece. Made by [`Job::settle`] only.
#[derive(Debug)]
pub(crate) struct Zeroed {
    bytes: u64,
    time: Duration,
    broken: Vec<Broken>,
}

impl Zeroed {
    /// How many bytes were zeroed.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What could not be accessed.
    pub(crate) fn broken(&self) -> &[Broken] {
        &self.broken
    }

    /// How long it took.
    pub(crate) fn time(&self) -> Duration {
        self.time
    }
}

/// A piece that was not zero when it was read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Where the first byte that is not zero was found.
    pub(crate) offset: usize,
}

/// What reading back found. Made by [`Job::settle`] only.
#[derive(Debug)]
pub(crate) struct Verdict {
    bytes: u64,
    failed_bytes: u64,
    failures: Vec<Failure>,
    time: Duration,
    broken: Vec<Broken>,
}

impl Verdict {
    /// How many bytes were read back and found to be zero.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many bytes are in pieces that stayed wrong after they had been scrubbed again.
    pub(crate) fn failed_bytes(&self) -> u64 {
        self.failed_bytes
    }

    /// What could not be accessed.
    pub(crate) fn broken(&self) -> &[Broken] {
        &self.broken
    }

    /// The pieces that stayed wrong, in ascending order.
    pub(crate) fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// How long it took.
    pub(crate) fn time(&self) -> Duration {
        self.time
    }
}

/// Called with how many bytes are done and how many there are, by the thread that did the last of them.
pub(crate) type Watch<'a> = dyn Fn(u64, u64) + Send + Sync + 'a;

/// So many bytes one thread has done before others are awake. Measured on Zen 4: waking a second thread takes 50 to 100 µs, zeroing
/// and reading back 1 MiB takes 20 to 50.
pub(super) const FEW: u64 = 1 << 20;

/// Batches, and how far they have got.
pub(crate) struct Job {
    pass: Pass,
    work: Work,
    choice: Choice,
    batches: Batches,
    total: u64,
    done: AtomicU64,
    tally: Tally,
}

impl Job {
    /// A job over `batches`, which are relative to the pass's base.
    ///
    /// # Safety
    /// Until the job is settled or dropped the ranges, or whatever will be answered to `batches`, must be disjoint, mapped readable
    /// and (but for [`Work::ReadSealed`]) writable, and nobody else may write to them, nor read what is zeroed.
    pub(crate) unsafe fn new(pass: Pass, work: Work, choice: Choice, batches: Batches) -> Self {
        Self {
            pass,
            work,
            choice,
            total: batches.bytes(),
            batches,
            done: AtomicU64::new(0),
            tally: Tally::default(),
        }
    }

    /// The loops that write zeros and read back, and why it is these.
    pub(crate) fn choice(&self) -> &Choice {
        &self.choice
    }

    /// Bytes that are done, and bytes in all.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total)
    }

    /// Whether there is something that nobody has taken yet.
    pub(crate) fn has_batches(&self) -> bool {
        self.batches.upcoming() != Upcoming::Nothing || self.tally.has_suspects()
    }

    /// What the kernel has said about the ranges, if it was asked; once, when the job is done.
    pub(crate) fn take_answers(&self) -> Answers {
        self.batches.take_answers()
    }

    /// How long threads have worked on it, all together.
    pub(crate) fn thread_time(&self) -> Duration {
        self.tally.thread_time()
    }

    /// Whether everything is done. What was stored is visible to whoever sees `true`.
    pub(crate) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire) == self.total
    }

    /// Takes batches one after the other, until there are none left or `go_on`, asked with the bytes of the next one before
    /// each, says no. `watch` hears of each batch.
    pub(crate) fn work(&self, mut go_on: impl FnMut(usize) -> bool, watch: Option<&Watch<'_>>) {
        loop {
            match self.batches.upcoming() {
                Upcoming::Batch(bytes) => {
                    if !go_on(bytes) {
                        return;
                    }
                    if let Some(batch) = self.batches.take() {
                        let bytes = batch.bytes as u64;
                        // SAFETY: whoever made the job promised that its ranges are disjoint and nobody else's; each batch is
                        // handed out once.
                        let suspect =
                            unsafe { self.pass.run(self.work, batch.pieces(), &self.tally) };
                        self.add(bytes.saturating_sub(suspect), watch);
                    }
                }
                Upcoming::Question => {
                    if !go_on(0) {
                        return;
                    }
                    if let Some(bytes) = self.batches.ask() {
                        self.add(bytes, watch);
                    }
                }
                Upcoming::Nothing => {
                    let Some(suspect) = self.tally.take_suspect() else {
                        return;
                    };
                    if !go_on(suspect.piece.len()) {
                        self.tally.put_back(suspect);
                        return;
                    }
                    self.retry(suspect, watch);
                }
            }
        }
    }

    /// Counts bytes as done. This publishes the zeros, which the loop has fenced on this thread, to whoever sees that the job is
    /// done.
    fn add(&self, bytes: u64, watch: Option<&Watch<'_>>) {
        if bytes == 0 {
            return;
        }
        let done = self.done.fetch_add(bytes, Ordering::AcqRel) + bytes;
        if let Some(watch) = watch {
            watch(done, self.total);
        }
    }

    /// Gives a piece that was not zero its second chance.
    fn retry(&self, suspect: Suspect, watch: Option<&Watch<'_>>) {
        let bytes = suspect.piece.len() as u64;
        // SAFETY: the piece was handed out once, and it is this thread that took it from the list of suspects; whoever made the
        // job promised that it is nobody else's.
        unsafe { self.pass.retry(self.work, suspect, &self.tally) };
        self.add(bytes, watch);
    }

    /// All workers take batches until there are none left; the calling thread alone, if there are few. Returns how many threads
    /// that were.
    pub(crate) fn work_with(&self, workers: &Workers, watch: Option<&Watch<'_>>) -> usize {
        if self.total <= FEW {
            self.work(|_| true, watch);
            return 1;
        }
        workers.all(|| self.work(|_| true, watch));
        workers.threads()
    }

    /// What could not be accessed so far; for whoever gives it up, when nobody is at it any more.
    pub(crate) fn take_broken(&self) -> Vec<Broken> {
        self.tally.take_broken()
    }

    /// Decides. `elapsed` is how long the work took.
    ///
    /// `None` if the job is not done.
    pub(crate) fn settle(&self, elapsed: Duration) -> Option<(Zeroed, Verdict)> {
        if !self.is_done() {
            return None;
        }
        let (zeroing, reading) = self.tally.divide(elapsed);
        let (tried, mut failures) = self.tally.take_retried();
        failures.sort_by_key(|failed| failed.offset);
        if let Some(first) = tried {
            log::warn!(
                "some of {} bytes were not zero after scrubbing, among them the piece at pool offset {first:#x}: scrubbed again, and \
                 {} pieces are still not",
                self.total,
                failures.len()
            );
        }
        let broken = self.tally.take_broken();
        let verdict = Verdict {
            bytes: self.tally.read(),
            failed_bytes: failures
                .iter()
                .map(|failed| (failed.piece.len() as u64).saturating_sub(failed.broken))
                .sum(),
            failures: failures
                .iter()
                .map(|failed| Failure {
                    offset: failed.offset,
                })
                .collect(),
            time: reading,
            broken: broken.clone(),
        };
        let zeroed = Zeroed {
            bytes: self.tally.zeroed(),
            time: zeroing,
            broken,
        };
        Some((zeroed, verdict))
    }
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (done, total) = self.progress();
        f.debug_struct("Job")
            .field("work", &self.work)
            .field("done", &done)
            .field("total", &total)
            .finish_non_exhaustive()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use crate::arch::ZeroLoop;
    use crate::scrub::plan::PIECE;
    use crate::scrub::{Engine, HostPtr, Policy, Sabotage, Verify, Work};
    use std::hint::spin_loop;
    use std::sync::Barrier;
    use std::time::{Duration, Instant};

    /// Bytes and stores that an interpreter and a sanitizer see, in the hands of real threads. The models have stand-ins for the
    /// bytes, and more orders.
    #[test]
    fn whoever_sees_that_a_job_is_done_may_read_what_others_have_zeroed() {
        const LEN: usize = PIECE + 64;
        let mut memory = vec![0xa5_u8; LEN];
        let base = HostPtr(memory.as_mut_ptr());
        let policy = Policy::new().zero_loop(ZeroLoop::by_name("portable").unwrap());
        let engine = Engine::immediate(&policy).unwrap();
        // SAFETY: disjoint ranges in a vector that lives longer than the job, and that nobody touches before it is done.
        let job = unsafe { engine.job(base, &[0..PIECE, PIECE..LEN], Work::Zero, Verify::None, 0) };
        // A thread that begins after another has ended is ordered behind it by the standard library, and a race would not be seen.
        let (job, together) = (&job, &Barrier::new(3));
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(move || {
                    together.wait();
                    job.work(|_| true, None);
                });
            }
            scope.spawn(move || {
                together.wait();
                while !job.is_done() {
                    spin_loop();
                    std::thread::yield_now();
                }
                for at in (0..LEN).step_by(61) {
                    // SAFETY: in the vector, initialised, and written to by nobody once the job is done.
                    assert_eq!(unsafe { base.at(at).read() }, 0, "at {at}");
                }
            });
        });
        let (zeroed, _) = job.settle(job.thread_time()).unwrap();
        assert_eq!(zeroed.bytes(), LEN as u64);
    }

    #[test]
    fn a_second_chance_that_is_not_given_yet_is_left_to_others() {
        let mut memory = vec![0xa5_u8; 2 * PIECE];
        let base = HostPtr(memory.as_mut_ptr());
        let mut engine = Engine::immediate(&Policy::new()).unwrap();
        engine.sabotage(Sabotage::SkipScrub);
        let begun = Instant::now();
        let all = 0..2 * PIECE;
        // SAFETY: a range in a vector that lives longer than the job, and that nobody else touches.
        let job = unsafe { engine.job(base, &[all], Work::ZeroAndRead, Verify::Full, 0) };
        // Both pieces, and not what was not zero in them.
        let mut asked = 0;
        let two = |_| {
            asked += 1;
            asked <= 2
        };
        job.work(two, None);
        assert!(job.has_batches() && !job.is_done());
        job.work(|_| true, None);
        assert!(job.is_done() && !job.has_batches());
        // One thread has worked on it, and not all the time.
        assert!(job.thread_time() > Duration::ZERO && job.thread_time() <= begun.elapsed());
        let (_, verdict) = job.settle(job.thread_time()).unwrap();
        assert_eq!(verdict.failures().len(), 2);
        assert_eq!(verdict.failed_bytes(), 2 * PIECE as u64);
    }
}
