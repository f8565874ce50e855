//! What threads share and wait by: the standard library's, or loom's under `--cfg loom`.
//!
//! loom runs a test again and again, once for each order in which its threads can meet and for each value that a relaxed load may see. It
//! sees only its own locks and atomics, so whatever takes part in a model names them by this module: the books, the background
//! queue, jobs, retired leases and what is withheld. Elsewhere the standard library's are used directly; there, no lock may be held
//! where a thread of a model can be put aside, which is at every operation of this module.
//!
//! Only this crate's own unit tests are ever built so: an embedder's models, under the same flag, find the standard library here.

#[cfg(all(test, loom))]
pub(crate) use loom::{
    sync::{Condvar, Mutex, MutexGuard, atomic, mpsc},
    thread,
};
#[cfg(not(all(test, loom)))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic, mpsc},
    thread,
};
