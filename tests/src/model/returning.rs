//! Memory on its way back, along every way that there is.

use super::gone::{self, Gone};
use super::op::{Half, Holding, TicketWay, Way};
use super::{Guest, Model, Stage};
use crate::quiesce;
use vm_scrub::lease::{Cancelled, Refusal};
use vm_scrub::{Lease, Priority, Quiesced, ScrubReceipt, TeardownError};

/// What came of a teardown that was begun.
enum Begun {
    Receipt(Box<ScrubReceipt>),
    Stage(Box<Stage>),
    Dropped,
    Ticket(vm_scrub::Ticket),
}

fn begin(lease: Lease, quiesced: Quiesced, way: Way) -> Result<Begun, TeardownError> {
    let half = match way {
        Way::AtOnce => return Ok(Begun::Receipt(Box::new(lease.teardown(quiesced)?))),
        Way::InSteps => {
            let verified = lease.revoke(quiesced)?.scrub().verify();
            return Ok(Begun::Receipt(Box::new(verified.recycle()?)));
        }
        Way::Retired | Way::RetiredUnattended => return Ok(Begun::Ticket(lease.retire(quiesced)?)),
        Way::HalfWay(half) | Way::DroppedHalfWay(half) => half,
    };
    let dirty = lease.revoke(quiesced)?;
    let stage = match half {
        Half::Revoked => Stage::Dirty(dirty),
        Half::Scrubbed => Stage::Scrubbed(dirty.scrub()),
        Half::Verified => Stage::Verified(dirty.scrub_and_verify()),
    };
    Ok(match way {
        Way::HalfWay(_) => Begun::Stage(Box::new(stage)),
        _ => {
            drop(stage);
            Begun::Dropped
        }
    })
}

impl Model {
    /// Takes a guest's memory back. While a handle is alive that is refused, and nothing happens.
    pub(super) fn tear_down(&mut self, number: u8, way: Way) {
        let Some(mut guest) = self.pick(number) else {
            return;
        };
        self.see(&mut guest);
        guest.check_all(self.knobs.thorough);
        let quiesced = quiesce(&guest.lease);
        if let Some(handle) = guest.held.take() {
            let lease = match begin(guest.lease, quiesced, way) {
                Err(TeardownError::Refused(refused)) => {
                    assert!(
                        matches!(refused.reason, Refusal::Held { holders: 1 }),
                        "{:?}",
                        refused.reason
                    );
                    refused.into_parts().0
                }
                _ => panic!("a handle is alive and the teardown was not refused"),
            };
            drop(handle);
            self.guests.push(Guest { lease, ..guest });
            return;
        }
        let mut gone = Gone::of(&guest, &self.peers);
        let faults = self.faults();
        let begun = begin(guest.lease, quiesced, way);
        let met = faults.is_some_and(|faults| faults.hits() > 0);
        if met {
            self.met_fault();
            gone.may_lose = true;
        }
        match begun.unwrap_or_else(|error| panic!("{error}")) {
            Begun::Receipt(receipt) => self.settle(&receipt, &gone, met),
            Begun::Stage(stage) => self.in_hand.push((*stage, gone)),
            Begun::Dropped => self.lost(&gone),
            Begun::Ticket(ticket) if way == Way::Retired => self.tickets.push((ticket, gone)),
            Begun::Ticket(ticket) => {
                drop(ticket);
                self.unattended.push(gone);
            }
        }
    }

    /// Checks a receipt and counts what is in quarantine by it.
    fn settle(&mut self, receipt: &ScrubReceipt, gone: &Gone, met_fault: bool) {
        self.quarantined += gone.check(receipt, &self.peers, met_fault);
        gone::left_open(receipt, &gone.windows, &mut self.left_open);
    }

    /// Counts a lease that is in quarantine as a whole.
    fn lost(&mut self, gone: &Gone) {
        if !gone.shareable {
            self.quarantined += gone.blocks;
        }
    }

    /// Drops a lease. Where nobody has ever had its address that is as good as a teardown.
    pub(super) fn drop_lease(&mut self, number: u8, holding: Holding) {
        let Some(mut guest) = self.pick(number) else {
            return;
        };
        if !guest.unseen {
            guest.check_all(self.knobs.thorough);
        }
        let mut handle = guest.held.take();
        if holding == Holding::Handle {
            self.see(&mut guest);
            handle.get_or_insert_with(|| guest.lease.memory());
        }
        let mut gone = Gone::of(&guest, &self.peers);
        let faults = self.faults();
        drop(guest.lease);
        if faults.is_some_and(|faults| faults.hits() > 0) {
            self.met_fault();
            gone.may_lose = true;
        }
        if let Some(handle) = handle {
            self.kept.push(handle);
            let windows = gone.windows.iter();
            self.left_open
                .extend(windows.map(|(region, start)| *start..*start + region.bytes as usize));
        }
        if !guest.unseen {
            self.lost(&gone);
        } else if gone.may_lose {
            self.unsaid += gone.blocks;
        }
    }

