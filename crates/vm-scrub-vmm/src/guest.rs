//! What a guest of this crate can be asked to do with its memory, whoever does it: a KVM guest's own code
//! ([`crate::Machine`]) or threads of this process ([`crate::ThreadGuest`]).

use std::time::Duration;

use crate::error::Error;

/// A guest that fills and searches its memory.
///
/// `ranges` are (guest-physical address, length), both in bytes and multiples of [`crate::WORD`]; the work is divided
/// among vCPUs. `limit` is for the whole call. All methods fail with [`Error::Range`] for ranges no guest can work on
/// and with [`Error::TimedOut`].
pub trait Guest {
    /// Writes `pattern` to every 8-byte word of `ranges`.
    ///
    /// # Errors
    ///
    /// Besides those above, [`Error::GuestStopped`] when the guest lost its memory meanwhile.
    fn fill(&self, ranges: &[(u64, u64)], pattern: u64, limit: Duration) -> Result<(), Error>;

    /// Reads every byte of `ranges` and says what of it is not zero.
    ///
    /// # Errors
    ///
    /// As for [`Guest::fill`].
    fn scan(&self, ranges: &[(u64, u64)], limit: Duration) -> Result<Scan, Error>;

    /// Reads every byte of `ranges` and says how many bytes are in aligned 8-byte words equal to `pattern`: the
    /// leftovers of a guest that had filled the same memory with it.
    ///
    /// # Errors
    ///
    /// As for [`Guest::fill`].
    fn count(&self, ranges: &[(u64, u64)], pattern: u64, limit: Duration) -> Result<u64, Error>;
}

/// What a guest found in its memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Scan {
    /// Bytes that were read, as counted by whoever read them.
    pub bytes_read: u64,
    /// Bytes that were not zero.
    pub nonzero_bytes: u64,
    /// The first word, in the order of the ranges, with a byte that is not zero.
    pub first_nonzero: Option<NonzeroWord>,
}

/// A word of guest memory that is not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NonzeroWord {
    /// Guest-physical address of the word, a multiple of 8.
    pub gpa: u64,
    /// Its value, little-endian.
    pub value: u64,
}

impl Scan {
    /// Adds what was found in the ranges that come next.
    pub(crate) fn followed_by(self, next: Self) -> Self {
        Self {
            bytes_read: self.bytes_read + next.bytes_read,
            nonzero_bytes: self.nonzero_bytes + next.nonzero_bytes,
            first_nonzero: self.first_nonzero.or(next.first_nonzero),
        }
    }
}
