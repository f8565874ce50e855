//! Every zeroing and verification loop, at any length and alignment, against plain ones, between two pages that nobody may
//! touch.

use super::{between, whether};
use crate::fuzz::scrub::Guarded;
use arbitrary::Unstructured;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};

/// Longer than the largest chunk that is zeroed before it is read back, by some pages.
const MOST: usize = (256 << 10) + 3 * 4096;

/// What is around the range, and in it before it is zeroed.
const DIRT: u8 = 0xd1;

/// Takes a range that ends or begins at a guard page or anywhere, and has each loop zero and read it.
pub fn run(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let input = &mut input;
    let len = if whether(input) {
        between(input, 0, MOST)
    } else {
        between(input, 0, 1024)
    };
    let mut memory = Guarded::new(len + between(input, 0, 200));
    let room = memory.bytes().len() - len;
    let start = match between(input, 0, 2) {
        0 => 0,
        1 => room,
        _ => between(input, 0, room),
    };
    let count = ZeroLoop::available().count() - 1;
    let zero = ZeroLoop::available().nth(between(input, 0, count));
    let count = VerifyLoop::available().count() - 1;
    let verify = VerifyLoop::available().nth(between(input, 0, count));
    let (zero, verify) = (
        zero.expect("below the count"),
        verify.expect("below the count"),
    );
    let fused = whether(input);
    // Up to three bytes that are not zero, for the verification to find.
    let flips: Vec<(usize, u8)> = (0..between(input, 0, 3))
        .filter(|_| len > 0)
        .map(|_| (between(input, 0, len.max(1) - 1), 1 << between(input, 0, 7)))
        .collect();

    let all = memory.bytes();
    all.fill(DIRT);
    let at = all[start..].as_mut_ptr();
    // SAFETY: the `len` bytes from `at` are this function's own, mapped and initialised.
    let found = unsafe {
        if fused {
            zero.zero_and_verify(verify, at, len)
        } else {
            zero.zero(at, len);
            None
        }
    };
    assert_eq!(
        found, None,
        "{zero} {verify}: zeros are not found to be zero"
    );
    let all = memory.bytes();
    let wrong = |range: std::ops::Range<usize>, byte: u8| {
        all[range].iter().position(|found| *found != byte)
    };
    assert_eq!(
        wrong(0..start, DIRT),
        None,
        "{zero} writes before {len} bytes at {start}"
    );
    assert_eq!(
        wrong(start..start + len, 0),
        None,
        "{zero} leaves something of {len} bytes at {start}"
    );
    assert_eq!(
        wrong(start + len..all.len(), DIRT),
        None,
        "{zero} writes behind {len} bytes at {start}"
    );

    for (offset, bits) in &flips {
        memory.bytes()[start + offset] ^= bits;
    }
    let all = memory.bytes();
    let expected = all[start..start + len].iter().position(|byte| *byte != 0);
    // SAFETY: as above, and nobody writes to them.
    let found = unsafe { verify.first_nonzero(all[start..].as_ptr(), len) };
    assert_eq!(
        found, expected,
        "{verify}: {len} bytes at {start} with {flips:?}"
    );
}
