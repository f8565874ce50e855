#!/usr/bin/env bash
# Checks the libraries and the command with the oldest compiler that Cargo.toml promises; tests and benches may need a later one. Installs it if it is missing; where it cannot be had, says so.
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^rust-version = "\(.*\)"$/\1/p' Cargo.toml)
if ! rustup run "$version" rustc --version >/dev/null 2>&1 &&
    ! timeout --kill-after=10 300 rustup toolchain install "$version" --profile minimal; then
    echo "SKIPPED Rust $version: it is not on this machine and cannot be fetched"
    exit
fi
timeout --kill-after=10 600 cargo "+$version" check --locked --workspace
printf '\nRust %s builds the libraries and the command\n' "$version"
