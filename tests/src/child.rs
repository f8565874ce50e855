//! Tests that need a process to themselves: limits and the address space belong to all threads of one, and what a test leaves
//! mapped on purpose stays until its process ends.

use crate::HugePages;
use std::io::{Write, stderr};
use std::process::{Command, ExitStatus, Stdio};

/// Set in the child, to the name of the test that it is to run.
const RUN: &str = "VM_SCRUB_TEST_CHILD";

/// What a child says that ends in the middle of its test.
const DONE: &str = "the child came to its end\n";

/// The test for which this process was started, if it was for one.
pub(crate) fn running() -> Option<String> {
    std::env::var(RUN).ok()
}

/// Runs `body` in a process of its own and panics if that fails. `test` is the path of the calling test, as
/// `cargo test -- --list` prints it.
///
/// The test is started once more, alone in its process, and this call then runs `body` there.
pub fn alone(test: &str, body: impl FnOnce()) {
    if std::env::var(RUN).as_deref() == Ok(test) {
        return body();
    }
    let (status, output) = run(test);
    assert!(status.success(), "{test} in a child: {status}\n{output}");
    // A name that matches no test is a success too, for the child.
    let ran = output.contains("1 passed") || output.contains(DONE);
    assert!(ran, "{test} did not run:\n{output}");
    // What the child says past its test harness goes past this one's too.
    for line in output.lines().filter(|line| line.starts_with("SKIPPED ")) {
        let _ = writeln!(stderr(), "\n{line}");
    }
}

/// Ends the process in the middle of a `body`, with success and without a system call but `write` and `exit_group`: for one that
/// may make no others any more.
pub fn done() -> ! {
    let text = DONE.as_bytes();
    // SAFETY: the text is live and as long as it says; `_exit` runs nothing of this process any more.
    unsafe {
        libc::write(libc::STDOUT_FILENO, text.as_ptr().cast(), text.len());
        libc::_exit(0)
    }
}

/// Runs `body` in a process of its own, for which `pages` hugetlb pages are free, or says that it is skipped.
///
/// This process keeps the reservation until that one is gone with all that it had. Were pages given back while a window that
/// could not be closed still has some, the kernel would make up for those with pages that the next test counts on.
pub fn with_huge_pages(test: &str, pages: u64, body: impl FnOnce()) {
    if std::env::var(RUN).as_deref() == Ok(test) {
        return body();
    }
    if let Some(_reserved) = HugePages::reserve(pages) {
        alone(test, body);
    }
}

/// Runs `body` in a process of its own and says how that ended; `None` in that process.
pub fn end_of(test: &str, body: impl FnOnce()) -> Option<(ExitStatus, String)> {
    if std::env::var(RUN).as_deref() == Ok(test) {
        body();
        return None;
    }
    Some(run(test))
}

fn run(test: &str) -> (ExitStatus, String) {
    let output = Command::new(std::env::current_exe().expect("a test is a file"))
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(RUN, test)
        .stdin(Stdio::null())
        .output()
        .expect("a test can be started once more");
    let text = [output.stdout, output.stderr].concat();
    (output.status, String::from_utf8_lossy(&text).into_owned())
}
