#!/usr/bin/env bash
# Runs the tests of the library and of its KVM guests as if this kernel were of an older release: what came later is refused as that
# one would refuse it (tests/src/older.rs). Much quicker than scripts/test-in-qemu.sh, so the walks over all faults can be run to
# their end; but what else differs, only a real kernel shows.
#
# usage: scripts/test-as-older.sh [RELEASE [ARGUMENT...]]
#
# A release such as 5.10, which is run if none is named. The arguments are cargo test's: --test=faults for one program.
set -euo pipefail
cd "$(dirname "$0")/.."

release=${1:-5.10}
shift $(($# > 0))
[[ $release =~ ^[0-9]+\.[0-9]+$ ]] || { sed -n '6,8s/^# //p' "$0" && exit 2; }

# The pager in it has a userfaultfd of its own, and a filter cannot tell for what.
mapfile -t programs < <(basename -s .rs tests/tests/* | sed '/^pagers$/d; s/^/--test=/')
[[ $# -eq 0 ]] || programs=("$@")

cargo build --locked --example as_linux
# Only the tests are to meet that kernel, and not what builds them.
host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export "CARGO_TARGET_${host}_RUNNER=$PWD/target/debug/examples/as_linux $release"
# As `cargo test` has built them.
if [[ $# -eq 0 ]]; then
    printf 'SKIPPED pagers: asks for what older kernels have, by the call that is refused\n'
    programs+=(--lib)
fi
timeout --kill-after=10 3000 cargo test --locked --no-fail-fast "${programs[@]}"
