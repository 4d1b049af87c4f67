//! A libvirt that says anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::libvirt::talk(data));
