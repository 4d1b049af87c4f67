//! A Linux guest that reads its disk past the page cache, with O_DIRECT on the host's side too: whether
//! an image has what the device wrote into memory, which goes past QEMU's page tables. Each test prints
//! its figures.

use std::fmt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::diskcheck::{Runs, Scan, Verdict};
use lab::diskread::{Aio, Diskread, SlowDisk, write_disk};
use lab::{Guest, Lab, Result, Version, failed, here, outer};
use serde_json::Value;

use super::exhibit::{acquire_at_best, control};
use super::track::HugePages;

pub(crate) const TESTS: &[lab::runner::Test] =
    here![spliced_images_are_stale, freeze_and_snapshot_have_what_a_disk_wrote];

pub(crate) const OUTER: &[lab::runner::Test] =
    outer![track_has_what_a_slow_disk_wrote, others_have_what_a_slow_disk_wrote];

/// Memory of the guests: as little as Linux comes up with.
const MEMORY_MIB: u64 = 96;

/// A guest that reads a disk in one or several of QEMU's ways, each with threads of its own.
struct Subject {
    guest: Guest,
    program: Diskread,
    aios: &'static [Aio],
}

/// What images showed of each way.
struct Seen {
    aios: &'static [Aio],
    runs: Vec<Runs>,
}

/// All three ways at once; in a full run each in a guest of its own, where none has a part in what
/// another does: a hold waits for the threads that wait for the disk.
fn groups(lab: &Lab) -> Vec<&'static [Aio]> {
    if lab.full { Aio::ALL.chunks(1).collect() } else { vec![&Aio::ALL] }
}

impl Seen {
    fn new(aios: &'static [Aio]) -> Self {
        Self { aios, runs: vec![Runs::default(); aios.len()] }
    }

    fn count(&mut self, verdicts: &[Verdict]) {
        self.runs.iter_mut().zip(verdicts).for_each(|(runs, verdict)| runs.count(verdict));
    }

    fn torn(&self) -> u32 {
        self.runs.iter().map(|runs| runs.torn).sum()
    }

    /// Whether pages were stale, where the latency is long enough for that to be seen.
    fn shows_stale(&self) -> bool {
        self.aios == [Aio::Threads] || self.runs.iter().any(|runs| runs.stale > 0)
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts = self.aios.iter().zip(&self.runs).map(|(aio, runs)| format!("{aio:?} {runs}"));
        f.write_str(&parts.collect::<Vec<_>>().join("; "))
    }
}

impl Subject {
    /// One on disks of which `path` says where they are.
    fn boot(
        lab: &Lab,
        aios: &'static [Aio],
        version: Version,
        path: impl Fn(Aio) -> PathBuf,
    ) -> Result<Self> {
        let drives: Vec<String> = aios.iter().map(|aio| aio.drive(&path(*aio))).collect();
        let drives: Vec<&str> = drives.iter().flat_map(|drive| ["-drive", drive]).collect();
        let guest = lab.guest().memory_mib(MEMORY_MIB).version(version);
        let mut guest = guest.args(&drives).boot()?;
        let program = Diskread::start(&mut guest, aios.len())?;
        Ok(Self { guest, program, aios })
    }

    /// One on a file of this machine.
    fn on_a_file(lab: &Lab, aios: &'static [Aio]) -> Result<Self> {
        let disk = lab.scratch().join("numbered");
        if !disk.exists() {
            write_disk(&disk)?;
        }
        Self::boot(lab, aios, Version::V10_0, |_| disk.clone())
    }

    /// An image that may have lost its class, of each way what it shows, and what its record says.
    fn take(&self, lab: &Lab, method: &str, flags: &[&str]) -> Result<(Vec<Verdict>, Value)> {
        let flags = [&["--file-digest", "no"], flags].concat();
        let exhibit = acquire_at_best(lab, &self.guest, method, &flags, &[0, 3])?;
        let mut scan = Scan::default();
        exhibit.image()?.each(|gpa, bytes| scan.piece(gpa, bytes))?;
        let manifest = exhibit.manifest.clone();
        exhibit.remove()?;
        Ok((scan.verdicts(self.aios.len())?, manifest))
    }

