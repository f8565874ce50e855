//! Threads that work on parts of the same memory, for everything that is compared with vm-scrub's own.

use anyhow::Context;
use rayon::prelude::*;
use std::fmt;
use std::sync::{Mutex, PoisonError};

/// A fixed number of threads.
pub(crate) struct Team {
    /// `None` for one thread: then the caller does the work, as vm-scrub's engine has it.
    pool: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Team {
    /// Starts `threads` threads, at least 1.
    pub(crate) fn new(threads: usize) -> anyhow::Result<Self> {
        let threads = threads.max(1);
        let pool = match threads {
            1 => None,
            _ => Some(
                rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .thread_name(|index| format!("bench-{index}"))
                    .build()
                    .with_context(|| format!("{threads} threads could not be started"))?,
            ),
        };
        Ok(Self { pool, threads })
    }

    /// Cuts `memory` into one part for each thread, at multiples of `unit` bytes, and has each work on its part.
    pub(crate) fn each<E: Send>(
        &self,
        memory: &mut [u8],
        unit: usize,
        work: impl Fn(&mut [u8]) -> Result<(), E> + Send + Sync,
    ) -> Result<(), E> {
        let part = memory
            .len()
            .div_ceil(self.threads)
            .next_multiple_of(unit.max(1))
            .max(1);
        let Some(pool) = &self.pool else {
            return memory.chunks_mut(part).try_for_each(work);
        };
        // Every thread has its own part, always the same one, and the caller the first, as in vm-scrub's engine. Were parts handed from
        // thread to thread, or the caller to wait for all of them, now and then one would do the work of two before the other has
        // woken up, and no part would stay in a cache.
        let parts: Vec<_> = memory
            .chunks_mut(part)
            .map(|part| Mutex::new(Some(part)))
            .collect();
        let failed = Mutex::new(None);
        let work_on = |number: usize| {
            let Some(part) = parts.get(number) else {
                return;
            };
            let part = part.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Err(error)) = part.map(&work) {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        };
        pool.in_place_scope(|scope| {
            scope.spawn_broadcast(|_, thread| {
                if thread.index() != 0 {
                    work_on(thread.index());
                }
            });
            work_on(0);
        });
        let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.map_or(Ok(()), Err)
    }

    /// Cuts `memory` into pieces of `chunk` bytes and has the threads work on them.
    pub(crate) fn chunks<E: Send>(
        &self,
        memory: &mut [u8],
        chunk: usize,
        work: impl Fn(&mut [u8]) -> Result<(), E> + Send + Sync,
    ) -> Result<(), E> {
        let chunk = chunk.max(1);
        match &self.pool {
            None => memory.chunks_mut(chunk).try_for_each(work),
            Some(pool) => pool.install(|| {
                memory
                    .par_chunks_mut(chunk)
                    .with_max_len(1)
                    .try_for_each(work)
            }),
        }
    }
}

impl fmt::Debug for Team {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Team")
            .field("threads", &self.threads)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn every_byte_is_worked_on_once_in_as_many_parts_as_threads() {
        for (threads, len, unit, parts) in [
            (1, 100, 1, 1),
            (2, 100, 1, 2),
            (3, 100, 64, 2),
            (4, 4096, 4096, 1),
            (2, 0, 1, 0),
        ] {
            let team = Team::new(threads).expect("threads");
            let calls = AtomicUsize::new(0);
            let mut memory = vec![0_u8; len];
            team.each(&mut memory, unit, |part| {
                calls.fetch_add(1, Ordering::Relaxed);
                part.iter_mut().for_each(|byte| *byte += 1);
                Ok::<(), ()>(())
            })
            .expect("no part fails");
            assert!(memory.iter().all(|byte| *byte == 1));
            assert_eq!(calls.into_inner(), parts, "{threads} threads, {len} bytes");
        }
    }

    #[test]
    fn an_error_of_one_thread_is_the_result() {
        let team = Team::new(2).expect("threads");
        let result = team.chunks(&mut [0; 64], 1, |part| {
            if part[0] == 0 { Err("no") } else { Ok(()) }
        });
        assert_eq!(result, Err("no"));
        for bad in [0, 32] {
            let mut memory = [0; 64];
            memory[bad] = 1;
            let result = team.each(&mut memory, 1, |part| {
                if part[0] == 1 { Err("no") } else { Ok(()) }
            });
            assert_eq!(result, Err("no"));
        }
    }
}
