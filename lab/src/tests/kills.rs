//! The tool killed and stopped at any moment, and its terminal taken away: the guest runs on in
//! time, and nothing that is left passes for what it is not.
//!
//! A watcher of the lab's own looks at QEMU every millisecond: at the state of its threads, or at
//! its run state by a monitor of its own. A hold lasted at least from the first to the last look
//! that saw it, so that whoever looks late finds it too short and never too long. What counts
//! against the deadline is this time; the longest lateness meanwhile of the watcher, or of a thread
//! on any CPU, is allowed and printed: by so much the machine may have been late for the tool too.

mod around;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use lab::metronome::Metronome;
use lab::{Accel, Doing, Guest, Lab, Qmp, Result, failed, here, outer, proc, runner, skipped};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::faults::share;
use super::run::{
    Ended, Family, Running, SOMETIME, UNDO, await_dead, begin, is_too_slow, names, new_dir,
    recover, signal, too_slow, undo_files, unless_slow, verify,
};

pub(crate) const TESTS: &[runner::Test] = here![
    sigkill_of_capture,
    sigkill_of_guardian,
    sigkill_of_both,
    sigkill_of_holder,
    sigkill_of_seal,
    sigstop_of_capture,
    sigstop_of_guardian,
    sigstop_of_both,
    sigstop_of_holder,
    sigstop_of_seal,
    the_guardian_as_it_stops_the_guest,
];

pub(crate) use around::TESTS as AROUND;

pub(crate) const OUTER: &[runner::Test] =
    outer![kills_around_a_kvm_guest, sigkill_of_track, sigstop_of_track];

/// The methods that hold, each with the class that it must earn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Freeze,
    Track,
}

impl Method {
    fn word(self) -> &'static str {
        match self {
            Self::Freeze => "freeze",
            Self::Track => "track",
        }
    }

    fn class(self) -> &'static str {
        match self {
            Self::Freeze => "instantaneous",
            Self::Track => "quasi-instantaneous",
        }
    }
}

/// How the guest is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Ptrace,
    Stop,
}

impl Hold {
    const BOTH: [Self; 2] = [Self::Ptrace, Self::Stop];

    fn word(self) -> &'static str {
        match self {
            Self::Ptrace => "ptrace",
            Self::Stop => "stop",
        }
    }
}

/// Whom it hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Capture,
    Guardian,
    Both,
    /// Only where the guest is held by ptrace.
    Holder,
    Seal,
}

/// One kind of blow.
#[derive(Clone, Copy, Debug)]
struct Cell {
    signal: Signal,
    victim: Victim,
    hold: Hold,
}

/// What the tool promises beyond the stall budget.
const PROMISED: Duration = Duration::from_millis(100);

/// The same for the outer guest, whose CPU is translated: a process that takes 5 ms to start
/// elsewhere takes 200 ms there, and whoever was lost must be replaced.
const PROMISED_OUTER: Duration = Duration::from_millis(400);

/// How long a hold may be overdue before `recover` ends its holders, and a little more.
const OVERDUE: Duration = Duration::from_millis(1200);

/// How the tool is run, so that a hold is long enough to be hit.
#[derive(Clone, Copy, Debug)]
struct Pace {
    rate: &'static str,
    budget: Duration,
    /// Beyond the budget.
    promised: Duration,
}

/// What the watcher saw.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// The longest hold, from the first to the last look that saw it.
    longest: Duration,
    /// The longest time around a hold between two looks, or that a CPU kept a thread waiting; where
    /// a successor is waited for, the longest that a program took to start besides.
    late: Duration,
    /// How many holds.
    holds: u64,
}

/// Looks at QEMU all the time on a thread of its own.
#[derive(Debug)]
struct Watch {
    told: Arc<Told>,
    thread: Option<JoinHandle<Result<Seen>>>,
    starts: Option<JoinHandle<Result<Duration>>>,
}

/// What a watcher is told, and tells meanwhile.
#[derive(Debug, Default)]
struct Told {
    over: AtomicBool,
    /// Whether the last look saw a hold.
    held: AtomicBool,
    /// Looks so far.
    looks: AtomicU64,
}

/// One look at a guest: whether it is held.
fn look(pid: u32, monitor: Option<&mut Qmp>) -> Result<bool> {
    match monitor {
        Some(qmp) => Ok(qmp.run("query-status", json!({}))?["status"] != "running"),
        None => Ok(proc::thread_states(pid)?.iter().any(|state| matches!(state, 't' | 'T'))),
    }
}

