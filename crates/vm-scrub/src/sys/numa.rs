//! NUMA nodes: which ones there are, which processors they have, and keeping memory on one.
//!
//! Nothing here is called unless a pool is asked to live on a node, and then only while that pool is built or memory
//! is leased from it that is to be shared with other processes.

use super::{Call, Error, Result, fault};
use std::collections::BTreeSet;
use std::fs;
use std::io;

/// Numbers of nodes or of processors.
pub(crate) type Numbers = BTreeSet<u32>;

/// The largest number that is believed. Kernels are built for at most 8192 processors and 1024 nodes.
const LARGEST: u32 = 65_535;

// linux/mempolicy.h.
const MPOL_MF_STRICT: libc::c_ulong = 1;
const MPOL_MF_MOVE: libc::c_ulong = 2;

/// The numbers in the kernel's list format: ranges with commas between them, as in `0-3,8,10-11`.
pub(crate) fn parse_list(list: &str) -> Option<Numbers> {
    let mut numbers = Numbers::new();
    let list = list.trim();
    if list.is_empty() {
        return Some(numbers);
    }
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<u32>().ok()?, last.parse::<u32>().ok()?);
        if first > last || last > LARGEST {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// Numbers as the bits of a mask, in the words that the kernel takes.
pub(super) fn mask<'a>(numbers: impl IntoIterator<Item = &'a u32>) -> Vec<libc::c_ulong> {
    let mut words = Vec::new();
    for number in numbers {
        let word = (number / libc::c_ulong::BITS) as usize;
        if word >= words.len() {
            words.resize(word + 1, 0);
        }
        words[word] |= 1 << (number % libc::c_ulong::BITS);
    }
    words
}

fn read(call: Call, path: &str) -> Result<String> {
    fault::check(call)?;
    fs::read_to_string(path).map_err(|source| Error { call, source })
}

fn parsed(call: Call, list: &str) -> Result<Numbers> {
    parse_list(list).ok_or_else(|| Error {
        call,
        source: io::Error::new(io::ErrorKind::InvalidData, "not a list of numbers"),
    })
}

fn read_node_list(file: &str) -> Result<Numbers> {
    let path = format!("/sys/devices/system/node/{file}");
    parsed(Call::NodeRead, &read(Call::NodeRead, &path)?)
}

/// `numbers` without those that this thread may not use, by the line `field` of its status.
pub(super) fn allowed(numbers: Numbers, field: &str) -> Result<Numbers> {
    let status = read(Call::StatusRead, "/proc/thread-self/status")?;
    let list = status
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    match list {
        Some(list) => Ok(&numbers & &parsed(Call::StatusRead, list)?),
        // A kernel without cpusets restricts nobody.
        None => Ok(numbers),
    }
}

/// The nodes whose memory this process may use.
///
/// Fails on kernels without `CONFIG_NUMA`.
pub(crate) fn nodes() -> Result<Numbers> {
    allowed(read_node_list("has_memory")?, "Mems_allowed_list")
}

/// The processors of `node` on which the calling thread may run. A node of memory alone has none.
pub(crate) fn cpus(node: u32) -> Result<Numbers> {
    allowed(
        read_node_list(&format!("node{node}/cpulist"))?,
        "Cpus_allowed_list",
    )
}

/// Binds `[address, address + len)` to `node`, with what is populated of it already: in a process that locks its memory
/// that is everything.
///
/// The node keeps its number where a change of the process's cpuset would give it another's (`MPOL_F_STATIC_NODES`).
///
/// # Safety
/// The range must be mapped and belong to the caller.
pub(crate) unsafe fn bind(address: *mut u8, len: usize, node: u32) -> Result<()> {
    fault::check(Call::Mbind)?;
    let nodes = mask([&node]);
    // The kernel looks at one bit less than it is told.
    let bits = nodes.len() * libc::c_ulong::BITS as usize + 1;
    let mode = libc::MPOL_BIND | libc::MPOL_F_STATIC_NODES;
    // SAFETY: the caller owns the range, and where its pages are changes nothing of what they contain; `nodes` is live and
    // has the bits that the kernel looks at.
    let status = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            address,
            len as libc::c_ulong,
            mode as libc::c_ulong,
            nodes.as_ptr(),
            bits as libc::c_ulong,
            MPOL_MF_STRICT | MPOL_MF_MOVE,
        )
    };
    if status != 0 {
        return Err(Error::last(Call::Mbind));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn numbers<const N: usize>(numbers: [u32; N]) -> Option<Numbers> {
        Some(Numbers::from(numbers))
    }

    #[test]
    fn lists_as_kernels_write_them() {
        assert_eq!(parse_list("0\n"), numbers([0]));
        assert_eq!(
            parse_list("\t0-3,8,10-11\n"),
            numbers([0, 1, 2, 3, 8, 10, 11])
        );
        // A node of memory alone.
        assert_eq!(parse_list("\n"), numbers([]));
        assert_eq!(parse_list("65535"), numbers([65_535]));
        for wrong in [
            "a",
            "1-",
            "-1",
            "3-1",
            "1,,2",
            ",",
            "0-65536",
            "0-4294967295",
            "1-2-3",
            "99999999999",
        ] {
            assert_eq!(parse_list(wrong), None, "{wrong}");
        }
    }

    /// The list format, written the other way round.
    fn list(numbers: &Numbers) -> String {
        let mut ranges: Vec<(u32, u32)> = Vec::new();
        for &number in numbers {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == number => *last = number,
                _ => ranges.push((number, number)),
            }
        }
        let ranges: Vec<String> = ranges
            .into_iter()
            .map(|(first, last)| match last - first {
                0 => first.to_string(),
                _ => format!("{first}-{last}"),
            })
            .collect();
        ranges.join(",")
    }

    proptest! {
        #[test]
        fn a_list_comes_back_as_its_numbers(numbers in prop::collection::btree_set(0_u32..200, 0..60)) {
            prop_assert_eq!(parse_list(&list(&numbers)), Some(numbers.clone()));
            prop_assert_eq!(parse_list(&format!(" {}\n", list(&numbers))), Some(numbers));
        }

        #[test]
        fn no_text_is_more_than_numbers_up_to_the_largest(text in "[-,0-9 a]{0,24}") {
            if let Some(numbers) = parse_list(&text) {
                prop_assert!(numbers.iter().all(|number| *number <= LARGEST));
            }
        }

        #[test]
        fn a_mask_has_the_bit_of_each_number(numbers in prop::collection::btree_set(0_u32..1100, 0..60)) {
            let words = mask(&numbers);
            let bits = (0..words.len() as u32 * 64).filter(|bit| words[*bit as usize / 64] >> (bit % 64) & 1 == 1);
            prop_assert_eq!(bits.collect::<Numbers>(), numbers);
        }
    }
}
