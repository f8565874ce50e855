//! Memslots that come and go while vCPUs write: leases are registered, removed and torn down on several threads at once, on a
//! machine whose vCPUs nobody stops for it, in an order that is random and the same in each run.
//!
//! Every run of the machine writes a word of its own, so that what is found in a lease says who wrote it and when.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use kvm_ioctls::VmFd;
use vm_memory::{Bytes, GuestAddress};
use vm_scrub::kvm::{MemslotOptions, Memslots};
use vm_scrub::lease::Refusal;
use vm_scrub::{BLOCK_SIZE, Lease, PageSize, Pool, Quiesced, ScrubReceipt, TeardownError};
use vm_scrub_tests::kvm::{
    ABOVE_HOLE, LIMIT, assert_out_of_reach, edges, number_of, ranges, refused, secret,
};
use vm_scrub_tests::numbers::Numbers;
use vm_scrub_tests::{
    assert_adds_up, assert_all_zero, assert_nothing_dirty_left, fill, kvm_on_every_page_size, pool,
    quiesce, regions, teardown,
};
use vm_scrub_vmm::{Machine, VcpuStop};

kvm_on_every_page_size!(memslots_come_and_go_while_vcpus_write: super::BLOCKS);

/// Each has a thread that leases memory for it, over and over, and a vCPU that writes there, whether there is memory or not.
const BAYS: u64 = 3;

/// Guests that each bay's thread lets come and go.
const GUESTS: u64 = 40;

/// Two for each bay, as many that are retired and not scrubbed yet, and what the witness has.
const BLOCKS: u64 = 4 * BAYS + 2;

/// Where the memory of a bay begins in the machine.
fn place(bay: u64) -> u64 {
    ABOVE_HOLE + bay * 64 * BLOCK_SIZE
}

/// What all threads see.
struct Race {
    pool: Pool,
    vm: Arc<VmFd>,
    /// The number of the run that is going on: what vCPUs write.
    run: AtomicU64,
    /// Threads that have not finished.
    busy: AtomicUsize,
    /// Leases in which something was written.
    written: AtomicU64,
    /// Registrations that found the lease gone, and teardowns that found it registered.
    too_late: AtomicU64,
    refused: AtomicU64,
}

impl Race {
    /// How often each of the things has happened that are to be seen.
    fn counts(&self) -> [u64; 3] {
        let counts = [&self.written, &self.too_late, &self.refused];
        counts.map(|count| count.load(Ordering::SeqCst))
    }
}

fn memslots_come_and_go_while_vcpus_write(page_size: PageSize) {
    let machine = Machine::new(BAYS as usize).unwrap();
    let race = Race {
        pool: pool(page_size, BLOCKS),
        vm: Arc::clone(machine.vm()),
        run: AtomicU64::new(1),
        busy: AtomicUsize::new(BAYS as usize),
        written: AtomicU64::new(0),
        too_late: AtomicU64::new(0),
        refused: AtomicU64::new(0),
    };
    scope(|scope| {
        for bay in 0..BAYS {
            let race = &race;
            scope.spawn(move || {
                let _busy = Busy(race);
                let mut numbers = Numbers(0x5eed_0000 + bay);
                // More of them where threads take turns so rarely that nobody comes too late.
                for number in 0..20 * GUESTS {
                    if number >= GUESTS && race.counts().iter().all(|count| *count > 0) {
                        break;
                    }
                    guest(race, bay, number, &mut numbers);
                }
            });
        }
        scope.spawn(|| witness(&race));
        run_vcpus(&race, &machine);
    });
    let counts = race.counts();
    assert!(counts.iter().all(|count| *count > 0), "no race: {counts:?}");
    let all: Vec<_> = (0..BAYS).map(|bay| (place(bay), 2 * BLOCK_SIZE)).collect();
    assert_out_of_reach(&machine, &edges(&all));
    assert_eq!(race.pool.accounts().clean, race.pool.capacity());
    assert_nothing_dirty_left(&race.pool);
}

