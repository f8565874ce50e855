//! Address space is finite: what leases and teardowns take of it must come back, and running out of it must be an answer.
//!
//! Limits and mappings belong to a whole process, so each test here runs in a child of its own.

use vm_scrub::lease::LeaseError;
use vm_scrub::{BLOCK_SIZE, PageSize, Pool, PoolError, SysCall};
use vm_scrub_tests::child::{alone, with_huge_pages};
use vm_scrub_tests::{assert_nothing_dirty_left, fill, pool, pools, regions, teardown};

/// Bytes of address space that this process has reserved.
fn reserved() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').next().unwrap().parse::<u64>().unwrap() * 4096
}

/// How many mappings this process has.
fn mappings() -> usize {
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .count()
}

/// From now on this process may reserve `bytes` more.
fn limit(bytes: u64) {
    let limit = libc::rlimit {
        rlim_cur: reserved() + bytes,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: `limit` is a live structure of the right type.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
}

fn generation(pool: &Pool, layout: &[(u64, u64)], seed: u8) {
    let lease = pool.lease(&regions(layout)).unwrap();
    fill(&lease, seed);
    assert!(teardown(lease).is_proven());
}

fn windows_beyond_the_budget_are_given_back(page_size: PageSize) {
    let whole = [(0, 4 * BLOCK_SIZE)];
    // The thread of the first pool leaves an arena of malloc's behind, which those of the next ones use.
    drop(pools::builder(page_size, 4).threads(1).build().unwrap());
    for (blocks_kept, most) in [(0, 0), (14, 2 * 7)] {
        let pool = pools::builder(page_size, 4)
            .kept_windows(blocks_kept * BLOCK_SIZE)
            // A thread that allocates has an arena of malloc's, of 64 MiB of address space.
            .threads(1)
            .build()
            .unwrap();
        // One block of guard on each side and one for alignment: a window of four takes seven.
        let before = reserved();
        for seed in 0..6 {
            generation(&pool, &whole, seed);
            let kept = reserved() - before;
            assert!(kept <= most * BLOCK_SIZE + (1 << 20), "{kept:#x} kept");
        }
        let kept = reserved() - before;
        assert!(kept >= most * BLOCK_SIZE, "{kept:#x} kept of {most} blocks");
        drop(pool);
        assert!(
            reserved() <= before,
            "a pool's own address space comes back"
        );
    }
}

#[test]
fn windows_beyond_the_budget_are_given_back_4k() {
    alone("windows_beyond_the_budget_are_given_back_4k", || {
        windows_beyond_the_budget_are_given_back(PageSize::Base4K);
    });
}

#[test]
fn windows_beyond_the_budget_are_given_back_2m() {
    with_huge_pages("windows_beyond_the_budget_are_given_back_2m", 4, || {
        windows_beyond_the_budget_are_given_back(PageSize::Huge2M);
    });
}

/// The kernel allows 65,530 mappings by default. A pool that loses some to each guest stops working one day.
#[test]
fn mappings_do_not_pile_up() {
    alone("mappings_do_not_pile_up", || {
        let pool = pool(PageSize::Base4K, 32);
        let before = mappings();
        for round in 0..8 {
            let leases: Vec<_> = (0..32)
                .map(|_| pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap())
                .collect();
            leases.iter().for_each(|lease| fill(lease, round));
            for lease in leases {
                assert!(teardown(lease).is_proven());
            }
            generation(&pool, &[(0, 3 * BLOCK_SIZE), (1 << 32, 29 * BLOCK_SIZE)], 1);
        }
        let after = mappings();
        assert!(after <= before + 16, "{before} mappings became {after}");
    });
}

#[test]
fn a_pool_larger_than_the_limit_is_refused() {
    alone("a_pool_larger_than_the_limit_is_refused", || {
        limit(64 * BLOCK_SIZE);
        for page_size in [PageSize::Base4K, PageSize::Transparent] {
            let error = pools::builder(page_size, 4096).build().unwrap_err();
            let PoolError::Map { capacity, source } = &error else {
                panic!("{error}");
            };
            assert_eq!(*capacity, 4096 * BLOCK_SIZE);
            assert_eq!(source.call, SysCall::Mmap);
            assert_eq!(source.source.raw_os_error(), Some(libc::ENOMEM));
            let text = error.to_string();
            assert!(
                text.contains("8589934592 bytes") && text.contains("ulimit -v"),
                "{text}"
            );
        }
    });
}

/// A limit on writable memory that leaves room for a lease of one block and not for one of eight.
#[test]
fn a_lease_beyond_the_limit_on_data_leaves_no_hole() {
    alone("a_lease_beyond_the_limit_on_data_leaves_no_hole", || {
        let pool = pools::builder(PageSize::Base4K, 32)
            .threads(1)
            .build()
            .unwrap();
        let first = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
        let start = first.host_addresses()[0].1.addr() as u64;
        // Windows follow each other with a block of guard space between them.
        let next = start + 2 * BLOCK_SIZE..start + 10 * BLOCK_SIZE;
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let data = status
            .lines()
            .find_map(|line| line.strip_prefix("VmData:")?.strip_suffix(" kB"))
            .unwrap();
        let data: u64 = data.trim().parse().unwrap();
        let limit = |bytes| {
            let limit = libc::rlimit {
                rlim_cur: bytes,
                rlim_max: libc::RLIM_INFINITY,
            };
            // SAFETY: `limit` is a live structure of the right type.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_DATA, &limit) }, 0);
        };
        limit((data << 10) + 4 * BLOCK_SIZE);
        let error = pool.lease(&regions(&[(0, 8 * BLOCK_SIZE)])).unwrap_err();
        let second = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
        limit(libc::RLIM_INFINITY);
        assert!(error.to_string().contains("ulimit -d"), "{error}");

        let mut covered = 0;
        for line in std::fs::read_to_string("/proc/self/maps").unwrap().lines() {
            let (from, to) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            let (from, to) = (number(from).max(next.start), number(to).min(next.end));
            covered += to.saturating_sub(from);
        }
        assert_eq!(
            covered,
            next.end - next.start,
            "the window that failed is open to others"
        );

        fill(&first, 1);
        fill(&second, 2);
        assert!(teardown(first).is_proven());
        assert!(teardown(second).is_proven());
        assert_nothing_dirty_left(&pool);
    });
}

#[test]
fn a_lease_beyond_the_limit_is_refused_and_room_is_made_of_old_windows() {
    alone(
        "a_lease_beyond_the_limit_is_refused_and_room_is_made_of_old_windows",
        || {
            let pool = pools::builder(PageSize::Base4K, 32)
                .threads(1)
                .build()
                .unwrap();
            // A window of eight takes eleven, and this test's own buffers take less than one.
            limit(26 * BLOCK_SIZE);
            let eight = [(0, 8 * BLOCK_SIZE)];
            // More windows than fit: the closed ones have to go, one by one.
            for seed in 0..12 {
                generation(&pool, &eight, seed);
            }
            let first = pool.lease(&regions(&eight)).unwrap();
            let second = pool.lease(&regions(&eight)).unwrap();
            let before = pool.accounts();
            let error = pool.lease(&regions(&eight)).unwrap_err();
            let LeaseError::Map { bytes, source } = &error else {
                panic!("{error}");
            };
            assert_eq!(*bytes, 8 * BLOCK_SIZE);
            assert_eq!(source.source.raw_os_error(), Some(libc::ENOMEM));
            let text = error.to_string();
            assert!(
                text.contains("ulimit -v") && text.contains("mmap"),
                "{text}"
            );
            assert_eq!(pool.accounts(), before, "the pool is as it was");
            fill(&first, 1);
            fill(&second, 2);
            assert!(teardown(first).is_proven());
            generation(&pool, &eight, 3);
            assert!(teardown(second).is_proven());

            let unlimited = libc::rlimit {
                rlim_cur: libc::RLIM_INFINITY,
                rlim_max: libc::RLIM_INFINITY,
            };
            // SAFETY: a live structure of the right type.
            assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &unlimited) }, 0);
            assert_nothing_dirty_left(&pool);
        },
    );
}

/// Small windows are cut from one large reservation. When there is room for nothing else, and no guest is left in it, it has
/// to go as well.
#[test]
fn room_is_made_of_the_common_reservation_too() {
    alone("room_is_made_of_the_common_reservation_too", || {
        let blocks = 3 << 10;
        let pool = pools::builder(PageSize::Base4K, blocks)
            .threads(1)
            .build()
            .unwrap();
        generation(&pool, &[(0, BLOCK_SIZE)], 1);
        // A guest of 6 GiB of which nothing is touched: there is no room, except in place of what small ones have left.
        limit(BLOCK_SIZE);
        let lease = pool.lease(&regions(&[(0, blocks * BLOCK_SIZE)])).unwrap();
        assert!(teardown(lease).is_proven());
    });
}
