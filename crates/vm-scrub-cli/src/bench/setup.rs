//! What the figures were measured on. No figure means anything without it.

use super::settings::meminfo;
use super::{calibrated, cpus};
use jiff::Timestamp;
use serde::Serialize;
use std::fs;
use std::thread::available_parallelism;

/// The host and the program.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Setup {
    /// Version of vm-scrub.
    pub(crate) version: &'static str,
    /// Whether the compiler optimised: figures of a debug build mean nothing.
    pub(crate) optimised: bool,
    /// When this began, in UTC.
    pub(crate) date: String,
    pub(crate) cpu: String,
    pub(crate) architecture: &'static str,
    /// Whether a hypervisor is under this machine.
    pub(crate) virtualised: bool,
    /// Processors that this process may use.
    pub(crate) processors: usize,
    pub(crate) l2_bytes: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) numa_nodes: usize,
    pub(crate) kernel: String,
    /// `enabled` and `defrag` of transparent huge pages, and whether shared memory has them.
    pub(crate) thp: String,
    pub(crate) thp_defrag: String,
    pub(crate) thp_shmem: String,
    /// Hugetlb pages of 2 MiB that the host had before the benchmarks asked for theirs.
    pub(crate) hugetlb_2m_before: u64,
    /// Who sets the clock of the first processor.
    pub(crate) governor: String,
    /// How long the library measured its loops, in nanoseconds.
    pub(crate) calibration_ns: u64,
}

impl Setup {
    pub(crate) fn of_this_host() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let memory = read("/proc/meminfo");
        let thp = |name| {
            let text = read(&format!("/sys/kernel/mm/transparent_hugepage/{name}"));
            chosen(&text).unwrap_or("unknown").to_owned()
        };
        Self {
            version: env!("CARGO_PKG_VERSION"),
            optimised: !cfg!(debug_assertions),
            date: now(),
            cpu: cpu(&cpuinfo).unwrap_or_else(|| "unknown".into()),
            architecture: std::env::consts::ARCH,
            virtualised: value(&cpuinfo, "flags")
                .is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            processors: available_parallelism().map_or(1, usize::from),
            l2_bytes: cpus::caches().l2,
            memory_bytes: meminfo(&memory, "MemTotal").unwrap_or(0),
            numa_nodes: numa_nodes(),
            kernel: read("/proc/sys/kernel/osrelease"),
            thp: thp("enabled"),
            thp_defrag: thp("defrag"),
            thp_shmem: thp("shmem_enabled"),
            hugetlb_2m_before: read("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
                .parse()
                .unwrap_or(0),
            governor: match read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") {
                none if none.is_empty() => "none".into(),
                governor => governor,
            },
            calibration_ns: u64::try_from(calibrated::took().as_nanos()).unwrap_or(u64::MAX),
        }
    }

    /// For people: what, and what it is.
    pub(crate) fn facts(&self) -> Vec<(&'static str, String)> {
        let mut facts = vec![
            ("processor", format!("{} ({})", self.cpu, self.architecture)),
            (
                "processors",
                format!(
                    "{}{}, {} of second-level cache each",
                    self.processors,
                    if self.virtualised {
                        " in a virtual machine"
                    } else {
                        ""
                    },
                    crate::bench::units::size(self.l2_bytes)
                ),
            ),
            (
                "memory",
                format!(
                    "{}, {} NUMA node{}",
                    crate::bench::units::size(self.memory_bytes),
                    self.numa_nodes,
                    if self.numa_nodes == 1 { "" } else { "s" }
                ),
            ),
            ("kernel", format!("Linux {}", self.kernel)),
            (
                "transparent huge pages",
                format!(
                    "{}, defrag {}, shmem {}",
                    self.thp, self.thp_defrag, self.thp_shmem
                ),
            ),
            ("governor", self.governor.clone()),
            (
                "calibration",
                format!("{:.1} ms", self.calibration_ns as f64 / 1e6),
            ),
            ("vm-scrub", format!("{}, {}", self.version, self.date)),
        ];
        if !self.optimised {
            facts.push(("build", "not optimised: these figures mean nothing".into()));
        }
        facts
    }
}

/// The current second, as `2025-11-23T20:19:00Z`.
fn now() -> String {
    let now = Timestamp::now();
    Timestamp::from_second(now.as_second())
        .unwrap_or(now)
        .to_string()
}

/// The trimmed content of a file; empty where there is none.
fn read(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// The first value of a name in `/proc/cpuinfo`.
fn value<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    cpuinfo.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}

/// The processor's name; family and model with it, because hypervisors shorten the name.
fn cpu(cpuinfo: &str) -> Option<String> {
    let Some(name) = value(cpuinfo, "model name") else {
        // AArch64 has numbers only.
        let (implementer, part) = (
            value(cpuinfo, "CPU implementer")?,
            value(cpuinfo, "CPU part")?,
        );
        return Some(format!("implementer {implementer}, part {part}"));
    };
    match (value(cpuinfo, "cpu family"), value(cpuinfo, "model")) {
        (Some(family), Some(model)) => Some(format!("{name}, family {family}, model {model}")),
        _ => Some(name.to_owned()),
    }
}

/// The word in brackets: `always [madvise] never`.
fn chosen(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    rest.split_once(']').map(|(word, _)| word)
}

fn numa_nodes() -> usize {
    let nodes = fs::read_dir("/sys/devices/system/node")
        .into_iter()
        .flatten()
        .flatten();
    let is_node = |name: &str| {
        name.strip_prefix("node")
            .is_some_and(|rest| rest.parse::<u32>().is_ok())
    };
    nodes
        .filter(|entry| entry.file_name().to_str().is_some_and(is_node))
        .count()
        .max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes_is_understood() {
        let amd = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nflags\t\t: fpu hypervisor\n";
        assert_eq!(cpu(amd).as_deref(), Some("AMD EPYC, family 25, model 17"));
        let arm = "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n";
        assert_eq!(cpu(arm).as_deref(), Some("implementer 0x41, part 0xd4f"));
        assert_eq!(cpu(""), None);
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen(""), None);
    }

    #[test]
    fn this_host_has_a_setup() {
        let setup = Setup::of_this_host();
        assert!(setup.memory_bytes > 0 && !setup.kernel.is_empty() && setup.processors > 0);
        assert!(
            setup.date.ends_with('Z') && setup.date.len() == 20,
            "{}",
            setup.date
        );
        assert!(setup.facts().iter().all(|(_, fact)| !fact.is_empty()));
    }
}
