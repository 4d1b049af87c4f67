//! ELF core files.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::image::elf(data));
