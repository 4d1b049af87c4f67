//! Putting right what runs left behind whose every process died.
//!
//! Idempotent and safe beside running acquisitions: a VM whose file is locked is somebody's, and is
//! left alone unless its hold is overdue; then both its processes hang, and they are ended first.

use crate::guardian::{self, Undone};
use crate::log::Notes;
use crate::undo::{self, Left, Line, Undo, UndoError};
use host::clock::monotonic_ns;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a hold may be overdue before its holders are ended: they end it themselves within
/// some tens of milliseconds, when they can.
const OVERDUE: Duration = Duration::from_secs(1);

/// How long it may take until the kernel has let a file go whose owners were ended.
const RELEASE: Duration = Duration::from_secs(5);

/// How long a file may stay locked that no living process claims: whose owners have just died, or
/// begin only now.
const DYING: Duration = Duration::from_secs(1);

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

/// Puts right what is left of runs on the VM that `wanted` means (its name or PID), or on all. A VM
/// that a run left stopped long ago is told to go on only with `force`.
///
/// # Errors
/// The directory of the files cannot be used.
pub fn recover(wanted: Option<&str>, force: bool) -> Result<Vec<Recovered>, UndoError> {
    let is_meant = |path: &PathBuf| {
        let Some(wanted) = wanted else { return true };
        match Undo::peek(path).begin {
            Some(Line::Begin { name, target, .. }) => {
                name == wanted || target.pid.to_string() == wanted
            }
            // A run that was killed before it could say more has named its file.
            _ => undo::pid_of(path).is_some_and(|pid| pid.to_string() == wanted),
        }
    };
    let paths = Undo::all()?.into_iter().filter(is_meant);
    Ok(paths.filter_map(|path| one(&path, force)).collect())
}

/// `None`: its run has ended meanwhile, and left nothing.
fn one(path: &Path, force: bool) -> Option<Recovered> {
    let until = Instant::now() + DYING;
    let mut opened = Undo::open(path, false);
    // Nobody is at work there: the kernel closes the files of whoever has just died.
    while matches!(opened, Err(UndoError::Taken { .. }))
        && !Undo::peek(path).has_owner()
        && Instant::now() < until
    {
        std::thread::sleep(Duration::from_millis(5));
        opened = Undo::open(path, false);
    }
    match opened {
        Ok(undo) => Some(put_right(undo, force)),
        Err(UndoError::Taken { .. }) => Some(taken(path, force)),
        Err(UndoError::File { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => None,
        Err(error) => Some(told(path, None, crate::told(&error), false, false)),
    }
}

/// The file is locked: somebody works there, or hangs there.
fn taken(path: &Path, force: bool) -> Recovered {
    let left = Undo::peek(path);
    let Some(until_ns) = left.held.as_ref().and_then(deadline) else {
        return told(path, left.begin.as_ref(), "an acquisition is at work".to_owned(), true, true);
    };
    if matches!(left.held, Some(Line::Snapshot { .. })) && somebody_runs(&left) {
        let text = "an acquisition is at work: QEMU sends a snapshot".to_owned();
        return told(path, left.begin.as_ref(), text, true, true);
    }
    let overdue = monotonic_ns().saturating_sub(until_ns);
    if Duration::from_nanos(overdue) < OVERDUE {
        let text = "an acquisition is at work and holds the guest".to_owned();
        return told(path, left.begin.as_ref(), text, true, true);
    }
    let Some(ended) = end_holders(path, &left) else {
        let text = "its guardian is at it: QEMU does not let the guest go on yet".to_owned();
        return told(path, left.begin.as_ref(), text, false, true);
    };
    let until = Instant::now() + RELEASE;
    loop {
        match Undo::open(path, false) {
            Ok(undo) => {
                let mut done = put_right(undo, force);
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

/// Whether capture or guardian is neither gone nor stopped: either of them looks after a snapshot.
fn somebody_runs(left: &Left) -> bool {
    let Some(Line::Begin { capture, guardian, .. }) = &left.begin else { return false };
    let runs = |who: &undo::Who| who.open().is_some_and(|process| !process.is_stopped());
    runs(capture) || runs(guardian)
}

fn deadline(held: &Line) -> Option<u64> {
    match held {
        Line::Ptrace { until_ns, .. }
        | Line::Stop { until_ns }
        | Line::Dump { until_ns }
        | Line::Snapshot { until_ns, .. } => Some(*until_ns),
        Line::Begin { .. } | Line::Slices { .. } | Line::Free => None,
    }
}

/// Ends the processes of a run that hangs: whatever they hold by ptrace the kernel lets go then.
/// `None`: nothing was ended, for a guardian that runs still tries, and nobody could do more.
fn end_holders(path: &Path, left: &Left) -> Option<String> {
    let Some(Line::Begin { capture, guardian, .. }) = &left.begin else {
        return Some("it does not say whose it is".to_owned());
    };
    let (first, second) = (guardian.open(), capture.open());
    let runs = |process: &Option<host::Process>| {
        process.as_ref().is_some_and(|process| !process.is_stopped())
    };
    // By now the hold may be over: looked at again once the processes cannot be mistaken.
    if runs(&first) || Undo::peek(path).held != left.held {
        return None;
    }
    let holder = match left.held {
        Some(Line::Ptrace { holder, .. }) => holder.and_then(undo::Who::open),
        _ => None,
    };
    for process in [holder, first, second].into_iter().flatten() {
        // Gone meanwhile is as well.
        let _ = host::process::end_by_force(&process);
    }
    Some(format!(
        "its processes {} and {} held the guest too long and were ended",
        capture.pid, guardian.pid
    ))
}

/// After so long a VM that is stopped may be stopped by somebody else.
const OLD: Duration = Duration::from_secs(600);

fn put_right(mut undo: Undo, force: bool) -> Recovered {
    let path = undo.path().to_owned();
    let left = match undo.left() {
        Ok(left) => left,
        Err(error) => return told(&path, None, error.to_string(), false, false),
    };
    let age = undo.age().unwrap_or_default();
    if matches!(left.held, Some(Line::Stop { .. } | Line::Snapshot { .. })) && age > OLD && !force {
        let text = format!(
            "a run that died {} min ago may have left the VM stopped, or QEMU's settings of migration \
             changed; whether it is still so by that run cannot be told: look at it, then --force",
            age.as_secs() / 60
        );
        return told(&path, left.begin.as_ref(), text, false, false);
    }
    match guardian::undo(&mut undo, &[], &mut None, &Notes::default()) {
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
