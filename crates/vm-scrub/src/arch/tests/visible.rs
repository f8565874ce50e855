//! What the fences are for: once a loop has returned, an ordinary release store must not overtake
//! its zeros on the way to another processor.
//!
//! A fault shows only when two processors meet at the right moment, so a pass proves little, but a
//! failure is always a fault. Without their fences all three weakly ordered loops of x86-64 fail it
//! in nearly every run on AMD processors.

use std::hint::spin_loop;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::guarded::Guarded;
use crate::arch::{VerifyLoop, ZeroLoop};

/// Hand-overs for each loop and length.
const ROUNDS: usize = if cfg!(miri) { 4 } else { 2000 };

#[test]
fn zeros_are_seen_by_whoever_sees_that_they_were_written() {
    for zero in ZeroLoop::available() {
        for len in [64, 192, 4096] {
            assert_eq!(
                hand_over(zero, len),
                0,
                "of {ROUNDS} rounds, {zero}, {len} bytes"
            );
        }
    }
}

/// How many times the receiving thread met bytes other than those handed to it.
fn hand_over(zero: ZeroLoop, len: usize) -> usize {
    let mut buffer = Guarded::new(len);
    let verify = VerifyLoop::portable();
    let turn = AtomicUsize::new(0);
    // The address alone goes to the other thread; the turns say whose the bytes are.
    let shared = Shared(buffer.start());
    thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let Shared(ptr) = { shared };
            let mut stale = 0;
            for round in 0..ROUNDS {
                // Take the old bytes into this processor's cache, where they may linger.
                wait(&turn, 4 * round + 1);
                // SAFETY: `len` initialised bytes, and the sender waits for its turn.
                let old = unsafe { verify.first_nonzero(ptr, len) };
                stale += usize::from(old != Some(0));
                turn.store(4 * round + 2, Ordering::Release);
                wait(&turn, 4 * round + 3);
                // SAFETY: as above.
                let found = unsafe { verify.first_nonzero(ptr, len) };
                stale += usize::from(found.is_some());
                turn.store(4 * round + 4, Ordering::Release);
            }
            stale
        });
        for round in 0..ROUNDS {
            wait(&turn, 4 * round);
            // SAFETY: `len` writable bytes, and the receiver waits for its turn.
            unsafe { shared.0.write_bytes(0xa5, len) };
            turn.store(4 * round + 1, Ordering::Release);
            wait(&turn, 4 * round + 2);
            // SAFETY: as above.
            unsafe { zero.zero(shared.0, len) };
            turn.store(4 * round + 3, Ordering::Release);
        }
        receiver
            .join()
            .expect("the receiver counts and does not panic")
    })
}

#[derive(Clone, Copy)]
struct Shared(*mut u8);

// SAFETY: the pointer is only followed by the thread whose turn it is.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

/// Spins until it is `this` turn; gives the processor away now and then, should there be only one.
fn wait(turn: &AtomicUsize, this: usize) {
    let mut spins = 0_u32;
    while turn.load(Ordering::Acquire) != this {
        spins += 1;
        if spins.is_multiple_of(1000) {
            thread::yield_now();
        }
        spin_loop();
    }
}
