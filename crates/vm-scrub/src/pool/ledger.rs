//! Which block is in which state: the pool's books.
//!
//! Every block of the pool is in exactly one of four sets, so `clean + leased + dirty + quarantined = capacity` holds by
//! construction. Blocks move between sets along the edges of [`Account::may_become`] and no others; the typed values that
//! drive the moves are in [`blocks`](super::blocks). The lock is held for set operations only, never while memory is
//! touched.

use super::extents::{Extent, ExtentSet};
use crate::BLOCK_SIZE;
use crate::sync::{Mutex, MutexGuard};
use std::sync::PoisonError;

/// The state of a block as the books see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Account {
    /// Every byte is zero, or the page was never populated. Nobody may write.
    Clean,
    /// Belongs to one guest, which may write.
    Leased,
    /// Taken from a guest and not yet proven to be zero. Only the scrubber may write.
    Dirty,
    /// Unknown content, or a writer that may still be there. Nobody may use it, ever again.
    Quarantined,
}

impl Account {
    /// Whether a block may go from this state to `next`. No memory leaves quarantine (it can only be replaced by other memory), and nothing dirty becomes leased.
    pub(crate) fn may_become(self, next: Account) -> bool {
        use Account::{Clean, Dirty, Leased, Quarantined};
        matches!(
            (self, next),
            // Leased to clean: memory that was taken for a lease which then could not be made, and that nobody has seen.
            (Clean, Leased) | (Leased, Clean | Dirty | Quarantined) | (Dirty, Clean | Quarantined)
        )
    }
}

/// How many bytes of a pool are in which state. The four add up to the pool's capacity, at any moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub struct Accounts {
    /// Bytes that can be leased.
    pub clean: u64,
    /// Bytes that guests have.
    pub leased: u64,
    /// Bytes that are being scrubbed.
    pub dirty: u64,
    /// Bytes that are never going to be leased again. Those that [`Pool::withheld`](super::Pool::withheld) lists may come
    /// back as other memory.
    pub quarantined: u64,
}

impl Accounts {
    /// The sum of all four, in bytes: of those of a pool, its capacity.
    pub fn total(&self) -> u64 {
        let parts = [self.leased, self.dirty, self.quarantined];
        parts.into_iter().fold(self.clean, u64::saturating_add)
    }
}

/// The sets themselves, without the lock: what the model test exercises.
#[derive(Debug)]
struct Books {
    sets: [ExtentSet; 4],
}

/// A move that the books do not allow: the blocks are not where the caller says, or may not go where it wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Refused;

impl Books {
    fn new(blocks: u64) -> Self {
        let mut sets: [ExtentSet; 4] = Default::default();
        // An empty set cannot overlap.
        let _ = sets[Account::Clean as usize].insert(Extent { first: 0, blocks });
        Self { sets }
    }

    fn set(&mut self, account: Account) -> &mut ExtentSet {
        &mut self.sets[account as usize]
    }

    fn take(&mut self, blocks: u64) -> Option<Vec<Extent>> {
        let taken = self.set(Account::Clean).take(blocks)?;
        for extent in &taken {
            // Taken from the set of clean blocks just now, so it is in no other set.
            let _ = self.set(Account::Leased).insert(*extent);
        }
        Some(taken)
    }

    fn shift(&mut self, extent: Extent, from: Account, to: Account) -> Result<(), Refused> {
        if !from.may_become(to) {
            return Err(Refused);
        }
        self.set(from).remove(extent).map_err(|_| Refused)?;
        if self.set(to).insert(extent).is_err() {
            // Cannot happen while every block is in one set; if it does, the block belongs to `to` and stays there.
            return Err(Refused);
        }
        Ok(())
    }

    /// What was quarantined is gone, and there is fresh memory behind the blocks.
    fn replace(&mut self, extent: Extent) -> Result<(), Refused> {
        self.set(Account::Quarantined)
            .remove(extent)
            .map_err(|_| Refused)?;
        self.set(Account::Clean).insert(extent).map_err(|_| Refused)
    }

    fn accounts(&self) -> Accounts {
        let bytes = |account: Account| self.sets[account as usize].blocks() * BLOCK_SIZE;
        Accounts {
            clean: bytes(Account::Clean),
            leased: bytes(Account::Leased),
            dirty: bytes(Account::Dirty),
            quarantined: bytes(Account::Quarantined),
        }
    }
}

/// The books of one pool.
#[derive(Debug)]
pub(crate) struct Ledger {
    books: Mutex<Books>,
}

