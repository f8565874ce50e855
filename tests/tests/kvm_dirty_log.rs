//! KVM's dirty log does not know what the host wrote, so it must not decide what is scrubbed.

use vm_memory::{Bytes, GuestAddress};
use vm_scrub::kvm::MemslotOptions;
use vm_scrub::{BLOCK_SIZE, PageSize};
use vm_scrub_tests::kvm::{ABOVE_HOLE, LIMIT, Vm, secret};
use vm_scrub_tests::{PAGE, kvm_on_every_page_size, pool, regions};
use vm_scrub_vmm::{Guest, Machine, write_packets};

kvm_on_every_page_size!(
    what_the_dirty_log_does_not_know_is_scrubbed: 4,
    without_the_option_there_is_no_log: 4,
);

const LAYOUT: [(u64, u64); 2] = [(0, 2 * BLOCK_SIZE), (ABOVE_HOLE, 2 * BLOCK_SIZE)];

/// The pages of a slot that KVM has logged since it was asked last, as guest addresses.
fn dirty_pages(vm: &Vm, slot: usize) -> Vec<u64> {
    let (start, bytes) = LAYOUT[slot];
    let log = vm
        .machine
        .vm()
        .get_dirty_log(slot as u32, bytes as usize)
        .expect("a log");
    let is_dirty = |page: u64| log[page as usize / 64] >> (page % 64) & 1 == 1;
    (0..bytes / PAGE)
        .filter(|page| is_dirty(*page))
        .map(|page| start + page * PAGE)
        .collect()
}

fn what_the_dirty_log_does_not_know_is_scrubbed(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let layout = regions(&LAYOUT);
    for generation in 0..3 {
        let options = MemslotOptions::new().log_dirty_pages(true);
        let vm = Vm::with(
            Machine::new(2).unwrap(),
            pool.lease(&layout).unwrap(),
            options,
        );
        vm.assert_zero();
        // Where a guest reads first, KVM logs the page too. Asking begins a new log.
        for slot in 0..LAYOUT.len() {
            dirty_pages(&vm, slot);
        }
        // The guest writes every fifth page of the first region, the host everywhere else and in the second region.
        let pages: Vec<u64> = (0..2 * BLOCK_SIZE).step_by(5 * PAGE as usize).collect();
        let own: Vec<(u64, u64)> = pages.iter().map(|page| (*page, PAGE)).collect();
        vm.machine.fill(&own, secret(generation), LIMIT).unwrap();
        let memory = vm.lease.memory();
        let packets = write_packets(&memory, secret(100)).unwrap();
        for page in (0..BLOCK_SIZE).step_by(PAGE as usize) {
            memory
                .write_obj(secret(101), GuestAddress(ABOVE_HOLE + page))
                .unwrap();
        }
        drop(memory);
        let logged = dirty_pages(&vm, 0);
        let missing = pages.iter().find(|page| !logged.contains(page));
        assert_eq!(missing, None, "the guest's writes are logged");
        assert!(dirty_pages(&vm, 1).is_empty(), "the host's are not");
        assert!(packets.iter().any(|packet| packet.0 >= ABOVE_HOLE));

        let (receipt, _machine) = vm.teardown();
        assert!(receipt.is_proven(), "{receipt:?}");
        assert!(receipt.bytes_scrubbed >= (pages.len() as u64) * PAGE + BLOCK_SIZE);
        let next = Vm::boot(pool.lease(&layout).unwrap(), 2);
        assert_eq!(next.lease.blocks(), receipt.blocks);
        next.assert_zero();
        assert!(next.teardown().0.is_proven());
    }
}

fn without_the_option_there_is_no_log(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let vm = Vm::boot(pool.lease(&regions(&LAYOUT)).unwrap(), 1);
    vm.fill(secret(1));
    assert!(
        vm.machine
            .vm()
            .get_dirty_log(0, 2 * BLOCK_SIZE as usize)
            .is_err()
    );
    assert!(vm.teardown().0.is_proven());
}
