//! Which memory each thread is working on, where a signal handler finds it, and what the handler found wrong with it.
//!
//! Each thread has a record of its own. The thread writes the range, the handler, on the same thread, writes the notes: no two
//! threads ever write to one record. Records are in a list that only grows, so that the handler can walk it without a lock
//! and without asking for thread-local storage, which the system may have to allocate first.

use super::fault::{self, Call};
use std::cell::Cell;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::{
    AtomicBool, AtomicI32, AtomicPtr, AtomicU8, AtomicUsize, Ordering, compiler_fence,
};

/// As many notes as a piece of 256 KiB at any address has pages of 4 KiB, and one more.
const NOTES: usize = 66;

/// Memory that raised `SIGBUS` and was replaced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bad {
    /// The addresses at which there is other memory now, or all that was worked on, if there were too many to remember.
    pub(crate) replaced: Range<usize>,
    /// The addresses that the kernel spoke of: what was replaced, or more.
    pub(crate) reported: Range<usize>,
    /// `si_code`.
    pub(crate) code: i32,
}

#[derive(Debug, Default)]
struct Note {
    start: AtomicUsize,
    len: AtomicUsize,
    shift: AtomicU8,
    code: AtomicI32,
}

#[derive(Debug)]
struct Record {
    /// `pthread_self` of the thread that has it; 0 if nobody has.
    owner: AtomicUsize,
    start: AtomicUsize,
    /// Not above `start` while nothing is watched.
    end: AtomicUsize,
    /// The size of the pages, in bytes: less is not replaced.
    page: AtomicUsize,
    /// How many notes there would be, had they all found room.
    noted: AtomicUsize,
    notes: [Note; NOTES],
    /// Set by tests: the handler is to be as helpless as if the kernel had refused to map.
    helpless: AtomicBool,
    next: Option<&'static Record>,
}

static RECORDS: AtomicPtr<Record> = AtomicPtr::new(ptr::null_mut());

/// Set once the handler is there.
static ON: AtomicBool = AtomicBool::new(false);

/// From now on threads say what they work on.
pub(super) fn switch_on() {
    ON.store(true, Ordering::Release);
}

fn this_thread() -> usize {
    // SAFETY: the call cannot fail; on the libraries that are supported it reads a register. Async-signal-safe by POSIX.
    unsafe { libc::pthread_self() as usize }
}

fn records() -> impl Iterator<Item = &'static Record> {
    // SAFETY: the pointer is null or came from a box that was leaked, with everything in it stored before.
    let first = unsafe { RECORDS.load(Ordering::Acquire).as_ref() };
    std::iter::successors(first, |record| record.next)
}

/// A record for the calling thread: one that nobody has, or a new one.
fn acquire() -> &'static Record {
    let me = this_thread();
    for record in records() {
        let free = record
            .owner
            .compare_exchange(0, me, Ordering::Acquire, Ordering::Relaxed);
        if free.is_ok() {
            return record;
        }
    }
    let new = Box::leak(Box::new(Record {
        owner: AtomicUsize::new(me),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        page: AtomicUsize::new(0),
        noted: AtomicUsize::new(0),
        notes: std::array::from_fn(|_| Note::default()),
        helpless: AtomicBool::new(false),
        next: None,
    }));
    let mut head = RECORDS.load(Ordering::Acquire);
    loop {
        // SAFETY: null, or a box that was leaked.
        new.next = unsafe { head.as_ref() };
        match RECORDS.compare_exchange(head, new, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return new,
            Err(other) => head = other,
        }
    }
}

/// The record that a thread keeps until it ends.
struct Kept(Cell<Option<&'static Record>>);

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(record) = self.0.get() {
            record.owner.store(0, Ordering::Release);
        }
    }
}

thread_local! {
    static MINE: Kept = const { Kept(Cell::new(None)) };
}

/// The calling thread's way of saying what it works on.
#[derive(Debug)]
pub(crate) struct Watch {
    record: &'static Record,
    /// The thread is ending, and keeps nothing any more.
    once: bool,
}