    /// A teardown with the statement about another guest is refused.
    pub(super) fn confuse(&mut self, one: u8, other: u8) {
        let Some(one) = self.pick(one) else {
            return;
        };
        let Some(other) = self.pick(other) else {
            return self.guests.push(one);
        };
        let quiesced = quiesce(&other.lease);
        let (expected, named) = (one.lease.id(), other.lease.id());
        let error = one
            .lease
            .teardown(quiesced)
            .expect_err("the statement is about another lease");
        let TeardownError::Refused(refused) = error else {
            panic!("{error}");
        };
        assert!(
            matches!(refused.reason, Refusal::OtherLease { lease, quiesced } if (lease, quiesced) == (expected, named)),
            "{:?}",
            refused.reason
        );
        let lease = refused.into_parts().0;
        self.guests.extend([Guest { lease, ..one }, other]);
    }

    /// Forgets a lease.
    pub(super) fn forget(&mut self, number: u8) {
        if let Some(guest) = self.pick(number) {
            let blocks = guest.blocks.len() as u64;
            self.forgotten.push((guest.lease, blocks));
        }
    }

    /// The VMM keeps a handle.
    pub(super) fn take_handle(&mut self, number: u8) {
        if let Some(mut guest) = self.pick(number) {
            self.see(&mut guest);
            let lease = &guest.lease;
            guest.held.get_or_insert_with(|| lease.memory());
            self.guests.push(guest);
        }
    }

    /// Goes on with a teardown that was stopped.
    pub(super) fn proceed(&mut self, which: u8, to_the_end: bool) {
        if self.in_hand.is_empty() {
            return;
        }
        let number = usize::from(which) % self.in_hand.len();
        let (stage, mut gone) = self.in_hand.swap_remove(number);
        let faults = self.faults();
        let (mut stage, mut receipt) = (Some(stage), None);
        while let Some(before) = stage.take() {
            stage = match before {
                Stage::Dirty(memory) if to_the_end => {
                    Some(Stage::Verified(memory.scrub_and_verify()))
                }
                Stage::Dirty(memory) => Some(Stage::Scrubbed(memory.scrub())),
                Stage::Scrubbed(memory) => Some(Stage::Verified(memory.verify())),
                Stage::Verified(memory) => {
                    receipt = Some(memory.recycle().unwrap_or_else(|error| panic!("{error}")));
                    None
                }
            };
            if !to_the_end {
                break;
            }
        }
        let met = faults.is_some_and(|faults| faults.hits() > 0);
        if met {
            self.met_fault();
            gone.may_lose = true;
        }
        if let Some(receipt) = receipt {
            self.settle(&receipt, &gone, met);
        }
        if let Some(stage) = stage {
            self.in_hand.push((stage, gone));
        }
    }

    /// Does something with a ticket.
    pub(super) fn ticket(&mut self, which: u8, way: TicketWay) {
        if self.tickets.is_empty() {
            return;
        }
        let number = usize::from(which) % self.tickets.len();
        let (ticket, mut gone) = self.tickets.swap_remove(number);
        assert_eq!(ticket.lease(), gone.lease);
        let progress = ticket.progress();
        assert!(progress.bytes_done <= progress.bytes_total);
        let faults = self.faults();
        let outcome = match way {
            TicketWay::Wait => Some(ticket.wait()),
            TicketWay::WaitInBackground => Some(ticket.wait_in_background()),
            TicketWay::Cancel => match ticket.cancel() {
                Cancelled::Finished(outcome) => {
                    // What was sealed just now is in quarantine until somebody has read it back.
                    gone.may_lose |= gone.shareable;
                    Some(*outcome)
                }
                Cancelled::Dirty(memory) => {
                    self.in_hand.push((Stage::Dirty(*memory), gone));
                    return;
                }
            },
            TicketWay::Priority(level) => {
                ticket.set_priority(
                    [Priority::Low, Priority::Normal, Priority::High][usize::from(level) % 3],
                );
                self.tickets.push((ticket, gone));
                return;
            }
            TicketWay::Drop => {
                drop(ticket);
                self.unattended.push(gone);
                return;
            }
        };
        let met = faults.is_some_and(|faults| faults.hits() > 0);
        if met {
            self.met_fault();
            gone.may_lose = true;
        }
        let receipt = outcome
            .expect("there is one")
            .unwrap_or_else(|error| panic!("{error}"));
        self.settle(&receipt, &gone, met);
    }
}
