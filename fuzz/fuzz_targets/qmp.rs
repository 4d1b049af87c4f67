//! A QMP peer that says anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::qmp::talk(data));
