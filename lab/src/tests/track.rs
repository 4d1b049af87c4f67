//! `track`: images of one instant of a guest that is held for milliseconds. The kernel of this
//! machine need not track written pages: all of it is tried in the outer guest.

mod meanwhile;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

use lab::tear::Runs;
use lab::{
    Backing, Doing, GUEST_MODULES, Guest, Lab, Result, Ring, Version, failed, here, outer, pattern,
    proc,
};
use serde_json::{Value, json};

use super::exhibit::{Exhibit, acquire, at_best, control};
use super::run::{Running, new_dir};
use super::tear::{Subject, memory_mib};

pub(crate) const TESTS: &[lab::runner::Test] = here![track_is_refused_where_it_would_lie];

pub(crate) const OUTER: &[lab::runner::Test] = outer![
    track_of_small_pages_is_one_instant,
    track_of_huge_pages_is_one_instant,
    a_busy_linux_guest_is_followed,
    a_merging_host_and_a_balloon_lose_nothing,
    a_swapping_host_loses_nothing,
    a_busy_guest_is_held_a_part_of_what_a_dump_takes,
];

pub(crate) use meanwhile::OUTER as MEANWHILE;

/// What the outer guest's translated CPU needs; a device of a counting guest writes nothing.
const FLAGS: [&str; 4] = ["--stall-budget", "900ms", "--io-horizon", "50ms"];

/// Shared memory is written past the page table that is looked at; and a kernel that does not track
/// says so.
fn track_is_refused_where_it_would_lie(lab: &Lab) -> Result<()> {
    let guest = lab.guest().backing(Backing::Memfd).boot()?;
    let vm = guest.pid().to_string();
    let run = lab.tool(["plan", &vm, "--method", "track", "--json"])?.expect_code(4)?;
    assert!(run.stderr.contains("shared memory"), "{}", run.stderr);
    guest.finish()
}

/// Transparent huge pages of the kernel that runs here, until dropped.
pub(super) struct HugePages {
    before: String,
}

const HUGE: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

impl HugePages {
    pub(super) fn set(word: &str) -> Result<Self> {
        let text = fs::read_to_string(HUGE).doing(HUGE)?;
        let before = text.split(['[', ']']).nth(1).unwrap_or("madvise").to_owned();
        fs::write(HUGE, word).doing(HUGE)?;
        Ok(Self { before })
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = fs::write(HUGE, &self.before);
    }
}

fn track_of_small_pages_is_one_instant(lab: &Lab) -> Result<()> {
    let _huge = HugePages::set("never")?;
    one_instant(lab, true)
}

/// One write marks 512 pages here, so that hardly one is missed without the hold: there is no control.
fn track_of_huge_pages_is_one_instant(lab: &Lab) -> Result<()> {
    let _huge = HugePages::set("always")?;
    one_instant(lab, false)
}

/// Rounds of an empty loop between two pages of a slow ring: a page of 240 is written every second or
/// so, and a write that was missed once is not made good by the next one.
const SLOW: u32 = 4_000_000;

