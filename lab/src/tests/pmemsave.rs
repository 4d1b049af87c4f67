//! `pmemsave`: QEMU's own copy in slices, each held against a read just before it. Each test prints its
//! figures.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::{Backing, Doing, Guest, Lab, Result, Ring, Version, failed, here, runner};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::exhibit::{Exhibit, acquire};
use super::faults::share;
use super::footprint::{SmallPages, ask_once, rise, settle};
use super::live::assert_equals_pmemsave;
use super::run::{
    Family, Running, assert_nothing_passes, await_dead, new_dir, recover, undo_files,
};

pub(crate) const TESTS: &[runner::Test] = here![
    a_stopped_guest_is_the_same_by_every_method,
    what_the_guest_wrote_between_the_reads_is_named,
    holes_are_not_asked_for,
    a_slice_over_the_budget_makes_the_next_ones_smaller,
    sigkill_leaves_no_file_with_qemu,
];

/// The tool's word for the method.
const METHOD: &str = "pmemsave";

/// Names of the files that QEMU has open and that are the tool's.
fn files_of_ours(guest: &Guest) -> Result<Vec<String>> {
    let fds = fs::read_dir(format!("/proc/{}/fd", guest.pid()))?.flatten();
    let links = fds.filter_map(|fd| fs::read_link(fd.path()).ok());
    let links = links.map(|link| link.to_string_lossy().into_owned());
    Ok(links.filter(|link| link.starts_with("/memfd:stillframe")).collect())
}

/// The record of QEMU's slices, which must be one that can be true.
fn slices(exhibit: &Exhibit) -> Result<Value> {
    let manifest = &exhibit.manifest;
    assert_eq!([&manifest["method"], &manifest["class"]], [METHOD, "none"]);
    assert_eq!(manifest["tau"], Value::Null);
    let slices = manifest["slices"].clone();
    let of = |field: &str| slices[field].as_u64().ok_or_else(|| failed(format_args!("no {field}")));
    // What was read is data, or zeros by another name.
    let states = &manifest["states"];
    let read = [&states["data"], &states["zero"]].map(|bytes| bytes.as_u64().unwrap_or(0));
    assert_eq!(of("bytes")?, read.iter().sum::<u64>(), "{slices} {states}");
    assert!(of("count")? >= of("bytes")? / of("slice_bytes")?, "{slices}");
    assert!(of("longest_ns")? > 0 && of("longest_ns")? <= of("total_ns")?, "{slices}");
    Ok(slices)
}

/// Nothing of a stopped guest changes: whoever reads it must find the same, by the root over all digests.
fn a_stopped_guest_is_the_same_by_every_method(lab: &Lab) -> Result<()> {
    let cases = [(Backing::Anonymous, Version::V10_0), (Backing::Memfd, Version::V7_2)];
    for (backing, version) in cases {
        let guest = lab.guest().backing(backing).version(version).memory_mib(192);
        let mut guest = guest.args(&["-sandbox", "on"]).boot()?;
        guest.stop()?;
        let mut roots = Vec::new();
        for (method, flags) in [
            ("live", &[][..]),
            ("freeze", &["--hold", "stop", "--stall-budget", "20s"]),
            (METHOD, &[]),
            (METHOD, &["--slice", "64K", "--store", "disk", "--format", "lime"]),
            ("dump", &["--stall-budget", "20s"]),
        ] {
            let exhibit = acquire(lab, &guest, method, flags)?;
            roots.push(exhibit.manifest["memory_root"].clone());
            if method == METHOD {
                let slices = slices(&exhibit)?;
                println!("         {backing:?}, {version:?}: {slices}");
                assert_eq!(exhibit.stable().1, 0, "pages of a stopped guest changed");
                lab.tool([Path::new("verify"), &exhibit.dir])?.expect_code(0)?;
                assert_equals_pmemsave(&mut guest, &exhibit.image()?)?;
            }
            exhibit.remove()?;
        }
        assert!(roots[0].is_string(), "no root");
        assert!(roots.iter().all(|root| *root == roots[0]), "{backing:?} {version:?}: {roots:?}");
        assert_eq!(files_of_ours(&guest)?, [""; 0]);
        guest.finish()?;
    }
    Ok(())
}

