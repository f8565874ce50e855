//! What an embedder decides about scrubbing.

use crate::arch::{VerifyLoop, ZeroLoop};

/// How much of the memory that was zeroed is read back, and from where.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Verify {
    /// Nothing is read back. The memory counts as clean because a zeroing loop ran over it; a scrubber that is broken, or
    /// a write that comes after it, is not noticed. Receipts say so.
    None,
    /// Random cache lines are read back: `per_mille` of 1,000, at least one in each 256 KiB. Catches pieces that were left
    /// out and loops that are broken everywhere; a single byte that was left behind is caught with that probability only.
    /// The receipt records the seed that decides which lines, and does not call the memory proven.
    Sampled {
        /// How many of 1,000 lines: 0 to 1000; more is the same as 1000.
        per_mille: u16,
    },
    /// Every byte is read back, through the same caches through which the next guest will read it. Catches zeroing that
    /// was skipped or went wrong, and writers that are still there. It does not catch memory that forgets zeros after it
    /// has left the cache.
    #[default]
    Full,
    /// Every byte is read back after its line was written to memory and dropped from all caches, so that it comes from
    /// memory. Catches what [`Verify::Full`] does, and zeros that do not reach memory. Several times slower. A memory chip
    /// that loses zeros later is not caught, and where a hypervisor lies underneath, 'memory' is what that one provides.
    Memory,
}

impl Verify {
    /// Whether every byte is read back, so that memory can be called proven.
    pub fn is_complete(self) -> bool {
        matches!(self, Verify::Full | Verify::Memory)
    }
}

/// How memory is scrubbed.
#[derive(Debug, Clone)]
#[must_use]
pub struct Policy {
    pub(crate) verify: Verify,
    pub(crate) zero_loop: Option<ZeroLoop>,
    pub(crate) verify_loop: Option<VerifyLoop>,
    pub(crate) retain: u64,
    pub(crate) probe: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            verify: Verify::default(),
            zero_loop: None,
            verify_loop: None,
            retain: u64::MAX,
            probe: false,
        }
    }
}

impl Policy {
    /// Everything is read back; the loops are those that are fastest on this host; all memory stays populated.
    pub fn new() -> Self {
        Self::default()
    }

    /// How much of it is read back.
    pub fn verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }

    /// Zeroes with this loop and no other. Without it, the loop that the environment variable `VM_SCRUB_LOOP` names, else the
    /// one that was measured to be the fastest: when a pool is built ([`calibration`](crate::calibration)), or without a pool
    /// as [`scrub_raw`](crate::scrub_raw) says. A name that is no loop here is an error.
    pub fn zero_loop(mut self, zero_loop: ZeroLoop) -> Self {
        self.zero_loop = Some(zero_loop);
        self
    }

    /// Reads back with this loop and no other. Without it, the loop that the environment variable `VM_SCRUB_VERIFY_LOOP` names,
    /// else the one that was measured to be the fastest where the zeroing loop leaves the zeros.
    pub fn verify_loop(mut self, verify_loop: VerifyLoop) -> Self {
        self.verify_loop = Some(verify_loop);
        self
    }

    /// How many bytes of each lease or range may stay populated when it has been scrubbed. What is beyond is zeroed, verified,
    /// and then given back to the kernel, so that an idle pool does not hold what one large guest once touched. All of it
    /// stays, if not said otherwise. Only memory whose pages can be told apart is given back: pools, and private anonymous
    /// mappings. Of a lease that is retired it goes 2 MiB at a time, within the limit of the throttle, and stops when it is told to.
    pub fn retain(mut self, bytes: u64) -> Self {
        self.retain = bytes;
        self
    }

    /// Asks the kernel about each piece of at most 256 KiB, before it is touched, whether it can be had (`MADV_POPULATE_WRITE`;
    /// page by page before Linux 5.14). What cannot, because it is known to be broken or because a mapped file has become
    /// shorter, is reported as with [`memory_errors`](crate::memory_errors), without a handler of signals. What breaks when it
    /// is touched is not found. Off by default.
    ///
    /// The kernel looks at every page for that. If they are huge it costs little; if they are of 4 KiB it can take longer than zeroing
    /// them.
    pub fn probe(mut self, probe: bool) -> Self {
        self.probe = probe;
        self
    }
}
