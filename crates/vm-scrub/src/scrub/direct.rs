//! Scrubbing memory that vm-scrub did not allocate, on the calling thread.

use super::broken::joined;
use super::calibrate::Rate;
use super::engine::{Engine, variable};
use super::job::Job;
use super::pass::{HostPtr, Work};
use super::policy::{Policy, Verify};
use super::residency::Residency;
use super::sample;
use crate::arch::UnknownLoop;
use crate::sys::map::{self, Advice};
use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

/// The shortest range, in bytes, about which the kernel is asked: below, zeroing it costs less than the question.
const WORTH_ASKING: usize = 256 << 10;

/// What was done to a range that was scrubbed: the evidence.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[must_use = "this says how much was read back"]
#[non_exhaustive]
pub struct Scrubbed {
    /// Bytes that were set to zero.
    pub bytes: u64,
    /// Bytes that were never populated: they have no content, and were not touched.
    pub bytes_never_populated: u64,
    /// Bytes of `bytes` that were read back and found to be zero, as the policy's [`Verify`] wants.
    pub bytes_verified: u64,
    /// Bytes of `bytes` that were given back to the kernel because of [`Policy::retain`].
    pub bytes_returned: u64,
    /// The name of the zeroing loop.
    pub zero_loop: String,
    /// The name of the verification loop, if anything was read back.
    pub verify_loop: Option<String>,
    /// The rates between which the zeroing loop was chosen; empty if it was named. See [`scrub_raw`] for when they are measured.
    pub calibration: Vec<Rate>,
    /// The rates of reading between which the verification loop was chosen; empty if it was named, or nothing was read back.
    pub verify_calibration: Vec<Rate>,
    /// Decides which lines were read back, with [`Verify::Sampled`].
    pub sample_seed: Option<u64>,
    /// How long zeroing took.
    pub zeroing: Duration,
    /// How long reading back took.
    pub verifying: Duration,
}

/// Why a range could not be scrubbed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ScrubError {
    /// The pointer is null, or the range goes past the end of the address space. Nothing was written.
    InvalidRange {
        /// The address that was given.
        address: usize,
        /// The length that was given, in bytes.
        len: usize,
    },
    /// The environment variable `VM_SCRUB_LOOP` or `VM_SCRUB_VERIFY_LOOP` names no loop that runs here. Nothing was written.
    UnknownLoop(UnknownLoop),
    /// Memory in the range could not be accessed: broken hardware, or a mapping of a file that has become shorter. Everything else
    /// was set to zero and read back as the policy says, and nothing was given back to the kernel. Needs
    /// [`memory_errors`](crate::memory_errors), or [`Policy::probe`].
    MemoryError {
        /// What could not be accessed, in bytes from the start of the range: pages or huge pages as far as they lie in it,
        /// ascending, at least one. With [`memory_errors`](crate::memory_errors) they are inaccessible now.
        ranges: Vec<Range<usize>>,
    },
    /// Something else than zero was read back, also after a second attempt: another writer is at work, or the memory is
    /// broken. Treat the whole range as dirty.
    NotZero {
        /// Where the first byte that is not zero was found, in bytes from the start of the range.
        offset: usize,
        /// How many pieces of at most 256 KiB are concerned.
        pieces: usize,
    },
}

impl fmt::Display for ScrubError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScrubError::InvalidRange { address, len } => write!(
                f,
                "{len} bytes from address {address:#x} are not a range of memory: pass a pointer that is not null and a \
                 length that ends inside the address space"
            ),
            ScrubError::UnknownLoop(error) => write!(f, "{}: {error}", variable(error)),
            ScrubError::MemoryError { ranges } => write!(
                f,
                "memory error at offset {:#x} ({} bytes in all could not be accessed; the rest was scrubbed): use that memory no \
                 more",
                ranges.first().map_or(0, |range| range.start),
                ranges.iter().map(Range::len).sum::<usize>()
            ),
            ScrubError::NotZero { offset, pieces } => write!(
                f,
                "the byte at offset {offset:#x} is not zero after two attempts ({pieces} pieces concerned): another \
                 writer is at work or the memory is broken; treat the whole range as dirty"
            ),
        }
    }
}

// The message contains the cause, so it is not given as a source too.
impl std::error::Error for ScrubError {}

