//! The inputs that fuzzing has kept, replayed, and some new ones: what fuzzing has found once is found again, and a target that
//! breaks is noticed, without libFuzzer.
//!
//! Each target runs in a process of its own, because faults make the library remember, for the whole process, what the
//! kernel cannot do.

use proptest::prelude::*;
use std::path::Path;
use vm_scrub_tests::child::alone;
use vm_scrub_tests::fuzz::TARGETS;
use vm_scrub_tests::skipped;

/// Inputs that nobody has chosen. Fuzzing looks at millions; these are for what every input shows.
const NEW_INPUTS: u32 = 32;

/// Whether the corpora are where they were when this was built: not in an emulated machine, which has the programs only.
fn has_corpora() -> bool {
    let has = Path::new(env!("CARGO_MANIFEST_DIR")).exists();
    if !has {
        skipped(&"the sources are not on this machine");
    }
    has
}

/// Runs a target on every input of its corpus, and on some that are new.
fn replay(name: &str) {
    if !has_corpora() {
        return;
    }
    let (_, target) = TARGETS
        .iter()
        .find(|(target, _)| *target == name)
        .expect("there is such a target");
    let directory = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(name);
    let files = std::fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(files.len() > 1, "{} is empty", directory.display());
    for file in files {
        // Shown if the target fails.
        eprintln!("{}", file.display());
        target(&std::fs::read(&file).unwrap());
    }
    let config = ProptestConfig {
        cases: NEW_INPUTS,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(input in prop::collection::vec(any::<u8>(), 0..800))| target(&input));
}

#[test]
fn loops() {
    alone("loops", || replay("loops"));
}

#[test]
fn pool() {
    alone("pool", || replay("pool"));
}

#[test]
fn scrub() {
    alone("scrub", || replay("scrub"));
}

#[test]
fn text() {
    alone("text", || replay("text"));
}

#[test]
fn every_corpus_has_a_target_and_every_target_a_corpus() {
    if !has_corpora() {
        return;
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
    let mut corpora: Vec<String> = std::fs::read_dir(directory.join("corpus"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    corpora.sort();
    assert_eq!(corpora, TARGETS.map(|(name, _)| name));
    for (name, _) in TARGETS {
        assert!(
            directory.join(format!("fuzz_targets/{name}.rs")).exists(),
            "{name}"
        );
    }
}
