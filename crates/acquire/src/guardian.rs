//! The guardian: a process of its own that alone speaks with QEMU, keeps the deadline of every
//! hold, and undoes what was done when the others die or hang. It never sees a byte of the guest.
//!
//! This file is both ends: [`run`] is the process, [`Guardian`] is how capture asks it. When it
//! dies or hangs itself, capture kills it and starts another one, which begins by undoing what the
//! file of [`crate::undo`] says; when both are gone, `stillframe recover` does the same.

mod dump;
mod slices;
mod snapshot;

pub use dump::{DumpBegun, DumpEnd};
pub use snapshot::{ShotEnd, Stops};

use crate::find::Target;
use crate::log::{Log, Note, Notes};
use crate::monitor::{AskError, Asked, AskedAgain, Monitor, QUERY, Whom};
use crate::role::{self, Peer, Role};
use crate::stall::Watch;
use crate::undo::{Line, Undo, UndoError, Who};
use crate::{Failure, plan, told};
use dump::Dumping;
use evidence::manifest;
use host::Process;
use host::channel::{self, Channel, ChannelError};
use host::clock::monotonic_ns;
use qemu::facts::BlockTimes;
use qemu::qmp::Change;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};
use serde_json::json;
use slices::Slices;
use snapshot::Shot;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How long the queries of a look may take in all.
const LOOK: Duration = Duration::from_secs(60);

/// How long the guardian may take for what needs no QEMU.
const PROMPT: Duration = Duration::from_secs(2);

/// How long QEMU may take to let the guest go on.
const CONT: Duration = Duration::from_secs(5);

/// What the guardian and the kernel leave a hold beyond its budget before they end it by force.
pub const GRACE: Duration = Duration::from_millis(40);

/// What a successor needs to start, to find QEMU, and to let the guest go on.
const SUCCESSION: Duration = Duration::from_millis(100);

/// What capture asks.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// The first message.
    Begin { whom: Box<Whom>, target: Who, capture: Who, undo: PathBuf },
    /// Everything that is asked before anything is decided.
    Look,
    /// What is asked once more after the last read.
    Again,
    /// What the block devices have done so far.
    BlockTimes,
    /// A hold by ptrace begins now and ends by this time of CLOCK_MONOTONIC.
    Arm { until_ns: u64, holder: Who },
    /// It has ended.
    Disarm,
    /// Stop the guest, and let it go on by this time at the latest.
    Stop { until_ns: u64 },
    /// Let it go on.
    Cont,
    /// Have QEMU take a snapshot; QEMU's end of the socket, the reader's, and its pulse come behind.
    Snapshot { budget_ns: u64, turn: u64 },
    /// The stream was read to its end, or nobody wants the rest of it.
    SnapshotEnd { whole: bool },
    /// Give QEMU a file to copy memory into; it comes behind.
    SlicesBegin,
    /// QEMU will be told to copy memory into a file in this directory, which is removed in the end.
    SlicesIn { dir: PathBuf },
    /// Have QEMU copy guest-physical memory into it.
    Slice { gpa: u64, len: u64, file: PathBuf },
    /// Take the file back.
    SlicesEnd,
    /// Have QEMU dump, and cut the socket at this time of CLOCK_MONOTONIC; QEMU's end of it and the
    /// reader's come behind.
    Dump { until_ns: u64 },
    /// The dump was read to its end, or nobody wants the rest.
    DumpEnd,
    /// Give the monitor to others.
    Leave,
    /// The end.
    Bye,
}

/// An answer and the journal's lines of what was done for it.
#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    notes: Vec<Note>,
    reply: Result<Reply, AskError>,
}

#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// Begun: the rights that were kept, and what was undone of a run before.
    Begun { rights: manifest::Process, undone: Option<Undone> },
    /// To [`Ask::Look`].
    Looked(Box<Asked>),
    /// To [`Ask::Again`].
    Again(Box<AskedAgain>),
    /// To [`Ask::BlockTimes`].
    BlockTimes(Vec<BlockTimes>),
    /// To [`Ask::Stop`].
    Stopped(Stopped),
    /// To [`Ask::Cont`].
    Continued(Continued),
    /// To [`Ask::SnapshotEnd`].
    Shot(Box<ShotEnd>),
    /// To [`Ask::Slice`]: how long QEMU took, in nanoseconds.
    Sliced { took_ns: u64 },
    /// To [`Ask::Dump`].
    DumpBegun(DumpBegun),
    /// To [`Ask::DumpEnd`].
    Dumped(Box<DumpEnd>),
    /// Done.
    Done,
}

/// A guest that QEMU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    /// Before `stop` was sent: CLOCK_MONOTONIC in nanoseconds.
    pub began_ns: u64,
    /// Whether it was sent: a VM found paused was not asked.
    pub asked: bool,
}

/// A guest that goes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Continued {
    /// After `cont` was answered: CLOCK_MONOTONIC in nanoseconds.
    pub ended_ns: u64,
    /// The guest was stopped all the time, as far as QEMU tells.
    pub lasted: bool,
    /// The run state afterwards.
    pub run_state: String,
    /// The guest is as it was found: running, if it was.
    pub as_found: bool,
}

/// What was undone of a run that had died.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undone {
    /// What it had announced: `ptrace`, `stop`, `snapshot`, `slices` or `dump`.
    pub held: String,
    /// What was found and done, for people.
    pub text: String,
}

/// Whether a VM in this run state runs again by `cont` and by nothing else: one that is reset while
/// it is stopped waits in `prelaunch`.
pub(crate) fn is_stopped(run_state: &str) -> bool {
    matches!(run_state, "paused" | "prelaunch")
}

