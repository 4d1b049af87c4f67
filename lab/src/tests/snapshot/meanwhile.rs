//! What others do to the VM while QEMU sends its snapshot of it: the record says so, and an image
//! that is said to be of one instant is.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use lab::tearcheck::utc_ns;
use lab::{Doing, Lab, Result, Ring, Version, failed, here, runner};
use serde_json::{Value, json};

use super::super::exhibit::at_best;
use super::super::faults::{Tmpfs, fill, until_migration_is};
use super::super::run::{
    Ended, Running, await_dead, begin, kill, new_dir, recover, undo_files, verify,
};
use super::pulse::{Pulse, Stalls};
use super::slowdisk::SlowDisk;
use super::{BUDGET, Left, RESTORED, SOON, Subject, in_time, ns};

pub(crate) const TESTS: &[runner::Test] = here![
    a_reset_meanwhile,
    a_stop_and_cont_meanwhile,
    a_guest_that_was_stopped_meanwhile_stays_so,
    a_guest_that_was_stopped_just_before_stays_so,
    a_dimm_meanwhile,
    qemu_quits_meanwhile,
    qemu_is_killed_meanwhile,
    a_full_disk_holds_nobody_up,
    a_disk_slower_than_the_queue_holds_nobody_up,
    a_disk_has_all_the_time_that_it_needs,
];

/// The settings of a guest that takes DIMMs.
const SLOTS: [&str; 2] = ["-m", "slots=2,maxmem=1G"];

fn boot(lab: &Lab) -> Result<Subject<'_>> {
    Subject::boot_like(lab, Ring::wide(256), |guest| guest.args(&SLOTS))
}

