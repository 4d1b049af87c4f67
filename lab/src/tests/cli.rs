//! The command line: what it finds, what it says, how it ends, and that it does what flags and
//! signals ask.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use lab::{Backing, Doing, Guest, Lab, Result, Version, failed, here, proc, runner, skipped};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::exhibit::take;
use super::run::{Running, acquire, names, new_dir, refused};

pub(crate) const TESTS: &[runner::Test] = here![
    guests_are_found_by_name_uuid_and_pid,
    odd_names_do_no_harm,
    two_guests_of_one_name_need_a_pid,
    qemu_by_any_name_is_found,
    sigint_and_sigterm_leave_a_partial_record,
    a_second_signal_ends_the_sealing,
    sighup_and_closed_outputs_end_nothing,
    the_rate_is_not_exceeded,
    json_events_are_in_order_and_end_with_the_exit_code,
    the_bar_is_for_terminals,
    plan_changes_nothing,
    a_guest_that_never_ran_stays_so,
];

/// The row of `list --json` for this process.
fn row(lab: &Lab, pid: u32) -> Result<Option<Value>> {
    let rows = lab.tool(["list", "--json"])?.expect_code(0)?.stdout;
    for line in rows.lines() {
        let row: Value = serde_json::from_str(line).doing(format_args!("list said {line:?}"))?;
        if row["pid"] == pid {
            return Ok(Some(row));
        }
    }
    Ok(None)
}

fn plan(lab: &Lab, vm: &str) -> Result<runner::Finished> {
    lab.tool(["plan", "--method", "live", "--json", "--", vm])
}

/// Which process `plan` takes for this VM.
fn planned(lab: &Lab, vm: &str) -> Result<Value> {
    let said: Value = serde_json::from_str(&plan(lab, vm)?.expect_code(0)?.stdout)?;
    Ok(said["vm"]["pid"].clone())
}

fn guests_are_found_by_name_uuid_and_pid(lab: &Lab) -> Result<()> {
    let uuid = "5f1ac0de-57a1-4f0e-8d3a-000000c0ffee";
    let name = format!("lab-found-{}", std::process::id());
    let mut guest = lab.guest().name(&name).paused().memory_mib(64).uuid(uuid).boot()?;
    let row = row(lab, guest.pid())?.ok_or_else(|| failed("list does not show the guest"))?;
    let socket = guest.qmp_tool().to_string_lossy().into_owned();
    let said = ["name", "uuid", "memory_bytes", "accelerator", "machine"].map(|f| row[f].clone());
    let true_said = [json!(name), json!(uuid), json!(64 << 20), json!("tcg"), json!("pc")];
    assert_eq!(said, true_said);
    assert_eq!(row["monitors"], json!([guest.qmp_tool(), guest.qmp_lab()]));
    for vm in [&name, uuid, &uuid.to_uppercase(), &guest.pid().to_string(), &socket] {
        assert_eq!(planned(lab, vm)?, guest.pid(), "{vm}");
    }
    assert!(lab.tool(["list"])?.expect_code(0)?.stdout.contains(&name));
    guest.assert_as_found()?;
    let unknown = plan(lab, "no-such-guest")?.expect_code(4)?.stderr;
    assert!(unknown.contains("no-such-guest") && unknown.contains(&name), "{unknown}");
    guest.finish()
}

fn odd_names_do_no_harm(lab: &Lab) -> Result<()> {
    let odd = ["my web 07", "../../x <script>\u{1b}[2J\u{7}", "веб-сервер №7", "-o", ".", "a/b"];
    for name in odd {
        let guest = lab.guest().name(name).paused().memory_mib(32).boot()?;
        let row = row(lab, guest.pid())?.ok_or_else(|| failed(format_args!("no {name:?}")))?;
        assert_eq!(row["name"], name);
        let exhibit = take(lab, &guest, &[]).doing(format_args!("{name:?}"))?;
        assert_eq!(exhibit.manifest["vm"]["name"], name);
        let dir = exhibit.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let plain = |c: char| c.is_alphanumeric() || "._-".contains(c);
        assert!(dir.chars().all(plain) && !dir.starts_with(['.', '-']), "{name:?}: {dir:?}");
        if !name.contains('/') {
            assert_eq!(planned(lab, name)?, guest.pid(), "{name:?}");
        }
        for verb in [&["list"][..], &["plan", "--method", "live", &guest.pid().to_string()]] {
            let run = lab.tool(verb)?.expect_code(0)?;
            let harmless = |c: char| !c.is_control() || c == '\n';
            let both = run.stdout + &run.stderr;
            assert!(both.chars().all(harmless), "{verb:?} of {name:?}: {both:?}");
        }
        exhibit.remove()?;
        guest.finish()?;
    }
    Ok(())
}

