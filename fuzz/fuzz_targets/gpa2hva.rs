//! The answer of `gpa2hva`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::monitor::gpa2hva(data));
