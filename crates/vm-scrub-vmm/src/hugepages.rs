//! Borrows 2 MiB huge pages from the host for tests and demonstrations, and gives them back.
//!
//! The kernel keeps one number for the whole host, and several processes may want to change it at the same time. So
//! every change is a read, an addition or subtraction, and a write, under an advisory lock on the very file that holds
//! the number. Each borrower adds pages of its own, even if some are free: another one may be counting on those.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

use crate::error::Error;

/// Where the kernel keeps the numbers for huge pages of 2 MiB (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

const PAGE_BYTES: u64 = 2 << 20;
const TOTAL: &str = "nr_hugepages";
const FREE: &str = "free_hugepages";
const RESERVED: &str = "resv_hugepages";
const SURPLUS: &str = "surplus_hugepages";

/// Writing 1 here makes the kernel compact memory, so that more of it is free in pieces of 2 MiB.
const COMPACT: &str = "/proc/sys/vm/compact_memory";

/// How often to ask for pages that the kernel could not find at first, and how long to wait in between.
const ATTEMPTS: u32 = 5;
const PAUSE: Duration = Duration::from_millis(50);

/// Huge pages that were added to the host's pool. Dropping it takes as many out again.
///
/// A process that is ended by a signal leaves its pages in the pool, unless it handles that signal.
#[derive(Debug)]
pub struct HugePages {
    pool: PathBuf,
    added: u64,
}

impl HugePages {
    /// Adds `wanted` pages of 2 MiB to the host's pool, so that this many are free for the caller. Where the pool may
    /// not be changed (not root, read-only), it is enough if that many are free already.
    ///
    /// # Errors
    ///
    /// [`Error::HugePages`] if neither is possible; what could be added is taken out again.
    pub fn ensure(wanted: u64) -> Result<Self, Error> {
        Self::ensure_in(Path::new(POOL), wanted)
    }

    /// How many pages were added to the pool, and will be taken out: as many as were wanted, or more if pages were
    /// already on their way out; 0 if enough were free and the pool could not be changed.
    pub fn added(&self) -> u64 {
        self.added
    }

    fn ensure_in(pool: &Path, wanted: u64) -> Result<Self, Error> {
        let failed = |problem: String| Error::HugePages { wanted, problem };
        let _lock =
            lock(pool).map_err(|error| failed(format!("there is no such pool: {error}")))?;
        // Asked for more than there is, the kernel takes all it can get, and starves the host meanwhile.
        let memory = memory_available().map_err(|error| failed(error.to_string()))?;
        if wanted > memory / PAGE_BYTES {
            let problem = format!(
                "the host has only {} MiB of memory available, so ask for less",
                memory >> 20
            );
            return Err(failed(problem));
        }
        let before = persistent(pool).map_err(|error| failed(error.to_string()))?;
        match grow(pool, wanted) {
            Ok((target, total)) if total >= target => Ok(Self {
                pool: pool.into(),
                added: target.saturating_sub(before),
            }),
            Ok((target, total)) => {
                // These pages were not there before, so nobody else can have counted on them.
                let _ = write_number(pool, TOTAL, before);
                Err(failed(format!(
                    "the kernel found no memory for {} of them",
                    target - total
                )))
            }
            Err(error) => match available(pool) {
                Ok(free) if free >= wanted => Ok(Self {
                    pool: pool.into(),
                    added: 0,
                }),
                Ok(free) => Err(failed(format!(
                    "{free} are free, and more cannot be added: {error}"
                ))),
                Err(error) => Err(failed(error.to_string())),
            },
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.added == 0 {
            return;
        }
        let taken_out = lock(&self.pool).and_then(|_lock| {
            let now = persistent(&self.pool)?;
            write_number(&self.pool, TOTAL, now.saturating_sub(self.added))
        });
        if let Err(error) = taken_out {
            log::warn!("{} huge pages stay in the host's pool: {error}", self.added);
        }
    }
}

/// Asks for `wanted` more pages, a few times, and says how many the pool should have then, and how many it has.
///
/// The total goes up by `wanted`. The pages that stay in the pool may go up by more: the kernel takes in the surplus
/// first, which is in use and no good to the caller.
fn grow(pool: &Path, wanted: u64) -> io::Result<(u64, u64)> {
    let mut total = read_number(pool, TOTAL)?;
    let target = total.saturating_add(wanted);
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            // Only root may, and it is only a help.
            let _ = fs::write(COMPACT, "1");
            thread::sleep(PAUSE);
        }
        write_number(pool, TOTAL, target)?;
        total = read_number(pool, TOTAL)?;
        if total >= target {
            break;
        }
    }
    Ok((target, total))
}

