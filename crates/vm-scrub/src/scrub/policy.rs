//! What an embedder decides about scrubbing.

use crate::arch::ZeroLoop;

/// How much of the memory that was zeroed is read back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Verify {
    /// Nothing is read back. The memory counts as clean because a zeroing loop ran over it; a scrubber that is broken, or
    /// a write that comes after it, is not noticed. Receipts say so.
    None,
    /// Every byte is read back, through the same caches through which the next guest will read it. Catches zeroing that
    /// was skipped or went wrong, and writers that are still there. It does not catch memory that forgets zeros after it
    /// has left the cache.
    #[default]
    Full,
}

/// How memory is scrubbed.
#[derive(Debug, Clone, Default)]
#[must_use]
pub struct Policy {
    pub(crate) verify: Verify,
    pub(crate) zero_loop: Option<ZeroLoop>,
}

impl Policy {
    /// Everything is read back; the zeroing loop is the one that suits this host.
    pub fn new() -> Self {
        Self::default()
    }

    /// How much of it is read back.
    pub fn verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }

    /// Zeroes with this loop and no other.
    pub fn zero_loop(mut self, zero_loop: ZeroLoop) -> Self {
        self.zero_loop = Some(zero_loop);
        self
    }
}
