//! The text of `x-query-ramblock`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::monitor::ramblock(data));
