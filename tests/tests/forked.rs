//! A forked child has an address space of its own, and what the parent has found out about its own does not hold there.

use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use vm_scrub::lease::{Cancelled, Refusal, Ticket};
use vm_scrub::test_support::arena_address;
use vm_scrub::{
    BLOCK_SIZE, LeaseError, LeaseOptions, PageSize, Policy, Priority, ScrubRate, TeardownError,
    scrub_raw,
};
use vm_scrub_tests::{
    assert_nothing_dirty_left, fill, first_nonzero, on_every_page_size, pools, quiesce, regions,
    skipped, teardown,
};

const LEN: usize = 1 << 20;

/// Forks. With `new_names` the child has a PID namespace of its own, in which its number is 1. `None` where that is not
/// allowed.
fn fork(new_names: bool) -> Option<i64> {
    let flags = if new_names { libc::CLONE_NEWPID } else { 0 };
    // SAFETY: like fork(2); the children below call nothing that needs another thread.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    (child >= 0).then_some(child)
}

/// The exit status of `child`.
fn status(child: i64) -> i32 {
    let mut status = 0;
    // SAFETY: `status` is live and writable.
    let waited = unsafe { libc::waitpid(child as libc::pid_t, &raw mut status, 0) };
    assert_eq!(i64::from(waited), child);
    assert!(libc::WIFEXITED(status), "ended by a signal: {status:#x}");
    libc::WEXITSTATUS(status)
}

fn exit(good: bool) -> ! {
    // SAFETY: ends a forked child, without running what the parent has registered for its own end.
    unsafe { libc::_exit(i32::from(!good)) }
}

/// Ends a forked child with what `body` says. A panic is not good; left alone it would end the thread that forked, which is the only
/// one that a child has, and that is a success.
fn end(body: impl FnOnce() -> bool) -> ! {
    // SAFETY: ends this process, if it should wait.
    unsafe { libc::alarm(20) };
    exit(catch_unwind(AssertUnwindSafe(body)).unwrap_or(false))
}

/// Whether every byte is zero after scrubbing.
fn scrubs(memory: *mut u8) -> bool {
    // SAFETY: the memory is mapped and this process's own.
    unsafe {
        let done = scrub_raw(memory, LEN, &Policy::new());
        done.is_ok() && (0..LEN).all(|at| memory.add(at).read_volatile() == 0)
    }
}

/// In the first child nothing is populated. What the second one writes must not be looked for there.
fn a_child_of_a_child_scrubs_its_own_memory(new_names: bool) {
    // SAFETY: a mapping at a place of the kernel's choice.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            LEN,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(memory, libc::MAP_FAILED);
    let memory: *mut u8 = memory.cast();
    let Some(first) = fork(new_names) else {
        let error = std::io::Error::last_os_error();
        return skipped(&format!("no PID namespaces here: {error}"));
    };
    if first == 0 {
        end(|| {
            scrubs(memory)
                && match fork(new_names) {
                    Some(0) => end(|| {
                        // SAFETY: mapped and this process's own.
                        unsafe { memory.write_bytes(0x5e, LEN) };
                        scrubs(memory)
                    }),
                    Some(second) => status(second) == 0,
                    None => false,
                }
        });
    }
    assert_eq!(status(first), 0, "a forked child did not scrub its memory");
}

#[test]
fn in_the_same_namespace() {
    a_child_of_a_child_scrubs_its_own_memory(false);
}

#[test]
fn in_namespaces_of_their_own() {
    a_child_of_a_child_scrubs_its_own_memory(true);
}

on_every_page_size!(
    a_child_neither_uses_nor_ends_its_parents_pool: 4,
    a_child_that_drops_the_last_owner_unmaps_nothing: 1,
);

/// The memory is not the child's, and the threads are not there: whoever waited for them would wait for ever.
fn a_child_neither_uses_nor_ends_its_parents_pool(page_size: PageSize) {
    let pool = pools::builder(page_size, 4).threads(2).build().unwrap();
    let one = || pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let (kept, refused, retired) = (one(), one(), one());
    for lease in [&kept, &refused, &retired] {
        fill(lease, 0x5e);
    }
    // SAFETY: the child calls nothing that needs another thread, or it is the end of it.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        end(|| {
            let mut good = matches!(
                pool.lease(&regions(&[(0, BLOCK_SIZE)])),
                Err(LeaseError::Forked)
            );
            let quiesced = quiesce(&refused);
            good &= is_refused(refused.teardown(quiesced));
            let quiesced = quiesce(&retired);
            good &= is_refused(retired.retire(quiesced).map(|_: Ticket| ()));
            drop(kept);
            drop(pool);
            good
        });
    }
    assert_eq!(status(i64::from(child)), 0);
    assert_eq!(pool.accounts().leased, 3 * BLOCK_SIZE);
    for lease in [kept, refused, retired] {
        assert_eq!(first_nonzero(&lease), Some(0), "the guest's bytes");
        assert!(teardown(lease).is_proven());
    }
    assert_nothing_dirty_left(&pool);
}

