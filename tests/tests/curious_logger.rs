//! A logger of the embedder's that looks up the state of the pool for every line, scrubs its own buffer and builds pools: nothing that
//! it needs may be held meanwhile, also while the calls of the thread that works fail.

use log::{LevelFilter, Log, Metadata, Record};
use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, mpsc};
use std::time::Duration;
use vm_scrub::test_support::{Call, inject};
use vm_scrub::{BLOCK_SIZE, LeaseOptions, PageSize, Policy, Pool, scrub};
use vm_scrub_tests::peer::{self, Peer};
use vm_scrub_tests::{fill, pools, quiesce, regions};

static POOL: RwLock<Option<Pool>> = RwLock::new(None);
static ASKED: AtomicU64 = AtomicU64::new(0);
static MEASURED: AtomicU64 = AtomicU64::new(0);

struct Curious;

impl Log for Curious {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        thread_local!(static ASKS: Cell<bool> = const { Cell::new(false) });
        if ASKS.replace(true) {
            return;
        }
        let pool = POOL.read().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(pool) = pool {
            let _ = (pool.accounts(), pool.withheld(), pool.revocation());
            ASKED.fetch_add(1, Ordering::Relaxed);
        }
        // What was measured for the first time may be used.
        let said = record.args().to_string();
        if said.contains("loops measured") {
            let _ = scrub(&mut said.clone().into_bytes(), &Policy::new()).unwrap();
            if !said.contains("one page only") {
                drop(Pool::builder().capacity(BLOCK_SIZE).threads(1).build());
            }
            MEASURED.fetch_add(1, Ordering::Relaxed);
        }
        ASKS.set(false);
    }

    fn flush(&self) {}
}

#[test]
fn peer() {
    peer::serve();
}

fn set(pool: Option<Pool>) {
    *POOL.write().unwrap_or_else(PoisonError::into_inner) = pool;
}

/// Whatever has something to say: leases torn down, retired, dropped, kept by a peer and tried again, while `call` fails.
fn live_with(call: Option<Call>) {
    let pool = pools::builder(PageSize::Base4K, 6).build().unwrap();
    set(Some(pool.clone()));
    let block = regions(&[(0, BLOCK_SIZE)]);
    let shareable = LeaseOptions::new().shareable(true);
    let leases = [
        pool.lease(&block),
        pool.lease(&block),
        pool.lease(&block),
        pool.lease_with(&block, shareable.clone()),
    ]
    .map(Result::unwrap);
    leases.iter().for_each(|lease| fill(lease, 1));
    let [torn_down, retired, dropped, shared] = leases;
    let mut peer = Peer::with(&shared.file_offsets()[0].1.arc().clone());
    peer.map();
    let fault = call.map(|call| inject(call, 0, u32::MAX, libc::EIO));
    for lease in [torn_down, shared] {
        let quiesced = quiesce(&lease);
        // Whether it succeeds is for others to test.
        let _ = lease.teardown(quiesced);
    }
    drop(dropped);
    let quiesced = quiesce(&retired);
    if let Ok(ticket) = retired.retire(quiesced) {
        let _ = ticket.wait();
    }
    pool.reclaim();
    drop(peer);
    let _ = pool.lease_with(&block, shareable);
    drop(fault);
    pool.reclaim();
    set(None);
}

#[test]
fn nothing_is_held_while_the_log_is_written() {
    static CURIOUS: Curious = Curious;
    log::set_logger(&CURIOUS).unwrap();
    log::set_max_level(LevelFilter::Trace);
    let (done, finished) = mpsc::channel();
    let (step, steps) = mpsc::channel();
    std::thread::spawn(move || {
        // A page first, then the host.
        let _ = scrub(&mut [1; 100], &Policy::new()).unwrap();
        for call in std::iter::once(None).chain(Call::ALL.iter().copied().map(Some)) {
            step.send(call).unwrap();
            live_with(call);
        }
        done.send(()).unwrap();
    });
    let result = finished.recv_timeout(Duration::from_secs(120));
    assert!(
        result.is_ok(),
        "{result:?} after {:?}",
        steps.try_iter().last()
    );
    assert!(ASKED.load(Ordering::Relaxed) > 100, "nothing was said");
    // Nothing is where the environment names the loops.
    let is_named = std::env::var_os("VM_SCRUB_LOOP").is_some();
    assert!(
        is_named || MEASURED.load(Ordering::Relaxed) > 1,
        "not both were measured"
    );
}
