//! Describing a pool, and making it.

use super::background::Background;
use super::node;
use super::supply::Supply;
use super::throttle::{Clock, SystemClock, Throttle};
use super::withheld::WithheldSet;
use super::{
    Ledger, MOST_BLOCKS, OnProgress, Owned, PageSize, Pool, PoolError, Progress, ScrubRate, Shared,
};
use crate::BLOCK_SIZE;
use crate::backing::{BLOCK, NotPrepared, RevokeBy, WindowSpace};
use crate::scrub::{Engine, Policy, Workers};
use crate::sys::{features, fork, map};
use std::sync::Arc;
use std::time::Duration;

/// How much address space, in bytes, windows of guests that are gone keep by default: 1 TiB of the 128 TiB that a process
/// on x86_64 has. Reserved address space costs no memory.
const KEPT_WINDOWS: u64 = 1 << 40;

/// For how long memory that is pinned or shared is tried again. The kernel was seen to need 12 to 20 ms to let go of an
/// io_uring's buffers after the ring was closed.
const PIN_PATIENCE: Duration = Duration::from_millis(100);

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
    revoke_by: RevokeBy,
    pin_patience: Duration,
    scrub_rate: Option<ScrubRate>,
    numa_node: Option<u32>,
    lock_memory: bool,
    check_on_grant: bool,
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
            .field("numa_node", &self.numa_node)
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
            revoke_by: RevokeBy::default(),
            pin_patience: PIN_PATIENCE,
            scrub_rate: None,
            numa_node: None,
            lock_memory: false,
            check_on_grant: false,
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

    /// How many threads scrub: 1 to 4096. By default one per processor, of the NUMA node if there is one. The thread that tears a lease
    /// down is one of them, unless there is a node; with 1, or without the `rayon` feature, it is the only one. So where several leases are
    /// torn down at once, each of those threads works, and all but one of the pool's.
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

    /// How memory is taken away from guests, and so whether pages that are pinned for DMA or shared with other processes are
    /// found. They are, by default, where the kernel can tell: Linux 6.8 and later, 4 KiB and transparent huge pages.
    ///
    /// It costs nothing to speak of for huge pages. With 4 KiB pages a turnaround takes 20 to 36 ms a gigabyte longer than with
    /// [`RevokeBy::Mremap`] (the kept runs in `benches/results`).
    pub fn revoke_by(mut self, by: RevokeBy) -> Self {
        self.revoke_by = by;
        self
    }

    /// For how long a teardown waits for memory that is pinned for DMA or shared with another process, before that is
    /// quarantined: 100 ms by default, for each range of a lease that is consecutive in the pool. Nobody waits where there is
    /// none.
    pub fn pin_patience(mut self, patience: Duration) -> Self {
        self.pin_patience = patience;
        self
    }

    /// How fast retired leases are scrubbed in the background; as fast as it goes, if not said otherwise. Can be changed
    /// later with [`Pool::set_scrub_rate`].
    pub fn scrub_rate(mut self, rate: ScrubRate) -> Self {
        self.scrub_rate = Some(rate);
        self
    }

    /// Keeps the pool on one NUMA node of the host, by the number that the host has for it (`/sys/devices/system/node`). By
    /// default the kernel chooses where memory and threads are.
    ///
    /// - Its memory is bound (`mbind(2)`, `MPOL_BIND`): no page of it comes from another node while the process's cpuset has this one. Where the node has none left,
    ///   whoever touches the next one is treated as if the host had none; [`populate`](Self::populate) finds that out first.
    ///   Hugetlb pages are always populated when the pool is built.
    /// - Its threads run on that node's processors, of which the thread that calls [`build`](Self::build) must be allowed some;
    ///   where they cannot, a warning is logged. They do not help another node's pool, nor do that one's threads help here. What
    ///   the embedder's threads scrub themselves, they scrub where they run: at most 1 MiB at a time, or everything without the
    ///   `rayon` feature.
    /// - Automatic NUMA balancing leaves bound memory alone. Elsewhere it moves pages of guests between nodes, and what they
    ///   contained stays behind in memory that the pool no longer has.
    ///
    /// The calls that this takes (`mbind`, `sched_setaffinity`, `gettid`, and reading `/sys/devices/system/node` and
    /// `/proc/thread-self/status`) are made by `build` and not again. A lease's memory should not be bound differently by the
    /// VMM: its policy would come back to the pool with the pages.
    ///
    /// # Several nodes
    ///
    /// Each has a pool of its own. A guest with memory on two of them has a lease from each, and its two teardowns can run
    /// at the same time:
    ///
    #[cfg_attr(feature = "kvm", doc = "```no_run")]
    #[cfg_attr(not(feature = "kvm"), doc = "```ignore")]
    /// use vm_memory::{GuestAddress, GuestMemoryMmap};
    /// use vm_scrub::kvm::{MemslotOptions, Memslots};
    /// use vm_scrub::Pool;
    ///
    /// let near = Pool::builder().capacity(64 << 30).numa_node(0).build()?;
    /// let far = Pool::builder().capacity(64 << 30).numa_node(1).build()?;
    /// let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
    ///
    /// // A guest with two nodes of 2 GiB, and one memslot for each.
    /// let low = near.lease(&[(GuestAddress(0), 2 << 30)])?;
    /// let high = far.lease(&[(GuestAddress(4 << 30), 2 << 30)])?;
    /// let mut low_slots = Memslots::register(&vm, &low)?;
    /// let mut high_slots = Memslots::register_with(&vm, &high, MemslotOptions::new().first_slot(1))?;
    /// let regions = [low.regions(|_| ()), high.regions(|_| ())].into_iter().flatten();
    /// let memory: GuestMemoryMmap = GuestMemoryMmap::from_regions(regions.collect())?;
    /// // ... the guest runs, and is stopped ...
    /// drop(memory);
    ///
    /// // Both nodes scrub at once.
    /// let tickets = [low.retire(low_slots.remove()?)?, high.retire(high_slots.remove()?)?];
    /// # drop(tickets);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn numa_node(mut self, node: u32) -> Self {
        self.numa_node = Some(node);
        self
    }

    /// Locks what is populated of the pool's memory in RAM, so that no guest's bytes are swapped out. Off by default; for hosts
    /// that have swap.
    ///
    /// - The kernel locks pages as they are populated (`mlock2(2)` with `MLOCK_ONFAULT`, Linux 4.4): nothing is populated for it.
    ///   But it counts all of the pool's capacity, in bytes, against `RLIMIT_MEMLOCK`, from [`build`](Self::build) until the pool
    ///   and its last lease are gone, and a [shareable](crate::LeaseOptions::shareable) lease instead of the blocks that it
    ///   takes. With `CAP_IPC_LOCK` there is no limit. What is refused is an error: [`PoolError::Lock`] or `LeaseError::Lock`.
    /// - While memory changes hands it is unlocked, because the kernel would count it twice. A guest's bytes could be swapped out
    ///   while they are taken away from it: some milliseconds for a gigabyte, and [`pin_patience`](Self::pin_patience) if
    ///   somebody holds a page. That they are locked again before they are scrubbed is tried and not needed for what follows,
    ///   so a refusal is logged, counted in the receipt (`bytes_unlocked`), and the memory scrubbed: to quarantine it would keep
    ///   the guest's bytes where they can be swapped out, for good. What is quarantined for other reasons stays locked as far as
    ///   the kernel allows.
    /// - Of shareable memory, what only another process has touched is not locked, nor is what waits to be scrubbed.
    /// - Hugetlb pages are never swapped out: there nothing is locked, and nothing counts.
    /// - It costs five system calls for each piece of a lease, and while a guest has the memory a mapping or two more.
    pub fn lock_memory(mut self, lock: bool) -> Self {
        self.lock_memory = lock;
        self
    }

    /// Reads memory once more when it is leased, right before the guest gets it, with all scrubbing threads: so that what was
    /// written to it between recycling and grant, by whatever means, is found. Off by default.
    ///
    /// Every byte of every populated page of the blocks is read, whatever the [policy](Self::policy) says about reading back.
    /// A block in which one is not zero is quarantined, with a line in the log, and another one is taken for it; where there is
    /// none left, the error is [`LeaseError::FoundDirty`](crate::LeaseError::FoundDirty). Writes that come after the check are
    /// not found. A lease takes longer by what it takes to read its memory, and in a pool of hugetlb pages all of it is supplied
    /// by the kernel then, if it was not [before](Self::populate).
    pub fn check_on_grant(mut self, check: bool) -> Self {
        self.check_on_grant = check;
        self
    }

    /// Replaces the clock by which background scrubbing is paced: for tests.
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Some(Box::new(clock));
        self
    }

    /// Calls `on_progress` after each piece (of at most 256 KiB) that was scrubbed, from the thread that did it, which may be the one that
    /// tears the lease down. It must be quick, and must not wait for what waits for it, as [`Ticket::cancel`](crate::Ticket::cancel) does. If it panics, the
    /// memory of that lease is quarantined, unless it was finished by then.
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
        if let Some(threads) = self.threads.filter(|n| !(1..=MAX_THREADS).contains(n)) {
            return Err(PoolError::Threads { threads });
        }
        let bytes = map::host_page_size();
        if bytes != 4096 {
            return Err(PoolError::HostPageSize { bytes });
        }
        let address_space = fork::address_space().map_err(|source| PoolError::Fork { source })?;
        features::log_once();
        let cpus = self.numa_node.map(node::processors).transpose()?.flatten();
        let threads = self.threads.unwrap_or_else(|| {
            let all = std::thread::available_parallelism().map_or(1, usize::from);
            cpus.as_ref().map_or(all, |cpus| all.min(cpus.len()))
        });

        let supply = Supply {
            len,
            page_size: self.page_size,
            populate: self.populate,
            numa_node: self.numa_node,
            lock: self.lock_memory,
        };
        let backing = supply.map()?;
        let workers = Workers::start(threads, cpus.as_ref())
            .map_err(|source| PoolError::Workers { threads, source })?;
        let mut backing = supply.populate(backing, &workers)?;
        let by = self.revoke_by;
        backing
            .prepare(by, self.pin_patience)
            .map_err(|error| match error {
                NotPrepared::OtherKind => PoolError::Revocation { by, source: None },
                NotPrepared::Sys(error) => PoolError::Revocation {
                    by,
                    source: Some(error),
                },
            })?;
        // No truncation: 2 MiB at most.
        let page = self.page_size.granularity() as usize;
        #[cfg_attr(
            not(any(test, feature = "test-support")),
            expect(unused_mut, reason = "only sabotage changes it")
        )]
        let mut engine =
            Engine::calibrated(workers, &self.policy, page).map_err(PoolError::UnknownLoop)?;
        #[cfg(any(test, feature = "test-support"))]
        if let Some(sabotage) = self.sabotage {
            engine.sabotage(sabotage);
        }
        let clock = self.clock.unwrap_or_else(|| Box::new(SystemClock::new()));
        let background =
            Background::start(Throttle::new(self.scrub_rate, clock), cpus).map_err(|error| {
                PoolError::Workers {
                    threads: 1,
                    source: error.into(),
                }
            })?;
        log::info!(
            "pool of {capacity} bytes in {} pages{}, {threads} scrubbing threads, revocation by {:?}",
            self.page_size,
            match self.numa_node {
                Some(node) => format!(" on NUMA node {node}"),
                None => String::new(),
            },
            backing.revocation()
        );
        let shared = Shared {
            background,
            backing,
            ledger: Arc::new(Ledger::new(capacity / BLOCK_SIZE)),
            withheld: WithheldSet::default(),
            windows: WindowSpace::new(usize::try_from(self.kept_windows).unwrap_or(usize::MAX)),
            engine,
            page_size: self.page_size,
            numa_node: self.numa_node,
            populate: supply.is_populated(),
            verify: self.policy.verify,
            retain: self.policy.retain,
            lock_memory: self.lock_memory,
            check_on_grant: self.check_on_grant,
            on_progress: self.on_progress,
        };
        let shared = Owned::new(shared, address_space);
        shared.background.entrust(shared.visit());
        Ok(Pool {
            shared: Arc::new(shared),
        })
    }
}