impl Watch {
    /// Of a hold by ptrace the threads tell, for QEMU answers nobody meanwhile; of one by QEMU,
    /// QEMU.
    fn start(subject: &Subject<'_>, hold: Hold) -> Result<Self> {
        let told = Arc::<Told>::default();
        let (tells, pid, metronome) = (Arc::clone(&told), subject.guest.pid(), Metronome::start()?);
        // A look costs QEMU ten times as much in the outer guest.
        let pause = match Accel::from_env() {
            Accel::Tcg => Duration::from_millis(1),
            Accel::Kvm => Duration::from_millis(10),
        };
        let mut monitor = match hold {
            Hold::Ptrace => None,
            Hold::Stop => Some(Qmp::connect(&subject.monitor, SOMETIME)?),
        };
        let thread = spawn(move || {
            let (mut seen, mut first, mut last) = (Seen::default(), None, Instant::now());
            while !tells.over.load(Ordering::Relaxed) {
                let before = Instant::now();
                let now = look(pid, monitor.as_mut())?;
                let after = Instant::now();
                tells.held.store(now, Ordering::Relaxed);
                tells.looks.fetch_add(1, Ordering::Release);
                let gap = metronome.take();
                if first.is_some() || now {
                    seen.late = seen.late.max(after - last).max(gap);
                }
                last = after;
                first = match (first, now) {
                    (None, true) => {
                        seen.holds += 1;
                        Some(after)
                    }
                    (first, true) => first,
                    (_, false) => None,
                };
                if let Some(first) = first {
                    seen.longest = seen.longest.max(before.saturating_duration_since(first));
                }
                sleep(pause);
            }
            Ok(seen)
        });
        Ok(Self { told, thread: Some(thread), starts: None })
    }

    /// Counts as lateness too how long a program takes to start while the guest is held: for a tool
    /// that must start a successor of its guardian. In the outer guest [`PROMISED_OUTER`] allows for
    /// that already.
    fn with_starts(mut self, lab: &Lab) -> Result<Self> {
        if Accel::from_env() == Accel::Kvm {
            return Ok(self);
        }
        // Not the tool, whose processes are counted: one that says how it is used and ends.
        let (told, mut program) = (Arc::clone(&self.told), lab.at_hold_command()?);
        program.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.starts = Some(spawn(move || {
            let mut longest = Duration::ZERO;
            while !told.over.load(Ordering::Relaxed) {
                if told.held.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    program.status().doing("starting a program")?;
                    longest = longest.max(start.elapsed());
                }
                sleep(Duration::from_millis(20));
            }
            Ok(longest)
        }));
        Ok(self)
    }

    /// Whether the last look saw a hold.
    fn held(&self) -> bool {
        self.told.held.load(Ordering::Relaxed)
    }

    /// Whether a look that is made from now on sees one.
    fn held_now(&self) -> Result<bool> {
        let looks = || self.told.looks.load(Ordering::Acquire);
        // The next one to end may have begun already.
        let (enough, until) = (looks() + 2, Instant::now() + SOMETIME);
        while looks() < enough {
            if Instant::now() > until {
                return Err(failed("the watcher looks no more"));
            }
            sleep(Duration::from_millis(1));
        }
        Ok(self.held())
    }

    fn end(mut self) -> Result<Seen> {
        self.told.over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| failed("no watcher"))?;
        let mut seen = joined(thread)?;
        if let Some(starts) = self.starts.take() {
            seen.late += joined(starts)?;
        }
        Ok(seen)
    }
}

/// What a thread of a watcher found.
fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|_| failed("the watcher panicked"))?.doing("watching QEMU")
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.told.over.store(true, Ordering::Relaxed);
    }
}

/// A guest that is acquired over and over.
struct Subject<'a> {
    lab: &'a Lab,
    guest: Guest,
    /// The watcher's.
    monitor: PathBuf,
    family: Family,
    pace: Pace,
    method: Method,
}

/// Waits until the firmware changes the memory map no more.
pub(super) fn settle(guest: &mut Guest) -> Result<()> {
    let until = Instant::now() + SOMETIME;
    let (mut before, mut equal) = (String::new(), 0);
    while Instant::now() < until {
        let now = guest.human("info mtree -f")?;
        // What the first seconds show is the map of before the firmware, and a machine that stands
        // still between two looks shows it twice.
        equal = if now == before { equal + 1 } else { 1 };
        if equal == 3 {
            return Ok(());
        }
        before = now;
        sleep(Duration::from_secs(4));
    }
    Err(failed("the firmware does not come to rest"))
}

