//! What is found out about the processor, against what the kernel has found out about it.

use crate::arch::x86_64::{avx2, avx512, clzero, has_clflushopt, prefetchw, rep_stosb, sse2};

#[test]
fn loops_are_available_where_the_kernel_says_so() {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let line = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).unwrap().1
    };
    let has = |flag| line("flags").split(' ').any(|other| other == flag);
    let has_short_lines = line("clflush size") == "64";

    for (what, is_available, expected) in [
        ("sse2", sse2::Verify::is_available(), true),
        ("avx2-stream", avx2::Stream::is_available(), has("avx2")),
        ("avx2", avx2::Verify::is_available(), has("avx2")),
        (
            "avx512-stream",
            avx512::Stream::is_available(),
            has("avx512f"),
        ),
        ("avx512", avx512::Verify::is_available(), has("avx512f")),
        (
            "clzero",
            clzero::Zero::is_available(),
            has("clzero") && has_short_lines,
        ),
        (
            "prefetchw",
            prefetchw::Zero::is_available(),
            // On AMD's processors the kernel goes by their age, also where an emulator takes the bit away.
            has("3dnowprefetch")
                && has("avx2")
                && (line("vendor_id") != "AuthenticAMD" || prefetchw::Zero::is_available()),
        ),
        ("rep-stosb", rep_stosb::Zero::is_available(), true),
        (
            "fast rep-stosb",
            rep_stosb::Zero::is_fast(),
            has("erms") || has("fsrm"),
        ),
        ("clflushopt", has_clflushopt(), has("clflushopt")),
    ] {
        assert_eq!(is_available, expected, "{what}");
    }
}
