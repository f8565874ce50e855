//! The books: every block is in one account at any moment, and in one hand.

use super::{check, job};
use crate::BLOCK_SIZE;
use crate::pool::blocks::{Blocks, Dirty, Taken};
use crate::pool::{Accounts, Ledger};
use crate::scrub::{Verdict, Zeroed};
use crate::sync::thread;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const BLOCKS: u64 = 3;

/// The books of a small pool, and who has which block, as far as the threads know.
struct Pool {
    ledger: Arc<Ledger>,
    out: [AtomicBool; BLOCKS as usize],
}

impl Pool {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            ledger: Arc::new(Ledger::new(BLOCKS)),
            out: Default::default(),
        })
    }

    fn mark(&self, blocks: &[crate::Extent], out: bool) {
        for block in blocks.iter().flat_map(|extent| extent.first..extent.end()) {
            let before = self.out[block as usize].swap(out, Ordering::Relaxed);
            assert_ne!(before, out, "block {block} is in two hands");
        }
    }

    fn take(&self, blocks: u64) -> Result<Blocks<Taken>, Accounts> {
        let taken = Blocks::take(&self.ledger, blocks)?;
        assert_eq!(taken.count(), blocks);
        self.mark(taken.extents(), true);
        Ok(taken)
    }

    fn accounts(&self) -> Accounts {
        let accounts = self.ledger.accounts();
        assert_eq!(accounts.total(), BLOCKS * BLOCK_SIZE, "{accounts:?}");
        accounts
    }
}

/// The proofs of a job without any bytes.
fn proofs() -> (Zeroed, Verdict) {
    job(&mut [], &[]).settle(Default::default()).unwrap()
}

fn revoke(blocks: Blocks<Taken>) -> Blocks<Dirty> {
    blocks.lease().revoked(Vec::new())
}

/// All steps of a teardown, and the same memory for the next guest.
fn guest(pool: &Pool, blocks: u64) {
    let taken = match pool.take(blocks) {
        Ok(taken) => taken,
        Err(accounts) => {
            assert!(accounts.clean < blocks * BLOCK_SIZE, "{accounts:?}");
            assert_eq!(accounts.total(), BLOCKS * BLOCK_SIZE);
            return;
        }
    };
    let (zeroed, verdict) = proofs();
    let verified = revoke(taken)
        .scrubbed(&zeroed, |block| block)
        .verified(&verdict, |block| block);
    pool.mark(verified.extents(), false);
    verified.recycle();
}

#[test]
fn guests_come_and_go() {
    check(3, || {
        let pool = Pool::new();
        let other = thread::spawn({
            let pool = Arc::clone(&pool);
            move || guest(&pool, 2)
        });
        guest(&pool, 2);
        pool.accounts();
        other.join().unwrap();
        assert_eq!(pool.accounts().clean, BLOCKS * BLOCK_SIZE);
    });
}

#[test]
fn sums_hold_while_others_move_blocks() {
    check(3, || {
        let pool = Pool::new();
        let guests = [1, 2].map(|blocks| {
            let pool = Arc::clone(&pool);
            thread::spawn(move || guest(&pool, blocks))
        });
        pool.accounts();
        pool.accounts();
        for guest in guests {
            guest.join().unwrap();
        }
        assert_eq!(pool.accounts().clean, BLOCKS * BLOCK_SIZE);
    });
}

#[test]
fn what_is_lost_on_the_way_is_never_taken_again() {
    check(3, || {
        let pool = Pool::new();
        let loser = thread::spawn({
            let pool = Arc::clone(&pool);
            move || {
                let mut dirty = revoke(pool.take(2).unwrap());
                let lost = dirty.extents()[0].first;
                dirty.quarantine_blocks([lost]);
                // Dropped half-way: the rest is quarantined too, and its mark stays.
            }
        });
        // One block is always there; two are only before the other has taken its own.
        if let Ok(one) = pool.take(1) {
            pool.mark(one.extents(), false);
            one.give_back();
        }
        loser.join().unwrap();
        let accounts = pool.accounts();
        assert_eq!(
            (accounts.clean, accounts.quarantined),
            (BLOCK_SIZE, 2 * BLOCK_SIZE)
        );
        assert!(pool.take(2).is_err());
        pool.take(1).unwrap().give_back();
    });
}

/// A shareable lease's blocks come back from quarantine while others are taken.
#[test]
fn what_is_withheld_comes_back_once() {
    check(3, || {
        let pool = Pool::new();
        let withheld = revoke(pool.take(2).unwrap()).withhold();
        let guest = thread::spawn({
            let pool = Arc::clone(&pool);
            move || guest(&pool, 2)
        });
        pool.mark(withheld.extents(), false);
        withheld.replaced(Vec::new());
        guest.join().unwrap();
        assert_eq!(pool.accounts().clean, BLOCKS * BLOCK_SIZE);
    });
}
