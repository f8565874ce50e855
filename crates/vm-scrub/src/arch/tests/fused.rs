//! Zeroing and reading back in turn, with every pair of loops.

use super::guarded::Guarded;
use crate::arch::table::{Row, Zero};
use crate::arch::{VerifyLoop, ZeroLoop};

#[test]
fn everything_between_the_guards_is_zeroed_and_found_to_be() {
    for zero in ZeroLoop::available() {
        for verify in VerifyLoop::available() {
            for len in lengths(zero) {
                let mut buffer = Guarded::new(len);
                buffer.bytes().fill(0xa5);
                let end = buffer.bytes().len();
                let start = buffer.start().wrapping_add(end - len);
                // SAFETY: the last `len` bytes of the buffer, which is nobody else's.
                let found = unsafe { zero.zero_and_verify(verify, start, len) };
                assert_eq!(found, None, "{zero} {verify} {len}");
                let (before, inside) = buffer.bytes().split_at(end - len);
                assert!(before.iter().all(|byte| *byte == 0xa5), "{zero} {len}");
                assert!(inside.iter().all(|byte| *byte == 0), "{zero} {len}");
            }
        }
    }
}

/// Around the borders of a chunk.
fn lengths(zero: ZeroLoop) -> impl Iterator<Item = usize> {
    let chunk = zero.chunk();
    let all = [0, 1, 63, chunk - 1, chunk, chunk + 1, 2 * chunk + 65];
    let longest = if cfg!(miri) { 1025 } else { usize::MAX };
    all.into_iter().filter(move |len| *len <= longest)
}

/// Loops that leave the first byte as it was.
static FORGETFUL: [Row<Zero>; 2] = [forgetful(false), forgetful(true)];

const fn forgetful(streaming: bool) -> Row<Zero> {
    Row {
        name: "forgetful",
        streaming,
        is_available: || true,
        // SAFETY: the memory is the promise of whoever calls it.
        run: |ptr, len| unsafe { ptr.add(1).write_bytes(0, len - 1) },
    }
}

#[test]
fn the_first_byte_that_is_not_zero_is_found_in_whichever_chunk() {
    let verify = VerifyLoop::portable();
    // Chunks of 256 KiB take an interpreter minutes.
    let loops = if cfg!(miri) { 1 } else { 2 };
    for row in &FORGETFUL[..loops] {
        let zero = ZeroLoop(row);
        for dirty_chunk in 0..3 {
            let mut memory = vec![0_u8; 3 * zero.chunk()];
            let dirty = dirty_chunk * zero.chunk();
            memory[dirty..].fill(0xa5);
            // SAFETY: an exclusively borrowed slice.
            let found = unsafe { zero.zero_and_verify(verify, memory.as_mut_ptr(), memory.len()) };
            assert_eq!(found, Some(dirty));
            assert_eq!(memory[dirty + 1], 0);
            assert_eq!(
                memory.last(),
                Some(&0),
                "what comes after it is zeroed, too"
            );
        }
    }
}
