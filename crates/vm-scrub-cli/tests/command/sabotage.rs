//! Demonstrations in which something is broken on purpose: the proof is able to fail.

use serde_json::Value;

use crate::{MEMORY, Run, demo, page_sizes};

/// The piece that `skip-chunk` leaves out, and the block that it is in.
const CHUNK: u64 = 256 << 10;
const BLOCK: u64 = 2 << 20;

/// The scrubber was broken, verification saw it, and `lost` bytes are out of the pool for good.
#[track_caller]
pub(crate) fn assert_caught(run: &Run, lost: u64) {
    assert_eq!(run.code(), 1, "{run:#?}");
    let report = run.json();
    assert_eq!(report["secret_bytes_found_before_teardown"], MEMORY);
    assert_eq!(report["leaked_bytes"], 0);
    assert_eq!(report["proven"], false);
    assert_eq!(report["accounts"]["quarantined"], lost);
    assert_eq!(report["accounts"]["clean"], MEMORY - lost);
    // There is no other memory, so nobody comes after the first guest.
    assert!(
        report["refused"].as_str().unwrap().contains("quarantined"),
        "{report:#}"
    );
    let receipts = report["receipts"].as_array().unwrap();
    assert_eq!(receipts.len(), 1);
    assert_eq!(receipts[0]["outcome"], "quarantined");
    assert_eq!(receipts[0]["bytes_quarantined"], lost);
    assert_eq!(receipts[0]["bytes_scrubbed"], MEMORY - lost);
    assert_eq!(receipts[0]["quarantined"][0]["reason"], "not-zero");
    assert_eq!(receipts[0]["quarantined"][0]["bytes"], lost);
}

/// Nobody looked, and the second guest found `leaked` bytes from `address` on.
#[track_caller]
pub(crate) fn assert_leaked(run: &Run, leaked: u64, address: u64) {
    assert_eq!(run.code(), 1, "{run:#?}");
    let report = run.json();
    assert_eq!(report["leaked_bytes"], leaked);
    assert_eq!(report["proven"], false);
    assert_eq!(
        (&report["same_blocks"], &report["refused"]),
        (&true.into(), &Value::Null)
    );
    let second = &report["guests"][1];
    assert_eq!(second["leaked_bytes"], leaked);
    assert_eq!(second["first_leak"]["guest_address"], address);
    let writer = second["first_leak"]["written_by"].as_str().unwrap();
    assert!(writer.ends_with("guest-1"), "{writer}");
}

#[test]
fn a_scrubber_that_does_nothing_is_caught() {
    for page_size in page_sizes() {
        let arguments = ["--sabotage", "skip-scrub", "--page-size", page_size];
        assert_caught(&demo(&[&arguments[..], &["--json"]].concat()), MEMORY);
        let told = demo(&arguments);
        assert_eq!(told.code(), 1);
        assert!(
            told.closing_line().starts_with("CAUGHT: "),
            "{}",
            told.stdout
        );
    }
}

#[test]
fn a_scrubber_that_leaves_out_a_piece_is_caught() {
    for page_size in page_sizes() {
        let arguments = ["--sabotage", "skip-chunk", "--page-size", page_size];
        assert_caught(&demo(&[&arguments[..], &["--json"]].concat()), BLOCK);
        let told = demo(&arguments);
        assert_eq!(told.code(), 1);
        assert!(
            told.closing_line().starts_with("CAUGHT: "),
            "{}",
            told.stdout
        );
        assert!(
            told.stdout
                .contains("at guest address 0x1c0000 is not zero"),
            "{}",
            told.stdout
        );
    }
}

#[test]
fn without_verification_the_next_guest_finds_what_was_left() {
    for page_size in page_sizes() {
        for (sabotage, leaked, address) in [
            ("skip-scrub", MEMORY, 0),
            ("skip-chunk", CHUNK, BLOCK - CHUNK),
        ] {
            let arguments = [
                "--sabotage",
                sabotage,
                "--verify",
                "none",
                "--page-size",
                page_size,
            ];
            assert_leaked(
                &demo(&[&arguments[..], &["--json"]].concat()),
                leaked,
                address,
            );
        }
    }
    let told = demo(&["--sabotage", "skip-scrub", "--verify", "none"]);
    assert_eq!(told.code(), 1);
    assert!(
        told.closing_line().starts_with("LEAKED: "),
        "{}",
        told.stdout
    );
    assert!(told.closing_line().contains("8388608"), "{}", told.stdout);
}

#[test]
fn a_device_that_writes_on_reaches_nobody() {
    for page_size in page_sizes() {
        let run = demo(&[
            "--json",
            "--sabotage",
            "late-write",
            "--page-size",
            page_size,
            "--guests",
            "3",
        ]);
        let report = crate::results::assert_shown(&run, 3);
        let late = &report["late_writes"];
        assert!(late["refused"].as_u64().unwrap() > 0, "{late}");
        assert_eq!(late["landed_after_revocation"], 0);
        assert!(late["landed_before_revocation"].is_u64());
    }
    let told = demo(&["--sabotage", "late-write"]);
    assert_eq!(told.code(), 0, "{told:#?}");
    assert!(told.stdout.contains("0 writes landed"), "{}", told.stdout);
    assert!(
        told.closing_line().starts_with("PROVEN: "),
        "{}",
        told.stdout
    );
}

#[test]
fn no_device_and_no_late_writes() {
    assert_eq!(demo(&["--json"]).json()["late_writes"], Value::Null);
}
