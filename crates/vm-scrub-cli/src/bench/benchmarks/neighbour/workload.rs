//! The cache-sensitive workload.

use crate::bench::memory::{self, Mapping};
use crate::bench::random::Random;
use std::hint::black_box;
use vm_scrub::PageSize;

/// Bytes between two places that the workload reads: a cache line of x86-64 and most of AArch64.
const LINE: usize = 64;

const SEED: u64 = 0x6e65_6967;

/// A chain of pointers through all lines of a buffer, in random order.
pub(super) struct Workload {
    mapping: Mapping,
    /// How many places it reads on its way around.
    pub(super) steps: u64,
}

impl Workload {
    pub(super) fn new(bytes: u64, page_size: PageSize) -> anyhow::Result<Self> {
        let len = usize::try_from(bytes)?.next_multiple_of(memory::HUGE);
        let mut mapping = Mapping::anonymous(len, page_size)?;
        memory::populate(mapping.bytes())?;
        let lines = usize::try_from(bytes)? / LINE;
        for (line, next) in Random::seeded(SEED).cycle(lines).into_iter().enumerate() {
            let at = line * LINE;
            mapping.bytes()[at..at + 8].copy_from_slice(&((next * LINE) as u64).to_ne_bytes());
        }
        let steps = lines as u64;
        Ok(Self { mapping, steps })
    }

    /// Once around, from the first line; says where it has ended.
    pub(super) fn follow(&mut self) -> u64 {
        let memory = self.mapping.bytes();
        let mut at = 0;
        for _ in 0..self.steps {
            let word = memory[at..].first_chunk::<8>();
            at = word.map_or(usize::MAX, |word| u64::from_ne_bytes(*word) as usize);
        }
        black_box(at as u64)
    }
}
