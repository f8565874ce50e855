//! Why a pool could not be made, and what to do about it.

use super::builder::MAX_THREADS;
use crate::BLOCK_SIZE;
use crate::arch::UnknownLoop;
use crate::backing::RevokeBy;
use crate::scrub::{StartError, variable};
use crate::sys::{self, hugetlb};

/// Why a pool could not be made. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The capacity is zero, or not a multiple of the block size, or more than an address can hold.
    #[error(
        "a capacity of {capacity} bytes is not possible: it must be a multiple of {BLOCK_SIZE} bytes (2 MiB), at least \
         one block, and fit into the address space"
    )]
    Capacity {
        /// The capacity that was asked for, in bytes.
        capacity: u64,
    },
    /// The number of threads is zero or absurd.
    #[error(
        "{threads} scrubbing threads are not possible: use 1 to {MAX_THREADS}, or none to have one per processor"
    )]
    Threads {
        /// The number that was asked for.
        threads: usize,
    },
    /// The host's smallest page is not 4 KiB.
    #[error("this host's pages are {bytes} bytes; vm-scrub needs a kernel with 4096-byte pages")]
    HostPageSize {
        /// The size of the host's smallest page, in bytes.
        bytes: usize,
    },
    /// The host has not enough free hugetlb pages.
    #[error(
        "{asked} free hugetlb pages of 2 MiB are needed{}: reserve them with `sysctl vm.nr_hugepages=N` (N counts the \
         pages of all users), or at boot with `hugepages=N` on the kernel command line",
        match .free { Some(free) => format!(" and {free} are free"), None => String::new() }
    )]
    NoHugePages {
        /// How many pages the pool needs.
        asked: u64,
        /// How many are free, where the host says.
        free: Option<u64>,
    },
    /// The NUMA node has not enough free hugetlb pages, be there enough on others.
    #[error(
        "{asked} free hugetlb pages of 2 MiB are needed on NUMA node {node}{}: reserve them with `echo N > {}/nr_hugepages` \
         (N counts the pages of all users), or at boot with `hugepages={node}:N` on the kernel command line",
        match .free { Some(free) => format!(" and {free} are free"), None => String::new() },
        hugetlb::directory_2m(Some(*.node))
    )]
    NoHugePagesOnNode {
        /// The node that was asked for.
        node: u32,
        /// How many pages the pool needs.
        asked: u64,
        /// How many are free there, where the host says.
        free: Option<u64>,
    },
    /// The host has no NUMA node of this number, or it has no memory, or none that this process may use.
    #[error(
        "NUMA node {node} has no memory that this process may use; {}",
        match .nodes.as_slice() {
            [] => "nor has any other node: see `Mems_allowed_list` in /proc/self/status".to_owned(),
            nodes => format!("these have: {}", nodes.iter().map(u32::to_string).collect::<Vec<_>>().join(", ")),
        }
    )]
    NoSuchNode {
        /// The node that was asked for.
        node: u32,
        /// The nodes that could be asked for, in ascending order.
        nodes: Vec<u32>,
    },
    /// The memory could not be bound to the NUMA node.
    #[error(
        "the pool could not be bound to NUMA node {node} ({source}): this takes a kernel with CONFIG_NUMA, /sys and /proc, and \
         a seccomp filter that allows mbind(2) while the pool is built (that of many containers does so only with \
         CAP_SYS_NICE); or build the pool without a node"
    )]
    NumaBind {
        /// The node that was asked for.
        node: u32,
        /// The call that failed.
        r#source: sys::Error,
    },
    /// A child that the process forks could not be told from it, and would take the pool's addresses for its own.
    #[error(
        "forked children could not be told from this process ({source}): this takes a free page, and a kernel and a seccomp \
         filter with MADV_WIPEONFORK (Linux 4.14)"
    )]
    Fork {
        /// The call that failed.
        r#source: sys::Error,
    },
    /// The address space for the pool's memory could not be had.
    #[error(
        "{capacity} bytes of memory could not be mapped ({source}): ask for less, or raise the limit on address space \
         (`ulimit -v`), on writable memory (`ulimit -d`, or the `CommitLimit` of a host that does not overcommit) or on mappings \
         (`vm.max_map_count`)"
    )]
    Map {
        /// The pool's capacity, in bytes.
        capacity: u64,
        /// The call that failed.
        r#source: sys::Error,
    },
    /// The memory could not be locked.
    #[error(
        "{capacity} bytes could not be locked in memory ({source}): raise the limit on locked memory (`ulimit -l`, \
         `LimitMEMLOCK=` of systemd) to the capacities of all such pools and what else the process locks, or give it \
         CAP_IPC_LOCK; or build the pool without `lock_memory`, on a host without swap"
    )]
    Lock {
        /// The pool's capacity, in bytes.
        capacity: u64,
        /// The call that failed.
        r#source: sys::Error,
    },
    /// Transparent huge pages were asked for and the kernel has none.
    #[error("this kernel has no transparent huge pages ({source}): use 4 KiB or hugetlb pages")]
    NoTransparentHugePages {
        /// The call that failed.
        r#source: sys::Error,
    },
    /// The memory could not be populated.
    #[error(
        "{capacity} bytes could not be populated ({source}): the host or the control group has too little memory; ask \
         for less or do not populate up front"
    )]
    Populate {
        /// The pool's capacity, in bytes.
        capacity: u64,
        /// The call that failed.
        r#source: sys::Error,
    },
    /// Memory cannot be taken away from guests in the way that was asked for.
    #[error(
        "memory cannot be revoked by {by:?} here{}: use `RevokeBy::Automatic`, and look at what receipts say",
        match .source {
            Some(source) => format!(" ({source}); Move needs Linux 6.8 and userfaultfd(2)"),
            None => " (hugetlb memory is revoked in one way only)".to_owned(),
        }
    )]
    Revocation {
        /// What was asked for.
        by: RevokeBy,
        /// The call that failed, if one did.
        r#source: Option<sys::Error>,
    },
    /// The environment variable `VM_SCRUB_LOOP` or `VM_SCRUB_VERIFY_LOOP` names no loop that runs here.
    #[error("{variable}: {0}", variable = variable(.0))]
    UnknownLoop(UnknownLoop),
    /// The scrubbing threads could not be started.
    #[error(
        "{threads} scrubbing threads could not be started ({source}): ask for fewer or raise the limit on threads (`ulimit -u`) or \
         on memory, of which their stacks take 2 MiB each (`ulimit -d`, `ulimit -v`)"
    )]
    Workers {
        /// The number that was asked for.
        threads: usize,
        /// What the operating system said.
        r#source: StartError,
    },
}
