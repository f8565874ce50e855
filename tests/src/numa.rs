//! NUMA: what the kernel says about where memory is and where threads may run, and nodes that this host does not have.

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs;
use std::ptr;

/// `/sys/devices/system/node`, where the kernel describes the nodes.
const NODES: &str = "/sys/devices/system/node";

/// The nodes with memory that this process may use; none where the kernel has no nodes.
fn nodes() -> BTreeSet<u32> {
    let Ok(list) = fs::read_to_string(format!("{NODES}/has_memory")) else {
        return BTreeSet::new();
    };
    match status_line("/proc/self/status", "Mems_allowed_list") {
        Some(allowed) => &numbers(&list) & &numbers(&allowed),
        None => numbers(&list),
    }
}

/// The last node with memory that this process may use, which on a host with several is not where most threads start; says
/// that the test is skipped where the kernel has no nodes.
pub fn node() -> Option<u32> {
    let last = nodes().pop_last();
    if last.is_none() {
        crate::skipped(&"this kernel knows no NUMA nodes");
    }
    last
}

/// How many hugetlb pages to reserve so that each node gets `pages` of them: the kernel deals them out evenly.
pub fn huge_pages_for(pages: u64) -> u64 {
    pages * nodes().len().max(1) as u64
}

/// How many hugetlb pages of 2 MiB nobody has taken on `node`.
pub fn free_huge_pages(node: u32) -> u64 {
    let file = format!("{NODES}/node{node}/hugepages/hugepages-2048kB/free_hugepages");
    let number = fs::read_to_string(file).ok();
    number
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(0)
}

/// Has the kernel take memory for `[start, start + len)` from `node` first, by `mbind(2)`: a mapping of its own, which nothing undoes.
///
/// # Safety
/// The range must be mapped, and the caller's.
pub unsafe fn prefer(node: u32, start: *mut u8, len: usize) {
    let mut nodes = [0_u64; 16];
    nodes[node as usize / 64] |= 1 << (node % 64);
    // SAFETY: the caller owns the range; the mask is live, and 1024 bits are as many as it has.
    let status = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start,
            len,
            libc::MPOL_PREFERRED,
            nodes.as_ptr(),
            1024 as libc::c_ulong,
            0,
        )
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}

/// The mode and the nodes of the memory policy at `address`, by `get_mempolicy(2)`.
pub fn policy(address: usize) -> (libc::c_int, BTreeSet<u32>) {
    /// `MPOL_F_ADDR` of `linux/mempolicy.h`.
    const BY_ADDRESS: libc::c_ulong = 2;
    let mut mode: libc::c_int = 0;
    let mut nodes = [0_u64; 16];
    // SAFETY: both results are live and writable, and 1024 bits are as many as they have; the address is only looked up.
    let status = unsafe {
        libc::syscall(
            libc::SYS_get_mempolicy,
            &raw mut mode,
            nodes.as_mut_ptr(),
            1024 as libc::c_ulong,
            address as libc::c_ulong,
            BY_ADDRESS,
        )
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    let is_set = |node: &u32| nodes[*node as usize / 64] >> (node % 64) & 1 == 1;
    (mode, (0..1024).filter(is_set).collect())
}

/// The node of each 4 KiB page in `[address, address + len)`, by `move_pages(2)`: `None` where there is no page.
pub fn nodes_of_pages(address: usize, len: usize) -> Vec<Option<u32>> {
    let pages: Vec<usize> = (address..address + len).step_by(4096).collect();
    let mut nodes: Vec<libc::c_int> = vec![0; pages.len()];
    // SAFETY: both arrays are live and as long as it says; without target nodes nothing is moved.
    let status = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0 as libc::c_ulong,
            pages.len() as libc::c_ulong,
            pages.as_ptr(),
            ptr::null::<libc::c_int>(),
            nodes.as_mut_ptr(),
            0 as libc::c_ulong,
        )
    };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    nodes.into_iter().map(|node| node.try_into().ok()).collect()
}

