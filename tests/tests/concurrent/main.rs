//! Many guests come and go at the same time in a pool that is too small for all, by every way in and out at random: no block is in two
//! hands, every guest begins with zeros and keeps what it wrote, and the books add up at every moment and at the end.
//!
//! `VM_SCRUB_STRESS_SECONDS=60 cargo test -p vm-scrub-tests --test concurrent` runs for a minute with each size of page; the default
//! is 5 seconds. Each second or so has a pool of its own, whose settings are random too. What was chosen at random follows from the
//! seed that is printed, and `VM_SCRUB_STRESS_SEED` sets it; how the threads met does not.

mod guest;
mod random;
mod shared;

use random::{Random, seed};
use shared::Arena;
use std::thread;
use std::time::{Duration, Instant};
use vm_scrub::arch::{VerifyLoop, ZeroLoop};
use vm_scrub::{BLOCK_SIZE, PageSize, Policy, Pool, RevokeBy, ScrubRate};
use vm_scrub_tests::{
    assert_all_zero, assert_nothing_dirty_left, fill, on_every_page_size, pools, regions, teardown,
};

// Beyond the pool's own: a file of a shareable lease exists for a moment beside the memory that it stands for.
on_every_page_size!(many_guests_at_once: super::BLOCKS + 12);

const BLOCKS: u64 = 24;
const GUESTS: usize = 6;

fn many_guests_at_once(page_size: PageSize) {
    let seconds = std::env::var("VM_SCRUB_STRESS_SECONDS")
        .map_or(5, |seconds| seconds.parse().expect("a number of seconds"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut random = Random::new(seed());
    let (mut pools, mut leases) = (0, 0);
    while Instant::now() < end || pools == 0 {
        let seed = random.next();
        println!("{page_size}: VM_SCRUB_STRESS_SEED={seed:#x}");
        let left = end.saturating_duration_since(Instant::now());
        leases += one_pool(
            page_size,
            Random::new(seed),
            left.min(Duration::from_secs(1)),
        );
        pools += 1;
    }
    println!("{page_size}: {leases} leases in {pools} pools");
    assert!(leases > 0);
}

/// One of them at random.
fn any<T>(random: &mut Random, all: impl Iterator<Item = T> + Clone) -> T {
    let count = all.clone().count() as u64;
    let mut from = all.skip(random.below(count) as usize);
    from.next().expect("there is a loop on every host")
}

/// A pool with settings of its own.
fn build(page_size: PageSize, random: &mut Random) -> Pool {
    build_of(page_size, BLOCKS, random)
}

fn build_of(page_size: PageSize, blocks: u64, random: &mut Random) -> Pool {
    let policy = Policy::new()
        .zero_loop(any(random, ZeroLoop::available()))
        .verify_loop(any(random, VerifyLoop::available()))
        .retain(random.below(3) * BLOCK_SIZE);
    let mut builder = pools::builder(page_size, blocks)
        .threads(1 + random.below(3) as usize)
        .populate(random.one_in(4))
        .check_on_grant(random.one_in(2))
        .lock_memory(random.one_in(4) && may_lock())
        .policy(policy);
    if page_size != PageSize::Huge2M && random.one_in(3) {
        builder = builder.revoke_by(RevokeBy::Mremap);
    }
    if random.one_in(4) {
        // So little that windows are given up while others are opened.
        builder = builder.kept_windows(8 * BLOCK_SIZE);
    }
    builder.build().expect("a small pool can be built")
}

/// Whether this process may lock as much as the pools of all tests have, and others that come and go beside them.
fn may_lock() -> bool {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the structure is live and writable for the call.
    let status = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    // SAFETY: takes nothing.
    let root = unsafe { libc::geteuid() } == 0;
    status == 0 && (root || limit.rlim_cur >= 16 * BLOCKS * BLOCK_SIZE)
}

/// Guests come and go for `time` in one pool. How many there were.
fn one_pool(page_size: PageSize, mut random: Random, time: Duration) -> u64 {
    let pool = build(page_size, &mut random);
    let arena = Arena::new(&pool, BLOCKS);
    let end = Instant::now() + time;
    thread::scope(|scope| {
        for me in 0..GUESTS {
            let (arena, random) = (&arena, Random::new(random.next()));
            scope.spawn(move || {
                let _last = arena.presence();
                guest::come_and_go(arena, me, random, end);
            });
        }
        let random = Random::new(random.next());
        scope.spawn(|| operate(&arena, random));
    });
    settle(&arena);
    assert_nothing_dirty_left(&pool);
    arena.leases()
}

/// What the host's operator does meanwhile: look at the books, change the throttle, get back what can be had.
fn operate(arena: &Arena, mut random: Random) {
    let pool = arena.pool();
    while arena.anybody_left() {
        assert_eq!(pool.accounts().total(), BLOCKS * BLOCK_SIZE);
        match random.below(9) {
            0 => pool.set_scrub_rate(None),
            1 => pool.set_scrub_rate(Some(ScrubRate {
                bytes_per_second: 1 << (20 + random.below(14)),
                burst: random.below(1 << 20),
            })),
            2 => drop(pool.reclaim()),
            3 => assert!(pool.withheld().iter().all(|withheld| withheld.bytes > 0)),
            4 => arena.let_go(),
            5 => arena.finish_a_ticket(&mut random),
            6 => another_pool(&mut random),
            _ => thread::sleep(Duration::from_micros(random.below(500))),
        }
    }
}

/// A pool has one size for as long as it lives: a host that gives guests more memory has one pool more, and one that needs it for
/// something else one less, while guests of the others come and go.
fn another_pool(random: &mut Random) {
    let blocks = 1 + random.below(4);
    let pool = build_of(PageSize::Base4K, blocks, random);
    let lease = pool.lease(&regions(&[(0, blocks * BLOCK_SIZE)]));
    let lease = lease.expect("nobody else has a lease from it");
    assert_all_zero(&lease);
    fill(&lease, 1);
    match random.below(3) {
        0 => assert!(teardown(lease).is_proven()),
        1 => drop(lease),
        // The pool goes before its last lease does.
        _ => {
            drop(pool);
            assert!(teardown(lease).is_proven());
        }
    }
}

/// Everything comes to its end, and the books must say what the threads know.
fn settle(arena: &Arena) {
    let pool = arena.pool();
    pool.set_scrub_rate(None);
    arena.let_go();
    while arena.has_tickets() {
        arena.finish_a_ticket(&mut Random::new(0));
    }
    // Tickets that were dropped, and shared memory that was tried while somebody still had it.
    let patience = Instant::now() + Duration::from_secs(60);
    let settled =
        || pool.accounts().dirty == 0 && pool.withheld().iter().all(|withheld| withheld.for_good);
    while !settled() {
        let (accounts, withheld) = (pool.accounts(), pool.withheld());
        assert!(Instant::now() < patience, "{accounts:?} {withheld:?}");
        pool.reclaim();
        thread::sleep(Duration::from_millis(1));
    }
    let accounts = pool.accounts();
    let (forgotten, lost) = arena.gone();
    assert_eq!(accounts.leased, forgotten * BLOCK_SIZE, "{accounts:?}");
    assert_eq!(accounts.quarantined, lost * BLOCK_SIZE, "{accounts:?}");
    assert_eq!(accounts.total(), BLOCKS * BLOCK_SIZE, "{accounts:?}");
}
