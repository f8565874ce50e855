//! A receipt as JSON: the names and words that others read, and that nothing is lost on the way there and back.

use serde_json::{Value, json};
use vm_scrub::test_support::{Sabotage, build_sabotaged};
use vm_scrub::{Accounts, BLOCK_SIZE, PageSize, Policy, ScrubReceipt, Verify};
use vm_scrub_tests::maps::has_uffdio_move;
use vm_scrub_tests::{
    fill, on_every_page_size, on_small_page_sizes, pool, pools, regions, teardown,
};

on_every_page_size!(a_proven_receipt: 4);
on_small_page_sizes!(memory_in_several_places);

/// To JSON and back, checking that it is the same afterwards.
fn there_and_back(receipt: &ScrubReceipt) -> Value {
    let text = serde_json::to_string(receipt).unwrap();
    let back: ScrubReceipt = serde_json::from_str(&text).unwrap();
    assert_eq!(back, *receipt);
    serde_json::from_str(&text).unwrap()
}

fn a_proven_receipt(page_size: PageSize) {
    let pool = pool(page_size, 4);
    let layout = regions(&[(8 * BLOCK_SIZE, 3 * BLOCK_SIZE), (0, BLOCK_SIZE)]);
    let lease = pool.lease_for("guest seven", &layout).unwrap();
    fill(&lease, 1);
    let receipt = teardown(lease);
    let json = there_and_back(&receipt);

    let fields: Vec<&str> = json
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let mut documented = [
        "lease",
        "guest",
        "regions",
        "blocks",
        "page_size",
        "revocation",
        "verify",
        "bytes_total",
        "bytes_scrubbed",
        "bytes_never_populated",
        "bytes_quarantined",
        "bytes_verified",
        "bytes_returned",
        "bytes_unlocked",
        "quarantined",
        "loop",
        "verify_loop",
        "sample_seed",
        "calibration",
        "verify_calibration",
        "threads",
        "elapsed_ns",
        "steps",
        "ended_unix_ms",
        "outcome",
    ];
    documented.sort_unstable();
    assert_eq!(fields, documented);

    assert!(json["lease"].is_u64());
    assert_eq!(json["guest"], "guest seven");
    assert_eq!(
        json["regions"],
        json!([
            { "guest_address": 0, "bytes": BLOCK_SIZE },
            { "guest_address": 8 * BLOCK_SIZE, "bytes": 3 * BLOCK_SIZE },
        ])
    );
    assert_eq!(json["blocks"], json!([{ "first": 0, "blocks": 4 }]));
    let anonymous = if has_uffdio_move() { "move" } else { "mremap" };
    let (name, revocation) = match page_size {
        PageSize::Base4K => ("4k", anonymous),
        PageSize::Transparent => ("thp", anonymous),
        _ => ("2m", "view-replaced"),
    };
    assert_eq!(
        (&json["page_size"], &json["revocation"]),
        (&json!(name), &json!(revocation))
    );
    assert_eq!(
        page_size.name(),
        name,
        "what JSON says and what the command takes are one"
    );
    assert_eq!(json["verify"], "full");
    assert_eq!(json["bytes_total"], 4 * BLOCK_SIZE);
    assert_eq!(json["bytes_scrubbed"], 4 * BLOCK_SIZE);
    assert_eq!(json["bytes_never_populated"], 0);
    assert_eq!(json["bytes_quarantined"], 0);
    assert_eq!(json["bytes_verified"], 4 * BLOCK_SIZE);
    assert_eq!(json["quarantined"], json!([]));
    assert_eq!(json["loop"], receipt.zero_loop);
    assert_eq!(json["verify_loop"], json!(receipt.verify_loop));
    for (rates, operation) in [
        ("calibration", "zero-and-verify"),
        ("verify_calibration", "verify"),
    ] {
        let rates = json[rates].as_array().unwrap();
        assert!(!rates.is_empty());
        for rate in rates {
            assert_eq!(rate["operation"], operation);
            assert!(rate["loop"].is_string() && rate["bytes_per_second"].is_u64());
        }
    }
    assert_eq!(json["threads"], 2);
    assert_eq!(json["outcome"], "proven");

    // Each step is a part of the whole.
    let steps = json["steps"].as_object().unwrap();
    let names: Vec<&str> = steps.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        [
            "recycle_ns",
            "residency_ns",
            "revoke_ns",
            "scrub_ns",
            "verify_ns"
        ]
    );
    let sum: u64 = steps.values().map(|time| time.as_u64().unwrap()).sum();
    assert!(sum <= receipt.elapsed_ns, "{json}");
    assert!(receipt.steps.scrub_ns > 0 && receipt.steps.verify_ns > 0);
    // After the year 2020, in milliseconds.
    assert!(receipt.ended_unix_ms > 1_577_836_800_000);
}

