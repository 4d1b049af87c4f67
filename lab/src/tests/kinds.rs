//! All memory and only memory: what lies under something else, flash, NVDIMMs, and what is left out on request.

use std::fs;
use std::path::{Path, PathBuf};

use lab::{Backing, Doing, Guest, Lab, Machine, Result, failed, here, outer, proc};
use serde_json::Value;

use super::exhibit::{Exhibit, acquire, acquire_at_best};
use super::live::numbered_frames;
use super::run::verify;

pub(crate) const TESTS: &[lab::runner::Test] = here![
    what_is_hidden_has_a_file,
    flash_and_nvdimms_have_files,
    what_is_left_out_is_a_loss,
    what_cannot_be_read_is_named,
];

pub(crate) const OUTER: &[lab::runner::Test] = outer![what_is_in_swap_is_left_there_or_read];

const MIB: u64 = 1 << 20;

/// What the record says was done with memory of this kind; with the names that `fits`.
fn decided<'a>(
    exhibit: &'a Exhibit,
    kind: &str,
    fits: impl Fn(&Value) -> bool,
) -> Result<&'a Value> {
    let all = exhibit.manifest["decisions"].as_array().map_or(&[][..], Vec::as_slice);
    let found = all.iter().find(|one| one["kind"] == kind && fits(one));
    found.ok_or_else(|| failed(format_args!("no {kind} among {:?}", exhibit.manifest["decisions"])))
}

/// The bytes of the file that a decision names, which are known and among the attachments.
fn bytes(exhibit: &Exhibit, decided: &Value) -> Result<Vec<u8>> {
    assert_eq!((&decided["taken"], &decided["known"]), (&"file".into(), &true.into()), "{decided}");
    assert!(decided["read"]["t0_ns"].is_u64(), "{decided}");
    let name = decided["file"].as_str().unwrap_or_default();
    let attached = exhibit.manifest["attachments"].as_array().into_iter().flatten();
    assert!(attached.clone().any(|file| file["file"] == name), "{name} is no attachment");
    let bytes = fs::read(exhibit.dir.join(name)).doing(name)?;
    assert_eq!(u64::try_from(bytes.len())?, decided["len"].as_u64().unwrap_or_default());
    Ok(bytes)
}

fn sound(lab: &Lab, exhibit: &Exhibit) -> Result<()> {
    assert_eq!(verify(lab, &exhibit.dir)?, Some(0));
    exhibit.assert_sums()
}

/// RAM under the VGA window, where firmware keeps its code for system management mode.
fn what_is_hidden_has_a_file(lab: &Lab) -> Result<()> {
    let cases = [(Machine::Q35, Backing::Memfd), (Machine::Pc, Backing::Anonymous)];
    for &(machine, backing) in &cases[..lab.scale(1, 2)] {
        let mut guest = lab.guest().machine(machine).backing(backing).memory_mib(128).boot()?;
        for (method, flags) in [
            ("live", &[][..]),
            ("freeze", &["--stall-budget", "900ms"]),
            ("snapshot", &["--stall-budget", "2s"]),
        ] {
            let exhibit = acquire(lab, &guest, method, flags).doing(method)?;
            let vga = decided(&exhibit, "hidden", |one| {
                one["gpa"] == "0xa0000" && one["taken"] == "file"
            })?;
            let found = bytes(&exhibit, vga)?;
            assert_eq!(found.len(), 0x2_0000);
            // The lab's own way: the same RAM is linear in the process.
            let own = own_bytes(&mut guest, 0xa_0000, 0x2_0000)?;
            assert!(own == found, "{method}: other bytes than the lab reads");
            assert!(method != "live" || own.iter().any(|&byte| byte != 0), "void: all zeros");
            sound(lab, &exhibit)?;
            exhibit.remove()?;
        }
        guest.finish()?;
    }
    Ok(())
}

