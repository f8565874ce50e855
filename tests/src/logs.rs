//! What the library logged on this thread.

use log::{Level, Log, Metadata, Record};
use std::cell::RefCell;
use std::sync::Once;

thread_local! {
    static LINES: RefCell<Vec<(Level, String)>> = const { RefCell::new(Vec::new()) };
}

struct PerThread;

impl Log for PerThread {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // A thread that is ending has no list any more, and nobody who would ask for it.
        let _ = LINES.try_with(|lines| {
            lines
                .borrow_mut()
                .push((record.level(), record.args().to_string()));
        });
    }

    fn flush(&self) {}
}

/// Begins to listen, and forgets what this thread has logged so far.
pub fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&PerThread).expect("a test process has no other logger");
        log::set_max_level(log::LevelFilter::Trace);
    });
    LINES.with_borrow_mut(Vec::clear);
}

/// Whether this thread has logged a line of this level with `text` in it since [`listen`].
pub fn heard(level: Level, text: &str) -> bool {
    !lines(level, text).is_empty()
}

/// The lines of this level with `text` in them that this thread has logged since [`listen`].
pub fn lines(level: Level, text: &str) -> Vec<String> {
    LINES.with_borrow(|lines| {
        let wanted = lines.iter().filter(|(of, _)| *of == level);
        let wanted = wanted.filter(|(_, line)| line.contains(text));
        wanted.map(|(_, line)| line.clone()).collect()
    })
}
