#!/usr/bin/env bash
# Fuzzes every target for so many seconds (60 if not said otherwise), from the kept corpus on, and ends with a table. Fails if one
# has found something; its input is then in fuzz/artifacts, and `cargo +nightly fuzz run TARGET FILE` runs it again. Installs the
# nightly compiler and cargo-fuzz where they are missing. What is new goes into fuzz/target/corpus and not into the kept corpora:
# `scripts/fuzz.sh --keep` makes those anew, from both, as small as they can be.
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

rustup run nightly rustc --version >/dev/null 2>&1 || rustup toolchain install nightly --profile minimal
cargo fuzz --version >/dev/null 2>&1 || cargo install cargo-fuzz --locked

# Without AddressSanitizer: what could go wrong here goes wrong in mapped memory, of which it knows nothing, and guard pages find it.
fuzz() {
    cargo +nightly fuzz "$1" --sanitizer none "${@:2}"
}

fuzz build
targets=$(cargo +nightly fuzz list)

# One input for each part of the code that is reached, and not one for each number of times: a few dozen small files.
keep_corpus() {
    local target=$1 new="fuzz/target/kept/$1"
    rm -rf "$new"
    mkdir -p "$new" "fuzz/target/corpus/$target"
    cp -r "fuzz/corpus/$target/." "fuzz/target/corpus/$target/."
    fuzz cmin "$target" "fuzz/target/corpus/$target" -- -set_cover_merge=1 -use_counters=0 -timeout=300 -rss_limit_mb=4096
    cp -r "fuzz/target/corpus/$target/." "$new/."
    rm -rf "fuzz/corpus/$target"
    mv "$new" "fuzz/corpus/$target"
}

if [ "$keep" = yes ]; then
    for target in $targets; do
        keep_corpus "$target"
    done
    du -sb fuzz/corpus/*
    exit
fi

# A guest's memory is 16 MiB at most. A pause of the whole machine is not a hang.
limits=(-max_total_time="$seconds" -timeout=300 -rss_limit_mb=4096 -max_len=1200 -len_control=0 -print_final_stats=1)
failed=0
table=$(printf '%-8s %10s %8s %8s %s' target inputs coverage corpus result)
for target in $targets; do
    mkdir -p "fuzz/target/corpus/$target" "fuzz/corpus/$target"
    log="fuzz/target/$target.log"
    result=clean
    timeout --kill-after=10 $((seconds + 400)) cargo +nightly fuzz run --sanitizer none "$target" \
        "fuzz/target/corpus/$target" "fuzz/corpus/$target" -- "${limits[@]}" >"$log" 2>&1 || result="FAILED, see $log"
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
