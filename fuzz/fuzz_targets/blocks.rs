//! Block records, as a compressed file and as its lines.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::record::blocks(data));
