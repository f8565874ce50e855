//! The memory of a pool is back with the kernel when its last owner has been dropped, also while the background thread has not quite
//! left the last lease that it scrubbed.

use log::{LevelFilter, Log, Metadata, Record};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::yield_now;
use std::time::Duration;
use vm_scrub::{BLOCK_SIZE, PageSize};
use vm_scrub_tests::{fill, on_every_page_size, pools, quiesce, regions};

on_every_page_size!(
    nothing_of_it_is_left: 1,
    nothing_is_left_of_a_pool_that_ends_in_the_background: 1,
);

/// Keeps the background thread for a while at the end of a lease, when the books say already that it is clean.
struct Hesitant;

static HESITATES: AtomicBool = AtomicBool::new(false);

impl Log for Hesitant {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if record.args().to_string().contains("in the background") {
            HESITATES.store(true, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(200));
            HESITATES.store(false, Ordering::SeqCst);
        }
    }

    fn flush(&self) {}
}

/// There are other pools' threads in a process with more than one test.
static ALONE: Mutex<()> = Mutex::new(());

fn background_threads() -> usize {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    // One that ends meanwhile has no name.
    tasks
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .filter(|name| name.trim() == "vm-scrub-back")
        .count()
}

fn pool_with_a_retired_lease(page_size: PageSize) -> vm_scrub::Pool {
    let _ = log::set_logger(&Hesitant);
    log::set_max_level(LevelFilter::Info);
    let pool = pools::pool(page_size, 1);
    assert_eq!(background_threads(), 1);
    let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    fill(&lease, 0xa5);
    let quiesced = quiesce(&lease);
    drop(lease.retire(quiesced).unwrap());
    pool
}

/// Hugetlb pages are a file's, which is the kernel's again when nobody maps it and nobody has it open. How many pages the host has free
/// depends on others.
fn assert_no_file_is_left() {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("memfd:vm-scrub"), "{maps}");
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    // The directory's own descriptor is gone by then.
    let open = open.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    for file in open {
        assert!(!file.to_string_lossy().contains("memfd:vm-scrub"));
    }
}

fn nothing_of_it_is_left(page_size: PageSize) {
    let _alone = ALONE.lock().unwrap();
    let pool = pool_with_a_retired_lease(page_size);
    while !HESITATES.load(Ordering::SeqCst) {
        yield_now();
    }
    assert_eq!(pool.accounts().clean, BLOCK_SIZE, "it is scrubbed");
    drop(pool);
    assert_eq!(background_threads(), 0);
    assert_no_file_is_left();
}

/// Here the retired lease is the last owner.
fn nothing_is_left_of_a_pool_that_ends_in_the_background(page_size: PageSize) {
    let _alone = ALONE.lock().unwrap();
    drop(pool_with_a_retired_lease(page_size));
    while background_threads() > 0 {
        yield_now();
    }
    assert_no_file_is_left();
}
