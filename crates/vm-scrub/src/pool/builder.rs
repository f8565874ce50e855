//! Describing a pool, and making it.

use super::background::Background;
use super::throttle::{Clock, SystemClock, Throttle};
use super::{
    Ledger, MOST_BLOCKS, OnProgress, PageSize, Pool, PoolError, Progress, ScrubRate, Shared,
};
use crate::BLOCK_SIZE;
use crate::backing::{AnonymousArena, BLOCK, Backing, HugetlbArena, HugetlbError, WindowSpace};
use crate::scrub::{Engine, Policy, Workers};
use crate::sys::{self, map};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// How much address space, in bytes, windows of guests that are gone keep by default: 1 TiB of the 128 TiB that a process
/// on x86_64 has. Reserved address space costs no memory.
const KEPT_WINDOWS: u64 = 1 << 40;

/// More scrubbing threads than any host has processors: a larger number is taken for a mistake.
pub(super) const MAX_THREADS: usize = 4096;

/// What a pool is to be like; see [`Pool::builder`].
#[must_use = "a builder does nothing until `build` is called"]
pub struct PoolBuilder {
    capacity: u64,
    page_size: PageSize,
    populate: bool,
    threads: Option<usize>,
    policy: Policy,
    kept_windows: u64,
    scrub_rate: Option<ScrubRate>,
    clock: Option<Box<dyn Clock>>,
    on_progress: Option<OnProgress>,
    #[cfg(any(test, feature = "test-support"))]
    sabotage: Option<crate::scrub::Sabotage>,
}

impl std::fmt::Debug for PoolBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PoolBuilder")
            .field("capacity", &self.capacity)
            .field("page_size", &self.page_size)
            .field("threads", &self.threads)
            .field("policy", &self.policy)
            .finish_non_exhaustive()
    }
}

impl Default for PoolBuilder {
    fn default() -> Self {
        Self {
            capacity: 0,
            page_size: PageSize::default(),
            populate: false,
            threads: None,
            policy: Policy::default(),
            kept_windows: KEPT_WINDOWS,
            scrub_rate: None,
            clock: None,
            on_progress: None,
            #[cfg(any(test, feature = "test-support"))]
            sabotage: None,
        }
    }
}

impl PoolBuilder {
    /// How much memory the pool has, in bytes: a multiple of [`BLOCK_SIZE`](crate::BLOCK_SIZE). There is no default.
    pub fn capacity(mut self, bytes: u64) -> Self {
        self.capacity = bytes;
        self
    }

    /// The pages the pool is made of. Transparent huge pages, if not said otherwise.
    pub fn page_size(mut self, page_size: PageSize) -> Self {
        self.page_size = page_size;
        self
    }

    /// Whether all memory is supplied by the kernel when the pool is built, so that no guest waits for it. Off by default.
    pub fn populate(mut self, populate: bool) -> Self {
        self.populate = populate;
        self
    }

    /// How many threads scrub: 1 to 4096. By default one per processor. With 1, or without the `rayon` feature, the
    /// thread that tears a lease down does the work.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// How memory is scrubbed. By default every byte is read back.
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// How much address space, in bytes, may be kept by the closed windows of guests that are gone, so that a pointer
    /// somebody forgot faults instead of finding the next guest. 1 TiB by default; it costs no memory, but counts towards
    /// a limit on address space (`RLIMIT_AS`). Windows are given up earlier where a new one finds no room.
    pub fn kept_windows(mut self, bytes: u64) -> Self {
        self.kept_windows = bytes;
        self
    }

    /// How fast retired leases are scrubbed in the background; as fast as it goes, if not said otherwise. Can be changed
    /// later with [`Pool::set_scrub_rate`].
    pub fn scrub_rate(mut self, rate: ScrubRate) -> Self {
        self.scrub_rate = Some(rate);
        self
    }

