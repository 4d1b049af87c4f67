//! `dump`: QEMU's own dump, the guest stopped throughout, and the head of it alone, which has the
//! registers. Each test prints its figures.

use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::tear::Runs;
use lab::{Backing, Doing, Guest, Lab, Result, Ring, Version, failed, here, runner};
use rustix::process::Signal;
use serde_json::{Value, json};

use super::exhibit::{Exhibit, acquire};
use super::faults::share;
use super::run::{
    Family, Running, assert_nothing_passes, await_dead, new_dir, recover, signal, too_slow,
    undo_files, unless_slow,
};
use super::tear::{Subject, memory_mib};

pub(crate) const TESTS: &[runner::Test] = here![
    a_running_guest_is_of_one_instant,
    the_registers_are_those_of_the_instant,
    the_head_alone_has_the_same_registers,
    a_probe_holds_the_map_against_the_dump,
    a_reader_that_hangs_holds_nobody_up,
    sigkill_lets_the_guest_go_on,
];

/// The tool's word for the method.
const METHOD: &str = "dump";

/// The attachment.
const HEAD: &str = "dump-head.bin";

/// Flags that this machine keeps, however busy it is.
const FLAGS: [&str; 2] = ["--stall-budget", "5s"];

/// The record of a whole dump, which must be one that can be true.
fn assert_whole(exhibit: &Exhibit) {
    let manifest = &exhibit.manifest;
    assert_eq!([&manifest["method"], &manifest["class"]], [METHOD, "instantaneous"], "{manifest}");
    let (dump, hold) = (&manifest["dump"], &manifest["hold"]);
    assert_eq!(dump["status"], "completed", "{dump}");
    assert_eq!([&hold["kind"], &hold["lasted"]], [&json!("dump"), &json!(true)], "{hold}");
    let registers = &manifest["registers"];
    assert_eq!([&registers["source"], &registers["file"]], ["dump", HEAD], "{registers}");
    assert_eq!(
        [&registers["of_tau"], &registers["map_difference"]],
        [&json!(true), &Value::Null],
        "{registers}"
    );
    let bytes = |field: &str| manifest["states"][field].as_u64().unwrap_or_default();
    let pages = |field: &str| dump[field].as_u64().unwrap_or_default() << 12;
    assert_eq!(bytes("data"), pages("pages"), "{dump}");
    assert_eq!(bytes("zero"), pages("zero_pages"), "{dump}");
}

/// No image of a counting guest is torn, and those by `live` are.
fn a_running_guest_is_of_one_instant(lab: &Lab) -> Result<()> {
    let cases = [
        (Ring::pair(memory_mib()), Backing::Anonymous, Version::V10_0),
        (Ring::spread(memory_mib()), Backing::Memfd, Version::V7_2),
    ];
    for (ring, backing, version) in cases {
        let mut subject = Subject::boot(lab, ring, backing, version)?;
        let (mut runs, mut audited, mut longest) = (Runs::default(), 0, 0);
        for _ in 0..lab.scale(2, 60) {
            let exhibit = acquire(lab, &subject.guest, METHOD, &FLAGS)?;
            assert_whole(&exhibit);
            let (hold, audit) = (&exhibit.manifest["hold"], &exhibit.manifest["audit"]);
            let of = |field: &str| hold[field].as_u64().unwrap_or_default();
            longest = longest.max(of("ended_ns") - of("began_ns"));
            audited += audit["pages"].as_u64().unwrap_or_default();
            assert_eq!(audit["differing"], 0, "{audit}");
            runs.count(&subject.judge(exhibit)?);
        }
        assert!(audited > 0, "void: no page was audited");
        let controls = subject.controls(lab, lab.scale(1, 6))?;
        let longest = Duration::from_nanos(longest);
        let shown = format!("dump {runs}, {audited} audited, {longest:?} at most; {controls}");
        assert_eq!(runs.torn, 0, "{shown}");
        controls.hold().doing(&shown)?;
        subject.report(&shown)?;
        subject.guest.finish()?;
    }
    Ok(())
}