/// Runs `child` in a forked child, whose answer says whether all was well.
fn in_a_child(child: impl FnOnce() -> bool) {
    // SAFETY: the child calls nothing that needs another thread, or it is the end of it.
    let number = unsafe { libc::fork() };
    assert!(number >= 0);
    if number == 0 {
        end(child);
    }
    assert_eq!(status(i64::from(number)), 0);
}

fn is_forked<T>(result: &Result<T, TeardownError>) -> bool {
    matches!(result, Err(TeardownError::Forked { .. }))
}

/// Memory of a child's own where its parent has something else; whether it has stayed as it was.
struct Own(Vec<Range<usize>>);

impl Own {
    fn over(ranges: impl IntoIterator<Item = Range<usize>>) -> Self {
        let ranges = Vec::from_iter(ranges);
        for range in &ranges {
            let at = std::ptr::without_provenance_mut::<u8>(range.start);
            // SAFETY: a mapping where nothing is, in this process.
            unsafe {
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
                let own = libc::mmap(at.cast(), range.len(), protection, flags, -1, 0);
                assert_eq!(own, at.cast(), "something is there");
                at.write_bytes(0x77, range.len());
            }
        }
        Self(ranges)
    }

    fn is_untouched(&self) -> bool {
        self.0.iter().cloned().flatten().all(|at| {
            let at = std::ptr::without_provenance::<u8>(at);
            // SAFETY: mapped by `over`; if it is not any more, that is a signal, which the parent sees.
            unsafe { at.read_volatile() == 0x77 }
        })
    }
}

fn a_child_that_drops_the_last_owner_unmaps_nothing(page_size: PageSize) {
    let pool = pools::pool(page_size, 1);
    let arena = arena_address(&pool).addr();
    let place = arena..arena + pool.capacity() as usize;
    let mut kept = Some(pool);
    in_a_child(|| {
        let own = Own::over(Some(place));
        drop(kept.take());
        own.is_untouched()
    });
    assert_nothing_dirty_left(&kept.unwrap());
}

/// Where the pool's memory is in the parent, a child may have memory of its own.
#[test]
fn a_child_does_nothing_to_memory_on_its_way_back() {
    let pool = pools::builder(PageSize::Base4K, 3)
        .threads(1)
        .build()
        .unwrap();
    let arena = arena_address(&pool).addr();
    let dirty = |shareable| {
        let options = LeaseOptions::new().shareable(shareable);
        let lease = pool
            .lease_with(&regions(&[(0, BLOCK_SIZE)]), options)
            .unwrap();
        fill(&lease, 0x5e);
        let quiesced = quiesce(&lease);
        lease.revoke(quiesced).unwrap()
    };
    let (at_once, in_steps, shared) = (dirty(false), dirty(false).scrub(), dirty(true));
    // The parent's view of the file that was shared: where it is zeroed.
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let view = maps
        .lines()
        .find(|line| line.contains("memfd:vm-scrub-shared"));
    let view = view.map(|line| {
        let (range, _) = line.split_once(' ').unwrap();
        let (start, end) = range.split_once('-').unwrap();
        let address = |text| usize::from_str_radix(text, 16).unwrap();
        address(start)..address(end)
    });
    let places = Some(arena..arena + pool.capacity() as usize)
        .into_iter()
        .chain(view);
    let mut kept = Some((at_once, in_steps, shared));
    in_a_child(|| {
        let (at_once, in_steps, shared) = kept.take().unwrap();
        let own = Own::over(places);
        let refused = [
            at_once.scrub_and_verify().recycle(),
            in_steps.verify().recycle(),
            shared.scrub_and_verify().recycle(),
        ];
        own.is_untouched() && refused.iter().all(is_forked)
    });
    let (at_once, in_steps, shared) = kept.unwrap();
    assert!(at_once.scrub_and_verify().recycle().unwrap().is_proven());
    assert!(in_steps.verify().recycle().unwrap().is_proven());
    assert!(shared.scrub_and_verify().recycle().unwrap().is_proven());
    assert_nothing_dirty_left(&pool);
}

#[test]
fn a_childs_tickets_are_refused() {
    // So slow that it is not finished before the fork.
    let rate = ScrubRate {
        bytes_per_second: 1,
        burst: 0,
    };
    let pool = pools::builder(PageSize::Base4K, 4)
        .threads(1)
        .scrub_rate(rate)
        .build()
        .unwrap();
    let arena = arena_address(&pool).addr();
    let mut tickets: Vec<Ticket> = (0..4)
        .map(|_| {
            let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
            fill(&lease, 0x5e);
            let quiesced = quiesce(&lease);
            lease.retire(quiesced).unwrap()
        })
        .collect();
    in_a_child(|| {
        let own = Own::over(Some(arena..arena + pool.capacity() as usize));
        let mut next = || tickets.pop().unwrap();
        let (waited, watched, cancelled, looked_at) = (next(), next(), next(), next());
        looked_at.set_priority(Priority::High);
        let finished = looked_at.is_finished();
        let cancelled = match cancelled.cancel() {
            Cancelled::Finished(outcome) => is_forked(&outcome),
            Cancelled::Dirty(_) => false,
        };
        let waited = is_forked(&waited.wait()) && is_forked(&watched.wait_in_background());
        finished && cancelled && waited && own.is_untouched()
    });
    for ticket in tickets {
        assert!(!ticket.is_finished());
        assert!(ticket.wait().unwrap().is_proven());
    }
    assert_nothing_dirty_left(&pool);
}

