//! The tool while it runs: its events as they come, signals to it, how it ended.

use std::ffi::OsStr;
use std::fmt::Display;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use lab::{Doing, Failure, Guest, Lab, Result, failed, proc};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Longest wait for an event or for the end.
const PATIENCE: Duration = Duration::from_secs(120);

/// Longest wait for what proves nothing by being soon: machines stand still for ten seconds.
pub(super) const SOMETIME: Duration = Duration::from_secs(60);

/// `acquire` by `live` with `--json`, not yet started. The exhibit shall lie in `out`.
pub(super) fn acquire(lab: &Lab, vm: &str, out: &Path, flags: &[&str]) -> Result<Command> {
    let mut command = lab.tool_command(["acquire", "--method", "live", "--json"])?;
    command.args(flags).arg("-o").arg(out).arg("--").arg(vm);
    Ok(command)
}

/// An empty directory for exhibits.
pub(super) fn new_dir(lab: &Lab, name: &str) -> Result<PathBuf> {
    let dir = lab.scratch().join(name);
    fs::create_dir(&dir).doing(format_args!("creating {}", dir.display()))?;
    Ok(dir)
}

/// Names in a directory, sorted.
pub(super) fn names(dir: &Path) -> Result<Vec<String>> {
    let name = |entry: fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let mut names: Vec<_> = fs::read_dir(dir)?.flatten().map(name).collect();
    names.sort();
    Ok(names)
}

/// Acquires the guest with `flags` and demands a refusal, exit code 4, in these words, that left
/// nothing in `out`.
pub(super) fn refused(
    lab: &Lab,
    vm: &str,
    out: &Path,
    flags: &[&str],
    words: &[&str],
) -> Result<Ended> {
    let ended = Running::start(acquire(lab, vm, out, flags)?)?.end()?.expect(4)?.says(words)?;
    assert_eq!(names(out)?, [""; 0], "something was made by a run that was refused");
    Ok(ended)
}

/// Code that `verify` ends with.
pub(super) fn verify(lab: &Lab, exhibit: &Path) -> Result<Option<i32>> {
    Ok(lab.tool([OsStr::new("verify"), exhibit.as_os_str()])?.status.code())
}

/// How many directories of each kind lie somewhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Left {
    /// Ends in `.partial`.
    pub(super) partial: usize,
    /// Has its final name.
    pub(super) whole: usize,
}

/// Looks at everything in `out`: what has its final name must verify as intact and complete, a
/// partial must not.
pub(super) fn assert_nothing_passes(lab: &Lab, out: &Path) -> Result<Left> {
    let mut left = Left::default();
    for name in names(out)? {
        let code = verify(lab, &out.join(&name))?;
        let partial = name.ends_with(".partial");
        if partial == (code == Some(0)) {
            return Err(failed(format_args!("verify ends with {code:?} for {name}")));
        }
        left.partial += usize::from(partial);
        left.whole += usize::from(!partial);
    }
    Ok(left)
}

/// The tool's processes: all that run its program.
#[derive(Debug)]
pub(super) struct Family {
    program: PathBuf,
}

impl Family {
    pub(super) fn of(lab: &Lab) -> Result<Self> {
        Self::of_program(Path::new(lab.tool_command([""; 0])?.get_program()))
    }

    /// The same for a copy of it.
    pub(super) fn of_program(program: &Path) -> Result<Self> {
        Ok(Self { program: fs::canonicalize(program)? })
    }

    /// Their numbers and command lines.
    pub(super) fn all(&self) -> Vec<(u32, String)> {
        let pids = proc::with_program(&self.program).into_iter();
        pids.map(|pid| (pid, proc::command_line(pid))).collect()
    }

    /// The one with this argument.
    pub(super) fn with(&self, argument: &str) -> Option<u32> {
        let mut all = self.all().into_iter();
        all.find(|(_, line)| line.contains(argument)).map(|(pid, _)| pid)
    }

    /// Waits until none is left.
    pub(super) fn await_gone(&self) -> Result<()> {
        let until = Instant::now() + SOMETIME;
        loop {
            match self.all() {
                left if left.is_empty() => return Ok(()),
                left if Instant::now() > until => {
                    return Err(failed(format_args!("left behind: {left:?}")));
                }
                _ => sleep(Duration::from_millis(2)),
            }
        }
    }
}

