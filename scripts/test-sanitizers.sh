#!/usr/bin/env bash
# Runs the unit tests and the tests without KVM under ThreadSanitizer and AddressSanitizer, standard library included.
# scripts/test-sanitizers.sh [thread|address]: one of them, or both. Installs a nightly toolchain with the library's source if there is
# none, for which it needs a network.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib/nightly.sh

nightly rust-src
target=$(uname -m)-unknown-linux-gnu

# What runs under neither: KVM guests are not instrumented, and the others meet the sanitizer's own memory and system calls.
declare -A left_out=(
    [address_space]='limits address space, of which the sanitizer has reserved terabytes, and counts the mappings of the process'
    [limits]='limits memory and mappings, and the sanitizer ends the process where it gets none'
    [lock_memory]='locks memory, of which sanitizers make nothing'
    [locked]='locks all memory of the process, the shadow included'
    [numa]='counts system calls and threads of the process'
    [seccomp]='forbids system calls that the sanitizer makes'
    [sigbus]='ends the process by signals that the sanitizer handles itself'
    [specification]='reads documents'
)
# Single tests, for the reason of the file that they would be in.
skipped=(
    --skip more_hugetlb_pages_than_there_are # more address space than the sanitizer leaves
    --skip threads_that_cannot_be_started    # RLIMIT_AS
    --skip what_is_lent_is_the_kernels       # munlock, of which sanitizers make nothing
    --skip a_move_that_fails_leaves_no_hole  # a forked child under a limit
    --skip one_page_is_measured              # these three: no loop is measured where the environment names one
    --skip a_measured_loop_comes_with_its_rates
    --skip a_proven_receipt
    --skip locked_drop                       # these two: munlock, as above
    --skip locked_teardown
    --skip it_is_the_end                     # SIGBUS, which the sanitizer handles itself
)
# What has more than one thread to it: the rest would be a slow way of running it.
threaded=(background check_on_grant concurrent dropped life_cycle revocation shared shared_unfinished windows)

run() {
    local sanitizer=$1 tests=() name skipped=("${skipped[@]}")
    shift
    # Minutes for what has one thread, and for reading every byte in a loop: the stress test has the same threads and more.
    [[ $sanitizer == address ]] ||
        skipped+=(--skip arch::tests::verify_ --skip arch::tests::zero_ --skip many_threads_retire_wait_cancel_and_lease)
    for name in "$@"; do
        tests+=(--test "$name")
    done
    printf '\n== %s sanitizer: unit tests, %s\n' "$sanitizer" "$*"
    local command=(cargo +nightly test --locked --release -Zbuild-std --target "$target" --target-dir "target/sanitizer-$sanitizer"
        -p vm-scrub -p vm-scrub-tests --features vm-scrub/test-support --lib "${tests[@]}")
    # A sanitizer sees what the compiler has made of Rust, and not what is written in assembly.
    export VM_SCRUB_LOOP=portable VM_SCRUB_VERIFY_LOOP=portable
    # Without optimisation, what walks over every fault takes an hour.
    export RUSTFLAGS="-Zsanitizer=$sanitizer -Cdebug-assertions -Coverflow-checks"
    timeout --kill-after=10 1200 "${command[@]}" --no-run
    # Traces of panics that tests cause on purpose are many, and slow.
    RUST_BACKTRACE=0 timeout --kill-after=10 2400 "${command[@]}" --no-fail-fast -- "${skipped[@]}"
}

thread() {
    export TSAN_OPTIONS="exitcode=66"
    run thread "${threaded[@]}"
}

address() {
    local name tests=()
    for path in tests/tests/*; do
        name=$(basename "$path" .rs)
        if [[ -n ${left_out[$name]-} ]]; then
            printf 'SKIPPED %s: %s\n' "$name" "${left_out[$name]}"
        elif [[ $name != kvm_* ]]; then
            tests+=("$name")
        fi
    done
    # Leases that are forgotten and windows that stay reserved are the point of some tests.
    export ASAN_OPTIONS="detect_leaks=0"
    run address "${tests[@]}"
}

case ${1-} in
thread | address) "$1" ;;
'') thread && address ;;
*) sed -n '2,4s/^# //p' "$0" && exit 2 ;;
esac
printf '\nnothing found\n'