/// How often it was tried to hold the guest, by the record: the guest may have felt each time.
fn tries(manifest: &Value) -> u64 {
    manifest["hold"]["tries"].as_u64().unwrap_or(1)
}

/// What a run is like that nobody disturbs.
#[derive(Clone, Copy, Debug)]
struct Whole {
    took: Duration,
    held: Duration,
    /// From the release to the end.
    tail: Duration,
}

impl<'a> Subject<'a> {
    fn boot(lab: &'a Lab) -> Result<Self> {
        let monitor = lab.scratch().join("watch.sock");
        let argument = format!("unix:{},server=on,wait=off", monitor.display());
        let builder = lab.guest().args(&["-qmp", &argument]);
        // All that the outer guest does takes ten times as long, reading too, and a guest that
        // works leaves nothing of its CPUs: there it is the firmware alone.
        let (builder, rate, millis, promised) = match Accel::from_env() {
            Accel::Tcg => (builder.memory_mib(160), "400M", 600, PROMISED),
            Accel::Kvm => (builder.blank().memory_mib(32), "32M", 950, PROMISED_OUTER),
        };
        let pace = Pace { rate, budget: Duration::from_millis(millis), promised };
        let (mut guest, family) = (builder.boot()?, Family::of(lab)?);
        if Accel::from_env() == Accel::Kvm {
            settle(&mut guest)?;
        }
        Ok(Self { lab, guest, monitor, family, pace, method: Method::Freeze })
    }

    fn acquire(&self, out: &Path, hold: Hold) -> Result<Command> {
        let fixed = ["acquire", "--method", self.method.word(), "--json", "--file-digest", "no"];
        let mut command = self.lab.tool_command(fixed)?;
        let budget = format!("{}ms", self.pace.budget.as_millis());
        command.args(["--store", "ram", "--stall-budget", &budget]);
        match self.method {
            Method::Freeze => command.args(["--max-rate", self.pace.rate]),
            Method::Track => command.args(["--io-horizon", "100ms"]),
        };
        command.args(["--hold", hold.word()]).arg("-o").arg(out);
        command.arg(self.guest.pid().to_string());
        Ok(command)
    }

    /// A run that has begun.
    fn begun(&self, out: &Path, hold: Hold) -> Result<Running> {
        begin(|| Running::start(self.acquire(out, hold)?))
    }

    /// Does `run` with a new directory, and again while the machine is too slow for it: also then the
    /// guest is as it was.
    fn patiently<T>(
        &mut self,
        name: &str,
        mut run: impl FnMut(&mut Self, &Path) -> Result<T>,
    ) -> Result<T> {
        unless_slow(|| {
            let out = new_dir(self.lab, name)?;
            let done = run(self, &out);
            fs::remove_dir_all(&out)?;
            if done.as_ref().is_err_and(is_too_slow) {
                self.assert_clean().doing("after a run that was too slow")?;
            }
            done
        })
    }

    /// Whether the guest is held this moment.
    fn held(&mut self, hold: Hold) -> Result<bool> {
        match hold {
            Hold::Ptrace => look(self.guest.pid(), None),
            Hold::Stop => Ok(self.guest.status()? != "running"),
        }
    }

    /// Nothing of a run is left: no process, no file, and the guest is as it was.
    fn assert_clean(&mut self) -> Result<()> {
        self.family.await_gone()?;
        recover(self.lab, &self.guest)?;
        let files = undo_files(&self.guest);
        if !files.is_empty() {
            return Err(failed(format_args!("recover left {files:?}")));
        }
        self.guest.assert_as_found()
    }

    /// A run that nobody disturbs.
    fn whole(&mut self, hold: Hold) -> Result<Whole> {
        let whole = self.patiently("whole", |subject, out| subject.undisturbed(out, hold))?;
        self.assert_clean()?;
        Ok(whole)
    }

