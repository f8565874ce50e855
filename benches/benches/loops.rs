//! How fast is each loop, where the memory is in a cache and where it is not?

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;
use vm_scrub::arch::{VerifyLoop, ZeroLoop};
use vm_scrub_benches::MEMORY;

/// Bytes: in the first-level cache, the piece that the engine works on, and beyond most caches.
const SIZES: [usize; 3] = [4 << 10, 256 << 10, MEMORY];

fn loops(criterion: &mut Criterion) {
    let mut memory = vec![1_u8; MEMORY];
    for size in SIZES {
        let mut group = criterion.benchmark_group("zero");
        group.throughput(Throughput::Bytes(size as u64));
        for each in ZeroLoop::available() {
            group.bench_function(BenchmarkId::new(each.name(), size), |bencher| {
                let memory = black_box(&mut memory[..size]);
                // SAFETY: an exclusively borrowed slice.
                bencher.iter(|| unsafe { each.zero(memory.as_mut_ptr(), memory.len()) });
            });
        }
        group.finish();
    }
    memory.fill(0);
    for size in SIZES {
        let mut group = criterion.benchmark_group("verify");
        group.throughput(Throughput::Bytes(size as u64));
        for each in VerifyLoop::available() {
            group.bench_function(BenchmarkId::new(each.name(), size), |bencher| {
                let memory = black_box(&memory[..size]);
                bencher.iter(|| {
                    // SAFETY: a borrowed slice.
                    let found = unsafe { each.first_nonzero(memory.as_ptr(), memory.len()) };
                    assert_eq!(found, None);
                });
            });
        }
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    targets = loops
}
criterion_main!(benches);