/// Fast and slow writers, few and many pages: no image by `track` is torn. Those by `live` of the fast
/// ones are, and those of the slow one by `track` with the hold around its looks left out.
fn one_instant(lab: &Lab, control: bool) -> Result<()> {
    let mib = memory_mib();
    for slow in [false, true] {
        // The slow ones are there for the control.
        if slow && !control && !lab.full {
            continue;
        }
        let rings = [Ring::spread(mib), Ring::pair(mib)];
        // Of huge pages, of which one write marks many, one ring in the short form.
        let rings = &rings[..if control || lab.full { 2 } else { 1 }];
        for ring in rings.iter().cloned() {
            let many = ring.pages > 2;
            let ring = if slow { ring.delay(SLOW) } else { ring };
            let mut subject = Subject::boot(lab, ring, Backing::Anonymous, Version::V10_0)?;
            let (mut runs, mut figures) = (Runs::default(), Figures::default());
            for _ in 0..lab.scale(2, 30) {
                let exhibit = acquire(lab, &subject.guest, "track", &FLAGS)?;
                assert_eq!(exhibit.manifest["class"], "quasi-instantaneous");
                figures.add(&exhibit.manifest)?;
                runs.count(&subject.judge(exhibit)?);
            }
            let shown = format!("track {runs}");
            let shown = match (slow, many) {
                (false, _) => {
                    let controls = subject.controls(lab, lab.scale(1, 4))?;
                    let shown = format!("{shown}, {controls}");
                    controls.hold().doing(&shown)?;
                    shown
                }
                (true, true) if control => {
                    let unheld = unheld(lab, &subject, lab.scale(2, 5))?;
                    let shown = format!("{shown}, unheld {unheld}");
                    if unheld.torn == 0 {
                        return Err(failed(format_args!("void, the control is whole: {shown}")));
                    }
                    shown
                }
                (true, _) => shown,
            };
            subject.report(&format!("{shown}; {figures}"))?;
            assert_eq!(runs.torn, 0, "track: {runs}");
            subject.guest.finish()?;
        }
    }
    Ok(())
}

/// The numbers that pages of `plant dirty` carry: of the round in which each was last written.
fn rounds(guest: &mut Guest, exhibit: &Exhibit) -> Result<BTreeSet<u64>> {
    let (mut rounds, mut pages) = (BTreeSet::new(), 0);
    let image = exhibit.image()?;
    for line in guest.ram()? {
        let bytes = image.read(line.gpa, line.len)?;
        for (pfn, page) in (line.gpa / 4096..).zip(bytes.chunks_exact(pattern::PAGE)) {
            if page.starts_with(&pattern::MAGIC) && page[16..24] == pfn.to_le_bytes() {
                rounds.insert(u64::from_le_bytes(page[8..16].try_into()?));
                pages += 1;
            }
        }
    }
    assert!(pages > 1000, "{pages} pages carry a number");
    Ok(rounds)
}

/// One instant: the round that is being written, and the one before it.
fn is_one_instant(rounds: &BTreeSet<u64>) -> bool {
    let (first, last) = (rounds.first(), rounds.last());
    first.zip(last).is_some_and(|(first, last)| last - first <= 1)
}

/// Images of a Linux guest in which a program goes round its pages, ten times a second, and of whatever
/// else such a guest does: one instant each.
fn followed(lab: &Lab, guest: &mut Guest, images: u32, flags: &[&str]) -> Result<()> {
    let mut figures = Figures::default();
    for _ in 0..images {
        figures.add(&one_round(lab, guest, "track", flags)?)?;
    }
    println!("         {figures}");
    Ok(())
}

/// The record of one image of such a guest, which must show one instant.
fn one_round(lab: &Lab, guest: &mut Guest, method: &str, flags: &[&str]) -> Result<Value> {
    let flags = [&["--stall-budget", "900ms", "--file-digest", "no"], flags].concat();
    let exhibit = acquire(lab, guest, method, &flags)?;
    lab.tool([Path::new("verify"), &exhibit.dir])?.expect_code(0)?;
    let rounds = rounds(guest, &exhibit)?;
    assert!(is_one_instant(&rounds), "{method}: {rounds:?}");
    assert_eq!(exhibit.manifest["class"], "quasi-instantaneous");
    let manifest = exhibit.manifest.clone();
    exhibit.remove()?;
    Ok(manifest)
}

/// The control: an image by `live`, as slow as the program is fast, shows many instants.
fn smeared(lab: &Lab, guest: &mut Guest) -> Result<()> {
    let live = || {
        let image = acquire(lab, guest, "live", &["--max-rate", "32M", "--file-digest", "no"])?;
        let rounds = rounds(guest, &image)?;
        image.remove()?;
        Ok(rounds)
    };
    let rounds = control(live, |rounds| !is_one_instant(rounds))?;
    assert!(!is_one_instant(&rounds), "void: live shows one instant too");
    println!("         live shows {} rounds", rounds.len());
    Ok(())
}