/// RAM at an offset from the guest's first byte, whatever lies over it.
fn own_bytes(guest: &mut Guest, offset: u64, len: u64) -> Result<Vec<u8>> {
    use std::os::unix::fs::FileExt as _;
    let hva = guest.hva(0)? + offset;
    let memory = fs::File::open(format!("/proc/{}/mem", guest.pid()))?;
    let mut bytes = vec![0; usize::try_from(len)?];
    memory.read_exact_at(&mut bytes, hva).doing("reading hidden RAM")?;
    Ok(bytes)
}

/// Bytes that no page shares with another.
fn numbered(len: u64, seed: u64) -> Vec<u8> {
    (0..len / 8).flat_map(|n| (n ^ seed << 40).to_le_bytes()).collect()
}

fn flash_and_nvdimms_have_files(lab: &Lab) -> Result<()> {
    let dir = super::run::new_dir(lab, "files")?;
    let file = |name: &str, len: u64, seed: u64| -> Result<(String, Vec<u8>)> {
        let (path, bytes) = (dir.join(name), numbered(len, seed));
        fs::write(&path, &bytes)?;
        Ok((path.display().to_string(), bytes))
    };
    let (code, code_bytes) = file("code", 2 * MIB, 1)?;
    let (variables, variables_bytes) = file("variables", MIB / 2, 2)?;
    let (nvdimm, nvdimm_bytes) = file("nvdimm", 64 * MIB, 3)?;
    let flash = |path: &str, unit: u32| format!("if=pflash,unit={unit},format=raw,file={path}");
    let backend = format!("memory-backend-file,id=n0,share=on,size=64M,mem-path={nvdimm}");
    // It never runs: its firmware are numbers.
    let guest = lab.guest().machine(Machine::Q35).memory_mib(128).blank().paused();
    let guest = guest
        .args(&["-machine", "nvdimm=on", "-m", "128M,slots=2,maxmem=1G"])
        .args(&["-drive", &flash(&code, 0), "-drive", &flash(&variables, 1)])
        .args(&["-object", &backend, "-device", "nvdimm,id=nv,memdev=n0"])
        .boot()?;
    for flags in [&[][..], &["--include", "nvdimm", "--exclude", "hidden"]] {
        let exhibit = acquire(lab, &guest, "live", flags)?;
        for (name, wanted) in [("system.flash0", &code_bytes), ("system.flash1", &variables_bytes)]
        {
            let whole = |one: &Value| one["name"] == name && one["len"] == wanted.len();
            let flash = decided(&exhibit, "romd", whole)?;
            assert!(bytes(&exhibit, flash)? == **wanted, "{name}: other bytes");
        }
        let nvdimm = decided(&exhibit, "nvdimm", |_| true)?;
        let hidden = decided(&exhibit, "hidden", |_| true)?;
        match flags {
            [] => {
                assert_eq!(nvdimm["taken"], "nowhere");
                assert!(
                    nvdimm["why"].as_str().is_some_and(|why| why.contains("--include nvdimm")),
                    "{nvdimm}"
                );
            }
            _ => {
                assert!(bytes(&exhibit, nvdimm)? == nvdimm_bytes, "other bytes in the NVDIMM");
                assert_eq!(hidden["why"], "--exclude hidden", "{hidden}");
            }
        }
        sound(lab, &exhibit)?;
        exhibit.remove()?;
    }
    let planned =
        lab.tool(["plan", "--method", "live", &guest.pid().to_string()])?.expect_code(0)?.stdout;
    assert!(planned.contains("beside   romd system.flash1"), "{planned}");
    guest.finish()
}

