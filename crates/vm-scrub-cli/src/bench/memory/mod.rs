//! Memory to be measured: mapped, dirtied, and looked at afterwards.
//!
//! All contenders get their memory, their dirt and their examination from here, so that none has it easier. Everything works
//! on slices; the few raw system calls are in `map` and `advise`.

mod advise;
mod evidence;
mod huge;
mod map;

pub(crate) use advise::{discard, populate};
pub(crate) use evidence::{ensure_resident, ensure_zero};
pub(crate) use huge::small_pages;
pub(crate) use map::Mapping;

use super::settings::ensure_available;
use super::team::Team;
use std::convert::Infallible;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize};
use vm_scrub_vmm::HugePages;

/// What a guest leaves behind: a byte that no loop takes for zero.
pub(crate) const DIRT: u8 = 0xa5;

/// Huge pages and smaller ones begin at multiples of this, in bytes.
pub(crate) const HUGE: usize = BLOCK_SIZE as usize;

/// Overwrites every byte of `memory`, as a guest would that used all of it.
pub(crate) fn dirty(team: &Team, memory: &mut [u8]) {
    let Ok(()) = team.each(memory, HUGE, |part| {
        part.fill(DIRT);
        Ok::<(), Infallible>(())
    });
}

/// The page that one touch makes the kernel supply, in bytes.
pub(crate) fn touch_unit(page_size: PageSize) -> usize {
    match page_size {
        PageSize::Transparent | PageSize::Huge2M => HUGE,
        _ => 4096,
    }
}

/// Sees to it that the host has `bytes` of memory in such pages. What is returned is to be held as long as they are needed.
///
/// # Errors
///
/// If it has not; for hugetlb pages, if they cannot be reserved.
pub(crate) fn reserve(page_size: PageSize, bytes: u64) -> anyhow::Result<Option<HugePages>> {
    match page_size {
        PageSize::Huge2M => Ok(Some(HugePages::ensure(bytes.div_ceil(BLOCK_SIZE))?)),
        _ => ensure_available(bytes).map(|()| None),
    }
}

/// A lease's memory as slices, by ascending guest address.
///
/// # Safety
///
/// Nobody else may use the lease's memory while the slices are there: no guest, no vm-memory handle.
pub(crate) unsafe fn of_lease(lease: &mut Lease) -> Vec<&mut [u8]> {
    lease
        .host_addresses()
        .into_iter()
        .map(|(region, start)| {
            // SAFETY: the window is mapped readable and writable over the region's length until teardown, which takes the
            // lease by value and so ends this borrow; the kernel initialises pages; the caller promises that nobody else is
            // there, and regions have windows of their own.
            unsafe { std::slice::from_raw_parts_mut(start, region.bytes as usize) }
        })
        .collect()
}
