//! Does it pay to read zeros back piece by piece, while a cache still holds them, rather than all at the end?

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;
use vm_scrub::arch::ZeroLoop;
use vm_scrub::calibration;
use vm_scrub_benches::MEMORY;

fn fused(criterion: &mut Criterion) {
    let mut memory = vec![1_u8; MEMORY];
    let (_, verify) = calibration().fastest_zero_and_verify(MEMORY as u64, 1);
    let mut group = criterion.benchmark_group("fused");
    group.throughput(Throughput::Bytes(MEMORY as u64));
    for zero in ZeroLoop::available() {
        group.bench_function(BenchmarkId::new(zero.name(), "fused"), |bencher| {
            let memory = black_box(&mut memory[..]);
            bencher.iter(|| {
                // SAFETY: an exclusively borrowed slice.
                let found =
                    unsafe { zero.zero_and_verify(verify, memory.as_mut_ptr(), memory.len()) };
                assert_eq!(found, None);
            });
        });
        group.bench_function(BenchmarkId::new(zero.name(), "separate"), |bencher| {
            let memory = black_box(&mut memory[..]);
            bencher.iter(|| {
                // SAFETY: an exclusively borrowed slice.
                let found = unsafe {
                    zero.zero(memory.as_mut_ptr(), memory.len());
                    verify.first_nonzero(memory.as_ptr(), memory.len())
                };
                assert_eq!(found, None);
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(500));
    targets = fused
}
criterion_main!(benches);