    fn undisturbed(&self, out: &Path, hold: Hold) -> Result<Whole> {
        let watch = Watch::start(self, hold)?;
        let mut run = self.begun(out, hold)?;
        run.until(|event| event["event"] == "released")?;
        let released = Instant::now();
        let ended = run.end()?.expect(0)?;
        let tail = released.elapsed();
        let seen = watch.end()?;
        let manifest = ended.complete(self.lab)?;
        // Short holds are not all seen.
        let all = (1..=tries(&manifest)).contains(&seen.holds) || self.method != Method::Freeze;
        assert!(all && undo_files(&self.guest).is_empty(), "{seen:?}");
        assert_eq!(manifest["class"], self.method.class());
        let released = ended.events.iter().find(|event| event["event"] == "released");
        let held = released.and_then(|event| event["held_ns"].as_u64());
        let held = Duration::from_nanos(held.ok_or_else(|| failed("no `released`"))?);
        Ok(Whole { took: ended.took, held, tail })
    }
}

/// When a blow falls.
#[derive(Clone, Copy, Debug)]
struct At {
    /// Into the hold, or anywhere.
    aimed: bool,
    /// Which part of that is over.
    part: f64,
    /// The guardian is hit before capture.
    backwards: bool,
}

impl At {
    /// Moment `number` of `count`, tried for the `n`th time in all. Every other one is aimed.
    fn new(number: u32, count: u32, n: u32) -> Self {
        let aimed = number.is_multiple_of(2);
        let share = share(n + 1);
        let spread = (f64::from(number) + share) / f64::from(count);
        let part = if aimed || n > number { share } else { spread };
        Self { aimed, part, backwards: number / 2 % 2 == 1 }
    }
}

/// What one blow showed.
#[derive(Clone, Copy, Debug)]
struct Moment {
    inside: bool,
    seen: Seen,
    left: Left,
}

/// What lay in the output afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    Partial,
    Whole,
}

