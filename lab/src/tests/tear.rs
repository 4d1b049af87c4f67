//! The tear benchmark: images of a guest that counts, held against "one instant". Each test prints
//! its figures.

use std::time::{Duration, Instant};

use lab::tear::{Controls, Runs, Scan, Verdict};
use lab::{Accel, Backing, Doing, Guest, Lab, Result, Ring, Version, here, outer};

use super::exhibit::{Exhibit, acquire, control};

pub(crate) const TESTS: &[lab::runner::Test] =
    here![spliced_images_are_torn, freeze_is_one_instant, a_slow_ring_is_torn_too];

pub(crate) const OUTER: &[lab::runner::Test] =
    outer![spliced_images_of_kvm_guests_are_torn, freeze_of_a_kvm_guest_is_one_instant];

/// Memory of the guests. A copy of it takes hundreds of times longer than the coarser ring resolves: here,
/// and in the outer guest, where every byte is copied and hashed by a translated CPU.
pub(super) fn memory_mib() -> u32 {
    if Accel::from_env() == Accel::Kvm { 32 } else { 128 }
}

fn rings() -> [Ring; 2] {
    [Ring::pair(memory_mib()), Ring::spread(memory_mib())]
}

/// A guest that counts, and the ring it counts in.
pub(super) struct Subject {
    pub(super) guest: Guest,
    ring: Ring,
    backing: Backing,
}

impl Subject {
    pub(super) fn boot(lab: &Lab, ring: Ring, backing: Backing, version: Version) -> Result<Self> {
        let guest = lab.guest().ring(ring.clone()).backing(backing).version(version).boot()?;
        Ok(Self { guest, ring, backing })
    }

    /// The value of the ring's first word.
    fn counter(&mut self) -> Result<u64> {
        let at = self.ring.gpa(0) + 0x80;
        let bytes = self.guest.read_own(at, 8)?;
        Ok(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }

    /// Writes per second, over half a second or more: of a slow ring a word changes once in seconds. 0 when
    /// it does not change within ten.
    fn rate(&mut self) -> Result<u64> {
        let (first, start) = (self.counter()?, Instant::now());
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let written = self.counter()? - first;
            if written > 0 || start.elapsed() > Duration::from_secs(10) {
                return Ok(Ring::rate(written, start.elapsed()));
            }
        }
    }

    /// Prints a line of figures: the guest's, and what the runs showed.
    pub(super) fn report(&mut self, shown: &str) -> Result<()> {
        let rate = self.rate()?;
        assert!(rate > 0, "the ring stands still");
        let (accel, backing) = (Accel::from_env(), self.backing);
        let (pages, resolution) = (self.ring.pages, self.ring.resolution_ns(rate));
        println!(
            "         {accel:?} {backing:?} K={pages}: {shown}; {rate} writes/s, resolution \
             {resolution} ns"
        );
        Ok(())
    }

    /// What an exhibit's image shows; the exhibit is taken away.
    pub(super) fn judge(&self, exhibit: Exhibit) -> Result<Verdict> {
        let mut scan = Scan::new(&self.ring);
        exhibit.image()?.each(|gpa, bytes| scan.piece(gpa, bytes))?;
        let verdict =
            scan.verdict().doing(format_args!("an image by {}", exhibit.manifest["method"]));
        exhibit.remove()?;
        verdict
    }

    /// What an image by `live` shows. Each pass is given a quarter of a second: at full speed a busy
    /// host may not let the guest run at all between the reads of two pages.
    fn live(&self, lab: &Lab, format: &str) -> Result<Verdict> {
        let rate = format!("{}M", self.ring.memory_mib * 4);
        let flags = ["--format", format, "--max-rate", &rate, "--file-digest", "no"];
        self.judge(acquire(lab, &self.guest, "live", &flags)?)
    }

    /// The same of the running guest, as a control.
    fn control(&self, lab: &Lab, format: &str) -> Result<Verdict> {
        control(|| self.live(lab, format), Verdict::is_torn)
    }

    /// `n` images by `live` of the running guest, and a third as many of the stopped one, where
    /// chance has no part. It runs on.
    pub(super) fn controls(&mut self, lab: &Lab, n: u32) -> Result<Controls> {
        let mut controls = Controls::default();
        for _ in 0..n {
            controls.live.count(&self.control(lab, "elf")?);
        }
        self.guest.stop()?;
        for _ in 0..n.div_ceil(3) {
            controls.stopped.count(&self.live(lab, "elf")?);
        }
        self.guest.cont()?;
        Ok(controls)
    }
}

/// Both rings, each on either kind of memory. In the outer guest, where an image takes ten times
/// as long, this is for full runs; else each ring and each kind of memory occurs there once.
fn each_subject(lab: &Lab, test: impl Fn(&mut Subject) -> Result<()>) -> Result<()> {
    for (number, ring) in rings().into_iter().enumerate() {
        for (other, backing) in [Backing::Anonymous, Backing::Memfd].into_iter().enumerate() {
            if !lab.full && number != other {
                continue;
            }
            let mut subject = Subject::boot(lab, ring.clone(), backing, Version::V10_0)?;
            test(&mut subject).doing(format_args!("K={} on {backing:?}", ring.pages))?;
            subject.guest.finish()?;
        }
    }
    Ok(())
}

