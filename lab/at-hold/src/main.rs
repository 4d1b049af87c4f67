//! `stillframe-at-hold VM DIR ptrace|stop MILLISECONDS`: takes an image by `freeze`, and while the
//! guest is held waits for whoever started it.
//!
//! For the lab, which wants to look at the guest's memory meanwhile with eyes of its own. It is also
//! what a program that calls the library looks like: events on stdout as with the tool's `--json`,
//! and each `held` is followed by a line on stdin before anything is read. A line that does not come
//! is the guardian's to deal with.
#![forbid(unsafe_code)]

use acquire::event::Event;
use acquire::plan::{HoldWish, Method, Wish};
use acquire::stop::Stop;
use acquire::{Done, Ending, Request};
use std::io::{BufRead, Write};
use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    if let Some(code) = acquire::role::take_part() {
        return code;
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(request) = request(&args) else {
        eprintln!("usage: stillframe-at-hold VM DIR ptrace|stop MILLISECONDS");
        return ExitCode::from(2);
    };
    let (exit, exhibit, reason) = match acquire::acquire(&request, &tell, &Stop::new()) {
        Ok(Done { ending, exhibit }) => {
            (if ending == Ending::Complete { 0 } else { 1 }, exhibit, ending.reason())
        }
        Err(failure) => (4, failure.exhibit(), Some(failure.to_string())),
    };
    if let Some(reason) = &reason {
        eprintln!("stillframe-at-hold: {reason}");
    }
    let exhibit = exhibit.map(|path| path.display().to_string());
    tell(Event::Done { exit, exhibit, reason });
    ExitCode::from(exit)
}

fn request(args: &[String]) -> Option<Request> {
    let [vm, output, hold, budget] = args else { return None };
    let hold = match hold.as_str() {
        "ptrace" => HoldWish::Ptrace,
        "stop" => HoldWish::Stop,
        _ => return None,
    };
    let stall_budget = Duration::from_millis(budget.parse().ok()?);
    let method = Some(Method::Freeze);
    Some(Request {
        vm: vm.clone(),
        output: Some(output.into()),
        wish: Wish { method, hold, stall_budget, ..Wish::default() },
        ..Request::default()
    })
}

/// Passes an event on. The library calls this from the thread that holds the guest.
fn tell(event: Event) {
    let is_held = matches!(event, Event::Held { .. });
    let mut out = std::io::stdout().lock();
    // Whoever does not listen any more does not answer either.
    let _ = serde_json::to_writer(&mut out, &event).map(|()| writeln!(out));
    let _ = out.flush();
    if is_held {
        let _ = std::io::stdin().lock().read_line(&mut String::new());
    }
}
