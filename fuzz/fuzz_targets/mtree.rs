//! The text of `info mtree -f`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::monitor::mtree(data));
