# Sourced by the scripts that need a nightly compiler.

# nightly COMPONENT...: there is one afterwards, with these. One that is there is not replaced by a newer one, which could lack some.
nightly() {
    rustup run nightly rustc --version >/dev/null 2>&1 || rustup toolchain install nightly --profile minimal
    rustup component add --toolchain nightly "$@"
}
