#!/usr/bin/env bash
# Runs the tests of the library and of its KVM guests on other kernels, in machines that QEMU emulates: AMD processors with
# SVM, once with nested paging and once with shadow paging. So a real kvm_amd is tested, whatever this host's KVM is, and the
# ways round what older kernels do not have. Ends with a table; is a failure if a test failed, or a machine did not boot.
#
# usage: scripts/test-in-qemu.sh [--brief | --ci] [KERNEL...]
#
# A kernel is a series of which Debian has packages; 6.1 and 6.12 if none is named. --brief leaves out the programs that take many
# minutes in an emulator; --ci runs what scripts/lib/qemu-ci lists, on the kernels that are in it. VM_SCRUB_QEMU_TESTS may hold a
# pattern: only programs whose names match are run. Needs no KVM, no root, and on the first run a network.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/lib/debian.sh
source scripts/lib/emulated.sh

# Seconds: for one test program, and for all that a machine does.
program_limit=1800
machine_limit=5400
# Walks over everything and random sequences, which do again and again what shorter tests do once, and guests by the hundred.
long='^(faults|faults_in_pairs|faults_with_options|shared_faults|shared_killed|concurrent|corpora|model|limits|kvm_racing|kvm_thousand_leases|kvm_generations|kvm_layouts)$'
left_out=
list=
kernels=(6.1 6.12)
case ${1-} in
    --brief)
        shift
        left_out=$long
        program_limit=240
        machine_limit=1800
        ;;
    --ci)
        shift
        list=scripts/lib/qemu-ci
        [[ -r $list ]] || die "$list is missing"
        ! grep -nvE '^(#.*||[a-z_0-9]+( [0-9]+\.[0-9]+-(nested|shadow))+)$' "$list" || die "$list: not a program and its machines"
        program_limit=150
        machine_limit=300
        mapfile -t kernels < <(grep -v '^#' "$list" | grep -oE '[0-9.]+-(nested|shadow)' | sed 's/-.*//' | sort -uV)
        ;;
esac
[[ ! "$*" =~ (^|\ )- ]] || die "usage: ${0##*/} [--brief | --ci] [KERNEL...]"
[[ $# -eq 0 ]] || kernels=("$@")
pagings=(nested shadow)
out=target/qemu

unpack qemu qemu-system-x86 busybox-static
for kernel in "${kernels[@]}"; do
    unpack_kernel "$kernel"
done
rust_target "$target"

# What to build of the tests: all, or what is in the list, in which the unit tests of a crate have its name.
wanted=(--lib '--test=*')
if [[ $list ]]; then
    mapfile -t wanted < <(sed -nE 's/^vm_scrub.*/--lib/p; s/^([a-z_0-9]+) .*/--test=\1/p' "$list" | sort -u)
fi

printf '\n== building the tests for %s\n' "$target"
rm -rf "$out"
mkdir -p "$out"
cargo test --locked --no-run "${emulated[@]}" "${wanted[@]}" 2>&1 | tee "$out/build.log"
declare -A programs
while read -r path; do
    name=${path##*/}
    programs[${name%-*}]=$path
done < <(sed -n 's/^ *Executable .*(\(.*\))$/\1/p' "$out/build.log")
mapfile -t all < <(printf '%s\n' "${!programs[@]}" | grep -E "${VM_SCRUB_QEMU_TESTS:-.}" | sort)
[[ ${#all[@]} -gt 0 ]] || die "no test program has such a name"

# tests_of KERNEL PAGING: which of them run in a machine. How KVM pages makes a difference to those with guests only.
tests_of() {
    if [[ $list ]]; then
        printf '%s\n' "${all[@]}" | awk -v machine="$1-$2" '
            NR == FNR { if ($0 !~ /^#/) for (i = 2; i <= NF; i++) if ($i == machine) here[$1]; next }
            $1 in here' "$list" -
        return
    fi
    case $2 in
        nested) printf '%s\n' "${all[@]}" ;;
        shadow) printf '%s\n' "${all[@]}" | sed -nE '/^(kvm_|vm_scrub_vmm$|guest_memory$|losing_memory$)/p' ;;
    esac
}

# initramfs KERNEL PAGING: everything that the machine has, packed.
initramfs() {
    local dir=$out/$1-$2 busybox=$cache/qemu/bin/busybox name module
    mkdir -p "$dir"/{tests,modules}
    cp scripts/lib/qemu-init "$dir/init"
    chmod +x "$dir/init"
    cp "$busybox" "$dir/busybox"
    echo "limit=$program_limit" >"$dir/limits"
    tests_of "$1" "$2" >"$dir.tests"
    sed -E "/${left_out:-^$}/d" "$dir.tests" >"$dir/order"
    while read -r name; do
        cp "${programs[$name]}" "$dir/tests/$name"
    done <"$dir/order"
    for module in irqbypass kvm kvm-amd brd; do
        module=$(find "$cache/linux-$1" -name "$module.ko*")
        case $module in
            *.xz) "$busybox" xzcat "$module" >"$dir/modules/$(basename "$module" .xz)" ;;
            *) cp "$module" "$dir/modules" ;;
        esac
    done
    (cd "$dir" && find . | "$busybox" cpio -o -H newc 2>/dev/null) | gzip -1 >"$dir.img"
    rm -r "$dir"
}

# boot KERNEL PAGING: what the console shows lies in a file afterwards. Takes the place of the shell.
boot() {
    local root=$cache/qemu cpu=EPYC,+svm
    [[ $2 == nested ]] || cpu+=,-npt
    export LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu
    # One thread for both processors: with two, QEMU 7.2 crashes the kernel in half of the boots.
    exec timeout --kill-after=10 "$machine_limit" "$root/usr/bin/qemu-system-x86_64" \
        -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" \
        -machine q35 -accel tcg,thread=single -cpu "$cpu" -smp 2 -m 4G -nodefaults -display none -serial stdio -no-reboot \
        -kernel "$cache/linux-$1"/boot/vmlinuz-* -initrd "$out/$1-$2.img" \
        -append 'console=ttyS0 panic=-1 quiet' </dev/null >"$out/$1-$2.log" 2>&1
}

machines=()
for kernel in "${kernels[@]}"; do
    for paging in "${pagings[@]}"; do
        [[ $(tests_of "$kernel" "$paging") ]] || continue
        machines+=("$kernel-$paging")
        initramfs "$kernel" "$paging"
    done
done
[[ ${#machines[@]} -gt 0 ]] || die "nothing to run on these kernels"
printf '\n== running %s, for at most %s s each; the consoles are in %s\n' "${machines[*]}" "$machine_limit" "$out"
# As many at a time as there are processors, and none is left behind.
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT
for machine in "${machines[@]}"; do
    while [[ $(jobs -rp | wc -l) -ge $(nproc) ]]; do
        wait -n || true
    done
    boot "${machine%-*}" "${machine##*-}" &
done
wait

awk -v left_out="$left_out" -f scripts/lib/qemu-table.awk "${machines[@]/#/$out/}"
