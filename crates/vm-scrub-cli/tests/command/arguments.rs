//! What can be said on the command line, and what is answered to the rest.

use std::process::Command;

use vm_scrub_vmm::memory_available;

use crate::{Run, run, skipped, vm_scrub};

fn command(arguments: &[&str]) -> Command {
    let mut command = vm_scrub();
    command.args(arguments);
    command
}

fn say(arguments: &[&str]) -> Run {
    run(command(arguments))
}

/// Refused before anything is done: status 2, nothing on standard output, and a message with `named` in it.
#[track_caller]
fn assert_bad(arguments: &[&str], named: &[&str]) {
    let run = say(&[&["demo"], arguments].concat());
    assert_eq!(run.code(), 2, "{arguments:?}: {run:#?}");
    assert_eq!(run.stdout, "", "{arguments:?}");
    assert!(
        run.stderr.starts_with("error: "),
        "{arguments:?}: {}",
        run.stderr
    );
    for word in named {
        assert!(
            run.stderr.contains(word),
            "{arguments:?} without {word}: {}",
            run.stderr
        );
    }
}

#[test]
fn memory_is_whole_blocks_and_not_absurd() {
    for size in ["0", "1", "1M", "3M", "2097153", "0.5M"] {
        assert_bad(&["--memory", size], &["--memory", "2 MiB"]);
    }
    for size in ["1X", "x", "", "G", "1.2.3G", "0x200000"] {
        assert_bad(&["--memory", size], &["--memory", "512M or 1G"]);
    }
    for size in ["65G", "1T", "16E"] {
        assert_bad(&["--memory", size], &["--memory"]);
    }
    for size in ["18446744073709551616", "99999999999999999999999999G"] {
        assert_bad(&["--memory", size], &["--memory"]);
    }
    assert_bad(&["--memory"], &["--memory"]);
    assert_bad(&["--memory", "2M", "--memory", "4M"], &["--memory"]);
}

#[test]
fn numbers_have_limits() {
    for (argument, values) in [
        (
            "--guests",
            [
                "0",
                "1",
                "10001",
                "-1",
                "two",
                "1e3",
                "99999999999999999999",
            ],
        ),
        ("--vcpus", ["0", "257", "-1", "x", "1.5", "", "4294967297"]),
        (
            "--threads",
            ["0", "4097", "-1", "x", "1.5", "", "4294967297"],
        ),
    ] {
        for value in values {
            let joined = format!("{argument}={value}");
            assert_bad(&[&joined], &[argument]);
        }
    }
}

#[test]
fn names_are_those_in_the_help() {
    for name in ["8k", "4K", "1g", "", "huge"] {
        assert_bad(&["--page-size", name], &["--page-size", "4k", "thp", "2m"]);
    }
    assert_bad(
        &["--sabotage", "skip-everything"],
        &["--sabotage", "skip-scrub", "skip-chunk", "late-write"],
    );
    assert_bad(&["--verify", "half"], &["--verify", "full", "none"]);
    assert_bad(&["--frobnicate"], &["--frobnicate"]);
    assert_bad(&["extra"], &["extra"]);
    assert_bad(&["--json=yes"], &["--json"]);
}

#[test]
fn without_a_command_or_with_a_wrong_one() {
    for arguments in [&[][..], &["frobnicate"]] {
        let run = say(arguments);
        assert_eq!((run.code(), &*run.stdout), (2, ""));
        assert!(run.stderr.contains("Usage: vm-scrub"), "{}", run.stderr);
    }
}

#[test]
fn help_and_version() {
    let help = say(&["demo", "--help"]);
    assert_eq!(help.code(), 0);
    for argument in [
        "--memory",
        "--page-size",
        "--guests",
        "--vcpus",
        "--threads",
        "--verify",
        "--sabotage",
        "--json",
    ] {
        assert!(help.stdout.contains(argument), "{argument}");
    }
    assert!(
        help.stdout.contains("Exit status 0 only if"),
        "{}",
        help.stdout
    );
    let version = say(&["--version"]);
    assert_eq!(
        (version.code(), &*version.stdout),
        (0, concat!("vm-scrub ", env!("CARGO_PKG_VERSION"), "\n"))
    );
}

#[test]
fn sizes_have_binary_units() {
    for size in ["2M", "2MiB", "2m", "2048K", "2097152", "0.001953125G"] {
        let run = say(&["demo", "--json", "--memory", size]);
        assert_eq!(run.code(), 0, "{run:#?}");
        assert_eq!(run.json()["memory_bytes"], 2 << 20, "{size}");
    }
}

#[test]
fn more_memory_than_the_host_has() {
    let most = 64 << 30;
    match memory_available() {
        Ok(available) if available < most => {}
        other => {
            return skipped(format!(
                "needs a host with less than 64 GiB available: {other:?}"
            ));
        }
    }
    for page_size in crate::PAGE_SIZES {
        let run = say(&[
            "demo",
            "--memory",
            "64G",
            "--page-size",
            page_size,
            "--json",
        ]);
        assert_eq!((run.code(), &*run.stdout), (1, ""), "{run:#?}");
        assert!(run.stderr.contains("memory available"), "{}", run.stderr);
    }
}
