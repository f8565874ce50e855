//! Blocks on their way through a lease, with their state in the type.
//!
//! A [`Blocks`] value owns its blocks: nobody else has them, and the books count them in the account of its state. Each step
//! of a teardown consumes one type and makes the next, against a proof that the step was done. Only [`Blocks<Verified>`]
//! and [`Blocks<Taken>`] (memory nobody has seen) can become clean. A value that is dropped half-way, by an error or by a
//! panic, is quarantined: that is the default, and getting out of it takes a proof.
//!
//! ```text
//! Taken --granted--> Leased --Revoked--> Dirty --Zeroed--> Scrubbed --Verdict--> Verified --> the clean set
//!   \--> the clean set   \                  \                 \                     \
//!                         `------------------`-----------------`---------------------`--> quarantine
//!                          `-- of shareable leases: Withheld --Refilled--> the clean set
//! ```

use super::extents::Extent;
use super::ledger::{Account, Accounts, Ledger};
use crate::BLOCK_SIZE;
use crate::backing::{Refilled, Revoked};
use crate::embedder::in_drop;
use crate::scrub::{Broken, Verdict, Zeroed};
use std::marker::PhantomData;
use std::sync::Arc;

/// What the books say about blocks in a state.
pub(crate) trait State {
    const ACCOUNT: Account;
    const NAME: &'static str;
}

