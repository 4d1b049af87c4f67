//! The tear benchmark on Linux guests of several CPUs, with RAM on both sides of the 4 GiB line:
//! images held against "one instant", and the declared τ against the guest's own clock. Each test
//! prints its figures.

use lab::tear::{Controls, Runs};
use lab::tearbench::{Options, Tearbench};
use lab::tearcheck::{Declared, Ledger, Offset, Report, Scan, utc_ns};
use lab::{Accel, Backing, Builder, Doing, Guest, Lab, Result, Version, failed, here, outer};
use serde_json::Value;

use super::exhibit::{acquire, control};

pub(crate) const TESTS: &[lab::runner::Test] = here![freeze_of_linux_is_one_instant];

pub(crate) const OUTER: &[lab::runner::Test] =
    outer![freeze_of_linux_under_kvm_is_one_instant, track_of_linux_under_kvm_is_one_instant];

/// Memory of the guests: half of it lies below the hole, half above 4 GiB. In the outer guest, where
/// an image takes ten times as long, as little as Linux comes up with.
fn memory_mib() -> u64 {
    if Accel::from_env() == Accel::Kvm { 192 } else { 256 }
}

/// Memory of the program: more than Linux has left above the line, where it takes from first.
fn options() -> Options {
    Options { mib: memory_mib() / 2, ..Options::default() }
}

/// What is tried: a method by its name, how it is called, and the class that it must earn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trial<'a> {
    /// The tool's name for the method.
    pub(super) method: &'a str,
    /// More of its flags.
    pub(super) flags: &'a [&'a str],
    /// What the manifest must say.
    pub(super) class: &'a str,
    /// Images of it.
    pub(super) runs: u32,
    /// Images by `live` of the running guest.
    pub(super) controls: u32,
}

/// A Linux guest with the benchmark in it.
pub(super) struct Subject {
    pub(super) guest: Guest,
    pub(super) bench: Tearbench,
    /// Bytes a second with which `live` reads: it may not be so quick that a busy host lets the guest
    /// not run at all between the reads of two pages.
    rate: String,
    /// The longest hold in which the guest's clocks went on.
    felt_ns: i64,
}

/// An image, and what was measured around it.
pub(super) struct Taken {
    pub(super) manifest: Value,
    pub(super) report: Report,
    /// The guest's clock against the host's, from before the image to after it.
    pub(super) offset: Offset,
}

impl Subject {
    /// A guest with two CPUs, made as `like` says, that has RAM on both sides of the 4 GiB line.
    pub(super) fn boot(
        lab: &Lab,
        like: impl FnOnce(Builder) -> Builder,
        options: &Options,
    ) -> Result<Self> {
        let guest = lab.guest().memory_mib(memory_mib()).cpus(2).both_sides_of_the_hole();
        // Linux would set 64 MiB aside to bounce DMA with, of the little that lies below.
        let mut guest = like(guest.append("swiotlb=noforce")).boot()?;
        let bench = Tearbench::start(&mut guest, options)?;
        let armed = &bench.armed;
        let [below, pages] = ["below_4g", "pages"].map(|field| armed[field].as_u64().unwrap_or(0));
        assert!(0 < below && below < pages, "not on both sides of the line: {armed}");
        let memory: u64 = guest.ram()?.iter().map(|range| range.len).sum();
        Ok(Self { guest, bench, rate: format!("{}", memory * 4), felt_ns: 0 })
    }

    /// An image by any method. It must be a complete exhibit with all of the program's pages in it.
    pub(super) fn take(&mut self, lab: &Lab, method: &str, flags: &[&str]) -> Result<Taken> {
        let before = self.bench.offset()?;
        let (manifest, report) = self.image(lab, method, flags)?;
        let offset = before.hull(self.bench.offset()?);
        if manifest["hold"]["kind"] == "ptrace" {
            self.felt_ns = self.felt_ns.max(held_ns(&manifest).unwrap_or(0));
        }
        Ok(Taken { manifest, report, offset })
    }

    /// The same of a guest that may stand still.
    fn image(&self, lab: &Lab, method: &str, flags: &[&str]) -> Result<(Value, Report)> {
        let exhibit = acquire(lab, &self.guest, method, flags)?;
        let mut scan = Scan::new();
        exhibit.image()?.each(|gpa, bytes| scan.piece(gpa, bytes))?;
        let manifest = exhibit.manifest.clone();
        exhibit.remove()?;
        Ok((manifest, scan.report(&self.bench.run)?))
    }

