#!/usr/bin/env bash
# Runs every benchmark and keeps the results in benches/results/<date>-<cpu>/, or in the directory that is named:
# raw JSON, the page with the plots, Markdown, CSV, one plot as SVG, how soon background scrubbing makes way, and what the host was
# like. Options of `vm-scrub bench` may follow.
#
# usage: scripts/bench.sh [DIR [OPTION...]]
set -euo pipefail
cd "$(dirname "$0")/.."

cpu=$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1)
cpu=${cpu:-$(uname -m)}
slug=$(printf '%s' "$cpu" | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]' '-' | sed 's/^-//; s/-$//')
dir=${1:-benches/results/$(date -u +%Y-%m-%d)-$slug}
shift || true

# What a file says, or that there is none.
fact() {
    printf '%s: %s\n' "$1" "$(cat "$1" 2>/dev/null || echo none)"
}

# Before anything is written: the results are in the repository.
commit=$(git describe --always --dirty 2>/dev/null || echo 'of an unknown commit')
cargo build --locked --release -p vm-scrub-cli
mkdir -p "$dir"
{
    date -u +%Y-%m-%dT%H:%M:%SZ
    echo "vm-scrub $commit"
    uname -srm
    rustc --version
    lscpu 2>/dev/null || cat /proc/cpuinfo
    grep -E '^(MemTotal|MemAvailable|SwapTotal|HugePages_|Hugepagesize)' /proc/meminfo
    for file in enabled defrag shmem_enabled use_zero_page; do
        fact "/sys/kernel/mm/transparent_hugepage/$file"
    done
    fact /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor
    fact /sys/devices/system/cpu/smt/active
    fact /proc/sys/kernel/numa_balancing
    fact /proc/loadavg
} >"$dir/setup.txt"

# What was measured is kept, also if some of it could not be.
status=0
target/release/vm-scrub bench all \
    --export-json "$dir/results.json" --export-html "$dir/results.html" \
    --export-markdown "$dir/results.md" --export-csv "$dir/results.csv" \
    --export-svg "$dir/turnaround.svg" "$@" || status=$?
# How soon background scrubbing makes way: of the library alone, so criterion measures it.
cargo bench --locked -p vm-scrub-benches --bench interruption -- --warm-up-time 1 --measurement-time 3 >"$dir/interruption.txt" ||
    status=$?
printf '\nkept in %s\n' "$dir"
exit "$status"