    /// Images by a method that makes images of one instant, none of another.
    fn has_all(&self, lab: &Lab, method: &str, flags: &[&str], images: u32) -> Result<()> {
        let (mut seen, mut with_class) = (Seen::new(self.aios), 0);
        for _ in 0..images {
            let (verdicts, manifest) = self.take(lab, method, flags)?;
            let class = manifest["class"] != "none";
            // A read under way as the hold begins may land after its page was copied; where the audit draws
            // that page, the class is rightly lost. The image is no less of one instant.
            let landed = method == "freeze" && manifest["audit"]["differing"].as_u64() > Some(0);
            assert!(class || landed, "{method}: {}", manifest["audit"]);
            with_class += u32::from(class);
            seen.count(&verdicts);
        }
        println!("         {method}: {seen}, {with_class} with the class");
        assert_eq!(seen.torn(), 0, "{method}: {seen}");
        assert!(with_class > 0, "{method}: the class is always lost");
        Ok(())
    }

    /// Images by `live`, slowly: the ledgers, at the end, are younger than the pages. The control.
    fn lives(&self, lab: &Lab, images: u32) -> Result<()> {
        let (mut seen, rate) = (Seen::new(self.aios), format!("{}M", MEMORY_MIB * 2));
        for _ in 0..images {
            let live = || Ok(self.take(lab, "live", &["--max-rate", &rate])?.0);
            let torn = |verdicts: &Vec<Verdict>| !verdicts.iter().all(Verdict::is_one_instant);
            seen.count(&control(live, torn)?);
        }
        println!("         live: {seen}");
        match seen.torn() {
            0 => Err(failed("void: live shows one instant too")),
            _ => Ok(()),
        }
    }

    /// Waits until so many more reads have ended.
    fn wait_for_reads(&mut self, count: u64) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(120);
        let mut first = None;
        loop {
            let said = self.program.report(&mut self.guest)?;
            let reads = said["reads"].as_u64().unwrap_or(0);
            if reads >= *first.get_or_insert(reads) + count {
                return Ok(());
            }
            assert!(Instant::now() < until, "the disk is not read: {said}");
        }
    }

    /// Ends the program, which must have read what is on the disk, and the guest.
    fn finish(mut self) -> Result<()> {
        let said = self.program.end(&mut self.guest)?;
        println!("         the guest: {said}");
        assert_eq!([&said["wrong"], &said["moved_pages"]], [0, 0]);
        self.guest.finish()
    }
}

/// The checker sees what it must see: QEMU's own images of a stopped guest are whole, and stale as soon
/// as a page of an earlier one is put into a later one.
fn spliced_images_are_stale(lab: &Lab) -> Result<()> {
    let mut subject = Subject::on_a_file(lab, &[Aio::Native])?;
    let pages = subject.program.armed["pages"].as_u64().unwrap_or(0);
    let mut images = [Vec::new(), Vec::new()];
    for image in &mut images {
        // Not half a round of the disk: then an older page could be taken for a newer one.
        subject.wait_for_reads(2 * pages)?;
        subject.guest.stop()?;
        *image = subject.guest.pmemsave(0, MEMORY_MIB << 20)?;
        subject.guest.cont()?;
    }
    let [earlier, mut image] = images;
    let mut places = (Vec::new(), Vec::new());
    for whole in [&earlier, &image] {
        let mut scan = Scan::default();
        scan.piece(0, whole);
        let verdict = scan.verdict()?;
        assert!(verdict.is_one_instant(), "a stopped guest: {verdict:?}");
        places = scan.places();
    }
    let (pages, ledgers) = places;
    for (spliced, page) in (1..).zip(&pages) {
        let at = usize::try_from(*page)?;
        image[at..at + 4096].copy_from_slice(&earlier[at..at + 4096]);
        let mut scan = Scan::default();
        for place in pages.iter().chain(&ledgers) {
            let at = usize::try_from(*place)?;
            scan.piece(*place, &image[at..at + 4096]);
        }
        let verdict = scan.verdict()?;
        assert_eq!((verdict.stale, verdict.ahead), (spliced, 0), "{spliced} pages: {verdict:?}");
        if spliced == lab.scale(8, 256) {
            println!(
                "         {spliced} of {} pages spliced, by {} reads",
                pages.len(),
                verdict.oldest
            );
            break;
        }
    }
    subject.finish()
}

