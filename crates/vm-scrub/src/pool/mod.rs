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
//! State changes happen under one lock, in `ledger`; memory is never touched while it is held.

pub(crate) mod blocks;
mod builder;
mod extents;
mod ledger;
mod page_size;

pub use builder::{PoolBuilder, PoolError};
pub use extents::Extent;
pub(crate) use extents::deal;
pub use ledger::Accounts;
pub(crate) use ledger::Ledger;
pub use page_size::{PageSize, UnknownPageSize};

use crate::backing::{Backing, WindowSpace};
use crate::scrub::{Engine, Verify};
use std::sync::Arc;

/// Memory for guests: handed out zeroed, taken back dirty, scrubbed, verified, and handed out again.
///
/// Cheap to clone; all clones are the same pool. Leases keep what they need of it alive, so the pool can be dropped first.
/// When the last of them is gone the memory goes back to the kernel.
#[derive(Debug, Clone)]
pub struct Pool {
    pub(crate) shared: Arc<Shared>,
}

/// What a pool, its clones and its leases share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) backing: Box<dyn Backing>,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) windows: WindowSpace,
    pub(crate) engine: Engine,
    pub(crate) page_size: PageSize,
    pub(crate) verify: Verify,
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

    /// How many threads scrub at the same time.
    pub fn threads(&self) -> usize {
        self.shared.engine.workers().threads()
    }
}
