//! What else happens to a run: its terminal, a second run, `recover` beside it; and what its
//! processes could do if somebody had them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::terminal::{self, Place, Terminal};
use lab::{Doing, Lab, Result, failed, here, proc, runner};
use rustix::process::Signal;
use serde_json::Value;

use super::super::run::{
    Running, SOMETIME, UNDO, acquire, await_dead, begin, kill, names, new_dir, recover, signal,
    too_slow, undo_files,
};
use super::{Hold, Seen, Subject, Watch, says_free, tries};

pub(crate) const TESTS: &[runner::Test] = here![
    a_closed_terminal_ends_nothing,
    ctrl_z_stops_nothing,
    ctrl_c_twice_lets_the_guest_go_first,
    ctrl_s_holds_nothing_up,
    one_acquirer_a_vm,
    recover_leaves_a_run_alone,
    recover_says_nothing_when_there_is_nothing,
    recover_after_qemu,
    nobody_has_more_rights_than_it_needs,
];

/// A run on a terminal, and whoever watches its guest.
struct Typed {
    terminal: Terminal,
    run: Running,
    watch: Watch,
}

impl Subject<'_> {
    fn on_terminal(&self, out: &Path, hold: Hold, place: Place) -> Result<Typed> {
        let terminal = Terminal::open()?;
        let watch = Watch::start(self, hold)?;
        let start = || Running::start_on(terminal.command(&self.acquire(out, hold)?, place)?);
        Ok(Typed { run: begin(start)?, terminal, watch })
    }

    /// The one exhibit in `out` is complete and `verify` finds it so.
    fn assert_whole(&self, out: &Path) -> Result<()> {
        self.lab.tool([Path::new("verify"), &only(out)?])?.expect_code(0).map(drop)
    }
}

/// The one exhibit in `out`.
fn only(out: &Path) -> Result<PathBuf> {
    match &*names(out)? {
        [name] => Ok(out.join(name)),
        names => Err(failed(format_args!("not one exhibit but {names:?}"))),
    }
}

/// The manifest of an exhibit, as far as there is one yet.
fn manifest(exhibit: &Path) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(exhibit.join("manifest.json"))?)?)
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn told(what: &str, hold: Hold, seen: Seen) {
    let (held, late) = (millis(seen.longest), millis(seen.late));
    println!("         {what}, {}: held {held:.0} ms, watcher late by {late:.0}", hold.word());
}

/// Each way of living on a terminal with each kind of hold.
fn each(
    lab: &Lab,
    places: &[Place],
    test: impl Fn(&mut Subject<'_>, &Path, Hold, Place) -> Result<Seen>,
) -> Result<()> {
    let mut subject = Subject::boot(lab)?;
    for hold in Hold::BOTH {
        for place in places {
            let what = format!("{place:?}, {}", hold.word());
            let one = |subject: &mut Subject<'_>, out: &Path| {
                let seen = test(subject, out, hold, *place)?;
                told(&format!("{place:?}"), hold, seen);
                let tries = tries(&manifest(&only(out)?)?);
                assert!((1..=tries).contains(&seen.holds), "{what}: {seen:?}");
                subject.in_time(seen)
            };
            subject.patiently("out", one).doing(&what)?;
            subject.assert_clean().doing(what)?;
        }
    }
    subject.guest.finish()
}

fn a_closed_terminal_ends_nothing(lab: &Lab) -> Result<()> {
    each(lab, &[Place::Leader, Place::Job], |subject, out, hold, place| {
        let Typed { terminal, mut run, watch } = subject.on_terminal(out, hold, place)?;
        run.until(|event| event["event"] == "held")?;
        drop(terminal);
        let ended = run.end()?;
        ended.expect_said(0)?;
        // How a shell ends that has lost its terminal is its own affair.
        assert!(place == Place::Job || ended.status.code() == Some(0), "{:?}", ended.status);
        subject.assert_whole(out)?;
        watch.end()
    })
}