/// A disk as quick as a file is: a read is under way for a moment only.
fn freeze_and_snapshot_have_what_a_disk_wrote(lab: &Lab) -> Result<()> {
    for aios in groups(lab) {
        let subject = Subject::on_a_file(lab, aios)?;
        for method in ["freeze", "snapshot"] {
            subject.has_all(lab, method, &["--stall-budget", "900ms"], lab.scale(3, 20))?;
        }
        subject.lives(lab, lab.scale(1, 3))?;
        subject.finish()?;
    }
    Ok(())
}

/// Latency of the disk below the horizon, and that horizon.
const BELOW: (Duration, Duration) = (Duration::from_millis(40), Duration::from_millis(300));

/// A horizon that is too short.
const SHORT: &str = "40ms";

/// Latency of the disk beyond that. A hold waits a quarter of a second at most for threads of QEMU's that
/// wait for the disk themselves; what lands so soon is seldom seen to be missing, as the first pass takes
/// longer to come to the page.
fn beyond(aio: Aio) -> Duration {
    match aio {
        Aio::Threads => Duration::from_millis(150),
        Aio::Native | Aio::IoUring => Duration::from_millis(900),
    }
}

/// How many images that show nothing there may be before one that counts.
const VOID: u32 = 2;

/// Until the reads no longer go in step.
const SETTLING: Duration = Duration::from_secs(3);

/// What the record says of the disk: its mean time for a read, and whether that is a caveat.
fn latency(manifest: &Value) -> Result<(Duration, bool)> {
    let tracking = &manifest["tracking"];
    let ns = tracking["block_latency_ns"].as_u64();
    let ns = ns.ok_or_else(|| failed(format_args!("no latency: {tracking}")))?;
    let caveats = manifest["caveats"].as_array().ok_or_else(|| failed("no caveats"))?;
    let mut caveats = caveats.iter().filter_map(Value::as_str);
    let told =
        caveats.any(|text| text.contains("longer than that: pages that it wrote can be older"));
    Ok((Duration::from_nanos(ns), told))
}

/// A disk whose reads take less than the I/O horizon: no page is stale. One whose reads take longer:
/// the record says so, and there the check shows that it can see.
fn track_has_what_a_slow_disk_wrote(lab: &Lab) -> Result<()> {
    let _huge = HugePages::set("never")?;
    let disk = SlowDisk::new()?;
    let versions = [Version::V10_0, Version::V7_2].into_iter().cycle();
    for (aios, version) in groups(lab).into_iter().zip(versions) {
        disk.set(|_| Duration::ZERO)?;
        let subject = Subject::boot(lab, aios, version, |aio| disk.path(aio))?;
        below_the_horizon(lab, &subject, &disk)?;
        beyond_the_horizon(lab, &subject, &disk)?;
        disk.set(|_| Duration::ZERO)?;
        subject.finish()?;
    }
    Ok(())
}

fn track(lab: &Lab, subject: &Subject, horizon: &str) -> Result<(Vec<Verdict>, Value)> {
    subject.take(lab, "track", &["--stall-budget", "900ms", "--io-horizon", horizon])
}

/// An image by `track` while the disk is read. Where not one read ended, and the guest of a translated host may
/// stand still for seconds, it shows nothing, and another is taken.
fn track_of_reads(lab: &Lab, subject: &Subject, horizon: &str) -> Result<(Vec<Verdict>, Value)> {
    for _ in 0..VOID {
        let taken = track(lab, subject, horizon)?;
        if !taken.1["tracking"]["block_latency_ns"].is_null() {
            return Ok(taken);
        }
        println!("         void: no read ended meanwhile: {}", taken.1["tracking"]);
        sleep(SETTLING);
    }
    track(lab, subject, horizon)
}

