//! Choices that can be made again: SplitMix64 (Steele, Lea and Flood, 2014).

use std::time::{SystemTime, UNIX_EPOCH};

/// Numbers that follow from a seed.
pub(crate) struct Random(u64);

/// The seed that the environment names, or one that was not there before.
pub(crate) fn seed() -> u64 {
    match std::env::var("VM_SCRUB_STRESS_SEED") {
        Ok(seed) => {
            let digits = seed.trim_start_matches("0x");
            u64::from_str_radix(digits, 16).expect("a hexadecimal number")
        }
        Err(_) => SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_nanos() as u64),
    }
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `end`, which is small: the bias does not matter.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub(crate) fn one_in(&mut self, many: u64) -> bool {
        self.below(many) == 0
    }
}