/// Undoes what is announced in `undo` and not taken back; `None` when there is nothing.
///
/// `reach` is as in [`Whom`]. Only a VM that a `stop` of ours stopped is told to go on: one that runs, or ended, is left as it
/// is.
///
/// # Errors
/// QEMU could not be asked; what is announced stays announced.
pub fn undo(
    undo: &mut Undo,
    reach: &[(PathBuf, PathBuf)],
    monitor: &mut Option<Monitor>,
    notes: &Notes,
) -> Result<Option<Undone>, AskError> {
    let unreadable = |error: io::Error| AskError::Query(format!("the undo file: {error}"));
    let left = undo.left().map_err(unreadable)?;
    let (Some(Line::Begin { target, name, sockets, through, .. }), Some(held)) =
        (left.begin, left.held)
    else {
        return Ok(None);
    };
    let undone = match held {
        // The kernel let the threads go when their holder ended.
        Line::Ptrace { .. } => Undone {
            held: "ptrace".to_owned(),
            text: "its threads were held by ptrace; the kernel has let them go".to_owned(),
        },
        line => {
            let what = match line {
                Line::Snapshot { .. } => "snapshot",
                Line::Slices { .. } => "slices",
                Line::Dump { .. } => "dump",
                _ => "stop",
            };
            let text = match target.open() {
                None => format!("the VM is gone; a {what} of it was announced"),
                Some(_) => {
                    let (accelerator, confidential) = (String::new(), None);
                    let (pid, shared) = (target.pid, false);
                    let whom = Whom {
                        name,
                        pid,
                        sockets,
                        accelerator,
                        confidential,
                        accept_ciphertext: false,
                        through,
                        shared,
                        // `recover` needs none, and a guardian has got them.
                        reach: reach.to_vec(),
                    };
                    let monitor = match monitor {
                        Some(monitor) => monitor,
                        None => monitor.insert(Monitor::open_at_once(&whom, notes)?),
                    };
                    match line {
                        Line::Snapshot { found, begun, let_be, .. } => {
                            snapshot::put_back(monitor, &found, begun, let_be)?
                        }
                        Line::Slices { dir } => slices::take_back(monitor, dir.as_deref())?,
                        Line::Dump { .. } => dump::put_back(monitor)?,
                        _ => go_on(monitor)?,
                    }
                }
            };
            Undone { held: what.to_owned(), text }
        }
    };
    notes.add("undone", json!({ "held": undone.held, "text": undone.text }));
    undo.write(&Line::Free).map_err(unreadable)?;
    Ok(Some(undone))
}

/// Lets a guest go on that a `stop` of ours stopped.
fn go_on(monitor: &mut Monitor) -> Result<String, AskError> {
    let found = monitor.run_state()?;
    if !is_stopped(&found) {
        return Ok(format!("the VM had been stopped, and is {found:?} already"));
    }
    monitor.change(&Change::Cont, CONT)?;
    let now = monitor.run_state()?;
    if is_stopped(&now) {
        return Err(AskError::Query(format!("the VM was told to go on, and is still {now:?}")));
    }
    Ok(format!("the VM had been stopped; it was told to go on and is {now:?}"))
}

