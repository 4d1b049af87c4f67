//! Changes to exhibits that `verify` must see.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::verify::edits(data));