fn ctrl_z_stops_nothing(lab: &Lab) -> Result<()> {
    // The control: it does stop a program that allows it.
    let control = Terminal::open()?;
    let mut sleeper = Command::new("sleep");
    sleeper.arg("61.75");
    let mut shell = control.command(&sleeper, Place::Job)?.stdout(Stdio::null()).spawn()?;
    let sleeping = || {
        proc::with_argument("61.75")
            .into_iter()
            .find(|p| proc::command_line(*p).starts_with("sleep"))
    };
    let pid = until(SOMETIME, sleeping)?;
    control.press(terminal::SUSPEND)?;
    let stopped = || proc::thread_states(pid).is_ok_and(|states| states == ['T']).then_some(());
    // A shell whose job stops takes that for its end, and what it leaves is ended by the kernel.
    let gone = || (!Path::new(&format!("/proc/{pid}")).exists()).then_some(());
    until(SOMETIME, || stopped().or_else(gone)).doing("Ctrl-Z did nothing")?;
    drop(control);
    shell.wait()?;
    each(lab, &[Place::Job], |subject, out, hold, place| {
        let Typed { terminal, mut run, watch } = subject.on_terminal(out, hold, place)?;
        run.until(|event| event["event"] == "held")?;
        terminal.press(terminal::SUSPEND)?;
        run.end()?.expect(0)?;
        subject.assert_whole(out)?;
        watch.end()
    })
}

/// Waits until `what` gives something.
fn until<T>(patience: Duration, what: impl Fn() -> Option<T>) -> Result<T> {
    let end = Instant::now() + patience;
    while Instant::now() < end {
        if let Some(found) = what() {
            return Ok(found);
        }
        sleep(Duration::from_millis(2));
    }
    Err(failed(format_args!("nothing within {patience:?}")))
}

fn ctrl_c_twice_lets_the_guest_go_first(lab: &Lab) -> Result<()> {
    each(lab, &[Place::Leader, Place::Job], |subject, out, hold, place| {
        let Typed { terminal, mut run, watch } = subject.on_terminal(out, hold, place)?;
        run.until(|event| event["event"] == "held")?;
        let held = Instant::now();
        sleep(Duration::from_millis(60));
        terminal.press(terminal::INTERRUPT)?;
        sleep(Duration::from_millis(40));
        terminal.press(terminal::INTERRUPT)?;
        run.until(|event| event["event"] == "released")?;
        assert!(!watch.held_now()?, "released after {:?}", held.elapsed());
        let ended = run.end()?.expect(130)?;
        assert!(ended.partial(subject.lab, "partial")?.contains("interrupted"));
        let seen = watch.end()?;
        // Not at the end of the pass, which takes more than three times as long.
        assert!(seen.longest < Duration::from_millis(200) + seen.late, "{seen:?}");
        Ok(seen)
    })
}

/// Whether what the one run left in `out` has its name for good. That of a partial exhibit is the
/// name of one that is not ready yet: its manifest tells them apart.
fn is_settled(out: &Path) -> bool {
    let partial = |name: &str| manifest(&out.join(name)).is_ok_and(|m| m["status"] != "complete");
    let all = names(out).unwrap_or_default();
    all.iter().any(|name| !name.ends_with(".partial") || partial(name))
}

/// Output is stopped before the hold, and in it.
fn ctrl_s_holds_nothing_up(lab: &Lab) -> Result<()> {
    for when in ["plan", "held"] {
        each(lab, &[Place::Job], |subject, out, hold, place| {
            let Typed { terminal, mut run, watch } = subject.on_terminal(out, hold, place)?;
            if when == "held" {
                run.until(|event| event["event"] == "held")?;
            }
            terminal.press(terminal::HALT)?;
            // It is over by then, and the last word not said: nobody could read it.
            until(SOMETIME, || is_settled(out).then_some(())).doing("not over")?;
            assert!(run.runs()? && !watch.held_now()?, "Ctrl-S stopped no output, or the guest");
            let whole = subject.assert_whole(out).doing("while output is stopped");
            let shown = terminal.screen().len();
            terminal.press(terminal::GO_ON)?;
            // The machine may have been too slow for a whole one.
            run.end()?.expect(0)?;
            whole?;
            // Whoever reads the terminal may be late.
            until(SOMETIME, || (terminal.screen().len() > shown).then_some(()))
                .doing(format_args!("nothing more on {:?}", terminal.screen()))?;
            watch.end()
        })
        .doing(format_args!("Ctrl-S at `{when}`"))?;
    }
    Ok(())
}

