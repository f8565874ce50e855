#!/usr/bin/env bash
# Fuzzes every target for so many seconds (60 if not said otherwise), from the kept corpus on, and ends with a table. Fails if one
# has found something; its input is then in fuzz/artifacts, and the target with the file's name as argument runs it again. What is new goes
# into fuzz/target/corpus and not into the kept corpora: `scripts/fuzz.sh --keep` makes those anew, from both, as small as they can be.
#
# The targets are those of cargo-fuzz, built as `cargo fuzz build --sanitizer none` builds them. But neither that nor a nightly compiler
# has to be there: libFuzzer comes with a crate, and the stable compiler knows how to count what is reached.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=60
keep=no
case "${1:-}" in
    --keep) keep=yes ;;
    "") ;;
    *[!0-9]*) echo "usage: ${0##*/} [SECONDS | --keep]" >&2; exit 2 ;;
    *) seconds=$1 ;;
esac

# libFuzzer is written in C++.
if ! command -v "${CXX:-c++}" >/dev/null; then
    echo "SKIPPED fuzzing: there is no C++ compiler"
    exit
fi

# Without AddressSanitizer: what could go wrong here goes wrong in mapped memory, of which it knows nothing, and guard pages find it.
host=$(rustc -vV | sed -n 's/^host: //p')
flags=(--cfg fuzzing -C codegen-units=1 -C passes=sancov-module)
for flag in level=4 inline-8bit-counters pc-table trace-compares; do
    flags+=(-C "llvm-args=-sanitizer-coverage-$flag")
done
# With a target, so that only it is instrumented and not what runs while it is built.
RUSTFLAGS="${flags[*]}" cargo build --locked --release --manifest-path fuzz/Cargo.toml --target "$host"
built=fuzz/target/$host/release
mapfile -t targets < <(basename -s .rs fuzz/fuzz_targets/*.rs)

# A guest's memory is 16 MiB at most. A pause of the whole machine is not a hang.
limits=(-timeout=300 -rss_limit_mb=4096)

# One input for each part of the code that is reached, and not one for each number of times: a few dozen small files.
keep_corpus() {
    local target=$1 new="fuzz/target/kept/$1"
    rm -rf "$new"
    mkdir -p "$new" "fuzz/target/corpus/$target"
    "$built/$target" "${limits[@]}" -set_cover_merge=1 -use_counters=0 "$new" "fuzz/target/corpus/$target" "fuzz/corpus/$target"
    rm -rf "fuzz/corpus/$target"
    mv "$new" "fuzz/corpus/$target"
}

if [ "$keep" = yes ]; then
    for target in "${targets[@]}"; do
        keep_corpus "$target"
    done
    du -sb fuzz/corpus/*
    exit
fi

failed=0
table=$(printf '%-8s %10s %8s %8s %s' target inputs coverage corpus result)
for target in "${targets[@]}"; do
    mkdir -p "fuzz/target/corpus/$target" "fuzz/artifacts/$target"
    log="fuzz/target/$target.log"
    result=clean
    timeout --kill-after=10 $((seconds + 400)) "$built/$target" "${limits[@]}" -max_total_time="$seconds" -max_len=1200 -len_control=0 \
        -print_final_stats=1 -artifact_prefix="fuzz/artifacts/$target/" \
        "fuzz/target/corpus/$target" "fuzz/corpus/$target" >"$log" 2>&1 || result="FAILED, see $log"
    if [ "$result" != clean ]; then
        failed=1
        tail -n 40 "$log"
    fi
    inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    last=$(grep -E '^#[0-9]+' "$log" | tail -n 1 || true)
    coverage=$(sed -n 's/.* cov: \([0-9]*\).*/\1/p' <<<"$last")
    corpus=$(sed -n 's/.* corp: \([0-9]*\).*/\1/p' <<<"$last")
    table+=$'\n'$(printf '%-8s %10s %8s %8s %s' "$target" "${inputs:-?}" "${coverage:-?}" "${corpus:-?}" "$result")
done
printf '\n%s\n' "$table"
exit "$failed"
