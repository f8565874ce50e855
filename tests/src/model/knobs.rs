//! What a pool can be asked to be like, all of it.

use arbitrary::Arbitrary;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};
use vm_scrub::pool::Clock;
use vm_scrub::{BLOCK_SIZE, PageSize, Policy, Pool, PoolError, RevokeBy, ScrubRate, Verify};

use crate::{PAGE, numa};

/// Everything that a pool's builder takes.
#[derive(Debug, Clone, Default, Arbitrary)]
pub struct Knobs {
    /// One less than the number of blocks, modulo eight.
    pub blocks: u8,
    /// The pages.
    pub pages: Pages,
    /// Whether all memory is populated.
    pub populate: bool,
    /// One less than the number of threads, modulo three. Faults belong to a thread: most are met where there is one.
    pub threads: u8,
    /// How much is read back.
    pub level: Level,
    /// A zeroing loop, by its place in the list.
    pub zero_loop: Option<u8>,
    /// Pages that stay populated.
    pub retain: Option<u16>,
    /// Whether the kernel is asked about each piece.
    pub probe: bool,
    /// Whether free memory is read before it is leased.
    pub check_on_grant: bool,
    /// Blocks of closed windows that are kept.
    pub kept_windows: Option<u8>,
    /// Whether pages come home by a move, where that can be had; by `mremap`; or as the library likes.
    pub by_move: Option<bool>,
    /// Patience with pins, in units of 16 microseconds.
    pub patience: u8,
    /// The limit on background scrubbing.
    pub rate: Option<Rate>,
    /// Whether the pool lives on a NUMA node.
    pub on_node: bool,
    /// Whether somebody listens to progress.
    pub listener: bool,
    /// Something that no pool can be.
    pub odd: Option<Odd>,
    /// Whether every byte of every guest is looked at, and not only what can be wrong.
    pub thorough: bool,
    /// A loop that reads back, by its place in the list.
    pub verify_loop: Option<u8>,
    /// Whether what is populated is locked in memory.
    pub lock_memory: bool,
}

/// [`PageSize`], made up.
#[derive(Debug, Clone, Copy, Default, Arbitrary, PartialEq, Eq)]
pub enum Pages {
    /// 4 KiB.
    #[default]
    Base4K,
    /// Transparent huge pages.
    Transparent,
    /// Hugetlb pages.
    Huge2M,
}

impl From<Pages> for PageSize {
    fn from(pages: Pages) -> Self {
        match pages {
            Pages::Base4K => PageSize::Base4K,
            Pages::Transparent => PageSize::Transparent,
            Pages::Huge2M => PageSize::Huge2M,
        }
    }
}

/// [`Verify`], made up.
#[derive(Debug, Clone, Copy, Default, Arbitrary, PartialEq, Eq)]
pub enum Level {
    /// Everything.
    #[default]
    Full,
    /// Nothing.
    None,
    /// So many lines of 1,000.
    Sampled(u16),
    /// Everything, from memory.
    Memory,
}

impl From<Level> for Verify {
    fn from(level: Level) -> Self {
        match level {
            Level::Full => Verify::Full,
            Level::None => Verify::None,
            Level::Sampled(per_mille) => Verify::Sampled { per_mille },
            Level::Memory => Verify::Memory,
        }
    }
}

/// A limit on background scrubbing. Time passes at once where it is slept.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub struct Rate {
    /// Bytes a second.
    pub rate: u32,
    /// Bytes at once.
    pub burst: u32,
}

impl From<Rate> for ScrubRate {
    fn from(rate: Rate) -> Self {
        ScrubRate {
            bytes_per_second: u64::from(rate.rate),
            burst: u64::from(rate.burst),
        }
    }
}

/// What no pool can be.
#[derive(Debug, Clone, Copy, Arbitrary)]
pub enum Odd {
    /// This many bytes, if they are no whole blocks or more than there are addresses.
    Capacity(u64),
    /// This many threads, if they are none or more than 4096.
    Threads(u64),
    /// This node, if it is none.
    Node(u32),
}

/// A clock on which sleeping takes no time.
#[derive(Debug, Default)]
pub(super) struct Fast(AtomicU64);

impl Clock for Fast {
    fn now(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::SeqCst))
    }

    fn sleep(&self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 4);
        self.0.fetch_add(nanos.max(1_000_000), Ordering::SeqCst);
        std::thread::yield_now();
    }
}

impl Knobs {
    /// How many blocks the pool has.
    pub fn blocks(&self) -> u64 {
        1 + u64::from(self.blocks % 8)
    }

    /// What the pages' addresses and lengths must be multiples of.
    pub fn granularity(&self) -> u64 {
        PageSize::from(self.pages).granularity()
    }

