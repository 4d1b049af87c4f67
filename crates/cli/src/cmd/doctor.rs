//! `stillframe doctor`: what this host allows, what stands in the way, the remedy.

use crate::args::Doctor;
use crate::exit::Exit;
use crate::output;
use acquire::doctor::{self, Verdict};

/// Prints one line a check, its remedy below it.
pub(crate) fn run(args: &Doctor) -> Exit {
    let checks = doctor::examine();
    for check in &checks {
        if args.json {
            output::json(check);
            continue;
        }
        let mark = match check.verdict {
            Verdict::Good => "good",
            Verdict::Limited => "limited",
            Verdict::Blocked => "blocked",
        };
        output::line(&format!("{mark:8} {:22} {}", check.name, output::safe(&check.found)));
        if let Some(remedy) = &check.remedy {
            output::line(&format!("{:31} remedy: {}", "", output::safe(remedy)));
        }
    }
    if checks.iter().any(|check| check.verdict == Verdict::Blocked) {
        Exit::Refused
    } else {
        Exit::Complete
    }
}