/// Whether these bytes hold a number as an ELF note does.
fn holds(bytes: &[u8], number: u64) -> bool {
    bytes.windows(8).any(|window| window == number.to_le_bytes())
}

/// RDI in the first of QEMU's own notes (`target/i386/arch_dump.c`, `QEMUCPUState`: version, size, RAX,
/// RBX, RCX, RDX, RSI, RDI).
fn rdi(head: &[u8]) -> Result<u64> {
    let name = head.windows(8).position(|window| window == b"QEMU\0\0\0\0");
    let at = name.ok_or_else(|| failed("no note of QEMU's"))? + 8 + 8 + 5 * 8;
    let bytes = head.get(at..at + 8).ok_or_else(|| failed("a note that is cut"))?;
    Ok(u64::from_le_bytes(bytes.try_into()?))
}

/// The ring's writer keeps the address of the page that it writes in a register (EDI): it is the page of
/// the greatest number in memory, or the one behind it, and no other.
fn the_registers_are_those_of_the_instant(lab: &Lab) -> Result<()> {
    let ring = Ring::spread(64);
    let subject = Subject::boot(lab, ring.clone(), Backing::Anonymous, Version::V10_0)?;
    let mut pages = Vec::new();
    for _ in 0..lab.scale(3, 20) {
        let exhibit = acquire(lab, &subject.guest, METHOD, &FLAGS)?;
        assert_whole(&exhibit);
        exhibit.assert_sums()?;
        lab.tool([Path::new("verify"), &exhibit.dir])?.expect_code(0)?;
        let head = fs::read(exhibit.dir.join(HEAD)).doing(HEAD)?;
        let last = subject.judge(exhibit)?.max;
        // Three words a page, one after the other.
        let page = u32::try_from(last % u64::from(ring.pages * 3) / 3)?;
        let edi = rdi(&head)?;
        let next = if page + 1 == ring.pages { [page + 1, 0] } else { [page + 1; 2] };
        let right = [page, next[0], next[1]].map(|page| ring.gpa(page));
        assert!(right.contains(&edi), "EDI {edi:#x}, memory has page {page}: {right:x?}");
        pages.push(page);
    }
    println!("         the pages that were written: {pages:?}");
    subject.guest.finish()
}

/// Of a stopped guest all ways give the same registers, byte for byte, and QEMU says the same of them.
fn the_head_alone_has_the_same_registers(lab: &Lab) -> Result<()> {
    let versions = [Version::V10_0, Version::V7_2];
    for &version in &versions[..lab.scale(1, 2)] {
        let mut guest = lab.guest().version(version).memory_mib(128).cpus(2).boot()?;
        guest.stop()?;
        let mut heads = Vec::new();
        for (method, flags) in [
            (METHOD, &FLAGS[..]),
            ("live", &["--registers"]),
            ("freeze", &["--registers", "--hold", "stop", "--stall-budget", "5s"]),
        ] {
            let exhibit = acquire(lab, &guest, method, flags)?;
            let registers = &exhibit.manifest["registers"];
            assert_eq!(registers["of_tau"], method != "live", "{method}: {registers}");
            assert_eq!(registers["map_difference"], Value::Null, "{registers}");
            assert_eq!(registers["cpus"], json!([0, 1]), "{registers}");
            lab.tool([Path::new("verify"), &exhibit.dir])?.expect_code(0)?;
            exhibit.assert_sums()?;
            heads.push(fs::read(exhibit.dir.join(HEAD)).doing(HEAD)?);
            exhibit.remove()?;
            assert_eq!(guest.status()?, "paused", "{method}");
        }
        assert!(heads.iter().all(|head| *head == heads[0]), "{version:?}: heads differ");
        let text = guest.human("info registers -a")?;
        let mut seen = 0;
        for word in text.split("CR3=").skip(1).filter_map(|rest| rest.get(..16)) {
            let cr3 = u64::from_str_radix(word, 16).doing(word)?;
            assert!(holds(&heads[0], cr3), "no CR3 {cr3:#x}");
            seen += 1;
        }
        assert_eq!(seen, 2, "{text}");
        println!("         {version:?}: {} bytes of head, by three ways the same", heads[0].len());
        guest.cont()?;
        // A running guest: the registers are of another time, and the record says so.
        let exhibit = acquire(lab, &guest, "live", &["--registers"])?;
        let registers = &exhibit.manifest["registers"];
        assert_eq!(registers["of_tau"], false, "{registers}");
        let stood = ["t1_ns", "t0_ns"].map(|at| registers["stood"][at].as_u64().unwrap_or(0));
        println!(
            "         running: stood some time of {:?}",
            Duration::from_nanos(stood[0] - stood[1])
        );
        guest.finish()?;
    }
    Ok(())
}

