//! How long until background scrubbing heeds: that it is cancelled, that something is more urgent, that the pool is to end?

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, SamplingMode, criterion_group, criterion_main};
use std::thread::sleep;
use std::time::{Duration, Instant};
use vm_memory::GuestAddress;
use vm_scrub::lease::Cancelled;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, Priority, Quiesced, Ticket};

/// What is being scrubbed meanwhile, in bytes: a tenth of a second or more, so that it is not over before anybody interrupts.
const LONG: u64 = 256 << 20;

/// What is more urgent, in bytes: one page, so that its own scrubbing does not count.
const URGENT: u64 = 4 << 10;

/// A pool in which there is room for both.
fn pool() -> Pool {
    Pool::builder()
        .capacity(LONG + BLOCK_SIZE)
        .page_size(PageSize::Base4K)
        .populate(true)
        .build()
        .expect("memory for a small pool")
}

/// A lease that was written all over.
fn used(pool: &Pool, bytes: u64) -> Lease {
    let lease = pool
        .lease(&[(GuestAddress(0), bytes)])
        .expect("everything else is back");
    let (region, start) = lease.host_addresses()[0];
    // SAFETY: the lease's own memory, mapped writable over the region's length; nobody else has it.
    unsafe { start.write_bytes(0xa5, region.bytes as usize) };
    lease
}

fn retire(lease: Lease) -> Ticket {
    // SAFETY: no guest and no device has this memory.
    let quiesced = unsafe { Quiesced::assert(&lease) };
    lease.retire(quiesced).expect("nobody holds it")
}

/// A long lease that the background is in the middle of.
fn midway(pool: &Pool) -> Ticket {
    let ticket = retire(used(pool, LONG));
    while ticket.progress().bytes_done < LONG / 8 {
        // Not in the way of the background, which has the lowest priority.
        sleep(Duration::from_micros(100));
    }
    ticket
}

/// The time that `once` returns, again and again. The longest is printed as well, because a limit is not kept on average; on a host
/// with other work it is that of the scheduler, which lets the background thread wait.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    mut once: impl FnMut() -> Duration,
) {
    let mut longest = Duration::ZERO;
    let mut once = || {
        let taken = once();
        longest = longest.max(taken);
        taken
    };
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|times| (0..times).map(|_| once()).sum());
    });
    // Nothing was measured if another bench was asked for.
    if longest > Duration::ZERO {
        println!("{name}: {longest:?} at most");
    }
}

fn cancelled(pool: &Pool) -> Duration {
    let ticket = midway(pool);
    let started = Instant::now();
    let cancelled = ticket.cancel();
    let taken = started.elapsed();
    let Cancelled::Dirty(memory) = cancelled else {
        panic!("it was over before it was cancelled");
    };
    let receipt = memory.scrub_and_verify().recycle().expect("it adds up");
    assert!(receipt.is_proven());
    taken
}

/// From being retired to being scrubbed.
fn urgent(pool: &Pool) -> Duration {
    let lease = used(pool, URGENT);
    let started = Instant::now();
    let ticket = retire(lease);
    ticket.set_priority(Priority::High);
    let receipt = ticket.wait_in_background().expect("scrubbed");
    let taken = started.elapsed();
    assert!(receipt.is_proven());
    taken
}

fn urgent_in_the_middle(pool: &Pool) -> Duration {
    let long = midway(pool);
    let taken = urgent(pool);
    assert!(!long.is_finished(), "it was over before the urgent one");
    assert!(long.wait().expect("scrubbed").is_proven());
    taken
}

/// The pool is dropped, and the background is left to finish.
fn left() -> Duration {
    let pool = pool();
    let ticket = midway(&pool);
    let started = Instant::now();
    drop(pool);
    let taken = started.elapsed();
    assert!(ticket.wait().expect("scrubbed").is_proven());
    taken
}

/// Nothing is left of the pool, of which only the unmapping takes long.
fn ended(in_the_middle: bool) -> Duration {
    let pool = pool();
    let ticket = in_the_middle.then(|| midway(&pool));
    let started = Instant::now();
    drop(ticket.map(Ticket::cancel));
    drop(pool);
    started.elapsed()
}

fn interruptions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("interruption");
    // What comes before each takes so much longer than what is timed.
    group.sampling_mode(SamplingMode::Flat);
    {
        let pool = pool();
        measure(&mut group, "cancel", || cancelled(&pool));
        measure(&mut group, "more urgent", || urgent_in_the_middle(&pool));
        measure(&mut group, "urgent alone", || urgent(&pool));
    }
    measure(&mut group, "drop the pool", left);
    measure(&mut group, "cancel and end the pool", || ended(true));
    measure(&mut group, "end an idle pool", || ended(false));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = interruptions
}
criterion_main!(benches);
