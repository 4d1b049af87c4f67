//! `stillframe-at-hold VM DIR ptrace|stop MILLISECONDS`: takes an image by `freeze`, and while the
//! guest is held waits for whoever started it.
//!
//! `stillframe-at-hold VM DIR unheld MILLISECONDS`: takes one by `track` with the hold around its looks
//! at the marks of written pages left out, eight times, and waits for nobody. Such an image is torn, as
//! the tear benchmark must see.
//!
//! For the lab, which wants to look at the guest's memory meanwhile with eyes of its own. It is also
//! what a program that calls the library looks like: events on stdout as with the tool's `--json`,
//! and each `held` is followed by a line on stdin before anything is read. A line that does not come
//! ends the hold at its deadline, and this program waits on.
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
        eprintln!("usage: stillframe-at-hold VM DIR ptrace|stop|unheld MILLISECONDS");
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
    let [vm, output, how, budget] = args else { return None };
    let (method, hold, rounds_unheld) = match how.as_str() {
        "ptrace" => (Method::Freeze, HoldWish::Ptrace, 0),
        "stop" => (Method::Freeze, HoldWish::Stop, 0),
        "unheld" => (Method::Track, HoldWish::Ptrace, 8),
        _ => return None,
    };
    let stall_budget = Duration::from_millis(budget.parse().ok()?);
    let method = Some(method);
    // The devices of the lab's counting guests write nothing.
    let io_horizon = Duration::from_millis(50);
    let wish = Wish { method, hold, stall_budget, io_horizon, rounds_unheld, ..Wish::default() };
    Some(Request { vm: vm.clone(), output: Some(output.into()), wish, ..Request::default() })
}

/// Passes an event on. The library calls this from the thread that holds the guest.
fn tell(event: Event) {
    let is_held = matches!(event, Event::Held { .. }) && !std::env::args().any(|a| a == "unheld");
    let mut out = std::io::stdout().lock();
    // Whoever does not listen any more does not answer either.
    let _ = serde_json::to_writer(&mut out, &event).map(|()| writeln!(out));
    let _ = out.flush();
    if is_held {
        let _ = std::io::stdin().lock().read_line(&mut String::new());
    }
}
