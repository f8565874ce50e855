#!/usr/bin/env bash
# Breaks the library, one place at a time (.cargo/mutants.toml says where), and looks whether a test notices: first the unit tests,
# which take seconds, then the integration tests for what these have missed. What is left over is in target/mutants.out/missed.txt;
# each of them wants a test, or a reason. Installs cargo-mutants where it is missing. All of it takes a night: an argument is a
# regular expression for the places, as in `scripts/mutants.sh src/pool/ledger`.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo mutants --version >/dev/null 2>&1 || cargo install cargo-mutants --locked

common=(--package vm-scrub --jobs 1 --no-shuffle --output target --re "${1:-.}")
# 2 and 3: mutants were missed, or timed out. Anything else is a failure of the tests themselves.
missed_some() {
    "$@" || { local status=$?; [ "$status" = 2 ] || [ "$status" = 3 ] || exit "$status"; }
}
missed_some cargo mutants "${common[@]}" --test-package vm-scrub -- --lib
# Only what was not caught; KVM tests say little about the pool and take long.
missed_some cargo mutants "${common[@]}" --iterate --test-package vm-scrub-tests -- --tests
printf '\nmissed:\n'
cat target/mutants.out/missed.txt
[ ! -s target/mutants.out/missed.txt ]
