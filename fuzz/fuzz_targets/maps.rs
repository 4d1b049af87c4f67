//! `/proc/PID/maps` and `smaps`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::process::maps(data));