    fn live(&self, lab: &Lab) -> Result<Report> {
        let flags = ["--max-rate", &self.rate, "--file-digest", "no"];
        Ok(self.image(lab, "live", &flags)?.1)
    }

    /// `n` images by `live` of the running guest, which are added to `seen`, then one of the stopped
    /// one. It runs on.
    fn controls(&mut self, lab: &Lab, n: u32, seen: &mut Vec<Report>) -> Result<Controls> {
        let mut controls = Controls::default();
        for _ in 0..n {
            let report = control(|| self.live(lab), Report::is_torn)?;
            count(&mut controls.live, &report);
            seen.push(report);
        }
        self.guest.stop()?;
        let report = self.live(lab)?;
        self.guest.cont()?;
        count(&mut controls.stopped, &report);
        seen.push(report);
        Ok(controls)
    }

    /// Images by a method, none of them torn, each of an instant in which it says it is; then the
    /// controls of the same guest, without which that would say nothing.
    pub(super) fn is_one_instant(&mut self, lab: &Lab, trial: &Trial<'_>) -> Result<()> {
        let (mut runs, mut taken) = (Runs::default(), Vec::new());
        for _ in 0..trial.runs {
            let image = self.take(lab, trial.method, trial.flags)?;
            assert_eq!(image.manifest["class"], trial.class, "{}", image.manifest["disturbances"]);
            count(&mut runs, &image.report);
            taken.push(image);
        }
        let mut others = Vec::new();
        let controls = self.controls(lab, trial.controls, &mut others)?;
        let reports = || taken.iter().map(|image| &image.report).chain(&others);
        let smear = others.iter().map(Report::smear_ns).max().unwrap_or(0);
        let causal = others.iter().filter(|report| report.clock_violations > 0).count();
        println!(
            "         {} {runs}, {controls}; live: up to {} smeared, {causal} with a clock beyond",
            trial.method,
            ms(smear)
        );
        controls.hold()?;
        assert_eq!(runs.torn, 0, "{}: {runs}", trial.method);
        let mut ledger = Ledger::default();
        reports().for_each(|report| ledger.merge(&report.ledger));
        let taus = taken.iter().map(|image| image.tau(&ledger)).collect::<Result<Vec<_>>>()?;
        println!(
            "         τ: {} of {} outside, bounds up to {}, a τ farther off than {} would not pass; \
             guest's clock known to {}",
            taus.iter().filter(|tau| tau.misses_ns != 0).count(),
            taus.len(),
            ms(taus.iter().map(|tau| tau.bound_ns).max().unwrap_or(0)),
            ms(taus.iter().map(|tau| tau.power_ns).max().unwrap_or(0)),
            ms(taken.iter().map(|image| image.offset.width_ns()).max().unwrap_or(0)),
        );
        assert!(taus.iter().all(|tau| tau.misses_ns == 0), "{taus:?}");
        for report in reports() {
            assert!(report.canaries > 0);
            assert_eq!(report.canaries_lost, 0, "of {} canaries", report.canaries);
        }
        Ok(())
    }

    /// Ends the program, which must have found all as it was, and the guest.
    pub(super) fn finish(mut self) -> Result<()> {
        let said = self.bench.end(&mut self.guest)?;
        println!("         the guest: {said}");
        assert_eq!([&said["canary_ok"], &said["moved_pages"]], [&true.into(), &Value::from(0)]);
        // It felt each hold: by as much as its own measure of the TSC is worth.
        for gap in said["longest_gap_tsc_ns"].as_array().into_iter().flatten() {
            let (gap, held) = (gap.as_i64().unwrap_or(0), self.felt_ns);
            assert!(gap >= held - held / 10, "held {held} ns, missed {gap} ns at most");
        }
        self.guest.finish()
    }
}

fn count(runs: &mut Runs, report: &Report) {
    runs.count_all(report.is_torn(), &report.threads);
}

/// A declared τ against the ledger.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tau {
    /// How far outside of what is declared the instant lies.
    pub(super) misses_ns: i64,
    /// The bound that it was held against.
    pub(super) bound_ns: i64,
    /// A τ that is farther off would not have passed.
    pub(super) power_ns: i64,
}

