//! Books that do not add up: nothing of the memory becomes clean, whichever number is wrong.

use super::account::Lost;
use super::receipt::QuarantineReason;
use super::steps::{Steps, take_away};
use super::{Quiesced, TeardownError};
use crate::pool::blocks::Verified;
use crate::scrub::Work;
use crate::{BLOCK_SIZE, PageSize, Pool};
use vm_memory::GuestAddress;

const BLOCKS: u64 = 3;
const PAGE: u64 = 4096;

/// Tears a guest's memory down to the last step, changes a number, and takes that step.
fn refused_after(change: impl FnOnce(&mut Steps<Verified>)) -> &'static str {
    let builder = Pool::builder().capacity(BLOCKS * BLOCK_SIZE);
    let pool = builder.page_size(PageSize::Base4K).build().unwrap();
    let lease = pool
        .lease(&[(GuestAddress(0), BLOCKS * BLOCK_SIZE)])
        .unwrap();
    for (region, start) in lease.host_addresses() {
        // SAFETY: the lease's memory, which nobody else uses.
        unsafe { start.write_bytes(1, region.bytes as usize) };
    }
    // SAFETY: as above.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    let mut steps = take_away(lease, quiesced).unwrap();
    steps.find_populated();
    let job = steps.job(Work::ZeroAndRead);
    let (zeroed, verdict) = steps.run(&job);
    let mut steps = steps.scrubbed(&zeroed).verified(&verdict);
    change(&mut steps);
    let result = steps.recycle();
    let accounts = pool.accounts();
    match result {
        Ok(_) => {
            assert_eq!(accounts.clean, BLOCKS * BLOCK_SIZE);
            ""
        }
        Err(TeardownError::Unaccounted { what, .. }) => {
            assert_eq!(accounts.quarantined, BLOCKS * BLOCK_SIZE, "{what}");
            what
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn each_number_that_is_wrong_is_noticed_and_nothing_is_clean() {
    assert_eq!(refused_after(|_| ()), "");
    assert_eq!(
        refused_after(|steps| steps.answered -= PAGE),
        "what the kernel was asked about"
    );
    assert_eq!(
        refused_after(|steps| steps.receipt.bytes_scrubbed -= PAGE),
        "what was scrubbed"
    );
    let lost: Lost = [(0, (QuarantineReason::NotZero, String::new()))].into();
    assert_eq!(
        refused_after(|steps| steps.lost = lost),
        "the blocks of the lease"
    );
    assert_eq!(
        refused_after(|steps| steps.receipt.bytes_total += PAGE),
        "the sum of all parts"
    );
    assert_eq!(
        refused_after(|steps| steps.receipt.bytes_verified -= PAGE),
        "what was read back"
    );
}
