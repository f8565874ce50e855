# Sourced by the scripts that need an emulator, a cross compiler or a kernel: Debian packages, downloaded and unpacked into a
# cache directory. Nothing is installed, so root is not needed, and nothing is removed from the machine either: Debian 12's
# QEMU would take a newer qemu-utils away. To have newer packages, remove the cache.

cache=${XDG_CACHE_HOME:-${HOME:?}/.cache}/vm-scrub

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Where apt takes packages from: as this machine says, with lists of our own. Its lists may be old, missing, or another user's.
apt_from=(-o "Dir::State::lists=$cache/apt/lists")

apt() {
    local tool=$1
    shift
    timeout --kill-after=10 300 "$tool" -q \
        -o Debug::NoLocking=1 \
        -o Dir::Cache="$cache/apt" \
        -o APT::Sandbox::User= \
        "${apt_from[@]}" "$@"
}

# Takes the lock on the cache and reads the lists of packages, once.
apt_ready() {
    [[ -z ${apt_is_ready-} ]] || return 0
    command -v apt-get >/dev/null || die "needs Debian's apt-get to fetch packages"
    mkdir -p "$cache"/apt/{lists,archives}/partial
    exec {apt_lock}>"$cache/apt/lock"
    flock --timeout 600 "$apt_lock" || die "another run has been fetching packages for ten minutes"
    # What cannot be had is only a warning here: it may be another party's. If it was Debian's, there is nothing to fetch.
    apt apt-get update >&2 || die "the lists of packages cannot be fetched"
    apt_is_ready=1
}

# Whether $cache/NAME has been made of these words. A directory gets its name when it is complete.
is_cached() {
    [[ $(cat "$cache/$1/.made-of" 2>/dev/null) == "${*:2}" ]]
}

# unpack_archives NAME WORD...: makes $cache/NAME of the archives in $cache/apt/NAME.
unpack_archives() {
    local name=$1 archive
    shift
    rm -rf "${cache:?}/$name" "$cache/$name.new"
    mkdir -p "$cache/$name.new"
    for archive in "$cache/apt/$name"/*.deb; do
        dpkg -x "$archive" "$cache/$name.new"
    done
    rm -r "$cache/apt/$name"
    printf '%s\n' "$*" >"$cache/$name.new/.made-of"
    mv "$cache/$name.new" "$cache/$name"
}

# unpack NAME PACKAGE...: $cache/NAME holds the packages afterwards, and what they depend on that this machine lacks.
unpack() {
    local name=$1
    shift
    ! is_cached "$name" "$@" || return 0
    apt_ready
    mkdir -p "$cache/apt/$name/partial"
    # Downloads only. The packages that are named are fetched even if the machine has them.
    apt apt-get -y --download-only --reinstall --no-install-recommends -o Dir::Cache::archives="$cache/apt/$name" \
        install "$@" >&2 || die "cannot be fetched, is there a network: $*"
    unpack_archives "$name" "$@"
}

# The newest kernel of a series that there is, in the flavour for virtual machines.
newest_kernel() {
    apt apt-cache pkgnames "linux-image-$1." | sed -nE '/^linux-image-[0-9][^-]*(-[0-9]+)?-cloud-amd64$/p' | sort -V | tail -n 1
}

# Turns to the release before Debian 12, from where this machine has its own.
use_release_before() {
    local dir=$cache/apt/before file
    mkdir -p "$dir"/{lists/partial,sources}
    for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.{list,sources}; do
        if [[ -f $file ]]; then
            sed 's/bookworm/bullseye/g' "$file" >"$dir/sources/${file##*/}"
        fi
    done
    apt_from=(-o "Dir::State::lists=$dir/lists" -o Dir::Etc::sourcelist=/dev/null -o "Dir::Etc::sourceparts=$dir/sources")
    apt apt-get update >&2
}

# unpack_kernel SERIES: $cache/linux-SERIES holds its newest kernel afterwards. What its package depends on is for booting from a
# disk. Debian 12 has 6.1 and 6.12; 5.10 is of the release before.
unpack_kernel() {
    local name=linux-$1 package apt_from=("${apt_from[@]}")
    ! is_cached "$name" "$1" || return 0
    apt_ready
    package=$(newest_kernel "$1")
    if [[ ! $package ]]; then
        use_release_before
        package=$(newest_kernel "$1")
    fi
    [[ $package ]] || die "no package has a kernel $1; is there a network, and is this Debian 12?"
    rm -rf "$cache/apt/$name"
    mkdir -p "$cache/apt/$name"
    (cd "$cache/apt/$name" && apt apt-get download "$package" >&2) || die "cannot be fetched, is there a network: $package"
    unpack_archives "$name" "$1"
}

# rust_target TRIPLE: the standard library for it is there afterwards.
rust_target() {
    [[ -d $(rustc --print target-libdir --target "$1") ]] && return
    timeout --kill-after=10 300 rustup target add "$1" >&2 || die "no standard library for $1: rustup target add $1"
}

# The compiler, the linker and the emulator for aarch64 are in PATH afterwards, and cargo knows them.
aarch64_compiler() {
    unpack aarch64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user-static
    local root=$cache/aarch64
    export PATH=$root/usr/bin:$PATH
    export LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
    # The C library is not where its own script for the linker says.
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS="-C link-arg=--sysroot=$root"
    export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER=qemu-aarch64-static
    export QEMU_LD_PREFIX=$root/usr/aarch64-linux-gnu
}
