//! What does it take to tear a lease down of which a guest has written every byte?

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;
use vm_scrub::{PageSize, Verify};
use vm_scrub_benches::{MEMORY, pool, teardown, used_lease};

fn teardowns(criterion: &mut Criterion) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut group = criterion.benchmark_group("teardown");
    group.throughput(Throughput::Bytes(MEMORY as u64));
    for page_size in [PageSize::Base4K, PageSize::Transparent] {
        for (verify, name) in [(Verify::Full, "full"), (Verify::None, "none")] {
            let pool = pool(page_size, verify, threads, true);
            group.bench_function(BenchmarkId::new(page_size.name(), name), |bencher| {
                // One lease at a time: the pool has no memory for a second.
                let setup = || used_lease(&pool, MEMORY);
                bencher.iter_batched(setup, teardown, BatchSize::PerIteration);
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = teardowns
}
criterion_main!(benches);
