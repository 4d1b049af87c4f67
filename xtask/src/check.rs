//! `cargo xtask test` and `cargo xtask lab`: everything that must hold, in order of cost.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use lab::runner::Tally;
use lab::{Failure, failed};

use crate::steps::{cargo, quietly, root, setup, watch};
use crate::{Outcome, build, fuzz, prepared};

/// Checks bans, licences and sources (deny.toml). Not a dependency: a program of its own.
const DENY: &str = "0.20.2";

/// What the lab runs: the tool, the lab's program that looks while a guest is held, and itself.
const LAB: [&str; 3] = ["stillframe", "stillframe-at-hold", "stillframe-lab"];

/// The bounded run of every fuzz target.
const FUZZ: fuzz::Args = fuzz::Args { seconds: 3, target: None };

/// Runs everything; the closing line counts checks, unit tests and lab tests together.
/// `false` when anything failed.
///
/// What is built is built side by side, while setup waits for packages. The lab has the machine for itself:
/// how long a guest is held is what it measures.
pub(crate) fn all() -> Outcome<bool> {
    let (mut tally, kit, binaries) = thread::scope(|scope| {
        let release = scope.spawn(|| build::release(&LAB).map_err(|e| e.to_string()));
        let checked = scope.spawn(lints);
        let kit = setup();
        let mut tally = kit.as_ref().map_or_else(|_| Tally::default(), programs);
        let lost = Tally { failed: 1, ..Tally::default() };
        tally.add(checked.join().unwrap_or(lost));
        let binaries = release.join().unwrap_or_else(|_| Err("the build panicked".to_owned()));
        (tally, kit, binaries)
    });
    kit?;
    let binaries = binaries?;
    tally.add(unit_tests(&["--workspace", "--no-fail-fast"])?);
    tally.add(on_a_prepared_host()?);
    check(&mut tally, "cargo xtask fuzz", || match fuzz::run(&FUZZ)? {
        true => Ok(()),
        false => Err("a fuzz target crashed".into()),
    });
    tally.add(lab(&binaries, false, &[])?);
    println!("{tally}");
    Ok(tally.failed == 0)
}

/// Format and lints; then the unit tests are built.
fn lints() -> Tally {
    let mut tally = Tally::default();
    check(&mut tally, "cargo fmt", || {
        quietly(cargo()?.args(["fmt", "--all", "--check"]))?;
        // A workspace of its own.
        quietly(cargo()?.current_dir(root()?.join("fuzz")).args(["fmt", "--check"]))
    });
    check(&mut tally, "cargo clippy", || {
        let lints = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
        quietly(cargo()?.args(lints))
    });
    check(&mut tally, "unit tests built", || {
        quietly(cargo()?.args(["test", "--workspace", "--locked", "--no-run"]))
    });
    tally
}

/// Licences; then the fuzz targets are built.
fn programs(kit: &lab::Kit) -> Tally {
    let mut tally = Tally::default();
    check(&mut tally, "cargo deny", || {
        let mut deny = Command::new(deny(kit)?);
        deny.current_dir(root()?).args(["--locked", "check", "bans", "licenses", "sources"]);
        quietly(&mut deny)
    });
    check(&mut tally, "fuzz targets built", || quietly(&mut fuzz::build_command()?));
    tally
}

/// Runs the lab alone.
pub(crate) fn lab_only(full: bool, names: &[String]) -> Outcome<bool> {
    setup()?;
    let tally = lab(&build::release(&LAB)?, full, names)?;
    println!("{tally}");
    Ok(tally.failed == 0)
}

fn check(tally: &mut Tally, name: &str, run: impl FnOnce() -> Outcome<()>) {
    let start = Instant::now();
    let outcome: Result<(), Failure> = run().map_err(failed);
    tally.record(name, &outcome, start.elapsed());
}

/// The tests that are ignored elsewhere, where the host can be prepared for them.
fn on_a_prepared_host() -> Outcome<Tally> {
    // Of the whole workspace, as they were built: for one package alone cargo builds them anew.
    let ignored = ["--workspace", "--", "--ignored", "--test-threads", "1"];
    let mut tally = Tally::default();
    match prepared::host() {
        Ok(_prepared) => {
            tally.add(unit_tests(&[&["--lib"][..], &ignored].concat())?);
            tally.add(unit_tests(&[&["--test", "libvirtd"][..], &ignored].concat())?);
        }
        Err(error) => println!("skipped: tests of huge pages, KSM and libvirtd: {error}"),
    }
    Ok(tally)
}

/// `cargo test` with these arguments, its `test result:` lines added up.
fn unit_tests(arguments: &[&str]) -> Outcome<Tally> {
    let start = Instant::now();
    let mut tally = Tally::default();
    let mut test = cargo()?;
    test.args(["test", "--locked"]).args(arguments);
    let good = watch(&mut test, |line| {
        if let Some(counts) = line.strip_prefix("test result: ") {
            tally.add(results(counts));
        }
        true
    })?;
    // A crate whose tests do not compile has no `test result:` line.
    if !good && tally.failed == 0 {
        tally.failed = 1;
    }
    println!("cargo test took {:.1} s", start.elapsed().as_secs_f64());
    Ok(tally)
}

/// `ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s`
fn results(counts: &str) -> Tally {
    let count = |what: &str| {
        let before = counts.split(['.', ';']).find_map(|part| part.trim().strip_suffix(what));
        before.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
    };
    Tally { passed: count("passed"), failed: count("failed"), skipped: count("ignored") }
}

/// Runs the lab's tests with the tool as it is released.
fn lab(binaries: &Path, full: bool, names: &[String]) -> Outcome<Tally> {
    let start = Instant::now();
    let mut command = Command::new(binaries.join("stillframe-lab"));
    command.env("STILLFRAME_TOOL", binaries.join("stillframe"));
    command.args(full.then_some("--full")).args(names);
    let mut closing = None;
    // Its closing line is not passed on: it is not this program's.
    let good = watch(&mut command, |line| {
        closing = Tally::parse(line);
        closing.is_none()
    })?;
    println!("the lab took {:.1} s", start.elapsed().as_secs_f64());
    match closing {
        Some(tally) if good == (tally.failed == 0) => Ok(tally),
        _ => Err("the lab did not end with its closing line".into()),
    }
}

/// The program `cargo-deny`: a machine's own, else one built into the lab's cache, once.
fn deny(kit: &lab::Kit) -> Outcome<PathBuf> {
    let own = kit.root().join(format!("cargo-deny-{DENY}"));
    let binary = own.join("bin/cargo-deny");
    if !binary.exists() {
        // Unoptimised and without what only advisories need: a minute instead of many.
        let mut install = cargo()?;
        install.args(["install", "cargo-deny", "--version", DENY, "--locked", "--debug"]);
        install.args(["--no-default-features", "--root"]).arg(&own);
        install.env("CARGO_PROFILE_DEV_DEBUG", "0").env("CARGO_TARGET_DIR", own.join("target"));
        install.env_remove("RUSTFLAGS");
        quietly(&mut install)?;
        std::fs::remove_dir_all(own.join("target"))?;
    }
    Ok(binary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargos_counts_are_read() {
        let line =
            "FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 9 filtered out; finished in 1.5s";
        assert_eq!(results(line), Tally { passed: 3, failed: 1, skipped: 2 });
        assert_eq!(results("ok. 12 passed; 0 failed; 0 ignored").passed, 12);
    }
}
