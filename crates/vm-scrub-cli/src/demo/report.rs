//! What the demonstration found, as `--json` prints it.

use super::guest::GuestKind;
use super::{can_prove, secrets};
use crate::args::DemoArgs;
use serde::Serialize;
use vm_scrub::lease::{QuarantineReason, QuarantinedRange};
use vm_scrub::{Accounts, Extent, PageSize, Pool, ScrubReceipt};
use vm_scrub_vmm::Scan;

/// The whole demonstration.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// What ran the guests.
    pub(crate) guest: GuestKind,
    /// Memory of each guest, in bytes.
    pub(crate) memory_bytes: u64,
    pub(crate) page_size: PageSize,
    pub(crate) vcpus: u32,
    /// Bytes of secrets that the VMM saw in the first guest's memory just before its teardown.
    pub(crate) secret_bytes_found_before_teardown: u64,
    /// Whether every guest had the same blocks of the pool, and there was more than one.
    pub(crate) same_blocks: bool,
    /// Bytes that were not zero when a guest looked at its memory for the first time, all guests together.
    pub(crate) leaked_bytes: u64,
    /// Whether every teardown was proven: all of the memory read back as zero, or never populated.
    pub(crate) proven: bool,
    /// Why a guest got no memory, if one did not.
    pub(crate) refused: Option<String>,
    /// What became of the writes of a device that did not stop.
    pub(crate) late_writes: Option<LateWrites>,
    /// The pool's accounts at the end.
    pub(crate) accounts: Accounts,
    pub(crate) guests: Vec<GuestReport>,
    /// One for each teardown, oldest first.
    pub(crate) receipts: Vec<ScrubReceipt>,
    #[serde(skip)]
    pub(crate) args_can_prove: bool,
    #[serde(skip)]
    pool: Pool,
}

/// One guest.
#[derive(Debug, Serialize)]
pub(crate) struct GuestReport {
    pub(crate) name: String,
    /// The pool's blocks behind its memory.
    pub(crate) blocks: Vec<Extent>,
    /// Bytes it read when it looked at its memory for the first time; 0 for the first guest.
    pub(crate) bytes_read: u64,
    /// Bytes of those that were not zero.
    pub(crate) leaked_bytes: u64,
    /// Where the first of them was, and whose.
    pub(crate) first_leak: Option<Leak>,
    /// Bytes of secrets that the VMM saw in its memory just before its teardown.
    pub(crate) secret_bytes_before_teardown: u64,
}

/// A word that a guest should not have seen.
#[derive(Debug, Serialize)]
pub(crate) struct Leak {
    pub(crate) guest_address: u64,
    pub(crate) value: u64,
    /// Who had written it, if it is one of the demonstration's secrets.
    pub(crate) written_by: Option<String>,
}

/// Writes of the stray device, counted.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct LateWrites {
    /// Writes that reached the first guest's memory up to the end of its teardown.
    pub(crate) landed_before_revocation: u64,
    /// Writes that reached any memory afterwards.
    pub(crate) landed_after_revocation: u64,
    /// Writes that the kernel refused.
    pub(crate) refused: u64,
}

impl Report {
    pub(crate) fn new(guest: GuestKind, args: &DemoArgs, pool: &Pool) -> Self {
        Self {
            guest,
            memory_bytes: args.memory,
            page_size: args.page_size,
            vcpus: args.vcpus,
            secret_bytes_found_before_teardown: 0,
            same_blocks: false,
            leaked_bytes: 0,
            proven: false,
            refused: None,
            late_writes: None,
            accounts: pool.accounts(),
            guests: Vec::new(),
            receipts: Vec::new(),
            args_can_prove: can_prove(args.verify),
            pool: pool.clone(),
        }
    }

    pub(crate) fn add(&mut self, guest: GuestReport, receipt: ScrubReceipt) {
        self.guests.push(guest);
        self.receipts.push(receipt);
    }

    /// Draws the conclusions.
    pub(crate) fn close(&mut self) {
        let blocks = |guest: &GuestReport| -> Vec<u64> {
            let mut blocks: Vec<u64> = guest
                .blocks
                .iter()
                .flat_map(|extent| extent.first..extent.first + extent.blocks)
                .collect();
            blocks.sort_unstable();
            blocks
        };
        self.same_blocks = self.guests.len() > 1
            && self
                .guests
                .windows(2)
                .all(|pair| blocks(&pair[0]) == blocks(&pair[1]));
        self.leaked_bytes = self.guests.iter().map(|guest| guest.leaked_bytes).sum();
        self.secret_bytes_found_before_teardown = self
            .guests
            .first()
            .map_or(0, |guest| guest.secret_bytes_before_teardown);
        self.proven = self.refused.is_none() && self.receipts.iter().all(ScrubReceipt::is_proven);
        self.accounts = self.pool.accounts();
    }

    /// The first memory in quarantine for another reason than that verification found something in it, if nothing else is.
    pub(crate) fn first_lost_otherwise(&self) -> Option<&QuarantinedRange> {
        let mut lost = self.receipts.iter().flat_map(|each| &each.quarantined);
        let mut all = lost.clone();
        let found = all.any(|range| range.reason == QuarantineReason::NotZero);
        lost.next().filter(|_| !found)
    }
}

impl GuestReport {
    pub(crate) fn new(name: &str, blocks: &[Extent]) -> Self {
        Self {
            name: name.to_owned(),
            blocks: blocks.to_vec(),
            bytes_read: 0,
            leaked_bytes: 0,
            first_leak: None,
            secret_bytes_before_teardown: 0,
        }
    }

    pub(crate) fn looked(&mut self, found: Scan) {
        self.bytes_read = found.bytes_read;
        self.leaked_bytes = found.nonzero_bytes;
        self.first_leak = found.first_nonzero.map(|word| Leak {
            guest_address: word.gpa,
            value: word.value,
            written_by: secrets::owner(word.value),
        });
    }
}