fn one_acquirer_a_vm(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab)?;
    let vm = subject.guest.pid().to_string();
    let (slow, second) = (new_dir(lab, "slow")?, new_dir(lab, "second")?);
    let begin = || -> Result<Running> {
        let mut run = Running::start(acquire(lab, &vm, &slow, &["--max-rate", "100M"])?)?;
        run.until_in_pass(1)?;
        Ok(run)
    };
    let refused = |first: &Running| -> Result<()> {
        for hold in Hold::BOTH {
            let ended = Running::start(subject.acquire(&second, hold)?)?.end()?.expect(4)?;
            ended.says(&["another acquisition", &format!("process {}", first.pid())])?;
            assert_eq!(names(&second)?, [""; 0]);
        }
        Ok(())
    };
    let first = begin()?;
    refused(&first)?;
    first.end()?.expect(0)?.complete(lab)?;
    let first = begin()?;
    refused(&first)?;
    first.signal(Signal::KILL)?;
    first.end()?;
    subject.family.await_gone()?;
    for hold in Hold::BOTH {
        subject.whole(hold)?;
    }
    subject.assert_clean()?;
    subject.guest.finish()
}

/// As from cron, more often than cron would.
fn recover_leaves_a_run_alone(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab)?;
    for hold in Hold::BOTH {
        subject.patiently(hold.word(), |subject, out| run_beside_recover(subject, out, hold))?;
        subject.assert_clean()?;
    }
    subject.guest.finish()
}

/// What `recover` says when it does nothing.
const IDLE: [&str; 2] = ["an acquisition is at work", "nothing was held"];

fn run_beside_recover(subject: &Subject<'_>, out: &Path, hold: Hold) -> Result<()> {
    let (lab, mut run) = (subject.lab, subject.begun(out, hold)?);
    let (mut busy, vm) = (0, format!("(PID {})", subject.guest.pid()));
    while run.runs()? {
        let said = lab.tool(["recover"])?.expect_code(0)?.stdout;
        busy += u32::from(said.contains("at work"));
        // A run that it disturbed must not pass for one that the machine was too slow for.
        let idle = |line: &str| IDLE.iter().any(|words| line.contains(words));
        let all = said.lines().filter(|line| line.contains(&vm)).all(idle);
        assert!(all, "recover did something: {said}");
    }
    let manifest = run.end()?.expect(0)?.complete(lab)?;
    assert_eq!(manifest["class"], "instantaneous");
    if busy > 3 {
        return Ok(());
    }
    Err(too_slow(format_args!("recover saw the run {busy} times")))
}

fn recover_says_nothing_when_there_is_nothing(lab: &Lab) -> Result<()> {
    for args in [&["recover"][..], &["recover", "--json"], &["recover", "no-such-vm"]] {
        let done = lab.tool(args)?.expect_code(0)?;
        assert_eq!((done.stdout, done.stderr), (String::new(), String::new()), "{args:?}");
    }
    Ok(())
}

fn recover_after_qemu(lab: &Lab) -> Result<()> {
    for hold in Hold::BOTH {
        let mut subject = Subject::boot(lab)?;
        subject.patiently(hold.word(), |subject, out| end_in_hold(subject, out, hold))?;
        kill(&subject.guest)?;
        await_dead(&[subject.guest.pid()])?;
        assert_eq!(undo_files(&subject.guest).len(), 1);
        let said = recover(subject.lab, &subject.guest)?;
        assert!(
            said.contains(if hold == Hold::Stop { "is gone" } else { "let them go" }),
            "{said}"
        );
        assert_eq!(
            (undo_files(&subject.guest), recover(subject.lab, &subject.guest)?),
            (vec![], String::new())
        );
        // The lab's own sockets are as new.
        fs::remove_file(&subject.monitor)?;
    }
    Ok(())
}

/// Ends a run and its guardian while they hold the guest.
fn end_in_hold(subject: &Subject<'_>, out: &Path, hold: Hold) -> Result<()> {
    let mut run = subject.begun(out, hold)?;
    run.until(|event| event["event"] == "held")?;
    let guardian = subject.family.with("@guardian").ok_or_else(|| too_slow("no guardian"))?;
    let both = [guardian, run.pid()];
    // Who is gone already has left nothing, as is seen below.
    both.iter().for_each(|pid| drop(signal(*pid, Signal::KILL)));
    run.end()?;
    await_dead(&both)?;
    let text = |file: &String| fs::read_to_string(Path::new(UNDO).join(file)).unwrap_or_default();
    if undo_files(&subject.guest).iter().any(|file| !says_free(&text(file))) {
        return Ok(());
    }
    Err(too_slow("the hold was over before the blow"))
}

/// One line of `/proc/PID/task/TID/status`, without its name.
fn line(status: &str, field: &str) -> String {
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What `/proc/PID/task/*/status` says of every thread.
fn statuses(pid: u32) -> Result<Vec<String>> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    tasks.map(|task| Ok(fs::read_to_string(task.path().join("status"))?)).collect()
}

