//! `stillframe acquire`: take an image.

use crate::args::{self, YesNo};
use crate::cmd;
use crate::exit::Exit;
use crate::output::{self, Show};
use ::acquire::event::{Event, Observer};
use ::acquire::map::LocateError;
use ::acquire::monitor::AskError;
use ::acquire::stop::Stop;
use ::acquire::{CaseNotes, Done, Ending, Failure, Request};
use host::HostError;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::thread;

/// Runs the acquisition; its last event is always `done`.
pub(crate) fn run(args: &args::Acquire) -> Exit {
    let stop = Stop::new();
    if let Err(error) = signals(&stop) {
        output::error(&error);
        return Exit::Failed;
    }
    let show = match Show::new(args.how.json) {
        Ok(show) => show,
        Err(error) => {
            output::error(&error);
            return Exit::Failed;
        }
    };
    let result = ::acquire::acquire(&request(args), &show, &stop);
    if let Ok(Done { ending: Ending::NotAsFound(_), .. }) = &result {
        output::hint("`stillframe recover` puts it right; look at the VM's run state");
    }
    let (exit, exhibit, reason) = match &result {
        Ok(done) => (ending(&done.ending), done.exhibit.clone(), done.ending.reason()),
        Err(failure) => (exit_of(failure), failure.exhibit(), Some(output::chain(failure))),
    };
    show.event(Event::Done {
        exit: exit.code(),
        exhibit: exhibit.as_ref().map(|path| path.display().to_string()),
        reason: reason.clone(),
    });
    show.end();
    match &result {
        Ok(done) => {
            if let Some(reason) = reason {
                output::say(&reason);
            }
            if let (Some(path), false) = (&done.exhibit, args.how.json) {
                output::line(&path.display().to_string());
            }
        }
        Err(failure) => {
            failed(failure);
        }
    }
    exit
}

/// SIGINT and SIGTERM end the reading, a second one the writing; SIGHUP, a closed terminal, ends
/// nothing. Ctrl-Z and writing from the background stop nothing: whoever is stopped while he holds
/// the guest lets it go too late.
fn signals(stop: &Stop) -> std::io::Result<()> {
    host::signals::block_stops()?;
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    let stop = stop.clone();
    thread::Builder::new().name("signals".to_owned()).spawn(move || {
        for signal in &mut signals {
            if signal != SIGHUP {
                stop.ask();
            }
        }
    })?;
    Ok(())
}

fn request(args: &args::Acquire) -> Request {
    Request {
        vm: args.how.vm.clone(),
        output: Some(args.output.clone()),
        wish: cmd::wish(&args.how),
        max_ram: args.how.max_ram,
        max_rate: args.max_rate,
        file_digest: args.file_digest == YesNo::Yes,
        case: CaseNotes {
            number: args.case.clone(),
            exhibit: args.exhibit.clone(),
            examiner: args.examiner.clone(),
            authority: args.authority.clone(),
        },
        probe: false,
    }
}

fn ending(ending: &Ending) -> Exit {
    match ending {
        Ending::Complete => Exit::Complete,
        Ending::Losses(_) => Exit::Losses,
        Ending::Interrupted => Exit::Interrupted,
        Ending::Failed(_) => Exit::Failed,
        Ending::NotAsFound(_) => Exit::NotAsFound,
    }
}

fn exit_of(failure: &Failure) -> Exit {
    match failure {
        Failure::Record { .. } => Exit::Failed,
        Failure::NotAsFound(_) => Exit::NotAsFound,
        Failure::Find(_)
        | Failure::Refused(_)
        | Failure::Asked(_)
        | Failure::Guardian(_)
        | Failure::Map(_)
        | Failure::Host(_)
        | Failure::Probe(_)
        | Failure::Output { .. } => Exit::Refused,
    }
}

/// Says what went wrong before anything was done, and what to do about it.
pub(crate) fn failed(failure: &Failure) -> Exit {
    match failure {
        Failure::Find(error) => cmd::not_found(error),
        Failure::Refused(refusal) => cmd::refused(refusal),
        Failure::Asked(error @ AskError::Monitor(_)) => {
            output::error(error);
            output::hint(
                "a QMP socket serves one client: close the other one, or give QEMU a second \
                 monitor; with libvirt the monitor is libvirt's",
            );
            Exit::Refused
        }
        Failure::Output { .. } => {
            output::error(failure);
            output::hint("-o names a directory that exists, itself and not a link to it");
            Exit::Refused
        }
        Failure::Map(LocateError::Host(HostError::Skewed { .. })) => {
            output::error(failure);
            output::hint(
                "memory that begins amid a page of the host's is read by nothing here; QEMU's own \
                 dump-guest-memory takes it",
            );
            Exit::Refused
        }
        Failure::Map(_) | Failure::Host(_) => {
            output::error(failure);
            output::hint("run as root; `stillframe doctor` shows what stands in the way");
            Exit::Refused
        }
        Failure::Asked(AskError::Map(_)) => {
            output::error(failure);
            output::hint("run as root; `stillframe doctor` shows what stands in the way");
            Exit::Refused
        }
        Failure::Asked(AskError::Query(_))
        | Failure::Guardian(_)
        | Failure::Probe(_)
        | Failure::NotAsFound(_)
        | Failure::Record { .. } => {
            output::error(failure);
            exit_of(failure)
        }
    }
}
