#!/usr/bin/env bash
# What must be clean besides the tests: format, lints, docs, and the library with each of its features.
set -euo pipefail
cd "$(dirname "$0")/.."

step() {
    printf '\n== %s\n' "$*"
    "$@"
}

step cargo fmt --all --check
step cargo clippy --locked --workspace --all-targets -- -D warnings
# The library alone, as embedders build it: with nothing, each feature by itself, the default, and all of them. test-support is only for this project
# and always on in the workspace build above.
for features in "" rayon vm-memory kvm serde kvm,rayon kvm,rayon,serde; do
    step cargo clippy --locked -p vm-scrub --lib --no-default-features --features "$features" -- -D warnings
done
step cargo test --locked -p vm-scrub --no-default-features
# Optimised, as it is shipped: what the compiler may leave out, it leaves out there.
step cargo test --locked --release -p vm-scrub --lib --no-default-features --features rayon -- arch:: scrub::
export RUSTDOCFLAGS="-D warnings"
step cargo doc --locked --workspace --no-deps
step cargo doc --locked -p vm-scrub --no-deps --no-default-features
printf '\nall checks passed\n'
