//! QEMU's own dump.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::dump::dump(data));
