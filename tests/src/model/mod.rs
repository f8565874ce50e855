//! Pools and guests against a model of them, for tests that make up what happens: property tests and fuzzing.
//!
//! A [`Model`] is told what to do, one [`Op`] after the other, does it to a real pool, and knows what must come of it: a new
//! guest reads zero, a guest reads what it has written until it is torn down, receipts and accounts add up and are what the
//! model says, and every error is the one that was to be expected. It panics where one of these does not hold.
//!
//! Faults are planned for the calling thread; where one was met, or where the VMM did something to its guest's memory for
//! which quarantine is an answer, the model asks no more than that nothing is lost sight of and nothing dirty is leased.

mod books;
mod chance;
mod gone;
mod guest;
mod knobs;
mod layout;
mod leasing;
mod op;
mod peers;
mod returning;
mod vmm;

pub use knobs::{Knobs, Level, Odd, Pages, Rate};
pub use op::{Fault, Half, Holding, Meddling, Op, Region, TicketWay, Way};

pub(crate) use layout::check as check_layout;

use gone::Gone;
use guest::Guest;
use peers::Peers;
use std::collections::BTreeSet;
use std::ops::Range;
use vm_memory::GuestMemoryMmap;
use vm_scrub::lease::teardown::{DirtyMemory, ScrubbedMemory, VerifiedMemory};
use vm_scrub::test_support::{FaultGuard, inject};
use vm_scrub::{BLOCK_SIZE, Lease, Pool, Ticket};

/// How many things may be done to one pool: more make a case slow and no better.
pub const MOST_OPS: usize = 48;

/// Memory in the middle of its teardown.
#[derive(Debug)]
enum Stage {
    Dirty(DirtyMemory),
    Scrubbed(ScrubbedMemory),
    Verified(VerifiedMemory),
}

/// A pool, everything that was leased from it, and what must be true of them.
#[derive(Debug)]
pub struct Model {
    knobs: Knobs,
    /// Dropped before the pool by [`Model::finish`].
    pool: Option<Pool>,
    guests: Vec<Guest>,
    tickets: Vec<(Ticket, Gone)>,
    in_hand: Vec<(Stage, Gone)>,
    /// Retired, and nobody has the ticket.
    unattended: Vec<Gone>,
    /// Leases that nobody gives back. They are given up when all is over, so that a process can run many models.
    forgotten: Vec<(Lease, u64)>,
    /// Handles that outlived their lease.
    kept: Vec<GuestMemoryMmap>,
    peers: Peers,
    /// Blocks in quarantine for good, without those of shareable leases: [`Pool::withheld`] lists these.
    quarantined: u64,
    /// Blocks that may be in quarantine, and nobody says so: their lease was never made, or nobody waited for the receipt.
    unsaid: u64,
    /// For each block, the pages that a guest has ever written.
    dirtied: Vec<BTreeSet<u64>>,
    /// Windows that the library has left open for good.
    left_open: Vec<Range<usize>>,
    /// Faults for the next thing that is done.
    planned: Option<Fault>,
    /// What the VMM has mapped over its guests' memory, and nobody may write to.
    files: Vec<std::fs::File>,
}

/// Builds the pool that `knobs` describe, does all of `ops`, and checks what is left. Nothing of it stays behind.
pub fn run(knobs: Knobs, ops: impl IntoIterator<Item = Op>) {
    let Some(mut model) = Model::new(knobs) else {
        return;
    };
    for op in ops.into_iter().take(MOST_OPS) {
        model.step(&op);
    }
    model.finish();
}

impl Model {
    /// Builds the pool; `None` where that was to fail and did, or where the host has not what it takes.
    pub fn new(knobs: Knobs) -> Option<Self> {
        let pool = knobs.build()?;
        let blocks = knobs.blocks();
        assert_eq!(pool.capacity(), blocks * BLOCK_SIZE);
        assert_eq!(pool.accounts().clean, pool.capacity());
        Some(Self {
            knobs,
            pool: Some(pool),
            guests: Vec::new(),
            tickets: Vec::new(),
            in_hand: Vec::new(),
            unattended: Vec::new(),
            forgotten: Vec::new(),
            kept: Vec::new(),
            peers: Peers::default(),
            quarantined: 0,
            unsaid: 0,
            dirtied: vec![BTreeSet::new(); blocks as usize],
            left_open: Vec::new(),
            planned: None,
            files: Vec::new(),
        })
    }

    fn pool(&self) -> &Pool {
        self.pool.as_ref().expect("the pool lives until `finish`")
    }

    /// Does one thing and checks everything that it may have changed.
    pub fn step(&mut self, op: &Op) {
        match op {
            Op::Fault(fault) => {
                self.planned = Some(fault.clone());
                return;
            }
            Op::Lease { regions, shareable } => self.lease(regions, *shareable),
            Op::Write { .. } | Op::Smear { .. } | Op::Look { .. } => self.touch(op),
            Op::Vmm { .. } => self.meddle(op),
            Op::Pin { .. } | Op::Share { .. } | Op::LetGo(_) => self.hold(op),
            Op::Handle(guest) => self.take_handle(*guest),
            Op::Teardown { guest, way } => self.tear_down(*guest, *way),
            Op::Drop { guest, holding } => self.drop_lease(*guest, *holding),
            Op::Confuse { one, other } => self.confuse(*one, *other),
            Op::Forget(guest) => self.forget(*guest),
            Op::Proceed { which, to_the_end } => self.proceed(*which, *to_the_end),
            Op::Ticket { which, way } => self.ticket(*which, *way),
            Op::Reclaim => self.reclaim(),
            Op::Rate(rate) => self.pool().set_scrub_rate(rate.map(Into::into)),
        }
        self.check_books();
    }

    /// The faults that were planned for this, and forgets them.
    fn faults(&mut self) -> Option<FaultGuard> {
        let fault = self.planned.take()?;
        Some(inject(
            fault.call(),
            fault.skip(),
            fault.times(),
            fault.errno(),
        ))
    }

    /// Looks at everything once more, and takes everything down.
    pub fn finish(mut self) {
        self.planned = None;
        for guest in &self.guests {
            guest.check_all(self.knobs.thorough);
        }
        self.settle_background();
        self.check_free_memory();
        for file in &self.files {
            vmm::assert_untouched(file);
        }
        self.clear();
    }

    /// Lets go of everything, the pool last, and closes what the library has to leave open.
    fn clear(&mut self) {
        self.peers.clear();
        self.kept.clear();
        for guest in std::mem::take(&mut self.guests) {
            let (windows, tampered) = (guest.windows.clone(), guest.may_lose);
            drop(guest.held);
            let quiesced = crate::quiesce(&guest.lease);
            match guest.lease.teardown(quiesced) {
                Ok(receipt) => gone::left_open(&receipt, &windows, &mut self.left_open),
                Err(error) => assert!(tampered, "{error}"),
            }
        }
        self.tickets.clear();
        self.in_hand.clear();
        for (lease, _) in std::mem::take(&mut self.forgotten) {
            let quiesced = crate::quiesce(&lease);
            drop(lease.teardown(quiesced));
        }
        self.pool = None;
        for window in self.left_open.drain(..) {
            let start = std::ptr::without_provenance_mut::<libc::c_void>(window.start);
            // SAFETY: the library has left this window to whoever may still use it, for ever. That was the guest, which is
            // gone, and handles, which are dropped.
            assert_eq!(unsafe { libc::munmap(start, window.len()) }, 0);
        }
    }
}
