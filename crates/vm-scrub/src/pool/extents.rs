//! Sets of blocks, kept as extents: pure data, no memory behind it.
//!
//! A set never holds a block twice, and neighbouring extents are always one. Both are checked on every insert, because an
//! overlap means that somebody gave back what they did not own.

use std::collections::BTreeMap;

/// A run of consecutive blocks of a pool.
///
/// Blocks are numbered from 0 at the start of the pool's memory and are [`BLOCK_SIZE`](crate::BLOCK_SIZE) bytes long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Extent {
    /// The first block.
    pub first: u64,
    /// How many blocks; at least one.
    pub blocks: u64,
}

impl Extent {
    /// The block behind the last one.
    pub(crate) fn end(self) -> u64 {
        self.first + self.blocks
    }
}

/// Two owners of one block: what a set refuses to become.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overlap;

/// The most blocks that a pool can have: 8 PiB, more than 47 bits of an address reach. It lets a run be kept in eight bytes.
pub(crate) const MOST_BLOCKS: u64 = u32::MAX as u64;

/// A set of blocks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ExtentSet {
    // First block -> number of blocks.
    runs: BTreeMap<u32, u32>,
    blocks: u64,
}

fn extent((first, blocks): (&u32, &u32)) -> Extent {
    Extent {
        first: u64::from(*first),
        blocks: u64::from(*blocks),
    }
}

/// The block as a key; `None` if no pool has it.
fn key(block: u64) -> Option<u32> {
    u32::try_from(block).ok()
}

impl ExtentSet {
    /// How many blocks the set holds.
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The extents, in ascending order; none touches the next.
    pub(crate) fn iter(&self) -> impl Iterator<Item = Extent> {
        self.runs.iter().map(extent)
    }

    /// Adds `extent`, or changes nothing if any of its blocks is there already, or beyond what a pool can have.
    pub(crate) fn insert(&mut self, added: Extent) -> Result<(), Overlap> {
        let start = key(added.first).ok_or(Overlap)?;
        let end = key(added.end()).ok_or(Overlap)?;
        let before = self.runs.range(..=start).next_back().map(extent);
        let after = self.runs.range(start..).next().map(extent);
        if before.is_some_and(|run| run.end() > added.first)
            || after.is_some_and(|run| run.first < added.end())
        {
            return Err(Overlap);
        }
        let mut joined = added;
        if let Some(run) = before.filter(|run| run.end() == added.first) {
            joined = Extent {
                first: run.first,
                blocks: run.blocks + joined.blocks,
            };
        }
        if let Some(run) = after.filter(|run| run.first == added.end()) {
            joined.blocks += run.blocks;
            self.runs.remove(&end);
        }
        self.put(joined);
        self.blocks += added.blocks;
        Ok(())
    }

    /// Takes `blocks` blocks out, in as few and as close-fitting extents as there are; all of them or none.
    ///
    /// The smallest extent that holds the whole request is cut from its start. Where none does, the largest extents go
    /// first, so that a guest is spread over as few as possible.
    pub(crate) fn take(&mut self, mut blocks: u64) -> Option<Vec<Extent>> {
        if blocks > self.blocks {
            return None;
        }
        let mut taken = Vec::new();
        while blocks > 0 {
            let fits = self.iter().filter(|run| run.blocks >= blocks);
            let run = fits
                .min_by_key(|run| run.blocks)
                .or_else(|| self.iter().max_by_key(|run| run.blocks))?;
            let cut = Extent {
                first: run.first,
                blocks: run.blocks.min(blocks),
            };
            self.remove(cut).ok()?;
            blocks -= cut.blocks;
            taken.push(cut);
        }
        Some(taken)
    }

    /// Takes exactly `extent` out, or changes nothing if the set does not hold all of it.
    pub(crate) fn remove(&mut self, removed: Extent) -> Result<(), Overlap> {
        let start = key(removed.first).ok_or(Overlap)?;
        let run = self
            .runs
            .range(..=start)
            .next_back()
            .map(extent)
            .filter(|run| run.end() >= removed.end())
            .ok_or(Overlap)?;
        // What is left before it is put where the run was.
        self.runs.remove(&key(run.first).ok_or(Overlap)?);
        self.put(Extent {
            first: run.first,
            blocks: removed.first - run.first,
        });
        self.put(Extent {
            first: removed.end(),
            blocks: run.end() - removed.end(),
        });
        self.blocks -= removed.blocks;
        Ok(())
    }

    /// Keeps a run that touches no other, unless it is empty.
    fn put(&mut self, run: Extent) {
        if let (Some(first), Some(blocks @ 1..)) = (key(run.first), key(run.blocks)) {
            self.runs.insert(first, blocks);
        }
    }
}

