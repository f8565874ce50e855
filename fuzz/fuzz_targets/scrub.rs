//! `scrub` and `scrub_raw` on memory of all kinds: see `vm_scrub_tests::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vm_scrub_tests::fuzz::scrub(data));
