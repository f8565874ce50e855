# Sourced by the scripts that build for musl: what is linked statically runs in an emulated machine that has nothing else.

target=x86_64-unknown-linux-musl
# The same packages everywhere: which are chosen decides the features of what they depend on, and so what is built twice.
emulated=(--profile emulated --target "$target" -p vm-scrub -p vm-scrub-vmm -p vm-scrub-tests)
