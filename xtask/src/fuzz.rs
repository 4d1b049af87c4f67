//! `cargo xtask fuzz`: every parser of hostile bytes under LLVM's fuzzer, for a bounded time.
//!
//! The targets are built by the stable compiler with the coverage counters that `cargo fuzz` would
//! ask a nightly one for. What they found interesting is kept in `fuzz/corpus`, an input that
//! crashes one in `fuzz/artifacts`; both are ignored by git. A crash that was mended belongs into
//! `fuzz/seeds/TARGET/`, and is run first from then on.

use std::fs;
use std::io::{BufRead, BufReader};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;

use crate::Outcome;
use crate::build::target;
use crate::steps::{cargo, ok, root};

/// Named to cargo, so that the flags reach neither build scripts nor macros.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Counters on every edge, where they lie, and the operands of comparisons.
const FLAGS: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];

/// Greatest length of an input in bytes.
const MAX_LEN: u64 = 16 * 1024;

/// Options for every target: memory in MiB, seconds for one input.
const LIMITS: [&str; 3] = ["-rss_limit_mb=512", "-timeout=20", "-print_final_stats=1"];

/// Options for one target, in place of [`MAX_LEN`]: 16 edits of 8 bytes, tried from the start.
const OWN: [(&str, &[&str]); 1] = [("verify", &["-max_len=130", "-len_control=0"])];

/// Real texts that a target begins with: files of this name under a directory in [`RECORDED`].
const GOLDEN: [(&str, &str, &str); 4] = [
    ("graph", "graphs", "graph.txt"),
    ("mtree", "golden", "info-mtree-f.txt"),
    ("mtree", "golden", "info-mtree-f-o.txt"),
    ("ramblock", "golden", "x-query-ramblock.txt"),
];

const RECORDED: &str = "crates/qemu/tests";

/// Lines of a crash that are shown.
const SHOWN: usize = 60;

/// What `cargo xtask fuzz` is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seconds for each target
    #[arg(long, default_value_t = 8)]
    pub(crate) seconds: u32,
    /// One target instead of all
    pub(crate) target: Option<String>,
}

/// Builds the targets and runs them, as many at a time as there are cores; `false` when one crashed.
pub(crate) fn run(args: &Args) -> Outcome<bool> {
    let fuzz = root()?.join("fuzz");
    let mut names = targets(&fuzz)?;
    if let Some(wanted) = &args.target {
        if !names.contains(wanted) {
            return Err(format!("no target {wanted:?}; there are {}", names.join(", ")).into());
        }
        names.retain(|name| name == wanted);
    }
    let binaries = build()?;
    ok(Command::new(binaries.join("seeds")).arg(fuzz.join("corpus")))?;
    let cores = thread::available_parallelism().map_or(1, NonZero::get);
    let mut crashed = Vec::new();
    for side_by_side in names.chunks(cores) {
        let runs: Vec<Result<Run, String>> = thread::scope(|scope| {
            let start = |name: &String| {
                let name = name.clone();
                let (fuzz, binaries) = (&fuzz, &binaries);
                scope.spawn(move || {
                    one(fuzz, binaries, &name, args.seconds).map_err(|e| e.to_string())
                })
            };
            let started: Vec<_> = side_by_side.iter().map(start).collect();
            let ended = started.into_iter().map(|run| {
                run.join()
                    .unwrap_or_else(|_| Err("the thread that ran a target panicked".to_owned()))
            });
            ended.collect()
        });
        for (name, run) in side_by_side.iter().zip(runs) {
            let run = run?;
            let verdict = if run.status.success() { "ok" } else { "CRASHED" };
            let (runs, edges) = (run.runs, run.edges);
            println!("fuzz {name:9} {runs:>9} runs {edges:>6} edges covered  {verdict}");
            if !run.status.success() {
                explain(&fuzz, &binaries, name, &run);
                crashed.push(name.as_str());
            }
        }
    }
    if !crashed.is_empty() {
        println!("fuzz: crashed: {}", crashed.join(", "));
    }
    Ok(crashed.is_empty())
}