/// Sets every byte of `memory` to zero and reads it back as `policy` says, on the calling thread.
///
/// The compiler cannot remove the stores, even if `memory` is never used again, nor answer the read-back from what it
/// knows was stored.
///
/// # Errors
///
/// [`ScrubError::NotZero`] if something else was read back.
///
/// ```
/// use vm_scrub::{Policy, scrub};
///
/// let mut secret = *b"correct horse battery staple";
/// let done = scrub(&mut secret, &Policy::new())?;
/// assert_eq!(secret, [0; 28]);
/// assert_eq!(done.bytes_verified, 28);
/// # Ok::<(), vm_scrub::ScrubError>(())
/// ```
pub fn scrub(memory: &mut [u8], policy: &Policy) -> Result<Scrubbed, ScrubError> {
    // SAFETY: the exclusive reference makes the range valid, writable and ours; zero is a valid `u8`.
    unsafe { scrub_raw(memory.as_mut_ptr(), memory.len(), policy) }
}

/// Sets the `len` bytes from `address` to zero and reads them back as `policy` says, on the calling thread.
///
/// Any alignment and any length will do. For guest memory that another allocator made.
///
/// Where the range is private anonymous memory, pages that were never populated have no content and are skipped: a guest of
/// 1 GiB that touched 64 KiB costs 64 KiB. The kernel is asked which these are, from 256 KiB on; what it does not answer is
/// scrubbed. If a pager of the VMM's (`userfaultfd(2)`) supplies such pages later, that is not known here: unregister the range before.
///
/// The loops are the fastest of those that were measured on this host, never a guess. A process that has built a pool has measured
/// already ([`calibration`](crate::calibration)). One that has not does it in the first call that finds 64 MiB or more to
/// scrub, which takes up to 50 ms longer; calls with less to do, until then, choose between the rates of a single page, which takes
/// the first of them a third of a millisecond. To measure at another time call [`calibration`](crate::calibration); a policy
/// that names both loops measures nothing.
///
/// # Errors
///
/// [`ScrubError::InvalidRange`] and [`ScrubError::UnknownLoop`] before anything is written, [`ScrubError::NotZero`] if
/// something else was read back, [`ScrubError::MemoryError`] if a part could not be accessed.
///
/// # Safety
///
/// Every page of the range must be mapped readable and writable, and `address` be allowed to access all of it: inside one
/// allocation, where it comes from an allocator; mappings that lie one behind the other, of whatever kinds, may be scrubbed in one
/// call. Nothing (thread, guest, device, Rust reference) may access the range during the call. Zero must be a valid value for
/// whatever lives there.
pub unsafe fn scrub_raw(
    address: *mut u8,
    len: usize,
    policy: &Policy,
) -> Result<Scrubbed, ScrubError> {
    let wraps = address.addr().checked_add(len).is_none() || isize::try_from(len).is_err();
    if address.is_null() || wraps {
        return Err(ScrubError::InvalidRange {
            address: address.addr(),
            len,
        });
    }
    let engine = Engine::immediate(policy).map_err(ScrubError::UnknownLoop)?;
    let base = HostPtr(address);
    let residency = if len < WORTH_ASKING {
        Residency::all(0..len)
    } else {
        Residency::of_foreign_memory(base, len).unwrap_or_else(|error| {
            log::warn!("all of {len} bytes is scrubbed, residency unknown: {error}");
            Residency::all(0..len)
        })
    };
    let seed = sample::fresh_seed();
    // SAFETY: the ranges are disjoint parts of the caller's, which is mapped and nobody else's during the call.
    let job = unsafe {
        engine.job(
            base,
            &residency.populated,
            Work::ZeroAndRead,
            policy.verify,
            seed,
        )
    };
    let started = Instant::now();
    engine.run(&job, None);
    let (zeroed, verdict) = finish(&job, started.elapsed());
    let broken = verdict.broken();
    for range in joined(broken.iter().map(|broken| broken.replaced.clone())) {
        let at = base.0.with_addr(range.start);
        // SAFETY: nothing that could be accessed is there; the handler has put zeros in its place, which are nobody's.
        if let Err(error) = unsafe { map::make_inaccessible(at, range.len()) } {
            log::warn!("what stands for broken memory stays accessible: {error}");
        }
    }
    if let Some(first) = verdict.failures().first() {
        return Err(ScrubError::NotZero {
            offset: first.offset,
            pieces: verdict.failures().len(),
        });
    }
    if !broken.is_empty() {
        let within = |range: &Range<usize>| range.start..range.end.min(len);
        let ranges = joined(broken.iter().map(|broken| within(&broken.reported)));
        return Err(ScrubError::MemoryError { ranges });
    }
    // SAFETY: the range is the caller's, and every byte of what is given back was zeroed.
    let bytes_returned = unsafe { give_back(base, len, &residency, policy.retain) };
    let read_back = policy.verify != Verify::None;
    let choice = job.choice();
    Ok(Scrubbed {
        bytes: zeroed.bytes(),
        bytes_never_populated: residency.never_populated,
        bytes_verified: verdict.bytes(),
        bytes_returned,
        zero_loop: choice.zero_loop.name().to_owned(),
        verify_loop: read_back.then(|| choice.verify_loop.name().to_owned()),
        calibration: choice.zero_rates.clone(),
        verify_calibration: choice.verify_rates.clone(),
        sample_seed: matches!(policy.verify, Verify::Sampled { .. }).then_some(seed),
        zeroing: zeroed.time(),
        verifying: verdict.time(),
    })
}

