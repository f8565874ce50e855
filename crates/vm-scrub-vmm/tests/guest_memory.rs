//! What guests write and find, checked from the host; KVM guests and thread guests must agree.

#[expect(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::time::Duration;

use common::{GIB, LIMIT, MIB, machine, memory, register, unregister};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vm_scrub_vmm::{Error, Guest, Machine, NonzeroWord, RESERVED, ThreadGuest, write_packets};

const PATTERN: u64 = 0x8877_6655_4433_2211;

/// Below and above the hole under 4 GiB; the last range ends in the middle of a page of the guest's tables.
const WITH_HOLE: [(u64, u64); 2] = [(0, 6 * MIB), (4 * GIB, 3 * MIB + 4096)];

fn with_ram(vcpus: usize, ranges: &[(u64, u64)]) -> Option<(Machine, GuestMemoryMmap)> {
    let machine = machine(vcpus)?;
    let memory = memory(ranges);
    register(machine.vm(), &memory);
    Some((machine, memory))
}

fn bytes(memory: &GuestMemoryMmap, (gpa, bytes): (u64, u64)) -> Vec<u8> {
    let mut buffer = vec![0; bytes as usize];
    memory
        .read_slice(&mut buffer, GuestAddress(gpa))
        .expect("read");
    buffer
}

/// Runs a test with every kind of guest there is, each with fresh memory.
fn with_every_guest(ranges: &[(u64, u64)], test: impl Fn(&dyn Guest, &GuestMemoryMmap)) {
    for count in 1..=3 {
        let memory = memory(ranges);
        test(
            &ThreadGuest::new(memory.clone(), count).expect("threads"),
            &memory,
        );
        if let Some((machine, memory)) = with_ram(count, ranges) {
            test(&machine, &memory);
        }
    }
}

#[test]
fn every_byte_is_filled_and_no_other() {
    // The guest fills all but the first and the last word, in two pieces with a word left out between them.
    let ram = [(0, 2 * MIB)];
    let pieces = [(8, MIB), (MIB + 16, MIB - 24)];
    with_every_guest(&ram, |guest, memory| {
        guest.fill(&pieces, PATTERN, LIMIT).expect("filled");
        let content = bytes(memory, ram[0]);
        for (place, word) in content.chunks_exact(8).enumerate() {
            let gpa = place as u64 * 8;
            let spared = [0, MIB + 8, 2 * MIB - 8].contains(&gpa);
            let expected = if spared { 0 } else { PATTERN };
            assert_eq!(word, expected.to_le_bytes(), "at {gpa:#x}");
        }
    });
}

#[test]
fn memory_above_and_below_a_hole_is_filled_and_counted() {
    let total = WITH_HOLE.iter().map(|range| range.1).sum();
    with_every_guest(&WITH_HOLE, |guest, memory| {
        let scan = guest.scan(&WITH_HOLE, LIMIT).expect("scanned");
        assert_eq!(
            (scan.bytes_read, scan.nonzero_bytes, scan.first_nonzero),
            (total, 0, None)
        );

        guest.fill(&WITH_HOLE, PATTERN, LIMIT).expect("filled");
        for range in WITH_HOLE {
            let content = bytes(memory, range);
            assert!(
                content
                    .chunks_exact(8)
                    .all(|word| word == PATTERN.to_le_bytes())
            );
        }
        let scan = guest.scan(&WITH_HOLE, LIMIT).expect("scanned");
        assert_eq!((scan.bytes_read, scan.nonzero_bytes), (total, total));
        assert_eq!(
            scan.first_nonzero,
            Some(NonzeroWord {
                gpa: 0,
                value: PATTERN
            })
        );
        assert_eq!(
            guest.count(&WITH_HOLE, PATTERN, LIMIT).expect("counted"),
            total
        );
        assert_eq!(
            guest
                .count(&WITH_HOLE, PATTERN + 1, LIMIT)
                .expect("counted"),
            0
        );
    });
}

#[test]
fn single_bytes_are_found_wherever_they_are() {
    let last = WITH_HOLE[1].0 + WITH_HOLE[1].1 - 1;
    let places = [
        (6 * MIB - 1, 0x80),
        (4095, 1),
        (4096, 0xFF),
        (2 * MIB - 1, 0x7F),
        (2 * MIB, 1),
        (4 * GIB, 2),
        (last, 0x55),
        (0, 1),
    ];
    with_every_guest(&WITH_HOLE, |guest, memory| {
        let mut planted: Vec<u64> = Vec::new();
        for (gpa, value) in places {
            memory
                .write_obj::<u8>(value, GuestAddress(gpa))
                .expect("planted");
            planted.push(gpa);
            let scan = guest.scan(&WITH_HOLE, LIMIT).expect("scanned");
            assert_eq!(scan.nonzero_bytes, planted.len() as u64, "after {gpa:#x}");
            let word = planted.iter().min().expect("planted") & !7;
            let value = memory.read_obj::<u64>(GuestAddress(word)).expect("read");
            assert_eq!(scan.first_nonzero, Some(NonzeroWord { gpa: word, value }));
        }
    });
}

