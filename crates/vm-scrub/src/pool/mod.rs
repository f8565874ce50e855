//! Memory between guests.
//!
//! A [`Pool`] owns a fixed amount of memory and knows the state of each of its blocks. Leasing is in
//! [`lease`](crate::lease), which stands above; here are the books, the free memory and the threads that scrub.
//!
//! | state | invariant | who may write | leaves it by |
//! |---|---|---|---|
//! | clean | every byte is zero, or the page was never populated | nobody | being leased |
//! | leased | mapped in exactly one guest window | that guest and its devices | revocation |
//! | dirty | no guest window, memslot or lease refers to it | the scrubber | zeroing, then verification |
//! | quarantined | unknown content, or a writer that may still be there | nobody | nothing |
//!
//! A block that a shareable lease took stands for so many bytes of a file, while its own memory is lent to the kernel. In
//! quarantine it is the file that stays there; when the kernel has got that after all, the block is clean, with fresh memory.
//!
//! State changes happen under one lock, in `ledger`; memory is never touched while it is held.

mod background;
pub(crate) mod blocks;
mod builder;
mod error;
mod extents;
mod ledger;
mod lending;
mod node;
mod owned;
mod page_size;
mod progress;
mod supply;
mod throttle;
mod withheld;

#[cfg(all(test, loom))]
pub(crate) use background::Errand;
pub use background::Priority;
pub(crate) use background::{Background, Chore};
pub use builder::PoolBuilder;
pub use error::PoolError;
pub use extents::Extent;
use extents::MOST_BLOCKS;
pub(crate) use extents::deal;
pub use ledger::Accounts;
pub(crate) use ledger::Ledger;
pub(crate) use lending::OwnedFile;
pub(crate) use owned::Owned;
pub use page_size::{PageSize, UnknownPageSize};
pub use progress::{LeaseId, Progress};
pub use throttle::{Clock, ScrubRate};
#[cfg(all(test, loom))]
pub(crate) use throttle::{SystemClock, Throttle};
pub use withheld::Withheld;
pub(crate) use withheld::{Remains, still_shared};

use crate::backing::{Backing, Revocation, WindowSpace};
use crate::scrub::{Engine, Verify, Watch};
use std::fmt;
use std::sync::Arc;

/// Memory for guests: handed out zeroed, taken back dirty, scrubbed, verified, and handed out again.
///
/// Cheap to clone; all clones are the same pool. Leases keep what they need of it alive, so the pool can be dropped first.
/// When the last of them is dropped, the memory is back with the kernel as that returns; a lease that was retired lets go of it when it
/// has been scrubbed, in the background.
#[derive(Debug, Clone)]
pub struct Pool {
    pub(crate) shared: Arc<Owned>,
}

/// Hears how far scrubbing is.
pub(crate) type OnProgress = Arc<dyn Fn(Progress) + Send + Sync>;

/// What a pool, its clones and its leases share.
pub(crate) struct Shared {
    /// Dropped first: its thread uses what follows.
    pub(crate) background: Background,
    pub(crate) backing: Box<dyn Backing>,
    pub(crate) ledger: Arc<Ledger>,
    /// Shared memory that other processes have not let go of.
    pub(crate) withheld: withheld::WithheldSet,
    pub(crate) windows: WindowSpace,
    pub(crate) engine: Engine,
    pub(crate) page_size: PageSize,
    pub(crate) numa_node: Option<u32>,
    /// Whether memory is supplied by the kernel before a guest needs it.
    pub(crate) populate: bool,
    pub(crate) verify: Verify,
    /// Bytes of each lease that may stay populated when it has been scrubbed.
    pub(crate) retain: u64,
    /// Whether what is populated is locked in memory.
    pub(crate) lock_memory: bool,
    /// Whether memory is read once more before a guest gets it.
    pub(crate) check_on_grant: bool,
    pub(crate) on_progress: Option<OnProgress>,
}

impl Shared {
    /// What a job of `lease` tells about its progress, if anybody wants to hear it.
    pub(crate) fn watch(&self, lease: LeaseId) -> Option<Box<Watch<'static>>> {
        let on_progress = Arc::clone(self.on_progress.as_ref()?);
        Some(Box::new(move |bytes_done, bytes_total| {
            on_progress(Progress {
                lease,
                bytes_done,
                bytes_total,
            });
        }))
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("page_size", &self.page_size)
            .field("numa_node", &self.numa_node)
            .field("accounts", &self.ledger.accounts())
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts describing a pool.
    pub fn builder() -> PoolBuilder {
        PoolBuilder::default()
    }

    /// How many bytes are in which state, at one moment.
    pub fn accounts(&self) -> Accounts {
        self.shared.ledger.accounts()
    }

    /// How many bytes the pool has in all, whatever their state.
    pub fn capacity(&self) -> u64 {
        self.accounts().total()
    }

    /// The pages the pool is made of.
    pub fn page_size(&self) -> PageSize {
        self.shared.page_size
    }

    /// The NUMA node to which the pool is bound; see [`PoolBuilder::numa_node`].
    pub fn numa_node(&self) -> Option<u32> {
        self.shared.numa_node
    }

    /// How memory is taken away from guests, if all goes well; receipts say how it was.
    pub fn revocation(&self) -> Revocation {
        self.shared.backing.revocation()
    }

    /// How many threads scrub at the same time.
    pub fn threads(&self) -> usize {
        self.shared.engine.workers().threads()
    }

    /// Limits how fast retired leases are scrubbed in the background, from now on; `None` lifts the limit. Acts within a
    /// millisecond, also on what is being scrubbed. Teardowns, and whoever waits for a ticket or for memory, are not slowed
    /// down.
    pub fn set_scrub_rate(&self, rate: Option<ScrubRate>) {
        self.shared.background.throttle().set(rate);
    }
}
