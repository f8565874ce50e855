//! Everything that the library uses where the kernel has it, switched off by the answer that a kernel without it gives: what a
//! Linux 5.10 cannot do is done another way, and a guest's memory is proven clean all the same.
//!
//! `PAGEMAP_SCAN` is in `residency.rs`. What the kernel cannot do is remembered by the whole process, so some run in a child.

use vm_scrub::lease::QuarantineReason;
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{
    BLOCK_SIZE, LeaseOptions, PageSize, Policy, PoolBuilder, PoolError, RevokeBy, scrub_raw,
};
use vm_scrub_tests::child::alone;
use vm_scrub_tests::logs;
use vm_scrub_tests::maps::populated_bytes;
use vm_scrub_tests::{
    HugePages, assert_all_zero, assert_nothing_dirty_left, fill, huge_pages, on_every_page_size,
    on_small_page_sizes, pools, regions, teardown,
};

on_every_page_size!(without_madv_populate_write: 4);
on_small_page_sizes!(without_guard_pages, without_page_merging);

/// Faults belong to a thread, so these pools do all their work on the calling one.
fn builder(page_size: PageSize) -> PoolBuilder {
    pools::builder(page_size, 4).threads(1)
}

const WHOLE: [(u64, u64); 1] = [(0, 4 * BLOCK_SIZE)];

/// Linux 5.14. All of the pool is populated nevertheless, and so are the windows of its guests.
fn without_madv_populate_write(page_size: PageSize) {
    let missing = inject(Call::Populate, 0, u32::MAX, libc::EINVAL);
    let pool = builder(page_size).populate(true).build().unwrap();
    assert!(missing.hits() > 0);
    for _ in 0..2 {
        let lease = pool.lease(&regions(&WHOLE)).unwrap();
        let (_, start) = lease.host_addresses().remove(0);
        let window = start.addr()..start.addr() + lease.bytes() as usize;
        assert_eq!(populated_bytes(window), lease.bytes());
        assert_all_zero(&lease);
        fill(&lease, 1);
        let receipt = teardown(lease);
        assert!(receipt.is_proven());
        assert_eq!(receipt.bytes_scrubbed, receipt.bytes_total);
    }
    assert_nothing_dirty_left(&pool);
}

/// Memory that cannot be had is an error also where it is touched page by page, and no signal.
#[test]
fn without_madv_populate_write_a_hugetlb_page_that_is_gone_is_quarantined() {
    let Some(_reserved) = HugePages::reserve_alone(4) else {
        return;
    };
    let missing = inject(Call::Populate, 0, u32::MAX, libc::EINVAL);
    let pool = builder(PageSize::Huge2M).build().unwrap();
    let lease = pool.lease(&regions(&WHOLE)).unwrap();
    fill(&lease, 1);
    let (_, start) = lease.host_addresses().remove(0);
    let third = start.wrapping_add(2 * BLOCK_SIZE as usize);
    // SAFETY: the range lies in the lease's window, to which nobody holds a reference.
    let status = unsafe { libc::madvise(third.cast(), BLOCK_SIZE as usize, libc::MADV_REMOVE) };
    assert_eq!(status, 0, "{}", std::io::Error::last_os_error());
    let everything = huge_pages::free();
    let other = pools::builder(PageSize::Huge2M, everything)
        .build()
        .unwrap();

    let receipt = teardown(lease);
    assert!(missing.hits() > 0);
    assert_eq!(receipt.bytes_quarantined, BLOCK_SIZE, "{receipt:?}");
    let range = &receipt.quarantined[0];
    assert_eq!(range.guest_address, 2 * BLOCK_SIZE);
    assert_eq!(range.reason, QuarantineReason::ResidencyUnknown);
    assert!(range.detail.contains(Call::Touch.name()), "{range:?}");
    drop(other);
    assert_nothing_dirty_left(&pool);
}

/// Linux 5.14. Hugetlb pages of a sealed file are read without having been asked for.
#[test]
fn without_madv_populate_read() {
    let Some(_reserved) = HugePages::reserve_alone(8) else {
        return;
    };
    let pool = builder(PageSize::Huge2M).build().unwrap();
    let options = LeaseOptions::new().shareable(true);
    let lease = pool.lease_with(&regions(&WHOLE), options).unwrap();
    fill(&lease, 1);
    let missing = inject(Call::PopulateRead, 0, u32::MAX, libc::EINVAL);
    let receipt = teardown(lease);
    assert!(missing.hits() > 0);
    drop(missing);
    assert!(receipt.is_proven(), "{receipt:?}");
    assert_eq!(receipt.bytes_verified, receipt.bytes_total);
    assert_nothing_dirty_left(&pool);
}

/// An operator sees in the log what a kernel has, and not for each pool again.
#[test]
fn what_the_kernel_has_is_logged_once() {
    alone("what_the_kernel_has_is_logged_once", || {
        for expected in [true, false] {
            logs::listen();
            drop(builder(PageSize::Base4K).build().unwrap());
            assert_eq!(logs::heard(log::Level::Info, "the kernel has "), expected);
        }
    });
}

/// A logger that panics at that line, as one does whose terminal is gone, or that builds a pool of its own.
#[test]
fn who_hears_what_the_kernel_has_may_build_pools() {
    struct Busy;
    impl log::Log for Busy {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            if record.args().to_string().contains("the kernel has ") {
                drop(builder(PageSize::Base4K).build().unwrap());
                panic!("on purpose");
            }
        }
        fn flush(&self) {}
    }
    alone("who_hears_what_the_kernel_has_may_build_pools", || {
        log::set_logger(&Busy).unwrap();
        log::set_max_level(log::LevelFilter::Info);
        let first = std::panic::catch_unwind(|| builder(PageSize::Base4K).build().is_ok());
        assert!(first.is_err());
        drop(builder(PageSize::Base4K).build().unwrap());
    });
}

