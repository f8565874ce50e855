//! What a guest's memory may look like: a pure check of what was asked for.

use super::LeaseError;
use vm_memory::GuestAddress;

/// A range of guest physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct GuestRegion {
    /// Where it begins in guest physical memory, in bytes.
    pub guest_address: u64,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Checks what was asked for, and sorts it by guest address.
pub(crate) fn check(
    regions: &[(GuestAddress, u64)],
    granularity: u64,
) -> Result<Vec<GuestRegion>, LeaseError> {
    if regions.is_empty() {
        return Err(LeaseError::NoRegions);
    }
    let mut checked = Vec::with_capacity(regions.len());
    for &(GuestAddress(guest_address), bytes) in regions {
        if bytes == 0 {
            return Err(LeaseError::EmptyRegion { guest_address });
        }
        if !guest_address.is_multiple_of(granularity) || !bytes.is_multiple_of(granularity) {
            return Err(LeaseError::Unaligned {
                guest_address,
                bytes,
                granularity,
            });
        }
        if guest_address.checked_add(bytes).is_none() {
            return Err(LeaseError::Wraps {
                guest_address,
                bytes,
            });
        }
        checked.push(GuestRegion {
            guest_address,
            bytes,
        });
    }
    checked.sort_by_key(|region| region.guest_address);
    for pair in checked.windows(2) {
        // No overflow: each end was computed above.
        if pair[0].guest_address + pair[0].bytes > pair[1].guest_address {
            return Err(LeaseError::Overlap {
                first: pair[0],
                second: pair[1],
            });
        }
    }
    Ok(checked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: u64 = 4096;

    fn asked(regions: &[(u64, u64)]) -> Vec<(GuestAddress, u64)> {
        regions
            .iter()
            .map(|&(base, bytes)| (GuestAddress(base), bytes))
            .collect()
    }

    #[test]
    fn each_kind_of_bad_input_has_its_own_answer() {
        let last_page = u64::MAX - PAGE + 1;
        let check =
            |regions: &[(u64, u64)], granularity| check(&asked(regions), granularity).unwrap_err();
        assert!(matches!(check(&[], PAGE), LeaseError::NoRegions));
        assert!(matches!(
            check(&[(0, PAGE), (PAGE, 0)], PAGE),
            LeaseError::EmptyRegion {
                guest_address: PAGE
            }
        ));
        assert!(matches!(
            check(&[(1, PAGE)], PAGE),
            LeaseError::Unaligned {
                guest_address: 1,
                ..
            }
        ));
        assert!(matches!(
            check(&[(0, PAGE + 1)], PAGE),
            LeaseError::Unaligned { bytes: 4097, .. }
        ));
        assert!(matches!(
            check(&[(0, PAGE)], 2 << 20),
            LeaseError::Unaligned {
                granularity: 0x20_0000,
                ..
            }
        ));
        assert!(matches!(
            check(&[(last_page, PAGE)], PAGE),
            LeaseError::Wraps { .. }
        ));
        assert!(matches!(
            check(&[(last_page, 2 * PAGE)], PAGE),
            LeaseError::Wraps { .. }
        ));
        assert!(matches!(
            check(&[(PAGE, PAGE), (0, 2 * PAGE)], PAGE),
            LeaseError::Overlap { .. }
        ));
        assert!(matches!(
            check(&[(0, PAGE), (0, PAGE)], PAGE),
            LeaseError::Overlap { .. }
        ));
    }

    #[test]
    fn touching_regions_and_the_last_possible_page_are_fine() {
        let end = u64::MAX - 2 * PAGE + 1;
        let regions = check(&asked(&[(end, PAGE), (PAGE, PAGE), (0, PAGE)]), PAGE).unwrap();
        let starts: Vec<u64> = regions.iter().map(|region| region.guest_address).collect();
        assert_eq!(starts, vec![0, PAGE, end]);
    }

    proptest! {
        /// The model marks pages in a bitmap: a request is good when no page is marked twice.
        #[test]
        fn regions_are_accepted_exactly_when_no_page_is_in_two(
            regions in prop::collection::vec((0..48_u64, 1..12_u64), 1..6),
        ) {
            let mut marked = [0_u8; 64];
            for &(first, pages) in &regions {
                for page in first..first + pages {
                    marked[page as usize] += 1;
                }
            }
            let disjoint = marked.iter().all(|count| *count <= 1);
            let bytes: Vec<(u64, u64)> = regions.iter().map(|&(first, pages)| (first * PAGE, pages * PAGE)).collect();
            let result = check(&asked(&bytes), PAGE);
            prop_assert_eq!(result.is_ok(), disjoint);
            if let Ok(checked) = result {
                prop_assert!(checked.windows(2).all(|pair| pair[0].guest_address < pair[1].guest_address));
                prop_assert_eq!(checked.len(), regions.len());
            }
        }
    }
}
