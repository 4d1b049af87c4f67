//! Running other programs: a line before, a line after, their output passed on.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use lab::Kit;

use crate::Outcome;

/// Where the workspace lies. Cargo says it at run time, so that the binary may be moved.
pub(crate) fn root() -> Outcome<PathBuf> {
    let own = std::env::var_os("CARGO_MANIFEST_DIR").ok_or("run this as `cargo xtask ...`")?;
    let root = PathBuf::from(own).parent().map(PathBuf::from);
    root.ok_or_else(|| "xtask has no directory above it".into())
}

/// The same cargo that started this.
pub(crate) fn cargo() -> Outcome<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()?);
    Ok(command)
}

/// Runs a command to its end; anything but success is an error.
pub(crate) fn ok(command: &mut Command) -> Outcome<()> {
    let line = line(command);
    eprintln!("$ {line}");
    let status = command.status().map_err(|e| format!("starting `{line}`: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("`{line}` ended with {status}").into()) }
}

/// Runs a command to its end; what it said is shown when it fails.
pub(crate) fn quietly(command: &mut Command) -> Outcome<()> {
    let said = line(command);
    eprintln!("$ {said}");
    let output = command.stdin(Stdio::null()).output();
    let output = output.map_err(|e| format!("starting `{said}`: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    let text = [output.stdout, output.stderr].concat();
    print!("$ {said}\n{}", String::from_utf8_lossy(&text));
    Err(format!("`{said}` ended with {}", output.status).into())
}

/// Runs a command and passes on the lines of its stdout for which `see` says true.
/// Returns whether it succeeded.
pub(crate) fn watch(command: &mut Command, mut see: impl FnMut(&str) -> bool) -> Outcome<bool> {
    let line = line(command);
    eprintln!("$ {line}");
    let spawned = command.stdout(Stdio::piped()).spawn();
    let mut child = spawned.map_err(|e| format!("starting `{line}`: {e}"))?;
    if let Some(stdout) = child.stdout.take() {
        for line in BufReader::new(stdout).lines() {
            let line = line?;
            if see(&line) {
                println!("{line}");
            }
        }
    }
    Ok(child.wait()?.success())
}

/// Provisions the lab.
pub(crate) fn setup() -> Outcome<Kit> {
    lab::setup::run().map_err(|e| format!("setup: {e}").into())
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