/// A kernel that was built without hugetlb pages, or without those of 2 MiB.
#[test]
fn without_hugetlb_pages() {
    for errno in [libc::EINVAL, libc::ENODEV, libc::ENOENT] {
        let _missing = inject(Call::MemfdCreate, 0, 1, errno);
        let error = builder(PageSize::Huge2M).build().unwrap_err();
        assert!(
            matches!(error, PoolError::NoHugePages { free: None, .. }),
            "{error}"
        );
    }
}

/// A page that cannot be populated either way: the pool is not built, and the error names the call.
#[test]
fn without_madv_populate_write_a_pool_that_cannot_be_populated_is_an_error() {
    let _missing = inject(Call::Populate, 0, u32::MAX, libc::EINVAL);
    let touch = inject(Call::Touch, 700, 1, libc::ENOMEM);
    let error = builder(PageSize::Base4K)
        .populate(true)
        .build()
        .unwrap_err();
    assert!(touch.hits() > 0);
    assert!(matches!(error, PoolError::Populate { .. }), "{error}");
    assert!(error.to_string().contains(Call::Touch.name()), "{error}");
}

/// `MADV_GUARD_REMOVE`, Linux 6.13: the last advice before memory is moved by `mremap`. Where it is moved with proof, it is given only if
/// something is not in memory.
fn without_guard_pages(page_size: PageSize) {
    let builder = builder(page_size).revoke_by(RevokeBy::Mremap);
    let pool = builder.build().unwrap();
    let lease = pool.lease(&regions(&WHOLE)).unwrap();
    fill(&lease, 1);
    let missing = inject(Call::Madvise, 7, 1, libc::EINVAL);
    let receipt = teardown(lease);
    assert_eq!(missing.hits(), 1);
    drop(missing);
    assert!(receipt.is_proven(), "{receipt:?}");
    assert_nothing_dirty_left(&pool);
}

/// A kernel that was built without KSM refuses `MADV_UNMERGEABLE`: the third advice for an arena.
fn without_page_merging(page_size: PageSize) {
    let missing = inject(Call::Madvise, 2, 1, libc::EINVAL);
    let pool = builder(page_size).build().unwrap();
    assert_eq!(missing.hits(), 1);
    drop(missing);
    let lease = pool.lease(&regions(&WHOLE)).unwrap();
    fill(&lease, 1);
    assert!(teardown(lease).is_proven());
    assert_nothing_dirty_left(&pool);
}

/// A kernel that was built without transparent huge pages refuses advice about them, the fifth for an arena. Small pages are
/// all it has, so who asked for those gets them, and who asked for huge ones is told.
#[test]
fn without_transparent_huge_pages() {
    let missing = inject(Call::Madvise, 4, 1, libc::EINVAL);
    let pool = builder(PageSize::Base4K).build().unwrap();
    assert_eq!(missing.hits(), 1);
    drop(missing);
    let lease = pool.lease(&regions(&WHOLE)).unwrap();
    fill(&lease, 1);
    assert!(teardown(lease).is_proven());

    let _missing = inject(Call::Madvise, 4, 1, libc::EINVAL);
    let error = builder(PageSize::Transparent).build().unwrap_err();
    assert!(
        matches!(error, PoolError::NoTransparentHugePages { .. }),
        "{error}"
    );
}

/// `PROCMAP_QUERY`, Linux 6.11: without it `/proc/self/maps` is read, and asked again no more.
#[test]
fn without_procmap_query() {
    alone("without_procmap_query", || {
        let missing = inject(Call::MapsQuery, 0, u32::MAX, libc::ENOTTY);
        scrub_raw_finds_what_was_touched();
        assert_eq!(missing.hits(), 1);
        drop(missing);
        let failing = inject(Call::MapsQuery, 0, u32::MAX, libc::EIO);
        scrub_raw_finds_what_was_touched();
        assert_eq!(failing.hits(), 0, "asked again");
    });
}

/// A sandbox or an emulator, which knows none of the newer questions and has an answer of its own to them.
#[test]
fn with_something_that_stands_in_for_a_kernel() {
    alone("with_something_that_stands_in_for_a_kernel", || {
        let missing = inject(Call::MapsQuery, 0, u32::MAX, libc::ENOSYS);
        let _too = inject(Call::PagemapScan, 0, u32::MAX, libc::ENOSYS);
        scrub_raw_finds_what_was_touched();
        assert_eq!(missing.hits(), 2);
    });
}

fn scrub_raw_finds_what_was_touched() {
    const LEN: usize = 2 << 20;
    const PAGE: usize = 4096;
    // SAFETY: a mapping at a place of the kernel's choice, that nobody else refers to. Huge pages would populate neighbours.
    unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let mapped = libc::mmap(std::ptr::null_mut(), LEN, prot, flags, -1, 0);
        assert_ne!(mapped, libc::MAP_FAILED);
        assert_eq!(libc::madvise(mapped, LEN, libc::MADV_NOHUGEPAGE), 0);
        let start = mapped.cast::<u8>();
        for page in [0, 3, 511] {
            start.add(page * PAGE).write_volatile(0x5e);
        }
        let done = scrub_raw(start, LEN, &Policy::new()).unwrap();
        assert_eq!(done.bytes as usize, 3 * PAGE);
        assert!((0..LEN).all(|at| start.add(at).read_volatile() == 0));
        assert_eq!(libc::munmap(mapped, LEN), 0);
    }
}