/// Waits until the kernel has done with them: then their files are closed.
pub(super) fn await_dead(pids: &[u32]) -> Result<()> {
    let until = Instant::now() + SOMETIME;
    let lives =
        |pid: &u32| !matches!(proc::thread_states(*pid).as_deref(), Err(_) | Ok([] | ['Z']));
    while pids.iter().any(lives) {
        if Instant::now() > until {
            return Err(failed(format_args!("of {pids:?} some do not die")));
        }
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Where the tool keeps what is to be undone.
pub(super) const UNDO: &str = "/run/stillframe";

/// Files there that are about this guest.
pub(super) fn undo_files(guest: &Guest) -> Vec<String> {
    let own = format!("{}-", guest.pid());
    let all = names(Path::new(UNDO)).unwrap_or_default();
    all.into_iter().filter(|name| name.starts_with(&own)).collect()
}

/// `recover` for this guest: its output. It must find nothing that it cannot put right.
pub(super) fn recover(lab: &Lab, guest: &Guest) -> Result<String> {
    let vm = guest.pid().to_string();
    Ok(lab.tool(["recover", &vm])?.expect_code(0).doing("recover")?.stdout)
}

/// Sends a signal to a process.
pub(super) fn signal(pid: u32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(i32::try_from(pid)?).ok_or_else(|| failed("no PID"))?;
    kill_process(pid, signal).doing(format_args!("sending {signal:?}"))
}

/// Ends a QEMU behind everybody's back.
pub(super) fn kill(guest: &Guest) -> Result<()> {
    signal(guest.pid(), Signal::KILL)
}

/// A started tool; dropped, it is killed.
#[derive(Debug)]
pub(super) struct Running {
    child: Child,
    start: Instant,
    lines: Option<Receiver<String>>,
    stderr: Option<JoinHandle<String>>,
    events: Vec<Value>,
}

impl Running {
    /// Starts the tool; its stdout must be JSON lines, or empty.
    pub(super) fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::null()).stderr(Stdio::piped());
        Self::start_on(command)
    }

    /// The same for a program that is answered by [`Running::answer`].
    pub(super) fn start_asking(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stderr(Stdio::piped());
        Self::start_on(command)
    }

    /// The same, with stdin and stderr as the command says: of a terminal.
    pub(super) fn start_on(mut command: Command) -> Result<Self> {
        command.stdout(Stdio::piped());
        let start = Instant::now();
        let mut child = command.spawn().doing(format_args!("starting {command:?}"))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (send, lines) = channel();
        if let Some(stdout) = stdout {
            spawn(move || {
                // Ends, and closes the pipe, when nobody wants the lines any more.
                for line in BufReader::new(stdout).lines().map_while(std::io::Result::ok) {
                    if send.send(line).is_err() {
                        return;
                    }
                }
            });
        }
        let stderr = stderr.map(|mut stderr| {
            spawn(move || {
                let mut bytes = Vec::new();
                let _ = stderr.read_to_end(&mut bytes);
                String::from_utf8_lossy(&bytes).into_owned()
            })
        });
        Ok(Self { child, start, lines: Some(lines), stderr, events: Vec::new() })
    }

    /// The next event; `None` when there will be no more.
    fn next(&mut self, wait: Duration) -> Result<Option<Value>> {
        let Some(lines) = &self.lines else { return Ok(None) };
        let line = match lines.recv_timeout(wait) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
            Err(RecvTimeoutError::Timeout) => return Err(failed("the tool says nothing")),
        };
        let event: Value =
            serde_json::from_str(&line).doing(format_args!("on stdout: {line:?}"))?;
        if event["event"].as_str().is_none() {
            return Err(failed(format_args!("no event on stdout but {line:?}")));
        }
        self.events.push(event.clone());
        Ok(Some(event))
    }

    /// Waits for an event that `fits`.
    pub(super) fn until(&mut self, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        while let Some(event) = self.next(PATIENCE)? {
            if fits(&event) {
                return Ok(event);
            }
        }
        let what = format_args!("the tool ended before the event; it said {:?}", self.events);
        Err(failure_of(self.events.last(), what))
    }

    /// Waits until pass `n` has read something.
    pub(super) fn until_in_pass(&mut self, n: u64) -> Result<Value> {
        self.until(|event| {
            let read = event["done_bytes"].as_u64() > Some(0) && event["phase"] == "capture";
            read && event["pass"] == n
        })
    }

    /// Writes an empty line to its stdin.
    pub(super) fn answer(&mut self) -> Result<()> {
        let stdin = self.child.stdin.as_mut().ok_or_else(|| failed("its stdin is not ours"))?;
        stdin.write_all(b"\n").doing("answering")
    }

    /// Whether it still runs.
    pub(super) fn runs(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Its PID.
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends the tool a signal.
    pub(super) fn signal(&self, which: Signal) -> Result<()> {
        signal(self.child.id(), which)
    }

    /// Closes our end of the tool's stdout.
    pub(super) fn stop_listening(&mut self) {
        self.lines = None;
    }

    /// Waits for the end. The most memory that the tool ever took is asked for all the time.
    pub(super) fn end(mut self) -> Result<Ended> {
        let (until, mut peak_kib) = (Instant::now() + PATIENCE, 0);
        let status = loop {
            peak_kib = proc::status(self.child.id(), "VmHWM").unwrap_or(0).max(peak_kib);
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() > until {
                return Err(failed(format_args!(
                    "the tool does not end; events {:?}",
                    self.events
                )));
            }
            sleep(Duration::from_millis(2));
        };
        let took = self.start.elapsed();
        while self.next(PATIENCE)?.is_some() {}
        let stderr = self.stderr.take().and_then(|stderr| stderr.join().ok()).unwrap_or_default();
        Ok(Ended { status, events: std::mem::take(&mut self.events), stderr, took, peak_kib })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A tool that has ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// How.
    pub(super) status: ExitStatus,
    /// Its stdout.
    pub(super) events: Vec<Value>,
    /// Its stderr.
    pub(super) stderr: String,
    /// How long it ran.
    pub(super) took: Duration,
    /// The most memory that it had resident, in KiB.
    pub(super) peak_kib: u64,
}

impl Ended {
    /// Fails unless this is the exit code, and the last event says the same.
    pub(super) fn expect(self, code: i32) -> Result<Self> {
        if self.status.code() != Some(code) {
            let (reason, stderr) = (self.done("reason"), self.stderr.trim_end());
            // Where stderr is a terminal's, the last event alone tells the reason.
            let why = if stderr.is_empty() { reason.as_str().unwrap_or_default() } else { stderr };
            let what = format_args!("ended with {}, not {code}: {why}", self.status);
            return Err(failure_of(self.events.last(), what));
        }
        if !self.events.is_empty() {
            self.expect_said(code)?;
        }
        Ok(self)
    }

    /// Fails unless the last event says this exit code: for a tool that a shell runs, whose status
    /// this is not.
    pub(super) fn expect_said(&self, code: i32) -> Result<()> {
        match self.events.last() {
            Some(done) if done["event"] == "done" && done["exit"] == code => Ok(()),
            done => {
                let what = format_args!("ended with {}, and said last {done:?}", self.status);
                Err(failure_of(done, what))
            }
        }
    }

    /// Whether the guest could not be held, or not for long enough, since some process was late.
    pub(super) fn is_late(&self) -> bool {
        self.events.last().is_some_and(is_late)
    }

    /// Whether the hold was thought to become too long.
    pub(super) fn is_refused(&self) -> bool {
        self.status.code() == Some(4) && self.events.last().is_some_and(is_refused)
    }

    /// Fails unless stderr holds all of these.
    pub(super) fn says(self, words: &[&str]) -> Result<Self> {
        match words.iter().find(|word| !self.stderr.contains(**word)) {
            Some(word) => Err(failed(format_args!("{word:?} is not in: {}", self.stderr))),
            None => Ok(self),
        }
    }

    /// What the last event says of `field`; `null` when nothing.
    pub(super) fn done(&self, field: &str) -> Value {
        self.events.last().map_or(Value::Null, |done| done[field].clone())
    }

    /// The exhibit that the last event names, and its manifest.
    pub(super) fn exhibit(&self) -> Result<(PathBuf, Value)> {
        let done = self.done("exhibit");
        let dir = done.as_str().map(PathBuf::from);
        let dir = dir.ok_or_else(|| failed(format_args!("no exhibit: {}", self.stderr)))?;
        let manifest = fs::read(dir.join("manifest.json")).doing("reading the manifest")?;
        Ok((dir, serde_json::from_slice(&manifest)?))
    }

    /// Fails unless there is a partial exhibit whose record has this status (`failed`: nothing was
    /// read), and which `verify` finds intact but partial. Its reason, which the last event must
    /// give too.
    pub(super) fn partial(&self, lab: &Lab, status: &str) -> Result<String> {
        let (dir, manifest) = self.exhibit()?;
        assert!(dir.to_string_lossy().ends_with(".partial"), "{}", dir.display());
        assert_eq!(manifest["status"], status);
        assert_eq!(manifest["end_reason"], self.done("reason"));
        lab.tool([OsStr::new("verify"), dir.as_os_str()])?.expect_code(3)?;
        Ok(manifest["end_reason"].as_str().unwrap_or_default().to_owned())
    }

    /// Fails unless there is a complete exhibit that `verify` finds so.
    pub(super) fn complete(&self, lab: &Lab) -> Result<Value> {
        let (dir, manifest) = self.exhibit()?;
        assert!(!dir.to_string_lossy().ends_with(".partial"), "{}", dir.display());
        assert_eq!(manifest["status"], "complete");
        lab.tool([OsStr::new("verify"), dir.as_os_str()])?.expect_code(0)?;
        Ok(manifest)
    }

    /// Texts of the warnings.
    pub(super) fn warnings(&self) -> String {
        let texts = self.events.iter().filter(|event| event["event"] == "warning");
        texts.filter_map(|event| event["text"].as_str()).collect::<Vec<_>>().join("\n")
    }
}

// A machine that is too slow just then.

/// Reasons of a run that could not hold the guest, or not for long enough, since some process was
/// late: one CPU that stands for a second is enough.
const LATE: [&str; 7] = [
    "stall budget was used up",
    "hold did not last",
    "could not be held",
    "the guardian was lost",
    "marks of all pages was not done",
    "still to be read",
    "was not read for",
];

/// Reasons of a run that was refused, since the hold was thought to become too long.
const REFUSED: [&str; 3] = ["is allowed", "is expected to be", "may last"];

fn gives(done: &Value, reasons: &[&str]) -> bool {
    let reason = done["reason"].as_str().unwrap_or_default();
    reasons.iter().any(|words| reason.contains(words))
}

fn is_late(done: &Value) -> bool {
    matches!(done["exit"].as_u64(), Some(1 | 3)) && gives(done, &LATE)
}

fn is_refused(done: &Value) -> bool {
    done["exit"] == 4 && gives(done, &REFUSED)
}

/// Whether a run that said this last was too slow, or was thought to become so.
pub(super) fn is_slow(done: &Value) -> bool {
    is_late(done) || is_refused(done)
}

/// Stands in the text of a failure that a busy machine can be to blame for.
const TOO_SLOW: &str = "this machine was too slow just then: ";

/// A failure after which [`unless_slow`] tries again.
pub(super) fn too_slow(why: impl Display) -> Failure {
    failed(format_args!("{TOO_SLOW}{why}"))
}

pub(super) fn is_too_slow(failure: &Failure) -> bool {
    failure.to_string().contains(TOO_SLOW)
}

/// The failure of a run that ended with this event: one that was too slow, if it says so itself.
fn failure_of(done: Option<&Value>, what: impl Display) -> Failure {
    if done.is_some_and(is_slow) { too_slow(what) } else { failed(what) }
}

/// How often something is done again that the machine was too slow for: a tool that always is fails.
const AGAIN: u32 = 4;

/// Does `once`, and again while the machine is too slow for it.
pub(super) fn unless_slow<T>(mut once: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 0..AGAIN {
        match once() {
            Err(failure) if is_too_slow(&failure) => println!("         again: {failure}"),
            other => return other,
        }
        sleep(Duration::from_secs(2));
    }
    once().doing(format_args!("after {AGAIN} in vain"))
}

/// How often a run is begun: a machine that is busy just then can make the reading look too slow for
/// the budget.
const BEGINNINGS: u32 = 20;

/// A run that was not refused, with whatever was said up to its plan.
pub(super) fn begin(start: impl Fn() -> Result<Running>) -> Result<Running> {
    let mut reason = Value::Null;
    for _ in 0..BEGINNINGS {
        let mut run = start()?;
        let first = run.until(|event| event["event"] == "plan" || event["event"] == "done")?;
        if first["event"] == "plan" {
            return Ok(run);
        }
        let ended = run.end()?.expect(4)?;
        assert!(ended.is_refused(), "{:?}", ended.events);
        reason = ended.done("reason");
        println!("         refused, and begun again: {reason}");
        sleep(Duration::from_secs(1));
    }
    Err(failed(format_args!("the machine is too busy: refused over and over: {reason}")))
}