/// A pool that a child builds is at home there, whatever its parent has.
#[test]
fn a_child_may_have_a_pool_of_its_own() {
    let parents = pools::pool(PageSize::Base4K, 1);
    in_a_child(|| {
        let pool = pools::pool(PageSize::Base4K, 2);
        assert!(teardown(pools::dirty_block(&pool, false)).is_proven());
        let lease = pools::dirty_block(&pool, false);
        let quiesced = quiesce(&lease);
        let ticket = lease.retire(quiesced).unwrap();
        assert!(ticket.wait_in_background().unwrap().is_proven());
        assert_nothing_dirty_left(&pool);
        true
    });
    assert_nothing_dirty_left(&parents);
}

#[test]
fn a_child_seals_nothing_that_its_parent_withholds() {
    let pool = pools::builder(PageSize::Base4K, 2)
        .threads(1)
        .build()
        .unwrap();
    let lease = pools::dirty_shareable_block(&pool);
    let file = lease.file_offsets()[0].1.arc().try_clone().unwrap();
    // SAFETY: a mapping at a place of the kernel's choice.
    let peer = unsafe {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            protection,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    assert_ne!(peer, libc::MAP_FAILED);
    assert_eq!(teardown(lease).bytes_quarantined, BLOCK_SIZE);
    let seals = || {
        // SAFETY: asks for a number.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) }
    };
    // After so many attempts in vain the background leaves it alone for seconds.
    for _ in 0..9 {
        assert_eq!(pool.reclaim(), 0);
    }
    let before = seals();
    let (mut parents, mut childs) = UnixStream::pair().unwrap();
    // SAFETY: a child does not get the mapping, which is the last one but for its parent's.
    assert_eq!(unsafe { libc::madvise(peer, 4096, libc::MADV_DONTFORK) }, 0);
    // SAFETY: the child calls nothing that needs another thread, or it is the end of it.
    let child = unsafe { libc::fork() };
    assert!(child >= 0);
    if child == 0 {
        end(|| {
            childs.read_exact(&mut [0]).unwrap();
            pool.reclaim() == 0 && seals() == before
        });
    }
    // SAFETY: mapped above, and not used.
    unsafe { libc::munmap(peer, 4096) };
    parents.write_all(&[1]).unwrap();
    assert_eq!(status(i64::from(child)), 0);
    // The background may be at it as well.
    let begun = Instant::now();
    while pool.accounts().quarantined > 0 {
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{:?}",
            pool.withheld()
        );
        pool.reclaim();
    }
    assert_nothing_dirty_left(&pool);
}

fn is_refused<T>(result: Result<T, TeardownError>) -> bool {
    matches!(result, Err(TeardownError::Refused(refused)) if matches!(refused.reason, Refusal::Forked))
}

/// Between mapping memory for a guest and telling the kernel that children do not get it, another thread may fork.
#[test]
fn a_child_forked_in_between_has_no_way_into_the_file() {
    let test = "a_child_forked_in_between_has_no_way_into_the_file";
    vm_scrub_tests::child::with_huge_pages(test, 2, || {
        let pool = pools::builder(PageSize::Huge2M, 2)
            .threads(1)
            .build()
            .unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
                    assert!(teardown(lease).is_proven());
                }
            });
            let began = Instant::now();
            let mut reached = 0;
            while began.elapsed() < Duration::from_secs(2) && reached == 0 {
                // SAFETY: the child calls nothing that needs another thread or allocates, or it is the end of it.
                let child = unsafe { libc::fork() };
                assert!(child >= 0);
                if child == 0 {
                    exit(!reaches_a_pools_file());
                }
                reached += status(i64::from(child));
            }
            stop.store(true, Ordering::Relaxed);
            assert_eq!(reached, 0, "a child reaches the memory of guests to come");
        });
    });
}

/// Whether a pool's file is mapped, and not inaccessible. For a forked child: nothing is allocated.
fn reaches_a_pools_file() -> bool {
    let mut text = [0_u8; 256 << 10];
    let mut len = 0;
    // SAFETY: the name is a NUL-terminated literal, and the buffer is live and as long as it is said to be.
    unsafe {
        let file = libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY);
        loop {
            let rest = &mut text[len..];
            match libc::read(file, rest.as_mut_ptr().cast(), rest.len()) {
                read @ 1.. => len += read as usize,
                _ => break,
            }
        }
    }
    text[..len].split(|byte| *byte == b'\n').any(|line| {
        let is = |what: &[u8]| line.windows(what.len()).any(|part| part == what);
        is(b"/memfd:vm-scrub") && !is(b" ---s ")
    })
}