fn two_guests_of_one_name_need_a_pid(lab: &Lab) -> Result<()> {
    let name = format!("lab-twin-{}", std::process::id());
    let twin = || lab.guest().name(&name).paused().memory_mib(32).boot();
    let (one, other) = (twin()?, twin()?);
    let pids = [&one, &other].map(|guest| guest.pid().to_string());
    refused(lab, &name, &new_dir(lab, "out")?, &[], &[&pids[0], &pids[1], "hint: "])?;
    for (guest, pid) in [&one, &other].into_iter().zip(&pids) {
        assert_eq!(planned(lab, pid)?, guest.pid());
    }
    one.finish()?;
    other.finish()
}

/// A process; dropped, it is killed.
#[derive(Debug)]
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qemu_by_any_name_is_found(lab: &Lab) -> Result<()> {
    for name in ["qemu-kvm", "kvm", "qemu-system-lab"] {
        let (binary, socket) = (lab.scratch().join(name), lab.scratch().join("qmp.sock"));
        fs::copy(lab.kit.qemu_binary(Version::V7_2), &binary)?;
        let mut qemu = Command::new("setpriv");
        qemu.args(["--pdeathsig", "KILL"]).arg(&binary).args(["-nodefaults", "-display", "none"]);
        qemu.env("QEMU_MODULE_DIR", "/usr/lib/x86_64-linux-gnu/qemu");
        qemu.args(["-L", "/usr/share/seabios", "-L", "/usr/share/qemu", "-accel", "tcg"]);
        qemu.args(["-S", "-m", "32", "-name", name, "-qmp"]);
        qemu.arg(format!("unix:{},server=on,wait=off", socket.display()));
        let qemu = Killed(qemu.stdin(Stdio::null()).spawn()?);
        drop(lab::Qmp::connect(&socket, Duration::from_secs(20))?);
        let row = row(lab, qemu.0.id())?.ok_or_else(|| failed(format_args!("no {name}")))?;
        assert_eq!((&row["name"], &row["monitors"]), (&json!(name), &json!([socket])));
        assert_eq!(planned(lab, &qemu.0.id().to_string())?, qemu.0.id());
        drop(qemu);
        fs::remove_file(&socket)?;
    }
    // A name that a process gives itself proves nothing.
    let mut decoy = Command::new("sleep");
    let decoy = Killed(decoy.arg0("qemu-system-x86_64").arg("60").spawn()?);
    assert_eq!(row(lab, decoy.0.id())?, None);
    Ok(())
}

fn sigint_and_sigterm_leave_a_partial_record(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().boot()?;
    for (signal, pass, store) in
        [(Signal::INT, 1, "ram"), (Signal::INT, 2, "disk"), (Signal::TERM, 1, "disk")]
    {
        let out = new_dir(lab, &format!("{signal:?}-{pass}"))?;
        let flags = ["--max-rate", "32M", "--store", store];
        let mut run = Running::start(acquire(lab, &guest.pid().to_string(), &out, &flags)?)?;
        run.until_in_pass(pass)?;
        run.signal(signal)?;
        let asked = Instant::now();
        let ended = run.end()?.expect(130)?.says(&["interrupted"])?;
        let late = asked.elapsed();
        assert!(late < Duration::from_secs(30), "ended {late:?} after {signal:?}");
        assert!(ended.partial(lab, "partial")?.contains("interrupted"));
        let manifest = ended.exhibit()?.1;
        let lost = manifest["losses"].as_array().is_some_and(|losses| !losses.is_empty());
        assert_eq!(lost, pass == 1, "{}", manifest["losses"]);
        guest.assert_as_found()?;
    }
    guest.finish()
}

