//! The host's processors: which this process may use, how large their caches are, and staying on one of them.

use anyhow::Context;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;

/// Where the kernel describes the caches of the first processor (Documentation/ABI/stable/sysfs-devices-system-cpu).
const CACHES: &str = "/sys/devices/system/cpu/cpu0/cache";

/// What to assume where the kernel does not say: the smallest caches of current servers, in bytes.
const L2: u64 = 1 << 20;
const LAST_SHARE: u64 = 2 << 20;

/// Sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Caches {
    pub(crate) l2: u64,
    /// The last-level cache divided by the processors that share it, but more than the second-level cache.
    pub(crate) last_share: u64,
}

/// The caches of the first processor.
pub(crate) fn caches() -> Caches {
    caches_in(Path::new(CACHES))
}

fn caches_in(directory: &Path) -> Caches {
    let mut l2 = None;
    let mut last = None;
    // Levels come in ascending order.
    for index in 0..8 {
        let read = |name: &str| {
            fs::read_to_string(directory.join(format!("index{index}/{name}")))
                .ok()
                .map(|text| text.trim().to_owned())
        };
        let (Some(level), Some(size)) = (
            read("level"),
            read("size").and_then(|size| kibibytes(&size)),
        ) else {
            continue;
        };
        if level == "2" {
            l2 = Some(size);
        } else if level != "1" {
            let sharing = read("shared_cpu_list").map_or(1, |list| processors(&list));
            last = Some(size / sharing.max(1));
        }
    }
    let l2 = l2.unwrap_or(L2);
    Caches {
        l2,
        last_share: last.unwrap_or(LAST_SHARE).max(2 * l2),
    }
}

/// `1024K`, in bytes.
fn kibibytes(text: &str) -> Option<u64> {
    text.strip_suffix('K')?
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

/// How many processors `0-3,8` are.
fn processors(list: &str) -> u64 {
    list.split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
            last.checked_sub(first)?.checked_add(1)
        })
        .sum()
}

/// Two processors that this thread may use, as far apart as numbers say; `None` if it has only one.
pub(crate) fn two() -> anyhow::Result<Option<(usize, usize)>> {
    let allowed = allowed()?;
    let usable: Vec<usize> = (0..CpuSet::count())
        .filter(|processor| allowed.is_set(*processor).unwrap_or(false))
        .collect();
    Ok(match usable[..] {
        [first, .., last] => Some((first, last)),
        _ => None,
    })
}

fn allowed() -> anyhow::Result<CpuSet> {
    sched_getaffinity(Pid::from_raw(0)).context("sched_getaffinity")
}

/// Keeps the calling thread on one processor until it is dropped, by the same thread.
#[derive(Debug)]
pub(crate) struct Pinned {
    before: CpuSet,
    // Raw pointers are not `Send`: another thread would set its own affinity.
    _same_thread: std::marker::PhantomData<*const ()>,
}

impl Pinned {
    pub(crate) fn to(processor: usize) -> anyhow::Result<Self> {
        let before = allowed()?;
        let mut only = CpuSet::new();
        only.set(processor)?;
        sched_setaffinity(Pid::from_raw(0), &only)
            .with_context(|| format!("cannot stay on processor {processor}"))?;
        Ok(Self {
            before,
            _same_thread: std::marker::PhantomData,
        })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(Pid::from_raw(0), &self.before) {
            log::warn!("a thread stays on its processor: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_understood() {
        assert_eq!(kibibytes("1024K"), Some(1 << 20));
        assert_eq!(kibibytes("1024"), None);
        assert_eq!(
            (processors("0"), processors("0-3,8"), processors("")),
            (1, 5, 0)
        );
        let unknown = caches_in(Path::new("/nowhere"));
        assert_eq!((unknown.l2, unknown.last_share), (L2, LAST_SHARE));
    }

    #[test]
    fn pinned_until_dropped() {
        let before = allowed().expect("a thread has an affinity");
        let first = (0..CpuSet::count())
            .find(|processor| before.is_set(*processor) == Ok(true))
            .expect("this runs somewhere");
        let pinned = Pinned::to(first).expect("a processor that may be used");
        let only = allowed().expect("affinity");
        let count = (0..CpuSet::count())
            .filter(|each| only.is_set(*each) == Ok(true))
            .count();
        assert_eq!(count, 1);
        drop(pinned);
        assert_eq!(allowed().expect("affinity"), before);
    }
}
