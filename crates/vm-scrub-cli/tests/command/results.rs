//! Demonstrations that go well, for programs and for people.

use serde_json::Value;
use vm_scrub_vmm::kvm_usable;

use crate::{MEMORY, Run, demo, page_sizes};

/// Checks the sums of a receipt and that it is proven.
#[track_caller]
fn assert_proven(receipt: &Value) {
    let bytes = |field: &str| {
        receipt[field]
            .as_u64()
            .unwrap_or_else(|| panic!("{field}: {receipt:#}"))
    };
    assert_eq!(bytes("bytes_total"), MEMORY);
    assert_eq!(
        bytes("bytes_scrubbed") + bytes("bytes_never_populated") + bytes("bytes_quarantined"),
        MEMORY
    );
    assert_eq!(bytes("bytes_quarantined"), 0);
    assert_eq!(bytes("bytes_verified"), bytes("bytes_scrubbed"));
    assert_eq!(receipt["outcome"], "proven");
    assert!(!receipt["loop"].as_str().unwrap().is_empty());
    assert!(receipt["threads"].as_u64().unwrap() >= 1);
    assert!(receipt["elapsed_ns"].as_u64().unwrap() > 0);
}

/// Checks what every demonstration must show in which nothing was broken.
#[track_caller]
pub(crate) fn assert_shown(run: &Run, guests: usize) -> Value {
    assert_eq!(run.code(), 0, "{run:#?}");
    let report = run.json();
    assert_eq!(report["memory_bytes"], MEMORY);
    assert_eq!(report["secret_bytes_found_before_teardown"], MEMORY);
    assert_eq!(report["same_blocks"], true);
    assert_eq!(report["leaked_bytes"], 0);
    assert_eq!(report["proven"], true);
    assert_eq!(report["refused"], Value::Null);
    assert_eq!(report["accounts"]["clean"], MEMORY);
    assert_eq!(report["accounts"]["quarantined"], 0);

    let receipts = report["receipts"].as_array().unwrap();
    let names: Vec<String> = (1..=guests)
        .map(|number| format!("guest-{number}"))
        .collect();
    assert!(
        receipts.iter().map(|receipt| &receipt["guest"]).eq(&names),
        "oldest first"
    );
    let ended = |receipt: &Value| receipt["ended_unix_ms"].as_u64().unwrap();
    assert!(receipts.is_sorted_by_key(ended));
    receipts.iter().for_each(assert_proven);
    // All but the last one had filled all of it.
    for receipt in &receipts[..guests - 1] {
        assert_eq!(receipt["bytes_scrubbed"], MEMORY);
    }

    let entries = report["guests"].as_array().unwrap();
    assert_eq!(entries.len(), guests);
    for (number, guest) in entries.iter().enumerate() {
        let (first, last) = (number == 0, number == guests - 1);
        assert_eq!(guest["name"], *names[number]);
        assert_eq!(guest["blocks"], entries[0]["blocks"]);
        assert_eq!(guest["bytes_read"], if first { 0 } else { MEMORY });
        assert_eq!(guest["leaked_bytes"], 0);
        assert_eq!(
            guest["secret_bytes_before_teardown"],
            if last { 0 } else { MEMORY }
        );
    }
    report
}

#[test]
fn every_page_size() {
    for page_size in page_sizes() {
        let run = demo(&["--json", "--page-size", page_size]);
        let report = assert_shown(&run, 2);
        assert_eq!(report["page_size"], page_size);
        assert_eq!(report["receipts"][0]["page_size"], page_size);
        let kind = if kvm_usable().is_ok() {
            "kvm"
        } else {
            "threads"
        };
        assert_eq!(report["guest"], kind);
        assert_eq!(report["vcpus"], 1);
        if kind == "kvm" && page_size != "2m" {
            assert_eq!(run.stderr, "", "nothing is said that need not be");
        }
    }
}

#[test]
fn guests_vcpus_and_threads_are_as_many_as_asked_for() {
    let run = demo(&["--json", "--guests", "4", "--vcpus", "2", "--threads", "1"]);
    let report = assert_shown(&run, 4);
    assert_eq!(report["vcpus"], 2);
    for receipt in report["receipts"].as_array().unwrap() {
        assert_eq!(receipt["threads"], 1);
    }
    let run = demo(&["--json", "--threads", "3"]);
    assert_eq!(assert_shown(&run, 2)["receipts"][0]["threads"], 3);
}

#[test]
fn many_guests_are_told_as_a_table_with_an_end() {
    let run = demo(&["--guests", "25"]);
    assert_eq!(run.code(), 0, "{run:#?}");
    assert!(run.stdout.contains("and 5 more"), "{}", run.stdout);
    assert!(
        run.closing_line()
            .starts_with("PROVEN: guest-1 left 8.00 MiB"),
        "{run:#?}"
    );
}

#[test]
fn people_are_told_the_same() {
    for page_size in page_sizes() {
        let run = demo(&["--page-size", page_size, "--guests", "3"]);
        assert_eq!(run.code(), 0, "{run:#?}");
        for said in [
            "guest-1",
            "guest-3",
            "not one byte is different from zero",
            "read back",
            "proven",
        ] {
            assert!(run.stdout.contains(said), "{said}: {}", run.stdout);
        }
        assert!(
            !run.stdout.contains('\x1b'),
            "no colours in a pipe: {}",
            run.stdout
        );
        assert!(run.closing_line().starts_with("PROVEN: "), "{}", run.stdout);
        assert!(run.closing_line().contains("guest-3"), "{}", run.stdout);
    }
}

#[test]
fn without_verification_nothing_is_proven() {
    let run = demo(&["--json", "--verify", "none"]);
    assert_eq!(run.code(), 1, "{run:#?}");
    let report = run.json();
    assert_eq!(
        (&report["proven"], &report["leaked_bytes"]),
        (&false.into(), &0.into())
    );
    for receipt in report["receipts"].as_array().unwrap() {
        assert_eq!(receipt["outcome"], "unverified");
        assert_eq!(receipt["verify"], "none");
        assert_eq!(receipt["bytes_verified"], 0);
        assert_eq!(receipt["verify_loop"], Value::Null);
    }
    let run = demo(&["--verify", "none"]);
    assert_eq!(run.code(), 1);
    assert!(
        run.closing_line().starts_with("NOT PROVEN: "),
        "{}",
        run.stdout
    );
}
