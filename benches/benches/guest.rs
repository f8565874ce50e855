//! How long does a KVM guest take to touch all of its memory for the first time, if another guest had it before, and if it was
//! mapped just now?

use criterion::{Bencher, Criterion, Throughput, criterion_group, criterion_main};
use kvm_bindings::kvm_userspace_memory_region;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vm_memory::GuestAddress;
use vm_scrub::kvm::Memslots;
use vm_scrub::{PageSize, Verify};
use vm_scrub_benches::{MEMORY, OwnMemory, pool};
use vm_scrub_vmm::{Guest, Machine, kvm_usable};

/// All of the guest's RAM.
const RAM: [(u64, u64); 1] = [(0, MEMORY as u64)];

/// What the guest writes.
const WORD: u64 = u64::from_le_bytes(*b"guestRAM");

/// A guest that hangs must not hang the bench.
const LIMIT: Duration = Duration::from_secs(60);

/// The time of `iterations` first touches, each after `prepare` and before `clean_up`.
fn first_touches<T>(
    iterations: u64,
    machine: &Machine,
    mut prepare: impl FnMut() -> T,
    mut clean_up: impl FnMut(T),
) -> Duration {
    (0..iterations)
        .map(|_| {
            let prepared = prepare();
            let started = Instant::now();
            machine.fill(&RAM, WORD, LIMIT).expect("the guest runs");
            let took = started.elapsed();
            clean_up(prepared);
            took
        })
        .sum()
}

fn recycled(bencher: &mut Bencher<'_>) {
    let machine = Machine::new(1).expect("a virtual machine");
    let pool = pool(PageSize::Base4K, Verify::Full, 1, true);
    bencher.iter_custom(|iterations| {
        let prepare = || {
            let layout = RAM.map(|(start, bytes)| (GuestAddress(start), bytes));
            let lease = pool.lease(&layout).expect("nothing else is leased");
            let memslots = Memslots::register(Arc::clone(machine.vm()), &lease);
            (lease, memslots.expect("a memslot"))
        };
        first_touches(iterations, &machine, prepare, |(lease, mut memslots)| {
            let quiesced = memslots.remove().expect("the memslot goes");
            let receipt = lease.teardown(quiesced).expect("nobody holds it");
            assert!(receipt.is_proven());
        })
    });
}

fn fresh(bencher: &mut Bencher<'_>) {
    let machine = Machine::new(1).expect("a virtual machine");
    let memslot = |userspace_addr: u64, memory_size: u64| {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: RAM[0].0,
            memory_size,
            userspace_addr,
        };
        // SAFETY: the memory is mapped until after the memslot is deleted, and no slice of it is used meanwhile.
        let done = unsafe { machine.vm().set_user_memory_region(region) };
        done.expect("a memslot");
    };
    bencher.iter_custom(|iterations| {
        let prepare = || {
            let mut memory = OwnMemory::map();
            let address = memory.bytes().as_mut_ptr().expose_provenance() as u64;
            memslot(address, RAM[0].1);
            (memory, address)
        };
        first_touches(iterations, &machine, prepare, |(memory, address)| {
            memslot(address, 0);
            drop(memory);
        })
    });
}

fn guests(criterion: &mut Criterion) {
    if let Err(error) = kvm_usable() {
        eprintln!("SKIPPED guest: {error}");
        return;
    }
    let mut group = criterion.benchmark_group("guest");
    group.throughput(Throughput::Bytes(MEMORY as u64));
    group.bench_function("recycled", recycled);
    group.bench_function("fresh-mmap", fresh);
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = guests
}
criterion_main!(benches);
