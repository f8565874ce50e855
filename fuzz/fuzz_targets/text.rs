//! Layouts, and what the kernel writes into files: see `vm_scrub_tests::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vm_scrub_tests::fuzz::text(data));
