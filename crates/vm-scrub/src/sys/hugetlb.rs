//! How many hugetlb pages the host has left.

/// Where the kernel counts the 2 MiB hugetlb pages of a NUMA node, or of the host.
pub(crate) fn directory_2m(node: Option<u32>) -> String {
    let of = match node {
        Some(node) => format!("devices/system/node/node{node}"),
        None => "kernel/mm".to_owned(),
    };
    format!("/sys/{of}/hugepages/hugepages-2048kB")
}

/// How many 2 MiB hugetlb pages of a NUMA node nobody has taken, or of the host nobody has taken or reserved (reservations
/// belong to no node). `None` where the kernel does not say.
pub(crate) fn free_2m_pages(node: Option<u32>) -> Option<u64> {
    let directory = directory_2m(node);
    let read = |name: &str| -> Option<u64> {
        let text = std::fs::read_to_string(format!("{directory}/{name}")).ok()?;
        text.trim().parse().ok()
    };
    let free = read("free_hugepages")?;
    match node {
        Some(_) => Some(free),
        None => Some(free.saturating_sub(read("resv_hugepages")?)),
    }
}
