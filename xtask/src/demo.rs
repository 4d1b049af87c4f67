//! `cargo xtask demo`: the README's first command, from nothing to two images of a running guest
//! and a process list read from one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lab::runner::Finished;
use lab::{CANARY, Lab, Machine};

use crate::steps::{ok, setup};
use crate::{Outcome, build};

/// Boots, acquires, verifies, analyses; the exhibit stays, its path is the last line of stdout.
pub(crate) fn run() -> Outcome<()> {
    let kit = setup()?;
    let binary = build::release(&["stillframe"])?.join("stillframe");
    let exhibits = build::target()?.join("demo");
    fs::create_dir_all(&exhibits)?;
    eprintln!("demo: booting a guest");
    let lab = Lab::open().map_err(text)?;
    let guest = lab.guest().machine(Machine::Q35).memory_mib(512).name("demo").boot();
    let guest = guest.map_err(text)?;
    // One instant, then one that the guest is not held for.
    let mut exhibit = PathBuf::new();
    for how in [["--method", "freeze", "--stall-budget", "900ms"].as_slice(), &["--method", "live"]]
    {
        let mut acquire = Command::new(&binary);
        acquire.args(["acquire", &guest.pid().to_string()]).args(how).arg("-o").arg(&exhibits);
        ok(&mut acquire)?;
        exhibit = newest(&exhibits)?;
        ok(Command::new(&binary).arg("verify").arg(&exhibit))?;
    }
    guest.finish().map_err(text)?;
    let processes = processes(&kit, &exhibit.join("memory.elf"), lab.scratch())?;
    print!("{processes}");
    if !processes.contains(CANARY) {
        return Err(format!("{CANARY}, which the lab planted, is not in the image").into());
    }
    eprintln!("demo: {CANARY} is the process that the lab planted");
    println!("{}", exhibit.display());
    Ok(())
}

/// Volatility's `linux.pslist` of an image, with symbols that pakunoda makes from it.
pub(crate) fn processes(kit: &lab::Kit, image: &Path, scratch: &Path) -> Outcome<String> {
    let (symbols, cache) = (scratch.join("symbols"), scratch.join("cache"));
    for directory in [&symbols, &cache] {
        fs::create_dir_all(directory)?;
    }
    let mut pakunoda = Command::new(kit.python("pakunoda"));
    pakunoda.arg("extract").arg(image).arg("-o").arg(symbols.join("guest.json"));
    tool(pakunoda)?;
    let mut vol = Command::new(kit.python("vol"));
    vol.args(["-q", "--offline", "--cache-path"]).arg(cache).arg("-s").arg(&symbols);
    vol.arg("-f").arg(image).arg("linux.pslist");
    Ok(tool(vol)?.stdout)
}

fn tool(command: Command) -> Outcome<Finished> {
    let patience = std::time::Duration::from_secs(300);
    let finished = lab::runner::finish(command, patience).and_then(|f| f.expect_code(0));
    let finished = finished.map_err(text)?;
    eprintln!("demo: `{}` took {:.1} s", finished.line, finished.took.as_secs_f64());
    Ok(finished)
}

/// The exhibit made last.
fn newest(exhibits: &Path) -> Outcome<PathBuf> {
    let entries = fs::read_dir(exhibits)?.flatten();
    let made = entries.filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry)));
    let last = made.max_by_key(|(time, _)| *time);
    Ok(last.ok_or("no exhibit was made")?.1.path())
}

fn text(failure: lab::Failure) -> String {
    failure.to_string()
}
