//! Journals, raw and with their chain put right.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::record::journal(data));