/// Settles a job that this thread has just done alone.
fn finish(job: &Job, elapsed: Duration) -> (super::job::Zeroed, super::job::Verdict) {
    job.settle(elapsed)
        .expect("the calling thread has done every piece")
}

/// Gives populated pages beyond the first `retain` bytes back to the kernel, where the kernel can tell pages apart. Returns
/// how many bytes.
///
/// # Safety
/// The range must be the caller's, and what it contains of no value.
unsafe fn give_back(base: HostPtr, len: usize, residency: &Residency, retain: u64) -> u64 {
    let populated: u64 = residency
        .populated
        .iter()
        .map(|range| range.len() as u64)
        .sum();
    if populated <= retain {
        return 0;
    }
    let anonymous = match Residency::anonymous_parts(base, len) {
        Ok(parts) => parts,
        Err(error) => {
            log::warn!("nothing of {len} bytes is given back to the kernel: {error}");
            return 0;
        }
    };
    let mut returned = 0;
    // Pages are borders of addresses, and the offsets here are relative to an address of any alignment.
    let ahead = base.0.addr() % map::host_page_size();
    let populated: Vec<Range<usize>> = residency
        .populated
        .iter()
        .map(|range| range.start + ahead..range.end + ahead)
        .collect();
    for range in super::plan::beyond(&populated, retain) {
        let range = range.start - ahead..range.end - ahead;
        for part in super::plan::intersections(&range, &anonymous) {
            // SAFETY: a part of the caller's range, and private anonymous memory, which is zero when it is populated again.
            match unsafe { map::advise(base.at(part.start), part.len(), Advice::Discard) } {
                Ok(()) => returned += part.len() as u64,
                Err(error) => log::warn!(
                    "{} bytes are not given back to the kernel: {error}",
                    part.len()
                ),
            }
        }
    }
    returned
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::ZeroLoop;

    #[test]
    fn every_byte_is_zero_by_every_loop_at_sizes_around_a_piece() {
        // The long ones take an interpreter minutes.
        let lens = [0, 1, 63, 4097, (256 << 10) - 1, 256 << 10, (512 << 10) + 1];
        let lens = if cfg!(miri) { &lens[..4] } else { &lens };
        for zero_loop in ZeroLoop::available() {
            for &len in lens {
                // One byte more on each side, which must stay.
                let mut memory = vec![0xee_u8; len + 2];
                let policy = Policy::new().zero_loop(zero_loop);
                let done = scrub(&mut memory[1..=len], &policy).unwrap();
                assert!(
                    memory[1..=len].iter().all(|byte| *byte == 0),
                    "{zero_loop} {len}"
                );
                assert_eq!(
                    (memory[0], memory[len + 1]),
                    (0xee, 0xee),
                    "{zero_loop} {len}"
                );
                assert_eq!((done.bytes, done.bytes_verified), (len as u64, len as u64));
                assert_eq!(done.zero_loop, zero_loop.name());
            }
        }
    }

    #[test]
    fn without_verification_nothing_counts_as_verified() {
        let mut memory = vec![1_u8; 10_000];
        let done = scrub(&mut memory, &Policy::new().verify(Verify::None)).unwrap();
        assert_eq!(
            (done.bytes, done.bytes_verified, done.verify_loop),
            (10_000, 0, None)
        );
        assert!(memory.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn ranges_that_are_none_are_refused_before_anything_is_written() {
        let somewhere = std::ptr::without_provenance_mut::<u8>(4096);
        for (address, len) in [
            (std::ptr::null_mut(), 0),
            (std::ptr::null_mut(), 1),
            (somewhere, usize::MAX),
        ] {
            // SAFETY: the call refuses these ranges without touching them.
            let error = unsafe { scrub_raw(address, len, &Policy::new()) }.unwrap_err();
            assert_eq!(
                error,
                ScrubError::InvalidRange {
                    address: address.addr(),
                    len
                }
            );
            assert!(error.to_string().contains("not a range of memory"));
        }
    }
}