impl Subject<'_> {
    /// Waits for the moment.
    fn await_moment(&self, cell: Cell, whole: Whole, at: At, run: &mut Running) -> Result<()> {
        match (cell.victim, at.aimed) {
            // It lives after the hold.
            (Victim::Seal, _) => {
                run.until(|event| event["event"] == "released")?;
                sleep(whole.tail.mul_f64(at.part * 0.8));
            }
            (_, true) => {
                run.until(|event| event["event"] == "held")?;
                sleep(whole.held.mul_f64(at.part * 0.9));
            }
            // The guardian goes when the map was taken again, right after the hold; so does the holder.
            (Victim::Guardian | Victim::Both | Victim::Holder, false) => {
                sleep((whole.took - whole.tail).mul_f64(at.part));
            }
            (Victim::Capture, false) => sleep(whole.took.mul_f64(at.part)),
        }
        Ok(())
    }

    /// The processes to be hit; none when they are not there (yet or any more).
    fn victims(&self, cell: Cell, at: At, run: &Running) -> Vec<u32> {
        let capture = Some(run.pid()).filter(|pid| !proc::command_line(*pid).is_empty());
        let both = || {
            let (capture, guardian) = (capture?, self.family.with("@guardian")?);
            // Either may see the other die.
            Some(if at.backwards { vec![guardian, capture] } else { vec![capture, guardian] })
        };
        let one = |pid: Option<u32>| pid.into_iter().collect();
        match cell.victim {
            Victim::Capture => one(capture),
            Victim::Guardian => one(self.family.with("@guardian")),
            Victim::Both => both().unwrap_or_default(),
            Victim::Holder => one(self.family.with("@holder")),
            Victim::Seal => one(self.family.with("@seal")),
        }
    }

    /// A run, and a blow at some moment of it; `None` when it hit nobody, or not the hold at which it
    /// was aimed.
    fn moment(&mut self, cell: Cell, whole: Whole, at: At) -> Result<Option<Moment>> {
        let out = new_dir(self.lab, "out")?;
        let mut watch = Watch::start(self, cell.hold)?;
        if cell.victim == Victim::Guardian {
            watch = watch.with_starts(self.lab)?;
        }
        let mut run = Running::start(self.acquire(&out, cell.hold)?)?;
        let came = self.await_moment(cell, whole, at, &mut run);
        let victims = self.victims(cell, at, &run);
        let inside = self.held(cell.hold)?;
        let mut hit = !victims.is_empty();
        for pid in &victims {
            hit &= signal(*pid, cell.signal).is_ok();
        }
        if cell.signal == Signal::STOP {
            self.outwait(cell, &watch, &run, &victims)?;
        }
        if cell.victim == Victim::Both && !victims.is_empty() {
            await_dead(&victims)?;
            let first = recover(self.lab, &self.guest)?;
            let second = recover(self.lab, &self.guest)?;
            assert_eq!(
                second,
                "",
                "recover is not idempotent: it said {first:?} before; {victims:?} of {:?}, {:?}",
                self.family.all(),
                undo_files(&self.guest)
                    .iter()
                    .map(|file| fs::read_to_string(Path::new(UNDO).join(file)))
                    .collect::<Vec<_>>()
            );
            assert_eq!(self.guest.status()?, "running", "after recover");
        }
        let ended = run.end()?;
        let refused = ended.is_refused();
        let came = match came {
            Err(_) if refused || ended.is_late() => false,
            other => other.map(|()| true)?,
        };
        self.family.await_gone()?;
        let seen = watch.end()?;
        // The promise of both killed is `recover`'s.
        if (cell.victim, cell.hold) != (Victim::Both, Hold::Stop) {
            self.in_time(seen)?;
        }
        let left = match refused {
            true if names(&out)?.is_empty() => Left::Nothing,
            _ => self.judge(cell, &out, &ended)?,
        };
        self.assert_clean()?;
        fs::remove_dir_all(&out)?;
        if refused {
            println!("         void: refused, {}", ended.done("reason"));
            sleep(Duration::from_millis(500));
        }
        // The holds of `track` are too short to be met each time.
        let aimed = at.aimed && self.method == Method::Freeze && cell.victim != Victim::Seal;
        let counts = hit && came && !refused && (inside || !aimed);
        Ok(counts.then_some(Moment { inside, seen, left }))
    }

    /// Fails when the guest was held beyond what is promised.
    fn in_time(&self, seen: Seen) -> Result<()> {
        if seen.longest <= self.pace.budget + self.pace.promised + seen.late {
            return Ok(());
        }
        Err(failed(format_args!("held too long for {:?}: {seen:?}", self.pace.budget)))
    }

    /// Processes were stopped: the guest is let go all the same, or by `recover`. Then they are
    /// ended, if they still hang.
    fn outwait(&self, cell: Cell, watch: &Watch, run: &Running, victims: &[u32]) -> Result<()> {
        let struck = Instant::now();
        let alone = match cell.victim {
            // Nothing is held any more.
            Victim::Seal => struck + PROMISED,
            _ => struck + self.pace.budget + self.pace.promised * 2,
        };
        while Instant::now() < alone && !proc::command_line(run.pid()).is_empty() {
            sleep(Duration::from_millis(2));
        }
        // Nobody is left who would let it go.
        if watch.held() && victims.len() == 2 {
            sleep((struck + self.pace.budget + OVERDUE).saturating_duration_since(Instant::now()));
            let said = recover(self.lab, &self.guest)?;
            assert!(said.contains("were ended") && !watch.held_now()?, "{said}");
        }
        for pid in victims {
            // Gone is as well.
            let _ = signal(*pid, Signal::KILL);
        }
        Ok(())
    }

    /// What is left must be what it looks like.
    fn judge(&self, cell: Cell, out: &Path, ended: &Ended) -> Result<Left> {
        let done = ended.done("exit");
        let code = ended.status.code();
        let bad = |what: &str| {
            let Ended { status, events, stderr, .. } = ended;
            Err(failed(format_args!("{what}: ended with {status}; {events:?}; {stderr}")))
        };
        match (cell.victim, code) {
            // Another one does its work. A machine that is busy just then can lose the guardian too,
            // and the record says so.
            (Victim::Seal, Some(0 | 3)) | (Victim::Guardian, Some(0 | 1 | 3 | 4)) => {}
            // Without it there is no hold: none yet, or one that did not last.
            (Victim::Holder, Some(0 | 1 | 3)) => {}
            (Victim::Capture | Victim::Both, None | Some(0)) => {}
            // The machine was too slow for the hold: the blow came after it, or met whom it does not
            // matter for.
            (_, Some(1 | 3)) if ended.is_late() => {}
            _ => return bad("an end that is none"),
        }
        let names = names(out)?;
        let [name] = &*names else {
            return if names.is_empty() { Ok(Left::Nothing) } else { bad("more than one exhibit") };
        };
        let dir = out.join(name);
        let verdict = verify(self.lab, &dir)?;
        if name.ends_with(".partial") {
            let passes = verdict == Some(0) || matches!(code, Some(0 | 3));
            return if passes { bad("a partial exhibit passes") } else { Ok(Left::Partial) };
        }
        let manifest: Value = serde_json::from_slice(&fs::read(dir.join("manifest.json"))?)?;
        let fits = match verdict {
            Some(0) => manifest["status"] == "complete",
            Some(3) => code == Some(3),
            _ => false,
        };
        // Killed between the new name and the last word, it said nothing.
        let said = done == json!(verdict) || code.is_none();
        let lasted = manifest["hold"]["lasted"] == true && manifest["disturbances"] == json!([]);
        let true_class = (manifest["class"] == self.method.class()) <= lasted;
        match fits && said && true_class {
            true => Ok(Left::Whole),
            false => bad(&format!("verify says {verdict:?} of {name}: {}", manifest["hold"])),
        }
    }
}

