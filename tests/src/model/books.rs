//! What the pool's accounts must say.
//!
//! While something is being scrubbed in the background, nobody can say when it is clean; then the accounts have to lie between
//! what is certain and what is possible.

use super::Model;
use crate::{regions, teardown};
use std::thread;
use std::time::{Duration, Instant};
use vm_scrub::{Accounts, BLOCK_SIZE};

/// No background work on 16 MiB takes this long, on a host that does anything at all.
const PATIENCE: Duration = Duration::from_secs(60);

impl Model {
    /// A fault was met: by this call, or by what it has helped to finish.
    pub(super) fn met_fault(&mut self) {
        let tickets = self.tickets.iter_mut().map(|(_, gone)| gone);
        for gone in tickets.chain(&mut self.unattended) {
            gone.may_lose = true;
        }
    }

    fn leased(&self) -> u64 {
        let guests = self.guests.iter().map(|guest| guest.blocks.len() as u64);
        guests
            .chain(self.forgotten.iter().map(|(_, blocks)| *blocks))
            .sum()
    }

    /// Blocks that the background has, and how many of these may end in quarantine.
    fn in_background(&self) -> (u64, u64) {
        let gone = self
            .tickets
            .iter()
            .map(|(_, gone)| gone)
            .chain(&self.unattended);
        gone.fold((0, 0), |(all, doubtful), gone| {
            let lost = if gone.may_lose || gone.shareable {
                gone.blocks
            } else {
                0
            };
            (all + gone.blocks, doubtful + lost)
        })
    }

    /// How many blocks a lease may count on, and how many there can be at most.
    pub(super) fn available(&self) -> (u64, u64) {
        let in_hand: u64 = self.in_hand.iter().map(|(_, gone)| gone.blocks).sum();
        let taken = self.leased() + in_hand + self.quarantined;
        let (mut certain, mut doubtful) = (0, self.unsaid + self.in_background().1);
        for withheld in self.pool().withheld() {
            let blocks = withheld.bytes / BLOCK_SIZE;
            if withheld.for_good {
                certain += blocks;
            } else {
                // Another process may have taken huge pages, and pins linger.
                doubtful += blocks;
            }
        }
        let most = self.knobs.blocks() - taken - certain;
        (most.saturating_sub(doubtful), most)
    }

    /// Accounts, and the bytes in quarantine that no shareable lease has left there, at one moment.
    fn accounts(&self) -> (Accounts, u64) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.pool().withheld();
            let accounts = self.pool().accounts();
            let after = self.pool().withheld();
            let bytes: u64 = before.iter().map(|withheld| withheld.bytes).sum();
            let same = before.len() == after.len()
                && before
                    .iter()
                    .zip(&after)
                    .all(|(one, other)| one.lease == other.lease && one.bytes == other.bytes);
            // On its way in or out it is in one place before it is in the other.
            if same
                && let Some(own) = accounts.quarantined.checked_sub(bytes)
                && self.is_possible(own)
            {
                return (accounts, own);
            }
            // Nothing is on its way, so nothing is going to change.
            let at_rest = before.is_empty() && after.is_empty() && self.in_background().0 == 0;
            assert!(
                !at_rest && Instant::now() < deadline,
                "{accounts:?}, {} blocks should be in quarantine, {} more may be: {after:?} {:?}",
                self.quarantined,
                self.doubtful(),
                self.knobs
            );
            thread::yield_now();
        }
    }

    /// Blocks that may be in quarantine without a receipt that says so, yet.
    fn doubtful(&self) -> u64 {
        let in_hand = self.in_hand.iter().filter(|(_, gone)| gone.may_be_lost());
        let in_hand: u64 = in_hand.map(|(_, gone)| gone.blocks).sum();
        self.unsaid + in_hand + self.in_background().1
    }

    fn is_possible(&self, own: u64) -> bool {
        let least = self.quarantined * BLOCK_SIZE;
        (least..=least + self.doubtful() * BLOCK_SIZE).contains(&own)
    }

    /// Compares the pool's accounts with the model's.
    pub(super) fn check_books(&mut self) {
        let (accounts, own) = self.accounts();
        assert_eq!(
            accounts.total(),
            self.knobs.blocks() * BLOCK_SIZE,
            "{accounts:?}"
        );
        assert_eq!(accounts.leased, self.leased() * BLOCK_SIZE, "{accounts:?}");
        let in_hand: u64 = self.in_hand.iter().map(|(_, gone)| gone.blocks).sum();
        let background = self.in_background().0;
        assert!(
            accounts.dirty <= (in_hand + background) * BLOCK_SIZE,
            "{accounts:?}"
        );
        let certain = self.in_hand.iter().all(|(_, gone)| !gone.may_be_lost());
        if certain {
            assert!(accounts.dirty >= in_hand * BLOCK_SIZE, "{accounts:?}");
            if accounts.dirty == in_hand * BLOCK_SIZE {
                // All that nobody has a ticket for is done, but that a shareable lease is listed as withheld after it is in
                // quarantine.
                let explained = (self.quarantined + self.unsaid) * BLOCK_SIZE;
                let unlisted = own > explained;
                for gone in std::mem::take(&mut self.unattended) {
                    if !gone.may_lose {
                        continue;
                    }
                    if !gone.shareable {
                        self.unsaid += gone.blocks;
                    } else if unlisted {
                        self.unattended.push(gone);
                    }
                }
            }
        }
    }

    /// Waits for everything that was retired, and looks at the accounts.
    pub(super) fn settle_background(&mut self) {
        self.pool().set_scrub_rate(None);
        while !self.tickets.is_empty() {
            self.ticket(0, super::TicketWay::Wait);
        }
        let deadline = Instant::now() + PATIENCE;
        while !self.unattended.is_empty() && self.in_hand.is_empty() {
            self.check_books();
            assert!(Instant::now() < deadline, "the background does not finish");
            thread::yield_now();
        }
        self.check_books();
    }

    /// Tries to get back what is withheld. What nobody has any more does come back.
    pub(super) fn reclaim(&mut self) {
        let faults = self.faults();
        self.pool().reclaim();
        let met = faults.is_some_and(|faults| faults.hits() > 0);
        if met || self.knobs.pages == super::Pages::Huge2M || self.in_background().0 > 0 {
            return;
        }
        for withheld in self.pool().withheld() {
            assert!(
                withheld.for_good
                    || self.peers.have(withheld.lease)
                    || self.peers.may_linger(withheld.lease),
                "nobody has it and it does not come back: {withheld:?}"
            );
        }
    }

    /// Leases everything that is free, one block at a time so that none can hide, and looks at it.
    pub(super) fn check_free_memory(&mut self) {
        let before = self.accounts().0;
        let mut guests = Vec::new();
        while let Ok(lease) = self.pool().lease(&regions(&[(0, BLOCK_SIZE)])) {
            let mut guest = super::Guest::new(lease);
            self.see(&mut guest);
            guests.push(guest);
        }
        // What is withheld may have come back meanwhile, and the background may have gone on.
        let count = guests.len() as u64 * BLOCK_SIZE;
        assert!(
            count >= before.clean,
            "{count} bytes of {before:?} could be leased"
        );
        for guest in guests {
            assert_eq!(teardown(guest.lease).bytes_quarantined, 0);
        }
    }
}