/// A region is one range to the guest, wherever in the pool its blocks are.
fn memory_in_several_places(page_size: PageSize) {
    let builder = pools::builder(page_size, 4);
    let pool = build_sabotaged(builder, Sabotage::SkipScrub).unwrap();
    let block = || pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let (first, _second, third, _fourth) = (block(), block(), block(), block());
    // Nothing in them, so nothing that is not zeroed.
    assert!(teardown(first).is_proven() && teardown(third).is_proven());
    let bytes = 2 * BLOCK_SIZE - 4096;
    let lease = pool.lease(&regions(&[(1 << 32, bytes)])).unwrap();
    assert_eq!(lease.blocks().len(), 2, "apart");
    fill(&lease, 1);
    let receipt = teardown(lease);
    let quarantined = &receipt.quarantined;
    assert_eq!(quarantined[0].guest_address, 1 << 32);
    assert_eq!(receipt.bytes_quarantined, bytes);
}

#[test]
fn a_receipt_of_a_guest_without_a_name_that_was_not_read_back() {
    let pool = pools::builder(PageSize::Base4K, 1)
        .policy(Policy::new().verify(Verify::None))
        .build()
        .unwrap();
    let lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let json = there_and_back(&teardown(lease));
    assert_eq!(json["guest"], Value::Null);
    assert_eq!(json["verify_loop"], Value::Null);
    assert_eq!(
        (&json["verify"], &json["outcome"]),
        (&json!("none"), &json!("unverified"))
    );
    assert_eq!(json["bytes_never_populated"], BLOCK_SIZE);
}

#[test]
fn a_receipt_with_something_in_quarantine() {
    let builder = pools::builder(PageSize::Base4K, 2);
    let pool = build_sabotaged(builder, Sabotage::SkipChunk).unwrap();
    let lease = pool.lease(&regions(&[(4096, 2 * BLOCK_SIZE)])).unwrap();
    fill(&lease, 1);
    let json = there_and_back(&teardown(lease));
    assert_eq!(json["outcome"], "quarantined");
    assert_eq!(json["bytes_quarantined"], BLOCK_SIZE);
    let [range] = &json["quarantined"].as_array().unwrap()[..] else {
        panic!("{json}");
    };
    assert_eq!(range["guest_address"], 4096);
    assert_eq!(range["bytes"], BLOCK_SIZE);
    assert_eq!(range["reason"], "not-zero");
    assert!(
        range["detail"].as_str().unwrap().contains("0x1c1000"),
        "{range}"
    );
}

#[test]
fn accounts() {
    let pool = pool(PageSize::Base4K, 3);
    let _lease = pool.lease(&regions(&[(0, BLOCK_SIZE)])).unwrap();
    let accounts = pool.accounts();
    let json = serde_json::to_value(accounts).unwrap();
    let expected =
        json!({ "clean": 2 * BLOCK_SIZE, "leased": BLOCK_SIZE, "dirty": 0, "quarantined": 0 });
    assert_eq!(json, expected);
    assert_eq!(serde_json::from_value::<Accounts>(json).unwrap(), accounts);
}
