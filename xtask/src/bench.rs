//! `cargo xtask bench`: figures of one run on one machine, kept with the machine's name.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::steps::{ok, root, setup};
use crate::{Outcome, build};

/// Runs the bench and keeps its raw figures under `bench/runs/DATE-HOST/`.
pub(crate) fn run(runs: u32) -> Outcome<()> {
    setup()?;
    let binaries = build::release(&["stillframe", "stillframe-lab"])?;
    let dir = directory()?;
    fs::create_dir_all(&dir)?;
    let mut bench = Command::new(binaries.join("stillframe-bench"));
    bench.env("STILLFRAME_TOOL", binaries.join("stillframe"));
    ok(bench.arg(dir.join("live.json")).arg(runs.to_string()))?;
    eprintln!("bench: raw figures in {}", dir.display());
    Ok(())
}

/// `bench/runs/2026-11-23-HOST`.
fn directory() -> Outcome<PathBuf> {
    let date = Command::new("date").args(["-u", "+%Y-%m-%d"]).output()?;
    let host = fs::read_to_string("/proc/sys/kernel/hostname")?;
    let name = format!("{}-{}", String::from_utf8(date.stdout)?.trim(), host.trim());
    Ok(root()?.join("bench").join("runs").join(name))
}