impl Taken {
    /// Holds the manifest's τ against the guest's clock; `ledger` is that of images up to a later
    /// one. The bound is taken without the host's clock's error against UTC: the lab looks at the
    /// same clock. A τ that is as far off as the check can see must fail.
    pub(super) fn tau(&self, ledger: &Ledger) -> Result<Tau> {
        let declared = self.declared()?;
        let instant = self.report.instant(ledger)?;
        let power_ns = declared.power_ns(&instant, &self.offset);
        for off in [-power_ns - 1, power_ns + 1] {
            let utc_ns = declared.utc_ns + off;
            let shifted = Declared { utc_ns, ..declared }.misses_ns(&instant, &self.offset);
            assert!(shifted != 0, "a τ that is {off} ns off passes: {instant:?}, {declared:?}");
        }
        let misses_ns = declared.misses_ns(&instant, &self.offset);
        Ok(Tau { misses_ns, bound_ns: declared.bound_ns, power_ns })
    }

    fn declared(&self) -> Result<Declared> {
        let tau = &self.manifest["tau"];
        let bad = || failed(format_args!("the manifest's τ is {tau}"));
        let bound = tau["bound_ns"].as_i64().ok_or_else(bad)?;
        let error = self.manifest["clock"]["max_error_us"].as_i64().unwrap_or(0) * 1000;
        let half = held_ns(&self.manifest).map_or(bound - error, |held| held / 2 + 1);
        assert!(0 < half && half <= bound, "half of {half} ns, and a bound of {bound} ns");
        let utc_ns = tau["utc"].as_str().and_then(utc_ns).ok_or_else(bad)?;
        Ok(Declared { utc_ns, bound_ns: half })
    }
}

/// How long the guest stood still, all of it.
fn held_ns(manifest: &Value) -> Option<i64> {
    let at = |field: &str| manifest["hold"][field].as_i64();
    Some(at("released_ns")? - at("held_ns")?)
}

fn ms(ns: i64) -> String {
    format!("{}.{:03} ms", ns / 1_000_000, ns / 1000 % 1000)
}

/// Where the benchmark runs here; of the second kind are writers that take their time, in huge
/// pages.
const CASES: [(Version, Backing, bool); 4] = [
    (Version::V10_0, Backing::Anonymous, false),
    (Version::V7_2, Backing::Memfd, true),
    (Version::V7_2, Backing::Anonymous, false),
    (Version::V10_0, Backing::Memfd, true),
];

fn freeze_of_linux_is_one_instant(lab: &Lab) -> Result<()> {
    let trial = Trial {
        method: "freeze",
        flags: &["--stall-budget", "900ms", "--file-digest", "no"],
        class: "instantaneous",
        runs: lab.scale(2, 25),
        controls: lab.scale(1, 8),
    };
    for (version, backing, slow) in &CASES[..lab.scale(2, 4)] {
        let slow_and_huge = Options { thp: true, rate: 1_000_000, ledger: 1 << 12, ..options() };
        let options = if *slow { slow_and_huge } else { options() };
        let like = |guest: Builder| guest.version(*version).backing(*backing);
        let tried = Subject::boot(lab, like, &options).and_then(|mut subject| {
            let huge = subject.bench.armed["huge_kib"].as_u64();
            assert_eq!(huge > Some(0), *slow, "{}", subject.bench.armed);
            subject.is_one_instant(lab, &trial)?;
            subject.finish()
        });
        tried.doing(format_args!("{version:?}, {backing:?}"))?;
    }
    Ok(())
}

/// A host that is translated itself cannot read a Linux guest in the second that ptrace may hold it:
/// so it is held by QEMU's `stop`. An image takes half a minute.
fn freeze_of_linux_under_kvm_is_one_instant(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    let trial = Trial {
        method: "freeze",
        flags: &["--hold", "stop", "--stall-budget", "60s", "--file-digest", "no"],
        class: "instantaneous",
        runs: 20,
        controls: 2,
    };
    let mut subject = Subject::boot(lab, |guest| guest, &options())?;
    subject.is_one_instant(lab, &trial)?;
    subject.finish()
}

/// The guest works on while it is followed, and is held for less than a second each time.
fn track_of_linux_under_kvm_is_one_instant(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    let trial = Trial {
        method: "track",
        flags: &["--stall-budget", "950ms", "--io-horizon", "50ms", "--file-digest", "no"],
        class: "quasi-instantaneous",
        runs: 20,
        controls: 2,
    };
    let mut subject = Subject::boot(lab, |guest| guest, &options())?;
    subject.is_one_instant(lab, &trial)?;
    subject.finish()
}
