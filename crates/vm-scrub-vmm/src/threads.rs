//! A guest made of threads of this process, for hosts without `/dev/kvm`.
//!
//! It does to the memory what a KVM guest does, and finds what a KVM guest finds; only the ways a vCPU can be stopped
//! are missing. It accesses guest memory as device models do, through vm-memory's volatile accesses.

use std::num::NonZeroUsize;
use std::panic;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::error::Error;
use crate::guest::{Guest, NonzeroWord, Scan};
use crate::ranges::{WORD, check_ranges, split};
use crate::running::deadline;

/// Bytes per access, and between two looks at the clock.
const CHUNK: u64 = 64 << 10;

/// Threads that fill and search guest memory.
///
/// It holds a clone of the guest memory, as a device model does: drop it before the memory is torn down.
#[derive(Debug)]
pub struct ThreadGuest {
    memory: GuestMemoryMmap,
    threads: NonZeroUsize,
}

/// One thread's way through its share.
struct Pass<'a> {
    memory: &'a GuestMemoryMmap,
    share: &'a [(u64, u64)],
    deadline: Instant,
    limit: Duration,
    what: &'static str,
}

impl ThreadGuest {
    /// A guest with `memory` for its RAM and `threads` threads in place of vCPUs.
    ///
    /// # Errors
    ///
    /// [`Error::Vcpus`] for no threads at all.
    pub fn new(memory: GuestMemoryMmap, threads: usize) -> Result<Self, Error> {
        let threads = NonZeroUsize::new(threads).ok_or(Error::Vcpus {
            wanted: threads,
            max: usize::MAX,
        })?;
        Ok(Self { memory, threads })
    }

    /// Runs `work` on every share in parallel; results in the order of the ranges.
    fn run<T: Send>(
        &self,
        ranges: &[(u64, u64)],
        what: &'static str,
        limit: Duration,
        work: impl Fn(&Pass<'_>) -> Result<T, Error> + Sync,
    ) -> Result<Vec<T>, Error> {
        check_ranges(ranges)?;
        let deadline = deadline(limit);
        let shares = split(ranges, self.threads.get());
        thread::scope(|scope| {
            let mut threads = Vec::with_capacity(shares.len());
            for share in shares.iter().filter(|share| !share.is_empty()) {
                let pass = Pass {
                    memory: &self.memory,
                    share,
                    deadline,
                    limit,
                    what,
                };
                let work = &work;
                let thread = thread::Builder::new()
                    .name("thread-guest".into())
                    .spawn_scoped(scope, move || work(&pass))
                    .map_err(|source| Error::Thread {
                        doing: "start a guest thread",
                        source,
                    })?;
                threads.push(thread);
            }
            threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|panic| panic::resume_unwind(panic))
                })
                .collect()
        })
    }
}

impl Guest for ThreadGuest {
    fn fill(&self, ranges: &[(u64, u64)], pattern: u64, limit: Duration) -> Result<(), Error> {
        let words = pattern.to_le_bytes().repeat((CHUNK / WORD) as usize);
        self.run(ranges, "filling memory", limit, |pass| {
            pass.chunks(|gpa, bytes| {
                pass.memory
                    .write_slice(&words[..bytes], GuestAddress(gpa))
                    .map_err(|source| Error::GuestMemory {
                        doing: "write",
                        gpa,
                        source,
                    })
            })
        })
        .map(|_| ())
    }

    fn scan(&self, ranges: &[(u64, u64)], limit: Duration) -> Result<Scan, Error> {
        let zeros = vec![0; CHUNK as usize];
        let scans = self.run(ranges, "scanning memory", limit, |pass| {
            let mut found = Scan::default();
            pass.read(|gpa, chunk| {
                found.bytes_read += chunk.len() as u64;
                if chunk != &zeros[..chunk.len()] {
                    found = found.followed_by(nonzero_words(gpa, chunk));
                }
            })?;
            Ok(found)
        })?;
        Ok(scans.into_iter().fold(Scan::default(), Scan::followed_by))
    }

    fn count(&self, ranges: &[(u64, u64)], pattern: u64, limit: Duration) -> Result<u64, Error> {
        let pattern = pattern.to_le_bytes();
        let counts = self.run(ranges, "looking for a pattern", limit, |pass| {
            let mut words = 0;
            pass.read(|_, chunk| {
                words += chunk
                    .chunks_exact(WORD as usize)
                    .filter(|word| *word == pattern)
                    .count();
            })?;
            Ok(words as u64 * WORD)
        })?;
        Ok(counts.into_iter().sum())
    }
}

impl Pass<'_> {
    /// Hands out the share in pieces of at most [`CHUNK`] bytes, until the time is over.
    fn chunks(&self, mut visit: impl FnMut(u64, usize) -> Result<(), Error>) -> Result<(), Error> {
        for &(gpa, bytes) in self.share {
            for offset in (0..bytes).step_by(CHUNK as usize) {
                if Instant::now() >= self.deadline {
                    return Err(Error::TimedOut {
                        what: self.what,
                        limit: self.limit,
                    });
                }
                visit(gpa + offset, (bytes - offset).min(CHUNK) as usize)?;
            }
        }
        Ok(())
    }

    /// As [`Pass::chunks`], with the bytes read.
    fn read(&self, mut visit: impl FnMut(u64, &[u8])) -> Result<(), Error> {
        let mut buffer = vec![0; CHUNK as usize];
        self.chunks(|gpa, bytes| {
            let chunk = &mut buffer[..bytes];
            self.memory
                .read_slice(chunk, GuestAddress(gpa))
                .map_err(|source| Error::GuestMemory {
                    doing: "read",
                    gpa,
                    source,
                })?;
            visit(gpa, chunk);
            Ok(())
        })
    }
}

/// What is not zero in `chunk`, which was read at `gpa`. Its bytes are not counted as read.
fn nonzero_words(gpa: u64, chunk: &[u8]) -> Scan {
    let mut found = Scan::default();
    for (word, gpa) in chunk
        .as_chunks()
        .0
        .iter()
        .zip((gpa..).step_by(WORD as usize))
    {
        let value = u64::from_le_bytes(*word);
        if value != 0 {
            found.nonzero_bytes += word.iter().filter(|byte| **byte != 0).count() as u64;
            found
                .first_nonzero
                .get_or_insert(NonzeroWord { gpa, value });
        }
    }
    found
}
