//! QEMU's dump, as the guardian conducts it: QEMU stops the guest, writes its memory into a socket that
//! a reader of ours reads, and lets the guest go on. The socket is cut when that takes too long: QEMU's
//! next write fails then, and the guest goes on.
//!
//! The dump is told to detach: a QEMU that waits for its reader answers nobody otherwise. What tells
//! that the guest goes on is RESUME, for DUMP_COMPLETED comes before it (docs/dump.md).

use super::announce;
use crate::monitor::{AskError, Monitor, QUERY};
use crate::undo::{Line, Undo};
use host::clock::monotonic_ns;
use qemu::qmp::Change;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What QEMU knows our socket by.
const FD: &str = "stillframe-dump";

/// How long QEMU may take to end a dump whose socket is closed, or read to its end.
const ENDS: Duration = Duration::from_secs(5);

/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(2);

/// How long a guest that was found stopped is left to QEMU after a dump: nothing tells its end.
const SETTLES: Duration = Duration::from_millis(20);

/// A dump that has begun: the guest stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpBegun {
    /// Before the command was sent: CLOCK_MONOTONIC in nanoseconds.
    pub began_ns: u64,
    /// When it was answered: QEMU stops the guest before it answers.
    pub held_ns: u64,
}

/// A dump that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpEnd {
    /// QEMU's word: `completed`, `failed`.
    pub status: Option<String>,
    /// QEMU's reason, if it failed.
    pub error: Option<String>,
    /// The guest ran when it began.
    pub ran: bool,
    /// When QEMU let it go on, in microseconds of UTC by the host's clock.
    pub resumed_us: Option<i64>,
    /// After QEMU had told so: CLOCK_MONOTONIC in nanoseconds.
    pub ended_ns: u64,
    /// Nobody let the guest go on before.
    pub lasted: bool,
    /// The guardian broke the socket, for the time was up.
    pub expired: bool,
    /// The run state in the end.
    pub run_state: String,
}

/// A dump under way.
#[derive(Debug)]
pub(super) struct Dumping {
    /// The reader's end.
    stream: UnixStream,
    /// The end by force: CLOCK_MONOTONIC in nanoseconds.
    until_ns: u64,
    /// The guest ran when it began.
    ran: bool,
    /// Events before it.
    events: usize,
    expired: bool,
}

impl Dumping {
    /// Has QEMU begin: `theirs` is its end of the socket, `ours` the reader's.
    ///
    /// # Errors
    /// [`AskError`]: QEMU does not dump, or it is announced in `undo`.
    pub(super) fn begin(
        monitor: &mut Monitor,
        undo: &mut Undo,
        theirs: &OwnedFd,
        ours: OwnedFd,
        until_ns: u64,
    ) -> Result<(Self, DumpBegun), AskError> {
        let ran = monitor.run_state()? == "running";
        if monitor.dump()?.status == "active" {
            return Err(AskError::Query("a dump is under way".to_owned()));
        }
        announce(undo, &Line::Dump { until_ns })?;
        let (stream, events) = (UnixStream::from(ours), monitor.told_so_far());
        let dumping = Self { stream, until_ns, ran, events, expired: false };
        let why = match start(monitor, theirs, until_ns) {
            Ok(Ok(begun)) => return Ok((dumping, begun)),
            Ok(Err(why)) => AskError::Query(why),
            Err(error) => error,
        };
        // It may have begun all the same.
        dumping.cut();
        put_back(monitor)?;
        announce(undo, &Line::Free)?;
        Err(why)
    }