fn a_busy_linux_guest_is_followed(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    let mut guest = lab.guest().memory_mib(128).boot()?;
    guest.plant("dirty 8 20480", Duration::from_secs(60))?;
    followed(lab, &mut guest, lab.scale(2, 10), &[])?;
    smeared(lab, &mut guest)?;
    guest.finish()
}

/// All holds of `track` together, of a guest that rewrites its memory at half the rate at which it is
/// copied, against the stop of QEMU's own dump to nowhere, in one run: the long form only.
fn a_busy_guest_is_held_a_part_of_what_a_dump_takes(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    for (mib, huge) in [(1024, false), (1024, true), (3072, false), (3072, true)] {
        let _huge = HugePages::set(if huge { "always" } else { "never" })?;
        held_and_dumped(lab, mib, huge)?;
    }
    Ok(())
}

fn held_and_dumped(lab: &Lab, mib: u64, huge: bool) -> Result<()> {
    let mut guest = lab.guest().memory_mib(mib).patience(Duration::from_secs(180)).boot()?;
    let vm = guest.pid().to_string();
    let plan = lab.tool(["plan", &vm, "--method", "live", "--json"])?.expect_code(0)?;
    let plan: Value = serde_json::from_str(&plan.stdout)?;
    let rate = plan["facts"]["hold"]["speed"]["bytes_per_s"].as_u64();
    let rate = rate.ok_or_else(|| failed("the copy rate is not known"))?;
    let pages = rate / 2 / 4096;
    guest.plant(&format!("dirty {} {pages}", mib * 3 / 4), Duration::from_secs(600))?;
    let mut rows = Vec::new();
    // What was written within the horizon is read in the last hold: the horizon is what it costs.
    for horizon in ["20ms", "100ms", "1s"] {
        let flags = ["--stall-budget", "900ms", "--io-horizon", horizon, "--file-digest", "no"];
        let out = new_dir(lab, "busy")?;
        let mut command = lab.tool_command(["acquire", "--method", "track", "--json"])?;
        command.args(flags).arg("-o").arg(&out).arg(&vm);
        let ended = Running::start(command)?.end()?;
        let mut figures = Figures::default();
        if ended.status.code() == Some(0) {
            let exhibit = Exhibit::open(&ended.exhibit()?.0)?;
            assert_eq!(exhibit.manifest["class"], "quasi-instantaneous");
            figures.add(&exhibit.manifest)?;
            rows.push((horizon, figures));
        } else {
            println!("         horizon {horizon}: {}", ended.done("reason"));
        }
        fs::remove_dir_all(&out)?;
    }
    let began = std::time::Instant::now();
    let arguments = json!({ "paging": false, "protocol": "file:/dev/null" });
    guest.qmp("dump-guest-memory", arguments)?;
    let dump = began.elapsed();
    let resident = guest.rss()?;
    for (horizon, figures) in &rows {
        let held = Duration::from_nanos(figures.stalls);
        let a_gib = |ns: u64| Duration::from_nanos(ns.saturating_mul(1 << 30) / resident.max(1));
        println!(
            "         {mib} MiB, huge pages {huge}, {pages} pages rewritten a second at half of {} MiB/s, \
             horizon {horizon}: held {held:?} in all, dump {dump:?}: 1/{:.0}; a GiB: looks {:?}, clearing \
             {:?}; {figures}",
            rate >> 20,
            dump.as_secs_f64() / held.as_secs_f64(),
            a_gib(figures.scan),
            a_gib(figures.clear),
        );
    }
    assert!(!rows.is_empty(), "track converges at no horizon");
    guest.finish()
}

/// Kernel same-page merging at full speed, for as long as it lives.
struct Merging;

const KSM: &str = "/sys/kernel/mm/ksm";

impl Merging {
    fn start() -> Result<Self> {
        for (file, value) in [("sleep_millisecs", "0"), ("pages_to_scan", "10000"), ("run", "1")] {
            fs::write(format!("{KSM}/{file}"), value).doing(file)?;
        }
        Ok(Self)
    }
}

impl Drop for Merging {
    fn drop(&mut self) {
        let _ = fs::write(format!("{KSM}/run"), "2");
    }
}