/// Blows of one kind at `count` moments for each kind of hold; prints what they showed.
fn blows(subject: &mut Subject<'_>, signal: Signal, victim: Victim, count: u32) -> Result<()> {
    let (mut inside, mut all) = (0, 0);
    let by_ptrace = victim == Victim::Holder || subject.method == Method::Track;
    let holds = if by_ptrace { &Hold::BOTH[..1] } else { &Hold::BOTH[..] };
    for &hold in holds {
        let cell = Cell { signal, victim, hold };
        let whole = subject.whole(hold).doing(format_args!("undisturbed, {hold:?}"))?;
        let mut moments = Vec::new();
        // A blow into the void is none, and a busy machine refuses some runs.
        for n in 0..count * 4 + 20 {
            let number = u32::try_from(moments.len())?;
            if number == count {
                break;
            }
            let at = At::new(number, count, n);
            let struck = subject.moment(cell, whole, at).doing(format_args!("{cell:?}, {at:?}"))?;
            moments.extend(struck);
        }
        assert_eq!(moments.len(), usize::try_from(count)?, "too many blows hit nobody");
        let hit = moments.iter().filter(|moment| moment.inside).count();
        let left = |what| moments.iter().filter(|moment| moment.left == what).count();
        let worst = moments.iter().map(|moment| moment.seen.longest).max().unwrap_or_default();
        let late = moments.iter().map(|moment| moment.seen.late).max().unwrap_or_default();
        println!(
            "         {} {signal:?} {victim:?} {}: {count} moments, {hit} inside the hold; held {:.0} ms \
             at most of {} (undisturbed {:.0}, watcher late by {:.0}); whole {}, partial {}, none {}",
            subject.method.word(),
            hold.word(),
            worst.as_secs_f64() * 1e3,
            subject.pace.budget.as_millis(),
            whole.held.as_secs_f64() * 1e3,
            late.as_secs_f64() * 1e3,
            left(Left::Whole),
            left(Left::Partial),
            left(Left::Nothing),
        );
        (inside, all) = (inside + hit, all + moments.len());
    }
    // The holds of `track` are a small part of a run, and the first of several.
    let aimed = subject.method == Method::Freeze && victim != Victim::Seal;
    if aimed && inside * 100 < all * 30 {
        return Err(failed(format_args!("void: {inside} of {all} blows fell inside a hold")));
    }
    Ok(())
}

/// Half of them for each kind of hold.
fn moments(lab: &Lab, signal: Signal, victim: Victim) -> Result<()> {
    let mut subject = Subject::boot(lab)?;
    blows(&mut subject, signal, victim, lab.scale(3, 150))?;
    subject.guest.finish()
}

fn sigkill_of_capture(lab: &Lab) -> Result<()> {
    moments(lab, Signal::KILL, Victim::Capture)
}

fn sigkill_of_guardian(lab: &Lab) -> Result<()> {
    moments(lab, Signal::KILL, Victim::Guardian)
}

fn sigkill_of_both(lab: &Lab) -> Result<()> {
    moments(lab, Signal::KILL, Victim::Both)
}

fn sigkill_of_holder(lab: &Lab) -> Result<()> {
    moments(lab, Signal::KILL, Victim::Holder)
}

fn sigkill_of_seal(lab: &Lab) -> Result<()> {
    moments(lab, Signal::KILL, Victim::Seal)
}

fn sigstop_of_capture(lab: &Lab) -> Result<()> {
    moments(lab, Signal::STOP, Victim::Capture)
}

fn sigstop_of_guardian(lab: &Lab) -> Result<()> {
    moments(lab, Signal::STOP, Victim::Guardian)
}

