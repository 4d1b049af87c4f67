//! Holds of real guests: what is read in one is what stood still, and nothing of it is left in the
//! guest. Each test prints its figures.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use lab::{Backing, Doing, Guest, Lab, Places, Qmp, Result, Ring, failed, proc};
use lab::{here, outer};
use serde_json::{Value, json};

use super::exhibit::{Exhibit, Image, acquire};
use super::run::{Running, begin, new_dir, unless_slow};

pub(crate) const TESTS: &[lab::runner::Test] = here![
    the_image_is_what_stood_still,
    a_watchdog_sleeps_through_a_long_hold,
    a_guest_found_paused_stays_paused,
    holds_by_ptrace_leave_no_trace,
    holds_by_ptrace_leave_no_trace_in_a_sandbox,
    holds_by_stop_leave_no_trace,
    a_plan_is_kept,
];

pub(crate) const OUTER: &[lab::runner::Test] = outer![
    the_image_of_a_kvm_guest_is_what_stood_still,
    a_stuck_thread_ends_a_hold,
    holds_of_a_kvm_guest_leave_no_trace,
];

fn seconds(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN) / 1e9
}

/// How long the guest felt the hold of an exhibit.
fn stall(manifest: &Value) -> Duration {
    let at = |field: &str| manifest["hold"][field].as_u64().unwrap_or(u64::MAX);
    Duration::from_nanos(at("ended_ns").saturating_sub(at("began_ns")))
}

/// Acquires by `freeze`; the image must be of one instant.
fn freeze(lab: &Lab, guest: &Guest, flags: &[&str]) -> Result<Exhibit> {
    let exhibit = acquire(lab, guest, "freeze", flags)?;
    assert_eq!(exhibit.manifest["class"], "instantaneous");
    Ok(exhibit)
}

// What stands still.

fn the_image_is_what_stood_still(lab: &Lab) -> Result<()> {
    for (backing, hold) in
        [(Backing::Anonymous, "ptrace"), (Backing::Memfd, "ptrace"), (Backing::Anonymous, "stop")]
    {
        unless_slow(|| {
            let mut guest = lab.guest().backing(backing).memory_mib(192).boot()?;
            // It comes round to each of its pages some 60 times a second.
            guest.plant("dirty 64 1000000", Duration::from_secs(60))?;
            stands_still(lab, guest, hold)
        })
        .doing(format_args!("{backing:?}, {hold}"))?;
    }
    Ok(())
}

fn the_image_of_a_kvm_guest_is_what_stood_still(lab: &Lab) -> Result<()> {
    for (backing, hold) in [(Backing::Anonymous, "ptrace"), (Backing::Memfd, "stop")] {
        // The tool's second for a hold is not much on a host that is translated itself, where the lab and
        // the tool both read all of it meanwhile.
        unless_slow(|| {
            let guest = lab.guest().ring(Ring::spread(24)).backing(backing).boot()?;
            stands_still(lab, guest, hold)
        })
        .doing(format_args!("{backing:?}, {hold}"))?;
    }
    Ok(())
}

/// While the guest is held, and before the tool has read anything, the lab copies all memory for
/// itself: the image must be the same, byte for byte. The control is the same comparison with a copy
/// of the guest when it runs.
fn stands_still(lab: &Lab, mut guest: Guest, hold: &str) -> Result<()> {
    let (places, out) = (Places::of(&mut guest)?, lab.scratch().join("still"));
    if out.exists() {
        // What a run left that was too slow.
        fs::remove_dir_all(&out)?;
    }
    fs::create_dir(&out)?;
    let mut copy = places.buffers()?;
    let mut command = lab.at_hold_command()?;
    command.arg(guest.pid().to_string()).arg(&out).args([hold, "900"]);
    let mut tool = Running::start_asking(command)?;
    tool.until(|event| event["event"] == "held")?;
    let start = Instant::now();
    places.read(&mut copy)?;
    let took = start.elapsed();
    tool.answer()?;
    let manifest = tool.end()?.expect(0)?.complete(lab)?;
    assert_eq!([&manifest["class"], &manifest["hold"]["kind"]], ["instantaneous", hold]);
    let exhibit = only(&out)?;
    let image = exhibit.image()?;
    let bytes: usize = copy.iter().map(Vec::len).sum();
    let differing = differing_pages(&image, &places, &copy)?;
    places.read(&mut copy)?;
    let control = differing_pages(&image, &places, &copy)?;
    println!(
        "         {hold}: {bytes} bytes copied by the lab in {took:?} of a hold of {:?}, {} pages read \
         again: {differing} pages differ; afterwards {control}",
        stall(&manifest),
        manifest["audit"]["pages"]
    );
    assert_eq!(differing, 0, "pages of the image are not what stood still");
    assert!(control > 0, "void: the guest does not write");
    exhibit.remove()?;
    guest.finish()
}