    /// Breaks the socket: QEMU's next write fails, and the guest goes on.
    pub(super) fn cut(&self) {
        // One that is broken already is as well.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// The guest stood for long enough.
    pub(super) fn expire(&mut self) {
        self.expired = true;
        self.cut();
    }

    /// How long the guest may stand yet; nobody asks once it may not.
    pub(super) fn left(&self) -> Option<Duration> {
        (!self.expired).then(|| super::until(self.until_ns))
    }

    /// Waits for its end; what is not read by now is not wanted.
    ///
    /// # Errors
    /// [`AskError`]: it stays announced.
    pub(super) fn end(self, monitor: &mut Monitor, undo: &mut Undo) -> Result<DumpEnd, AskError> {
        self.cut();
        over(monitor, self.ran.then_some(self.events))?;
        let ended_ns = monotonic_ns();
        put_back(monitor)?;
        let told = monitor.told_since(self.events);
        let resumes: Vec<Option<i64>> =
            told.iter().filter(|event| event.name == "RESUME").map(|event| event.utc_us).collect();
        let completed = told.iter().rfind(|event| event.name == "DUMP_COMPLETED");
        let word = |pointer: &str| {
            let value = completed.and_then(|event| event.data.pointer(pointer));
            value.and_then(Value::as_str).map(|text| qemu::text::Excerpt::new(text).to_string())
        };
        let (status, error) = (word("/result/status"), word("/error"));
        let reset = told.iter().any(|event| ["RESET", "SHUTDOWN"].contains(&event.name.as_str()));
        let run_state = monitor.run_state()?;
        announce(undo, &Line::Free)?;
        Ok(DumpEnd {
            status,
            error,
            ran: self.ran,
            resumed_us: resumes.first().copied().flatten().filter(|_| self.ran),
            ended_ns,
            // QEMU lets nobody else start a guest that it dumps.
            lasted: !self.expired && !reset && (self.ran || resumes.is_empty()),
            expired: self.expired,
            run_state,
        })
    }
}

/// Gives QEMU its end and tells it to dump; why it refused, if it did.
fn start(
    monitor: &mut Monitor,
    theirs: &OwnedFd,
    until_ns: u64,
) -> Result<Result<DumpBegun, String>, AskError> {
    monitor.pass(FD, theirs.as_fd())?;
    let dump = Change::DumpToFd { name: FD.to_owned(), detach: true, range: None };
    let began_ns = monotonic_ns();
    // Whatever comes of it, the guest stands no longer.
    let refused = monitor.change_unless_refused(&dump, super::until(until_ns))?;
    let begun = DumpBegun { began_ns, held_ns: monotonic_ns() };
    Ok(refused.map_or(Ok(begun), Err))
}

/// Waits until QEMU does not dump any more, and, when it ran, lets the guest go on: it tells so behind
/// the first `events`.
fn over(monitor: &mut Monitor, events: Option<usize>) -> Result<(), AskError> {
    let until = Instant::now() + ENDS;
    loop {
        let active = monitor.dump()?.status == "active";
        let goes_on = match events {
            Some(events) => monitor.told_since(events).iter().any(|event| event.name == "RESUME"),
            None => true,
        };
        if !active && goes_on {
            break;
        }
        if Instant::now() > until {
            let what = if active { "goes on" } else { "has ended, and the guest does not go on" };
            return Err(AskError::Query(format!("QEMU's dump {what}")));
        }
        std::thread::sleep(LOOK);
    }
    if events.is_none() {
        std::thread::sleep(SETTLES);
    }
    Ok(())
}

/// Ends what is left of a dump: its socket is closed, for whoever read it is gone, and QEMU lets a guest
/// go on that it stopped for it. Gives back what was found, for people.
///
/// # Errors
/// [`AskError`]: to be tried again.
pub(super) fn put_back(monitor: &mut Monitor) -> Result<String, AskError> {
    over(monitor, None)?;
    // Used up by the dump, or never given.
    let closed = monitor.change_unless_refused(&Change::CloseFd(FD.to_owned()), QUERY)?.is_none();
    let run_state = monitor.run_state()?;
    if run_state == "save-vm" {
        return Err(AskError::Query("after a dump the guest does not go on".to_owned()));
    }
    Ok(match closed {
        true => format!(
            "QEMU had a socket of ours for a dump; it was taken back; the VM is {run_state:?}"
        ),
        false => format!("a dump of QEMU's is over; the VM is {run_state:?}"),
    })
}
