//! The `vm-scrub` command from outside: what it prints, how it ends, and what it leaves behind on the host.

mod arguments;
mod host;
mod results;
mod sabotage;

use std::io::{Read, Write, stderr};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vm_scrub_vmm::HugePages;

/// How long a demonstration of a few megabytes may take on a loaded host.
const LIMIT: Duration = Duration::from_secs(60);

/// What the guests of these tests have.
const MEMORY: u64 = 8 << 20;

const PAGE_SIZES: [&str; 3] = ["4k", "thp", "2m"];

/// A run that is over.
#[derive(Debug)]
struct Run {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

impl Run {
    /// The exit status; panics if a signal ended it.
    #[track_caller]
    fn code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| panic!("signal {:?}: {self:#?}", self.status.signal()))
    }

    /// The one JSON object that standard output holds.
    #[track_caller]
    fn json(&self) -> Value {
        let value: Value =
            serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"));
        assert!(value.is_object());
        value
    }

    /// The last line for people.
    fn closing_line(&self) -> &str {
        self.stdout.lines().last().unwrap_or_default()
    }

    #[track_caller]
    fn assert_no_panic(&self) {
        assert!(!self.stderr.contains("panicked"), "{self:#?}");
        assert_ne!(self.status.code(), Some(101), "{self:#?}");
    }
}

/// The command, with nothing of the caller's environment that would change what it prints.
fn vm_scrub() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vm-scrub"));
    command.env_remove("RUST_LOG");
    command
}

/// Runs `vm-scrub demo` with small guests and these arguments.
#[track_caller]
fn demo(arguments: &[&str]) -> Run {
    let mut command = vm_scrub();
    command.args(["demo", "--memory", "8M"]).args(arguments);
    run(command)
}

/// Runs a command to its end, which must come in time.
#[track_caller]
fn run(mut command: Command) -> Run {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    finish(child)
}

/// Waits for the end of a command, and kills it if that does not come.
#[track_caller]
fn finish(mut child: Child) -> Run {
    let stdout = child.stdout.take().map(read_all);
    let stderr = child.stderr.take().map(read_all);
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if begun.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("not over after {LIMIT:?}");
        }
        thread::sleep(Duration::from_millis(5));
    };
    let text = |reader: Option<thread::JoinHandle<String>>| {
        reader.map_or_else(String::new, |reader| reader.join().unwrap())
    };
    Run {
        status,
        stdout: text(stdout),
        stderr: text(stderr),
    }
}

fn read_all(mut from: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut text = String::new();
        from.read_to_string(&mut text).unwrap();
        text
    })
}

/// Says that the calling test leaves something out, past the test harness, which would keep it to itself.
fn skipped(reason: impl std::fmt::Display) {
    let name = thread::current().name().unwrap_or("test").to_owned();
    let _ = writeln!(stderr(), "\nSKIPPED {name}: {reason}");
}

/// The page sizes that this host can have, and a loud word about hugetlb pages if they are not among them.
fn page_sizes() -> impl Iterator<Item = &'static str> {
    let huge = HugePages::ensure(MEMORY >> 21);
    if let Err(error) = &huge {
        skipped(error);
    }
    let possible = huge.is_ok();
    PAGE_SIZES
        .into_iter()
        .filter(move |size| *size != "2m" || possible)
}