fn a_second_signal_ends_the_sealing(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().memory_mib(768).boot()?;
    guest.plant_noise(512, 3)?;
    let out = new_dir(lab, "out")?;
    let flags = ["--max-rate", "400M"];
    let mut run = Running::start(acquire(lab, &guest.pid().to_string(), &out, &flags)?)?;
    run.until_in_pass(2)?;
    run.signal(Signal::INT)?;
    run.until(|event| event["phase"] == "seal")?;
    run.signal(Signal::INT)?;
    let ended = run.end()?.expect(130)?;
    assert!(ended.partial(lab, "partial")?.contains("interrupted"));
    let (dir, manifest) = ended.exhibit()?;
    // What was sealed by then stays; the whole file's digest is what is given up.
    assert_eq!(
        (&manifest["image"]["sha256"], names(&dir)?.contains(&"memory.elf".into())),
        (&json!(null), true)
    );
    guest.finish()
}

fn sighup_and_closed_outputs_end_nothing(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().boot()?;
    let vm = guest.pid().to_string();
    for what in ["SIGHUP", "SIGHUP twice", "stdout closed"] {
        let out = new_dir(lab, what)?;
        let mut run = Running::start(acquire(lab, &vm, &out, &["--max-rate", "200M"])?)?;
        run.until_in_pass(1)?;
        match what {
            "stdout closed" => run.stop_listening(),
            "SIGHUP" => run.signal(Signal::HUP)?,
            _ => {
                run.signal(Signal::HUP)?;
                run.until_in_pass(2)?;
                run.signal(Signal::HUP)?;
            }
        }
        let ended = run.end()?;
        assert_eq!(ended.status.code(), Some(0), "{what}: {}", ended.stderr);
        assert_complete(lab, &out).doing(what)?;
    }
    // Neither stdout nor stderr is open from the start.
    let out = new_dir(lab, "none")?;
    let mut shell = Command::new("sh");
    let tool = lab.tool_command(["acquire", "--method", "live", &vm, "-o"])?;
    shell.args(["-c", "exec \"$@\" >&- 2>&-", "sh"]).arg(tool.get_program()).args(tool.get_args());
    shell.arg(&out);
    runner::finish(shell, Duration::from_secs(120))?.expect_code(0)?;
    assert_complete(lab, &out)?;
    guest.assert_as_found()?;
    guest.finish()
}

/// One exhibit lies in `out`, and it is complete.
fn assert_complete(lab: &Lab, out: &Path) -> Result<()> {
    let [name] = &*names(out)? else {
        return Err(failed(format_args!("not one exhibit but {:?}", names(out)?)));
    };
    lab.tool([Path::new("verify"), &out.join(name)])?.expect_code(0).map(drop)
}

fn the_rate_is_not_exceeded(lab: &Lab) -> Result<()> {
    let rate: u64 = 50 << 20;
    let guest = lab.guest().boot()?;
    let limited = take(lab, &guest, &["--max-rate", "50M"])?.manifest;
    let ns =
        |value: &Value| value["t1_ns"].as_u64().zip(value["t0_ns"].as_u64()).map(|(b, a)| b - a);
    // Holes cost nothing; what was read was read twice.
    let read = ["data", "zero"].map(|state| limited["states"][state].as_u64().unwrap_or(0));
    let bytes = 2 * read.iter().sum::<u64>();
    let window = ns(&limited["window"]).unwrap_or_default();
    // The last block of each worker needs not be waited for.
    let free = 2 * 2 * (1 << 20);
    let least = (bytes.saturating_sub(free)) * 1000 / rate;
    assert!(bytes > 2 * (64 << 20), "{bytes} bytes are too few");
    assert!(window / 1_000_000 >= least, "{bytes} bytes in {window} ns, {least} ms at least");
    // The control: without the flag it is faster than that.
    let free = take(lab, &guest, &[])?.manifest;
    assert!(ns(&free["window"]).unwrap_or(u64::MAX) < window, "{} {window}", free["window"]);
    guest.finish()
}

