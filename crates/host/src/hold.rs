//! All threads of a process stopped from outside, for as long as a closure runs.
//!
//! ptrace is used to stop threads and to let them go, and for nothing else: no register and no
//! byte of memory goes through it. What a stopped thread feels: time passes, and a system call
//! that a stop interrupts may return `EINTR` (signal(7), "Interruption of system calls").
//!
//! ptrace belongs to one OS thread, and a thread that could not be stopped cannot be detached
//! either: only the end of its tracer lets it go. So every try to stop the process has an OS
//! thread of its own, and [`during`] takes a closure instead of giving a guard away.
//!
//! What is not stopped: transfers in flight between disks or devices and the memory (O_DIRECT,
//! io_uring, VFIO), other processes that share it (vhost-user), and vhost's kernel threads
//! before Linux 6.4, which are not threads of the process. io_uring's workers are, since 5.12,
//! and are stopped like all others.
//!
//! Who lets the threads go when things go wrong:
//!
//! | what happens | who |
//! | --- | --- |
//! | a thread does not stop in time, an error, a panic in the closure | we do |
//! | we are killed | the kernel, as it ends the tracing thread |
//! | we hang, also stopped by SIGSTOP | a timer of the kernel kills us, see above |

use crate::kernel_text::field;
use crate::{HostError, Process};
use nix::libc::{self, c_int};
use nix::sys::signal::{SigEvent, SigevNotify, Signal};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::ClockId;
use rustix::fs::AtFlags;
use rustix::io::Errno;
use std::fmt::{self, Write as _};
use std::io;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::thread;
use std::time::{Duration, Instant};

#[cfg(test)]
mod tests;

/// After the end of the tracing thread, its tracees are free within microseconds; one that is
/// not after this time is reported.
const FREED_WITHIN: Duration = Duration::from_secs(2);

/// The kind of stop that SEIZE brings (linux/ptrace.h); libc has it for few targets.
const PTRACE_EVENT_STOP: c_int = 128;

/// How long a hold may take. Whether one that was given up is tried again is the caller's to say.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// All threads are stopped by then; else all are let go.
    pub stop_within: Duration,
    /// From just before the first stop to the release, the closure included. Past
    /// this the kernel kills *our whole process*, and thereby lets the threads go.
    pub hold_at_most: Duration,
}

/// The process stands still. Lives inside the closure of [`during`] only, and on its thread:
///
/// ```compile_fail,E0277
/// fn sent<T: Send>() {}
/// sent::<host::hold::Hold<'static>>();
/// ```
#[derive(Debug)]
pub struct Hold<'a> {
    tracees: &'a Tracees<'a>,
    stopped: Instant,
    deadline: Instant,
    /// ptrace belongs to the thread that seized.
    _not_send: PhantomData<*const ()>,
}

impl Hold<'_> {
    /// How many threads are stopped.
    pub fn threads(&self) -> usize {
        self.tracees.stopped()
    }

    /// When the last thread had stopped: from here on the process is as it was at one instant.
    pub fn began(&self) -> Instant {
        self.stopped
    }

    /// Time since then.
    pub fn elapsed(&self) -> Duration {
        self.stopped.elapsed()
    }

    /// Time until the kernel kills us.
    pub fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Whether all of it was held until now: each thread is stopped by us, none appeared or
    /// vanished, and the process lives. To be asked after the last read.
    ///
    /// Only SIGKILL moves a thread out of our stop, so what holds now held since
    /// [`Hold::began`].
    pub fn lasted(&self) -> bool {
        self.tracees.all_held()
    }
}

/// A span in which threads of the process stood still because of us.
#[derive(Clone, Copy, Debug)]
pub struct Stall {
    /// The first thread was told to stop.
    pub began: Instant,
    /// The last thread had been let go.
    pub released: Instant,
}

/// A hold that is over.
#[derive(Clone, Debug)]
pub struct Held {
    /// How many threads were stopped.
    pub threads: usize,
    /// The first thread was told to stop: the stall begins.
    pub began: Instant,
    /// The last thread had stopped.
    pub stopped: Instant,
    /// The last thread was let go: the stall ends.
    pub released: Instant,
    /// [`Hold::lasted`], asked once more after the closure.
    pub lasted: bool,
    /// Signals that reached a thread before our stop did. They were passed on at the release.
    pub signals: usize,
    /// Somebody else had stopped the process (SIGSTOP) before us. It was left stopped.
    pub found_stopped: bool,
}

