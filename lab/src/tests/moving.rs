//! Memory that moves: a balloon that has taken some, and one that moves while an image is taken; DIMMs and
//! virtio-mem that come and go. Pages carry their frame number, so none can be another's.

use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::{Backing, Doing, GUEST_MODULES, Guest, Lab, Machine, Result, failed, here, outer};
use serde_json::{Value, json};

use super::exhibit::{Exhibit, acquire, at_best};
use super::footprint::{SmallPages, memfd_blocks, rise};
use super::live::numbered_frames;
use super::run::{Ended, Running, verify};

pub(crate) const TESTS: &[lab::runner::Test] =
    here![a_balloon_at_half_is_holes, a_balloon_that_moves_breaks_nothing, devices_come_and_go];

pub(crate) const OUTER: &[lab::runner::Test] = outer![devices_come_and_go_under_track];

const MIB: u64 = 1 << 20;

/// Bytes of RAM that the guests begin with, and what a balloon leaves of them.
const ALL: u64 = 192 * MIB;
const HALF: u64 = 96 * MIB;

/// MiB of planted pages, and the number of their run.
const PLANTED: u64 = 24;
const RUN: u64 = 0x6a11_0011;

/// Writes to most of a guest's free memory once, so that the host has memory behind it.
const TOUCH_ALL: &str = "head -c 80m /dev/zero > /tmp/fill; rm /tmp/fill";

fn load_modules(guest: &mut Guest) -> Result<()> {
    let script = format!("for m in {}; do insmod /modules/$m.ko; done", GUEST_MODULES.join(" "));
    guest.sh(&script).map(drop)
}

fn with_balloon(lab: &Lab, backing: Backing) -> Result<Guest> {
    let device = ["-device", "virtio-balloon-pci,id=balloon0"];
    let guest = lab.guest().memory_mib(ALL >> 20).backing(backing).args(&device);
    let mut guest = guest.boot()?;
    load_modules(&mut guest)?;
    Ok(guest)
}

fn ask_for(guest: &mut Guest, bytes: u64) -> Result<()> {
    guest.qmp("balloon", json!({ "value": bytes })).map(drop)
}

