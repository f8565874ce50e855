//! Who is being scrubbed, and how far it is.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names a lease. Unique in a process, across pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct LeaseId(u64);

impl LeaseId {
    /// A name that was not used before.
    pub(crate) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lease {}", self.0)
    }
}

/// How far the scrubbing of a lease is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// The lease.
    pub lease: LeaseId,
    /// Bytes that are done.
    pub bytes_done: u64,
    /// Bytes in all. Of a lease that is torn down, those that can hold data; of a retired one, which is asked about when the work gets
    /// there, all of them, as [`Ticket::progress`](crate::Ticket::progress) says.
    pub bytes_total: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_what_it_names_and_is_used_once() {
        assert_eq!(LeaseId(7).to_string(), "lease 7");
        assert!(LeaseId::next() < LeaseId::next());
    }
}