    /// The pool, if there is to be one and the host has what it takes.
    pub(super) fn build(&self) -> Option<Pool> {
        let mut builder = Pool::builder()
            .capacity(self.blocks() * BLOCK_SIZE)
            .page_size(self.pages.into())
            .populate(self.populate)
            .threads(1 + usize::from(self.threads % 3))
            .policy(self.policy())
            .pin_patience(Duration::from_micros(16 * u64::from(self.patience)))
            .clock(Fast::default())
            .check_on_grant(self.check_on_grant)
            .lock_memory(self.lock_memory);
        if let Some(blocks) = self.kept_windows {
            builder = builder.kept_windows(u64::from(blocks) * BLOCK_SIZE);
        }
        builder = builder.revoke_by(match self.by_move {
            None => RevokeBy::Automatic,
            Some(true) => RevokeBy::Move,
            Some(false) => RevokeBy::Mremap,
        });
        if let Some(rate) = self.rate {
            builder = builder.scrub_rate(rate.into());
        }
        if self.listener {
            let last = Arc::new(Mutex::new((None, 0)));
            builder = builder.on_progress(move |progress| {
                assert!(progress.bytes_done <= progress.bytes_total);
                let mut last = last.lock().unwrap_or_else(|error| error.into_inner());
                *last = (Some(progress.lease), progress.bytes_done);
            });
        }
        if self.on_node {
            builder = builder.numa_node(numa::node()?);
        }
        let odd = self.odd.filter(Odd::is_odd);
        match odd {
            Some(Odd::Capacity(bytes)) => builder = builder.capacity(bytes),
            Some(Odd::Threads(threads)) => builder = builder.threads(threads as usize),
            Some(Odd::Node(node)) => builder = builder.numa_node(node),
            None => {}
        }
        match (builder.build(), odd) {
            (Ok(pool), None) => Some(pool),
            (Ok(_), Some(odd)) => panic!("there is no such pool: {odd:?}"),
            (Err(error), _) => {
                assert!(self.may_be(&error, odd), "{odd:?} {self:?}: {error}");
                None
            }
        }
    }

    fn policy(&self) -> Policy {
        let mut policy = Policy::new().verify(self.level.into()).probe(self.probe);
        if let Some(number) = self.zero_loop {
            let count = ZeroLoop::available().count();
            let chosen = ZeroLoop::available().nth(usize::from(number) % count);
            let name = chosen
                .expect("the number was taken modulo the count")
                .name();
            policy = policy.zero_loop(ZeroLoop::by_name(name).expect("it is in the list"));
        }
        if let Some(number) = self.verify_loop {
            let count = VerifyLoop::available().count();
            let chosen = VerifyLoop::available().nth(usize::from(number) % count);
            policy = policy.verify_loop(chosen.expect("the number was taken modulo the count"));
        }
        match self.retain {
            Some(pages) => policy.retain(u64::from(pages) * PAGE),
            None => policy,
        }
    }

    /// Whether building may fail so.
    fn may_be(&self, error: &PoolError, odd: Option<Odd>) -> bool {
        let huge = self.pages == Pages::Huge2M;
        match error {
            PoolError::Capacity { capacity } => {
                matches!(odd, Some(Odd::Capacity(asked)) if asked == *capacity)
            }
            PoolError::Threads { threads } => {
                matches!(odd, Some(Odd::Threads(asked)) if asked as usize == *threads)
            }
            PoolError::NoSuchNode { node, nodes } => {
                matches!(odd, Some(Odd::Node(asked)) if asked == *node) && !nodes.contains(node)
            }
            // Reading what nodes there are may be forbidden.
            PoolError::NumaBind { .. } => matches!(odd, Some(Odd::Node(_))),
            // A limit on locked memory.
            PoolError::Lock { .. } => self.lock_memory,
            // Others on this host take and give back pages all the time.
            PoolError::NoHugePages { .. } | PoolError::NoHugePagesOnNode { .. } => huge,
            PoolError::Revocation { by, source } => match by {
                RevokeBy::Automatic => false,
                _ if huge => source.is_none(),
                by => *by == RevokeBy::Move && !crate::maps::has_uffdio_move(),
            },
            _ => false,
        }
    }
}

impl Odd {
    fn is_odd(&self) -> bool {
        match *self {
            // Larger ones that are whole blocks may or may not find addresses.
            Odd::Capacity(bytes) => bytes == 0 || !bytes.is_multiple_of(BLOCK_SIZE),
            Odd::Threads(threads) => !(1..=4096).contains(&threads),
            Odd::Node(node) => node >= 1024,
        }
    }
}
