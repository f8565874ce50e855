#!/usr/bin/env bash
# What must be clean on the other platforms: everything is linted for musl and for aarch64, and for musl, which this host can run,
# the command is built and the unit tests are run. scripts/test-aarch64.sh runs them for aarch64. Needs no root, and on the first run a network.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib/debian.sh
source scripts/lib/emulated.sh

step() {
    printf '\n== %s\n' "$*"
    timeout --kill-after=10 600 "$@"
}

aarch64_compiler
# One dependency of the benches has a few lines of C, which need no C library.
export CC_x86_64_unknown_linux_musl=cc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_musl=aarch64-linux-gnu-gcc

for platform in x86_64-unknown-linux-musl aarch64-unknown-linux-gnu aarch64-unknown-linux-musl; do
    rust_target "$platform"
    step cargo clippy --locked --workspace --all-targets --target "$platform" -- -D warnings
done
step cargo build --locked --target "$target" -p vm-scrub-cli
step cargo test --locked "${emulated[@]}" --lib
printf '\nall platforms passed\n'
