//! A memory map, and images of it in every format.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::image::map(data));