/// Zeros in the image, named in the record, exit 3; by methods that read block by block and by QEMU's stream.
fn what_is_left_out_is_a_loss(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().machine(Machine::Q35).memory_mib(128).boot()?;
    guest.plant_frames(16, 9)?;
    let window: u64 = vga(&mut guest)?;
    for (method, flags) in [
        ("live", &[][..]),
        ("freeze", &["--stall-budget", "900ms"]),
        ("snapshot", &["--stall-budget", "2s", "--store", "disk"]),
        ("dump", &["--stall-budget", "20s"]),
        ("pmemsave", &[]),
    ] {
        let flags = [flags, &["--exclude", "device-ram,rom"]].concat();
        let exhibit = acquire_at_best(lab, &guest, method, &flags, &[3]).doing(method)?;
        let manifest = &exhibit.manifest;
        let left_out = manifest["states"]["excluded"].as_u64().unwrap_or_default();
        assert!(left_out >= 16 * MIB, "{method}: {left_out} bytes left out");
        let losses = manifest["losses"].as_array().cloned().unwrap_or_default();
        assert!(losses.iter().all(|loss| loss["kind"] == "excluded"), "{method}: {losses:?}");
        let sum: u64 = losses.iter().filter_map(|loss| loss["len"].as_u64()).sum();
        assert_eq!(sum, left_out, "{method}");
        let image = exhibit.image()?.read(window, 16 * MIB)?;
        assert!(image.iter().all(|&byte| byte == 0), "{method}: something of the display");
        let display = decided(&exhibit, "device-ram", |one| one["name"] == "vga.vram")?;
        assert_eq!(
            (&display["taken"], &display["why"]),
            (&"excluded".into(), &"--exclude device-ram".into())
        );
        // A class is of what is there.
        assert_eq!(manifest["class"] == "none", matches!(method, "live" | "pmemsave"), "{method}");
        assert_eq!(verify(lab, &exhibit.dir)?, Some(3), "{method}");
        exhibit.remove()?;
    }
    let usage =
        lab.tool([Path::new("plan"), "--exclude".as_ref(), "ram".as_ref(), "x".as_ref()])?;
    usage.expect_code(2)?;
    guest.finish()
}

/// Where the display's memory lies.
fn vga(guest: &mut Guest) -> Result<u64> {
    let view = guest.flat_view()?;
    let display = view.iter().find(|range| range.name == "vga.vram" && range.len == 16 * MIB);
    Ok(display.ok_or_else(|| failed(format_args!("no display in {view:?}")))?.gpa)
}

/// A control group whose memory the host can be told to swap out.
struct Reclaimed(PathBuf);

impl Reclaimed {
    /// What `boot` starts is in the group from its first page on: memory stays with the group that it was taken in.
    fn boot(boot: impl FnOnce() -> Result<Guest>) -> Result<(Self, Guest)> {
        lab::outer::swap_on(256)?;
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+memory").doing("+memory")?;
        let group = root.join("reclaimed");
        fs::create_dir(&group).doing("the group")?;
        let group = Self(group);
        // 0: whoever writes it, with all that it starts.
        fs::write(group.0.join("cgroup.procs"), "0").doing("cgroup.procs")?;
        let guest = boot();
        fs::write(root.join("cgroup.procs"), "0").doing("cgroup.procs")?;
        Ok((group, guest?))
    }

    /// Swaps out what can be had of so many MiB.
    fn swap_out(&self, mib: u64) {
        for _ in 0..mib {
            // EAGAIN: so much was not to be had.
            let _ = fs::write(self.0.join("memory.reclaim"), "1M");
        }
    }
}

impl Drop for Reclaimed {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
        let _ = lab::outer::swap_off();
    }
}

fn swapped(guest: &Guest) -> Result<u64> {
    Ok(proc::status(guest.pid(), "VmSwap")? << 10)
}

/// Bytes of the guest's memory in swap, by `plan`: QEMU's own come back by questions to QEMU.
fn counted_in_swap(lab: &Lab, guest: &Guest) -> Result<u64> {
    let plan = lab.tool(["plan", "--method", "live", "--json", &guest.pid().to_string()])?;
    let plan: Value = serde_json::from_str(&plan.expect_code(0)?.stdout)?;
    Ok(plan["facts"]["swapped_bytes"].as_u64().unwrap_or_default())
}

