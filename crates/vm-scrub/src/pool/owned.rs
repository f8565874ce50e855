//! Who keeps a pool.
//!
//! Handles, leases and memory on its way back own it. Those who only look at it for a while, as the background thread does between
//! two pieces, do not: were one of them the last, the memory would go back to the kernel some time after everybody else has let
//! go of the pool, and a VMM that builds the next one at once would not find the hugetlb pages of this one.

use super::Shared;
use crate::sys::fork;
use std::ops::Deref;
use std::sync::{Arc, Weak};

/// A pool that ends with the last `Arc` of this: its background thread first, then its memory.
#[derive(Debug)]
pub(crate) struct Owned {
    shared: Arc<Shared>,
    /// The one in which its memory and its threads are.
    address_space: u64,
}

impl Owned {
    pub(super) fn new(shared: Shared, address_space: u64) -> Self {
        Self {
            shared: Arc::new(shared),
            address_space,
        }
    }

    /// Whether this is where the pool was built. In a forked child neither its memory nor its threads are there, and what lies at
    /// their addresses may be the child's own.
    pub(crate) fn is_here(&self) -> bool {
        fork::is_here(self.address_space)
    }

    /// The number of the address space where the pool was built.
    pub(crate) fn address_space(&self) -> u64 {
        self.address_space
    }

    /// For those who only look.
    pub(crate) fn visit(&self) -> Weak<Shared> {
        Arc::downgrade(&self.shared)
    }
}

impl Deref for Owned {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.shared
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if self.is_here() {
            self.shared.background.end();
        } else {
            // Nothing of it is ended or unmapped.
            std::mem::forget(Arc::clone(&self.shared));
        }
    }
}
