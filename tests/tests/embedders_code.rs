//! Code of the embedder's that runs in the middle of the library's, and fails there: dirty bitmaps, callbacks, threads of its own
//! thread pool.

use log::{LevelFilter, Log, Metadata, Record};
use std::panic::{AssertUnwindSafe, catch_unwind, panic_any};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use vm_memory::bitmap::{BS, Bitmap, WithBitmapSlice};
use vm_memory::{Bytes, MemoryRegionAddress};
use vm_scrub::lease::Ticket;
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{
    BLOCK_SIZE, Lease, LeaseOptions, PageSize, Policy, RevokeBy, ScrubRate, ScrubReceipt,
    TeardownError,
};
use vm_scrub_tests::child::{alone, end_of};
use vm_scrub_tests::maps::is_readable;
use vm_scrub_tests::peer::{self, Peer};
use vm_scrub_tests::{fill, pools, quiesce, regions};

#[test]
fn peer() {
    peer::serve();
}

/// Panics when it is dropped, if it is told to, and nothing else is panicking.
#[derive(Debug)]
struct Explosive(bool);

impl Drop for Explosive {
    fn drop(&mut self) {
        assert!(!self.0 || std::thread::panicking(), "on purpose");
    }
}

impl WithBitmapSlice<'_> for Explosive {
    type S = ();
}

impl Bitmap for Explosive {
    fn mark_dirty(&self, _: usize, _: usize) {}

    fn dirty_at(&self, _: usize) -> bool {
        false
    }

    fn slice_at(&self, _: usize) -> BS<'_, Self> {}
}

/// A lease that is dropped counts who still owns its regions, and so drops bitmaps of those that nobody does.
#[test]
fn a_bitmap_that_panics_unmaps_nothing_that_is_in_use() {
    let test = "a_bitmap_that_panics_unmaps_nothing_that_is_in_use";
    let Some((status, output)) = end_of(test, || {
        let builder = pools::builder(PageSize::Base4K, 4);
        let pool = builder.kept_windows(0).build().unwrap();
        let layout = regions(&[(0, BLOCK_SIZE), (BLOCK_SIZE, BLOCK_SIZE)]);
        let lease = pool.lease(&layout).unwrap();
        let mut first = true;
        let mut regions = lease.regions(|_| Explosive(std::mem::take(&mut first)));
        let used = regions.pop().unwrap();
        used.write_obj(7_u64, MemoryRegionAddress(0)).unwrap();
        drop(regions);
        catch_unwind(AssertUnwindSafe(|| drop(lease))).unwrap_err();
        let value: u64 = used.read_obj(MemoryRegionAddress(0)).unwrap();
        assert_eq!(value, 7);
        assert_eq!(pool.accounts().quarantined, 2 * BLOCK_SIZE);
    }) else {
        return;
    };
    assert!(status.success(), "{status}\n{output}");
}

/// What a panic throws is dropped by whoever catches it, and may panic again.
#[test]
fn a_callback_that_panics_twice_does_not_end_the_background() {
    let once = AtomicBool::new(true);
    let pool = pools::builder(PageSize::Base4K, 2)
        .on_progress(move |_| {
            if once.swap(false, Ordering::SeqCst) {
                panic_any(Explosive(true));
            }
        })
        .build()
        .unwrap();
    let retire = || {
        let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
        fill(&lease, 1);
        let quiesced = quiesce(&lease);
        lease.retire(quiesced).unwrap()
    };
    retire().wait_in_background().unwrap_err();
    let (done, finished) = mpsc::channel();
    let next = retire();
    std::thread::spawn(move || done.send(next.wait_in_background().unwrap().is_proven()));
    let proven = finished.recv_timeout(Duration::from_secs(30));
    assert_eq!(proven, Ok(true), "nobody works in the background any more");
}

/// Where several threads panic, and what they threw panics again when it is dropped, nobody is at work any more when the caller unwinds.
#[test]
fn callbacks_that_all_panic_leave_nobody_at_work() {
    let test = "callbacks_that_all_panic_leave_nobody_at_work";
    let Some((status, output)) = end_of(test, || {
        for caller_is_last in [true, false] {
            let caller = std::thread::current().id();
            let at_work = Arc::new(AtomicU64::new(0));
            let count = Arc::clone(&at_work);
            let pool = pools::builder(PageSize::Base4K, 8)
                .threads(3)
                .on_progress(move |_| {
                    count.fetch_add(1, Ordering::SeqCst);
                    let is_caller = std::thread::current().id() == caller;
                    // The last worker goes on, slowly.
                    let goes_on = std::thread::current().name() == Some("vm-scrub-2");
                    let first = is_caller != caller_is_last;
                    let pause = if first { 1 } else { 100 };
                    std::thread::sleep(Duration::from_millis(pause));
                    count.fetch_sub(1, Ordering::SeqCst);
                    if !goes_on {
                        panic_any(Explosive(true));
                    }
                })
                .build()
                .unwrap();
            let lease = pool.lease(&regions(&[(0, 8 * BLOCK_SIZE)])).unwrap();
            fill(&lease, 1);
            let quiesced = quiesce(&lease);
            let torn_down = catch_unwind(AssertUnwindSafe(|| lease.teardown(quiesced)));
            std::mem::forget(torn_down.unwrap_err());
            for _ in 0..20 {
                assert_eq!(at_work.load(Ordering::SeqCst), 0);
                std::thread::sleep(Duration::from_millis(10));
            }
            assert_eq!(pool.accounts().quarantined, 8 * BLOCK_SIZE);
        }
    }) else {
        return;
    };
    assert!(status.success(), "{status}\n{output}");
}

