//! `snapshot`: QEMU's own background snapshot, of which the tool is the reader. The image is of one
//! instant, the guest is not held up by whoever hangs, and QEMU keeps no setting of it, whatever
//! happens meanwhile. Each test prints its figures.

mod blows;
mod meanwhile;
mod pulse;
mod slowdisk;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::tear::{Runs, Scan};
use lab::tearbench::Options;
use lab::{
    Accel, Backing, Builder, Doing, Guest, Lab, Machine, Result, Ring, Version, failed,
    file_filler, here, outer,
};
use serde_json::{Value, json};

use self::pulse::{Pulse, Stalls, Writer};
use super::exhibit::{Exhibit, Image, acquire, at_best};
use super::faults::{Crawl, until_migration_is};
use super::live::assert_equals_pmemsave;
use super::run::{Ended, Family, Running, names, new_dir, recover, undo_files, verify};
use super::{tear, tearbench};

pub(crate) const TESTS: &[lab::runner::Test] = here![
    a_stream_that_nobody_reads_stops_the_ring,
    an_old_qemu_that_is_left_alone_hangs_for_ever,
    fast_rings_are_of_one_instant,
    slow_rings_are_of_one_instant,
    linux_is_of_one_instant,
    the_device_state_is_of_the_same_instant,
    a_guest_that_halts_is_the_same_by_snapshot_and_by_freeze,
    a_migration_afterwards_is_a_migration,
    an_old_qemu_is_refused,
    a_paused_guest_is_refused,
    a_guest_with_a_block_job_is_refused,
    a_migrating_guest_is_refused,
    a_guest_whose_memory_others_write_is_refused,
];

pub(crate) use blows::TESTS as BLOWS;
pub(crate) use meanwhile::TESTS as MEANWHILE;

pub(crate) const OUTER: &[lab::runner::Test] = outer![rings_of_kvm_guests_are_of_one_instant];

/// The tool's word for the method, and the class that it must earn.
const METHOD: &str = "snapshot";
const CLASS: &str = "quasi-instantaneous";

/// What the guest may stand still for: far more than QEMU takes.
const BUDGET: Duration = Duration::from_secs(1);
const FLAGS: [&str; 4] = ["--stall-budget", "1s", "--file-digest", "no"];

/// What the tool promises beyond the stall budget.
const PROMISED: Duration = Duration::from_millis(100);

/// In this time a guest is seen to run again, whoever was killed, by a lab that may be late itself. What is
/// promised is less, and [`in_time`] holds it.
const SOON: Duration = Duration::from_secs(10);

/// In this time QEMU has its settings back, unless those who know them are gone.
const RESTORED: Duration = Duration::from_secs(5);

// A guest that is acquired over and over.

/// A guest that counts, the tool's processes around it, and where it writes.
struct Subject<'a> {
    lab: &'a Lab,
    guest: Guest,
    ring: Ring,
    writer: Writer,
    family: Family,
}

/// What lay in the output after a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    Nothing,
    Partial,
    Whole,
}

impl<'a> Subject<'a> {
    fn boot(lab: &'a Lab, ring: Ring, version: Version) -> Result<Self> {
        Self::boot_like(lab, ring, |guest| guest.version(version))
    }

    fn boot_like(lab: &'a Lab, ring: Ring, like: impl FnOnce(Builder) -> Builder) -> Result<Self> {
        let mut guest = like(lab.guest().ring(ring.clone())).boot()?;
        let writer = Writer::of(&mut guest, &ring)?;
        Ok(Self { lab, guest, ring, writer, family: Family::of(lab)? })
    }

    /// An acquisition, not yet started.
    fn command(&self, out: &Path) -> Result<Command> {
        let mut command = self.lab.tool_command(["acquire", "--method", METHOD, "--json"])?;
        command.args(FLAGS).arg("-o").arg(out).arg(self.guest.pid().to_string());
        Ok(command)
    }

    fn start(&self, out: &Path) -> Result<Running> {
        Running::start(self.command(out)?)
    }

