//! Code of the embedder's that runs inside: callbacks and loggers, which may panic.

use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs such code. `None` if it panicked: what it threw is not dropped, because that may panic too.
pub(crate) fn survive<T>(code: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(code))
        .map_err(std::mem::forget)
        .ok()
}

/// Runs such code in a destructor. Where a panic is what drops, a second one would end the whole process.
pub(crate) fn in_drop(code: impl FnOnce()) {
    if std::thread::panicking() {
        survive(code);
    } else {
        code();
    }
}