/// A thread that did not stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Straggler {
    /// Its id.
    pub tid: u32,
    /// Its name, as the process gave it.
    pub comm: String,
    /// Its state as in `/proc/PID/status`; `D` is uninterruptible sleep.
    pub state: char,
    /// The kernel function in which it waits, where the kernel tells.
    pub wchan: Option<String>,
}

impl fmt::Display for Straggler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "thread {} ({:?}) in state {}", self.tid, self.comm, self.state)?;
        match &self.wchan {
            Some(wchan) => write!(f, " at {wchan}"),
            None => Ok(()),
        }
    }
}

/// Why a process was not held. Unless it says otherwise, all its threads run again.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// It exited.
    #[error("process {pid} does not exist (any more)")]
    Exited {
        /// The process.
        pid: u32,
    },
    /// Somebody else traces it: a debugger, `strace`, another run of ours.
    #[error("thread {tid} of process {pid} is traced by process {tracer} ({comm:?})")]
    Traced {
        /// The process.
        pid: u32,
        /// Its thread.
        tid: u32,
        /// The thread that traces it.
        tracer: u32,
        /// The tracer's name.
        comm: String,
    },
    /// The kernel does not let us: rights, Yama, an LSM, or a thread of the kernel's own.
    #[error("the kernel refuses to stop thread {tid} ({comm:?}) of process {pid}")]
    Refused {
        /// The process.
        pid: u32,
        /// Its thread.
        tid: u32,
        /// The thread's name.
        comm: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not all threads stopped in time.
    #[error("process {pid} did not stop within {within:?}: {}", list(.stragglers))]
    NotStopped {
        /// The process.
        pid: u32,
        /// The limit.
        within: Duration,
        /// The threads that did not stop; none when new ones kept appearing.
        stragglers: Vec<Straggler>,
        /// What the others were stalled all the same, if any was told to stop.
        stall: Option<Stall>,
    },
    /// The tracing thread has ended, and still the kernel names it as the tracer.
    #[error("thread {tid} of process {pid} was not let go by the kernel")]
    NotFreed {
        /// The process.
        pid: u32,
        /// Its thread.
        tid: u32,
    },
    /// The timer or the thread for the hold could not be had.
    #[error("{what} failed")]
    Os {
        /// The call.
        what: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// `/proc` cannot be read.
    #[error(transparent)]
    Host(HostError),
}

/// The first few by name: a busy disk keeps dozens of workers.
fn list(stragglers: &[Straggler]) -> String {
    let mut text = String::new();
    for straggler in stragglers.iter().take(4) {
        let comma = if text.is_empty() { "" } else { ", " };
        let _ = write!(text, "{comma}{straggler}");
    }
    if stragglers.len() > 4 {
        let _ = write!(text, " and {} more", stragglers.len() - 4);
    }
    if text.is_empty() { "new threads kept appearing".into() } else { text }
}

impl From<HostError> for HoldError {
    fn from(error: HostError) -> Self {
        match error {
            HostError::Exited { pid } => Self::Exited { pid },
            other => Self::Host(other),
        }
    }
}

/// Stops all threads of `process`, runs `work`, lets them go.
///
/// `work` runs on a thread of its own and must be done within [`Hold::left`]. A panic in it
/// reaches the caller after the release; its message is written before, as every message is.
///
/// # Errors
/// [`HoldError`]; then `work` was not run.
pub fn during<R: Send>(
    process: &Process,
    limits: &Limits,
    work: impl FnOnce(&Hold<'_>) -> R + Send,
) -> Result<(R, Held), HoldError> {
    let (outcome, released) = on_own_thread(process, limits, work)?;
    match outcome {
        Outcome::Done { result, mut held } => {
            held.released = released.unwrap_or(held.released);
            Ok((result.unwrap_or_else(|panic| resume_unwind(panic)), held))
        }
        Outcome::NotStopped { stragglers, began } => {
            let (pid, within, released) = (process.pid(), limits.stop_within, Instant::now());
            let stall = began.map(|began| Stall { began, released });
            Err(HoldError::NotStopped { pid, within, stragglers, stall })
        }
    }
}

/// How it ended.
enum Outcome<R> {
    Done { result: thread::Result<R>, held: Held },
    NotStopped { stragglers: Vec<Straggler>, began: Option<Instant> },
}

/// The hold on a thread of its own. All threads run again when it returns; the time is given
/// when it took the end of that thread.
fn on_own_thread<R: Send>(
    process: &Process,
    limits: &Limits,
    work: impl FnOnce(&Hold<'_>) -> R + Send,
) -> Result<(Outcome<R>, Option<Instant>), HoldError> {
    let timer = Deadline::armed(limits.hold_at_most)?;
    let deadline = Instant::now() + limits.hold_at_most;
    let (outcome, tracer, all_detached) = thread::scope(|scope| {
        let run = || {
            let mut tracees = Tracees::new(process);
            let outcome = hold(&mut tracees, limits.stop_within, deadline, work);
            let all_detached = tracees.release();
            (outcome, tracees.tracer, all_detached)
        };
        let name = "stillframe-hold".into();
        let running = thread::Builder::new().name(name).spawn_scoped(scope, run);
        let running = running.map_err(os("starting a thread"))?;
        Ok::<_, HoldError>(running.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })?;
    let freed = if all_detached {
        None
    } else {
        await_freed(process, tracer)?;
        Some(Instant::now())
    };
    drop(timer);
    Ok((outcome?, freed))
}

/// Stops, works and lets go, on the thread that traces.
fn hold<R>(
    tracees: &mut Tracees<'_>,
    stop_within: Duration,
    deadline: Instant,
    work: impl FnOnce(&Hold<'_>) -> R,
) -> Result<Outcome<R>, HoldError> {
    if !tracees.stop(Instant::now() + stop_within)? {
        let stragglers = tracees.stragglers();
        return Ok(Outcome::NotStopped { stragglers, began: tracees.began });
    }
    let stopped = Instant::now();
    let hold = Hold { tracees, stopped, deadline, _not_send: PhantomData };
    let result = catch_unwind(AssertUnwindSafe(|| work(&hold)));
    let lasted = hold.lasted();
    let mut held = Held {
        threads: hold.threads(),
        began: tracees.began.unwrap_or(stopped),
        stopped,
        released: stopped,
        lasted,
        signals: tracees.list.iter().filter(|t| matches!(t.at, At::Stopped(1..))).count(),
        found_stopped: tracees.found_stopped,
    };
    tracees.release();
    held.released = Instant::now();
    Ok(Outcome::Done { result, held })
}

/// A timer that kills us unless it is dropped in time.
///
/// The kernel delivers SIGKILL to a stopped process as well (kernel: kernel/signal.c,
/// `complete_signal`); the death of a tracer frees its tracees (`exit_ptrace`).
struct Deadline(Timer);

impl Deadline {
    fn armed(after: Duration) -> Result<Self, HoldError> {
        let kill = SigevNotify::SigevSignal { signal: Signal::SIGKILL, si_value: 0 };
        let timer = Timer::new(ClockId::CLOCK_MONOTONIC, SigEvent::new(kill));
        let mut deadline = Self(timer.map_err(os("creating the timer"))?);
        // Zero would disarm it.
        let after = after.max(Duration::from_micros(1));
        deadline.set(after).map_err(os("arming the timer"))?;
        Ok(deadline)
    }

    fn set(&mut self, after: Duration) -> nix::Result<()> {
        self.0.set(Expiration::OneShot(after.into()), TimerSetTimeFlags::empty())
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        // The timer deletes itself, but not while its thread unwinds. Zero disarms it; that
        // fails for no timer that exists.
        let _ = self.set(Duration::ZERO);
    }
}

fn os<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> HoldError {
    move |source| HoldError::Os { what, source: source.into() }
}

/// Waits until no thread of `process` is traced by our ended thread `tracer`.
///
/// `pthread_join` returns before the kernel has freed the tracees: the thread id is cleared
/// in `exit_mm`, tracees are freed after it in `exit_notify` (kernel: kernel/exit.c).
fn await_freed(process: &Process, tracer: u32) -> Result<(), HoldError> {
    let until = Instant::now() + FREED_WITHIN;
    loop {
        let threads = match process.threads() {
            // The process is gone, and nothing of it is traced.
            Err(HostError::Exited { .. }) => return Ok(()),
            threads => threads?,
        };
        let ours = |tid: &u32| Seen::of(process, *tid).is_some_and(|seen| seen.tracer == tracer);
        let Some(tid) = threads.into_iter().find(ours) else { return Ok(()) };
        if Instant::now() > until {
            return Err(HoldError::NotFreed { pid: process.pid(), tid });
        }
        thread::sleep(Duration::from_micros(50));
    }
}

/// A thread that we traced, or tried to.
#[derive(Debug)]
struct Tracee {
    tid: u32,
    at: At,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// Seized; not seen to have stopped.
    Seized,
    /// Stopped by us. A signal that stopped it instead is to be passed on; 0 is none.
    Stopped(c_int),
    /// The first thread, exited before the others: its entry stays, and nothing runs in it.
    Zombie,
    /// The number belonged to another process's thread by the time we seized it. Never told to
    /// stop; the end of our thread lets it go.
    Stranger,
    /// Exited or detached.
    Gone,
}

/// The threads of one process that the calling thread traces.
#[derive(Debug)]
struct Tracees<'a> {
    process: &'a Process,
    /// Our thread, as `TracerPid` names it.
    tracer: u32,
    list: Vec<Tracee>,
    /// When the first was told to stop.
    began: Option<Instant>,
    found_stopped: bool,
    /// Some could not be detached: only the end of this thread lets them go.
    stuck: bool,
}

impl<'a> Tracees<'a> {
    fn new(process: &'a Process) -> Self {
        let tracer = rustix::thread::gettid().as_raw_nonzero().get().unsigned_abs();
        // Room for most guests, so that nothing is allocated between stops.
        let list = Vec::with_capacity(512);
        Self { process, tracer, list, began: None, found_stopped: false, stuck: false }
    }

    fn stopped(&self) -> usize {
        self.list.iter().filter(|t| matches!(t.at, At::Stopped(_))).count()
    }

    /// Stops every thread. `false` when not all had stopped by `deadline`.
    fn stop(&mut self, deadline: Instant) -> Result<bool, HoldError> {
        loop {
            let listed = self.process.threads()?;
            let first_new = self.list.len();
            for tid in &listed {
                if !self.list.iter().any(|t| t.tid == *tid) {
                    self.seize(*tid)?;
                }
            }
            // Seized, they still run: the stall begins with the first interrupt.
            for tracee in self.list[first_new..].iter().filter(|t| t.at == At::Seized) {
                self.began.get_or_insert_with(Instant::now);
                // One that is gone by now will be seen to be gone.
                let _ = ptrace(libc::PTRACE_INTERRUPT, tracee.tid, 0);
            }
            if self.list.len() == first_new && self.counts_agree(listed.len())? {
                return Ok(true);
            }
            if !self.wait_all(deadline)? {
                return Ok(false);
            }
        }
    }

    /// Whether the process has `listed` threads, all of which are stopped.
    ///
    /// A listing alone can miss threads when others exit meanwhile (kernel: fs/proc/base.c,
    /// `first_tid`). The kernel's count cannot, and stopped threads stay in it: when it is no
    /// greater than what we stopped, nothing else runs and nothing can start.
    fn counts_agree(&self, listed: usize) -> Result<bool, HoldError> {
        let held = self.list.iter().filter(|t| matches!(t.at, At::Stopped(_) | At::Zombie));
        let status = self.process.small_text("status")?;
        let count = field(&status, "Threads").and_then(|n| n.parse().ok());
        let held = held.count();
        Ok(held == listed && count == Some(held) && self.stopped() > 0)
    }

    fn seize(&mut self, tid: u32) -> Result<(), HoldError> {
        let at = match ptrace(libc::PTRACE_SEIZE, tid, 0) {
            Ok(()) => {
                // Traced, the number cannot be given to another any more: now it can be checked.
                let name = format!("task/{tid}");
                let ours = rustix::fs::statat(self.process.dir(), name, AtFlags::empty());
                if ours.is_ok() { At::Seized } else { At::Stranger }
            }
            Err(Errno::SRCH) => return Ok(()),
            Err(error) => match self.refused(tid, error)? {
                Some(at) => at,
                None => return Ok(()),
            },
        };
        self.list.push(Tracee { tid, at });
        Ok(())
    }

    /// What it means that the kernel does not let us seize `tid`. `None`: it is gone.
    fn refused(&self, tid: u32, error: Errno) -> Result<Option<At>, HoldError> {
        let pid = self.process.pid();
        let Some(seen) = Seen::of(self.process, tid) else {
            return if self.process.alive() { Ok(None) } else { Err(HoldError::Exited { pid }) };
        };
        if seen.dead() {
            return Ok((tid == pid).then_some(At::Zombie));
        }
        if seen.tracer != 0 {
            let tracer = seen.tracer;
            let comm = std::fs::read_to_string(format!("/proc/{tracer}/comm"));
            let comm = comm.unwrap_or_default().trim_end().into();
            return Err(HoldError::Traced { pid, tid, tracer, comm });
        }
        Err(HoldError::Refused { pid, tid, comm: seen.comm, source: error.into() })
    }

    /// Looks once at the threads that have not stopped; whether there are any still.
    fn look(&mut self) -> bool {
        let mut waiting = false;
        for tracee in self.list.iter_mut().filter(|t| t.at == At::Seized) {
            match wait(tracee.tid) {
                Some(report) => {
                    tracee.at = report.at;
                    self.found_stopped |= report.by_others;
                }
                None => waiting = true,
            }
        }
        // The number of one that is gone may come back as another thread.
        self.list.retain(|t| t.at != At::Gone);
        waiting
    }

    /// Waits until every seized thread has stopped or gone; `false` when the time is over.
    fn wait_all(&mut self, deadline: Instant) -> Result<bool, HoldError> {
        let mut round = 0_u32;
        loop {
            if !self.look() {
                return Ok(true);
            }
            if Instant::now() > deadline {
                return Ok(false);
            }
            // A running thread stops within microseconds.
            if round < 200 {
                thread::yield_now();
            } else {
                thread::sleep(Duration::from_micros(100));
            }
            round += 1;
            if round.is_multiple_of(256) {
                self.find_zombie()?;
            }
        }
    }

    /// The first thread can exit before the others. Its end is then not reported by `waitpid`.
    fn find_zombie(&mut self) -> Result<(), HoldError> {
        let (process, pid) = (self.process, self.process.pid());
        if !process.alive() {
            return Err(HoldError::Exited { pid });
        }
        let first = self.list.iter_mut().find(|t| t.tid == pid && t.at == At::Seized);
        if let Some(first) = first
            && Seen::of(process, pid).is_some_and(|seen| seen.dead())
        {
            first.at = At::Zombie;
        }
        Ok(())
    }

    /// The threads that have not stopped. Those that stopped just after the last look are not
    /// among them: they are not why the time ran out.
    fn stragglers(&mut self) -> Vec<Straggler> {
        self.look();
        let waiting = self.list.iter().filter(|t| t.at == At::Seized);
        let straggler = |tracee: &Tracee| {
            let tid = tracee.tid;
            let seen = Seen::of(self.process, tid)?;
            let wchan = self.process.small_text(&format!("task/{tid}/wchan")).ok();
            let wchan = wchan.filter(|text| !text.is_empty() && text != "0");
            Some(Straggler { tid, comm: seen.comm, state: seen.state, wchan })
        };
        waiting.filter_map(straggler).collect()
    }

    /// Whether each thread is stopped by us and there is no other.
    fn all_held(&self) -> bool {
        let held = |tracee: &Tracee| {
            let seen = Seen::of(self.process, tracee.tid);
            seen.is_some_and(|seen| match tracee.at {
                At::Stopped(_) => seen.state == 't' && seen.tracer == self.tracer,
                At::Zombie => seen.dead(),
                At::Stranger => true,
                At::Seized | At::Gone => false,
            })
        };
        let all = self.list.iter().filter(|t| t.at != At::Stranger).all(held);
        let listed = self.process.threads().map_or(0, |threads| threads.len());
        all && self.process.alive() && self.counts_agree(listed).unwrap_or(false)
    }

    /// Lets all go that can be let go. `false` when that takes the end of this thread.
    fn release(&mut self) -> bool {
        for tracee in &mut self.list {
            if let At::Stopped(signal) = tracee.at {
                // Refused for a thread that is being killed.
                self.stuck |= ptrace(libc::PTRACE_DETACH, tracee.tid, signal).is_err();
                tracee.at = At::Gone;
            }
        }
        let left = self.list.iter().any(|t| matches!(t.at, At::Seized | At::Zombie | At::Stranger));
        self.stuck |= left;
        !self.stuck
    }
}

impl Drop for Tracees<'_> {
    fn drop(&mut self) {
        self.release();
    }
}

/// What `/proc/PID/task/TID/status` says.
struct Seen {
    comm: String,
    state: char,
    /// The id of the *thread* that traces it; 0 is none.
    tracer: u32,
}

impl Seen {
    /// `None` when it is gone.
    fn of(process: &Process, tid: u32) -> Option<Self> {
        Self::parse(&process.small_text(&format!("task/{tid}/status")).ok()?)
    }

    fn parse(status: &str) -> Option<Self> {
        Some(Self {
            comm: field(status, "Name")?.into(),
            state: field(status, "State")?.chars().next()?,
            tracer: field(status, "TracerPid")?.parse().ok()?,
        })
    }

    /// It has exited.
    fn dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X' | 'x')
    }
}

/// A stop or an end that `waitpid` reported.
#[derive(Debug, PartialEq, Eq)]
struct Report {
    at: At,
    /// It takes part in a stop of the whole process that is not ours.
    by_others: bool,
}

/// Whether the tracee `tid` stopped or ended. Does not wait.
fn wait(tid: u32) -> Option<Report> {
    let mut status = 0;
    // `__WALL`: threads too. `__WNOTHREAD`: only tracees of this very thread.
    let flags = libc::__WALL | libc::__WNOTHREAD | libc::WNOHANG;
    // SAFETY: the kernel writes one int, to `status`.
    match unsafe { libc::waitpid(tid.cast_signed(), &raw mut status, flags) } {
        0 => None,
        // No such tracee: it took another's place by execve(2), or was reaped.
        -1 => Some(Report { at: At::Gone, by_others: false }),
        _ => Some(report(status)),
    }
}

/// What a status of `waitpid` says of a seized thread: ptrace(2), "Stopped states".
///
/// Decoded here because the enums of others know no real-time signals.
fn report(status: c_int) -> Report {
    if !libc::WIFSTOPPED(status) {
        return Report { at: At::Gone, by_others: false };
    }
    let (signal, event) = (libc::WSTOPSIG(status), status >> 16);
    match event {
        // About to take a signal.
        0 => Report { at: At::Stopped(signal), by_others: false },
        // Our interrupt, or with another signal than SIGTRAP a group-stop: it goes on by itself.
        PTRACE_EVENT_STOP => Report { at: At::Stopped(0), by_others: signal != libc::SIGTRAP },
        // We asked for no other events.
        _ => Report { at: At::Stopped(0), by_others: false },
    }
}

/// One of SEIZE, INTERRUPT and DETACH: none reads or writes registers or memory.
fn ptrace(request: libc::c_uint, tid: u32, signal: c_int) -> Result<(), Errno> {
    let none = std::ptr::null_mut::<libc::c_void>();
    let data = std::ptr::without_provenance_mut::<libc::c_void>(signal.unsigned_abs() as usize);
    // SAFETY: these three requests take numbers and no pointers (options, nothing, a signal).
    let done = unsafe { libc::ptrace(request, tid.cast_signed(), none, data) };
    if done == -1 {
        let error = io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(())
}