/// The process.
pub fn run(channel: Channel) -> ExitCode {
    match Keeper::begin(channel) {
        Ok(keeper) => keeper.serve(),
        Err(error) => {
            eprintln!("stillframe: guardian: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A hold under way.
#[derive(Clone, Copy, Debug)]
struct Held {
    /// By QEMU, and not by capture's ptrace.
    by_qemu: bool,
    /// `stop` was sent.
    asked: bool,
    /// The end by force.
    until_ns: u64,
}

struct Keeper {
    channel: Channel,
    undo: Undo,
    whom: Whom,
    /// Directories that [`Whom::reach`] goes by.
    _doors: Vec<OwnedFd>,
    capture: Process,
    monitor: Option<Monitor>,
    notes: Notes,
    held: Option<Held>,
    /// The process that holds by ptrace.
    holder: Option<Process>,
    /// The last hold was ended by us.
    expired: bool,
    /// A snapshot that QEMU takes, or has taken.
    shot: Option<Shot>,
    /// A file that QEMU copies memory into.
    slices: Option<Slices>,
    /// A dump under way.
    dump: Option<Dumping>,
    /// How often the monitor was given back to others.
    reopened: u32,
}

impl Keeper {
    fn begin(mut channel: Channel) -> Result<Self, String> {
        let notes = Notes::default();
        let begin: Ask = role::hear(&mut channel, PROMPT).map_err(|e| e.to_string())?;
        let Ask::Begin { whom, target, capture: who, undo: path } = begin else {
            return Err("not asked to begin".to_owned());
        };
        let mut whom = *whom;
        let foreign = whom.foreign();
        let fds = channel.receive_fds(1 + foreign.len(), PROMPT).map_err(|e| e.to_string())?;
        let mut fds = fds.into_iter();
        let mut undo_file = Undo::of(fds.next().ok_or("no undo file")?, path);
        let doors: Vec<OwnedFd> = fds.collect();
        whom.reach = foreign.into_iter().zip(&doors).map(through_door).collect();
        let capture = who.open();
        let in_force = host::sandbox::guardian().map_err(|e| e.to_string())?;
        let mut monitor = None;
        let Some(capture) = capture else {
            // It ended while we began, and perhaps because the one before us was lost.
            finish(&mut undo_file, &whom.reach, &mut monitor, &notes, true);
            return Err("the process that reads is gone".to_owned());
        };
        let until = Instant::now() + CONT;
        let undone = loop {
            match undo(&mut undo_file, &whom.reach, &mut monitor, &notes) {
                // QEMU may still serve the connection of a guardian before us.
                Err(_) if Instant::now() < until => {
                    monitor = None;
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => break other,
            }
        };
        let guardian = Who::me().ok_or("no /proc")?;
        let line = Line::Begin {
            target,
            name: whom.name.clone(),
            sockets: whom.sockets.clone(),
            through: whom.through.clone(),
            capture: who,
            guardian,
        };
        undo_file.write(&line).map_err(|e| e.to_string())?;
        let rights = role::rights(Role::Guardian.word(), std::process::id(), &in_force);
        let reply = undone.map(|undone| Reply::Begun { rights, undone });
        let mut keeper = Self {
            channel,
            undo: undo_file,
            whom,
            _doors: doors,
            capture,
            monitor,
            notes,
            held: None,
            holder: None,
            expired: false,
            shot: None,
            slices: None,
            dump: None,
            reopened: 0,
        };
        // Whether it is heard or not: what is not undone is undone in the end.
        let _ = keeper.answer(reply);
        Ok(keeper)
    }

    fn answer(&mut self, reply: Result<Reply, AskError>) -> Result<(), ChannelError> {
        let answer = Answer { notes: self.notes.take(), reply };
        role::say(&mut self.channel, &answer, PROMPT)
    }

    /// Answers until capture says goodbye or ends; then everything is undone.
    fn serve(mut self) -> ExitCode {
        loop {
            let shot = self.shot.as_ref().filter(|shot| !shot.is_over()).map(|_| snapshot::LOOK);
            let dump = self.dump.as_ref().and_then(Dumping::left);
            let within = self.held.map(|held| until(held.until_ns)).or(dump).or(shot);
            let fds = [self.channel.as_fd(), self.capture.pidfd()];
            let Ok(ready) = channel::wait(&fds, within) else { break };
            if self.held.is_some_and(|held| monotonic_ns() >= held.until_ns) {
                self.expire();
                continue;
            }
            let late = |dump: &&mut Dumping| dump.left().is_some_and(|left| left.is_zero());
            if let Some(dump) = self.dump.as_mut().filter(late) {
                dump.expire();
                self.notes.add("dump-expired", json!({ "by": "closing its socket" }));
                continue;
            }
            match ready.as_slice() {
                [true, _] => {}
                [_, true] => break,
                _ => {
                    if shot.is_some() {
                        self.look_after_shot();
                    }
                    continue;
                }
            }
            // Half a message must not keep us from the deadline.
            let within = self.held.map(|held| until(held.until_ns)).or(dump);
            let within = within.map_or(PROMPT, |within| within.min(PROMPT));
            let Ok(ask) = role::hear::<Ask>(&mut self.channel, within) else { break };
            let reply = match ask {
                Ask::Bye => {
                    finish(&mut self.undo, &self.whom.reach, &mut self.monitor, &self.notes, true);
                    let _ = self.answer(Ok(Reply::Done));
                    return ExitCode::SUCCESS;
                }
                other => self.act(other),
            };
            self.give_back();
            if self.answer(reply).is_err() {
                break;
            }
        }
        if let Some(shot) = &self.shot {
            shot.cut();
        }
        if let Some(dump) = &self.dump {
            dump.cut();
        }
        // While capture lives the file is its claim to the VM.
        let gone = !self.capture.alive();
        finish(&mut self.undo, &self.whom.reach, &mut self.monitor, &self.notes, gone);
        ExitCode::SUCCESS
    }

    fn act(&mut self, ask: Ask) -> Result<Reply, AskError> {
        match ask {
            Ask::Look => {
                let whom = self.whom.clone();
                Ok(Reply::Looked(Box::new(self.monitor()?.look(&whom)?)))
            }
            Ask::Again => {
                let mut again = self.monitor()?.again()?;
                again.reopened = again.reopened.saturating_add(self.reopened);
                Ok(Reply::Again(Box::new(again)))
            }
            Ask::BlockTimes => Ok(Reply::BlockTimes(self.monitor()?.block_times()?)),
            Ask::Arm { until_ns, holder } => {
                self.announce(&Line::Ptrace { until_ns, holder: Some(holder) })?;
                self.expired = false;
                self.holder = holder.open();
                self.held = Some(Held { by_qemu: false, asked: false, until_ns });
                Ok(Reply::Done)
            }
            Ask::Disarm => {
                (self.held, self.holder) = (None, None);
                self.announce(&Line::Free)?;
                Ok(Reply::Done)
            }
            Ask::Stop { until_ns } => self.stop(until_ns).map(Reply::Stopped),
            Ask::Cont => self.cont().map(Reply::Continued),
            Ask::Snapshot { budget_ns, turn } => {
                self.snapshot(budget_ns, turn).map(|()| Reply::Done)
            }
            Ask::SnapshotEnd { whole } => self.end_snapshot(whole).map(Reply::Shot),
            Ask::SlicesBegin => self.begin_slices().map(|()| Reply::Done),
            Ask::SlicesIn { dir } => self.begin_slices_in(dir).map(|()| Reply::Done),
            Ask::Slice { gpa, len, file } => self.slice(gpa, len, file),
            Ask::SlicesEnd => self.end_slices().map(|()| Reply::Done),
            Ask::Dump { until_ns } => self.dump(until_ns).map(Reply::DumpBegun),
            Ask::DumpEnd => self.end_dump().map(|end| Reply::Dumped(Box::new(end))),
            Ask::Leave => {
                self.monitor = None;
                Ok(Reply::Done)
            }
            Ask::Begin { .. } | Ask::Bye => Err(AskError::Query("asked out of turn".to_owned())),
        }
    }

    /// A monitor that others need too is theirs between two questions, but for a hold, whose end must
    /// not wait for anybody, and for the stop of a snapshot or dump, of whose end only events tell.
    fn give_back(&mut self) {
        let stop_is_heard =
            self.shot.as_ref().is_none_or(|shot| shot.is_over() || shot.has_let_go());
        let free = self.held.is_none() && self.dump.is_none() && stop_is_heard;
        if self.whom.shared && free && self.monitor.take().is_some() {
            self.reopened += 1;
            if let Some(shot) = self.shot.as_mut().filter(|shot| !shot.is_over()) {
                shot.reconnected();
            }
        }
    }

    /// The monitor, opened at the first question.
    fn monitor(&mut self) -> Result<&mut Monitor, AskError> {
        match &mut self.monitor {
            Some(monitor) => Ok(monitor),
            none => Ok(none.insert(Monitor::open(&self.whom, &self.notes)?)),
        }
    }

    fn announce(&mut self, line: &Line) -> Result<(), AskError> {
        announce(&mut self.undo, line)
    }

    fn stop(&mut self, until_ns: u64) -> Result<Stopped, AskError> {
        self.expired = false;
        let found = self.monitor()?.run_state()?;
        // Whatever QEMU told of runs and stops before this is not about this hold.
        self.monitor()?.heard(&ENDS_A_HOLD);
        if found != "running" {
            self.held = Some(Held { by_qemu: true, asked: false, until_ns });
            return Ok(Stopped { began_ns: monotonic_ns(), asked: false });
        }
        self.announce(&Line::Stop { until_ns })?;
        let began_ns = monotonic_ns();
        self.held = Some(Held { by_qemu: true, asked: true, until_ns });
        let stopped = self.monitor()?.change(&Change::Stop, until(until_ns));
        let state = stopped.and_then(|()| self.monitor()?.run_state());
        let held_ns = monotonic_ns();
        match state {
            Ok(state) if state == "paused" && held_ns < until_ns => {
                Ok(Stopped { began_ns, asked: true })
            }
            // It may have been carried out all the same: answers come in order.
            other => {
                let went_on = self.cont();
                let why = other.map_or_else(
                    |error| error.to_string(),
                    |state| format!("the VM is {state:?} after {} ns", held_ns - began_ns),
                );
                went_on?;
                Err(AskError::Query(format!("the guest could not be stopped in time: {why}")))
            }
        }
    }

    fn cont(&mut self) -> Result<Continued, AskError> {
        let Some(held) = self.held.filter(|held| held.by_qemu) else {
            // Its time was up, and we let it go on.
            let run_state = self.monitor()?.run_state()?;
            let ended_ns = monotonic_ns();
            return Ok(Continued { ended_ns, lasted: false, run_state, as_found: true });
        };
        let found = self.monitor()?.run_state()?;
        let stood = found == "paused" || !held.asked;
        let ended = self.monitor()?.heard(&ENDS_A_HOLD);
        let lasted = stood && found != "running" && !self.expired && !ended;
        if held.asked && is_stopped(&found) {
            self.monitor()?.change(&Change::Cont, CONT)?;
        }
        let run_state = self.monitor()?.run_state()?;
        let ended_ns = monotonic_ns();
        let as_found = !held.asked || !is_stopped(&run_state);
        if as_found {
            self.held = None;
            self.announce(&Line::Free)?;
        }
        Ok(Continued { ended_ns, lasted, run_state, as_found })
    }

    /// Has QEMU take a snapshot.
    fn snapshot(&mut self, budget_ns: u64, turn: u64) -> Result<(), AskError> {
        let none = |error: ChannelError| AskError::Query(told(&error));
        let mut fds = self.channel.receive_fds(3, PROMPT).map_err(none)?.into_iter();
        let (Some(theirs), Some(ours), Some(pulse)) = (fds.next(), fds.next(), fds.next()) else {
            return Err(AskError::Query("a descriptor is missing".to_owned()));
        };
        // Capture looks too, and sooner.
        let budget = Duration::from_nanos(budget_ns) + GRACE;
        let until_ns = monotonic_ns().saturating_add(budget_ns);
        self.monitor()?;
        let Some(monitor) = &mut self.monitor else { return Ok(()) };
        let watch = Watch::new(ours, pulse, turn);
        let shot = Shot::begin(monitor, &mut self.undo, &theirs, watch, budget, until_ns)?;
        self.shot = Some(shot);
        Ok(())
    }

    /// Ends it. A QEMU that was too busy for one answer is asked anew, as long as nobody is held up by that.
    fn end_snapshot(&mut self, whole: bool) -> Result<Box<ShotEnd>, AskError> {
        let until = Instant::now() + snapshot::ENDS;
        loop {
            match self.try_to_end_snapshot(whole) {
                Err(error) if whole && Instant::now() < until => {
                    self.notes.add("snapshot", json!({ "error": error.to_string() }));
                    // A connection that failed once is of no use any more, and the next one may work.
                    self.monitor = None;
                }
                other => return other,
            }
        }
    }

    fn try_to_end_snapshot(&mut self, whole: bool) -> Result<Box<ShotEnd>, AskError> {
        let lost = self.monitor.is_none();
        self.monitor()?;
        if let Some(shot) = self.shot.as_mut().filter(|_| lost) {
            shot.reconnected();
        }
        let (Some(monitor), Some(shot)) = (&mut self.monitor, &mut self.shot) else {
            return Err(AskError::Query("there is no snapshot".to_owned()));
        };
        if whole {
            shot.finish(monitor, &mut self.undo)?;
        } else if !shot.is_over() {
            shot.stop(monitor, &mut self.undo, None)?;
        }
        let end = shot.end().cloned();
        end.map(Box::new).ok_or_else(|| AskError::Query("the snapshot goes on".to_owned()))
    }

    /// Gives QEMU the file that comes behind.
    fn begin_slices(&mut self) -> Result<(), AskError> {
        let none = |error: ChannelError| AskError::Query(told(&error));
        let file = self.channel.receive_fds(1, PROMPT).map_err(none)?.pop();
        let file = file.ok_or_else(|| AskError::Query("no file came".to_owned()))?;
        self.monitor()?;
        let Some(monitor) = &mut self.monitor else { return Ok(()) };
        self.slices = Some(Slices::begin(monitor, &mut self.undo, &file)?);
        Ok(())
    }

    fn begin_slices_in(&mut self, dir: PathBuf) -> Result<(), AskError> {
        self.slices = Some(Slices::begin_in(&mut self.undo, dir)?);
        Ok(())
    }

    fn slice(&mut self, gpa: u64, len: u64, file: PathBuf) -> Result<Reply, AskError> {
        let (Some(monitor), Some(slices)) = (&mut self.monitor, &self.slices) else {
            return Err(AskError::Query("QEMU has no file to copy memory into".to_owned()));
        };
        slices.copy(monitor, gpa, len, &file).map(|took_ns| Reply::Sliced { took_ns })
    }

    fn end_slices(&mut self) -> Result<(), AskError> {
        let Some(slices) = self.slices.take() else { return Ok(()) };
        self.monitor()?;
        match &mut self.monitor {
            Some(monitor) => slices.end(monitor, &mut self.undo),
            None => Ok(()),
        }
    }

    /// Has QEMU dump into the socket whose ends come behind.
    fn dump(&mut self, until_ns: u64) -> Result<DumpBegun, AskError> {
        let none = |error: ChannelError| AskError::Query(told(&error));
        let mut fds = self.channel.receive_fds(2, PROMPT).map_err(none)?.into_iter();
        let (Some(theirs), Some(ours)) = (fds.next(), fds.next()) else {
            return Err(AskError::Query("a descriptor is missing".to_owned()));
        };
        self.monitor()?;
        let Some(monitor) = &mut self.monitor else {
            return Err(AskError::Query("there is no monitor".to_owned()));
        };
        let (dump, begun) = Dumping::begin(monitor, &mut self.undo, &theirs, ours, until_ns)?;
        self.dump = Some(dump);
        Ok(begun)
    }

    fn end_dump(&mut self) -> Result<DumpEnd, AskError> {
        let (Some(monitor), Some(dump)) = (&mut self.monitor, self.dump.take()) else {
            return Err(AskError::Query("there is no dump".to_owned()));
        };
        dump.end(monitor, &mut self.undo)
    }

    /// Between two questions.
    fn look_after_shot(&mut self) {
        if let Some(shot) = &mut self.shot {
            shot.watch();
            if self.whom.shared && !shot.is_due() {
                return;
            }
        }
        if self.monitor.is_none() {
            // QEMU could not be asked the last time.
            let opened = self.monitor().is_ok();
            if let Some(shot) = self.shot.as_mut().filter(|_| opened) {
                shot.reconnected();
            }
        }
        let (Some(monitor), Some(shot)) = (&mut self.monitor, &mut self.shot) else { return };
        if let Err(error) = shot.tick(monitor, &mut self.undo) {
            self.notes.add("snapshot", json!({ "error": error.to_string() }));
            // A connection that failed once is of no use any more, and the next one may work. The stream
            // goes on: it is looked after by whoever reads it, and by the watch.
            self.monitor = None;
        }
        self.give_back();
    }

    /// A hold lasted longer than it may.
    fn expire(&mut self) {
        let Some(held) = self.held else { return };
        self.expired = true;
        if held.by_qemu {
            self.notes.add("hold-expired", json!({ "by": "cont" }));
            let went_on = self.cont();
            if let Err(error) = went_on {
                self.notes.add("hold-expired", json!({ "error": error.to_string() }));
                // A connection that failed once is of no use any more.
                self.monitor = None;
                // Tried again until QEMU takes it.
                self.held = Some(Held { until_ns: monotonic_ns() + 100_000_000, ..held });
            }
            return;
        }
        // It should have let go by itself, and the kernel's timer have ended it.
        self.held = None;
        if let Some(holder) = self.holder.take() {
            let _ = host::process::end_by_force(&holder);
        }
        // Whatever capture does by now, it holds nothing; what cannot be written is undone twice.
        let _ = self.announce(&Line::Free);
    }
}

fn announce(undo: &mut Undo, line: &Line) -> Result<(), AskError> {
    undo.write(line).map_err(|error| {
        AskError::Query(format!("cannot write {}: {error}", undo.path().display()))
    })
}

/// Undoes what is still to be undone, however long QEMU takes; then takes the file away, unless
/// somebody still needs it.
fn finish(
    undo_file: &mut Undo,
    reach: &[(PathBuf, PathBuf)],
    monitor: &mut Option<Monitor>,
    notes: &Notes,
    remove: bool,
) {
    let mut pause = Duration::from_millis(20);
    // Of ptrace there is nothing to undo once capture is gone; a VM that is gone is none.
    while undo(undo_file, reach, monitor, notes).is_err() {
        *monitor = None;
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_secs(1));
    }
    if remove {
        undo_file.remove();
    }
}

/// Events after which a guest that was stopped is not what it was.
const ENDS_A_HOLD: [&str; 4] = ["RESUME", "RESET", "SHUTDOWN", "WAKEUP"];

/// How long it is until `until_ns` of CLOCK_MONOTONIC.
fn until(until_ns: u64) -> Duration {
    Duration::from_nanos(until_ns.saturating_sub(monotonic_ns()))
}

/// The guardian, as capture has it.
#[derive(Debug)]
pub struct Guardian {
    peer: Peer,
    undo: Undo,
    whom: Whom,
    target: Who,
    capture: Who,
    log: Log,
    /// The rights of every guardian and holder that there was.
    pub rights: Vec<manifest::Process>,
    /// What was undone: of a run before, or when a guardian was lost.
    pub undone: Vec<Undone>,
    /// How many guardians were lost.
    pub lost: u32,
    /// The guest could not be brought back to what it was.
    pub not_as_found: Option<String>,
    /// It has been told to go.
    parted: bool,
    /// It could not be replaced: another one may still be trying.
    alone: bool,
    /// Lines that came while the guest was held: nothing is written then.
    later: Vec<Note>,
}

impl Drop for Guardian {
    /// A run that ended before it began leaves no file behind.
    fn drop(&mut self) {
        self.part();
    }
}

/// Why the guardian did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum GuardianError {
    /// QEMU would not.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// It died or hung, and another one took its place: what was held is let go.
    #[error("the guardian was lost ({0}); another one took its place")]
    Lost(#[source] ChannelError),
    /// It died or hung, and no other could take its place.
    #[error("the guardian was lost ({lost}), and no other could be started: {error}")]
    Alone {
        /// What happened to it.
        #[source]
        lost: ChannelError,
        /// Why there is no other.
        error: String,
    },
}

impl Guardian {
    /// Takes the VM for this process and starts its guardian.
    ///
    /// # Errors
    /// [`Failure::Refused`] when somebody else works on the VM, or may have left it stopped.
    pub fn start(target: &Target, log: &Log) -> Result<Self, Failure> {
        let refuse = |reason: String, remedy: &str| {
            let remedies = vec![remedy.to_owned()];
            Failure::Refused(plan::Refusal { reason, rejected: Vec::new(), remedies })
        };
        let who = Who::of(&target.process);
        let mut undo = Undo::take(who).map_err(|error| match error {
            UndoError::Taken { .. } => refuse(
                error.to_string(),
                "wait for it, or end it; `stillframe recover` ends one whose hold is overdue",
            ),
            UndoError::File { .. } => refuse(told(&error), "run as root"),
        })?;
        let left = undo.left().map(|left| left.held);
        if matches!(left, Ok(Some(Line::Stop { .. } | Line::Snapshot { .. }))) {
            // Whoever looks decides: by now the VM may be stopped by somebody else.
            return Err(refuse(
                "an acquisition that was killed may have left this VM stopped, or QEMU's settings \
                 changed"
                    .to_owned(),
                "stillframe recover",
            ));
        }
        let capture = Who::me().ok_or_else(|| {
            let pid = std::process::id();
            Failure::Host(host::HostError::Exited { pid })
        })?;
        let whom = target.whom();
        let begun = begin(&whom, who, capture, &undo, log);
        if matches!(begun, Err(Begin::Start(_))) {
            // Nothing was begun: there is nothing that anybody would have to undo.
            undo.remove();
        }
        let (peer, rights, undone) = begun.map_err(|error| match error {
            Begin::Ask(error) => Failure::Asked(error),
            Begin::Start(text) => refuse(
                format!("the guardian could not be started: {text}"),
                "/proc must be mounted, and processes to be had",
            ),
        })?;
        log.add("guardian", json!({ "pid": peer.pid(), "undo": undo.path(), "rights": rights }));
        Ok(Self {
            peer,
            undo,
            whom,
            target: who,
            capture,
            log: log.clone(),
            rights: vec![rights],
            undone: undone.into_iter().collect(),
            lost: 0,
            not_as_found: None,
            parted: false,
            alone: false,
            later: Vec::new(),
        })
    }

    /// Everything that is asked before anything is decided.
    ///
    /// # Errors
    /// [`GuardianError`].
    pub fn look(&mut self) -> Result<Asked, GuardianError> {
        match self.ask(&Ask::Look, LOOK)? {
            Reply::Looked(asked) => Ok(*asked),
            other => self.out_of_turn(&other),
        }
    }

    /// What is asked once more after the last read.
    ///
    /// # Errors
    /// [`GuardianError`].
    pub fn again(&mut self) -> Result<AskedAgain, GuardianError> {
        match self.ask(&Ask::Again, LOOK)? {
            Reply::Again(asked) => Ok(*asked),
            other => self.out_of_turn(&other),
        }
    }

    /// What the block devices have done so far.
    ///
    /// # Errors
    /// [`GuardianError`].
    pub fn block_times(&mut self) -> Result<Vec<BlockTimes>, GuardianError> {
        match self.ask(&Ask::BlockTimes, QUERY + PROMPT)? {
            Reply::BlockTimes(times) => Ok(times),
            other => self.out_of_turn(&other),
        }
    }

    /// Announces a hold by ptrace: past `until_ns` the guardian kills the process that holds.
    ///
    /// # Errors
    /// [`GuardianError`]: there must be no hold then.
    pub fn arm(&mut self, until_ns: u64, holder: Who) -> Result<(), GuardianError> {
        self.ask(&Ask::Arm { until_ns, holder }, PROMPT).map(drop)
    }

    /// The hold by ptrace has ended.
    ///
    /// # Errors
    /// [`GuardianError`]; the guest is let go all the same.
    pub fn disarm(&mut self) -> Result<(), GuardianError> {
        self.ask(&Ask::Disarm, PROMPT).map(drop)
    }

    /// Stops the guest by QEMU; past `until_ns` the guardian lets it go on.
    ///
    /// # Errors
    /// [`GuardianError`]; the guest goes on then.
    pub fn stop(&mut self, until_ns: u64) -> Result<Stopped, GuardianError> {
        // It ends the hold itself by then, if it can; its successor needs the rest of the time.
        match self.ask(&Ask::Stop { until_ns }, until(until_ns) + GRACE / 2)? {
            Reply::Stopped(stopped) => Ok(stopped),
            other => self.out_of_turn(&other),
        }
    }

    /// Lets the guest go on.
    ///
    /// # Errors
    /// [`GuardianError`]; when the guardian was lost, its successor has let the guest go on.
    pub fn cont(&mut self, until_ns: u64) -> Result<Continued, GuardianError> {
        // Asked early, it need not be waited for until the end: a successor needs time too. Asked
        // late, it has all the time that is left, for a busy host is no reason to give it up.
        let left = until(until_ns);
        let patience = left.saturating_sub(SUCCESSION).max(left.min(2 * SUCCESSION));
        match self.ask(&Ask::Cont, patience.max(GRACE))? {
            Reply::Continued(continued) => {
                if !continued.as_found {
                    self.not_as_found = Some(format!("the VM is {:?}", continued.run_state));
                }
                Ok(continued)
            }
            other => self.out_of_turn(&other),
        }
    }

    /// Has QEMU take a snapshot into the socket whose end for QEMU is `theirs`; the guardian looks at
    /// `ours`, the reader's end, and at the reader's `pulse`, and breaks the stream when that is not
    /// read for longer than the stall budget; `turn` is that of [`crate::stall`].
    ///
    /// # Errors
    /// [`GuardianError`]: QEMU's settings are as they were.
    pub fn snapshot(
        &mut self,
        budget_ns: u64,
        turn: u64,
        theirs: BorrowedFd<'_>,
        ours: BorrowedFd<'_>,
        pulse: BorrowedFd<'_>,
    ) -> Result<(), GuardianError> {
        let fds = [theirs, ours, pulse];
        self.ask_with(&Ask::Snapshot { budget_ns, turn }, &fds, LOOK).map(drop)
    }

    /// The snapshot's stream was read to its end, or nobody wants the rest: gives back what QEMU says
    /// of it, once its settings are those from before.
    ///
    /// # Errors
    /// [`GuardianError`]; when the guardian was lost, its successor has put the settings back.
    pub fn end_snapshot(&mut self, whole: bool) -> Result<ShotEnd, GuardianError> {
        // Who waits for the end of a whole stream holds nobody up; what is broken may hold the guest.
        let within = if whole { LOOK } else { 2 * CONT };
        match self.ask(&Ask::SnapshotEnd { whole }, within)? {
            Reply::Shot(end) => Ok(*end),
            other => self.out_of_turn(&other),
        }
    }

    /// Gives QEMU `file` to copy memory into. The guardian itself does not keep it.
    ///
    /// # Errors
    /// [`GuardianError`]: QEMU does not have it.
    pub fn begin_slices(&mut self, file: BorrowedFd<'_>) -> Result<(), GuardianError> {
        self.ask_with(&Ask::SlicesBegin, &[file], QUERY + PROMPT).map(drop)
    }

    /// QEMU will be told to copy memory into a file in `dir`, which is removed with all that is in it in
    /// the end, whatever becomes of us.
    ///
    /// # Errors
    /// [`GuardianError`]
    pub fn begin_slices_in(&mut self, dir: &Path) -> Result<(), GuardianError> {
        self.ask(&Ask::SlicesIn { dir: dir.to_owned() }, PROMPT).map(drop)
    }

    /// Has QEMU copy `len` bytes of RAM from guest-physical `gpa` on into `file`, as QEMU calls it; how
    /// long it took, in nanoseconds.
    ///
    /// # Errors
    /// [`GuardianError`].
    pub fn slice(&mut self, gpa: u64, len: u64, file: &Path) -> Result<u64, GuardianError> {
        match self.ask(&Ask::Slice { gpa, len, file: file.to_owned() }, QUERY + PROMPT)? {
            Reply::Sliced { took_ns } => Ok(took_ns),
            other => self.out_of_turn(&other),
        }
    }

    /// Takes the file back.
    ///
    /// # Errors
    /// [`GuardianError`]: it is taken back when the guardian goes.
    pub fn end_slices(&mut self) -> Result<(), GuardianError> {
        self.ask(&Ask::SlicesEnd, QUERY + PROMPT).map(drop)
    }

    /// Has QEMU dump into the socket whose end for QEMU is `theirs`; the guardian cuts `ours`, the
    /// reader's end, at `until_ns` of CLOCK_MONOTONIC.
    ///
    /// # Errors
    /// [`GuardianError`]: QEMU does not dump.
    pub fn dump(
        &mut self,
        until_ns: u64,
        theirs: BorrowedFd<'_>,
        ours: BorrowedFd<'_>,
    ) -> Result<DumpBegun, GuardianError> {
        match self.ask_with(&Ask::Dump { until_ns }, &[theirs, ours], until(until_ns) + 2 * CONT)? {
            Reply::DumpBegun(begun) => Ok(begun),
            other => self.out_of_turn(&other),
        }
    }

    /// The dump was read to its end, or nobody wants the rest: gives back what QEMU says of it, once the
    /// guest goes on.
    ///
    /// # Errors
    /// [`GuardianError`]; when the guardian was lost, its successor has seen to it.
    pub fn end_dump(&mut self) -> Result<DumpEnd, GuardianError> {
        match self.ask(&Ask::DumpEnd, 2 * CONT + QUERY)? {
            Reply::Dumped(end) => Ok(*end),
            other => self.out_of_turn(&other),
        }
    }

    /// Gives the monitor to others.
    pub fn leave(&mut self) {
        // A lost guardian has no monitor either.
        let _ = self.ask(&Ask::Leave, PROMPT);
    }

    /// Ends the guardian, and with it this process's claim to the VM.
    pub fn bye(mut self) -> Parting {
        self.part();
        let (rights, undone) = (std::mem::take(&mut self.rights), std::mem::take(&mut self.undone));
        Parting { rights, undone, lost: self.lost, not_as_found: self.not_as_found.take() }
    }

    fn part(&mut self) {
        if std::mem::replace(&mut self.parted, true) {
            return;
        }
        if self.ask(&Ask::Bye, CONT).is_err() && self.not_as_found.is_none() {
            // Its successor undid what there was, and goes with us.
            let _ = self.ask(&Ask::Bye, CONT);
        }
        self.peer.end();
    }

    /// Asks, and writes what was done for the answer into the journal.
    fn ask(&mut self, ask: &Ask, within: Duration) -> Result<Reply, GuardianError> {
        self.ask_with(ask, &[], within)
    }

    /// As [`Guardian::ask`], with descriptors.
    fn ask_with(
        &mut self,
        ask: &Ask,
        fds: &[BorrowedFd<'_>],
        within: Duration,
    ) -> Result<Reply, GuardianError> {
        if self.alone {
            let lost = ChannelError::Closed;
            return Err(GuardianError::Alone { lost, error: "given up before".to_owned() });
        }
        let said = self.peer.say(ask, within.min(PROMPT)).and_then(|()| match fds {
            [] => Ok(()),
            fds => self.peer.channel().send_fds(fds).map_err(ChannelError::Os),
        });
        let answer: Result<Answer, ChannelError> = said.and_then(|()| self.peer.hear(within));
        match answer {
            Ok(Answer { notes, reply }) => {
                self.later.extend(notes);
                if !matches!(reply, Ok(Reply::Stopped(_))) {
                    self.log.add_notes(std::mem::take(&mut self.later));
                }
                Ok(reply?)
            }
            Err(lost) => Err(self.replace(lost)),
        }
    }

    fn out_of_turn<T>(&mut self, reply: &Reply) -> Result<T, GuardianError> {
        Err(self.replace(ChannelError::Form(format!("{reply:?} out of turn"))))
    }

    /// The guardian does not answer: it is killed, and another one undoes what it left.
    fn replace(&mut self, lost: ChannelError) -> GuardianError {
        self.peer.kill();
        self.log.add_notes(std::mem::take(&mut self.later));
        self.lost += 1;
        let began = begin(&self.whom, self.target, self.capture, &self.undo, &self.log);
        match began {
            Ok((peer, rights, undone)) => {
                self.log.add(
                    "guardian-lost",
                    json!({ "why": lost.to_string(), "pid": peer.pid(), "undone": undone }),
                );
                self.peer = peer;
                self.rights.push(rights);
                self.undone.extend(undone);
                GuardianError::Lost(lost)
            }
            Err(Begin::Ask(error)) => self.alone(lost, error.to_string()),
            Err(Begin::Start(error)) => self.alone(lost, error),
        }
    }

    fn alone(&mut self, lost: ChannelError, error: String) -> GuardianError {
        self.alone = true;
        let held = self.undo.left().ok().and_then(|left| left.held);
        match held {
            Some(Line::Stop { .. }) => {
                self.not_as_found = Some(format!("the VM may still be stopped: {error}"));
            }
            Some(Line::Snapshot { .. }) => {
                let text = format!("QEMU's settings of migration may not be put back: {error}");
                self.not_as_found = Some(text);
            }
            Some(Line::Dump { .. }) => {
                self.not_as_found = Some(format!("the VM may still be stopped by a dump: {error}"));
            }
            Some(Line::Slices { .. }) => {
                let text = format!("QEMU may still hold a file of ours open: {error}");
                self.not_as_found = Some(text);
            }
            _ => {}
        }
        GuardianError::Alone { lost, error }
    }
}

/// What is known when the guardian is gone.
#[derive(Clone, Debug, Default)]
pub struct Parting {
    /// The rights of every guardian and holder that there was.
    pub rights: Vec<manifest::Process>,
    /// What was undone.
    pub undone: Vec<Undone>,
    /// How many guardians were lost.
    pub lost: u32,
    /// The guest could not be brought back to what it was.
    pub not_as_found: Option<String>,
}

/// Why a guardian did not begin.
enum Begin {
    /// It could not undo what was left.
    Ask(AskError),
    /// It could not be started, or died.
    Start(String),
}

type Begun = (Peer, manifest::Process, Option<Undone>);

/// The directory that a socket of another process's file system lies in; some other one when it is not
/// there any more, in which the socket is not found.
fn door(socket: &Path) -> io::Result<OwnedFd> {
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
    };
    Ok(open(socket.parent().unwrap_or(socket)).or_else(|_| open(Path::new("/proc/self/fdinfo")))?)
}

/// How a socket is reached by its directory.
fn through_door((socket, door): (PathBuf, &OwnedFd)) -> (PathBuf, PathBuf) {
    let directory = Path::new("/proc/self/fd").join(door.as_raw_fd().to_string());
    let reach = directory.join(socket.file_name().unwrap_or_default());
    (socket, reach)
}

/// Starts a guardian process and waits until it has undone what there was.
fn begin(whom: &Whom, target: Who, capture: Who, undo: &Undo, log: &Log) -> Result<Begun, Begin> {
    let failed = |error: &dyn std::error::Error| Begin::Start(told(error));
    let mut peer = Peer::start(Role::Guardian).map_err(|e| failed(&e))?;
    let doors: io::Result<Vec<OwnedFd>> = whom.foreign().iter().map(|path| door(path)).collect();
    let (whom, path) = (Box::new(whom.clone()), undo.path().to_owned());
    let begin = Ask::Begin { whom, target, capture, undo: path };
    peer.say(&begin, PROMPT).map_err(|e| failed(&e))?;
    let doors = doors.map_err(|e| failed(&e))?;
    let fds: Vec<BorrowedFd<'_>> =
        std::iter::once(undo.as_fd()).chain(doors.iter().map(AsFd::as_fd)).collect();
    peer.channel().send_fds(&fds).map_err(|e| failed(&e))?;
    let Answer { notes, reply } = peer.hear(LOOK).map_err(|e| failed(&e))?;
    log.add_notes(notes);
    match reply {
        Ok(Reply::Begun { rights, undone }) => Ok((peer, rights, undone)),
        Ok(other) => Err(Begin::Start(format!("it said {other:?}"))),
        Err(error) => {
            // It goes on trying by itself until QEMU answers.
            peer.detach();
            Err(Begin::Ask(error))
        }
    }
}