    /// How much of QEMU's stream is out, from 0 to 1; `None` while there is none under way.
    fn streamed(&mut self) -> Result<Option<f64>> {
        let migration = self.guest.qmp("query-migrate", json!({}))?;
        let of = |field: &str| migration["ram"][field].as_f64().unwrap_or(1.0);
        let part = 1.0 - of("remaining") / of("total").max(1.0);
        Ok((migration["status"] == "active").then_some(part))
    }

    /// Whether the stream is under way with so much more to come that it cannot end in a moment.
    fn is_midway(&mut self) -> Result<bool> {
        Ok(self.streamed()?.is_some_and(|part| part < 0.7))
    }

    /// The same, and until when that holds for sure: a lab that stands after it asked comes too late.
    fn midway_until(&mut self) -> Result<Option<Instant>> {
        let until = Instant::now() + Duration::from_millis(50);
        Ok(self.is_midway()?.then_some(until))
    }

    /// Waits until so much of the stream is out; false when the run ended before.
    fn await_stream(&mut self, run: &mut Running, part: f64) -> Result<bool> {
        let until = Instant::now() + Duration::from_secs(60);
        while Instant::now() < until {
            if self.streamed()?.is_some_and(|now| now >= part) {
                return Ok(true);
            }
            if !run.runs()? {
                return Ok(false);
            }
            sleep(Duration::from_millis(1));
        }
        Err(failed("no snapshot begins"))
    }

    /// Waits until QEMU has its settings back and the guest is as it was found.
    fn await_as_found(&mut self, within: Duration) -> Result<()> {
        let until = Instant::now() + within;
        loop {
            match self.guest.assert_as_found() {
                Ok(()) => return Ok(()),
                Err(e) if Instant::now() > until => {
                    return Err(e).doing(format_args!("{within:?}"));
                }
                Err(_) => sleep(Duration::from_millis(10)),
            }
        }
    }

    /// As [`Subject::assert_clean`], for a guest that takes its time to be itself again.
    fn await_clean(&mut self, within: Duration) -> Result<()> {
        let until = Instant::now() + within;
        while Instant::now() < until {
            if self.assert_clean().is_ok() {
                return Ok(());
            }
        }
        self.assert_clean()
    }

    /// Nothing of a run is left: no process, no file, no stream; the guest is as it was and writes.
    fn assert_clean(&mut self) -> Result<()> {
        self.family.await_gone()?;
        recover(self.lab, &self.guest)?;
        let files = undo_files(&self.guest);
        if !files.is_empty() {
            return Err(failed(format_args!("recover left {files:?}")));
        }
        self.guest.assert_as_found()?;
        let migration = self.guest.qmp("query-migrate", json!({}))?;
        let ended = ["completed", "failed", "cancelled"].map(Value::from);
        if !migration["status"].is_null() && !ended.contains(&migration["status"]) {
            return Err(failed(format_args!("a snapshot is still under way: {migration}")));
        }
        self.writer.goes_on(SOON)
    }

    /// The exhibit of a run that nobody disturbs, how long the run took, and how long until the stream was
    /// over.
    fn whole(&mut self) -> Result<(Exhibit, [Duration; 2])> {
        let out = self.lab.scratch().join("whole");
        fs::create_dir_all(&out)?;
        let mut streamed = Duration::ZERO;
        let ended = at_best(|| {
            let pulse = Pulse::start(&mut self.guest, &self.ring)?;
            let start = Instant::now();
            let mut run = self.start(&out)?;
            // One that ends before is judged by its end.
            let _ = run.until(|event| event["event"] == "pass");
            streamed = start.elapsed();
            let ended = run.end()?;
            in_time(pulse.end()?)?;
            Ok(ended)
        })?
        .expect(0)?;
        assert_eq!(undo_files(&self.guest), [""; 0]);
        ended.complete(self.lab)?;
        let exhibit = Exhibit::open(&ended.exhibit()?.0)?;
        assert_snapshot(&exhibit.manifest)?;
        self.assert_clean()?;
        Ok((exhibit, [ended.took, streamed]))
    }

