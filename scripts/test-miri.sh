#!/usr/bin/env bash
# Runs what needs no system call under Miri, which finds undefined behaviour: the portable loops and what all loops share, jobs in the hands
# of several threads, and every decision about ranges, blocks, accounts, pace, regions, loops, NUMA nodes and mappings. Installs a nightly
# toolchain with Miri if there is none, for which it needs a network.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib/nightly.sh

nightly miri rust-src
# Property tests keep failures in files; few cases, because an interpreter is slow.
export MIRIFLAGS='-Zmiri-strict-provenance -Zmiri-disable-isolation' PROPTEST_CASES=2
# By module where all tests qualify. The rest of a module makes system calls that Miri does not know, or measures.
tests=(
    arch::
    lease::
    pool::
    scrub::batches scrub::direct scrub::job scrub::pass scrub::plan scrub::sample
    scrub::calibrate::tests::{a_share,both_sizes,equals,nothing_measured,sizes_stand,so_much,the_cheapest,what_is_far,what_was_tried}
    sys::numa::tests::{lists,a_list,a_mask,no_text}
    sys::procmap::tests::lines_of_all_kinds
)
library=(--locked -p vm-scrub --lib --target-dir target/miri)
timeout --kill-after=10 600 cargo +nightly miri test "${library[@]}" --no-run
# The loops first: what they do with memory is what an interpreter is for.
timeout --kill-after=10 600 cargo +nightly miri test "${library[@]}" -- "${tests[0]}"
# Some tests in there build pools, and one meets a panic of the embedder's, of which what was thrown is leaked on purpose.
timeout --kill-after=10 900 cargo +nightly miri test "${library[@]}" -- "${tests[@]:1}" \
    --skip=lease::{retire,sealing,shared,stages,unbalanced} --skip=pool::{background::tests::{the_thread,an_errand_that_panics},withheld::tests}