/// The policy, in words, of each mapping of this process whose line in `/proc/self/numa_maps` has `text` in it.
pub fn policies_of(text: &str) -> Vec<String> {
    let maps = fs::read_to_string("/proc/self/numa_maps").expect("the kernel has NUMA");
    let lines = maps.lines().filter(|line| line.contains(text));
    lines
        .filter_map(|line| line.split(' ').nth(1))
        .map(str::to_owned)
        .collect()
}

/// The processors on which the calling thread may run.
pub fn cpus() -> BTreeSet<u32> {
    let list = status_line("/proc/thread-self/status", "Cpus_allowed_list");
    numbers(&list.expect("each thread has processors"))
}

/// The processors on which each of this process's threads may run whose name begins with `name`.
pub fn cpus_of_threads(name: &str) -> Vec<BTreeSet<u32>> {
    let tasks = fs::read_dir("/proc/self/task").expect("a process has threads");
    let paths = tasks.map(|task| task.expect("a directory can be read").path());
    // A thread that ends meanwhile has no files any more.
    paths
        .filter(|path| {
            fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.starts_with(name))
        })
        .filter_map(|path| status_line(path.join("status").to_str()?, "Cpus_allowed_list"))
        .map(|list| numbers(&list))
        .collect()
}

/// Keeps the calling thread, and those that it starts from now on, on `cpus`.
pub fn run_on(cpus: &BTreeSet<u32>) {
    let mut mask = [0_u64; 16];
    for cpu in cpus {
        mask[*cpu as usize / 64] |= 1 << (cpu % 64);
    }
    // SAFETY: the mask is live and as long as it says.
    let status = unsafe { libc::sched_setaffinity(0, size_of_val(&mask), mask.as_ptr().cast()) };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
}

/// Shows the calling thread, and those that it starts from now on, other nodes than the host has: number and list of
/// processors of each. Says that the test is skipped where this process may not.
///
/// For tests that run [alone](crate::child::alone).
#[must_use = "without the nodes there is nothing to test"]
pub fn pretend(nodes: &[(u32, String)]) -> bool {
    if !cover(NODES) {
        let error = std::io::Error::last_os_error();
        crate::skipped(&format!("no mounts for this thread alone: {error}"));
        return false;
    }
    let write = |file: String, list: &str| {
        fs::write(format!("{NODES}/{file}"), format!("{list}\n")).expect("a file can be written");
    };
    let numbers: Vec<String> = nodes.iter().map(|(node, _)| node.to_string()).collect();
    write("has_memory".into(), &numbers.join(","));
    for (node, cpus) in nodes {
        fs::create_dir(format!("{NODES}/node{node}")).expect("a directory can be made");
        write(format!("node{node}/cpulist"), cpus);
    }
    true
}

/// Mounts an empty directory over `directory`, seen by this thread and its children alone.
fn cover(directory: &str) -> bool {
    let directory = CString::new(directory).expect("a path without NUL");
    let private = libc::MS_REC | libc::MS_PRIVATE;
    let (root, kind) = (c"/".as_ptr(), c"tmpfs".as_ptr());
    // SAFETY: all strings are live and end with NUL; what is not given is not looked at.
    unsafe {
        libc::unshare(libc::CLONE_NEWNS) == 0
            && libc::mount(ptr::null(), root, ptr::null(), private, ptr::null()) == 0
            && libc::mount(kind, directory.as_ptr(), kind, 0, ptr::null()) == 0
    }
}

fn status_line(path: &str, field: &str) -> Option<String> {
    let status = fs::read_to_string(path).ok()?;
    let mut lines = status.lines();
    lines.find_map(|line| Some(line.strip_prefix(field)?.strip_prefix(':')?.to_owned()))
}

fn numbers(list: &str) -> BTreeSet<u32> {
    let ranges = list.trim().split(',').filter(|range| !range.is_empty());
    ranges
        .flat_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            let number = |text: &str| text.parse::<u32>().expect("the kernel writes numbers");
            number(first)..=number(last)
        })
        .collect()
}