/// A guest that writes all the time: the record says which pages were others at the second read.
fn what_the_guest_wrote_between_the_reads_is_named(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().memory_mib(128).boot()?;
    guest.plant("dirty 32 200000", Duration::from_secs(60))?;
    let exhibit = acquire(lab, &guest, METHOD, &[])?;
    slices(&exhibit)?;
    let (equal, changed) = exhibit.stable();
    println!("         {equal} pages equal in both reads, {changed} not");
    assert!(changed > 0 && equal > changed, "{equal} equal, {changed} changed");
    lab.tool([Path::new("verify"), &exhibit.dir])?.expect_code(0)?;
    guest.finish()
}

/// QEMU reads through its mapping, which gives memory to what has none: so it is not asked for that.
fn holes_are_not_asked_for(lab: &Lab) -> Result<()> {
    let _small = SmallPages::only()?;
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let mut guest = lab.guest().blank().memory_mib(512).backing(backing).boot()?;
        settle(&mut guest)?;
        ask_once(lab, &guest)?;
        let before = guest.rss()?;
        acquire(lab, &guest, METHOD, &[])?.remove()?;
        let after = guest.rss()?;
        assert!(rise(before, after) <= 1, "{backing:?}: {before} before, {after} after");
        // The control: the same by a client that does not look.
        guest.pmemsave(256 << 20, 64 << 20)?;
        let control = guest.rss()?;
        println!(
            "         {backing:?}: {before} resident before, {after} after; careless {control}"
        );
        assert!(backing == Backing::Anonymous || control > after + (48 << 20), "void: {control}");
        guest.finish()?;
    }
    Ok(())
}

fn a_slice_over_the_budget_makes_the_next_ones_smaller(lab: &Lab) -> Result<()> {
    let guest = lab.guest().ring(Ring::pair(32)).boot()?;
    // No question to QEMU is answered so soon.
    let exhibit = acquire(lab, &guest, METHOD, &["--stall-budget", "0ms"])?;
    let slices = slices(&exhibit)?;
    println!("         {slices}");
    assert_eq!([&slices["last_bytes"], &slices["budget_ns"]], [&json!(4096), &json!(0)]);
    assert_eq!(slices["over_budget"], slices["count"]);
    let warnings = exhibit.manifest["warnings"].to_string();
    assert!(warnings.contains("longer than the stall budget"), "{warnings}");
    guest.finish()
}

/// Whoever is killed, in the end QEMU has no file of ours open, and no false exhibit is left.
fn sigkill_leaves_no_file_with_qemu(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().memory_mib(160).boot()?;
    guest.plant_noise(64, 7)?;
    let (vm, family, moments) = (guest.pid().to_string(), Family::of(lab)?, lab.scale(4, 100));
    let start = |out: &Path| -> Result<Running> {
        let mut command = lab.tool_command(["acquire", "--method", METHOD, "--json"])?;
        command.args(["--slice", "64K", "-o"]).arg(out).arg("--").arg(&vm);
        Running::start(command)
    };
    for guardian_too in [false, true] {
        let mut midway = 0;
        for n in 0..moments * 4 {
            if midway >= moments {
                break;
            }
            let out = new_dir(lab, "killed")?;
            let mut run = start(&out)?;
            let until = Instant::now() + Duration::from_secs(60);
            while files_of_ours(&guest)?.is_empty() && run.runs()? && Instant::now() < until {
                sleep(Duration::from_millis(1));
            }
            sleep(Duration::from_millis(100).mul_f64(share(n)));
            let had = !files_of_ours(&guest)?.is_empty();
            let guardian = family.with("@guardian").filter(|_| guardian_too);
            let victims: Vec<u32> = [Some(run.pid()), guardian].into_iter().flatten().collect();
            for pid in &victims {
                // Gone is as well.
                let _ = super::run::signal(*pid, Signal::KILL);
            }
            await_dead(&victims)?;
            run.end()?;
            family.await_gone()?;
            // What was open before, the tool may have taken back just before it was killed.
            let still = !files_of_ours(&guest)?.is_empty();
            let said = recover(lab, &guest)?;
            midway += u32::from(if guardian_too { still } else { had });
            assert!(!still || said.contains("file"), "recover says {said:?}");
            assert_eq!(files_of_ours(&guest)?, [""; 0], "moment {n}, {said:?}");
            assert_eq!(undo_files(&guest), [""; 0]);
            guest.assert_as_found().doing(format_args!("moment {n}"))?;
            assert_nothing_passes(lab, &out)?;
            fs::remove_dir_all(&out)?;
        }
        println!("         guardian too: {guardian_too}: {midway} killed while QEMU had the file");
        assert!(midway >= moments, "void: {midway} of {moments} while QEMU had the file");
    }
    guest.finish()
}
