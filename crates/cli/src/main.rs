//! `stillframe`: the binary. Flags become a request, a verb does it, its outcome becomes words and
//! an exit code. Everything else is in the crates below.
#![forbid(unsafe_code)]

mod args;
mod cmd;
mod exit;
mod output;
mod picture;

use args::{Args, Verb};
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    // An acquisition is this program three times.
    if let Some(code) = acquire::role::take_part() {
        return code;
    }
    // When the host runs out of memory, the acquirer goes before any VM. It works without, too.
    let _ = host::oom::die_first();
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(error) => {
            // Help and version are answers, not errors: clap prints them to stdout.
            let code = if error.use_stderr() { exit::Exit::Usage } else { exit::Exit::Complete };
            let _ = error.print();
            return code.into();
        }
    };
    let exit = match args.verb {
        Verb::List(list) => cmd::list::run(&list),
        Verb::Map(map) => cmd::map::run(&map),
        Verb::Plan(plan) => cmd::plan::run(&plan),
        Verb::Acquire(acquire) => cmd::acquire::run(&acquire),
        Verb::Verify(verify) => cmd::verify::run(&verify),
        Verb::Recover(recover) => cmd::recover::run(&recover),
        Verb::Doctor(doctor) => cmd::doctor::run(&doctor),
    };
    exit.into()
}