    /// What is left in `out` must be what it looks like, and what the run said of it.
    fn judge(&self, out: &Path, ended: &Ended) -> Result<Left> {
        let code = ended.status.code();
        let bad = |what: &str| {
            let Ended { status, events, stderr, .. } = ended;
            Err(failed(format_args!("{what}: ended with {status}; {events:?}; {stderr}")))
        };
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
        let exhibit = Exhibit::open(&dir)?;
        let fits = match verdict {
            Some(0) => exhibit.manifest["status"] == "complete",
            Some(3) => code == Some(3),
            _ => false,
        };
        // Killed between the new name and the last word, it said nothing.
        if !fits || (ended.done("exit") != json!(verdict) && code.is_some()) {
            return bad(&format!("verify says {verdict:?} of {name}"));
        }
        if exhibit.manifest["class"] != "none" {
            assert_snapshot(&exhibit.manifest)?;
            assert_eq!(exhibit.manifest["disturbances"], json!([]));
            self.assert_of_one_instant(&exhibit.image()?)?;
        }
        Ok(Left::Whole)
    }

    fn assert_of_one_instant(&self, image: &Image) -> Result<()> {
        let mut scan = Scan::new(&self.ring);
        image.each(|gpa, bytes| scan.piece(gpa, bytes))?;
        let verdict = scan.verdict()?;
        match verdict.is_torn() {
            true => Err(failed(format_args!("the image is torn: {verdict}"))),
            false => Ok(()),
        }
    }
}

/// Fails when a guest stood still for longer than is promised.
fn in_time(stalls: Stalls) -> Result<()> {
    match stalls.longest <= BUDGET + PROMISED + stalls.late {
        true => Ok(()),
        false => Err(failed(format_args!("the guest stood for more than {BUDGET:?}: {stalls:?}"))),
    }
}

fn ns(value: &Value) -> Result<u64> {
    value.as_u64().ok_or_else(|| failed(format_args!("{value} is no time")))
}

/// The record of a whole snapshot is one that can be true.
fn assert_snapshot(manifest: &Value) -> Result<()> {
    let (snapshot, tau) = (&manifest["snapshot"], &manifest["tau"]);
    let said = [&manifest["method"], &manifest["class"]];
    assert_eq!(said, [METHOD, CLASS], "{}", manifest["disturbances"]);
    let [t0, t1] = [ns(&snapshot["stop"]["t0_ns"])?, ns(&snapshot["stop"]["t1_ns"])?];
    let (at, bound) = (ns(&tau["mono_ns"])?, ns(&tau["bound_ns"])?);
    assert!(t0 < t1 && Duration::from_nanos(t1 - t0) <= BUDGET, "{snapshot}");
    assert!((t0..=t1).contains(&at) && bound >= (t1 - t0) / 2, "{tau}, {snapshot}");
    let [bytes, pages] = ["stream_bytes", "pages"].map(|field| snapshot[field].as_u64());
    assert!(pages > Some(0) && bytes > pages.map(|pages| pages * 4096), "{snapshot}");
    assert!(snapshot["zero_pages"].is_u64() && snapshot["qemu_downtime_ms"].is_u64(), "{snapshot}");
    assert!(snapshot["longest_wait_ns"].is_u64(), "{snapshot}");
    let audit = &manifest["audit"];
    // Whoever audits may come too late for a quick QEMU: then there is none.
    let equal = audit["pages"].as_u64() > Some(0) && audit["differing"] == 0;
    assert!(equal || audit.is_null(), "{audit}");
    Ok(())
}

// The control of all that is said of stalls.

fn set_background_snapshot(guest: &mut Guest, state: bool) -> Result<()> {
    let capability = json!({ "capability": "background-snapshot", "state": state });
    guest.qmp("migrate-set-capabilities", json!({ "capabilities": [capability] })).map(drop)
}

/// A guest that waits for a reader who reads nothing, until that one is gone; how long it stood.
/// Nothing of the tool takes part. QEMU says that it runs: only what the guest writes tells.
fn nobody_reads(lab: &Lab, version: Version) -> Result<(Subject<'_>, Stalls)> {
    let mut subject = Subject::boot(lab, Ring::wide(64), version)?;
    let socket = lab.scratch().join("sink.sock");
    let listener = UnixListener::bind(&socket)?;
    set_background_snapshot(&mut subject.guest, true)?;
    let uri = format!("unix:{}", socket.display());
    subject.guest.qmp("migrate", json!({ "uri": uri }))?;
    let (reader, _) = listener.accept()?;
    until_migration_is(&mut subject.guest, "active")?;
    let pulse = Pulse::start(&mut subject.guest, &subject.ring)?;
    sleep(Duration::from_millis(700));
    assert!(subject.writer.stands(Duration::from_millis(300))?, "void: it writes");
    assert!(subject.is_midway()?, "the stream is not under way");
    assert_eq!(subject.guest.status()?, "running");
    let stalls = pulse.end()?;
    drop(reader);
    until_migration_is(&mut subject.guest, "failed")?;
    Ok((subject, stalls))
}