/// Takes and gives back 24 MiB in the guest, over and over: its kernel reports what is free, and QEMU
/// gives that to the host.
const CHURN: &str = "(while :; do dd if=/dev/zero of=/tmp/churn bs=1M count=24; sleep 1; \
                     rm /tmp/churn; sleep 3; done) > /dev/null 2>&1 &";

/// Looks twenty times a second how much of a guest is resident.
struct Residency {
    end: Arc<AtomicBool>,
    thread: JoinHandle<Result<[u64; 2]>>,
}

impl Residency {
    fn watch(guest: &Guest) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (ended, pid) = (Arc::clone(&end), guest.pid());
        let thread = spawn(move || {
            let [mut least, mut most] = [u64::MAX, 0];
            while !ended.load(Ordering::Relaxed) {
                let now = proc::status(pid, "VmRSS")? * 1024;
                [least, most] = [least.min(now), most.max(now)];
                sleep(Duration::from_millis(50));
            }
            Ok([least, most])
        });
        Self { end, thread }
    }

    /// The least and the most, in bytes.
    fn end(self) -> Result<[u64; 2]> {
        self.end.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|_| Err(failed("the watcher panicked")))
    }
}

/// Pages lose their marks when they are merged, when the balloon takes them, and when the guest reports
/// them as free: none is taken for a page that was not written.
fn a_merging_host_and_a_balloon_lose_nothing(lab: &Lab) -> Result<()> {
    let _merging = Merging::start()?;
    let balloon = ["-device", "virtio-balloon-pci,free-page-reporting=on"];
    let mut guest = lab.guest().memory_mib(160).args(&balloon).boot()?;
    guest.sh(&format!("for m in {}; do insmod /modules/$m.ko; done", GUEST_MODULES.join(" ")))?;
    guest.plant("dirty 8 20480", Duration::from_secs(60))?;
    for (size, images) in [(112u64, 1), (160, 1), (112, lab.scale(1, 8))] {
        // It goes on while the image is taken.
        guest.qmp("balloon", json!({ "value": size << 20 }))?;
        followed(lab, &mut guest, images, &["--io-horizon", "100ms"])?;
    }
    guest.qmp("balloon", json!({ "value": 160 << 20 }))?;
    guest.sh(CHURN)?;
    let residency = Residency::watch(&guest);
    followed(lab, &mut guest, lab.scale(1, 8), &["--io-horizon", "100ms"])?;
    smeared(lab, &mut guest)?;
    let [least, most] = residency.end()?;
    println!("         reported as free meanwhile: {} of {} MiB", (most - least) >> 20, most >> 20);
    assert!(most - least > 8 << 20, "void: the guest gives nothing back");
    guest.finish()
}

/// A host that takes pages of a guest into its swap all the time.
struct Swapping {
    group: PathBuf,
    before: [u64; 2],
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The kernel's counters of pages that came in and that went out.
const SWAPPED: [&str; 2] = ["pswpin", "pswpout"];

impl Swapping {
    fn start(guest: &Guest) -> Result<Self> {
        lab::outer::swap_on(256)?;
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory").doing("+memory")?;
        let group = root.join("swapping");
        fs::create_dir(&group).doing("the group")?;
        fs::write(group.join("cgroup.procs"), guest.pid().to_string()).doing("cgroup.procs")?;
        let (end, before) = (Arc::new(AtomicBool::new(false)), SWAPPED.map(vmstat));
        let (ended, reclaim) = (Arc::clone(&end), group.join("memory.reclaim"));
        let thread = spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                // EAGAIN: so much was not to be had just now.
                let _ = fs::write(&reclaim, "4M");
                sleep(Duration::from_millis(20));
            }
        });
        Ok(Self { group, before, end, thread: Some(thread) })
    }

    /// Ends it: how many pages came in and went out meanwhile.
    fn end(&mut self) -> Result<[u64; 2]> {
        self.end.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map_or(Ok(()), JoinHandle::join);
        ended.map_err(|_| failed("the swapping thread panicked"))?;
        let [came, went] = SWAPPED.map(vmstat);
        Ok([came - self.before[0], went - self.before[1]])
    }
}