/// Waits for a ticket when it is dropped.
struct WaitsAtLast(Option<Ticket>);

impl Drop for WaitsAtLast {
    fn drop(&mut self) {
        let ticket = self.0.take().unwrap();
        let _ = catch_unwind(AssertUnwindSafe(|| ticket.wait()));
    }
}

/// Who waits for a ticket works, too, and may be unwinding already when its callback panics.
#[test]
fn a_callback_that_panics_while_its_thread_unwinds_gives_the_lease_up() {
    alone(
        "a_callback_that_panics_while_its_thread_unwinds_gives_the_lease_up",
        || {
            let (done, finished) = mpsc::channel();
            std::thread::spawn(move || {
                let waiter = std::thread::current().id();
                let pool = pools::builder(PageSize::Base4K, 8)
                    .threads(2)
                    .scrub_rate(ScrubRate {
                        bytes_per_second: 1,
                        burst: 1,
                    })
                    .on_progress(move |_| {
                        assert_ne!(std::thread::current().id(), waiter, "on purpose");
                        std::thread::sleep(Duration::from_millis(2));
                    })
                    .build()
                    .unwrap();
                let lease = pool.lease(&regions(&[(0, 8 * BLOCK_SIZE)])).unwrap();
                fill(&lease, 1);
                let quiesced = quiesce(&lease);
                let ticket = lease.retire(quiesced).unwrap();
                let unwound = catch_unwind(AssertUnwindSafe(|| {
                    let _waits = WaitsAtLast(Some(ticket));
                    panic!("the embedder's own");
                }));
                done.send((unwound.is_err(), pool.accounts())).unwrap();
            });
            let (unwound, accounts) = finished.recv_timeout(Duration::from_secs(30)).unwrap();
            assert!(unwound);
            assert_eq!((accounts.dirty, accounts.quarantined), (0, 8 * BLOCK_SIZE));
        },
    );
}

/// A thread of the VMM's own rayon pool goes on with other work of that pool while it waits for the library's threads, and that may
/// ask for memory too.
#[test]
fn a_thread_of_the_embedders_pool_does_not_wait_for_itself() {
    alone(
        "a_thread_of_the_embedders_pool_does_not_wait_for_itself",
        || {
            let pool = pools::builder(PageSize::Base4K, 8)
                .threads(2)
                .build()
                .unwrap();
            let all = regions(&[(0, 8 * BLOCK_SIZE)]);
            let shareable = LeaseOptions::new().shareable(true);
            let lease = pool.lease_with(&all, shareable).unwrap();
            fill(&lease, 3);
            let file = Arc::clone(lease.file_offsets()[0].1.arc());
            let mut peer = Peer::with(&file);
            peer.map();
            drop(file);
            let quiesced = quiesce(&lease);
            assert!(!lease.teardown(quiesced).unwrap().is_proven());
            assert_eq!(pool.withheld().len(), 1);
            let builder = rayon::ThreadPoolBuilder::new().num_threads(1);
            let of_the_vmm = builder.build().unwrap();
            let refused = Arc::new(AtomicU64::new(0));
            for _ in 0..2 {
                let (pool, refused) = (pool.clone(), Arc::clone(&refused));
                of_the_vmm.spawn(move || {
                    // So that the other one is there to be taken.
                    std::thread::sleep(Duration::from_millis(100));
                    // Tries the withheld memory again, which is large enough for all threads.
                    pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap_err();
                    refused.fetch_add(1, Ordering::SeqCst);
                });
            }
            for _ in 0..3000 {
                if refused.load(Ordering::SeqCst) == 2 {
                    return;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            panic!("they wait for each other");
        },
    );
}

/// Panics at the first line with this text, and says nothing.
struct Panicking(Mutex<Option<&'static str>>);

static LOGGER: Panicking = Panicking(Mutex::new(None));

impl Log for Panicking {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let said = record.args().to_string();
        let mut at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if at.is_some_and(|at| said.contains(at)) {
            *at = None;
            drop(at);
            panic!("on purpose, at: {said}");
        }
    }

    fn flush(&self) {}
}

/// In a process of its own: there is one logger for all of a process.
fn with_a_logger_that_panics(test: &str, at: &'static str, body: impl FnOnce()) {
    alone(test, || {
        log::set_logger(&LOGGER).unwrap();
        log::set_max_level(LevelFilter::Trace);
        *LOGGER.0.lock().unwrap() = Some(at);
        body();
        assert_eq!(*LOGGER.0.lock().unwrap(), None, "that was not said");
    });
}

fn torn_down(lease: Lease) -> std::thread::Result<Result<ScrubReceipt, TeardownError>> {
    let quiesced = quiesce(&lease);
    catch_unwind(AssertUnwindSafe(|| lease.teardown(quiesced)))
}

#[test]
fn a_logger_that_panics_once_does_so_once() {
    let test = "a_logger_that_panics_once_does_so_once";
    with_a_logger_that_panics(test, "populating page by page", || {
        let policy = Policy::new().probe(true);
        let builder = pools::builder(PageSize::Base4K, 2).threads(1);
        let pool = builder.policy(policy).build().unwrap();
        let _older_kernel = inject(Call::Populate, 0, u32::MAX, libc::EINVAL);
        let lease = || {
            let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
            fill(&lease, 1);
            lease
        };
        torn_down(lease()).unwrap_err();
        assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
        assert!(torn_down(lease()).unwrap().unwrap().is_proven());
        assert_eq!(pool.accounts().quarantined, BLOCK_SIZE);
    });
}

/// As one that writes to a standard error that is gone: the teardown panics, and so does what is dropped by that.
#[test]
fn a_logger_that_always_panics_does_not_end_the_process() {
    struct Always;
    impl Log for Always {
        fn enabled(&self, _: &Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &Record<'_>) {
            panic!("on purpose, at: {}", record.args());
        }
        fn flush(&self) {}
    }
    alone(
        "a_logger_that_always_panics_does_not_end_the_process",
        || {
            let builder = pools::builder(PageSize::Base4K, 5).threads(1);
            let pool = builder.revoke_by(RevokeBy::Mremap).build().unwrap();
            let lease = || {
                let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
                fill(&lease, 1);
                lease
            };
            let [first, second, third] = [lease(), lease(), lease()];
            let shareable = pools::dirty_shareable_block(&pool);
            let owner = third.memory();
            log::set_logger(&Always).unwrap();
            log::set_max_level(LevelFilter::Trace);
            {
                let _fault = inject(Call::Mremap, 0, u32::MAX, libc::ENOMEM);
                torn_down(first).unwrap_err();
            }
            // Dropped by a panic of the VMM's.
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                let _dropped = (second, third, shareable);
                panic!("on purpose")
            }));
            panicked.unwrap_err();
            drop(owner);
            assert_eq!(pool.accounts().quarantined, 4 * BLOCK_SIZE);
            assert_eq!(pool.accounts().clean, BLOCK_SIZE);
        },
    );
}

