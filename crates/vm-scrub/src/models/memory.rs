//! What stands for the bytes of a job in a model.
//!
//! loom does not see accesses by pointer, so each piece of a job has a cell here that it does see: working on the piece writes to
//! the cell, and a model reads it where the bytes are relied on. loom fails if the two are not ordered. Nothing is in the cells.
//!
//! Streaming stores lie in a buffer of the processor's until they are fenced: another agent writes them, at some time before the
//! fence ends, and no release store that comes earlier waits for it. Here that agent is a thread of loom, and the fence joins it.

use crate::scrub::PIECE;
use loom::cell::UnsafeCell;
use loom::thread;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// How many pieces a model's jobs can have.
pub(super) const PIECES: usize = 2;

/// How a model's zeros reach memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Stores {
    /// As stores of the thread that works.
    Ordinary = 1,
    /// Past the cache, and fenced by the loop.
    Streaming,
    /// Past the cache, by a loop that has forgotten the fence.
    Unfenced,
}

struct Pieces([UnsafeCell<()>; PIECES]);

// SAFETY: loom checks every access to the cells, which is what they are for.
unsafe impl Sync for Pieces {}

loom::lazy_static! {
    // Counted, because an agent that nobody joins outlives what is static in a run.
    static ref CELLS: Arc<Pieces> = Arc::new(Pieces(std::array::from_fn(|_| UnsafeCell::new(()))));
    // Not one of loom's: a model sets it once, before there are threads.
    static ref STORES: AtomicU8 = AtomicU8::new(0);
}

/// Says how zeros are written in this run of a model; nobody looks at memory if nobody says.
pub(super) fn model(stores: Stores) {
    STORES.store(stores as u8, Ordering::Relaxed);
    for piece in &CELLS.0 {
        // Before there are threads, so that all of them see the cells made.
        piece.with(|_| ());
    }
}

/// Relies on what a job has written to its every piece.
pub(super) fn read_all() {
    for piece in &CELLS.0 {
        piece.with(|_| ());
    }
}

impl Pieces {
    fn write(&self, piece: usize) {
        self.0[piece].with_mut(|_| ());
    }
}

/// Zeros on their way. They are there when this is dropped, if the loop is sound.
pub(crate) struct Landing(Option<thread::JoinHandle<()>>);

/// Called by a pass that begins to work on a piece.
pub(crate) fn zeroing(piece: &Range<usize>) -> Landing {
    let stores = STORES.load(Ordering::Relaxed);
    let (cells, piece) = (Arc::clone(&CELLS), piece.start / PIECE);
    if stores == Stores::Streaming as u8 {
        return Landing(Some(thread::spawn(move || cells.write(piece))));
    }
    if stores == Stores::Unfenced as u8 {
        thread::spawn(move || cells.write(piece));
    } else if stores == Stores::Ordinary as u8 {
        cells.write(piece);
    }
    Landing(None)
}

impl Drop for Landing {
    fn drop(&mut self) {
        if let Some(agent) = self.0.take() {
            agent.join().unwrap();
        }
    }
}
