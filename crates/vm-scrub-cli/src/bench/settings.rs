//! What was asked for, with the defaults filled in: what the benchmarks are told.

use super::args::BenchArgs;
use super::measure::Effort;
use anyhow::ensure;
use std::fs;
use std::thread::available_parallelism;
use vm_scrub::PageSize;

/// Every page size, smallest first.
const PAGE_SIZES: [PageSize; 3] = [PageSize::Base4K, PageSize::Transparent, PageSize::Huge2M];

/// How much memory, in bytes, is left for the rest of the host.
const HEADROOM: u64 = 256 << 20;

/// What the benchmarks are told.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    /// Memory of a guest, in bytes: a multiple of 2 MiB.
    pub(crate) memory: u64,
    /// Threads of whatever can use several: at least 1.
    pub(crate) threads: usize,
    /// How often to measure.
    pub(crate) effort: Effort,
    page_sizes: Vec<PageSize>,
}

impl Settings {
    pub(crate) fn new(args: &BenchArgs) -> Self {
        let processors = available_parallelism().map_or(1, usize::from);
        let mut page_sizes = args.page_size.clone();
        page_sizes.sort_by_key(|size| PAGE_SIZES.iter().position(|each| each == size));
        page_sizes.dedup();
        Self {
            memory: args.memory,
            threads: args.threads.map_or(processors, |threads| threads as usize),
            effort: Effort {
                runs: args.runs,
                min_time: args.min_time,
                max_time: args.max_time,
                warmup: args.warmup,
            },
            page_sizes,
        }
    }

    /// The page sizes that were asked for, or all.
    pub(crate) fn page_sizes(&self) -> Vec<PageSize> {
        self.page_sizes_or(&PAGE_SIZES)
    }

    /// The page sizes that were asked for, or these.
    pub(crate) fn page_sizes_or(&self, default: &[PageSize]) -> Vec<PageSize> {
        if self.page_sizes.is_empty() {
            default.to_vec()
        } else {
            self.page_sizes.clone()
        }
    }

    /// Whether somebody asked for this page size by name, so that not having it is an error.
    pub(crate) fn insists_on(&self, page_size: PageSize) -> bool {
        self.page_sizes.contains(&page_size)
    }

    /// Thread counts worth comparing: one, and as many as were asked for.
    pub(crate) fn one_and_all_threads(&self) -> Vec<usize> {
        let mut threads = vec![1, self.threads];
        threads.dedup();
        threads
    }
}

/// Refuses to begin what would make the host swap or kill somebody.
///
/// # Errors
///
/// If fewer than `bytes` and something to spare are available by the kernel's estimate.
pub(crate) fn ensure_available(bytes: u64) -> anyhow::Result<()> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let available = meminfo(&text, "MemAvailable").unwrap_or(u64::MAX);
    ensure!(
        available >= bytes.saturating_add(HEADROOM),
        "{} of memory are needed and {} are available: use a smaller --memory",
        crate::bench::units::size(bytes),
        crate::bench::units::size(available)
    );
    Ok(())
}

/// A line of `/proc/meminfo`, in bytes (proc_meminfo(5): what is called kB are units of 1024).
pub(crate) fn meminfo(text: &str, name: &str) -> Option<u64> {
    let rest = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    let kibibytes: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24599396 kB\nMemAvailable:   2 kB\nHugePages_Total:       4\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(2048));
        assert_eq!(meminfo(text, "Mem"), None);
        assert_eq!(meminfo(text, "HugePages_Total"), None);
    }

    #[test]
    fn more_than_any_host_has_is_refused() {
        let error = ensure_available(u64::MAX)
            .expect_err("too much")
            .to_string();
        assert!(error.contains("--memory"), "{error}");
    }
}
