//! What do more threads than processors cost a teardown?

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;
use vm_scrub::{PageSize, Verify};
use vm_scrub_benches::{MEMORY, pool, teardown, used_lease};

fn scaling(criterion: &mut Criterion) {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let mut counts = vec![1];
    counts.extend((1..=4).map(|times| times * processors));
    counts.dedup();
    let mut group = criterion.benchmark_group("scaling");
    group.throughput(Throughput::Bytes(MEMORY as u64));
    for threads in counts {
        let pool = pool(PageSize::Transparent, Verify::Full, threads, true);
        group.bench_function(BenchmarkId::from_parameter(threads), |bencher| {
            let setup = || used_lease(&pool, MEMORY);
            bencher.iter_batched(setup, teardown, BatchSize::PerIteration);
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
    targets = scaling
}
criterion_main!(benches);