impl Ledger {
    /// Opens the books of a pool of `blocks` clean blocks.
    pub(crate) fn new(blocks: u64) -> Self {
        Self {
            books: Mutex::new(Books::new(blocks)),
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // No user code runs under the lock, and each move leaves every block in one set, so a panic elsewhere while
        // holding it cannot have left the books wrong.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves `blocks` clean blocks to the leased account, all of them or none; then it says what there was at that moment.
    pub(crate) fn take(&self, blocks: u64) -> Result<Vec<Extent>, Accounts> {
        let mut books = self.books();
        books.take(blocks).ok_or_else(|| books.accounts())
    }

    /// Moves `extents` from one account to another.
    ///
    /// A move that the books refuse is a bug in this crate. The blocks then stay out of the clean set, which is the safe
    /// side, and the bug is logged.
    pub(crate) fn shift(&self, extents: &[Extent], from: Account, to: Account) {
        let mut books = self.books();
        for extent in extents {
            if books.shift(*extent, from, to).is_err() {
                log::error!(
                    "books refuse to move {extent:?} from {from:?} to {to:?}: it stays where it is"
                );
                debug_assert!(
                    false,
                    "books refuse to move {extent:?} from {from:?} to {to:?}"
                );
            }
        }
    }

    /// Makes quarantined blocks clean because other memory is behind them now.
    ///
    /// If the books refuse that, it is a bug in this crate; the blocks then do not become clean.
    pub(crate) fn replace(&self, extents: &[Extent]) {
        let mut books = self.books();
        for extent in extents {
            if books.replace(*extent).is_err() {
                log::error!("books refuse to replace {extent:?}, which is not in quarantine");
                debug_assert!(false, "books refuse to replace {extent:?}");
            }
        }
    }

    /// How many bytes are in which state.
    pub(crate) fn accounts(&self) -> Accounts {
        self.books().accounts()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u64 = 32;
    const ALL: [Account; 4] = [
        Account::Clean,
        Account::Leased,
        Account::Dirty,
        Account::Quarantined,
    ];

    #[test]
    fn accounts_that_nobody_has_are_added_without_a_panic() {
        let some = Accounts {
            clean: 1,
            leased: 2,
            dirty: 4,
            quarantined: 8,
        };
        assert_eq!(some.total(), 15);
        // The fields are public, and may have been read from a file.
        let dirty = u64::MAX;
        assert_eq!(Accounts { dirty, ..some }.total(), u64::MAX);
    }

    #[test]
    fn the_table_of_states() {
        use Account::{Clean, Dirty, Leased, Quarantined};
        for from in ALL {
            assert!(!Quarantined.may_become(from), "nothing leaves quarantine");
            assert!(!from.may_become(from));
        }
        assert!(Clean.may_become(Leased));
        assert!(!Clean.may_become(Dirty) && !Clean.may_become(Quarantined));
        assert!(
            !Dirty.may_become(Leased),
            "dirty memory reaches a guest only by way of clean"
        );
        assert!(Leased.may_become(Dirty) && Leased.may_become(Quarantined));
        assert!(Dirty.may_become(Clean) && Dirty.may_become(Quarantined));
    }

    #[derive(Debug, Clone)]
    enum Step {
        Take(u64),
        Shift(Extent, usize, usize),
        Replace(Extent),
    }

    fn step() -> impl Strategy<Value = Step> {
        let extent = (0..BLOCKS, 1..6_u64).prop_map(|(first, blocks)| Extent {
            first,
            blocks: blocks.min(BLOCKS - first),
        });
        prop_oneof![
            (1..12_u64).prop_map(Step::Take),
            extent.clone().prop_map(Step::Replace),
            (extent, 0..4_usize, 0..4_usize)
                .prop_map(|(extent, from, to)| Step::Shift(extent, from, to)),
        ]
    }

    proptest! {
        /// The model keeps one state a block and moves a range only if the whole range is in the right state.
        #[test]
        fn books_agree_with_one_state_per_block(steps in prop::collection::vec(step(), 0..96)) {
            let mut books = Books::new(BLOCKS);
            let mut model = vec![Account::Clean; BLOCKS as usize];
            for step in steps {
                match step {
                    Step::Take(blocks) => {
                        let clean = model.iter().filter(|state| **state == Account::Clean).count() as u64;
                        match books.take(blocks) {
                            None => prop_assert!(blocks > clean),
                            Some(extents) => {
                                for block in extents.iter().flat_map(|extent| extent.first..extent.end()) {
                                    prop_assert_eq!(model[block as usize], Account::Clean, "granted a block that was not clean");
                                    model[block as usize] = Account::Leased;
                                }
                            }
                        }
                    }
                    Step::Shift(extent, from, to) => {
                        let range = extent.first as usize..extent.end() as usize;
                        let allowed = ALL[from].may_become(ALL[to])
                            && model[range.clone()].iter().all(|state| *state == ALL[from]);
                        prop_assert_eq!(books.shift(extent, ALL[from], ALL[to]).is_ok(), allowed);
                        if allowed {
                            model[range].fill(ALL[to]);
                        }
                    }
                    Step::Replace(extent) => {
                        let range = extent.first as usize..extent.end() as usize;
                        let allowed = model[range.clone()].iter().all(|state| *state == Account::Quarantined);
                        prop_assert_eq!(books.replace(extent).is_ok(), allowed);
                        if allowed {
                            model[range].fill(Account::Clean);
                        }
                    }
                }
                prop_assert_eq!(books.accounts().total(), BLOCKS * BLOCK_SIZE);
                for account in ALL {
                    let held: Vec<u64> = books.sets[account as usize]
                        .iter()
                        .flat_map(|extent| extent.first..extent.end())
                        .collect();
                    let expected: Vec<u64> = (0..BLOCKS).filter(|block| model[*block as usize] == account).collect();
                    prop_assert_eq!(held, expected);
                }
            }
        }
    }
}
