//! Attempts to get memory back, one at a time and broken off.

use super::*;

fn pool_with_file() -> (Pool, Arc<Entry>) {
    pool_like(Pool::builder())
}

fn pool_like(builder: crate::PoolBuilder) -> (Pool, Arc<Entry>) {
    let builder = builder.capacity(crate::BLOCK_SIZE).threads(1);
    let pool = builder.build().unwrap();
    let file = SharedFile::map(crate::BLOCK_SIZE as usize, false, None, false).unwrap();
    // SAFETY: the view is mapped, writable and this test's own.
    unsafe { file.arena().at(77).write_volatile(1) };
    let about = Withheld::new(LeaseId::next(), None, crate::BLOCK_SIZE, String::new());
    // Not in the pool's list, where the background would find it.
    let entry = Arc::new(Entry {
        about: Mutex::new((about, Instant::now())),
        back: AtomicBool::new(false),
        slot: Mutex::new(Slot::Held(Held {
            remains: Remains::File(file),
            blocks: Blocks::none(&pool.shared.ledger),
        })),
        put_back: Condvar::new(),
    });
    (pool, entry)
}

#[test]
fn no_lock_is_held_while_memory_is_wiped() {
    let (pool, entry) = pool_with_file();
    let mut jobs = 0;
    let bytes = entry.try_again(&pool.shared, None, &mut |job| {
        assert!(entry.slot.try_lock().is_ok() && entry.about.try_lock().is_ok());
        // It is not forgotten meanwhile, nor looked after again and again.
        let now = Instant::now();
        assert!(entry.due().is_some_and(|due| due >= now + FIRST_RETRY));
        let background = entry.try_again(&pool.shared, Some(Instant::now()), &mut |_| {
            panic!("one attempt at a time");
        });
        assert_eq!(background, 0);
        job.work(|_| true, None);
        jobs += 1;
    });
    assert_eq!((bytes, jobs), (crate::BLOCK_SIZE, 2));
    assert!(matches!(&*lock(&entry.slot), Slot::Empty));
    assert_eq!(entry.due(), None);
}

/// Whoever sees in the accounts that nothing is in quarantine any more finds nothing listed.
#[test]
fn what_is_back_is_not_listed() {
    let (pool, entry) = pool_with_file();
    // Not before this test is over, in the background.
    lock(&entry.about).1 += Duration::from_secs(3600);
    lock(&pool.shared.withheld.entries).push(Arc::clone(&entry));
    assert_eq!(pool.withheld().len(), 1);
    let mut all = |job: &Job| job.work(|_| true, None);
    assert_eq!(
        entry.try_again(&pool.shared, None, &mut all),
        crate::BLOCK_SIZE
    );
    assert_eq!(lock(&pool.shared.withheld.entries).len(), 1);
    assert_eq!(pool.withheld(), []);
}

#[test]
fn what_comes_into_quarantine_is_not_tried_at_once() {
    let (pool, _) = pool_with_file();
    let set = &pool.shared.withheld;
    let about = Withheld::new(LeaseId::next(), None, crate::BLOCK_SIZE, String::new());
    let held = Held {
        remains: Remains::Capacity,
        blocks: Blocks::none(&pool.shared.ledger),
    };
    let now = Instant::now();
    set.add(about, held);
    let entry = &set.entries()[0];
    let due = entry.due().unwrap();
    assert!(due >= now + FIRST_RETRY);
    let mut all = |job: &Job| job.work(|_| true, None);
    for (by, bytes) in [
        (now, 0),
        (due - Duration::from_nanos(1), 0),
        (due, crate::BLOCK_SIZE),
    ] {
        let back = entry.try_again(&pool.shared, Some(by), &mut all);
        assert_eq!(back, bytes, "{:?} before it is due", due - by);
    }
}

