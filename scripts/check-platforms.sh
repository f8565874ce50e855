#!/usr/bin/env bash
# What must be clean on the other platforms: everything is linted for musl and for aarch64, and for musl, which this host can run,
# it is built and the unit tests are run. scripts/test-aarch64.sh runs them for aarch64. Needs no root, and on the first run a network.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib/debian.sh

step() {
    printf '\n== %s\n' "$*"
    timeout --kill-after=10 600 "$@"
}

aarch64_compiler
# One dependency of the benches has a few lines of C, which need no C library.
export CC_x86_64_unknown_linux_musl=cc
export CC_aarch64_unknown_linux_gnu=aarch64-linux-gnu-gcc
export CC_aarch64_unknown_linux_musl=aarch64-linux-gnu-gcc

for target in x86_64-unknown-linux-musl aarch64-unknown-linux-gnu aarch64-unknown-linux-musl; do
    rust_target "$target"
    step cargo clippy --locked --workspace --all-targets --target "$target" -- -D warnings
done
target=x86_64-unknown-linux-musl
step cargo build --locked --workspace --profile emulated --target "$target"
# The same packages as in scripts/test-in-qemu.sh, which so finds them built.
step cargo test --locked --profile emulated --target "$target" -p vm-scrub -p vm-scrub-vmm -p vm-scrub-tests --lib
printf '\nall platforms passed\n'
