//! Runs the lab tests: `stillframe-lab [--full] [--inside] [NAME...]`.
//!
//! `STILLFRAME_TOOL` names the tool's binary. Tests of the outer guest are run there by this same
//! binary, which must then be static; `--inside` says that this is the outer guest.
#![forbid(unsafe_code)]

mod tests;

use std::process::ExitCode;

use lab::runner::{INSIDE, Place, Tally, Test, run_here, run_outer};

fn main() -> ExitCode {
    match run() {
        Ok((tally, heading)) => {
            println!("{heading}{tally}");
            ExitCode::from(u8::from(tally.failed != 0))
        }
        Err(e) => {
            eprintln!("stillframe-lab: {e}");
            ExitCode::from(2)
        }
    }
}

/// The tally, and what stands before it on the closing line.
fn run() -> lab::Result<(Tally, &'static str)> {
    let (options, names): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|arg| arg.starts_with("--"));
    let (mut full, mut inside) = (false, false);
    for option in &options {
        match option.as_str() {
            "--full" => full = true,
            "--inside" => inside = true,
            other => return Err(lab::failed(format_args!("unknown option {other}"))),
        }
    }
    let mut lab = lab::Lab::open()?;
    lab.full |= full;
    let chosen = |t: &&Test| names.is_empty() || names.iter().any(|name| t.name().contains(name));
    let all = tests::all();
    let (here, outer): (Vec<Test>, Vec<Test>) =
        all.iter().filter(chosen).partition(|test| test.place == Place::Here);
    if here.is_empty() && outer.is_empty() {
        return Err(lab::failed(format_args!("no test is named like {names:?}")));
    }
    if inside {
        return Ok((run_here(&lab, &outer), INSIDE));
    }
    let mut tally = run_here(&lab, &here);
    tally.add(run_outer(&lab, &outer));
    Ok((tally, ""))
}
