//! Runs lab tests one after the other and says of each: passed, failed, or skipped and why.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::error::{Doing, Failure, Result, failed, skipped, timed_out};
use crate::guest::{Builder, fresh_dir};
use crate::kit::Kit;
use crate::outer::Outer;

/// Where a test runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On this machine.
    Here,
    /// In the outer guest, on Debian's own kernel with a real KVM.
    Outer,
}

/// One lab test: a name, a place, a function. Made by [`crate::here!`] and [`crate::outer!`].
#[derive(Debug, Clone, Copy)]
pub struct Test {
    /// Path of the function, crate and all.
    pub path: &'static str,
    /// Where it runs.
    pub place: Place,
    /// The test.
    pub run: fn(&Lab) -> Result<()>,
}

impl Test {
    /// `suite::function`.
    pub fn name(&self) -> &'static str {
        self.path.split_once("::tests::").map_or(self.path, |(_, name)| name)
    }
}

/// Tests that run on this machine: `pub const TESTS: &[Test] = here![one, two];`
#[macro_export]
macro_rules! here {
    ($($test:ident),* $(,)?) => { $crate::tests!(Here: $($test),*) };
}

/// Tests that run in the outer guest.
#[macro_export]
macro_rules! outer {
    ($($test:ident),* $(,)?) => { $crate::tests!(Outer: $($test),*) };
}

/// What [`here!`] and [`outer!`] have in common.
#[doc(hidden)]
#[macro_export]
macro_rules! tests {
    ($place:ident: $($test:ident),*) => {
        &[$($crate::runner::Test {
            path: concat!(module_path!(), "::", stringify!($test)),
            place: $crate::runner::Place::$place,
            run: $test,
        }),*]
    };
}

/// Name of the program in `lab/at-hold`.
const AT_HOLD: &str = "stillframe-at-hold";

/// What a test gets: guests, the tool, a scratch directory, the scale of the run.
#[derive(Debug)]
pub struct Lab {
    /// Kernel, QEMUs, images.
    pub kit: Kit,
    /// Whether this is a full run.
    pub full: bool,
    tool: Option<PathBuf>,
    scratch: PathBuf,
}

impl Lab {
    /// A lab over the cache, for use outside the runner. `STILLFRAME_TOOL` names the tool;
    /// `STILLFRAME_LAB_FULL=1` makes the run a full one.
    pub fn open() -> Result<Self> {
        Ok(Self {
            kit: Kit::open()?,
            full: std::env::var_os("STILLFRAME_LAB_FULL").is_some_and(|v| v == "1"),
            tool: std::env::var_os("STILLFRAME_TOOL").map(PathBuf::from),
            scratch: fresh_dir("scratch")?,
        })
    }

    /// A guest to be set up and booted.
    pub fn guest(&self) -> Builder {
        Builder::new(self.kit.clone())
    }

    /// `ci` in the ordinary run, `full` in a full one.
    pub fn scale<T>(&self, ci: T, full: T) -> T {
        if self.full { full } else { ci }
    }

    /// Ends a test here unless this is a full run: for what takes long and is held by others in part.
    pub fn only_when_full(&self) -> Result<()> {
        if self.full { Ok(()) } else { Err(skipped("takes long: only in a full run")) }
    }

    /// A directory for what the test makes; emptied after each test.
    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    /// The tool with these arguments, not yet started.
    pub fn tool_command<I, S>(&self, args: I) -> Result<Command>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let tool = self.tool.as_ref().ok_or_else(|| failed("STILLFRAME_TOOL names no binary"))?;
        let mut command = Command::new(tool);
        command.args(args);
        Ok(command)
    }

    /// Runs the tool to its end, five minutes at most.
    pub fn tool<I, S>(&self, args: I) -> Result<Finished>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        finish(self.tool_command(args)?, Duration::from_secs(300))
    }

    /// The program that lets the lab look while the guest is held (lab/at-hold). It lies beside the
    /// tool.
    pub fn at_hold_command(&self) -> Result<Command> {
        let tool = self.tool.as_ref().ok_or_else(|| failed("STILLFRAME_TOOL names no binary"))?;
        Ok(Command::new(tool.with_file_name(AT_HOLD)))
    }

    fn clean(&self) -> Result<()> {
        let _ = fs::remove_dir_all(&self.scratch);
        Ok(fs::create_dir(&self.scratch)?)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.scratch);
    }
}

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// Command line, for messages.
    pub line: String,
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
}

