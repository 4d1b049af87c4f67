//! Chores: `cargo xtask setup | demo | test | lab | fuzz | bench | package`.
//!
//! A step prints what it does and how long it took. Nothing here is needed to use stillframe.
#![forbid(unsafe_code)]

mod bench;
mod build;
mod check;
mod demo;
mod fuzz;
mod package;
mod prepared;
mod steps;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What a chore returns: failures are read by people.
type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "stillframe's chores")]
struct Args {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Debug, Subcommand)]
enum Chore {
    /// Bring everything that the lab needs: packages, kernel, QEMUs, Python tools
    Setup,
    /// Boot a guest, image it live, verify the exhibit, list the guest's processes from the image
    Demo,
    /// Format, lints, licences, unit tests, then the lab
    Test,
    /// The lab's tests on real guests
    Lab {
        /// Run the long form of every test
        #[arg(long)]
        full: bool,
        /// Parts of test names, such as a suite; none means all
        names: Vec<String>,
    },
    /// Every parser of hostile bytes under a fuzzer, for a bounded time
    Fuzz(fuzz::Args),
    /// Figures of `live` against QEMU's own methods, kept in bench/runs
    Bench {
        /// Runs that the medians are of
        #[arg(long, default_value_t = 5)]
        runs: u32,
    },
    /// Build the static binary, the tarball and the Debian package
    Package,
}

fn main() -> ExitCode {
    let done = match Args::parse().chore {
        Chore::Setup => setup().map(|()| true),
        Chore::Demo => demo::run().map(|()| true),
        Chore::Test => check::all(),
        Chore::Lab { full, names } => check::lab_only(full, &names),
        Chore::Fuzz(args) => fuzz::run(&args),
        Chore::Bench { runs } => bench::run(runs).map(|()| true),
        Chore::Package => package::run().map(|()| true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("xtask: {e}");
            ExitCode::FAILURE
        }
    }
}

fn setup() -> Outcome<()> {
    let kit = steps::setup()?;
    eprintln!("setup: ready in {}", kit.root().display());
    Ok(())
}