/// A run in the middle of whose stream `act` is done: the run's end, what it left, and what `act`
/// gave. A run that ends before is none.
fn meanwhile<T>(
    subject: &mut Subject<'_>,
    act: impl FnOnce(&mut Subject<'_>) -> Result<T>,
) -> Result<(Ended, Left, T)> {
    for n in 0..5 {
        let out = new_dir(subject.lab, &format!("{}-{n}", subject.guest.pid()))?;
        let mut run = subject.start(&out)?;
        let comes = subject.await_stream(&mut run, 0.1)?;
        let midway_until = if comes { subject.midway_until()? } else { None };
        if midway_until.is_none_or(|until| Instant::now() > until) {
            run.end()?;
            subject.family.await_gone()?;
            fs::remove_dir_all(&out)?;
            continue;
        }
        let done = act(subject)?;
        let ended = run.end()?;
        subject.family.await_gone()?;
        let left = subject.judge(&out, &ended)?;
        return Ok((ended, left, done));
    }
    Err(failed("void: the stream is always over before"))
}

/// The run was whole, or says what is lost: 0 with the class, 3 without it.
fn is_whole_or_says_why(ended: &Ended, left: Left) -> Result<Value> {
    let (dir, manifest) = ended.exhibit()?;
    let class = manifest["class"] != "none";
    if left != Left::Whole || ended.status.code() != Some(if class { 0 } else { 3 }) {
        return Err(failed(format_args!(
            "{left:?}, class {}: ended with {}: {}",
            manifest["class"], ended.status, ended.stderr
        )));
    }
    let journal = fs::read_to_string(dir.join("journal.jsonl")).doing("reading the journal")?;
    println!(
        "         ended with {}, class {}, disturbances {}",
        ended.status, manifest["class"], manifest["disturbances"]
    );
    Ok(json!({ "manifest": manifest, "journal": journal }))
}

/// QEMU's events that the journal tells of.
fn told(record: &Value, event: &str) -> usize {
    let quoted = format!("\"{event}\"");
    record["journal"].as_str().unwrap_or_default().matches(&quoted).count()
}

/// The reset comes after the instant, and memory that it writes is sent as it was before.
fn a_reset_meanwhile(lab: &Lab) -> Result<()> {
    let mut subject = boot(lab)?;
    let reset = |subject: &mut Subject<'_>| subject.guest.qmp("system_reset", json!({}));
    let (ended, left, _) = meanwhile(&mut subject, reset)?;
    let record = is_whole_or_says_why(&ended, left)?;
    assert!(told(&record, "RESET") > 0, "the journal knows of no reset");
    let seen = subject.guest.events()?;
    assert!(seen.iter().any(|event| event == "RESET"), "void: {seen:?}");
    // The firmware, then the ring from its beginning.
    subject.await_clean(Duration::from_secs(60))?;
    subject.guest.finish()
}

fn now_ns() -> Result<i64> {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    Ok(i64::try_from(since.as_nanos())?)
}

/// The instant is that of QEMU's own stop, not of anyone's later one.
fn assert_before(manifest: &Value, moment_ns: i64) {
    let tau = &manifest["tau"];
    let at = tau["utc"].as_str().and_then(utc_ns);
    assert!(at.is_some_and(|at| at < moment_ns), "{tau}, and the stop was at {moment_ns} ns");
}

fn a_stop_and_cont_meanwhile(lab: &Lab) -> Result<()> {
    let mut subject = boot(lab)?;
    let (ended, left, at) = meanwhile(&mut subject, |subject| {
        let at = now_ns()?;
        subject.guest.stop()?;
        sleep(Duration::from_millis(20));
        subject.guest.cont()?;
        Ok(at)
    })?;
    let record = is_whole_or_says_why(&ended, left)?;
    if record["manifest"]["class"] != "none" {
        assert_before(&record["manifest"], at);
    }
    assert!(told(&record, "STOP") > 1 && told(&record, "RESUME") > 1, "the journal misses some");
    subject.assert_clean()?;
    subject.guest.finish()
}

/// Whoever stopped it lets it go on: not the tool.
fn a_guest_that_was_stopped_meanwhile_stays_so(lab: &Lab) -> Result<()> {
    let mut subject = boot(lab)?;
    let (ended, left, at) = meanwhile(&mut subject, |subject| {
        let at = now_ns()?;
        subject.guest.stop()?;
        Ok(at)
    })?;
    assert_eq!(subject.guest.status()?, "paused", "ended with {}", ended.status);
    let record = is_whole_or_says_why(&ended, left)?;
    if record["manifest"]["class"] != "none" {
        assert_before(&record["manifest"], at);
    }
    assert_eq!(record["manifest"]["vm"]["run_state_after"], "paused");
    recover(lab, &subject.guest)?;
    assert_eq!(subject.guest.status()?, "paused", "after recover");
    subject.guest.cont()?;
    subject.assert_clean()?;
    subject.guest.finish()
}

/// Memory that QEMU has to give pages first, which takes it a while.
const UNTOUCHED: [&str; 6] = [
    "-m",
    "slots=2,maxmem=8G",
    "-object",
    "memory-backend-memfd,id=large,size=2G,share=on",
    "-device",
    "pc-dimm,memdev=large",
];

/// While QEMU still prepares, a stop is somebody else's: the snapshot is given up, and the guest not let
/// go on.
fn a_guest_that_was_stopped_just_before_stays_so(lab: &Lab) -> Result<()> {
    let like = |guest: lab::Builder| guest.args(&UNTOUCHED);
    for _ in 0..3 {
        // Each time a new one: a guest that has its memory is prepared in a moment.
        let mut subject = Subject::boot_like(lab, Ring::wide(64), like)?;
        if stopped_just_before(&mut subject)? {
            return subject.guest.finish();
        }
    }
    Err(failed("void: QEMU is always done preparing before the stop is seen"))
}

/// False when QEMU was done preparing before the lab, or the tool, came to it: that shows nothing.
fn stopped_just_before(subject: &mut Subject<'_>) -> Result<bool> {
    let out = new_dir(subject.lab, &format!("{}", subject.guest.pid()))?;
    let run = begin(|| subject.start(&out))?;
    let came = until_migration_is(&mut subject.guest, "setup");
    subject.guest.stop()?;
    let migration = subject.guest.qmp("query-migrate", json!({}))?;
    let ended = run.end()?;
    println!("         {}: {}", ended.status, ended.done("reason"));
    if came.is_err() || migration["status"] != "setup" || ended.status.code() != Some(1) {
        println!("         void: QEMU was done preparing: {came:?}, {}", migration["status"]);
        subject.family.await_gone()?;
        return Ok(false);
    }
    assert_eq!(subject.judge(&out, &ended)?, Left::Partial);
    assert_eq!(subject.guest.status()?, "paused");
    recover(subject.lab, &subject.guest)?;
    assert_eq!(subject.guest.status()?, "paused", "after recover");
    subject.guest.cont()?;
    subject.assert_clean()?;
    Ok(true)
}

/// QEMU plugs nothing while it sends a snapshot. Should it do so one day, the map is another one
/// afterwards.
fn a_dimm_meanwhile(lab: &Lab) -> Result<()> {
    let mut subject = boot(lab)?;
    let (ended, left, plugged) = meanwhile(&mut subject, |subject| {
        let memory = json!({ "qom-type": "memory-backend-ram", "id": "d0", "size": 64 << 20 });
        subject.guest.qmp("object-add", memory)?;
        let dimm = json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "d0" });
        let plugged = subject.guest.qmp("device_add", dimm);
        println!("         QEMU plugs a DIMM: {plugged:?}");
        Ok(plugged.is_ok())
    })?;
    let record = is_whole_or_says_why(&ended, left)?;
    assert_eq!(record["manifest"]["class"] == "none", plugged);
    if !plugged {
        subject.guest.qmp("object-del", json!({ "id": "d0" }))?;
    }
    subject.assert_clean()?;
    subject.guest.finish()
}

