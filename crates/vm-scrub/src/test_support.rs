//! Ways to break things on purpose: for demonstrations that the proof can fail, and for tests. Not for production.
//!
//! Behind the feature `test-support`, which nothing but this project's own command and tests should turn on.

pub use crate::scrub::Sabotage;
pub use crate::sys::fault::{Call, FaultGuard, inject, inject_short};
#[cfg(feature = "vm-memory")]
use crate::{Pool, PoolBuilder, PoolError};

/// Builds a pool whose scrubber is broken.
///
/// # Errors
///
/// As for [`PoolBuilder::build`].
#[cfg(feature = "vm-memory")]
pub fn build_sabotaged(builder: PoolBuilder, sabotage: Sabotage) -> Result<Pool, PoolError> {
    builder.sabotage(sabotage).build()
}

/// Where the pool's private arena begins: for tests that write behind its back.
#[cfg(feature = "vm-memory")]
pub fn arena_address(pool: &Pool) -> *mut u8 {
    pool.shared.backing.arena().0
}