#[test]
fn after_each_attempt_in_vain_the_wait_is_twice_as_long_up_to_an_end() {
    let (_pool, entry) = pool_with_file();
    let notes = |kept: Kept, wait: Duration| {
        let before = Instant::now();
        let about = entry.note(kept);
        let due = lock(&entry.about).1;
        assert!(due >= before + wait && due <= Instant::now() + wait);
        about.attempts
    };
    for (attempt, millis) in [50, 100, 200, 400, 800, 1600, 3200, 6400, 6400, 6400]
        .into_iter()
        .enumerate()
    {
        let still = Kept::Still("on purpose".to_owned());
        let attempts = notes(still, Duration::from_millis(millis));
        assert_eq!(attempts as usize, attempt + 1);
    }
    // Nothing is known better than before.
    let attempts = notes(Kept::Interrupted, Duration::from_millis(6400));
    assert_eq!(attempts, 10);
}

#[test]
fn the_background_makes_way_for_whoever_wants_an_answer_and_for_no_longer() {
    let (pool, _) = pool_with_file();
    let set = &pool.shared.withheld;
    let is_wanted = || Errand::is_wanted(&**pool.shared);
    assert!(!is_wanted());
    let (first, second) = (Waiting::of(set), Waiting::of(set));
    assert!(is_wanted());
    drop(first);
    assert!(is_wanted());
    drop(second);
    assert!(!is_wanted());
    pool.reclaim();
    assert!(!is_wanted());
}

#[test]
fn what_an_attempt_left_by_a_panic_is_still_there() {
    let (pool, entry) = pool_with_file();
    let attempt = || entry.try_again(&pool.shared, None, &mut |_| panic!("on purpose"));
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(attempt));
    let before = Instant::now();
    assert!(panicked.is_err());
    assert!(matches!(&*lock(&entry.slot), Slot::Held(_)));
    // Not at once: others may be waiting for their turn.
    let due = entry.due().unwrap();
    assert!(due > before + Duration::from_secs(5));
    // Given up between two batches: nothing counts, and it is tried anew.
    let mut none = |job: &Job| job.work(|_| false, None);
    assert_eq!(entry.try_again(&pool.shared, None, &mut none), 0);
    let mut all = |job: &Job| job.work(|_| true, None);
    assert_eq!(
        entry.try_again(&pool.shared, None, &mut all),
        crate::BLOCK_SIZE
    );
}

/// What has broken is replaced by zeros, so that a second attempt would find nothing wrong.
#[test]
fn a_memory_error_is_not_forgotten_by_an_attempt_that_is_broken_off() {
    let breaks = crate::scrub::Sabotage::BreakMemory {
        offset: 0,
        late: false,
    };
    let policy = crate::Policy::new().probe(true);
    let (pool, entry) = pool_like(Pool::builder().policy(policy).sabotage(breaks));
    // The rest of the file waits behind the page that breaks.
    if let Slot::Held(Held {
        remains: Remains::File(file),
        ..
    }) = &*lock(&entry.slot)
    {
        // SAFETY: the view is mapped, writable and this test's own.
        unsafe { file.arena().0.write_bytes(1, crate::BLOCK_SIZE as usize) };
    }
    let mut batches = 0;
    let mut one = |job: &Job| {
        job.work(
            |_| {
                batches += 1;
                batches <= 1
            },
            None,
        );
    };
    assert_eq!(entry.try_again(&pool.shared, None, &mut one), 0);
    let about = lock(&entry.about).0.clone();
    assert!(
        about.for_good && about.reason.contains("memory error at offset 0x0"),
        "{about:?}"
    );
}

#[test]
fn whoever_wants_an_answer_waits_for_the_attempt_that_is_under_way() {
    let (pool, entry) = pool_with_file();
    let begun = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut first = true;
            entry.try_again(&pool.shared, None, &mut |job| {
                if std::mem::take(&mut first) {
                    begun.wait();
                    std::thread::sleep(Duration::from_millis(20));
                }
                job.work(|_| false, None);
            });
        });
        begun.wait();
        let mut all = |job: &Job| job.work(|_| true, None);
        let bytes = entry.try_again(&pool.shared, None, &mut all);
        assert_eq!(bytes, crate::BLOCK_SIZE);
    });
}
