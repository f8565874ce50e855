//! KVM guests whose memory does not begin at 0, has holes, and fills neither pages nor blocks evenly.

use vm_scrub::{BLOCK_SIZE, PageSize};
use vm_scrub_tests::kvm::{ABOVE_HOLE, Vm, assert_out_of_reach, edges, secret};
use vm_scrub_tests::{PAGE, assert_nothing_dirty_left, kvm_on_every_page_size, pool, regions};
use vm_scrub_vmm::{ADDRESS_LIMIT, RESERVED, write_packets};

kvm_on_every_page_size!(guests_of_different_shape_in_the_same_blocks: 12);

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Guest address and length in bytes. In any pages.
const WHOLE_BLOCKS: [&[(u64, u64)]; 5] = [
    &[(0, 24 * MIB)],
    // As on a PC, and in disorder.
    &[(ABOVE_HOLE, 8 * MIB), (0, 6 * MIB), (3 * GIB, 4 * MIB)],
    &[(BLOCK_SIZE, BLOCK_SIZE)],
    // Up to the hole, behind it without a gap, and up to the last address that these guests can have.
    &[
        (RESERVED.start - 4 * MIB, 4 * MIB),
        (RESERVED.end, 2 * MIB),
        (ADDRESS_LIMIT - 6 * MIB, 6 * MIB),
    ],
    // Three neighbours.
    &[
        (64 * MIB, 8 * MIB),
        (72 * MIB, 8 * MIB),
        (80 * MIB, 8 * MIB),
    ],
];

/// With pages of 4 KiB, in which regions need not be whole blocks.
const ODD: [&[(u64, u64)]; 5] = [
    &[(PAGE, PAGE)],
    // The memory of the first PCs, and what comes after.
    &[
        (0, 640 << 10),
        (MIB, 3 * MIB + PAGE),
        (ABOVE_HOLE, 2 * MIB - PAGE),
    ],
    &[
        (3 * PAGE, 513 * PAGE),
        (5 * GIB + PAGE, 511 * PAGE),
        (7 * GIB, 1025 * PAGE),
    ],
    // As many regions as the pool has blocks, each of a page.
    &[
        (0, PAGE),
        (2 * PAGE, PAGE),
        (4 * PAGE, PAGE),
        (GIB, PAGE),
        (GIB + 2 * PAGE, PAGE),
        (2 * GIB, PAGE),
        (3 * GIB, PAGE),
        (RESERVED.start - PAGE, PAGE),
        (RESERVED.end, PAGE),
        (ADDRESS_LIMIT - PAGE, PAGE),
        (64 * GIB, PAGE),
        (32 * GIB, PAGE),
    ],
    // No multiple of a chunk of 256 KiB, of a block, or of the number of threads.
    &[
        (7 * PAGE, 5 * MIB + 3 * PAGE),
        (100 * MIB, 7 * MIB + 257 * PAGE),
    ],
];

fn guests_of_different_shape_in_the_same_blocks(page_size: PageSize) {
    let pool = pool(page_size, 12);
    let odd: &[_] = match page_size {
        PageSize::Huge2M => &[],
        _ => &ODD,
    };
    let everything = regions(&[(0, 12 * BLOCK_SIZE)]);
    for (number, shape) in (0..).zip(WHOLE_BLOCKS.iter().chain(odd)) {
        for vcpus in [1, 3] {
            let vm = Vm::boot(pool.lease(&regions(shape)).unwrap(), vcpus);
            let ranges = vm.ranges();
            assert_eq!(
                vm.lease.bytes(),
                shape.iter().map(|region| region.1).sum::<u64>()
            );
            assert!(ranges.is_sorted() && ranges.len() == shape.len());
            vm.assert_zero();
            vm.fill(secret(number));
            write_packets(&vm.lease.memory(), secret(1000)).unwrap();

            let (receipt, machine) = vm.teardown();
            assert!(receipt.is_proven(), "{receipt:?}");
            assert_eq!(receipt.bytes_verified, receipt.bytes_total);
            assert_out_of_reach(&machine, &edges(&ranges));

            // Whatever shape it was, also what lay in the blocks behind the ends of its regions.
            let whole = Vm::boot(pool.lease(&everything).unwrap(), vcpus);
            whole.assert_zero();
            whole.fill(secret(2000));
            assert!(whole.teardown().0.is_proven());
        }
    }
    assert_nothing_dirty_left(&pool);
}