/// Memory that was not revoked may still be in use: its window stays, also if the teardown ends there.
#[test]
fn a_logger_that_panics_unmaps_nothing_that_was_not_revoked() {
    let test = "a_logger_that_panics_unmaps_nothing_that_was_not_revoked";
    with_a_logger_that_panics(test, "not revoked and quarantined", || {
        let builder = pools::builder(PageSize::Base4K, 4).threads(1);
        let pool = builder
            .revoke_by(RevokeBy::Mremap)
            .kept_windows(0)
            .build()
            .unwrap();
        let layout = regions(&[(0, 2 * BLOCK_SIZE), (1 << 30, 2 * BLOCK_SIZE)]);
        let lease = pool.lease(&layout).unwrap();
        fill(&lease, 1);
        let windows: Vec<_> = lease.host_addresses();
        let _fault = inject(Call::Mremap, 0, u32::MAX, libc::ENOMEM);
        torn_down(lease).unwrap_err();
        assert_eq!(pool.accounts().quarantined, 4 * BLOCK_SIZE);
        for (_, start) in windows {
            assert!(is_readable(start.addr()));
        }
    });
}

#[test]
fn a_logger_that_panics_loses_nothing_that_is_withheld() {
    let test = "a_logger_that_panics_loses_nothing_that_is_withheld";
    with_a_logger_that_panics(test, "to be tried again", || {
        let pool = pools::builder(PageSize::Base4K, 2)
            .threads(1)
            .build()
            .unwrap();
        let lease = pools::dirty_shareable_block(&pool);
        let mut peer = Peer::with(&lease.file_offsets()[0].1.arc().clone());
        peer.map();
        torn_down(lease).unwrap_err();
        assert_eq!(pool.withheld().len(), 1);
        drop(peer);
        let begun = Instant::now();
        while pool.accounts().clean < pool.capacity() {
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "{:?}",
                pool.withheld()
            );
            pool.reclaim();
        }
    });
}

#[test]
fn a_logger_that_panics_changes_nothing_of_what_a_ticket_says() {
    let test = "a_logger_that_panics_changes_nothing_of_what_a_ticket_says";
    with_a_logger_that_panics(test, "scrubbed in the background", || {
        let pool = pools::builder(PageSize::Base4K, 2)
            .threads(1)
            .build()
            .unwrap();
        let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
        fill(&lease, 1);
        let quiesced = quiesce(&lease);
        let ticket = lease.retire(quiesced).unwrap();
        assert!(ticket.wait().unwrap().is_proven());
        assert_eq!(pool.accounts().clean, pool.capacity());
    });
}
