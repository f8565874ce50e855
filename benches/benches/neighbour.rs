//! What does a workload that lives in its cache lose while another thread scrubs: by loop, and with the throttle?

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;
use vm_scrub::arch::ZeroLoop;
use vm_scrub::{PageSize, Pool, Quiesced, ScrubRate, Verify};
use vm_scrub_benches::{MEMORY, Neighbour, pool, used_lease};

/// The throttle's rate, in bytes per second.
const RATE: u64 = 256 << 20;

/// The time of the workload while another thread calls `scrub` again and again.
fn beside(
    group: &mut criterion::BenchmarkGroup<'_, criterion::measurement::WallTime>,
    name: &str,
    mut scrub: impl FnMut() + Send,
) {
    let mut neighbour = Neighbour::new();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                scrub();
            }
        });
        group.bench_function(name, |bencher| bencher.iter(|| neighbour.work()));
        stop.store(true, Ordering::Relaxed);
    });
}

/// One lease is retired and scrubbed in the background.
fn retire(pool: &Pool) {
    let lease = used_lease(pool, MEMORY);
    // SAFETY: no guest and no device has this memory.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    let ticket = lease.retire(quiesced).expect("nobody holds it");
    let receipt = ticket.wait_in_background().expect("scrubbed");
    assert!(receipt.is_proven());
}

fn neighbours(criterion: &mut Criterion) {
    if thread::available_parallelism().map_or(1, usize::from) < 2 {
        eprintln!("SKIPPED neighbour: this host has one processor");
        return;
    }
    let mut group = criterion.benchmark_group("neighbour");
    let mut neighbour = Neighbour::new();
    group.bench_function("alone", |bencher| bencher.iter(|| neighbour.work()));
    let mut memory = vec![1_u8; MEMORY];
    for zero in ZeroLoop::available() {
        beside(&mut group, &format!("beside {zero}"), || {
            let memory = black_box(&mut memory[..]);
            // SAFETY: an exclusively borrowed slice.
            unsafe { zero.zero(memory.as_mut_ptr(), memory.len()) };
        });
    }
    for (name, rate) in [
        ("vm-scrub unthrottled", None),
        ("vm-scrub at 256 MiB/s", Some(RATE)),
    ] {
        let pool = pool(PageSize::Base4K, Verify::Full, 1, true);
        pool.set_scrub_rate(rate.map(|bytes_per_second| ScrubRate {
            bytes_per_second,
            burst: 0,
        }));
        beside(&mut group, name, || retire(&pool));
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = neighbours
}
criterion_main!(benches);