/// A thread that is done, or panics: the others must not wait for it.
struct Busy<'a>(&'a Race);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.busy.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Runs all vCPUs, each on its bay, for a moment, over and over. What ends one is a kick, or that there is no memslot: its
/// memory is never gone while it has one.
fn run_vcpus(race: &Race, machine: &Machine) {
    let mut numbers = Numbers(0x5eed_ffff);
    let (mut kicked, mut lost) = (0, 0);
    while race.busy.load(Ordering::SeqCst) > 0 {
        let run = race.run.fetch_add(1, Ordering::SeqCst) + 1;
        // As much for each bay, so that each vCPU has one.
        let bytes = (1 + numbers.below(2)) * BLOCK_SIZE;
        let all: Vec<_> = (0..BAYS).map(|bay| (place(bay), bytes)).collect();
        let running = machine.start_fill_forever(&all, secret(run)).unwrap();
        sleep(Duration::from_micros(numbers.below(4_000)));
        let stops = running.stop(LIMIT).unwrap();
        assert_eq!(stops.len(), BAYS as usize);
        for (bay, stop) in (0..).zip(&stops) {
            match stop {
                VcpuStop::Kicked => kicked += 1,
                VcpuStop::Mmio { gpa, .. } => {
                    let end = place(bay) + 2 * BLOCK_SIZE;
                    assert!((place(bay)..end).contains(gpa), "{stops:?}");
                    lost += 1;
                }
                _ => panic!("the memory was gone before its memslot: {stops:?}"),
            }
        }
    }
    assert!(kicked > 0 && lost > 0, "{kicked} and {lost}");
}

/// One guest's memory in a bay, from the lease to its end, whichever that is.
fn guest(race: &Race, bay: u64, number: u64, numbers: &mut Numbers) {
    let bytes = (1 + numbers.below(2)) * BLOCK_SIZE;
    let lease = race.pool.lease(&regions(&[(place(bay), bytes)])).unwrap();
    assert_all_zero(&lease);
    let first = race.run.load(Ordering::SeqCst);
    let mut memslots = register(race, &lease, bay);
    sleep(Duration::from_micros(numbers.below(3_000)));
    if number >= GUESTS {
        await_the_first_write(race, &lease, bay);
    }
    match numbers.below(5) {
        0 => {
            let quiesced = memslots.remove().unwrap();
            assert_written_since(race, &lease, first);
            assert_clean(&lease.teardown(quiesced).unwrap());
        }
        1 => {
            let quiesced = memslots.remove().unwrap();
            let ticket = lease.retire(quiesced).unwrap();
            sleep(Duration::from_micros(numbers.below(1_000)));
            assert_clean(&ticket.wait().unwrap());
        }
        2 => {
            // A false statement, and the vCPU is writing.
            let quiesced = quiesce(&lease);
            let (lease, _) = refused(lease, quiesced, Refusal::Registered { memslots: 1 });
            let quiesced = memslots.remove().unwrap();
            assert_written_since(race, &lease, first);
            assert_clean(&lease.teardown(quiesced).unwrap());
        }
        3 => {
            drop(memslots);
            assert_written_since(race, &lease, first);
            // What makes it count as seen by somebody was gone before. The guest is stopped, so it is torn down.
            drop(lease);
        }
        _ => {
            let quiesced = memslots.remove().unwrap();
            torn_down_while_registered(race, bay, lease, quiesced, numbers);
        }
    }
}

/// Waits, but not for ever, where no vCPU has written in any lease yet: emulated ones take so long to begin that their guests
/// would all be gone before.
fn await_the_first_write(race: &Race, lease: &Lease, bay: u64) {
    let end = Instant::now() + Duration::from_secs(1);
    let nothing_written = || {
        let first: u64 = lease.memory().read_obj(GuestAddress(place(bay))).unwrap();
        first == 0 && race.written.load(Ordering::SeqCst) == 0
    };
    while nothing_written() && Instant::now() < end {
        sleep(Duration::from_millis(1));
    }
}

