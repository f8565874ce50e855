//! A thousand guests, of all sizes, in a pool that holds a few of them at a time.

use std::fs;

use vm_scrub::{BLOCK_SIZE, LeaseError, PageSize};
use vm_scrub_tests::kvm::{ABOVE_HOLE, Vm, secret};
use vm_scrub_tests::numbers::Numbers;
use vm_scrub_tests::{assert_nothing_dirty_left, kvm_on_every_page_size, pool, regions};
use vm_scrub_vmm::{Machine, RESERVED};

kvm_on_every_page_size!(a_thousand_guests: super::POOL_BLOCKS);

const LEASES: usize = 1000;

/// 64 MiB.
const POOL_BLOCKS: u64 = 32;

/// Guests that live at the same time, so that blocks come back in another order than they went.
const LIVE: usize = 3;

/// One to three regions, most of them small and some of up to 8 MiB.
fn shape(numbers: &mut Numbers, granularity: u64) -> Vec<(u64, u64)> {
    let places = [0, RESERVED.start - 8 * BLOCK_SIZE, ABOVE_HOLE];
    let first = numbers.below(3) as usize;
    places[..=first]
        .iter()
        .map(|place| {
            let limit = [BLOCK_SIZE / 8, BLOCK_SIZE, 4 * BLOCK_SIZE][numbers.below(3) as usize];
            let bytes = 1 + numbers.below(limit);
            (*place, bytes.next_multiple_of(granularity))
        })
        .collect()
}

fn mappings() -> usize {
    fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}

fn a_thousand_guests(page_size: PageSize) {
    let pool = pool(page_size, POOL_BLOCKS);
    let mut numbers = Numbers(0x5eed_0f10_001e_a500);
    let mut live: Vec<(Vm, u64)> = Vec::new();
    let mut machines = Vec::new();
    let (mut warm, mut most, mut leased) = (0, 0, 0);
    for number in 0..LEASES as u64 {
        let shape = shape(&mut numbers, page_size.granularity());
        let lease = loop {
            match pool.lease(&regions(&shape)) {
                Ok(lease) if live.len() < LIVE => break lease,
                Ok(unused) => drop(unused),
                Err(LeaseError::NotEnough { .. }) if !live.is_empty() => {}
                Err(error) => panic!("{error}"),
            }
            let (vm, secret) = live.swap_remove(numbers.below(live.len() as u64) as usize);
            assert_eq!(
                vm.count(secret),
                vm.lease.bytes(),
                "nobody else writes here"
            );
            let (receipt, machine) = vm.teardown();
            machines.push(machine);
            assert!(receipt.is_proven(), "{receipt:?}");
            assert_eq!(receipt.bytes_scrubbed, receipt.bytes_total);
        };
        leased += lease.bytes();
        // A new machine takes ten times as long as all else, so only some guests have one. Slots are new for each.
        let used = machines.pop().filter(|_| number % 16 > 0);
        let vm = Vm::on(
            used.unwrap_or_else(|| Machine::new(1 + number as usize / 16 % 2).unwrap()),
            lease,
        );
        vm.assert_zero();
        vm.fill(secret(number));
        live.push((vm, secret(number)));

        let accounts = pool.accounts();
        let held: u64 = live
            .iter()
            .flat_map(|(vm, _)| vm.lease.blocks())
            .map(|extent| extent.blocks)
            .sum();
        assert_eq!(accounts.leased, held * BLOCK_SIZE);
        assert_eq!((accounts.dirty, accounts.quarantined), (0, 0));
        assert_eq!(accounts.total(), POOL_BLOCKS * BLOCK_SIZE);
        if number == LEASES as u64 / 10 {
            warm = mappings();
        }
        if number > LEASES as u64 / 10 {
            most = most.max(mappings());
        }
    }
    for (vm, _) in live {
        assert!(vm.teardown().0.is_proven());
    }
    assert!(leased > 10 * pool.capacity(), "{leased} bytes");
    // A mapping left behind by each lease would be nine hundred more. Tests at the same time have some of their own.
    assert!(
        most < warm + 120,
        "{warm} mappings after a tenth of the leases, then up to {most}"
    );
    assert_eq!(pool.accounts().clean, pool.capacity());
    assert_nothing_dirty_left(&pool);
}