/// Has the guest give memory back until it has so much.
fn inflate_to(guest: &mut Guest, bytes: u64) -> Result<()> {
    ask_for(guest, bytes)?;
    let until = Instant::now() + Duration::from_secs(120);
    while guest.qmp("query-balloon", json!({}))?["actual"] != bytes {
        if Instant::now() > until {
            return Err(failed("the balloon does not get so large"));
        }
        sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// All planted pages are in the image, whole and at their place.
fn assert_planted(guest: &mut Guest, exhibit: &Exhibit, planted: u64) -> Result<()> {
    let found = numbered_frames(guest, &exhibit.image()?, RUN)?;
    assert_eq!(u64::try_from(found.len())?, planted);
    Ok(())
}

fn holes(exhibit: &Exhibit) -> u64 {
    exhibit.manifest["states"]["hole"].as_u64().unwrap_or_default()
}

/// Host memory behind the guest, in bytes: a memfd's too, which counts as resident only where it is mapped.
fn behind(guest: &Guest) -> Result<[u64; 2]> {
    Ok([guest.rss()?, memfd_blocks(guest.pid())?])
}

/// What the guest gave back is holes, no more and hardly less, and stays given back.
fn a_balloon_at_half_is_holes(lab: &Lab) -> Result<()> {
    let _small = SmallPages::only()?;
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let mut guest = with_balloon(lab, backing)?;
        let planted = guest.plant_frames(PLANTED, RUN)?;
        guest.sh(TOUCH_ALL)?;
        let full = acquire(lab, &guest, "live", &[])?;
        let balloon = &full.manifest["amount"]["balloon"];
        assert_eq!([&balloon["bytes_before"], &balloon["bytes_after"]], [ALL, ALL], "{balloon}");
        inflate_to(&mut guest, HALF)?;
        let before = behind(&guest)?;
        for (method, flags) in
            [("live", &[][..]), ("freeze", &["--stall-budget", "900ms"]), ("pmemsave", &[])]
        {
            // QEMU reads through its mapping, which gives shared memory pages that had none.
            if (method, backing) == ("pmemsave", Backing::Memfd) {
                continue;
            }
            let what = format!("{method}, {backing:?}");
            let exhibit = acquire(lab, &guest, method, flags).doing(&what)?;
            assert_planted(&mut guest, &exhibit, planted).doing(&what)?;
            let balloon = &exhibit.manifest["amount"]["balloon"];
            let said = [&balloon["bytes_before"], &balloon["bytes_after"]];
            assert_eq!(said, [HALF, HALF], "{what}: {balloon}");
            assert_eq!(balloon["device"], "/machine/peripheral/balloon0", "{what}");
            let gone = exhibit.manifest["limitations"].to_string();
            assert!(gone.contains("through its balloon is gone"), "{what}: {gone}");
            let grown = holes(&exhibit).saturating_sub(holes(&full));
            println!(
                "         {what}: {} MiB given back, {} MiB more are holes",
                (ALL - HALF) >> 20,
                grown >> 20
            );
            assert!(grown <= ALL - HALF, "{what}: more holes than were given back");
            assert!(grown > (ALL - HALF) / 2, "{what}: {grown} bytes of holes, void");
            let after = behind(&guest)?;
            for (before, after) in before.into_iter().zip(after) {
                assert!(rise(before, after) <= 1, "{what}: {before} {after}");
            }
            exhibit.remove()?;
        }
        guest.finish()?;
    }
    Ok(())
}

/// A run, while `act` is done over and over with pauses: its end, and how often it was done.
fn during(
    lab: &Lab,
    guest: &mut Guest,
    method: &str,
    flags: &[&str],
    mut act: impl FnMut(&mut Guest, u32) -> Result<()>,
) -> Result<(Ended, u32)> {
    let out = lab.scratch().join("exhibits");
    fs::create_dir_all(&out)?;
    let mut done = 0;
    let ended = at_best(|| {
        let mut command = lab.tool_command(["acquire", "--method", method, "--json"])?;
        command.args(flags).args(["--file-digest", "no", "-o"]).arg(&out);
        command.arg(guest.pid().to_string());
        let mut run = Running::start(command)?;
        while run.runs()? {
            act(guest, done)?;
            done += 1;
            sleep(Duration::from_millis(150));
        }
        run.end()
    })?;
    Ok((ended, done))
}

fn a_balloon_that_moves_breaks_nothing(lab: &Lab) -> Result<()> {
    for &backing in &[Backing::Memfd, Backing::Anonymous][..lab.scale(1, 2)] {
        let mut guest = with_balloon(lab, backing)?;
        let planted = guest.plant_frames(PLANTED, RUN)?;
        for (method, flags) in [
            ("live", &["--max-rate", "64M"][..]),
            ("freeze", &["--stall-budget", "900ms"]),
            ("snapshot", &["--stall-budget", "2s"]),
            ("pmemsave", &["--max-rate", "64M"]),
            ("dump", &["--stall-budget", "20s"]),
        ] {
            let what = format!("{method}, {backing:?}");
            let move_it = |guest: &mut Guest, n: u32| {
                ask_for(guest, if n.is_multiple_of(2) { HALF } else { ALL })
            };
            let (ended, moves) = during(lab, &mut guest, method, flags, move_it).doing(&what)?;
            let (dir, manifest) = ended.expect(0).doing(&what)?.exhibit()?;
            assert_eq!(verify(lab, &dir)?, Some(0), "{what}");
            let exhibit = Exhibit::open(&dir)?;
            assert_planted(&mut guest, &exhibit, planted).doing(&what)?;
            let changes = manifest["amount"]["balloon"]["changes"].as_array().map_or(0, Vec::len);
            println!(
                "         {what}: the balloon was moved {moves} times, QEMU told of {changes}"
            );
            // What takes a few hundred milliseconds may see none.
            assert!(method != "live" || changes > 0, "{what}: void: it did not move");
            let caveats = manifest["caveats"].to_string();
            assert_eq!(
                caveats.contains("the balloon moved"),
                changes > 0 && manifest["class"] == "none",
                "{caveats}"
            );
            exhibit.remove()?;
        }
        inflate_to(&mut guest, ALL)?;
        guest.finish()?;
    }
    Ok(())
}

/// A guest that memory can be plugged into, and that takes it by itself.
fn with_slots(lab: &Lab) -> Result<Guest> {
    let room = ["-m", "slots=8,maxmem=2G", "-object", "memory-backend-ram,id=v0,size=512M"];
    let device = ["-device", "virtio-mem-pci,id=vm0,memdev=v0,requested-size=0"];
    let guest = lab.guest().machine(Machine::Q35).memory_mib(ALL >> 20).args(&room).args(&device);
    let mut guest = guest.append("memhp_default_state=online_movable").boot()?;
    load_modules(&mut guest)?;
    Ok(guest)
}

/// Comes and goes: a step for each time that it is called, by the number of the call.
type Step = fn(&mut Guest, u32) -> Result<()>;

/// A DIMM is added; a while later the guest is asked to give it back.
fn dimm(guest: &mut Guest, n: u32) -> Result<()> {
    match n {
        2 => {
            let backend =
                json!({ "qom-type": "memory-backend-ram", "id": "d0", "size": 128 * MIB });
            guest.qmp("object-add", backend)?;
            let device = json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "d0" });
            guest.qmp("device_add", device).map(drop)
        }
        8 => guest.qmp("device_del", json!({ "id": "dimm0" })).map(drop),
        _ => Ok(()),
    }
}

