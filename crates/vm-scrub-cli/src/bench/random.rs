//! Numbers that look random and are the same in every run, so that every contender and every release meets the same pages.

/// SplitMix64 (Steele, Lea and Flood, 2014), with the constants of its authors.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn seeded(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `bound`, which must not be 0 (Lemire's multiplication; the bias is below 2^-32 for bounds up to 2^32).
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        ((u128::from(self.next()) * bound as u128) >> 64) as usize
    }

    /// `count` different numbers below `bound`, ascending; all of them if `count` is larger.
    pub(crate) fn choose(&mut self, count: usize, bound: usize) -> Vec<usize> {
        let count = count.min(bound);
        let mut all: Vec<usize> = (0..bound).collect();
        for taken in 0..count {
            let other = taken + self.below(bound - taken);
            all.swap(taken, other);
        }
        all.truncate(count);
        all.sort_unstable();
        all
    }

    /// A permutation of `0..len` that is one single cycle (Sattolo, 1986): following it from anywhere visits everything.
    pub(crate) fn cycle(&mut self, len: usize) -> Vec<usize> {
        let mut cycle: Vec<usize> = (0..len).collect();
        for last in (1..len).rev() {
            let other = self.below(last);
            cycle.swap(last, other);
        }
        cycle
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_words_are_those_of_the_reference() {
        // From the reference implementation in C, seed 1234567.
        let mut random = Random::seeded(1_234_567);
        assert_eq!(random.next(), 6_457_827_717_110_365_317);
        assert_eq!(random.next(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn chosen_numbers_are_different_and_in_range() {
        let chosen = Random::seeded(1).choose(100, 1000);
        assert_eq!(chosen.len(), 100);
        assert!(chosen.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(
            chosen[99] < 1000 && chosen[99] - chosen[0] > 500,
            "spread out"
        );
        assert_eq!(Random::seeded(1).choose(9, 5), [0, 1, 2, 3, 4]);
        assert_eq!(
            Random::seeded(1).choose(100, 1000),
            chosen,
            "the same every time"
        );
    }

    #[test]
    fn a_cycle_visits_everything() {
        for len in [1, 2, 3, 64, 1000] {
            let cycle = Random::seeded(7).cycle(len);
            let (mut at, mut steps) = (cycle[0], 1);
            while at != 0 {
                at = cycle[at];
                steps += 1;
            }
            assert_eq!(steps, len);
        }
    }
}