/// `plan --probe` finds the same memory by QEMU's dump, on both sides of the PCI hole, and leaves the
/// guest running; what it cannot know without it does not say.
fn a_probe_holds_the_map_against_the_dump(lab: &Lab) -> Result<()> {
    let machines = [lab::Machine::Q35, lab::Machine::Pc];
    for &machine in &machines[..lab.scale(1, 2)] {
        let guest = lab.guest().machine(machine).both_sides_of_the_hole();
        let mut guest = guest.cpus(2).boot()?;
        let vm = guest.pid().to_string();
        let asked = |flags: &[&str]| -> Result<Value> {
            let run = lab.tool([&["plan", &vm, "--json", "--method", "live"], flags].concat())?;
            Ok(serde_json::from_str(&run.expect_code(0)?.stdout)?)
        };
        assert_eq!(asked(&[])?["probe"], Value::Null);
        let probe = asked(&["--probe"])?["probe"].clone();
        assert_eq!(
            [&probe["map_difference"], &probe["cpus"]],
            [&Value::Null, &json!([0, 1])],
            "{probe}"
        );
        println!("         {machine:?}: {probe}");
        guest.assert_as_found()?;
        assert_eq!(undo_files(&guest), [""; 0]);
        guest.finish()?;
    }
    Ok(())
}

/// A guest whose dump takes a while.
fn large(lab: &Lab) -> Result<Guest> {
    let mut guest = lab.guest().memory_mib(1024).boot()?;
    guest.plant_noise(768, 7)?;
    Ok(guest)
}

fn start(lab: &Lab, guest: &Guest, out: &Path) -> Result<Running> {
    let mut command = lab.tool_command(["acquire", "--method", METHOD, "--json"])?;
    command.args(["--stall-budget", BUDGET, "--file-digest", "no", "-o"]).arg(out);
    command.arg("--").arg(guest.pid().to_string());
    Running::start(command)
}

const BUDGET: &str = "2500ms";

/// The budget, and the guest's way back to its work.
const IN_TIME: Duration = Duration::from_millis(2500 + 600);

/// So much later a machine that stalls can make it, but not each time.
const STALL: Duration = Duration::from_secs(3);

/// Waits until QEMU dumps.
fn await_dump(guest: &mut Guest, run: &mut Running) -> Result<bool> {
    while run.runs()? {
        if is_dumped(guest)? {
            return Ok(true);
        }
        sleep(Duration::from_millis(1));
    }
    Ok(false)
}

fn is_dumped(guest: &mut Guest) -> Result<bool> {
    Ok(guest.qmp("query-dump", json!({}))?["status"] == "active")
}

/// Waits until the guest runs again, `within` at most: how long that took.
fn goes_on(guest: &mut Guest, within: Duration) -> Result<Duration> {
    let began = Instant::now();
    loop {
        // Asked before the look: it may be the lab that is late.
        let late = began.elapsed() > within;
        let status = guest.status()?;
        if status == "running" && !is_dumped(guest)? {
            return Ok(began.elapsed());
        }
        if late {
            return Err(failed(format_args!("after {within:?} the guest is {status}")));
        }
        sleep(Duration::from_millis(2));
    }
}