/// What a process has open.
fn open_files(pid: u32) -> Result<BTreeSet<String>> {
    let fds = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    Ok(fds
        .filter_map(|fd| Some(fs::read_link(fd.path()).ok()?.to_string_lossy().into_owned()))
        .collect())
}

/// CAP_SYS_PTRACE (linux/capability.h).
const SYS_PTRACE: u64 = 1 << 19;

fn nobody_has_more_rights_than_it_needs(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab)?;
    // Enough to look at it while it works.
    subject.guest.sh("dd if=/dev/urandom of=/tmp/noise bs=1M count=16 2> /dev/null")?;
    for hold in Hold::BOTH {
        subject.patiently(hold.word(), |subject, out| has_no_more_rights(subject, out, hold))?;
        subject.assert_clean()?;
    }
    subject.guest.finish()
}

fn has_no_more_rights(subject: &Subject<'_>, out: &Path, hold: Hold) -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    let mut run = subject.begun(out, hold)?;
    run.until(|event| event["event"] == "held")?;
    let guardian = subject.family.with("@guardian").ok_or_else(|| too_slow("no guardian"))?;
    let of_guardian = statuses(guardian)?;
    let files = open_files(guardian)?;
    for status in &of_guardian {
        let said = ["NoNewPrivs", "Seccomp"].map(|field| line(status, field));
        assert_eq!(said, ["1", "2"], "{status}");
        for field in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            let set = u64::from_str_radix(&line(status, field), 16)?;
            assert_eq!(set & SYS_PTRACE, 0, "{field} of the guardian");
        }
    }
    let memory = |file: &String| file.contains("memfd") || file.contains("memory.");
    assert!(!files.iter().any(memory), "the guardian has {files:?}");

    run.until(|event| event["event"] == "released")?;
    let seal = until(SOMETIME, || subject.family.with("@seal"))?;
    // Its threads: one that listens, one that says it lives, those that work, and itself.
    let works = || {
        let states = proc::thread_states(seal).ok()?;
        (states.len() >= 4).then(|| signal(seal, Signal::STOP).ok()).flatten()
    };
    until(SOMETIME, works)?;
    let of_seal = statuses(seal)?;
    let files = open_files(seal)?;
    signal(seal, Signal::CONT)?;
    assert!(of_seal.len() >= 4, "{of_seal:?}");
    for status in &of_seal {
        let said = ["NoNewPrivs", "Seccomp", "CapEff", "CapPrm", "CapAmb"].map(|f| line(status, f));
        assert_eq!(said, ["1", "2", NONE, NONE, NONE], "{status}");
        if root {
            let ids = ["Uid", "Gid", "Groups"].map(|f| line(status, f));
            let nobody = ["65534"; 4].join(" ");
            assert_eq!(ids, [nobody.clone(), nobody, String::new()], "{status}");
        }
    }
    let expected = |file: &String| {
        ["socket:", "pipe:", "/memfd:stillframe"].iter().any(|start| file.starts_with(start))
            || file == "/dev/null"
            || (file.starts_with(&*out.to_string_lossy()) && file.ends_with("/memory.elf"))
    };
    assert!(files.iter().all(expected), "seal has {files:?}");
    let manifest = run.end()?.expect(0)?.complete(subject.lab)?;
    let record = |role: &str| -> Value {
        let all = manifest["processes"].as_array().cloned().unwrap_or_default();
        all.into_iter().find(|one| one["role"] == role).unwrap_or_default()
    };
    let whom = [("guardian", guardian, &of_guardian[0]), ("seal", seal, &of_seal[0])];
    for (role, pid, status) in whom {
        let record = record(role);
        let uid = line(status, "Uid").split(' ').next().unwrap_or_default().parse::<u64>()?;
        let capabilities = format!("{:#x}", u64::from_str_radix(&line(status, "CapEff"), 16)?);
        let said = (record["pid"].as_u64(), record["uid"].as_u64(), &record["no_new_privs"]);
        assert_eq!(said, (Some(u64::from(pid)), Some(uid), &Value::from(true)), "{record}");
        assert_eq!(record["capabilities"], capabilities, "{record}");
        assert!(record["seccomp"].as_str().is_some_and(|s| s.ends_with("-list")), "{record}");
    }
    Ok(())
}

/// No capability.
const NONE: &str = "0000000000000000";
