//! Guest-physical ranges: which ones a guest can work on, and how they are divided among vCPUs.
//!
//! Pure arithmetic, so that the odd cases (a hole below 4 GiB, more vCPUs than pages, the end of the address space) are
//! tested without a guest.

use crate::error::Error;
use crate::firmware::RESERVED;

/// The unit in which guests write and read: 8 bytes. Addresses and lengths are multiples of it.
pub const WORD: u64 = 8;

/// Guest-physical addresses from here on are not in the guest's page tables: 128 GiB.
pub const ADDRESS_LIMIT: u64 = 128 << 30;

/// Shares begin and end at multiples of this many bytes, counted from the beginning of the first range.
const SHARE_UNIT: u64 = 4096;

/// Says whether guests of this crate can work on `ranges`, given as (guest-physical address, length), both in bytes.
/// Call it before registering RAM.
///
/// # Errors
///
/// [`Error::Range`] for a range that is not aligned to [`WORD`], goes beyond [`ADDRESS_LIMIT`] or overlaps
/// [`RESERVED`].
pub fn check_ranges(ranges: &[(u64, u64)]) -> Result<(), Error> {
    for &(gpa, bytes) in ranges {
        let problem = match gpa.checked_add(bytes) {
            _ if gpa % WORD != 0 || bytes % WORD != 0 => {
                "address and length must be multiples of 8 bytes"
            }
            None => "it wraps around the end of the address space",
            Some(end) if end > ADDRESS_LIMIT => {
                "it ends above 128 GiB, the end of the guest's page tables"
            }
            Some(end) if bytes > 0 && gpa < RESERVED.end && end > RESERVED.start => {
                "it overlaps the firmware at 0xffc00000 to 0x100000000; leave a hole below 4 GiB"
            }
            Some(_) => continue,
        };
        return Err(Error::Range {
            gpa,
            bytes,
            problem,
        });
    }
    Ok(())
}

/// Divides `ranges` into `parts` consecutive shares of about the same size. Shares may be empty; no range in them is.
///
/// `ranges` must have passed [`check_ranges`].
pub(crate) fn split(ranges: &[(u64, u64)], parts: usize) -> Vec<Vec<(u64, u64)>> {
    let total = ranges
        .iter()
        .fold(0u64, |sum, range| sum.saturating_add(range.1));
    let parts = parts.max(1);
    let share = total.div_ceil(parts as u64).next_multiple_of(SHARE_UNIT);
    let mut rest = ranges.iter().copied().filter(|range| range.1 > 0);
    let mut current = rest.next();
    let mut shares = Vec::with_capacity(parts);
    for _ in 0..parts {
        let mut room = share;
        let mut taken = Vec::new();
        while let Some((gpa, bytes)) = current.filter(|_| room > 0) {
            let piece = bytes.min(room);
            taken.push((gpa, piece));
            room -= piece;
            current = if piece < bytes {
                Some((gpa + piece, bytes - piece))
            } else {
                rest.next()
            };
        }
        shares.push(taken);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(range: (u64, u64)) -> Option<&'static str> {
        match check_ranges(&[range]) {
            Err(Error::Range { problem, .. }) => Some(problem),
            Err(other) => panic!("{other}"),
            Ok(()) => None,
        }
    }

    #[test]
    fn ranges_a_guest_cannot_reach_are_refused() {
        assert_eq!(problem((0, 3 << 30)), None);
        assert_eq!(problem((0, RESERVED.start)), None);
        assert_eq!(problem((RESERVED.end, 64 << 30)), None);
        assert_eq!(problem((RESERVED.start, 0)), None);
        assert!(problem((4, 8)).is_some_and(|text| text.contains("multiples")));
        assert!(problem((8, 12)).is_some_and(|text| text.contains("multiples")));
        assert!(problem((0, RESERVED.start + 8)).is_some_and(|text| text.contains("firmware")));
        assert!(problem((RESERVED.end - 8, 16)).is_some_and(|text| text.contains("firmware")));
        assert!(problem((ADDRESS_LIMIT - 8, 16)).is_some_and(|text| text.contains("128 GiB")));
        assert!(problem((u64::MAX - 7, 8)).is_some_and(|text| text.contains("wraps")));
    }

    #[test]
    fn shares_cover_every_byte_once_and_in_order() {
        let holes = [
            (0x1000, 0x3008),
            (0x10_0000, 0),
            (1 << 32, 0x1_2340),
            (5 << 32, 8),
        ];
        for ranges in [&holes[..], &holes[..1], &holes[3..], &[(0, 64 << 20)]] {
            for parts in 1..9 {
                let shares = split(ranges, parts);
                assert_eq!(shares.len(), parts);
                let mut joined: Vec<(u64, u64)> = Vec::new();
                for (gpa, bytes) in shares.concat() {
                    assert!(bytes > 0 && bytes % WORD == 0);
                    match joined.last_mut() {
                        Some(last) if last.0 + last.1 == gpa => last.1 += bytes,
                        _ => joined.push((gpa, bytes)),
                    }
                }
                let expected: Vec<_> = ranges.iter().copied().filter(|range| range.1 > 0).collect();
                assert_eq!(joined, expected, "{parts} parts");
            }
        }
    }

    #[test]
    fn shares_are_even() {
        let shares = split(&[(0, 64 << 20)], 4);
        assert!(
            shares
                .iter()
                .all(|share| share.iter().map(|range| range.1).sum::<u64>() == 16 << 20)
        );
        assert_eq!(
            split(&[(0, 8192)], 3),
            [vec![(0, 4096)], vec![(4096, 4096)], vec![]]
        );
        assert_eq!(split(&[], 2), [vec![], vec![]]);
    }
}