/// Whoever reads, and whoever could break the stream: while one of them hangs, the guest goes on within
/// the budget, and no exhibit passes for a whole one.
fn a_reader_that_hangs_holds_nobody_up(lab: &Lab) -> Result<()> {
    let (mut guest, family) = (large(lab)?, Family::of(lab)?);
    let victims = ["@reader", "acquire", "@guardian"];
    for victim in victims.into_iter().take(lab.scale(2, 3)) {
        unless_slow(|| hang(lab, &mut guest, &family, victim))?;
    }
    guest.finish()
}

/// Stops the victim in a dump, until the guest goes on.
fn hang(lab: &Lab, guest: &mut Guest, family: &Family, victim: &str) -> Result<()> {
    let out = new_dir(lab, "hangs")?;
    let mut run = start(lab, guest, &out)?;
    let seen = await_dump(guest, &mut run)?;
    let pid = if victim == "acquire" { Some(run.pid()) } else { family.with(victim) };
    let stopped = pid.filter(|pid| seen && signal(*pid, Signal::STOP).is_ok());
    let hangs = stopped.is_some() && is_dumped(guest)?;
    let took = if hangs { Some(goes_on(guest, IN_TIME + STALL)?) } else { None };
    // Gone is as well.
    let _ = stopped.map(|pid| signal(pid, Signal::CONT));
    let code = run.end()?.status.code();
    family.await_gone()?;
    let left = assert_nothing_passes(lab, &out)?;
    println!("         {victim} stopped: the guest went on after {took:?}; exit {code:?}");
    let cut = victim == "@reader" || code != Some(0);
    assert!(!hangs || left.partial == usize::from(cut), "{left:?}");
    recover(lab, guest)?;
    guest.assert_as_found().doing(victim)?;
    fs::remove_dir_all(&out)?;
    match took {
        Some(took) if took <= IN_TIME => Ok(()),
        Some(took) => Err(too_slow(format_args!("{victim} stopped: {took:?}"))),
        None => Err(too_slow(format_args!("the dump was over before {victim} was stopped"))),
    }
}

/// Whoever is killed, the guest goes on within a second, and nothing is left.
fn sigkill_lets_the_guest_go_on(lab: &Lab) -> Result<()> {
    let (mut guest, family, moments) = (large(lab)?, Family::of(lab)?, lab.scale(1, 100));
    for victims in [&["acquire"][..], &["@guardian"], &["@reader"], &["acquire", "@guardian"]] {
        let (mut midway, mut late, mut longest) = (0, 0, Duration::ZERO);
        for n in 0..moments * 6 {
            if midway >= moments {
                break;
            }
            let out = new_dir(lab, "killed")?;
            let mut run = start(lab, &guest, &out)?;
            await_dump(&mut guest, &mut run)?;
            sleep(Duration::from_millis(300).mul_f64(share(n)));
            let dumped = is_dumped(&mut guest)?;
            let pids = victims.iter().filter_map(|victim| match *victim {
                "acquire" => Some(run.pid()),
                role => family.with(role),
            });
            let pids: Vec<u32> = pids.collect();
            for pid in &pids {
                // Gone is as well.
                let _ = signal(*pid, Signal::KILL);
            }
            // Without its guardian a dump goes on: capture keeps the deadline as well.
            let alone = *victims == ["@guardian"];
            let within = if alone { IN_TIME } else { Duration::from_secs(1) };
            let took = goes_on(&mut guest, within + STALL)?;
            longest = longest.max(took);
            await_dead(&pids)?;
            run.end()?;
            family.await_gone()?;
            midway += u32::from(dumped && took <= within);
            late += u32::from(took > within);
            recover(lab, &guest)?;
            assert_eq!(undo_files(&guest), [""; 0]);
            assert_nothing_passes(lab, &out)?;
            guest.assert_as_found().doing(format_args!("{victims:?} at {n}"))?;
            fs::remove_dir_all(&out)?;
        }
        assert!(late <= 1 + moments / 20, "{victims:?}: {late} times late, {longest:?} at most");
        assert_eq!(midway, moments, "void: too few of {victims:?} were hit while QEMU dumped");
        println!("         {victims:?}: {moments} moments, the guest went on within {longest:?}");
    }
    guest.finish()
}
