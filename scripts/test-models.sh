#!/usr/bin/env bash
# Runs the models of crates/vm-scrub/src/models under loom: the pool's books, the background queue, the publish edge of jobs and retired
# leases, in every order in which their threads can meet, up to a number of preemptions (LOOM_MAX_PREEMPTIONS sets another one). Needs
# Rust and nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."

export RUSTFLAGS='--cfg loom'
# loom sees only what is built on its primitives: not rayon's threads, and KVM takes no part.
library=(--locked -p vm-scrub --lib --no-default-features --features vm-memory --target-dir target/loom)
timeout --kill-after=10 600 cargo test "${library[@]}" --no-run
timeout --kill-after=10 180 cargo test "${library[@]}" -- --nocapture models::
