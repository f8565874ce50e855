//! Random guests against a model: a guest sees zeros where it has written nothing and its own bytes where it has, and the
//! pool has as many blocks in each state as the model.

use proptest::prelude::*;
use std::collections::BTreeMap;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::lease::LeaseError;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool};
use vm_scrub_tests::{PAGE, assert_nothing_dirty_left, pool, quiesce, regions, teardown};

const BLOCKS: u64 = 8;

#[derive(Debug, Clone)]
enum Step {
    /// Regions, as pages of gap before and pages of length.
    Lease(Vec<(u64, u64)>),
    /// Writes a byte to a guest: which guest, which of its pages, where in it, and what.
    Write(usize, u64, u64, u8),
    /// Writes all of a page.
    Fill(usize, u64, u8),
    Teardown(usize),
    /// The lease goes without a teardown; whether a handle stays behind.
    Drop(usize, bool),
    /// Revoked, and never scrubbed.
    Abandon(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let region = (0..600_u64, prop_oneof![1..8_u64, 500..530_u64, 1..1600_u64]);
    prop_oneof![
        4 => prop::collection::vec(region, 1..4).prop_map(Step::Lease),
        8 => (any::<usize>(), any::<u64>(), 0..PAGE, 1..=u8::MAX)
            .prop_map(|(guest, page, at, byte)| Step::Write(guest, page, at, byte)),
        4 => (any::<usize>(), any::<u64>(), 1..=u8::MAX)
            .prop_map(|(guest, page, byte)| Step::Fill(guest, page, byte)),
        4 => any::<usize>().prop_map(Step::Teardown),
        1 => (any::<usize>(), any::<bool>()).prop_map(|(guest, keep)| Step::Drop(guest, keep)),
        1 => any::<usize>().prop_map(Step::Abandon),
    ]
}

/// A guest, and what it must see: pages that it has written.
struct Guest {
    lease: Lease,
    blocks: u64,
    written: BTreeMap<u64, Vec<u8>>,
}

impl Guest {
    /// The guest address of the page of this number, wrapping.
    fn page(&self, number: u64) -> u64 {
        let mut page = number % (self.lease.bytes() / PAGE);
        for region in self.lease.guest_regions() {
            if page < region.bytes / PAGE {
                return region.guest_address + page * PAGE;
            }
            page -= region.bytes / PAGE;
        }
        unreachable!("a page number below the sum is in one of the regions")
    }

    fn write(&mut self, page: u64, at: u64, bytes: &[u8]) {
        let start = self.page(page);
        let memory = self.lease.memory();
        memory.write_slice(bytes, GuestAddress(start + at)).unwrap();
        let page = self.written.entry(start);
        let page = page.or_insert_with(|| vec![0; PAGE as usize]);
        page[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Compares every byte.
    fn check(&self) -> Result<(), TestCaseError> {
        let memory = self.lease.memory();
        let zeros = [0_u8; PAGE as usize];
        let mut seen = [0xff_u8; PAGE as usize];
        for region in self.lease.guest_regions() {
            for page in (0..region.bytes).step_by(PAGE as usize) {
                let start = region.guest_address + page;
                memory.read_slice(&mut seen, GuestAddress(start)).unwrap();
                let expected = self.written.get(&start).map_or(&zeros[..], |page| page);
                prop_assert!(seen[..] == *expected, "page at {:#x}", start);
            }
        }
        Ok(())
    }
}

/// Takes the guest of this number, wrapping, if there is one.
fn pick(guests: &mut Vec<Guest>, number: usize) -> Option<Guest> {
    let count = guests.len();
    (count > 0).then(|| guests.swap_remove(number % count))
}

fn run(page_size: PageSize, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let pool: Pool = pool(page_size, BLOCKS);
    let mut guests: Vec<Guest> = Vec::new();
    let mut kept = Vec::new();
    let mut quarantined = 0;
    for step in steps {
        let leased: u64 = guests.iter().map(|guest| guest.blocks).sum();
        match step {
            Step::Lease(wanted) => {
                let blocks: u64 = wanted
                    .iter()
                    .map(|(_, pages)| (pages * PAGE).div_ceil(BLOCK_SIZE))
                    .sum();
                let mut end = 0;
                let mut layout = Vec::new();
                for (gap, pages) in wanted {
                    layout.push((end + gap * PAGE, pages * PAGE));
                    end += (gap + pages) * PAGE;
                }
                // In any order.
                layout.reverse();
                match pool.lease(&regions(&layout)) {
                    Ok(lease) => {
                        prop_assert!(leased + quarantined + blocks <= BLOCKS);
                        let guest = Guest {
                            lease,
                            blocks,
                            written: BTreeMap::new(),
                        };
                        guest.check()?;
                        guests.push(guest);
                    }
                    Err(LeaseError::NotEnough { .. }) => {
                        prop_assert!(leased + quarantined + blocks > BLOCKS);
                    }
                    Err(other) => return Err(TestCaseError::fail(other.to_string())),
                }
            }
            Step::Write(number, page, at, byte) => {
                if let Some(mut guest) = pick(&mut guests, number) {
                    guest.write(page, at, &[byte]);
                    guests.push(guest);
                }
            }
            Step::Fill(number, page, byte) => {
                if let Some(mut guest) = pick(&mut guests, number) {
                    guest.write(page, 0, &[byte; PAGE as usize]);
                    guests.push(guest);
                }
            }
            Step::Teardown(number) => {
                if let Some(guest) = pick(&mut guests, number) {
                    guest.check()?;
                    let receipt = teardown(guest.lease);
                    prop_assert!(receipt.is_proven());
                    prop_assert!(receipt.bytes_scrubbed >= guest.written.len() as u64 * PAGE);
                }
            }
            Step::Drop(number, keep) => {
                if let Some(guest) = pick(&mut guests, number) {
                    // The handle makes it certain that the memory was seen.
                    let memory = guest.lease.memory();
                    if keep {
                        kept.push(memory);
                    }
                    drop(guest.lease);
                    quarantined += guest.blocks;
                }
            }
            Step::Abandon(number) => {
                if let Some(guest) = pick(&mut guests, number) {
                    let quiesced = quiesce(&guest.lease);
                    drop(guest.lease.revoke(quiesced).unwrap());
                    quarantined += guest.blocks;
                }
            }
        }
        let accounts = pool.accounts();
        let leased: u64 = guests.iter().map(|guest| guest.blocks).sum();
        prop_assert_eq!(accounts.leased, leased * BLOCK_SIZE);
        prop_assert_eq!(accounts.quarantined, quarantined * BLOCK_SIZE);
        prop_assert_eq!(accounts.total(), BLOCKS * BLOCK_SIZE);
        prop_assert_eq!(accounts.dirty, 0);
    }
    for guest in &guests {
        guest.check()?;
    }
    assert_nothing_dirty_left(&pool);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(160))]

    #[test]
    fn guests_see_zeros_and_what_they_wrote_4k(steps in prop::collection::vec(step(), 1..40)) {
        run(PageSize::Base4K, steps)?;
    }

    #[test]
    fn guests_see_zeros_and_what_they_wrote_thp(steps in prop::collection::vec(step(), 1..40)) {
        run(PageSize::Transparent, steps)?;
    }
}
