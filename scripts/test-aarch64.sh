#!/usr/bin/env bash
# Builds the library for aarch64 and runs its unit tests there, in user-mode emulation: on a processor whose DC ZVA zeroes 512 bytes
# at a time and on one of 64. Needs no root, and on the first run a network.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib/debian.sh

target=aarch64-unknown-linux-gnu
aarch64_compiler
rust_target "$target"

# What cannot be seen here, and why.
skipped=()
skip() {
    printf 'SKIPPED %s: %s\n' "$1" "$2"
    skipped+=(--skip "$1")
}
skip backing::anonymous::tests::bytes_come_back_to_the_arena_and_the_window_is_closed \
    'QEMU 7.2 says yes to MADV_POPULATE_WRITE and does nothing, so a closed window does not refuse it'

skip backing::shared::tests::a_sealed_file_is_read_through_another_view \
    'nor does a view that was closed refuse MADV_POPULATE_READ'
skip backing::shared::tests::a_guest_gets_no_window_onto_another_file 'the same'
skip backing::shared::tests::the_scrubber_gets_no_view_of_another_file 'the same'
skip backing::anonymous::tests::what_cannot_be_locked_in_its_window_is_home_again 'the same'
skip backing::anonymous::tests::what_cannot_be_moved_as_a_whole_is_home_again 'the same'
skip lease::sealing::tests::what_breaks_when_it_is_zeroed_again_is_quarantined_by_its_number \
    'nor is memory that breaks found by asking for it'
skip pool::withheld::tests::a_memory_error_is_not_forgotten_by_an_attempt_that_is_broken_off \
    'the same'
skip backing::anonymous::tests::what_is_lent_is_the_kernels 'it locks no memory (mlock2)'
skip backing::shared::tests::what_was_populated_is_there 'nor does it populate anything'
skip backing::window::tests::a_window_that_is_leaked_stays_reserved \
    'QEMU leaves a mapping out of /proc/self/maps where another thread unmaps what is one with it to the kernel'
skip scrub::calibrate::tests::what_was_measured_on_is_unmapped \
    'QEMU goes on to new addresses where the kernel uses old ones again'
skip sys::fork::tests::a_child_has_another_number_than_its_parent_and_keeps_it \
    'it empties no page for a child (MADV_WIPEONFORK)'
skip sys::map::tests::a_move_that_fails_leaves_no_hole 'it limits no memory (RLIMIT_DATA)'
skip sys::pagemap::tests::what_another_file_says_is_not_believed \
    'QEMU says of its own that there is no such ioctl, whatever the file'

for QEMU_CPU in max neoverse-n1; do
    export QEMU_CPU
    printf '\n== %s on %s\n' "$target" "$QEMU_CPU"
    timeout --kill-after=10 600 cargo test --locked --profile emulated --target "$target" -p vm-scrub --lib --features test-support -- \
        --exact "${skipped[@]}"
done