/// Left there: nothing comes back, zeros and a loss in the record. Read: all of it is in the image, and what came
/// back is in the record.
fn what_is_in_swap_is_left_there_or_read(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    let (host, mut guest) = Reclaimed::boot(|| lab.guest().memory_mib(128).boot())?;
    let planted = guest.plant_frames(24, 5)?;
    guest.stop()?;
    host.swap_out(64);
    let before = swapped(&guest)?;
    assert!(before > 16 * MIB, "void: {before} bytes in swap");
    let counted = counted_in_swap(lab, &guest)?;
    assert!(
        counted > before / 2 && counted <= before,
        "{counted} of {before} bytes in swap are told"
    );
    for method in ["live", "freeze"] {
        let flags = ["--swap", "skip", "--stall-budget", "950ms"];
        let exhibit = acquire_at_best(lab, &guest, method, &flags, &[3])?;
        let left = exhibit.manifest["states"]["excluded"].as_u64().unwrap_or_default();
        let losses = exhibit.manifest["losses"].to_string();
        assert!(losses.contains("--swap skip"), "{method}: {left} bytes, {losses}");
        let after = counted_in_swap(lab, &guest)?;
        println!(
            "         {method}: {left} bytes left in swap, of {counted} before and {after} after"
        );
        assert_eq!((left, after), (counted, counted), "{method}");
        assert_eq!(verify(lab, &exhibit.dir)?, Some(3));
        exhibit.remove()?;
    }
    for method in ["track", "snapshot", "dump", "pmemsave"] {
        let vm = guest.pid().to_string();
        let refused =
            lab.tool(["plan", "--method", method, "--swap", "skip", &vm])?.expect_code(4)?;
        assert!(refused.stderr.contains("--swap skip is not possible"), "{}", refused.stderr);
    }
    let exhibit = acquire(lab, &guest, "live", &[])?;
    let found = numbered_frames(&mut guest, &exhibit.image()?, 5)?;
    assert_eq!(u64::try_from(found.len())?, planted);
    let changes = exhibit.manifest["changes_made"].to_string();
    assert!(changes.contains("came back from swap"), "{changes}");
    guest.cont()?;
    guest.finish()?;
    drop(host);
    Ok(())
}

/// Pages of which the host has lost the memory are losses, with address and reason; the rest is in the image.
fn what_cannot_be_read_is_named(lab: &Lab) -> Result<()> {
    let dir = super::run::new_dir(lab, "ram")?;
    let file = dir.join("ram");
    let backend =
        format!("memory-backend-file,id=f0,share=on,size=128M,mem-path={}", file.display());
    let guest = lab.guest().memory_mib(128).args(&["-object", &backend]);
    let mut guest = guest.args(&["-machine", "memory-backend=f0"]).boot()?;
    let planted = guest.plant_frames(48, 6)?;
    guest.stop()?;
    let whole = acquire(lab, &guest, "live", &[])?;
    let frames = numbered_frames(&mut guest, &whole.image()?, 6)?;
    assert_eq!(u64::try_from(frames.len())?, planted);
    whole.remove()?;
    // RAM below 4 GiB lies in the file as in the guest: what lies behind the middle of the planted pages is lost.
    let from = frames.iter().nth(frames.len() / 2).ok_or_else(|| failed("no planted page"))? << 12;
    fs::OpenOptions::new().write(true).open(&file)?.set_len(from)?;
    let exhibit = acquire_at_best(lab, &guest, "live", &[], &[3])?;
    let losses = exhibit.manifest["losses"].as_array().cloned().unwrap_or_default();
    println!("         {losses:?}");
    let first = losses.first().ok_or_else(|| failed("no losses"))?;
    assert_eq!(
        (&first["gpa"], &first["kind"]),
        (&format!("{from:#x}").into(), &"unreadable".into())
    );
    let why = "the file behind the memory ends before it";
    assert!(losses.iter().all(|loss| loss["reason"] == why), "{losses:?}");
    let lost: u64 = losses.iter().filter_map(|loss| loss["len"].as_u64()).sum();
    assert_eq!(lost, 128 * MIB - from, "all that lies behind, and no more");
    let found = numbered_frames(&mut guest, &exhibit.image()?, 6)?;
    assert!(
        found.iter().all(|pfn| pfn << 12 < from) && found.len() == frames.len() / 2,
        "{}",
        found.len()
    );
    assert_eq!(verify(lab, &exhibit.dir)?, Some(3));
    exhibit.remove()?;
    // It would touch what is not there any more.
    drop(guest);
    Ok(())
}
