//! The static binaries: what is released is exactly what the lab runs.

use std::fs;
use std::path::PathBuf;

use crate::Outcome;
use crate::steps::{cargo, ok, root};

/// glibc is linked in: musl's memcmp is slow, and the lab compares gigabytes.
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// ELF program header type of the dynamic loader's path (gABI, chapter 5).
const PT_INTERP: u32 = 3;

/// Builds packages as release and static; returns the directory with their binaries.
pub(crate) fn release(packages: &[&str]) -> Outcome<PathBuf> {
    let mut build = cargo()?;
    build.env("RUSTFLAGS", "-Ctarget-feature=+crt-static");
    build.args(["build", "--release", "--locked", "--target", TARGET]);
    for package in packages {
        build.args(["-p", package]);
    }
    ok(&mut build)?;
    let directory = target()?.join(TARGET).join("release");
    for package in packages {
        let binary = directory.join(package);
        let bytes = fs::read(&binary).map_err(|e| format!("{}: {e}", binary.display()))?;
        match interpreter(&bytes) {
            Some(false) => {}
            Some(true) => return Err(format!("{} is not static", binary.display()).into()),
            None => return Err(format!("{} is not a 64-bit ELF file", binary.display()).into()),
        }
    }
    Ok(directory)
}

/// Cargo's target directory.
pub(crate) fn target() -> Outcome<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => Ok(root()?.join(dir)),
        None => Ok(root()?.join("target")),
    }
}

/// Whether a little-endian 64-bit ELF file names a dynamic loader; `None` if it is no such file.
fn interpreter(elf: &[u8]) -> Option<bool> {
    if elf.get(..6)? != b"\x7fELF\x02\x01" {
        return None;
    }
    let u16_at = |at: usize| Some(u16::from_le_bytes(elf.get(at..at + 2)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_le_bytes(elf.get(at..at + 4)?.try_into().ok()?));
    let table = usize::try_from(u64::from_le_bytes(elf.get(32..40)?.try_into().ok()?)).ok()?;
    let (size, count) = (usize::from(u16_at(54)?), usize::from(u16_at(56)?));
    for index in 0..count {
        if u32_at(table.checked_add(index * size)?)? == PT_INTERP {
            return Some(true);
        }
    }
    Some(false)
}

#[cfg(test)]
mod tests {
    use super::interpreter;

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        let mut elf = vec![0u8; 64 + 56];
        elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
        (elf[32], elf[54], elf[56]) = (64, 56, 1);
        elf[64] = 1; // PT_LOAD
        assert_eq!(interpreter(&elf), Some(false));
        elf[64] = 3;
        assert_eq!(interpreter(&elf), Some(true));
        assert_eq!(interpreter(&elf[..100]), Some(true), "only the header's first word is needed");
        assert_eq!(interpreter(&elf[..64]), None);
        assert_eq!(interpreter(b"#!/bin/sh"), None);
    }
}