    /// Replaces the clock by which background scrubbing is paced: for tests.
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Some(Box::new(clock));
        self
    }

    /// Calls `on_progress` after each piece (of at most 256 KiB) that was scrubbed, from the thread that did it. It must be
    /// quick, and must not wait for what waits for it, as [`Ticket::cancel`](crate::Ticket::cancel) does. If it panics, the
    /// memory of that lease is quarantined, unless all of it had been verified by then.
    pub fn on_progress(mut self, on_progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.on_progress = Some(Arc::new(on_progress));
        self
    }

    /// Breaks the pool's scrubber on purpose.
    #[cfg(any(test, feature = "test-support"))]
    pub(crate) fn sabotage(mut self, sabotage: crate::scrub::Sabotage) -> Self {
        self.sabotage = Some(sabotage);
        self
    }

    /// Makes the pool: reserves and maps its memory, starts its threads and, if asked to, populates it.
    ///
    /// # Errors
    ///
    /// Each variant of [`PoolError`] says what to do.
    pub fn build(self) -> Result<Pool, PoolError> {
        let capacity = self.capacity;
        let len = usize::try_from(capacity)
            .ok()
            .filter(|len| *len > 0 && len.is_multiple_of(BLOCK))
            .filter(|_| capacity / BLOCK_SIZE <= MOST_BLOCKS)
            .ok_or(PoolError::Capacity { capacity })?;
        let threads = self
            .threads
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(PoolError::Threads { threads });
        }
        let bytes = map::host_page_size();
        if bytes != 4096 {
            return Err(PoolError::HostPageSize { bytes });
        }

        let backing = self.map(len)?;
        let workers =
            Workers::start(threads).map_err(|source| PoolError::Workers { threads, source })?;
        if self.populate {
            populate(backing.as_ref(), len, &workers)
                .map_err(|source| PoolError::Populate { capacity, source })?;
        }
        #[cfg_attr(
            not(any(test, feature = "test-support")),
            expect(unused_mut, reason = "only sabotage changes it")
        )]
        let mut engine =
            Engine::calibrated(workers, &self.policy).map_err(PoolError::UnknownLoop)?;
        #[cfg(any(test, feature = "test-support"))]
        if let Some(sabotage) = self.sabotage {
            engine.sabotage(sabotage);
        }
        let clock = self.clock.unwrap_or_else(|| Box::new(SystemClock::new()));
        let background =
            Background::start(Throttle::new(self.scrub_rate, clock)).map_err(|error| {
                PoolError::Workers {
                    threads: 1,
                    source: error.into(),
                }
            })?;
        log::info!(
            "pool of {capacity} bytes in {} pages, {threads} scrubbing threads",
            self.page_size
        );
        Ok(Pool {
            shared: Arc::new(Shared {
                background,
                backing,
                ledger: Arc::new(Ledger::new(capacity / BLOCK_SIZE)),
                windows: WindowSpace::new(usize::try_from(self.kept_windows).unwrap_or(usize::MAX)),
                engine,
                page_size: self.page_size,
                verify: self.policy.verify,
                retain: self.policy.retain,
                on_progress: self.on_progress,
            }),
        })
    }

    fn map(&self, len: usize) -> Result<Box<dyn Backing>, PoolError> {
        let capacity = self.capacity;
        let huge_pages = match self.page_size {
            PageSize::Base4K => false,
            PageSize::Transparent => true,
            PageSize::Huge2M => {
                return match HugetlbArena::map(len, self.populate) {
                    Ok(arena) => Ok(Box::new(arena)),
                    Err(HugetlbError::NoPages { free }) => Err(PoolError::NoHugePages {
                        asked: capacity / BLOCK_SIZE,
                        free,
                    }),
                    Err(HugetlbError::Sys(source)) => Err(PoolError::Map { capacity, source }),
                };
            }
        };
        match AnonymousArena::map(len, huge_pages) {
            Ok(arena) => Ok(Box::new(arena)),
            Err(source) if huge_pages && source.call == sys::Call::Madvise => {
                Err(PoolError::NoTransparentHugePages { source })
            }
            Err(source) => Err(PoolError::Map { capacity, source }),
        }
    }
}

/// Populates `[0, len)` of the arena with all threads, in chunks large enough that the calls themselves cost nothing.
fn populate(backing: &dyn Backing, len: usize, workers: &Workers) -> sys::Result<()> {
    const CHUNK: usize = 64 << 20;
    let next = AtomicUsize::new(0);
    let failed = Mutex::new(None);
    workers.all(|| {
        loop {
            let start = next.fetch_add(CHUNK, Ordering::Relaxed);
            if start >= len {
                return;
            }
            if let Err(error) = backing.populate(start..len.min(start + CHUNK)) {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                return;
            }
        }
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}
