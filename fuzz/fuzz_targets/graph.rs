//! The text of `info mtree -o -D`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::monitor::graph(data));
