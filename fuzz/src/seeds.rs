//! Writes the inputs that each target begins with: `seeds DIR` makes `DIR/TARGET/seed-N`.
#![forbid(unsafe_code)]

// The counters that the crates are built with call into the fuzzer's library.
extern crate libfuzzer_sys as _;

use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let root = PathBuf::from(std::env::args_os().nth(1).expect("usage: seeds DIR"));
    for (target, seeds) in fuzz::SEEDS {
        let directory = root.join(target);
        std::fs::create_dir_all(&directory)?;
        for (number, seed) in seeds().into_iter().enumerate() {
            std::fs::write(directory.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