fn a_stream_that_nobody_reads_stops_the_ring(lab: &Lab) -> Result<()> {
    let (mut subject, stalls) = nobody_reads(lab, Version::V10_0)?;
    subject.writer.goes_on(SOON)?;
    println!("         {stalls:?}");
    assert!(stalls.longest > Duration::from_millis(600), "void: {stalls:?}");
    // QEMU keeps the capability: the guest is not as found.
    assert!(subject.guest.assert_as_found().is_err());
    set_background_snapshot(&mut subject.guest, false)?;
    subject.guest.finish()
}

/// Before 8.1 QEMU keeps the protection of a snapshot that broke off or was cancelled: the guest waits
/// for ever, and QEMU says that it runs. Mended by "migration: stop tracking ram writes when
/// cancelling background migration" (3a8b81f2e639, 2023), which Debian's 7.2.22 has not.
fn an_old_qemu_that_is_left_alone_hangs_for_ever(lab: &Lab) -> Result<()> {
    let (mut subject, _) = nobody_reads(lab, Version::V7_2)?;
    let hangs = subject.writer.stands(Duration::from_secs(3))?;
    assert_eq!(subject.guest.status()?, "running");
    // No `finish`: it would not even stop.
    match hangs {
        true => Ok(()),
        false => Err(failed("it goes on: this QEMU need not be refused")),
    }
}

// One instant.

/// What the records say of the runs.
#[derive(Debug, Default)]
struct Figures {
    runs: u32,
    stops: Duration,
    longest_stop: Duration,
    longest_wait: Duration,
    qemu_ms: u64,
    audited: u64,
}

impl Figures {
    fn add(&mut self, manifest: &Value) -> Result<()> {
        assert_snapshot(manifest)?;
        let snapshot = &manifest["snapshot"];
        let stop = ns(&snapshot["stop"]["t1_ns"])? - ns(&snapshot["stop"]["t0_ns"])?;
        let (stop, wait) = (Duration::from_nanos(stop), ns(&snapshot["longest_wait_ns"])?);
        // It may be beyond the budget, by as much as who looked was late.
        let wait = Duration::from_nanos(wait);
        self.runs += 1;
        self.stops += stop;
        self.longest_stop = self.longest_stop.max(stop);
        self.longest_wait = self.longest_wait.max(wait);
        self.qemu_ms = self.qemu_ms.max(snapshot["qemu_downtime_ms"].as_u64().unwrap_or(0));
        self.audited += manifest["audit"]["pages"].as_u64().unwrap_or(0);
        Ok(())
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let runs = self.runs.max(1);
        write!(
            f,
            "stopped for {:?} in the mean, {:?} at most ({} ms by QEMU), unread for {:?} at most, \
             {} pages audited",
            self.stops / runs,
            self.longest_stop,
            self.qemu_ms,
            self.longest_wait,
            self.audited / u64::from(runs)
        )
    }
}

