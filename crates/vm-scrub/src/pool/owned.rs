//! Who keeps a pool.
//!
//! Handles, leases and memory on its way back own it. Those who only look at it for a while, as the background thread does between
//! two pieces, do not: were one of them the last, the memory would go back to the kernel some time after everybody else has let
//! go of the pool, and a VMM that builds the next one at once would not find the hugetlb pages of this one.

use super::Shared;
use std::ops::Deref;
use std::sync::{Arc, Weak};

/// A pool that ends with the last `Arc` of this: its background thread first, then its memory.
#[derive(Debug)]
pub(crate) struct Owned(Arc<Shared>);

impl Owned {
    pub(super) fn new(shared: Shared) -> Self {
        Self(Arc::new(shared))
    }

    /// For those who only look.
    pub(crate) fn visit(&self) -> Weak<Shared> {
        Arc::downgrade(&self.0)
    }
}

impl Deref for Owned {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        self.0.background.end();
    }
}
