//! What cannot be had is refused before anything happens, by name, with the numbers and with what to do instead.

use vm_scrub::lease::LeaseError;
use vm_scrub::{BLOCK_SIZE, PageSize, Pool, PoolError};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::{
    HugePages, PAGE, assert_nothing_dirty_left, fill, pool, pools, quiesce, regions, teardown,
};

const SIZES: [PageSize; 3] = [PageSize::Base4K, PageSize::Transparent, PageSize::Huge2M];

#[test]
fn capacities_that_are_none() {
    for page_size in SIZES {
        for bytes in [0, 1, PAGE, BLOCK_SIZE - 1, BLOCK_SIZE + PAGE, u64::MAX] {
            let builder = Pool::builder().page_size(page_size).capacity(bytes);
            let error = builder.build().unwrap_err();
            assert!(
                matches!(error, PoolError::Capacity { capacity } if capacity == bytes),
                "{error}"
            );
            let text = error.to_string();
            assert!(text.contains(&format!("{bytes} bytes")), "{text}");
            assert!(text.contains("multiple of 2097152 bytes (2 MiB)"), "{text}");
        }
        let unsaid = Pool::builder().page_size(page_size).build().unwrap_err();
        assert!(matches!(unsaid, PoolError::Capacity { capacity: 0 }));
    }
}

#[test]
fn capacities_that_no_address_space_holds() {
    let most = !(BLOCK_SIZE - 1);
    for page_size in SIZES {
        for bytes in [most, most - BLOCK_SIZE, 1 << 63, 1 << 62, 1 << 48] {
            let builder = Pool::builder().page_size(page_size).capacity(bytes);
            let error = builder.threads(1).build().unwrap_err();
            match error {
                // More than 8 PiB no processor can address, and nobody is asked.
                PoolError::Capacity { capacity } if bytes > 8 << 50 => assert_eq!(capacity, bytes),
                other if bytes > 8 << 50 => panic!("{page_size} {bytes:#x}: {other}"),
                PoolError::Map { capacity, .. } => assert_eq!(capacity, bytes),
                PoolError::NoHugePages { asked, .. } => {
                    assert_eq!((page_size, asked), (PageSize::Huge2M, bytes / BLOCK_SIZE));
                }
                other => panic!("{page_size} {bytes:#x}: {other}"),
            }
        }
    }
}

#[test]
fn numbers_of_threads_that_are_none() {
    for asked in [0, 4097, 1_000_000, usize::MAX] {
        let error = pools::builder(PageSize::Base4K, 1)
            .threads(asked)
            .build()
            .unwrap_err();
        assert!(
            matches!(error, PoolError::Threads { threads } if threads == asked),
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains(&asked.to_string()) && text.contains("1 to 4096"),
            "{text}"
        );
    }
    for threads in [1, 3] {
        let builder = pools::builder(PageSize::Base4K, 1).threads(threads);
        assert_eq!(builder.build().unwrap().threads(), threads);
    }
}