fn below_the_horizon(lab: &Lab, subject: &Subject, disk: &SlowDisk) -> Result<()> {
    let (quick, horizon) = BELOW;
    disk.set(|_| quick)?;
    let (mut seen, mut longest) = (Seen::new(subject.aios), Duration::ZERO);
    for _ in 0..lab.scale(3, 20) {
        let (verdicts, took) = track_below(lab, subject)?;
        longest = longest.max(took);
        seen.count(&verdicts);
    }
    println!("         {quick:?} (up to {longest:?} on average), horizon {horizon:?}: {seen}");
    assert_eq!(seen.torn(), 0, "track: {seen}");
    Ok(())
}

/// An image by `track` while reads take less than the horizon, and how long they took on average. Where the
/// guest of a translated host stood for a second or two they take longer, as the record must say; that shows
/// nothing, and another is taken.
fn track_below(lab: &Lab, subject: &Subject) -> Result<(Vec<Verdict>, Duration)> {
    let (quick, horizon) = BELOW;
    let flag = format!("{}ms", horizon.as_millis());
    for _ in 0..=VOID {
        let (verdicts, manifest) = track_of_reads(lab, subject, &flag)?;
        let (took, told) = latency(&manifest)?;
        let right = took >= quick && told == (took > horizon);
        assert!(right, "{took:?}: {}", manifest["caveats"]);
        if !told {
            assert_eq!(manifest["class"], "quasi-instantaneous", "{}", manifest["audit"]);
            return Ok((verdicts, took));
        }
        println!("         void: a read took {took:?} on average");
        sleep(SETTLING);
    }
    Err(failed(format_args!("void: reads always take longer than {horizon:?}")))
}

fn beyond_the_horizon(lab: &Lab, subject: &Subject, disk: &SlowDisk) -> Result<()> {
    disk.set(beyond)?;
    sleep(SETTLING);
    let slowest = subject.aios.iter().copied().map(beyond).max().unwrap_or_default();
    let (mut seen, mut noticed, mut images) = (Seen::new(subject.aios), 0, 0);
    // What is missing may by chance be read again by the guest, or be under way to the end.
    while images < lab.scale(1, 5) || (images < 10 && !seen.shows_stale()) {
        let (verdicts, manifest) = track_of_reads(lab, subject, SHORT)?;
        let (took, told) = latency(&manifest)?;
        assert!(took >= slowest && told, "{took:?}: {}", manifest["caveats"]);
        // The tool reads a sample again itself: what it finds voids the class.
        let differing = manifest["audit"]["differing"] != 0;
        assert_eq!(differing, manifest["class"] == "none", "{}", manifest["audit"]);
        noticed += u32::from(differing);
        images += 1;
        seen.count(&verdicts);
    }
    println!(
        "         up to {slowest:?}, horizon {SHORT}: {seen}; the audit noticed {noticed} of {images}"
    );
    match seen.shows_stale() {
        true => Ok(()),
        false => Err(failed("void: too short a horizon makes nothing stale")),
    }
}

/// The same disk under the methods that need no horizon. Not `freeze` by ptrace: reads that end while it
/// holds the guest land between its two looks at a page, and the second voids the class of some images.
/// QEMU's `stop` waits for them.
fn others_have_what_a_slow_disk_wrote(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    let disk = SlowDisk::new()?;
    for aios in groups(lab) {
        disk.set(|_| Duration::ZERO)?;
        let subject = Subject::boot(lab, aios, Version::V10_0, |aio| disk.path(aio))?;
        disk.set(beyond)?;
        sleep(SETTLING);
        subject.has_all(lab, "snapshot", &["--stall-budget", "2s"], 20)?;
        let stop = ["--hold", "stop", "--stall-budget", "60s"];
        subject.has_all(lab, "freeze", &stop, 5)?;
        // With so few reads `live` may show an instant by chance.
        disk.set(|_| Duration::ZERO)?;
        subject.lives(lab, 1)?;
        subject.finish()?;
    }
    Ok(())
}
