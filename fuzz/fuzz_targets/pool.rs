//! Pools with every knob at random, and what happens to them: see `vm_scrub_tests::fuzz`.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vm_scrub_tests::fuzz::pool(data));