#[test]
fn threads_that_cannot_be_started() {
    alone("threads_that_cannot_be_started", || {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        let pages: u64 = statm.split(' ').next().unwrap().parse().unwrap();
        let limit = libc::rlimit {
            rlim_cur: pages * PAGE + (256 << 20),
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: `limit` is a live structure of the right type.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
        // 2 MiB of stack each.
        let builder = pools::builder(PageSize::Base4K, 1).threads(1024);
        let error = builder.build().unwrap_err();
        assert!(
            matches!(error, PoolError::Workers { threads: 1024, .. }),
            "{error}"
        );
        assert!(
            error
                .to_string()
                .contains("1024 scrubbing threads could not be started")
        );
        assert!(error.to_string().contains("ulimit -u"));
    });
}

#[test]
fn more_hugetlb_pages_than_there_are() {
    // More than any host has, so that it does not matter what other tests reserve meanwhile.
    let wanted = 1 << 22;
    let error = pools::builder(PageSize::Huge2M, wanted)
        .build()
        .unwrap_err();
    let PoolError::NoHugePages { asked, free } = error else {
        panic!("{error}");
    };
    assert_eq!(asked, wanted);
    let text = error.to_string();
    assert!(
        text.contains(&format!("{asked} free hugetlb pages of 2 MiB are needed")),
        "{text}"
    );
    if let Some(free) = free {
        assert!(text.contains(&format!("and {free} are free")), "{text}");
    }
    assert!(text.contains("sysctl vm.nr_hugepages"), "{text}");
}

#[test]
fn layouts_that_are_none() {
    let pool = pool(PageSize::Base4K, 4);
    let last_page = u64::MAX - PAGE + 1;
    let refused = |layout: &[(u64, u64)]| {
        let error = pool.lease(&regions(layout)).unwrap_err();
        assert_eq!(pool.accounts().clean, pool.capacity());
        (error.to_string(), error)
    };
    let (text, error) = refused(&[]);
    assert!(matches!(error, LeaseError::NoRegions), "{text}");

    let (text, error) = refused(&[(0, PAGE), (0x5000, 0)]);
    assert!(matches!(
        error,
        LeaseError::EmptyRegion {
            guest_address: 0x5000
        }
    ));
    assert!(text.contains("0x5000 is empty"), "{text}");

    for (address, bytes) in [(0x1001, PAGE), (0x1000, PAGE + 1), (0x1000, 1)] {
        let (text, error) = refused(&[(address, bytes)]);
        assert!(matches!(
            error,
            LeaseError::Unaligned {
                granularity: PAGE,
                ..
            }
        ));
        let place = format!("{bytes:#x} bytes at guest address {address:#x}");
        assert!(
            text.contains(&place) && text.contains("multiples of 0x1000"),
            "{text}"
        );
    }
    for (address, bytes) in [(last_page, PAGE), (last_page, 2 * PAGE), (PAGE, last_page)] {
        let (text, error) = refused(&[(0, PAGE), (address, bytes)]);
        assert!(matches!(error, LeaseError::Wraps { .. }), "{text}");
        assert!(text.contains(&format!("{address:#x}")), "{text}");
    }
    for layout in [
        [(0, 2 * PAGE), (PAGE, PAGE)],
        [(PAGE, PAGE), (0, 2 * PAGE)],
        [(PAGE, PAGE), (PAGE, PAGE)],
    ] {
        let (text, error) = refused(&layout);
        let LeaseError::Overlap { first, second } = error else {
            panic!("{text}");
        };
        assert!(first.guest_address <= second.guest_address);
        assert!(text.contains("overlap"), "{text}");
    }
}

#[test]
fn hugetlb_guests_have_regions_of_2_mib() {
    let Some(_reserved) = HugePages::reserve(2) else {
        return;
    };
    let pool = pool(PageSize::Huge2M, 2);
    for (address, bytes) in [(0, PAGE), (PAGE, BLOCK_SIZE), (0, BLOCK_SIZE + PAGE)] {
        let error = pool.lease(&regions(&[(address, bytes)])).unwrap_err();
        let granularity_is_right = matches!(
            error,
            LeaseError::Unaligned {
                granularity: BLOCK_SIZE,
                ..
            }
        );
        assert!(granularity_is_right, "{error}");
        assert!(error.to_string().contains("0x200000"), "{error}");
    }
}

#[test]
fn more_than_the_pool_has() {
    let pool = pool(PageSize::Base4K, 10);
    let guest = |blocks| {
        let lease = pool.lease(&regions(&[(0, blocks * BLOCK_SIZE)])).unwrap();
        fill(&lease, 1);
        lease
    };
    let (leased, dirty, lost) = (guest(1), guest(2), guest(3));
    let quiesced = quiesce(&dirty);
    let dirty = dirty.revoke(quiesced).unwrap();
    let quiesced = quiesce(&lost);
    drop(lost.revoke(quiesced).unwrap());

    // Each region takes whole blocks: two pages are two blocks here.
    let five = [
        (0, PAGE),
        (BLOCK_SIZE, PAGE),
        (1 << 40, 2 * BLOCK_SIZE + PAGE),
    ];
    let error = pool.lease(&regions(&five)).unwrap_err();
    let text = error.to_string();
    let LeaseError::NotEnough { asked, accounts } = error else {
        panic!("{text}");
    };
    assert_eq!(asked, 5 * BLOCK_SIZE);
    assert_eq!(accounts, pool.accounts());
    let blocks = |bytes| bytes / BLOCK_SIZE;
    assert_eq!(blocks(accounts.clean), 4);
    assert_eq!(blocks(accounts.leased), 1);
    assert_eq!(blocks(accounts.dirty), 2);
    assert_eq!(blocks(accounts.quarantined), 3);
    let numbers = "10485760 bytes in blocks of 2097152 were asked for and 8388608 are free (2097152 leased, 4194304 being \
                   scrubbed, 6291456 quarantined)";
    assert!(text.contains(numbers), "{text}");

    // Numbers near the end of what 64 bits hold are numbers, too.
    for bytes in [1 << 63, u64::MAX - 2 * PAGE + 1] {
        let error = pool.lease(&regions(&[(0, bytes)])).unwrap_err();
        assert!(
            matches!(error, LeaseError::NotEnough { asked, .. } if asked >= bytes),
            "{error}"
        );
    }
    assert!(dirty.scrub_and_verify().recycle().unwrap().is_proven());
    assert!(teardown(leased).is_proven());
    assert_nothing_dirty_left(&pool);
}