/// `n` images of each ring in its kind of memory, none of them torn; then the controls of the same
/// guest, without which that would say nothing.
fn of_one_instant(lab: &Lab, cases: &[(Ring, Backing)], n: u32, controls: u32) -> Result<()> {
    for (ring, backing) in cases {
        for again in [true, false] {
            let mut subject = tear::Subject::boot(lab, ring.clone(), *backing, Version::V10_0)?;
            match is_of_one_instant(lab, &mut subject, n, controls) {
                Ok(()) => {
                    subject.guest.finish()?;
                    break;
                }
                // A guest under KVM on a translated host now and then loses its way: that shows nothing.
                Err(error) if again && reset_itself(&mut subject.guest)? => {
                    println!("         void: the guest has reset itself: {error}");
                }
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn reset_itself(guest: &mut Guest) -> Result<bool> {
    Ok(Accel::from_env() == Accel::Kvm && guest.events()?.iter().any(|event| event == "RESET"))
}

fn is_of_one_instant(lab: &Lab, subject: &mut tear::Subject, n: u32, controls: u32) -> Result<()> {
    let (mut runs, mut figures) = (Runs::default(), Figures::default());
    for _ in 0..n {
        let exhibit = acquire(lab, &subject.guest, METHOD, &FLAGS)?;
        figures.add(&exhibit.manifest)?;
        runs.count(&subject.judge(exhibit)?);
    }
    let controls = subject.controls(lab, controls)?;
    subject.report(&format!("snapshot {runs}, {controls}; {figures}"))?;
    controls.hold()?;
    assert_eq!(runs.torn, 0, "snapshot: {runs}");
    assert!(figures.audited > 0, "void: nothing was audited");
    Ok(())
}

/// Both rings on either kind of memory; of the first two, each once.
fn cases(like: impl Fn(Ring) -> Ring) -> [(Ring, Backing); 4] {
    let mib = tear::memory_mib();
    let (pair, spread) = (like(Ring::pair(mib)), like(Ring::spread(mib)));
    [
        (pair.clone(), Backing::Anonymous),
        (spread.clone(), Backing::Memfd),
        (pair, Backing::Memfd),
        (spread, Backing::Anonymous),
    ]
}

fn fast_rings_are_of_one_instant(lab: &Lab) -> Result<()> {
    let cases = cases(|ring| ring);
    of_one_instant(lab, &cases[..lab.scale(2, 4)], lab.scale(10, 60), lab.scale(1, 10))
}

/// A slow writer leaves its pages protected for longer: more are sent before it comes to them.
fn slow_rings_are_of_one_instant(lab: &Lab) -> Result<()> {
    let cases = cases(|ring| ring.delay(100_000));
    of_one_instant(lab, &cases[..lab.scale(1, 4)], lab.scale(10, 60), lab.scale(1, 5))
}

fn rings_of_kvm_guests_are_of_one_instant(lab: &Lab) -> Result<()> {
    let cases = cases(|ring| ring);
    of_one_instant(lab, &cases[..lab.scale(1, 4)], lab.scale(3, 60), lab.scale(1, 5))
}

fn linux_is_of_one_instant(lab: &Lab) -> Result<()> {
    let trial = tearbench::Trial {
        method: METHOD,
        flags: &FLAGS,
        class: CLASS,
        runs: lab.scale(2, 25),
        controls: lab.scale(1, 8),
    };
    let backings = [Backing::Anonymous, Backing::Memfd];
    for &backing in &backings[..lab.scale(1, 2)] {
        let like = |guest: Builder| guest.backing(backing);
        let subject = tearbench::Subject::boot(lab, like, &Options::default());
        let tried = subject.and_then(|mut subject| {
            subject.is_one_instant(lab, &trial)?;
            subject.finish()
        });
        tried.doing(format_args!("{backing:?}"))?;
    }
    Ok(())
}

// The device state.

/// QEMU's magic for a stream of migration, and the stream's version (migration/qemu-file-types.h,
/// savevm.h).
const STREAM: [u8; 8] = *b"QEVM\0\0\0\x03";

/// The attachment, which must be a stream of migration that the record and SHA256SUMS name.
fn device_state(exhibit: &Exhibit) -> Result<Vec<u8>> {
    let name = "device-state.bin";
    let bytes = fs::read(exhibit.dir.join(name)).doing(name)?;
    assert!(bytes.starts_with(&STREAM), "{:x?}", &bytes[..bytes.len().min(16)]);
    exhibit.assert_sums()?;
    let attachments = exhibit.manifest["attachments"].as_array().into_iter().flatten();
    assert!(attachments.map(|file| &file["file"]).any(|file| file == name), "not in the record");
    let devices = exhibit.manifest["snapshot"]["devices"].as_array();
    let devices = devices.ok_or_else(|| failed("no devices"))?;
    let has = |name: &str| devices.iter().any(|device| device["name"] == name);
    assert!((has("cpu") || has("cpu_common")) && has("timer"), "{devices:?}");
    let len: u64 = devices.iter().filter_map(|device| device["len"].as_u64()).sum();
    assert!(len > 0 && len <= u64::try_from(bytes.len())?, "{len} of {} bytes", bytes.len());
    Ok(bytes)
}

/// Whether these bytes hold a number as QEMU's stream does.
fn holds(bytes: &[u8], number: u64) -> bool {
    bytes.windows(8).any(|window| window == number.to_be_bytes())
}

/// The ring's writer keeps the number of its next store in a register, which is in the device
/// state: it is the one that follows the greatest number in memory, or that number still.
fn the_device_state_is_of_the_same_instant(lab: &Lab) -> Result<()> {
    let ring = Ring::spread(64);
    let subject = tear::Subject::boot(lab, ring, Backing::Anonymous, Version::V10_0)?;
    let mut older = None;
    for _ in 0..lab.scale(3, 20) {
        let exhibit = acquire(lab, &subject.guest, METHOD, &FLAGS[..2])?;
        let state = device_state(&exhibit)?;
        let last = subject.judge(exhibit)?.max;
        let near = (last.saturating_sub(3)..last + 4).filter(|&n| holds(&state, n));
        let near: Vec<u64> = near.collect();
        assert!(near == [last] || near == [last + 1], "{near:?}, memory holds {last}");
        // The control: it would be seen if the register were of another time.
        assert!(!older.is_some_and(|older| holds(&state, older)), "void: {older:?}");
        older = Some(last);
    }
    subject.guest.finish()
}

// Equality.

/// A file in the host's memory, full of [`file_filler`]; dropped, it is removed.
struct Filled(PathBuf);

impl Filled {
    fn new(mib: u64) -> Result<Self> {
        let filled = Self(PathBuf::from(format!("/dev/shm/stillframe-lab-{}", std::process::id())));
        let mut file = File::create(&filled.0).doing(filled.0.display())?;
        for page in 0..mib << 8 {
            file.write_all(&file_filler(page))?;
        }
        Ok(filled)
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// Nothing of the guest changes, and so the two methods must find the same: by the root over all
/// digests, byte for byte, and as QEMU's own `pmemsave` says.
fn a_guest_that_halts_is_the_same_by_snapshot_and_by_freeze(lab: &Lab) -> Result<()> {
    let like = |mib| move |guest: Builder| guest.memory_mib(mib);
    halts(lab, "64 MiB", like(64))?;
    let memfd = |guest| like(256)(guest).backing(Backing::Memfd);
    halts(lab, "memfd, most of it holes", memfd)?;
    let large = |guest| like(5 << 10)(guest).machine(Machine::Q35);
    halts(lab, "5 GiB, nearly all of it holes", large)?;
    dimm(lab, like(64)).doing("a DIMM")
}

/// Its first 64 MiB hold the ring, and the rest was never touched.
fn halting(lab: &Lab, like: impl FnOnce(Builder) -> Builder) -> Result<Guest> {
    let ring = Ring::spread(64).halting();
    let mut guest = like(lab.guest().ring(ring.clone())).boot()?;
    let writer = Writer::of(&mut guest, &ring)?;
    assert!(writer.stands(Duration::from_millis(200))?, "void: it does not halt");
    assert_eq!(writer.at()?, 2 * ring.words() - 3, "it halts after the first lap");
    Ok(guest)
}

fn halts(lab: &Lab, what: &str, like: impl FnOnce(Builder) -> Builder) -> Result<()> {
    let mut guest = halting(lab, like)?;
    same_by_both(lab, &mut guest).doing(what)?.remove()?;
    guest.finish()
}

/// The snapshot's exhibit.
fn same_by_both(lab: &Lab, guest: &mut Guest) -> Result<Exhibit> {
    let held = ["--stall-budget", "20s", "--hold", "stop", "--file-digest", "no"];
    let before = acquire(lab, guest, "freeze", &held)?;
    let snapshot = acquire(lab, guest, METHOD, &FLAGS)?;
    let root = |exhibit: &Exhibit| exhibit.manifest["memory_root"].clone();
    assert!(root(&before).is_string(), "no root");
    assert_eq!(root(&before), root(&snapshot), "by freeze and by snapshot");
    lab.tool([Path::new("verify"), &snapshot.dir])?.expect_code(0)?;
    let image = snapshot.image()?;
    // Where nearly all is holes, the root must do: they are none any more after the snapshot.
    if image.len() < 1 << 30 {
        assert_equals_pmemsave(guest, &image)?;
        // The snapshot has changed nothing itself.
        let after = acquire(lab, guest, "freeze", &held)?;
        assert_eq!(root(&before), root(&after), "before and after");
        after.remove()?;
    }
    before.remove()?;
    Ok(snapshot)
}

/// A DIMM above 4 GiB with content that no guest has written.
fn dimm(lab: &Lab, like: impl FnOnce(Builder) -> Builder) -> Result<()> {
    let (mib, gpa) = (64, 1 << 32);
    let file = Filled::new(mib)?;
    let object =
        format!("memory-backend-file,id=d0,size={mib}M,share=on,mem-path={}", file.0.display());
    let args = ["-m", "slots=2,maxmem=1G", "-object", &object, "-device", "pc-dimm,memdev=d0"];
    let mut guest = halting(lab, |guest| like(guest.args(&args)))?;
    let exhibit = same_by_both(lab, &mut guest)?;
    let bytes = exhibit.image()?.read(gpa, mib << 20)?;
    let wrong = (0..).zip(bytes.chunks(4096)).find(|(page, bytes)| file_filler(*page) != **bytes);
    assert!(wrong.is_none(), "page {:?} of the DIMM", wrong.map(|(page, _)| page));
    exhibit.remove()?;
    guest.finish()
}

// Afterwards.

/// A migration to a file by another client, as a manager would; the guest goes on afterwards. The
/// run state in which QEMU leaves the guest, and the length of the stream.
fn migrate(lab: &Lab, guest: &mut Guest) -> Result<(String, u64)> {
    let file = lab.scratch().join("migrated");
    guest.qmp("migrate", json!({ "uri": format!("exec:cat > {}", file.display()) }))?;
    until_migration_is(guest, "completed")?;
    let state = state_after_migration(guest)?;
    let len = fs::metadata(&file)?.len();
    assert!(fs::read(&file)?.starts_with(&STREAM), "no stream of migration");
    fs::remove_file(file)?;
    if state != "running" {
        guest.qmp("cont", json!({}))?;
    }
    Ok((state, len))
}

/// QEMU says that a migration is completed a moment before the guest has its run state.
fn state_after_migration(guest: &mut Guest) -> Result<String> {
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let state = guest.status()?;
        if state != "finish-migrate" || Instant::now() > until {
            return Ok(state);
        }
        sleep(Duration::from_millis(10));
    }
}

/// With the capability left set, QEMU says that it migrated and the guest runs on here too.
fn a_migration_afterwards_is_a_migration(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab, Ring::spread(64), Version::V10_0)?;
    let before = migrate(lab, &mut subject.guest)?;
    assert_eq!(before.0, "postmigrate");
    subject.whole()?.0.remove()?;
    let after = migrate(lab, &mut subject.guest)?;
    println!("         migrated to {before:?}, after a snapshot to {after:?}");
    assert_eq!(after.0, "postmigrate");
    assert!(after.1 > 32 << 20, "{} bytes hold no such guest", after.1);
    // The control: that would be seen.
    set_background_snapshot(&mut subject.guest, true)?;
    assert_eq!(migrate(lab, &mut subject.guest)?.0, "running", "void");
    set_background_snapshot(&mut subject.guest, false)?;
    subject.assert_clean()?;
    subject.guest.finish()
}

// Refusals.

/// Demands a refusal, exit code 4, that speaks of one of these, and that did nothing.
fn refused(subject: &mut Subject<'_>, words: &[&str]) -> Result<()> {
    let out = new_dir(subject.lab, "refused")?;
    let events = subject.guest.events()?;
    let ended = subject.start(&out)?.end()?.expect(4)?;
    if !words.iter().any(|word| ended.stderr.contains(word)) {
        return Err(failed(format_args!("none of {words:?} is in: {}", ended.stderr)));
    }
    assert_eq!(names(&out)?, [""; 0], "something was made by a run that was refused");
    subject.family.await_gone()?;
    assert_eq!(undo_files(&subject.guest), [""; 0]);
    let now = subject.guest.events()?;
    let new = now.get(events.len()..).unwrap_or_default();
    assert!(!new.iter().any(|event| event == "STOP" || event == "RESUME"), "{new:?}");
    fs::remove_dir(&out)?;
    subject.guest.assert_as_found()
}

fn an_old_qemu_is_refused(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab, Ring::spread(64), Version::V7_2)?;
    refused(&mut subject, &["8.1"])?;
    subject.writer.goes_on(SOON)?;
    subject.guest.finish()
}

fn a_paused_guest_is_refused(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab, Ring::spread(64), Version::V10_0)?;
    subject.guest.stop()?;
    refused(&mut subject, &["paused", "stopped", "not running"])?;
    assert!(subject.writer.stands(Duration::from_millis(50))?);
    subject.guest.cont()?;
    subject.whole()?.0.remove()?;
    subject.guest.finish()
}

fn a_guest_with_a_block_job_is_refused(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab, Ring::spread(64), Version::V10_0)?;
    let blocks = subject.guest.qmp("query-block", json!({}))?;
    let disk = blocks.as_array().into_iter().flatten().find(|block| block["inserted"].is_object());
    let disk = disk.map(|block| block["device"].clone()).ok_or_else(|| failed("no disk"))?;
    let target = lab.scratch().join("mirror");
    let mirror = json!({
        "device": disk, "target": target, "format": "raw", "sync": "full", "speed": 4096
    });
    subject.guest.qmp("drive-mirror", mirror)?;
    let job = |guest: &mut Guest| guest.qmp("query-block-jobs", json!({}));
    let jobs = |answer: &Value| answer.as_array().map_or(0, Vec::len);
    assert_eq!(jobs(&job(&mut subject.guest)?), 1, "void: no job");
    refused(&mut subject, &["mirror", "block job"])?;
    assert_eq!(jobs(&job(&mut subject.guest)?), 1, "the job is gone");
    subject.guest.qmp("block-job-cancel", json!({ "device": disk, "force": true }))?;
    let until = Instant::now() + Duration::from_secs(60);
    while jobs(&job(&mut subject.guest)?) > 0 {
        assert!(Instant::now() < until, "the job does not end");
        sleep(Duration::from_millis(10));
    }
    subject.whole()?.0.remove()?;
    subject.guest.finish()
}

fn a_migrating_guest_is_refused(lab: &Lab) -> Result<()> {
    let mut subject = Subject::boot(lab, Ring::spread(64), Version::V10_0)?;
    let found = subject.guest.qmp("query-migrate-parameters", json!({}))?;
    let crawl = Crawl::begin(&mut subject.guest)?;
    let out = new_dir(lab, "out")?;
    let ended = subject.start(&out)?.end()?.expect(4)?.says(&["migration"])?;
    assert_eq!(names(&out)?, [""; 0], "{}", ended.stderr);
    crawl.end(&mut subject.guest)?;
    assert_eq!(subject.guest.qmp("query-migrate-parameters", json!({}))?, found);
    fs::remove_dir(&out)?;
    subject.whole()?.0.remove()?;
    subject.guest.finish()
}

/// As a backend of vhost-user that was plugged in later: another process has the guest's memory mapped,
/// writes past the protection, and is on no command line.
fn a_guest_whose_memory_others_write_is_refused(lab: &Lab) -> Result<()> {
    let (mib, ring) = (64, Ring::spread(64));
    let file = Filled::new(mib)?;
    let object =
        format!("memory-backend-file,id=d0,size={mib}M,share=on,mem-path={}", file.0.display());
    let args = ["-m", "slots=2,maxmem=1G", "-object", &object, "-device", "pc-dimm,memdev=d0"];
    let mut subject = Subject::boot_like(lab, ring, |guest| guest.args(&args))?;
    subject.whole()?.0.remove()?;
    let other = lab.guest().paused().memory_mib(32).args(&args).boot()?;
    let named = format!("process {}", other.pid());
    refused(&mut subject, &[&named])?;
    // Whoever reads it only, or it is gone, is nobody.
    other.finish()?;
    subject.whole()?.0.remove()?;
    subject.guest.finish()
}