/// The names of the targets: those of the files in `fuzz_targets`.
fn targets(fuzz: &Path) -> Outcome<Vec<String>> {
    let mut names: Vec<String> = files(&fuzz.join("fuzz_targets"))?
        .iter()
        .filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// Builds all targets; returns the directory that they are in.
fn build() -> Outcome<PathBuf> {
    ok(&mut build_command()?)?;
    Ok(directory()?.join(TRIPLE).join("release"))
}

/// The command that builds all targets.
pub(crate) fn build_command() -> Outcome<Command> {
    let mut build = cargo()?;
    build.current_dir(root()?.join("fuzz")).env("RUSTFLAGS", FLAGS.join(" "));
    build.args(["build", "--release", "--locked", "--target", TRIPLE, "--target-dir"]);
    build.arg(directory()?);
    Ok(build)
}

fn directory() -> Outcome<PathBuf> {
    Ok(target()?.join("fuzz"))
}

/// How a target's run went.
struct Run {
    status: ExitStatus,
    runs: u64,
    edges: u64,
    /// What it said, without its progress.
    said: Vec<String>,
}

/// Runs a target for some seconds.
fn one(fuzz: &Path, binaries: &Path, name: &str, seconds: u32) -> Outcome<Run> {
    let artifacts = fuzz.join("artifacts").join(name);
    fs::create_dir_all(&artifacts)?;
    let mut command = Command::new(binaries.join(name));
    command.arg(fuzz.join("corpus").join(name));
    let mended = fuzz.join("seeds").join(name);
    command.args(mended.is_dir().then_some(mended));
    command.args(LIMITS).arg(format!("-max_total_time={seconds}"));
    match OWN.iter().find(|(target, _)| *target == name) {
        Some((_, own)) => command.args(*own),
        None => command.arg(format!("-max_len={MAX_LEN}")),
    };
    let golden = golden(name)?;
    command.args((!golden.is_empty()).then(|| format!("-seed_inputs={}", golden.join(","))));
    // The fuzzer appends a name to the prefix: it ends with a slash.
    command.arg(format!("-artifact_prefix={}/", artifacts.display()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|e| format!("starting {name}: {e}"))?;
    let (mut runs, mut edges, mut said) = (0, 0, Vec::new());
    let stderr = child.stderr.take().ok_or("no pipe to the fuzzer")?;
    for line in BufReader::new(stderr).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        match progress(&line) {
            Some((number, covered)) => (runs, edges) = (number, covered),
            None => said.push(line),
        }
    }
    Ok(Run { status: child.wait()?, runs, edges, said })
}

/// `#1234  NEW    cov: 56 ft: 78 ...`: inputs run and edges covered.
fn progress(line: &str) -> Option<(u64, u64)> {
    let mut words = line.strip_prefix('#')?.split_whitespace();
    let runs = words.next()?.parse().ok()?;
    let covered = words.skip_while(|word| *word != "cov:").nth(1)?;
    Some((runs, covered.parse().ok()?))
}

/// The real texts that `name` begins with, as far as they are short enough to be changed.
fn golden(name: &str) -> Outcome<Vec<String>> {
    let mut found = Vec::new();
    for (_, what, file) in GOLDEN.iter().filter(|(target, ..)| *target == name) {
        for version in directories(&root()?.join(RECORDED).join(what))? {
            for machine in files(&version)? {
                let text = machine.join(file);
                if fs::metadata(&text)?.len() <= MAX_LEN {
                    found.push(text.display().to_string());
                }
            }
        }
    }
    Ok(found)
}

/// The entries of a directory.
fn files(directory: &Path) -> Outcome<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).map_err(|e| format!("{}: {e}", directory.display()))?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// The directories among them.
fn directories(directory: &Path) -> Outcome<Vec<PathBuf>> {
    Ok(files(directory)?.into_iter().filter(|path| path.is_dir()).collect())
}

/// What a crashed target said, and how to see it again.
fn explain(fuzz: &Path, binaries: &Path, name: &str, run: &Run) {
    let from = run.said.iter().position(|line| line.contains("panicked at")).unwrap_or(0);
    run.said.iter().skip(from).take(SHOWN).for_each(|line| println!("  {line}"));
    let written = run.said.iter().find_map(|line| line.split_once("Test unit written to "));
    match written {
        Some((_, input)) => {
            println!("  to see it again: {} {input}", binaries.join(name).display());
            let seeds = fuzz.join("seeds").join(name);
            println!("  once it is mended: keep the input in {}", seeds.display());
        }
        None => println!("  {name} ended with {} and left no input", run.status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read() {
        let line = "#1234\tNEW    cov: 56 ft: 78 corp: 9/1Kb lim: 4 exec/s: 0 rss: 28Mb";
        assert_eq!(progress(line), Some((1234, 56)));
        assert_eq!(progress("#3\tINITED exec/s: 0"), None);
        assert_eq!(progress("stat::peak_rss_mb: 28"), None);
    }

    #[test]
    fn each_target_is_built() {
        let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let cargo = fs::read_to_string(fuzz.join("Cargo.toml")).unwrap();
        let names = targets(&fuzz).unwrap();
        for name in &names {
            let path = format!("path = \"fuzz_targets/{name}.rs\"");
            assert!(cargo.contains(&path), "{name} is not in fuzz/Cargo.toml");
        }
        assert!(cargo.matches("path = \"fuzz_targets/").count() == names.len());
        let known = OWN.iter().map(|(name, _)| *name).chain(GOLDEN.iter().map(|(name, ..)| *name));
        for name in known {
            assert!(names.iter().any(|target| target == name), "there is no target {name}");
        }
    }
}