/// Asks the guest of the virtio-mem that is there already to have so much of it.
fn request(guest: &mut Guest, bytes: u64) -> Result<()> {
    let path = "/machine/peripheral/vm0";
    let size = json!({ "path": path, "property": "requested-size", "value": bytes });
    guest.qmp("qom-set", size).map(drop)
}

/// Waits until it has.
fn await_plugged(guest: &mut Guest, bytes: u64) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(30);
    while !devices(guest)?.iter().any(|(id, size)| id == "vm0" && *size == bytes) {
        if Instant::now() > until {
            return Err(failed(format_args!("virtio-mem does not come to {bytes} bytes")));
        }
        sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// virtio-mem is asked to give more, then to take some back.
fn virtio_mem(guest: &mut Guest, n: u32) -> Result<()> {
    match n {
        2 => request(guest, 128 * MIB),
        8 => request(guest, 32 * MIB),
        _ => Ok(()),
    }
}

/// What is not plugged in, of so many bytes that are, is `discarded` to whom QEMU tells: in a snapshot's stream, in a
/// dump, and in the head of a dump that was taken for the registers. To others it is a hole.
fn assert_unplugged(lab: &Lab, guest: &mut Guest, plugged: u64) -> Result<()> {
    for (method, flags, told) in [
        ("live", &[][..], false),
        ("live", &["--registers"], true),
        ("freeze", &["--registers", "--stall-budget", "900ms"], true),
        ("snapshot", &["--stall-budget", "2s"], true),
        ("dump", &["--stall-budget", "20s"], true),
    ] {
        let exhibit = acquire(lab, guest, method, flags)?;
        let states = exhibit.manifest["states"].clone();
        let discarded = states["discarded"].as_u64().unwrap_or_default();
        println!("         {} MiB plugged in, {method} {flags:?}: {states}", plugged >> 20);
        let wanted = if told { 512 * MIB - plugged } else { 0 };
        assert_eq!(discarded, wanted, "{method} {flags:?}: {states}");
        exhibit.remove()?;
    }
    Ok(())
}

/// The memory devices that the guest has, by their ids.
fn devices(guest: &mut Guest) -> Result<Vec<(String, u64)>> {
    let said = guest.qmp("query-memory-devices", json!({}))?;
    let device = |device: &Value| {
        let data = &device["data"];
        (data["id"].as_str().unwrap_or_default().to_owned(), data["size"].as_u64().unwrap_or(0))
    };
    Ok(said.as_array().into_iter().flatten().map(device).collect())
}

/// Takes everything away again, as far as the guest lets go of it.
fn put_back(guest: &mut Guest, name: &str) -> Result<()> {
    if name == "dimm" {
        let until = Instant::now() + Duration::from_secs(30);
        while devices(guest)?.iter().any(|(id, _)| id == "dimm0") {
            if Instant::now() > until {
                return Err(failed("the guest does not let go of the DIMM"));
            }
            let _ = guest.qmp("device_del", json!({ "id": "dimm0" }));
            sleep(Duration::from_millis(500));
        }
        return guest.qmp("object-del", json!({ "id": "d0" })).map(drop);
    }
    request(guest, 0)?;
    await_plugged(guest, 0)
}

const DEVICES: [(&str, Step); 2] = [("dimm", dimm), ("virtio-mem", virtio_mem)];

/// By each method, `repeats` times: a correct image, or losses that are named; a class only for a machine that stayed itself.
fn come_and_go(lab: &Lab, methods: &[(&str, &[&str])], repeats: u32) -> Result<()> {
    let mut guest = with_slots(lab)?;
    let planted = guest.plant_frames(PLANTED, RUN)?;
    if methods.len() > 1 {
        assert_unplugged(lab, &mut guest, 0)?;
        request(&mut guest, 64 * MIB)?;
        await_plugged(&mut guest, 64 * MIB)?;
        assert_unplugged(lab, &mut guest, 64 * MIB)?;
        put_back(&mut guest, "virtio-mem")?;
    }
    for (method, flags) in methods {
        for (name, step) in DEVICES {
            for _ in 0..repeats {
                let what = format!("{name} during {method}");
                let (ended, steps) = during(lab, &mut guest, method, flags, step).doing(&what)?;
                let code = ended.status.code();
                assert!(matches!(code, Some(0 | 3 | 1)), "{what}: {:?}", ended.events.last());
                let (dir, manifest) = ended.exhibit()?;
                println!(
                    "         {what}: ended with {code:?} after {steps} steps, class {}, equal {}, {} {}",
                    manifest["class"],
                    manifest["map_check"]["equal"],
                    manifest["disturbances"],
                    manifest["end_reason"]
                );
                let wanted = if code == Some(0) { 0 } else { 3 };
                assert_eq!(verify(lab, &dir)?, Some(wanted), "{what}: {}", dir.display());
                let equal = manifest["map_check"]["equal"] == true;
                assert!(code != Some(0) || equal, "{what}: complete, but the map has changed");
                let [before, after] =
                    [&manifest["amount"]["devices_before"], &manifest["amount"]["devices_after"]];
                assert!(equal || before != after, "{what}: {before} {after}");
                if code != Some(1) {
                    assert_planted(&mut guest, &Exhibit::open(&dir)?, planted).doing(&what)?;
                }
                fs::remove_dir_all(dir)?;
                put_back(&mut guest, name).doing(&what)?;
            }
        }
    }
    guest.finish()
}

fn devices_come_and_go(lab: &Lab) -> Result<()> {
    let methods: [(&str, &[&str]); 5] = [
        ("live", &["--max-rate", "64M"]),
        ("snapshot", &["--stall-budget", "2s"]),
        ("freeze", &["--stall-budget", "900ms"]),
        ("pmemsave", &["--max-rate", "64M"]),
        ("dump", &["--stall-budget", "20s"]),
    ];
    come_and_go(lab, &methods[..lab.scale(2, 5)], lab.scale(1, 20))
}

fn devices_come_and_go_under_track(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    come_and_go(lab, &[("track", &["--stall-budget", "950ms", "--io-horizon", "3s"])], 20)
}
