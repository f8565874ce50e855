#!/usr/bin/env bash
# Runs what needs no system call under Miri, which finds undefined behaviour: the portable loops and what all loops share, and
# the decisions about ranges, blocks and pace. Installs a nightly toolchain with Miri if there is none, for which it needs a network.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo +nightly miri --version >/dev/null 2>&1 ||
    rustup toolchain install nightly --profile minimal --component miri --component rust-src
# Property tests keep failures in files; few cases, because an interpreter is slow.
export MIRIFLAGS='-Zmiri-strict-provenance -Zmiri-disable-isolation' PROPTEST_CASES=4
timeout --kill-after=10 900 cargo +nightly miri test --locked -p vm-scrub --lib --target-dir target/miri -- \
    arch:: scrub::batches scrub::plan scrub::sample scrub::pass pool::extents pool::ledger pool::throttle lease::account lease::region
