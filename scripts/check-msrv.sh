#!/usr/bin/env bash
# Checks with the oldest compiler that Cargo.toml promises what `cargo run` and `cargo test` build. The benches may need a later one.
# Installs it if it is missing; where it cannot be had, says so.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
if ! rustup run "$version" rustc --version >/dev/null 2>&1 &&
    ! timeout --kill-after=10 300 rustup toolchain install "$version" --profile minimal; then
    echo "SKIPPED Rust $version: it is not on this machine and cannot be fetched"
    exit
fi
timeout --kill-after=10 600 cargo "+$version" check --locked --all-targets
printf '\nchecked with Rust %s: everything but the benches\n' "$version"
