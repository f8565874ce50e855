//! The table: lengths around every boundary a loop may have, every alignment to a line and beyond,
//! both guard pages.

use super::guarded::Guarded;

/// What surrounds the range under test.
const OUTSIDE: u8 = 0xa5;

/// Lengths in bytes: everything below a vector, then both sides of lines, blocks, pages and a few
/// odd ones.
#[rustfmt::skip]
const LENGTHS: &[usize] = &[
    0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
    26, 27, 28, 29, 30, 31, 32, 33, 47, 48, 49, 63, 64, 65, 95, 96, 97, 127, 128, 129, 191, 192,
    193, 255, 256, 257, 319, 320, 321, 383, 384, 385, 511, 512, 513, 575, 576, 577, 639, 640, 641,
    1023, 1024, 1025, 1087, 1151, 2047, 2048, 2049, 4095, 4096, 4097, 12_289, 65_535, 65_537,
    100_003,
];

/// Up to this length, in bytes, every byte is made the culprit.
const EXHAUSTIVE: usize = 257;

/// Distances of a range from a guard page, in bytes: everything within two lines of 64; for the
/// longest ranges the edges of lines and vectors only.
fn shifts(len: usize) -> impl Iterator<Item = usize> {
    let step = if cfg!(miri) { 43 } else { 1 };
    (0..=128)
        .step_by(step)
        .filter(move |shift| len <= 4097 || matches!(shift % 32, 0 | 1 | 7 | 31))
}

fn lengths() -> impl Iterator<Item = usize> {
    // An interpreter has time for one in seven, and none that is long.
    let (step, longest) = if cfg!(miri) {
        (7, 577)
    } else {
        (1, usize::MAX)
    };
    LENGTHS
        .iter()
        .copied()
        .step_by(step)
        .filter(move |&len| len <= longest)
}

/// Calls `case(buffer, start of the range, length)` for every range of the table.
fn each_range(mut case: impl FnMut(&mut Guarded, usize, usize)) {
    for len in lengths() {
        // As tight as pages allow: with whole pages, both ends touch a guard at once.
        let mut tight = Guarded::new(len);
        let end = tight.len() - len;
        case(&mut tight, end, len);
        case(&mut tight, 0, len);
        let mut roomy = Guarded::new(len + 256);
        for shift in shifts(len) {
            let end = roomy.len() - len - shift;
            case(&mut roomy, shift, len);
            case(&mut roomy, end, len);
        }
    }
}

/// Zeroes every range of the table and looks at every byte inside and outside.
pub(super) fn zeroing(zero: impl Fn(*mut u8, usize)) {
    each_range(|buffer, start, len| {
        buffer.bytes().fill(OUTSIDE);
        zero(buffer.start().wrapping_add(start), len);
        let (before, rest) = buffer.bytes().split_at(start);
        let (inside, after) = rest.split_at(len);
        for (bytes, value, part) in [
            (before, OUTSIDE, "before"),
            (inside, 0, "inside"),
            (after, OUTSIDE, "after"),
        ] {
            let wrong = other_than(value, bytes);
            assert_eq!(wrong, None, "{part} {len} bytes at offset {start}");
        }
    });
    zero(std::ptr::null_mut(), 0);
}

/// Searches every range of the table while it is clean, and with one bit set in each place worth
/// trying.
pub(super) fn verification(first_nonzero: impl Fn(*const u8, usize) -> Option<usize>) {
    each_range(|buffer, start, len| {
        buffer.bytes().fill(OUTSIDE);
        buffer.bytes()[start..start + len].fill(0);
        let ptr = buffer.start().wrapping_add(start).cast_const();
        let place = format!("{len} bytes at offset {start}");
        assert_eq!(first_nonzero(ptr, len), None, "clean, {place}");
        for culprit in culprits(start, len) {
            let bit = 1 << ((culprit + start) % 8);
            buffer.bytes()[start + culprit] = bit;
            let found = first_nonzero(ptr, len);
            assert_eq!(found, Some(culprit), "bit {bit:#04x}, {place}");
            // A second one further on must not be reported, nor hide the first.
            let last = start + len - 1;
            buffer.bytes()[last] |= bit;
            let found = first_nonzero(ptr, len);
            assert_eq!(found, Some(culprit), "two bits {bit:#04x}, {place}");
            buffer.bytes()[last] = 0;
            buffer.bytes()[start + culprit] = 0;
        }
    });
    assert_eq!(first_nonzero(std::ptr::null(), 0), None);
}

/// Offsets that get a bit: all of a short range next to the lower guard; else the ends and a stride
/// through the range. The stride counts from the buffer's start and shares no factor with lines and
/// blocks, so that from range to range it meets every position in either.
fn culprits(start: usize, len: usize) -> impl Iterator<Item = usize> {
    let is_low = start <= 128;
    let all = is_low && len <= EXHAUSTIVE && !cfg!(miri);
    let stride = match len {
        _ if cfg!(miri) => 151,
        0..1024 => 37,
        1024..8192 => 151,
        _ => 4099,
    };
    (0..len).filter(move |&at| all || at < 2 || len - at < 3 || (at + start).is_multiple_of(stride))
}

/// Where the first byte is that is not `value`.
fn other_than(value: u8, bytes: &[u8]) -> Option<usize> {
    // None if the first is and each equals the one before it: one comparison of two slices, which is fast in an unoptimised build too.
    let [first, rest @ ..] = bytes else {
        return None;
    };
    if *first == value && *rest == bytes[..rest.len()] {
        return None;
    }
    bytes.iter().position(|&byte| byte != value)
}