fn json_events_are_in_order_and_end_with_the_exit_code(lab: &Lab) -> Result<()> {
    let guest = lab.guest().boot()?;
    let out = new_dir(lab, "out")?;
    let run = acquire(lab, &guest.pid().to_string(), &out, &["--max-rate", "500M"])?;
    let ended = Running::start(run)?.end()?.expect(0)?; // every line is JSON with an event, by `Running`
    let names: Vec<_> = ended.events.iter().filter_map(|event| event["event"].as_str()).collect();
    let steps: Vec<_> =
        names.iter().filter(|name| !matches!(**name, "progress" | "warning")).collect();
    assert_eq!(steps, [&"found", &"plan", &"pass", &"pass", &"sealed", &"done"]);
    let phases: Vec<_> = ended.events.iter().filter(|event| event["event"] == "progress").collect();
    assert!(phases.len() > 4, "{names:?}");
    for phase in &phases {
        let [done, total] = ["done_bytes", "total_bytes"].map(|field| phase[field].as_u64());
        assert!(done.is_some() && done <= total, "{phase}");
    }
    let words: BTreeSet<_> = phases.iter().filter_map(|event| event["phase"].as_str()).collect();
    assert!(
        ["capture", "file-digest", "seal"].iter().all(|word| words.contains(word)),
        "{words:?}"
    );
    let found = &ended.events[0];
    assert_eq!((&found["pid"], &found["monitor"]), (&json!(guest.pid()), &json!(guest.qmp_tool())));
    let manifest = ended.complete(lab)?;
    let sealed = ended.events.iter().find(|event| event["event"] == "sealed");
    assert_eq!(sealed.map(|event| &event["memory_root"]), Some(&manifest["memory_root"]));
    guest.finish()
}

fn the_bar_is_for_terminals(lab: &Lab) -> Result<()> {
    if !fs::exists("/usr/bin/script")? {
        return Err(skipped("there is no script(1) here to make a terminal"));
    }
    let guest = lab.guest().boot()?;
    let out = new_dir(lab, "out")?;
    let command = acquire(lab, &guest.pid().to_string(), &out, &["--max-rate", "300M"])?;
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words.map(|word| format!("'{}'", word.to_string_lossy())).collect();
    let mut terminal = Command::new("script");
    let data = lab.scratch().join("data");
    terminal.args(["-qec", &format!("{} > {}", words.join(" "), data.display()), "/dev/null"]);
    let shown = runner::finish(terminal, Duration::from_secs(120))?.expect_code(0)?.stdout;
    assert!(shown.contains("ETA") && shown.contains("/s") && shown.contains('\r'), "{shown:?}");
    let data = fs::read_to_string(data)?;
    assert!(data.lines().all(|line| line.starts_with("{\"event\":")), "{data}");
    let plain = Running::start(command)?.end()?.expect(0)?.stderr;
    assert!(!plain.contains("ETA") && !plain.contains(['\r', '\u{1b}']), "{plain:?}");
    assert!(plain.lines().all(|line| line.starts_with("stillframe: ")), "{plain:?}");
    guest.finish()
}

/// What `plan` must not change: events seen, files, the guest's memory, the output's own time.
type Traces = (usize, Vec<String>, Vec<String>, u64, SystemTime);

fn traces(guest: &mut Guest, out: &Path) -> Result<Traces> {
    let files = (names(guest.dir())?, names(out)?);
    let memory = proc::status(guest.pid(), "RssShmem")?;
    Ok((guest.events()?.len(), files.0, files.1, memory, fs::metadata(out)?.modified()?))
}

fn plan_changes_nothing(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().memory_mib(512).backing(Backing::Memfd).paused().boot()?;
    let out = new_dir(lab, "out")?;
    let vm = guest.pid().to_string();
    let before = traces(&mut guest, &out)?;
    for flags in [&["--json"][..], &[], &["--store", "disk", "--format", "raw"]] {
        let fixed = ["plan", "--method", "live", &vm, "-o"];
        let command: Vec<&str> = fixed
            .into_iter()
            .chain([out.to_str().unwrap_or_default()])
            .chain(flags.iter().copied())
            .collect();
        let said = lab.tool(command)?.expect_code(0)?.stdout;
        assert!(said.contains("live") && said.contains("store"), "{said}");
        assert_eq!(traces(&mut guest, &out)?, before);
    }
    guest.finish()
}

fn a_guest_that_never_ran_stays_so(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().paused().memory_mib(64).boot()?;
    assert_eq!(guest.status()?, "prelaunch");
    let said = plan(lab, &guest.pid().to_string())?.expect_code(0)?.stdout;
    assert!(said.contains("prelaunch"), "{said}");
    take(lab, &guest, &[])?;
    assert_eq!((guest.status()?, guest.events()?), ("prelaunch".into(), Vec::<String>::new()));
    guest.finish()
}