impl Drop for Swapping {
    fn drop(&mut self) {
        let _ = self.end();
        let _ = fs::remove_dir(&self.group);
        let _ = lab::outer::swap_off();
    }
}

/// One of the kernel's counters of pages.
fn vmstat(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/vmstat").unwrap_or_default();
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find(|(key, _)| *key == name).and_then(|(_, n)| n.parse().ok()).unwrap_or(0)
}

/// What went into the swap and came back is neither stale nor lost, marked or not.
/// The outer guest does not always survive it: docs/measurements.md.
fn a_swapping_host_loses_nothing(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    let mut guest = lab.guest().memory_mib(128).boot()?;
    guest.plant("dirty 8 20480", Duration::from_secs(60))?;
    let mut swapping = Swapping::start(&guest)?;
    followed(lab, &mut guest, lab.scale(1, 20), &["--io-horizon", "100ms"])?;
    for _ in 0..lab.scale(1, 20) {
        let manifest = one_round(lab, &mut guest, "snapshot", &[])?;
        assert_eq!(manifest["disturbances"], json!([]));
    }
    smeared(lab, &mut guest)?;
    let [came, went] = swapping.end()?;
    println!("         {went} pages went into the swap meanwhile, {came} came back");
    assert!(came > 1000 && went > 1000, "void: {went} out, {came} in");
    guest.finish()
}

/// Images by `track` that looks at the marks and clears them while the guest runs.
fn unheld(lab: &Lab, subject: &Subject, count: u32) -> Result<Runs> {
    let mut runs = Runs::default();
    for _ in 0..count {
        let out = new_dir(lab, "unheld")?;
        let run = || {
            let mut command = lab.at_hold_command()?;
            command.arg(subject.guest.pid().to_string()).arg(&out).args(["unheld", "900"]);
            Running::start(command)?.end()
        };
        let ended = at_best(run)?.expect(1)?;
        let exhibit = Exhibit::open(&ended.exhibit()?.0)?;
        assert_eq!(exhibit.manifest["class"], "none");
        runs.count(&subject.judge(exhibit)?);
        fs::remove_dir_all(&out)?;
    }
    Ok(runs)
}

/// What the records say of the runs.
#[derive(Debug, Default)]
struct Figures {
    runs: u32,
    rounds: usize,
    /// The longest stall, and all together, in nanoseconds.
    longest: u64,
    stalls: u64,
    scan: u64,
    clear: u64,
    rest: u64,
    audited: u64,
}

impl Figures {
    fn add(&mut self, manifest: &Value) -> Result<()> {
        let tracking = &manifest["tracking"];
        let rounds = tracking["rounds"].as_array().ok_or_else(|| failed("no rounds"))?;
        let span = |value: &Value| {
            let at = |name: &str| value[name].as_u64().unwrap_or_default();
            at("t1_ns").saturating_sub(at("t0_ns"))
        };
        self.runs += 1;
        self.rounds += rounds.len();
        for round in rounds {
            self.longest = self.longest.max(span(&round["stall"]));
            self.stalls += span(&round["stall"]);
            self.scan += span(&round["scan"]);
            self.clear += span(&round["clear"]);
        }
        self.clear += span(&tracking["first_clear"]);
        let last = rounds.last().map_or(0, |round| round["written_pages"].as_u64().unwrap_or(0));
        self.rest += last;
        self.audited += manifest["audit"]["pages"].as_u64().unwrap_or_default();
        Ok(())
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let runs = u64::from(self.runs.max(1));
        let ms = |ns: u64| Duration::from_nanos(ns / runs);
        write!(
            f,
            "{} rounds in {} runs; a run: held {:?} (the longest {:?}), looks {:?}, clearing {:?}, {} \
             pages in the last hold, {} audited",
            self.rounds,
            self.runs,
            ms(self.stalls),
            Duration::from_nanos(self.longest),
            ms(self.scan),
            ms(self.clear),
            self.rest / runs,
            self.audited / runs
        )
    }
}