macro_rules! states {
    ($($(#[$doc:meta])* $name:ident: $account:ident,)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub(crate) struct $name(());

        impl State for $name {
            const ACCOUNT: Account = Account::$account;
            const NAME: &'static str = stringify!($name);
        }
    )*};
}

states! {
    /// Taken out of the clean set for a lease; no guest has seen the memory yet.
    Taken: Leased,
    /// In a guest's window; the guest and its devices may write.
    Leased: Leased,
    /// Out of every guest's reach, with the last guest's bytes in it.
    Dirty: Dirty,
    /// Zeros were written and fenced. Nobody has read them back.
    Scrubbed: Dirty,
    /// Every byte that was written was read back as zero, or the policy says not to.
    Verified: Dirty,
    /// In quarantine, and may be replaced by fresh memory: what a shareable lease took them for has not yet gone back to the
    /// kernel, or the kernel has nothing to put in its place.
    Withheld: Quarantined,
}

/// Blocks in state `S`, owned. Quarantined when dropped.
#[derive(Debug)]
pub(crate) struct Blocks<S: State> {
    ledger: Arc<Ledger>,
    extents: Vec<Extent>,
    state: PhantomData<S>,
}

impl<S: State> Blocks<S> {
    /// The blocks.
    pub(crate) fn extents(&self) -> &[Extent] {
        &self.extents
    }

    fn shift(mut self, to: Account) -> (Arc<Ledger>, Vec<Extent>) {
        let extents = std::mem::take(&mut self.extents);
        if S::ACCOUNT != to {
            self.ledger.shift(&extents, S::ACCOUNT, to);
        }
        (Arc::clone(&self.ledger), extents)
    }

    fn into_state<T: State>(self) -> Blocks<T> {
        let (ledger, extents) = self.shift(T::ACCOUNT);
        Blocks {
            ledger,
            extents,
            state: PhantomData,
        }
    }

    /// Quarantines everything.
    pub(crate) fn quarantine(self) {
        drop(self.shift(Account::Quarantined));
    }

    /// Quarantines everything, with a way back: see [`Blocks::replaced`].
    pub(crate) fn withhold(self) -> Blocks<Withheld> {
        self.into_state()
    }

    /// How many blocks are held.
    pub(crate) fn count(&self) -> u64 {
        self.extents.iter().map(|extent| extent.blocks).sum()
    }

    /// Quarantines those of the given blocks that are held here; the rest goes on.
    pub(crate) fn quarantine_blocks(&mut self, blocks: impl IntoIterator<Item = u64>) {
        for block in blocks {
            let Some(at) = self
                .extents
                .iter()
                .position(|extent| (extent.first..extent.end()).contains(&block))
            else {
                continue;
            };
            let extent = self.extents.swap_remove(at);
            let pieces = [
                Extent {
                    first: extent.first,
                    blocks: block - extent.first,
                },
                Extent {
                    first: block + 1,
                    blocks: extent.end() - block - 1,
                },
            ];
            self.extents
                .extend(pieces.into_iter().filter(|piece| piece.blocks > 0));
            let lost = Extent {
                first: block,
                blocks: 1,
            };
            self.ledger.shift(&[lost], S::ACCOUNT, Account::Quarantined);
        }
    }
}

impl Blocks<Taken> {
    /// Takes `blocks` clean blocks, all of them or none; then it says what there was.
    pub(crate) fn take(ledger: &Arc<Ledger>, blocks: u64) -> Result<Self, Accounts> {
        Ok(Self {
            ledger: Arc::clone(ledger),
            extents: ledger.take(blocks)?,
            state: PhantomData,
        })
    }

    /// Adds blocks of the same pool.
    pub(crate) fn join(&mut self, mut more: Self) {
        self.extents.append(&mut more.extents);
    }

    /// The memory is about to be shown to a guest.
    pub(crate) fn lease(self) -> Blocks<Leased> {
        self.into_state()
    }

    /// Gives memory back that no guest has seen.
    pub(crate) fn give_back(self) {
        drop(self.shift(Account::Clean));
    }
}

impl Blocks<Leased> {
    /// The memory is out of the guest's reach: one proof for each range that was granted.
    pub(crate) fn revoked(self, _proofs: Vec<Revoked>) -> Blocks<Dirty> {
        self.into_state()
    }
}

impl Blocks<Dirty> {
    /// Zeros were written to everything that can hold data.
    /// Blocks with memory that could not be accessed are quarantined.
    pub(crate) fn scrubbed(
        mut self,
        proof: &Zeroed,
        in_books: impl Fn(u64) -> u64,
    ) -> Blocks<Scrubbed> {
        self.quarantine_blocks(blocks_of(proof.broken()).map(in_books));
        self.into_state()
    }
}

impl Blocks<Scrubbed> {
    /// The zeros were read back. Blocks in which something else was found, or that could not be read, are quarantined; `in_books` finds them by the number
    /// of the block in the memory that was read.
    pub(crate) fn verified(
        mut self,
        verdict: &Verdict,
        in_books: impl Fn(u64) -> u64,
    ) -> Blocks<Verified> {
        self.quarantine_blocks(
            verdict
                .failures()
                .iter()
                .map(|failure| failure.offset as u64 / BLOCK_SIZE)
                .map(&in_books),
        );
        self.quarantine_blocks(blocks_of(verdict.broken()).map(in_books));
        self.into_state()
    }
}

impl Blocks<Verified> {
    /// Puts the blocks back into the clean set.
    pub(crate) fn recycle(self) {
        drop(self.shift(Account::Clean));
    }
}

impl Blocks<Withheld> {
    /// No blocks at all.
    pub(crate) fn none(ledger: &Arc<Ledger>) -> Self {
        Self {
            ledger: Arc::clone(ledger),
            extents: Vec::new(),
            state: PhantomData,
        }
    }

    /// Fresh memory is behind the blocks, one proof for each extent, and what was there before cannot be leased by anybody.
    pub(crate) fn replaced(mut self, _proofs: Vec<Refilled>) {
        self.ledger.replace(&std::mem::take(&mut self.extents));
    }
}

/// The blocks in which something is broken. Pieces do not cross the borders of blocks.
fn blocks_of(broken: &[Broken]) -> impl Iterator<Item = u64> {
    broken
        .iter()
        .map(|broken| broken.range.start as u64 / BLOCK_SIZE)
}

impl<S: State> Drop for Blocks<S> {
    fn drop(&mut self) {
        if self.extents.is_empty() || S::ACCOUNT == Account::Quarantined {
            return;
        }
        // Before the embedder's logger hears of it.
        self.ledger
            .shift(&self.extents, S::ACCOUNT, Account::Quarantined);
        in_drop(|| {
            log::error!(
                "blocks dropped in state {}: {:?} quarantined",
                S::NAME,
                self.extents
            );
        });
    }
}
