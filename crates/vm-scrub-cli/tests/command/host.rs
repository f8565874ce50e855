//! Hosts that lack something, readers that go away, and signals.
//!
//! What the host lacks is hidden from the command alone, in a mount namespace of its own. That takes root and util-linux;
//! without them those tests are skipped.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vm_scrub_vmm::HugePages;

use crate::{MEMORY, finish, results, run, sabotage, skipped, vm_scrub};

/// The command in a mount namespace in which `mount` was run before.
fn with_mount(mount: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "sh",
            "-ec",
            &format!("{mount}; exec \"$@\""),
            "sh",
        ])
        .args([env!("CARGO_BIN_EXE_vm-scrub"), "demo", "--memory", "8M"])
        .args(arguments)
        .env_remove("RUST_LOG");
    command
}

/// Whether this host lets us hide something of it.
fn can_mount() -> bool {
    let tried = Command::new("unshare")
        .args(["--mount", "sh", "-ec", "mount --bind /dev/null /dev/zero"])
        .output();
    let able = tried.as_ref().is_ok_and(|output| output.status.success());
    if !able {
        skipped(format!(
            "no mount namespaces here, which take root: {tried:?}"
        ));
    }
    able
}

/// A host without the device, and one whose device has no driver behind it.
const NO_KVM: [&str; 2] = [
    "mount -t tmpfs none /dev",
    "touch /dev/kvm 2>/dev/null || :; mount --bind /dev/null /dev/kvm",
];

#[test]
fn without_kvm_threads_show_the_same_and_it_says_so() {
    if !can_mount() {
        return;
    }
    for hidden in NO_KVM {
        for page_size in crate::page_sizes() {
            let done = run(with_mount(
                hidden,
                &[
                    "--json",
                    "--page-size",
                    page_size,
                    "--vcpus",
                    "2",
                    "--guests",
                    "3",
                ],
            ));
            let report = results::assert_shown(&done, 3);
            assert_eq!(report["guest"], "threads");
            assert!(done.stderr.contains("no KVM guests"), "{}", done.stderr);
            assert!(done.stderr.contains("/dev/kvm"), "{}", done.stderr);
        }
        let told = run(with_mount(hidden, &[]));
        assert_eq!(told.code(), 0, "{told:#?}");
        assert!(told.stderr.contains("no KVM guests"), "{}", told.stderr);
        assert!(
            told.closing_line().starts_with("PROVEN: "),
            "{}",
            told.stdout
        );
    }
}

#[test]
fn without_kvm_a_broken_scrubber_is_caught_as_well() {
    if !can_mount() {
        return;
    }
    let demo = |arguments: &[&str]| run(with_mount(NO_KVM[0], &[&["--json"], arguments].concat()));
    sabotage::assert_caught(&demo(&["--sabotage", "skip-scrub"]), MEMORY);
    sabotage::assert_caught(&demo(&["--sabotage", "skip-chunk"]), 2 << 20);
    let leaked = demo(&["--sabotage", "skip-scrub", "--verify", "none"]);
    sabotage::assert_leaked(&leaked, MEMORY, 0);
    let leaked = demo(&["--sabotage", "skip-chunk", "--verify", "none"]);
    sabotage::assert_leaked(&leaked, 256 << 10, (2 << 20) - (256 << 10));
    let late = demo(&["--sabotage", "late-write"]);
    let report = results::assert_shown(&late, 2);
    assert!(report["late_writes"]["refused"].as_u64().unwrap() > 0);
    assert_eq!(report["late_writes"]["landed_after_revocation"], 0);
}

#[test]
fn a_reader_that_goes_away_is_no_reason_to_panic() {
    // Enough guests that there is something left to say.
    for arguments in [&["--guests", "12"][..], &["--guests", "12", "--json"]] {
        let mut child = vm_scrub()
            .args(["demo", "--memory", "2M"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // As `head -c 1` does.
        let mut first = [0];
        let mut out = child.stdout.take().unwrap();
        if arguments.contains(&"--json") {
            drop(out);
        } else {
            out.read_exact(&mut first).unwrap();
            drop(out);
        }
        let done = finish(child);
        done.assert_no_panic();
        assert_eq!((done.code(), &*done.stderr), (1, ""), "quietly");
    }
}

#[test]
fn both_streams_closed() {
    let child = vm_scrub()
        .args(["demo", "--memory", "2M", "--guests", "12"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = child.unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert_eq!(finish(child).code(), 1);
}

#[test]
fn results_that_cannot_be_written_are_an_error() {
    for arguments in [&[][..], &["--json"]] {
        let child = vm_scrub()
            .args(["demo", "--memory", "2M"])
            .args(arguments)
            .stdout(File::options().write(true).open("/dev/full").unwrap())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let done = finish(child);
        done.assert_no_panic();
        assert_eq!(done.code(), 1);
        assert!(
            done.stderr
                .starts_with("error: the results cannot be written"),
            "{}",
            done.stderr
        );
    }
}

/// Files that look like the kernel's numbers of huge pages, with none there: only one process changes them.
fn huge_page_numbers(name: &str) -> PathBuf {
    let numbers = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::create_dir_all(&numbers).unwrap();
    for number in [
        "nr_hugepages",
        "free_hugepages",
        "resv_hugepages",
        "surplus_hugepages",
    ] {
        fs::write(numbers.join(number), "0\n").unwrap();
    }
    numbers
}

#[test]
fn huge_pages_are_given_back_however_it_ends() {
    if !can_mount() {
        return;
    }
    // Real ones for the command to use; it asks for them in vain, where nobody else changes the number.
    let pages = match HugePages::ensure(MEMORY >> 21) {
        Ok(pages) => pages,
        Err(error) => return skipped(error),
    };
    let numbers = huge_page_numbers("huge-page-numbers");
    let mount = format!(
        "mount --bind '{}' /sys/kernel/mm/hugepages/hugepages-2048kB",
        numbers.display()
    );
    let total = || {
        fs::read_to_string(numbers.join("nr_hugepages"))
            .unwrap()
            .trim()
            .to_owned()
    };

    let whole = run(with_mount(&mount, &["--page-size", "2m", "--json"]));
    results::assert_shown(&whole, 2);
    assert!(
        whole.stderr.contains("vm.nr_hugepages raised by 4"),
        "{}",
        whole.stderr
    );
    assert_eq!(total(), "0");

    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut child = with_mount(&mount, &["--page-size", "2m", "--guests", "10000"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // In the middle of it: the second guest looks around.
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let line = lines.find(|line| line.as_ref().unwrap().starts_with("guest-2 reads"));
        assert!(line.is_some(), "{:?}", finish(child));
        assert_eq!(total(), "4");
        let drain = std::thread::spawn(move || lines.for_each(drop));
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        let done = finish(child);
        assert_eq!(done.status.signal(), Some(signal as i32), "{done:#?}");
        assert_eq!(total(), "0", "{signal}");
        drain.join().unwrap();
    }
    drop(pages);
}
