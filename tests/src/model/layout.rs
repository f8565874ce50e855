//! What is to be answered to a layout, worked out in another way than the library does it.

use super::op::Region;
use crate::PAGE;
use vm_scrub::BLOCK_SIZE;
use vm_scrub::lease::LeaseError;

/// At most this many regions of a layout count.
const MOST_REGIONS: usize = 8;

/// The answer to a layout, before anybody asks whether there is memory for it.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The regions by ascending address, and how many blocks they take.
    Fine(Vec<(u64, u64)>, u64),
    /// There are no regions.
    NoRegions,
    /// The region at this address has no bytes.
    Empty(u64),
    /// The region at this address is not aligned.
    Unaligned(u64),
    /// The region at this address reaches the end of the address space.
    Wraps(u64),
    /// Two regions share an address.
    Overlap,
}

/// The regions in bytes.
pub(super) fn in_bytes(regions: &[Region]) -> Vec<(u64, u64)> {
    let mut end = 0_u64;
    let mut layout = Vec::new();
    for region in regions.iter().take(MOST_REGIONS) {
        let (address, bytes) = match *region {
            Region::After { gap, pages } => {
                let start = end.wrapping_add(u64::from(gap) * PAGE);
                (start, u64::from(pages % 2048) * PAGE)
            }
            Region::Blocks { gap, blocks } => {
                let start = end.wrapping_add(u64::from(gap) * BLOCK_SIZE);
                (start, u64::from(blocks % 4) * BLOCK_SIZE)
            }
            Region::At { address, bytes } => (address, bytes),
            Region::High { below, pages } => {
                let start = 0_u64.wrapping_sub(u64::from(below) * PAGE);
                (start, u64::from(pages) * PAGE)
            }
        };
        layout.push((address, bytes));
        end = address.wrapping_add(bytes);
    }
    layout
}

/// What the library has to say about this layout. Of several things that are wrong, the first of the first region that has one
/// counts, and overlaps last.
pub(super) fn answer(layout: &[(u64, u64)], granularity: u64) -> Answer {
    if layout.is_empty() {
        return Answer::NoRegions;
    }
    for &(address, bytes) in layout {
        if bytes == 0 {
            return Answer::Empty(address);
        }
        if address % granularity != 0 || bytes % granularity != 0 {
            return Answer::Unaligned(address);
        }
        if u128::from(address) + u128::from(bytes) > u128::from(u64::MAX) {
            return Answer::Wraps(address);
        }
    }
    for (number, &(one, bytes)) in layout.iter().enumerate() {
        for &(other, others) in &layout[number + 1..] {
            let end =
                u128::from(one.min(other)) + u128::from(if one <= other { bytes } else { others });
            if end > u128::from(one.max(other)) {
                return Answer::Overlap;
            }
        }
    }
    let mut sorted = layout.to_vec();
    sorted.sort_unstable();
    let blocks = sorted
        .iter()
        .map(|(_, bytes)| bytes.div_ceil(BLOCK_SIZE))
        .sum();
    Answer::Fine(sorted, blocks)
}

/// Whether the library has answered so.
pub(super) fn is_answer(answer: &Answer, error: &LeaseError) -> bool {
    match (answer, error) {
        (Answer::NoRegions, LeaseError::NoRegions)
        | (Answer::Overlap, LeaseError::Overlap { .. }) => true,
        (Answer::Empty(address), LeaseError::EmptyRegion { guest_address })
        | (Answer::Unaligned(address), LeaseError::Unaligned { guest_address, .. })
        | (Answer::Wraps(address), LeaseError::Wraps { guest_address, .. }) => {
            address == guest_address
        }
        _ => false,
    }
}

/// Holds [`vm_scrub::test_support::check_regions`] to what is expected: for layouts that no pool is needed for.
pub(crate) fn check(regions: &[Region], granularity: u64) {
    let layout = in_bytes(regions);
    let expected = answer(&layout, granularity);
    match vm_scrub::test_support::check_regions(&crate::regions(&layout), granularity) {
        Ok(found) => {
            let found: Vec<_> = found
                .iter()
                .map(|region| (region.guest_address, region.bytes))
                .collect();
            assert!(
                matches!(&expected, Answer::Fine(sorted, _) if *sorted == found),
                "{expected:?} {found:?}"
            );
        }
        Err(error) => assert!(is_answer(&expected, &error), "{expected:?} {error}"),
    }
}
