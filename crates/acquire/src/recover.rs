//! Putting right what runs left behind whose every process died.
//!
//! Idempotent and safe beside running acquisitions: a VM whose file is locked is somebody's, and is
//! left alone unless its hold is overdue; then both its processes hang, and they are ended first.

use crate::guardian::{self, Undone};
use crate::monitor::Notes;
use crate::undo::{Left, Line, Undo, UndoError, Who};
use host::clock::monotonic_ns;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a hold may be overdue before its holders are ended: they end it themselves within
/// some tens of milliseconds, when they can.
const OVERDUE: Duration = Duration::from_secs(1);

/// How long it may take until the kernel has let a file go whose owners were ended.
const RELEASE: Duration = Duration::from_secs(5);

/// What was found and done for one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Recovered {
    /// The VM's name; absent when the file does not say.
    pub name: Option<String>,
    /// QEMU's process id.
    pub pid: Option<u32>,
    /// The file that said so.
    pub file: String,
    /// What was found and done, for people.
    pub text: String,
    /// Nothing is left to be put right.
    pub right: bool,
    /// An acquisition is at work there.
    pub busy: bool,
}

/// Puts right what is left of runs on the VM that `wanted` means (its name or PID), or on all.
///
/// # Errors
/// The directory of the files cannot be used.
pub fn recover(wanted: Option<&str>) -> Result<Vec<Recovered>, UndoError> {
    let mut all = Vec::new();
    for path in Undo::all()? {
        let found = one(&path);
        let fits = |wanted: &str| {
            found.name.as_deref() == Some(wanted)
                || found.pid.is_some_and(|pid| pid.to_string() == wanted)
        };
        // Looking does no harm to the others, and what is put right is right.
        if wanted.is_none_or(fits) {
            all.push(found);
        }
    }
    Ok(all)
}

fn one(path: &Path) -> Recovered {
    match Undo::open(path, false) {
        Ok(undo) => put_right(undo),
        Err(UndoError::Taken { .. }) => taken(path),
        Err(error) => told(path, None, crate::told(&error), false, false),
    }
}

/// The file is locked: somebody works there, or hangs there.
fn taken(path: &Path) -> Recovered {
    let left = peek(path);
    let Some(until_ns) = left.held.as_ref().and_then(deadline) else {
        return told(path, left.begin.as_ref(), "an acquisition is at work".to_owned(), true, true);
    };
    let overdue = monotonic_ns().saturating_sub(until_ns);
    if Duration::from_nanos(overdue) < OVERDUE || monotonic_ns() < until_ns {
        let text = "an acquisition is at work and holds the guest".to_owned();
        return told(path, left.begin.as_ref(), text, true, true);
    }
    let ended = end_holders(&left);
    let until = Instant::now() + RELEASE;
    loop {
        match Undo::open(path, false) {
            Ok(undo) => {
                let mut done = put_right(undo);
                done.text = format!("{ended}; {}", done.text);
                return done;
            }
            Err(UndoError::Taken { .. }) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(error) => {
                let text = format!("{ended}; {}", crate::told(&error));
                return told(path, left.begin.as_ref(), text, false, false);
            }
        }
    }
}

/// What a locked file says. It is read only.
fn peek(path: &Path) -> Left {
    std::fs::File::open(path)
        .map(|file| Undo::of(file.into(), PathBuf::from(path)))
        .and_then(|mut undo| undo.left())
        .unwrap_or_default()
}

fn deadline(held: &Line) -> Option<u64> {
    match held {
        Line::Ptrace { until_ns } | Line::Stop { until_ns } => Some(*until_ns),
        Line::Begin { .. } | Line::Free => None,
    }
}

/// Ends the processes of a run that hangs: whatever they hold by ptrace the kernel lets go then.
fn end_holders(left: &Left) -> String {
    let Some(Line::Begin { capture, guardian, .. }) = &left.begin else {
        return "it does not say whose it is".to_owned();
    };
    let end = |who: &Who| {
        if let Some(process) = who.open() {
            // Gone meanwhile is as well.
            let _ = host::process::end_by_force(&process);
        }
    };
    end(guardian);
    end(capture);
    format!(
        "its processes {} and {} held the guest too long and were ended",
        capture.pid, guardian.pid
    )
}

fn put_right(mut undo: Undo) -> Recovered {
    let path = undo.path().to_owned();
    let left = match undo.left() {
        Ok(left) => left,
        Err(error) => return told(&path, None, error.to_string(), false, false),
    };
    match guardian::undo(&mut undo, &mut None, &Notes::default()) {
        Ok(undone) => {
            undo.remove();
            let nothing = || "nothing was held".to_owned();
            let text = undone.map_or_else(nothing, |Undone { text, .. }| text);
            told(&path, left.begin.as_ref(), text, true, false)
        }
        Err(error) => told(&path, left.begin.as_ref(), error.to_string(), false, false),
    }
}

fn told(path: &Path, begin: Option<&Line>, text: String, right: bool, busy: bool) -> Recovered {
    let (name, pid) = match begin {
        Some(Line::Begin { name, target, .. }) => (Some(name.clone()), Some(target.pid)),
        _ => (None, None),
    };
    Recovered { name, pid, file: path.display().to_string(), text, right, busy }
}