/// The record of this thread, which is to work on memory in pages of `page` bytes, or more where that is not known. `None` while
/// there is no handler that would look.
pub(crate) fn watch(page: usize) -> Option<Watch> {
    if !ON.load(Ordering::Acquire) {
        return None;
    }
    let kept = MINE.try_with(|mine| {
        let record = mine.0.get().unwrap_or_else(acquire);
        mine.0.set(Some(record));
        record
    });
    let once = kept.is_err();
    let record = kept.unwrap_or_else(|_| acquire());
    // A forked child's only thread goes on with what its parent's thread had.
    record.owner.store(this_thread(), Ordering::Relaxed);
    record.page.store(page, Ordering::Relaxed);
    let helpless = fault::is_planned(Call::MmapOver);
    record.helpless.store(helpless, Ordering::Relaxed);
    Some(Watch { record, once })
}

impl Watch {
    /// Does `work`, which accesses `[start, start + len)` and on this thread. Memory of it that raises `SIGBUS` meanwhile is
    /// replaced by zeros and comes back in the answer; what is said of it counts for nothing.
    pub(crate) fn over<T>(
        &self,
        start: usize,
        len: usize,
        work: impl FnOnce() -> T,
    ) -> (T, Vec<Bad>) {
        let record = self.record;
        record.start.store(start, Ordering::Relaxed);
        record.end.store(start + len, Ordering::Relaxed);
        // The handler runs on this thread: it is the compiler that must not reorder.
        compiler_fence(Ordering::SeqCst);
        let done = work();
        compiler_fence(Ordering::SeqCst);
        record.end.store(0, Ordering::Relaxed);
        let noted = record.noted.swap(0, Ordering::Relaxed);
        let mut bad = Vec::new();
        for note in record.notes.iter().take(noted) {
            let start = note.start.load(Ordering::Relaxed);
            let end = start + note.len.load(Ordering::Relaxed);
            let mask = (1_usize << note.shift.load(Ordering::Relaxed)) - 1;
            bad.push(Bad {
                replaced: start..end,
                reported: start & !mask..((end - 1) | mask).saturating_add(1),
                code: note.code.load(Ordering::Relaxed),
            });
        }
        if noted > NOTES {
            let all = start..start + len;
            bad.push(Bad {
                replaced: all.clone(),
                reported: all,
                code: 0,
            });
        }
        (done, bad)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // `work` may have panicked.
        self.record.end.store(0, Ordering::Relaxed);
        if self.once {
            self.record.owner.store(0, Ordering::Release);
        }
    }
}

/// What the handler does with the record of the thread that it interrupted.
#[derive(Debug)]
pub(super) struct Interrupted(&'static Record);

/// The record of the calling thread, if it is working on `address`. Async-signal-safe.
pub(super) fn at(address: usize) -> Option<Interrupted> {
    let me = this_thread();
    records()
        .find(|record| {
            let range = record.start.load(Ordering::Relaxed)..record.end.load(Ordering::Relaxed);
            record.owner.load(Ordering::Relaxed) == me && range.contains(&address)
        })
        .map(Interrupted)
}

impl Interrupted {
    /// Whether a test wants that nothing can be mapped.
    pub(super) fn is_helpless(&self) -> bool {
        self.0.helpless.load(Ordering::Relaxed)
    }

    /// The size of the pages, in bytes, or less.
    pub(super) fn page(&self) -> usize {
        self.0.page.load(Ordering::Relaxed)
    }

    /// Notes that `[start, start + len)` was replaced, because of an error in `2^shift` bytes around. Async-signal-safe.
    pub(super) fn note(&self, start: usize, len: usize, shift: u8, code: i32) {
        let at = self.0.noted.fetch_add(1, Ordering::Relaxed);
        if let Some(note) = self.0.notes.get(at) {
            note.start.store(start, Ordering::Relaxed);
            note.len.store(len, Ordering::Relaxed);
            note.shift.store(shift, Ordering::Relaxed);
            note.code.store(code, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_that_are_gone_leave_their_records_to_others() {
        switch_on();
        for _ in 0..200 {
            let thread = std::thread::spawn(|| drop(watch(4096)));
            thread.join().unwrap();
        }
        // Other tests have threads too.
        assert!(records().count() < 100);
    }
}