#[test]
fn ranges_shorter_than_a_block_are_read_to_the_last_word() {
    let ram = [(0, 8192)];
    with_every_guest(&ram, |guest, memory| {
        memory
            .write_slice(&[1; 8192], GuestAddress(0))
            .expect("written");
        for words in 1..20 {
            let range = [(4096 - 8, words * 8)];
            let scan = guest.scan(&range, LIMIT).expect("scanned");
            assert_eq!(
                (scan.bytes_read, scan.nonzero_bytes),
                (words * 8, words * 8)
            );
            let counted = guest
                .count(&range, 0x0101_0101_0101_0101, LIMIT)
                .expect("counted");
            assert_eq!(counted, words * 8);
        }
    });
}

#[test]
fn packets_of_a_device_are_found_by_the_guest() {
    with_every_guest(&WITH_HOLE, |guest, memory| {
        let packets = write_packets(memory, PATTERN).expect("written");
        let expected: u64 = packets.iter().map(|packet| packet.1).sum();
        let found = guest.count(&WITH_HOLE, PATTERN, LIMIT).expect("counted");
        assert_eq!(found, expected);
        assert_eq!(
            guest
                .scan(&WITH_HOLE, LIMIT)
                .expect("scanned")
                .nonzero_bytes,
            expected
        );
    });
}

/// No table of the processor may be in RAM by accident, the one at address 0 after reset included.
#[test]
fn guests_run_whatever_their_memory_holds() {
    let ram = [(0, 128 << 10)];
    for byte in [0x01, 0x80, 0xFF] {
        with_every_guest(&ram, |guest, memory| {
            memory
                .write_slice(&vec![byte; 128 << 10], GuestAddress(0))
                .expect("written");
            assert_eq!(
                guest.scan(&ram, LIMIT).expect("scanned").nonzero_bytes,
                128 << 10
            );
            guest.fill(&ram, PATTERN, LIMIT).expect("filled");
            assert_eq!(
                guest.count(&ram, PATTERN, LIMIT).expect("counted"),
                128 << 10
            );
        });
    }
}

#[test]
fn memory_that_is_not_there_is_an_error() {
    with_every_guest(&[(0, MIB)], |guest, _| {
        for range in [
            (RESERVED.start, 4096),
            (RESERVED.end - 8, 16),
            (127 * GIB, 2 * GIB),
            (4, 8),
        ] {
            assert!(matches!(
                guest.fill(&[range], 1, LIMIT),
                Err(Error::Range { .. })
            ));
            assert!(matches!(
                guest.scan(&[range], LIMIT),
                Err(Error::Range { .. })
            ));
        }
        let error = guest
            .scan(&[(0, 2 * MIB)], LIMIT)
            .expect_err("only half is there");
        let expected = matches!(
            error,
            Error::GuestStopped { .. } | Error::GuestMemory { .. }
        );
        assert!(expected, "{error}");
        // The guest is still good for another run.
        assert_eq!(
            guest.scan(&[(0, MIB)], LIMIT).expect("scanned").bytes_read,
            MIB
        );
    });
}

#[test]
fn thread_guests_keep_to_their_limit() {
    let memory = memory(&[(0, MIB)]);
    let guest = ThreadGuest::new(memory, 2).expect("threads");
    let error = guest
        .fill(&[(0, MIB)], 1, Duration::ZERO)
        .expect_err("no time");
    assert!(
        matches!(
            error,
            Error::TimedOut {
                limit: Duration::ZERO,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn two_machines_share_memory_one_after_the_other() {
    let ram = [(0, 4 * MIB)];
    let Some((first, memory)) = with_ram(2, &ram) else {
        return;
    };
    first.fill(&ram, PATTERN, LIMIT).expect("filled");
    unregister(first.vm(), &memory);
    drop(first);
    let second = Machine::new(2).expect("machine");
    register(second.vm(), &memory);
    assert_eq!(
        second.count(&ram, PATTERN, LIMIT).expect("counted"),
        4 * MIB
    );
}
