//! QEMU's command line.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::process::cmdline(data));