/// Deals `extents` out to consumers that need `wanted` blocks each, in order.
///
/// The extents must hold at least as many blocks as are wanted in all; what is left over is not returned.
pub(crate) fn deal(extents: &[Extent], wanted: &[u64]) -> Vec<Vec<Extent>> {
    let mut rest = extents.iter().copied();
    let mut current: Option<Extent> = None;
    wanted
        .iter()
        .map(|&wanted| {
            let mut missing = wanted;
            let mut dealt = Vec::new();
            while missing > 0 {
                let Some(extent) = current.take().or_else(|| rest.next()) else {
                    break;
                };
                let cut = extent.blocks.min(missing);
                dealt.push(Extent {
                    first: extent.first,
                    blocks: cut,
                });
                missing -= cut;
                if cut < extent.blocks {
                    current = Some(Extent {
                        first: extent.first + cut,
                        blocks: extent.blocks - cut,
                    });
                }
            }
            dealt
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u64 = 64;

    /// The model: one bool a block.
    type Model = [bool; BLOCKS as usize];

    #[derive(Debug, Clone)]
    enum Step {
        Insert(Extent),
        Remove(Extent),
        Take(u64),
    }

    fn extent() -> impl Strategy<Value = Extent> {
        (0..BLOCKS, 1..=16_u64).prop_map(|(first, blocks)| Extent {
            first,
            blocks: blocks.min(BLOCKS - first),
        })
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            extent().prop_map(Step::Insert),
            extent().prop_map(Step::Remove),
            (1..=BLOCKS).prop_map(Step::Take),
        ]
    }

    fn cells(extent: Extent) -> std::ops::Range<usize> {
        extent.first as usize..extent.end() as usize
    }

    fn agree(set: &ExtentSet, model: &Model) {
        let mut seen = [false; BLOCKS as usize];
        let mut last_end = None;
        for extent in set.iter() {
            assert!(extent.blocks > 0);
            assert!(
                last_end.is_none_or(|end| end < extent.first),
                "neighbours are not joined"
            );
            last_end = Some(extent.end());
            seen[cells(extent)].fill(true);
        }
        assert_eq!(&seen, model);
        assert_eq!(
            set.blocks() as usize,
            model.iter().filter(|held| **held).count()
        );
    }

    proptest! {
        #[test]
        fn a_set_behaves_like_a_bitmap(steps in prop::collection::vec(step(), 0..if cfg!(miri) { 6 } else { 64 })) {
            let mut set = ExtentSet::default();
            let mut model: Model = [false; BLOCKS as usize];
            for step in steps {
                match step {
                    Step::Insert(extent) => {
                        let free = model[cells(extent)].iter().all(|held| !held);
                        prop_assert_eq!(set.insert(extent).is_ok(), free);
                        if free {
                            model[cells(extent)].fill(true);
                        }
                    }
                    Step::Remove(extent) => {
                        let held = model[cells(extent)].iter().all(|held| *held);
                        prop_assert_eq!(set.remove(extent).is_ok(), held);
                        if held {
                            model[cells(extent)].fill(false);
                        }
                    }
                    Step::Take(blocks) => {
                        let held = model.iter().filter(|held| **held).count() as u64;
                        let runs: Vec<Extent> = set.iter().collect();
                        match set.take(blocks) {
                            None => prop_assert!(blocks > held),
                            Some(taken) => {
                                prop_assert_eq!(taken.iter().map(|extent| extent.blocks).sum::<u64>(), blocks);
                                let best = runs.iter().map(|run| run.blocks).filter(|len| *len >= blocks).min();
                                if let Some(best) = best {
                                    prop_assert_eq!(taken.len(), 1, "one extent would have held it all");
                                    let run = runs.iter().find(|run| run.first == taken[0].first);
                                    prop_assert_eq!(run.map(|run| run.blocks), Some(best), "not the best fit");
                                }
                                for extent in taken {
                                    prop_assert!(model[cells(extent)].iter().all(|held| *held), "taken twice");
                                    model[cells(extent)].fill(false);
                                }
                            }
                        }
                    }
                }
                agree(&set, &model);
            }
        }

        #[test]
        fn dealing_gives_each_its_blocks_in_order(
            extents in prop::collection::vec(extent(), 1..8),
            shares in prop::collection::vec(0..8_u64, 1..8),
        ) {
            let total: u64 = extents.iter().map(|extent| extent.blocks).sum();
            prop_assume!(shares.iter().sum::<u64>() <= total);
            let flat = |extents: &[Extent]| -> Vec<u64> {
                extents.iter().flat_map(|extent| extent.first..extent.end()).collect()
            };
            let dealt = deal(&extents, &shares);
            prop_assert_eq!(dealt.len(), shares.len());
            let mut expected = flat(&extents).into_iter();
            for (share, extents) in shares.iter().zip(&dealt) {
                prop_assert!(extents.iter().all(|extent| extent.blocks > 0));
                let blocks = flat(extents);
                prop_assert_eq!(blocks.len() as u64, *share);
                for block in blocks {
                    prop_assert_eq!(Some(block), expected.next());
                }
            }
        }
    }
}