/// A QEMU that is gone leaves a partial record, and nothing to put right.
fn ends_partial(subject: Subject<'_>, ended: Ended, left: Left) -> Result<()> {
    let ended = ended.expect(1)?;
    let (dir, manifest) = ended.exhibit()?;
    println!("         {}: {}", manifest["status"], manifest["end_reason"]);
    assert_eq!((left, verify(subject.lab, &dir)?), (Left::Partial, Some(3)));
    assert_eq!(
        (&manifest["class"], &manifest["end_reason"]),
        (&json!("none"), &ended.done("reason"))
    );
    assert!(!ended.done("reason").is_null(), "no reason");
    recover(subject.lab, &subject.guest)?;
    assert_eq!(undo_files(&subject.guest), [""; 0]);
    Ok(())
}

fn qemu_quits_meanwhile(lab: &Lab) -> Result<()> {
    let mut subject = boot(lab)?;
    let (ended, left, _) = meanwhile(&mut subject, |subject| {
        // The answer, or the end of the connection.
        let _ = subject.guest.qmp("quit", json!({}));
        await_dead(&[subject.guest.pid()])
    })?;
    ends_partial(subject, ended, left)
}

fn qemu_is_killed_meanwhile(lab: &Lab) -> Result<()> {
    let mut subject = boot(lab)?;
    let (ended, left, ()) = meanwhile(&mut subject, |subject| {
        kill(&subject.guest)?;
        await_dead(&[subject.guest.pid()])
    })?;
    ends_partial(subject, ended, left)
}

/// A disk that is too small is refused before QEMU is told anything; one that others fill while the stream
/// is read holds nobody up, for the room was set aside.
fn a_full_disk_holds_nobody_up(lab: &Lab) -> Result<()> {
    let mut subject = boot(lab)?;
    let small = Tmpfs::mount(lab, 64)?;
    let events = subject.guest.events()?;
    let mut command = subject.command(&small.0)?;
    command.args(["--store", "disk"]);
    Running::start(command)?.end()?.expect(4)?;
    assert_eq!(subject.guest.events()?, events, "the guest was touched");
    drop(small);
    fs::remove_dir(lab.scratch().join("tmpfs"))?;

    let space = Tmpfs::mount(lab, 800)?;
    let pulse = Pulse::start(&mut subject.guest, &subject.ring)?;
    let mut run = begin(|| {
        let mut command = subject.command(&space.0)?;
        command.args(["--store", "disk", "--force-output"]);
        Running::start(command)
    })?;
    let midway = subject.await_stream(&mut run, 0.05)? && subject.is_midway()?;
    let filler = space.0.join("filler");
    fill(&filler)?;
    let ended = run.end()?;
    fs::remove_file(filler)?;
    let stalls = pulse.end()?;
    in_time(stalls)?;
    let left = subject.judge(&space.0, &ended)?;
    println!("         filled midway {midway}: {}, {left:?}, {stalls:?}", ended.status);
    let fits = match ended.status.code() {
        Some(0) => left == Left::Whole,
        Some(1) => left != Left::Whole,
        _ => false,
    };
    assert!(fits, "{}: {left:?}", ended.status);
    subject.assert_clean()?;
    subject.guest.finish()
}

/// Bytes that the tool lets wait for a disk, by docs/snapshot.md.
const QUEUE: u64 = 128 << 20;

/// What the slow disk writes in a second: in a run's stall budget much less than the queue is long.
const SLOW: u64 = 256 << 10;

/// What QEMU says of a snapshot that is under way, once it has ended.
fn await_stream_end(subject: &mut Subject<'_>, run: &mut Running) -> Result<Value> {
    assert!(subject.await_stream(run, 0.05)?, "void: the run ended before the stream");
    let until = Instant::now() + Duration::from_secs(30);
    while Instant::now() < until {
        let migration = subject.guest.qmp("query-migrate", json!({}))?;
        if ["completed", "failed", "cancelled"].map(Value::from).contains(&migration["status"]) {
            return Ok(migration["status"].clone());
        }
        sleep(Duration::from_millis(5));
    }
    Err(failed("QEMU still waits for the disk"))
}