/// The only exhibit in a directory.
fn only(dir: &Path) -> Result<Exhibit> {
    let mut entries = fs::read_dir(dir)?.flatten();
    match (entries.next(), entries.next()) {
        (Some(entry), None) => Exhibit::open(&entry.path()),
        other => Err(failed(format_args!("not one exhibit but {other:?}"))),
    }
}

fn differing_pages(image: &Image, places: &Places, copy: &[Vec<u8>]) -> Result<usize> {
    let mut differing = 0;
    for (place, copy) in places.iter().zip(copy) {
        let bytes = image.read(place.gpa, place.len)?;
        let pages = bytes.chunks(4096).zip(copy.chunks(4096));
        differing += pages.filter(|(ours, theirs)| ours != theirs).count();
    }
    Ok(differing)
}

// The watchdog.

/// Arms the i6300esb as Linux's driver does for 10 s (drivers/watchdog/i6300esb.c): two stages of 5
/// s in ticks of a millisecond, each write unlocked by 0x80 and 0x86; then feeds it every second
/// until /tmp/hungry is there.
const WATCHDOG: &str = r"
for device in /sys/bus/pci/devices/*; do
    [ $(cat $device/device) = 0x25ab ] && break
done
echo 1 > $device/enable
read base rest < $device/resource
put() {
    devmem $((base + 12)) 16 0x80; devmem $((base + 12)) 16 0x86; devmem $((base + $1)) $2 $3
}
put 0 32 5120
put 4 32 5120
put 12 16 0x100
printf '\002' | dd of=$device/config bs=1 seek=104 conv=notrunc 2> /dev/null
(while [ ! -e /tmp/hungry ]; do put 12 16 0x100; sleep 1; done) > /dev/null 2>&1 &
";

/// The hold is QEMU's `stop`, in which the watchdog's clock stands too.
fn a_watchdog_sleeps_through_a_long_hold(lab: &Lab) -> Result<()> {
    let args = ["-device", "i6300esb", "-action", "watchdog=reset"];
    let mut guest = lab.guest().memory_mib(128).args(&args).boot()?;
    guest.sh(WATCHDOG)?;
    let vm = guest.pid().to_string();
    let plan = |flags: &[&str]| lab.tool([&["plan", &vm, "--method", "freeze"], flags].concat());
    let survey: Value = serde_json::from_str(&plan(&["--json", "--stall-budget", "9s"])?.stdout)?;
    assert_eq!(survey["facts"]["watchdogs"], json!(["i6300esb"]));
    // So slow that the memory is read for 15 s.
    let resident = survey["facts"]["resident_bytes"].as_u64().unwrap_or(0);
    let rate = (resident / 15).to_string();
    let slow = ["--stall-budget", "20s", "--max-rate", &rate];
    let refused = plan(&[&slow[..], &["--hold", "ptrace"]].concat())?.expect_code(4)?;
    assert!(refused.stderr.contains("333 ms (the watchdog i6300esb)"), "{}", refused.stderr);

    let (before, start) = (uptime(&mut guest)?, Instant::now());
    let exhibit = freeze(lab, &guest, &slow)?;
    let (after, elapsed) = (uptime(&mut guest)?, start.elapsed());
    let held = stall(&exhibit.manifest);
    println!("         held {held:?} of {elapsed:?}; the guest's uptime {before} and then {after}");
    assert_eq!(exhibit.manifest["hold"]["kind"], "stop");
    assert!(held > Duration::from_secs(14), "{held:?}");
    let events = guest.events()?;
    assert_eq!(events, ["STOP", "RESUME"], "the watchdog bit, or the hold was another");
    assert!(after > before, "the guest began anew");
    guest.assert_as_found()?;

    // The control: it bites a guest that does not feed it.
    guest.sh("touch /tmp/hungry")?;
    let start = Instant::now();
    while !guest.events()?.iter().any(|event| event == "RESET") {
        assert!(start.elapsed() < Duration::from_secs(40), "void: the watchdog does not bite");
        sleep(Duration::from_millis(100));
    }
    println!("         not fed, it was reset after {:?}: {:?}", start.elapsed(), guest.events()?);
    Ok(())
}

fn uptime(guest: &mut Guest) -> Result<f64> {
    let text = guest.sh("cut -d' ' -f1 /proc/uptime")?;
    Ok(text.trim().parse()?)
}

// Two hundred holds.

fn a_guest_found_paused_stays_paused(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().ring(Ring::pair(64)).boot()?;
    guest.stop()?;
    let events = guest.events()?;
    for hold in ["ptrace", "stop"] {
        let exhibit = freeze(lab, &guest, &["--hold", hold, "--stall-budget", "900ms"])?;
        let vm = &exhibit.manifest["vm"];
        assert_eq!([&vm["run_state_before"], &vm["run_state_after"]], [&json!("paused"); 2]);
        assert_eq!(
            (guest.status()?.as_str(), guest.events()?),
            ("paused", events.clone()),
            "{hold}"
        );
        exhibit.remove()?;
    }
    guest.cont()?;
    guest.finish()
}

/// What a guest says of itself.
#[derive(Debug, Clone, Copy)]
struct Vitals {
    /// When the clocks had been read, and how long that took.
    at: Instant,
    took: Duration,
    /// Seconds since boot, and of the wall clock.
    uptime: f64,
    date: f64,
    /// Timer interrupts so far.
    ticks: u64,
    /// Rounds of a program that counts.
    rounds: u64,
    /// Lines of the kernel's that speak of a lost while.
    complaints: u64,
}

const COUNTER: &str = "(n=0; while :; do n=$((n+1)); echo $n > /tmp/.count; \
                       mv /tmp/.count /tmp/count; usleep 20000; done) > /dev/null 2>&1 & sleep 1";

/// Apart from the rest: nobody knows at which moment of a script a clock was read.
const CLOCKS: &str = "cut -d' ' -f1 /proc/uptime; date +%s";

const VITALS: &str = r"
awk '/LOC:|timer/ { for (i = 2; i <= NF && $i ~ /^[0-9]+$/; i++) n += $i } END { print n }' \
    /proc/interrupts
cat /tmp/count
dmesg | awk '/[Ss]tall|lockup|BUG:|WARNING:|hung|unstable/ { n++ } END { print n + 0 }'";

impl Vitals {
    fn of(guest: &mut Guest) -> Result<Self> {
        let (from, clocks, at) = (Instant::now(), guest.sh(CLOCKS)?, Instant::now());
        let [uptime, date] = figures(&clocks)?;
        let [ticks, rounds, complaints] = figures(&guest.sh(VITALS)?)?;
        Ok(Self { at, took: at - from, uptime, date, ticks, rounds, complaints })
    }
}

/// One figure a line.
fn figures<T: FromStr<Err: Error>, const N: usize>(text: &str) -> Result<[T; N]> {
    let figures = text.lines().map(str::parse).collect::<std::result::Result<Vec<T>, _>>();
    let figures = figures.doing(format_args!("{text:?}"))?;
    figures.try_into().map_err(|_| failed(format_args!("not {N} figures: {text:?}")))
}

/// Asks QEMU for the run state all the time, on a monitor of its own.
struct Asker {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Result<(BTreeSet<String>, u32)>>,
}

impl Asker {
    fn start(socket: &Path) -> Result<Self> {
        let mut qmp = Qmp::connect(socket, Duration::from_secs(10))?;
        let end = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&end);
        let thread = spawn(move || {
            let (mut states, mut answers) = (BTreeSet::new(), 0);
            while !ended.load(Ordering::Relaxed) {
                let answer = qmp.run("query-status", json!({}))?;
                states.insert(answer["status"].as_str().unwrap_or_default().to_owned());
                answers += 1;
                sleep(Duration::from_millis(10));
            }
            Ok((states, answers))
        });
        Ok(Self { end, thread })
    }

    /// The states that were seen, and in how many answers.
    fn end(self) -> Result<(BTreeSet<String>, u32)> {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|_| Err(failed("the asker panicked")))
    }
}

/// One more monitor for the lab.
fn monitor(lab: &Lab) -> (PathBuf, [String; 2]) {
    let socket = lab.scratch().join("third.sock");
    let args = ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", socket.display())];
    (socket, args)
}

fn holds_by_ptrace_leave_no_trace(lab: &Lab) -> Result<()> {
    many(lab, "ptrace", lab.scale(8, 200), &[])
}

fn holds_by_ptrace_leave_no_trace_in_a_sandbox(lab: &Lab) -> Result<()> {
    let denies = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    many(lab, "ptrace", lab.scale(4, 200), &["-sandbox", denies])
}

fn holds_by_stop_leave_no_trace(lab: &Lab) -> Result<()> {
    many(lab, "stop", lab.scale(4, 200), &[])
}

/// A host that is translated itself cannot read a Linux guest in the second that ptrace may hold it:
/// so Linux's clocks are looked at under QEMU's `stop`, and ptrace holds the ring.
fn holds_of_a_kvm_guest_leave_no_trace(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    many(lab, "stop", 50, &[])?;
    let (socket, monitor) = monitor(lab);
    let args = monitor.each_ref().map(String::as_str);
    let mut guest = lab.guest().ring(Ring::spread(32)).args(&args).boot()?;
    let (asker, events) = (Asker::start(&socket)?, guest.events()?);
    for _ in 0..100 {
        let before = guest.read_own(COUNTER_GPA, 8)?;
        let flags = ["--hold", "ptrace", "--stall-budget", "900ms", "--file-digest", "no"];
        freeze(lab, &guest, &flags)?.remove()?;
        assert_ne!(guest.read_own(COUNTER_GPA, 8)?, before, "the ring stands still");
    }
    let (states, answers) = asker.end()?;
    println!("         the ring by ptrace: {answers} answers {states:?}");
    assert!(states.iter().all(|state| state == "running"), "{states:?}");
    assert_eq!(guest.events()?, events);
    guest.finish()
}

/// Where a ring's first word lies.
const COUNTER_GPA: u64 = (8 << 20) + 0x80;

/// So many holds of one guest, which goes on as if nothing had been: its clocks, its ticks, its
/// programs, its kernel's log, QEMU's answers and events.
fn many(lab: &Lab, hold: &str, runs: u32, args: &[&str]) -> Result<()> {
    let (socket, monitor) = monitor(lab);
    let args = [args, &monitor.each_ref().map(String::as_str)].concat();
    let mut guest = lab.guest().memory_mib(128).args(&args).boot()?;
    guest.sh(COUNTER)?;
    let asker = Asker::start(&socket)?;
    let (before, events) = (Vitals::of(&mut guest)?, guest.events()?.len());
    let budget = if hold == "stop" { "5s" } else { "900ms" };
    let flags = ["--hold", hold, "--stall-budget", budget, "--file-digest", "no"];
    let (mut held, mut longest) = (Duration::ZERO, Duration::ZERO);
    let (mut tries, mut expected) = (0, 0);
    for _ in 0..runs {
        let exhibit = freeze(lab, &guest, &flags)?;
        held += stall(&exhibit.manifest);
        longest = longest.max(stall(&exhibit.manifest));
        tries += exhibit.manifest["hold"]["tries"].as_u64().unwrap_or(0);
        expected += exhibit.manifest["hold"]["expected_ns"].as_u64().unwrap_or(0);
        assert_eq!(guest.status()?, "running");
        exhibit.remove()?;
    }
    let (after, (states, answers)) = (Vitals::of(&mut guest)?, asker.end()?);
    let mut events = guest.events()?.split_off(events);
    let wall = (after.at - before.at).as_secs_f64();
    let (up, date) = (after.uptime - before.uptime, after.date - before.date);
    println!(
        "         {runs} holds ({tries} tries) by {hold}, the mean {:?} ({:?} expected), the longest \
         {longest:?}; in {wall:.2} s the guest's uptime went on by {up:.2} s, its date by {date} s, {} ticks, {} \
         rounds; {answers} answers {states:?}",
        held / runs,
        Duration::from_nanos(expected) / runs,
        after.ticks - before.ticks,
        after.rounds - before.rounds
    );
    // By QEMU's stop the guest's clock stands.
    let stood = if hold == "stop" { held.as_secs_f64() } else { 0.0 };
    let vague = wall / 50.0 + (before.took + after.took).as_secs_f64();
    assert!((up + stood - wall).abs() < 1.0 + vague, "uptime: {up} s of {wall} s");
    assert!((date + stood - wall).abs() < 2.0 + vague, "date: {date} s of {wall} s");
    assert!(after.ticks > before.ticks + 10, "{before:?} {after:?}");
    assert!(after.rounds > before.rounds + 10, "{before:?} {after:?}");
    assert_eq!(before.complaints, after.complaints, "{}", guest.sh("dmesg | tail -20")?);
    let told = if hold == "stop" { vec!["STOP", "RESUME"] } else { Vec::new() };
    for _ in 0..runs {
        let rest = events.split_off(told.len().min(events.len()));
        assert_eq!(events, told);
        events = rest;
    }
    assert_eq!(events, [""; 0], "events besides those of the holds");
    let allowed = if hold == "stop" { ["paused", "running"] } else { ["running"; 2] };
    assert!(states.iter().all(|state| allowed.contains(&&**state)), "{states:?}");
    guest.finish()
}

// The stuck thread.

/// A disk that takes two seconds for a page, by the kernel's own throttle on a process.
struct SlowDisk {
    device: String,
}

const CGROUP: &str = "/sys/fs/cgroup";

/// Bytes a second of such a disk.
const SLOW: &str = "2048";

impl SlowDisk {
    /// Slows the empty disk for a process.
    fn of(pid: u32) -> Result<Self> {
        let set = |file: &str, value: &str| {
            fs::write(format!("{CGROUP}/{file}"), value).doing(format_args!("{file}: {value}"))
        };
        set("cgroup.subtree_control", "+io")?;
        fs::create_dir(format!("{CGROUP}/slow"))?;
        set("slow/cgroup.procs", &pid.to_string())?;
        let device = fs::read_to_string("/sys/block/vdb/dev")?.trim().to_owned();
        let disk = Self { device };
        disk.limit(SLOW)?;
        Ok(disk)
    }

    /// So many bytes a second, or `max`.
    fn limit(&self, rate: &str) -> Result<()> {
        let line = format!("{} rbps={rate}", self.device);
        fs::write(format!("{CGROUP}/slow/io.max"), &line).doing(line)
    }
}

/// Looks every millisecond whether a thread is traced.
struct Watcher {
    over: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    thread: Option<JoinHandle<()>>,
}

/// What a watcher saw.
#[derive(Debug, Clone, Default)]
struct Seen {
    /// How long each hold lasted that is over, from the first to the last look that saw it: so it
    /// lasted at least so long, however late a look was.
    holds: Vec<Duration>,
    /// The longest time between two looks: so late may the machine have been for the tool too.
    late: Duration,
}

impl Watcher {
    /// Watches the guest's first CPU.
    fn start(guest: &Guest) -> Result<Self> {
        let (over, seen) = (Arc::new(AtomicBool::new(false)), Arc::<Mutex<Seen>>::default());
        let status = cpu_thread(guest.pid())?.join("status");
        let (ends, tells) = (Arc::clone(&over), Arc::clone(&seen));
        let thread = spawn(move || watch(&status, &ends, &tells));
        Ok(Self { over, seen, thread: Some(thread) })
    }

    /// What it saw so far.
    fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn end(mut self) -> Result<Seen> {
        self.over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| failed("no watcher"))?;
        thread.join().map_err(|_| failed("the watcher panicked"))?;
        Ok(self.seen())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

fn watch(status: &Path, over: &AtomicBool, tells: &Mutex<Seen>) {
    // The first and the last look that saw a hold.
    let mut hold: Option<(Instant, Instant)> = None;
    let mut last = Instant::now();
    while !over.load(Ordering::Relaxed) {
        let before = Instant::now();
        let traced = proc::number_in(status, "TracerPid").is_ok_and(|pid| pid != 0);
        let after = Instant::now();
        let mut seen = tells.lock().unwrap_or_else(PoisonError::into_inner);
        seen.late = seen.late.max(after - last);
        last = after;
        hold = match (traced, hold) {
            (true, None) => Some((after, after)),
            (true, Some((first, _))) => Some((first, before)),
            (false, Some((first, until))) => {
                seen.holds.push(until - first);
                None
            }
            (false, None) => None,
        };
        drop(seen);
        sleep(Duration::from_millis(1));
    }
}

fn cpu_thread(pid: u32) -> Result<PathBuf> {
    for thread in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        let name = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
        if name.starts_with("CPU 0/") {
            return Ok(thread.path());
        }
    }
    Err(failed("QEMU has no thread for a CPU"))
}

/// The stall budget of a guest with a stuck thread, in milliseconds: what a host that is translated
/// itself needs for this little memory.
const BUDGET: u64 = 900;

/// A watcher that is never so late sees each hold: before it is given up, the tool waits longer for
/// the thread that is stuck.
const HOLD_SEEN: Duration = Duration::from_millis(100);

/// QEMU's workers wait for their disk in the kernel, where nothing stops them: the other threads are
/// let go in time, and the hold is tried again, until it is given up, or until the disk answers.
fn a_stuck_thread_ends_a_hold(lab: &Lab) -> Result<()> {
    let drive = "file=/dev/vdb,format=raw,if=none,id=slow,cache=none,aio=threads";
    let mut guest = lab.guest().ring(Ring::pair(24)).args(&["-drive", drive]).boot()?;
    let (disk, out) = (SlowDisk::of(guest.pid())?, new_dir(lab, "stuck")?);
    keep_busy(&mut guest)?;
    let (tool, watcher) = hold_in_vain(lab, &guest, &out)?;
    let ended = tool.end()?.expect(1)?;
    let reason = ended.partial(lab, "failed")?;
    let journal = journal(&ended.exhibit()?.0)?;
    let [given_up, lost] =
        ["\"hold-given-up\"", "\"holder-lost\""].map(|w| journal.matches(w).count());
    let seen = watcher.end()?;
    println!("         held in vain for {seen:?}: {reason}");
    assert!(reason.contains("in state D"), "{reason}");
    // Each try that the guest felt is in the journal, and a watcher that is not late sees each.
    let felt = seen.holds.len();
    assert!(given_up > 1 && (1..=given_up + lost).contains(&felt), "{given_up} given up, {seen:?}");
    assert!(felt >= given_up || seen.late > HOLD_SEEN, "{given_up} given up, {seen:?}");
    assert_short(&seen);

    unless_slow(|| {
        let (mut tool, watcher) = hold_in_vain(lab, &guest, &out)?;
        let until = Instant::now() + Duration::from_secs(120);
        while watcher.seen().holds.len() < 2 {
            if !tool.runs()? || Instant::now() > until {
                let ended = tool.end()?.expect(0)?;
                return Err(failed(format_args!("it does not try: {:?}", ended.stderr)));
            }
            sleep(Duration::from_millis(1));
        }
        disk.limit("max")?;
        let ended = tool.end()?;
        if ended.is_late() {
            // It is tried again.
            disk.limit(SLOW)?;
            keep_busy(&mut guest)?;
        }
        let manifest = ended.expect(0)?.complete(lab)?;
        let (seen, hold) = (watcher.end()?, &manifest["hold"]);
        println!("         held for {seen:?}, then as {hold}");
        assert_eq!(manifest["class"], "instantaneous");
        assert!(hold["tries"].as_u64() > Some(2), "{hold}");
        assert_short(&seen);
        Ok(())
    })?;
    guest.finish()
}

/// Reads of the slow disk for ten minutes.
fn keep_busy(guest: &mut Guest) -> Result<()> {
    for number in 0..300 {
        guest.human(&format!("qemu-io slow \"aio_read {}k 4k\"", number * 64))?;
    }
    Ok(())
}

/// A run that tries to hold the guest, and who watches it.
fn hold_in_vain(lab: &Lab, guest: &Guest, out: &Path) -> Result<(Running, Watcher)> {
    let (budget, vm) = (format!("{BUDGET}ms"), guest.pid().to_string());
    let watcher = Watcher::start(guest)?;
    let tool = begin(|| {
        let mut command =
            lab.tool_command(["acquire", "--method", "freeze", "--hold", "ptrace"])?;
        command.args(["--stall-budget", &budget, "--json", "-o"]).arg(out).args(["--", &vm]);
        Running::start(command)
    })?;
    Ok((tool, watcher))
}

/// No hold is past its budget and the tenth of a second that it may take to end one by force.
#[track_caller]
fn assert_short(seen: &Seen) {
    let longest = seen.holds.iter().max().copied().unwrap_or_default();
    let allowed = Duration::from_millis(BUDGET + 100) + seen.late;
    assert!(longest < allowed, "held past the deadline: {seen:?}");
}

fn journal(exhibit: &Path) -> Result<String> {
    fs::read_to_string(exhibit.join("journal.jsonl")).doing("reading the journal")
}

fn a_plan_is_kept(lab: &Lab) -> Result<()> {
    let guest = lab.guest().memory_mib(128).boot()?;
    let vm = guest.pid().to_string();
    let plan = |flags: &[&str]| lab.tool([&["plan", &vm], flags].concat());
    let text = plan(&["--stall-budget", "2s"])?.expect_code(0)?.stdout;
    assert!(text.contains("method   freeze") && text.contains("hold     by ptrace"), "{text}");
    let mut last = plan(&["--stall-budget", "1ms"])?.expect_code(4)?;
    let mut hint = String::new();
    // It holds for what was measured then: a machine that is busier now may need more.
    for _ in 0..6 {
        if last.status.code() != Some(4) {
            break;
        }
        hint = hinted(&last.stderr)?;
        println!("         --stall-budget {hint} advised");
        last = plan(&["--stall-budget", &hint])?;
    }
    let text = last.expect_code(0)?.stdout;
    assert!(text.contains("method   freeze"), "--stall-budget {hint}: {text}");
    let any = ["--consistency", "any", "--stall-budget", "1ms"];
    let text = plan(&any)?.expect_code(0)?.stdout;
    assert!(text.contains("method   live"), "{text}");

    let out = new_dir(lab, "planned")?;
    let args = ["acquire", &vm, "--stall-budget", "2s", "-o", out.to_str().unwrap_or_default()];
    lab.tool(args)?.expect_code(0)?;
    let manifest = only(&out)?.manifest;
    assert_eq!([&manifest["method"], &manifest["class"]], ["freeze", "instantaneous"]);
    let expected = seconds(&manifest["hold"]["expected_ns"]);
    let held = stall(&manifest).as_secs_f64();
    println!("         expected {expected:.4} s, held {held:.4} s");
    assert!(held < expected * 10.0 && expected < held * 10.0, "no prediction");
    guest.finish()
}

/// The stall budget that a refusal advises.
fn hinted(stderr: &str) -> Result<String> {
    let hint = stderr.lines().find_map(|line| line.strip_prefix("hint: --stall-budget "));
    hint.map(str::to_owned).ok_or_else(|| failed(stderr))
}