fn freeze_is_one_instant(lab: &Lab) -> Result<()> {
    freeze(lab, lab.scale(10, 60), lab.scale(2, 10))
}

fn freeze_of_a_kvm_guest_is_one_instant(lab: &Lab) -> Result<()> {
    freeze(lab, lab.scale(3, 60), lab.scale(1, 5))
}

const FREEZE: [&str; 4] = ["--stall-budget", "900ms", "--file-digest", "no"];

/// `n` images, none of them torn; then the controls of the same guest, without which that would
/// say nothing.
fn freeze(lab: &Lab, n: u32, controls: u32) -> Result<()> {
    each_subject(lab, |subject| {
        let mut runs = Runs::default();
        for _ in 0..n {
            let exhibit = acquire(lab, &subject.guest, "freeze", &FREEZE)?;
            assert_eq!(exhibit.manifest["class"], "instantaneous");
            runs.count(&subject.judge(exhibit)?);
        }
        let controls = subject.controls(lab, controls)?;
        subject.report(&format!("freeze {runs}, {controls}"))?;
        controls.hold()?;
        assert_eq!(runs.torn, 0, "freeze: {runs}");
        Ok(())
    })
}

/// The other tests take ELF: a raw image is 4 GiB long, and hashing it takes many times longer.
fn a_slow_ring_is_torn_too(lab: &Lab) -> Result<()> {
    let slow = Ring::pair(memory_mib()).delay(100_000);
    let mut subject = Subject::boot(lab, slow, Backing::Anonymous, Version::V7_2)?;
    assert!(subject.rate()? < 1_000_000, "not slow");
    let formats: &[&str] = lab.scale(&["elf"], &["elf", "raw", "lime"]);
    for format in formats {
        assert!(subject.control(lab, format)?.is_torn(), "{format}: live");
        subject.guest.stop()?;
        assert!(!subject.live(lab, format)?.is_torn(), "{format}: stopped");
        subject.guest.cont()?;
    }
    subject.report(&format!("{formats:?}: live torn, stopped not"))?;
    subject.guest.finish()
}

/// All of a stopped guest's memory by QEMU's own `pmemsave`, then some laps later.
fn two_instants(subject: &mut Subject) -> Result<[Vec<u8>; 2]> {
    let len = u64::from(subject.ring.memory_mib) << 20;
    let mut images = [Vec::new(), Vec::new()];
    for image in &mut images {
        subject.guest.stop()?;
        *image = subject.guest.pmemsave(0, len)?;
        let counter = subject.counter()?;
        subject.guest.cont()?;
        let until = Instant::now() + Duration::from_secs(60);
        while subject.counter()? < counter + 4 * subject.ring.words() {
            assert!(Instant::now() < until, "the ring stands still at {counter}");
        }
    }
    Ok(images)
}

/// The checker sees what it must see: QEMU's own images of a stopped guest are whole, and torn as
/// soon as the least part of one is put into the other.
fn spliced_images_are_torn(lab: &Lab) -> Result<()> {
    for (ring, version) in rings().into_iter().zip([Version::V10_0, Version::V7_2]) {
        let mut subject = Subject::boot(lab, ring, Backing::Anonymous, version)?;
        let [mut image, later] = two_instants(&mut subject)?;
        let ring = subject.ring.clone();
        let judge = |image: &[u8]| {
            let mut scan = Scan::new(&ring);
            scan.piece(0, image);
            scan.verdict()
        };
        assert!(!judge(&image)?.is_torn() && !judge(&later)?.is_torn(), "one instant each");
        let mut splice = |gpa: u64, len: usize| -> Result<Verdict> {
            let at = usize::try_from(gpa)?;
            image[at..at + len].copy_from_slice(&later[at..at + len]);
            judge(&image)
        };
        let half = splice(ring.gpa(0), 2048)?;
        assert!(half.is_torn(), "half a page: {half}");
        println!("         K={}: half a page spliced: {half}", ring.pages);
        for page in 0..ring.pages {
            let verdict = splice(ring.gpa(page), 4096)?;
            let spliced = page + 1;
            assert_eq!(verdict.is_torn(), spliced < ring.pages, "{spliced} pages: {verdict}");
            if [1, 2, ring.pages / 10, ring.pages / 2].contains(&spliced) {
                println!("         K={}: {spliced} pages spliced: {verdict}", ring.pages);
            }
        }
        subject.report("spliced images torn, the others whole")?;
        subject.guest.finish()?;
    }
    Ok(())
}

fn spliced_images_of_kvm_guests_are_torn(lab: &Lab) -> Result<()> {
    spliced_images_are_torn(lab)
}