fn register(race: &Race, lease: &Lease, bay: u64) -> Memslots<Arc<VmFd>> {
    let slot = MemslotOptions::new().first_slot(bay as u32);
    Memslots::register_with(Arc::clone(&race.vm), lease, slot).unwrap()
}

/// One thread registers the lease wherever it still finds it while another one tears it down. Whoever comes first wins, and the
/// other one is told.
fn torn_down_while_registered(
    race: &Race,
    bay: u64,
    lease: Lease,
    quiesced: Quiesced,
    numbers: &mut Numbers,
) {
    let [registering, tearing_down, between] = [0; 3].map(|_| numbers.below(400));
    let place = Mutex::new(Some(lease));
    scope(|scope| {
        scope.spawn(|| {
            sleep(Duration::from_micros(registering));
            loop {
                let registered = place
                    .lock()
                    .unwrap()
                    .as_ref()
                    .map(|lease| register(race, lease, bay));
                let Some(mut memslots) = registered else {
                    race.too_late.fetch_add(1, Ordering::SeqCst);
                    return;
                };
                sleep(Duration::from_micros(between));
                let _ = memslots.remove().unwrap();
            }
        });
        let mut quiesced = Some(quiesced);
        sleep(Duration::from_micros(tearing_down));
        loop {
            let mut place = place.lock().unwrap();
            match place.take().unwrap().teardown(quiesced.take().unwrap()) {
                Ok(receipt) => return assert_clean(&receipt),
                Err(TeardownError::Refused(refused)) => {
                    assert_eq!(refused.reason, Refusal::Registered { memslots: 1 });
                    race.refused.fetch_add(1, Ordering::SeqCst);
                    let (lease, again) = refused.into_parts();
                    (*place, quiesced) = (Some(lease), Some(again));
                }
                Err(error) => panic!("{error}"),
            }
            drop(place);
            sleep(Duration::from_micros(between / 3));
        }
    });
}

#[track_caller]
fn assert_clean(receipt: &ScrubReceipt) {
    assert_adds_up(receipt);
    assert!(receipt.is_proven(), "{receipt:?}");
}

/// Every word was written by a run that began when the lease was there, or by nobody.
fn assert_written_since(race: &Race, lease: &Lease, first: u64) {
    let runs = first..=race.run.load(Ordering::SeqCst);
    let memory = lease.memory();
    let mut bytes = vec![0_u8; BLOCK_SIZE as usize];
    let (mut last, mut written) = (0, false);
    for (address, len) in ranges(lease) {
        for at in (0..len).step_by(bytes.len()) {
            memory
                .read_slice(&mut bytes, GuestAddress(address + at))
                .unwrap();
            for word in bytes.as_chunks::<8>().0 {
                let word = u64::from_le_bytes(*word);
                if word == last {
                    continue;
                }
                let number = number_of(word);
                assert!(
                    word == 0 || number.is_some_and(|number| runs.contains(&number)),
                    "{} of runs {runs:?} has {word:#x}, of run {number:?}",
                    lease.id()
                );
                last = word;
                written |= word != 0;
            }
        }
    }
    race.written.fetch_add(written.into(), Ordering::SeqCst);
}

/// Guests of no machine, in blocks that others had just now: nothing is in their memory but what they wrote.
fn witness(race: &Race) {
    let mut seed = 0_u8;
    while race.busy.load(Ordering::SeqCst) > 0 {
        seed = seed.wrapping_add(1);
        let lease = race.pool.lease(&regions(&[(0, 2 * BLOCK_SIZE)])).unwrap();
        sleep(Duration::from_millis(1));
        assert_all_zero(&lease);
        fill(&lease, seed);
        let before = content(&lease);
        sleep(Duration::from_millis(2));
        assert!(before == content(&lease), "{} has changed", lease.id());
        assert_clean(&teardown(lease));
    }
}

fn content(lease: &Lease) -> Vec<u8> {
    let mut bytes = vec![0; lease.bytes() as usize];
    lease
        .memory()
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    bytes
}
