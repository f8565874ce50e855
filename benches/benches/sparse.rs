//! Does memory that the guest never touched cost anything, in a lease and in an embedder's own mapping?

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use std::cell::RefCell;
use std::time::Duration;
use vm_scrub::{PageSize, Policy, Verify, scrub};
use vm_scrub_benches::{MEMORY, OwnMemory, pool, teardown, used_lease};

/// How much was touched, in bytes.
const TOUCHED: [usize; 3] = [64 << 10, MEMORY / 4, MEMORY];

fn leases(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sparse-lease");
    for touched in TOUCHED {
        // Each has a pool of its own, because pages that were populated once stay so.
        let pool = pool(PageSize::Base4K, Verify::Full, 1, false);
        group.bench_function(BenchmarkId::from_parameter(touched), |bencher| {
            let setup = || used_lease(&pool, touched);
            bencher.iter_batched(setup, teardown, BatchSize::PerIteration);
        });
    }
    group.finish();
}

fn own_memory(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("sparse-scrub");
    let memory = RefCell::new(OwnMemory::map());
    let policy = Policy::new();
    for touched in TOUCHED {
        group.bench_function(BenchmarkId::from_parameter(touched), |bencher| {
            bencher.iter_batched(
                || memory.borrow_mut().use_anew(touched),
                |()| scrub(memory.borrow_mut().bytes(), &policy).expect("nobody else writes to it"),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = leases, own_memory
}
criterion_main!(benches);