impl Finished {
    /// Fails unless the exit code is this one; the message carries stderr.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        if self.status.code() == Some(code) {
            return Ok(self);
        }
        let (line, status) = (&self.line, self.status);
        let (stdout, stderr) = (self.stdout.trim_end(), self.stderr.trim_end());
        Err(failed(format_args!("`{line}` ended with {status}, not {code}: {stderr} {stdout}")))
    }
}

/// Runs any command to its end with a deadline, then kills it.
pub fn finish(mut command: Command, patience: Duration) -> Result<Finished> {
    let start = Instant::now();
    let words: Vec<OsString> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_owned)
        .collect();
    let line = words.iter().map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().doing(format_args!("starting `{line}`"))?;
    let (stdout, stderr) = (drain(child.stdout.take()), drain(child.stderr.take()));
    let status = wait(&mut child, patience).doing(format_args!("`{line}`"))?;
    let text = |reader: std::thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
    };
    Ok(Finished { line, status, stdout: text(stdout), stderr: text(stderr), took: start.elapsed() })
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// Waits for a child; past the deadline it is killed.
pub fn wait(child: &mut Child, patience: Duration) -> Result<ExitStatus> {
    let until = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() > until {
            child.kill()?;
            child.wait()?;
            return Err(timed_out("still running", patience));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How many tests ended how.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Tests that passed.
    pub passed: u32,
    /// Tests that failed.
    pub failed: u32,
    /// Tests that were not run, each with its reason printed.
    pub skipped: u32,
}

impl Tally {
    /// Counts another tally in.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Reads the closing line of a run.
    pub fn parse(line: &str) -> Option<Self> {
        let mut counts = line.split(", ").zip([" passed", " failed", " skipped"]);
        let mut next =
            || counts.next().and_then(|(part, what)| part.strip_suffix(what)?.parse().ok());
        Some(Self { passed: next()?, failed: next()?, skipped: next()? })
    }

    /// Reads a line that [`Tally::record`] printed: the test's name, and itself alone.
    fn of_line(line: &str) -> Option<(String, Self)> {
        let mut words = line.split_whitespace();
        let mut tally = Self::default();
        *match words.next()? {
            "passed" => &mut tally.passed,
            "FAILED" => &mut tally.failed,
            "skipped" => &mut tally.skipped,
            _ => return None,
        } = 1;
        words.next()?.parse::<f64>().ok()?;
        words.next().filter(|unit| *unit == "s")?;
        Some((words.next()?.trim_end_matches(':').to_owned(), tally))
    }

    /// Counts one result and prints its line on stdout.
    pub fn record(&mut self, name: &str, outcome: &Result<()>, took: Duration) {
        let took = took.as_secs_f64();
        match outcome {
            Ok(()) => {
                self.passed += 1;
                println!("passed   {took:7.1} s  {name}");
            }
            Err(Failure::Failed(why)) => {
                self.failed += 1;
                println!("FAILED   {took:7.1} s  {name}: {why}");
            }
            Err(Failure::Skipped(why)) => {
                self.skipped += 1;
                println!("skipped  {took:7.1} s  {name}: {why}");
            }
        }
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { passed, failed, skipped } = self;
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")
    }
}

/// Runs tests one after the other on this machine and prints a line for each.
pub fn run_here(lab: &Lab, tests: &[Test]) -> Tally {
    let mut tally = Tally::default();
    for test in tests {
        let start = Instant::now();
        let outcome = lab.clean().and_then(|()| run_one(lab, test));
        tally.record(test.name(), &outcome, start.elapsed());
    }
    tally
}

/// Stands before the closing line of the outer guest's part: that line is not the run's.
pub const INSIDE: &str = "         in the outer guest ";

/// Longest time between two lines of the outer guest: for a test of the short form, and for a long one.
const SILENCE: [Duration; 2] = [Duration::from_secs(300), Duration::from_secs(3600)];

/// How often the outer guest is started for tests that it did not come to because it got stuck.
const OUTERS: u32 = 3;

/// Boots the outer guest, runs tests in it with this same binary, and counts what it says.
pub fn run_outer(lab: &Lab, tests: &[Test]) -> Tally {
    let (mut tally, mut left) = (Tally::default(), tests.to_vec());
    let start = Instant::now();
    for outer in 1..=OUTERS {
        if left.is_empty() {
            break;
        }
        match in_outer(lab, &left) {
            Ok(Inside::All(inside)) => {
                tally.add(inside);
                left.clear();
            }
            Ok(Inside::Stuck(done)) if outer < OUTERS => {
                println!(
                    "         the outer guest got stuck, panicked or reset itself: it is started again, for \
                     what was not run, and for what failed last"
                );
                // What failed before another test passed has failed. Only behind the last that passed may it
                // have been the machine that was lost.
                let sure = done.iter().rposition(|(_, outcome)| outcome.passed == 1);
                for (name, outcome) in done.into_iter().take(sure.map_or(0, |last| last + 1)) {
                    tally.add(outcome);
                    left.retain(|test| test.name() != name);
                }
            }
            Ok(Inside::Stuck(_)) => {
                let stuck = Err(failed("its kernel gets stuck or panics every time"));
                tally.record("outer guest", &stuck, start.elapsed());
                return tally;
            }
            Err(e) => {
                tally.record("outer guest", &Err(e), start.elapsed());
                return tally;
            }
        }
    }
    if !tests.is_empty() {
        println!("         the outer guest took {:.1} s in all", start.elapsed().as_secs_f64());
    }
    tally
}

/// What came of tests in the outer guest.
enum Inside {
    /// All of them were run.
    All(Tally),
    /// These were, by their names; then it got stuck.
    Stuck(Vec<(String, Tally)>),
}

fn in_outer(lab: &Lab, tests: &[Test]) -> Result<Inside> {
    let own = std::env::current_exe().doing("finding this program")?;
    let mut outer = Outer::new(&lab.kit).echo().file("job/stillframe-lab", &own);
    if lab.full {
        // A guest of 3 GiB, its image in the RAM store, and the exhibit.
        outer = outer.memory_mib(12 << 10);
    }
    outer = outer.file("lab/ring/ring.bin", &lab.kit.ring());
    let mut script = String::new();
    if let Some(tool) = &lab.tool {
        outer = outer.file("job/stillframe", tool);
        let at_hold = tool.with_file_name(AT_HOLD);
        if at_hold.exists() {
            outer = outer.file(&format!("job/{AT_HOLD}"), &at_hold);
        }
        script.push_str("export STILLFRAME_TOOL=/job/stillframe\n");
    }
    let (full, silence) = if lab.full { ("--full", SILENCE[1]) } else { ("", SILENCE[0]) };
    let names = tests.iter().map(Test::name).collect::<Vec<_>>().join(" ");
    script.push_str(&format!("exec /job/stillframe-lab --inside {full} {names}\n"));
    let output = outer.run(&script, silence)?;
    if output.status.is_none() {
        return Ok(Inside::Stuck(output.text.lines().filter_map(Tally::of_line).collect()));
    }
    let last = output.text.lines().last().and_then(|line| Tally::parse(line.strip_prefix(INSIDE)?));
    let tally = last.ok_or_else(|| {
        let lines: Vec<&str> = output.text.lines().rev().take(5).collect();
        failed(format_args!("no closing line but {lines:?}"))
    })?;
    let counted = tally.passed + tally.failed + tally.skipped;
    match u32::try_from(tests.len()) {
        Ok(asked) if asked == counted => Ok(Inside::All(tally)),
        _ => Err(failed(format_args!("{} tests asked for, {counted} were run", tests.len()))),
    }
}

/// Runs one test; a panic, as of `assert_eq!`, is a failure.
fn run_one(lab: &Lab, test: &Test) -> Result<()> {
    catch_unwind(AssertUnwindSafe(|| (test.run)(lab))).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        Err(failed(format_args!("panicked: {}", text.unwrap_or("no message"))))
    })
}

#[cfg(test)]
mod tests {
    use super::Tally;

    #[test]
    fn a_closing_line_is_read_back() {
        let tally = Tally { passed: 12, failed: 1, skipped: 3 };
        assert_eq!(Tally::parse(&tally.to_string()), Some(tally));
        assert_eq!(Tally::parse("12 passed, 1 failed"), None);
    }

    #[test]
    fn a_tests_line_is_read_back() {
        let one =
            |line| Tally::of_line(line).map(|(name, t)| (name, t.passed, t.failed, t.skipped));
        let name = "holds::a_stuck_thread".to_owned();
        let line = "passed      18.0 s  holds::a_stuck_thread";
        assert_eq!(one(line), Some((name.clone(), 1, 0, 0)));
        let line = "FAILED     118.0 s  holds::a_stuck_thread: held: 3 s";
        assert_eq!(one(line), Some((name.clone(), 0, 1, 0)));
        let line = "skipped      0.0 s  holds::a_stuck_thread: takes minutes";
        assert_eq!(one(line), Some((name, 0, 0, 1)));
        assert_eq!(one("passed by"), None);
        assert_eq!(one("         held for 3 s"), None);
    }
}