/// A disk that takes less than QEMU sends, so that the queue before it fills: QEMU waits, and the stream is
/// broken off in time, though nobody hangs. As soon as the disk is as quick as it was, the same is whole.
fn a_disk_slower_than_the_queue_holds_nobody_up(lab: &Lab) -> Result<()> {
    let mut subject = boot(lab)?;
    let disk = SlowDisk::new(lab, 1024)?;
    let out = disk.dir.join("out");
    fs::create_dir(&out)?;
    let mut command = subject.command(&out)?;
    command.args(["--store", "disk"]);

    disk.set(Some(SLOW))?;
    let pulse = Pulse::start(&mut subject.guest, &subject.ring)?;
    let mut run = begin(|| Running::start(disk.slows(&command)))?;
    let status = await_stream_end(&mut subject, &mut run)?;
    // The disk is still slow.
    subject.writer.goes_on(SOON)?;
    let stalls = pulse.end()?;
    disk.set(None)?;
    let ended = run.end()?;
    println!("         {status}, {}: {}; {stalls:?}", ended.status, ended.done("reason"));
    in_time(stalls)?;
    assert_broken_off(&subject, &ended, &out, stalls)?;
    fs::remove_dir_all(ended.exhibit()?.0)?;
    subject.assert_clean()?;

    let ended = at_best(|| Running::start(disk.slows(&command))?.end())?.expect(0)?;
    let manifest = ended.complete(lab)?;
    let (bytes, took) = (manifest["snapshot"]["stream_bytes"].as_u64(), ended.took);
    println!("         not slow: whole, {bytes:?} bytes, in {took:?}");
    assert!(bytes > Some(QUEUE * 3 / 2), "void: {bytes:?} bytes do not fill the queue");
    assert_eq!(manifest["store"], "disk");
    drop(disk);
    subject.assert_clean()?;
    subject.guest.finish()
}

/// The guest stood for us, and the record says what became of it.
fn assert_broken_off(
    subject: &Subject<'_>,
    ended: &Ended,
    out: &Path,
    stalls: Stalls,
) -> Result<()> {
    assert!(stalls.longest > BUDGET / 2, "void: nobody waited for the disk: {stalls:?}");
    assert_eq!((ended.status.code(), subject.judge(out, ended)?), (Some(1), Left::Partial));
    let reason = ended.partial(subject.lab, "partial")?;
    assert!(reason.contains("was not read for"), "{reason}");
    let (_, manifest) = ended.exhibit()?;
    let snapshot = &manifest["snapshot"];
    assert_eq!((&manifest["class"], &snapshot["restored"]), (&json!("none"), &json!(true)));
    let wait = Duration::from_nanos(ns(&snapshot["longest_wait_ns"])?);
    let kept = manifest["states"]["data"].as_u64();
    println!("         unread for {wait:?}, {kept:?} bytes are kept");
    assert!(wait >= BUDGET * 9 / 10, "{snapshot}");
    // What had come is there, though the disk had not taken it yet.
    assert!(kept > Some(QUEUE * 3 / 4), "{kept:?} bytes are kept of a full queue");
    Ok(())
}

/// What fits the queue comes at once, and then neither QEMU nor the guest has a part in how long the disk
/// takes: more than two minutes here, after which a QEMU that sent nothing would be given up.
fn a_disk_has_all_the_time_that_it_needs(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    let mut subject = Subject::boot(lab, Ring::wide(64), Version::V10_0)?;
    let disk = SlowDisk::new(lab, 256)?;
    let out = disk.dir.join("out");
    fs::create_dir(&out)?;
    let mut command = subject.command(&out)?;
    command.args(["--store", "disk"]);
    disk.set(Some(SLOW))?;
    let mut run = begin(|| Running::start(disk.slows(&command)))?;
    let status = await_stream_end(&mut subject, &mut run)?;
    let came = Instant::now();
    subject.await_as_found(RESTORED)?;
    while run.runs()? {
        assert!(came.elapsed() < Duration::from_secs(400), "it does not end");
        sleep(Duration::from_millis(100));
    }
    let took = came.elapsed();
    disk.set(None)?;
    let ended = run.end()?;
    println!("         {status}, and then {took:?} for the disk: {}", ended.status);
    // Complete: nobody waited for the disk beyond the budget.
    ended.expect(0)?.complete(lab)?;
    assert!(took > Duration::from_secs(130), "void: the disk was as quick as that");
    drop(disk);
    subject.assert_clean()?;
    subject.guest.finish()
}
