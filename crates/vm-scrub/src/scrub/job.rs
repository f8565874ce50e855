//! A range that is being worked on by any number of threads, in pieces.
//!
//! Threads take the next batch when they have done one, so none idles while another has a queue, and stop between two batches
//! when they are told to. The job is done when all bytes are; whoever sees that first may [settle](Job::settle) it.

use super::batches::Batches;
use super::broken::{Broken, bytes_in};
use super::engine::Choice;
use super::pass::{Pass, Tally, Work};
use super::workers::Workers;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

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
pub(crate) type Watch = dyn Fn(u64, u64) + Send + Sync;

/// So many bytes one thread has done before others are awake. Measured on Zen 4: waking a second thread takes 50 to 100 µs, zeroing
/// and reading back 1 MiB takes 20 to 50.
const FEW: u64 = 1 << 20;

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
    /// Until the job is settled or dropped the ranges must be disjoint, mapped readable and (but for
    /// [`Work::ReadSealed`]) writable, and nobody else may write to them, nor read what is zeroed.
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
        self.batches.upcoming() > 0
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
    pub(crate) fn work(&self, mut go_on: impl FnMut(usize) -> bool, watch: Option<&Watch>) {
        loop {
            let upcoming = self.batches.upcoming();
            if upcoming == 0 || !go_on(upcoming) {
                return;
            }
            let Some(batch) = self.batches.take() else {
                return;
            };
            // SAFETY: whoever made the job promised that its ranges are disjoint and nobody else's; each batch is handed out
            // once.
            unsafe { self.pass.run(self.work, batch.pieces(), &self.tally) };
            // Publishes the zeros, which the loop has fenced on this thread, to whoever sees that the job is done.
            let bytes = batch.bytes as u64;
            let done = self.done.fetch_add(bytes, Ordering::AcqRel) + bytes;
            if let Some(watch) = watch {
                watch(done, self.total);
            }
        }
    }

    /// All workers take batches until there are none left; the calling thread alone, if there are few. Returns how many threads
    /// that were.
    pub(crate) fn work_with(&self, workers: &Workers, watch: Option<&Watch>) -> usize {
        if self.total <= FEW {
            self.work(|_| true, watch);
            return 1;
        }
        workers.all(|| self.work(|_| true, watch));
        workers.threads()
    }

    /// Gives each piece that was not zero a second chance, where it was to be zeroed, and decides. `elapsed` is how long the pieces took.
    ///
    /// `None` if the job is not done.
    pub(crate) fn settle(&self, elapsed: Duration) -> Option<(Zeroed, Verdict)> {
        if !self.is_done() {
            return None;
        }
        let again = Instant::now();
        let (zeroing, reading) = self.tally.divide(elapsed);
        let suspects = self.tally.take_suspects();
        if let Some(first) = suspects.first()
            && self.work != Work::Check
        {
            log::warn!(
                "{} pieces of {} bytes are not zero after scrubbing, among them that at pool offset {:#x}: scrubbing them again",
                suspects.len(),
                self.total,
                first.piece.start
            );
        }
        let mut verdict = Verdict {
            bytes: self.tally.read(),
            failed_bytes: 0,
            failures: Vec::new(),
            time: Duration::ZERO,
            broken: Vec::new(),
        };
        let mut broken = self.tally.take_broken();
        let mut zeroed = self.tally.zeroed();
        for suspect in suspects {
            let (again, mut more) = match self.work {
                // What was proven to be zero and is not has a writer. To zero it would only hide that.
                Work::Check => (Err(suspect.offset), Vec::new()),
                // SAFETY: the job's pieces are still nobody else's, and no other thread works on them once it is done.
                _ => unsafe { self.pass.retry(self.work, &suspect.piece) },
            };
            let lost = bytes_in(more.iter().map(|broken| broken.range.clone()));
            broken.append(&mut more);
            if self.work.zeroes() {
                zeroed = zeroed.saturating_sub(lost);
            }
            let lost = suspect.broken + lost;
            match again {
                Ok(bytes) => verdict.bytes += bytes.saturating_sub(lost),
                Err(offset) => {
                    verdict.failed_bytes += (suspect.piece.len() as u64).saturating_sub(lost);
                    verdict.failures.push(Failure { offset });
                }
            }
        }
        verdict.broken = broken.clone();
        verdict.failures.sort_by_key(|failure| failure.offset);
        verdict.time = reading + again.elapsed();
        let zeroed = Zeroed {
            bytes: zeroed,
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
    use crate::scrub::{Engine, HostPtr, Policy, Verify, Work};
    use std::hint::spin_loop;
    use std::sync::Barrier;

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
}