/// Pages that stay in the pool. The kernel's total also has the surplus in it: pages that were taken out while in use,
/// and which leave when they are freed.
fn persistent(pool: &Path) -> io::Result<u64> {
    Ok(read_number(pool, TOTAL)?.saturating_sub(read_number(pool, SURPLUS)?))
}

/// Pages that are free and not promised to a mapping.
fn available(pool: &Path) -> io::Result<u64> {
    Ok(read_number(pool, FREE)?.saturating_sub(read_number(pool, RESERVED)?))
}

/// Memory that can be had without swapping, in bytes, as the kernel estimates it (proc_meminfo(5)).
///
/// # Errors
///
/// If the host does not say.
pub fn memory_available() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let kibibytes = text.lines().find_map(|line| {
        line.strip_prefix("MemAvailable:")?
            .strip_suffix("kB")?
            .trim()
            .parse()
            .ok()
    });
    kibibytes
        .and_then(|number: u64| number.checked_mul(1024))
        .ok_or_else(|| io::Error::other("/proc/meminfo has no MemAvailable"))
}

/// Locks the pool against others who use this module. Reading is enough for that.
fn lock(pool: &Path) -> io::Result<Flock<File>> {
    let file = File::open(pool.join(TOTAL))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
}

fn read_number(pool: &Path, name: &str) -> io::Result<u64> {
    let text = fs::read_to_string(pool.join(name))?;
    text.trim()
        .parse()
        .map_err(|error| io::Error::other(format!("{name} is `{text}`: {error}")))
}

fn write_number(pool: &Path, name: &str, number: u64) -> io::Result<()> {
    fs::write(pool.join(name), number.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like the kernel's, in which a written number is a fulfilled wish.
    fn pool(name: &str, numbers: [(&str, &str); 4]) -> PathBuf {
        let pool = std::env::temp_dir().join(format!("vm-scrub-{name}-{}", std::process::id()));
        fs::create_dir_all(&pool).expect("directory");
        for (file, number) in numbers {
            fs::write(pool.join(file), number).expect("number");
        }
        pool
    }

    #[test]
    fn added_pages_go_back_and_surplus_pages_are_not_kept() {
        let pool = pool(
            "add",
            [
                (TOTAL, "7\n"),
                (FREE, "7\n"),
                (RESERVED, "0\n"),
                (SURPLUS, "2\n"),
            ],
        );
        // The two surplus pages become part of the pool, and go with the first loan.
        let first = HugePages::ensure_in(&pool, 4).expect("added");
        assert_eq!(
            (first.added(), read_number(&pool, TOTAL).expect("total")),
            (6, 11)
        );
        fs::write(pool.join(SURPLUS), "0").expect("surplus");
        let second = HugePages::ensure_in(&pool, 3).expect("added");
        assert_eq!(
            (second.added(), read_number(&pool, TOTAL).expect("total")),
            (3, 14)
        );
        drop(first);
        assert_eq!(read_number(&pool, TOTAL).expect("total"), 8);
        drop(second);
        assert_eq!(read_number(&pool, TOTAL).expect("total"), 5);
        fs::remove_dir_all(pool).expect("removed");
    }

    #[test]
    fn without_a_pool_the_error_says_how_to_get_one() {
        let error = HugePages::ensure_in(Path::new("/nowhere"), 4).expect_err("no pool");
        let text = error.to_string();
        assert!(
            text.contains("4 huge pages") && text.contains("hugepages=N"),
            "{text}"
        );
    }

    #[test]
    fn more_than_the_host_has_is_not_even_asked_for() {
        let numbers = [(TOTAL, "1"), (FREE, "1"), (RESERVED, "0"), (SURPLUS, "0")];
        let pool = pool("huge", numbers);
        // 1 PiB. In a pool that only looks like the kernel's: the real one would try.
        let error = HugePages::ensure_in(&pool, 1 << 29).expect_err("too many");
        assert!(
            error.to_string().contains("MiB of memory available"),
            "{error}"
        );
        assert_eq!(read_number(&pool, TOTAL).expect("total"), 1);
        fs::remove_dir_all(pool).expect("removed");
    }

    #[test]
    fn free_pages_are_those_that_are_not_promised() {
        let pool = pool(
            "free",
            [(TOTAL, "9"), (FREE, "9"), (RESERVED, "4"), (SURPLUS, "0")],
        );
        assert_eq!(available(&pool).expect("free"), 5);
        fs::remove_dir_all(pool).expect("removed");
    }
}