fn sigstop_of_both(lab: &Lab) -> Result<()> {
    moments(lab, Signal::STOP, Victim::Both)
}

fn sigstop_of_holder(lab: &Lab) -> Result<()> {
    moments(lab, Signal::STOP, Victim::Holder)
}

fn sigstop_of_seal(lab: &Lab) -> Result<()> {
    moments(lab, Signal::STOP, Victim::Seal)
}

/// Whether the last line of an undo file takes back what was announced before.
fn says_free(text: &str) -> bool {
    text.lines().last().is_some_and(|line| line.contains("\"at\":\"free\""))
}

impl Subject<'_> {
    /// Hits the guardian as soon as it has announced `stop`; `false` when the hold was over by then.
    fn hit_as_it_stops(&self, how: Signal) -> Result<bool> {
        let Some(guardian) = self.family.with("@guardian") else { return Ok(false) };
        let file = match &*undo_files(&self.guest) {
            [] => return Ok(false),
            [file] => Path::new(UNDO).join(file),
            files => return Err(failed(format_args!("undo files {files:?}"))),
        };
        let until = Instant::now() + SOMETIME;
        while Instant::now() < until {
            let Ok(text) = fs::read_to_string(&file) else { return Ok(false) };
            if text.contains("\"at\":\"stop\"") {
                return Ok(!says_free(&text) && signal(guardian, how).is_ok());
            }
        }
        Err(failed("`stop` was never announced"))
    }

    /// A run whose guardian is hit as it stops the guest, and its exit code.
    fn moment_of_stop(&self, out: &Path, how: Signal) -> Result<(Seen, Option<i32>)> {
        let watch = Watch::start(self, Hold::Stop)?.with_starts(self.lab)?;
        let run = self.begun(out, Hold::Stop)?;
        let hit = self.hit_as_it_stops(how)?;
        let ended = run.end()?;
        let seen = watch.end()?;
        self.in_time(seen).doing(format_args!("{how:?} as it stops, {:?}", ended.events))?;
        let cell = Cell { signal: how, victim: Victim::Guardian, hold: Hold::Stop };
        self.judge(cell, out, &ended)?;
        if !hit {
            return Err(too_slow("the hold was over before the blow"));
        }
        Ok((seen, ended.status.code()))
    }
}

/// The moment at which `stop` is announced and perhaps sent, but not answered yet: what is left of
/// the guardian then is only the file.
fn the_guardian_as_it_stops_the_guest(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab)?;
    let (mut worst, mut ends) = (Seen::default(), Vec::new());
    for n in 0..lab.scale(10, 100) {
        let how = if n % 4 == 3 { Signal::KILL } else { Signal::STOP };
        let moment = |subject: &mut Subject<'_>, out: &Path| subject.moment_of_stop(out, how);
        let (seen, code) = subject.patiently("out", moment)?;
        subject.assert_clean()?;
        if seen.longest > worst.longest {
            worst = seen;
        }
        ends.push(code.unwrap_or(-1));
    }
    println!("         worst {worst:?} of {:?}; ended with {ends:?}", subject.pace.budget);
    subject.guest.finish()
}

/// Some of all that, on Debian's own kernel.
fn kills_around_a_kvm_guest(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab)?;
    let signals = [Signal::KILL, Signal::STOP];
    for &signal in &signals[..lab.scale(1, 2)] {
        for victim in [Victim::Capture, Victim::Guardian, Victim::Both] {
            blows(&mut subject, signal, victim, lab.scale(1, 10))?;
        }
    }
    subject.guest.finish()
}

/// Blows to each of the processes of `track`, which holds the guest several times; in the short form
/// to those that have something to undo.
fn tracked(lab: &Lab, signal: Signal) -> Result<()> {
    let victims = [Victim::Capture, Victim::Guardian, Victim::Holder, Victim::Both, Victim::Seal];
    let mut subject = Subject::boot(lab)?;
    subject.method = Method::Track;
    for victim in &victims[..lab.scale(3, victims.len())] {
        blows(&mut subject, signal, *victim, lab.scale(1, 60))?;
    }
    subject.guest.finish()
}

fn sigkill_of_track(lab: &Lab) -> Result<()> {
    tracked(lab, Signal::KILL)
}

fn sigstop_of_track(lab: &Lab) -> Result<()> {
    if !lab.full {
        return Err(skipped("a blow takes ten seconds: only in a full run"));
    }
    tracked(lab, Signal::STOP)
}
