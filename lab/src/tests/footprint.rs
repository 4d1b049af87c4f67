//! What an acquisition costs the host in memory, and each time a reader that costs more: a test
//! that could not fail would say nothing.

use std::fs;
use std::io::IoSliceMut;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use lab::{Backing, Doing, Guest, Lab, Result, failed, here, outer, proc, skipped};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use rustix::thread::disable_transparent_huge_pages;

use super::exhibit::{STORES, take};
use super::run::{self, Running, new_dir};

pub(crate) const TESTS: &[lab::runner::Test] = here![
    an_untouched_memfd_guest_stays_untouched,
    an_untouched_anonymous_guest_stays_untouched,
    merged_pages_stay_merged,
    a_guest_costs_what_it_has,
];

pub(crate) const OUTER: &[lab::runner::Test] = outer![merged_pages_stay_merged_on_a_kvm_host];

/// Host memory behind a guest, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Held {
    rss: u64,
    page_tables: u64,
    memfd: u64,
}

impl Held {
    fn of(guest: &Guest) -> Result<Self> {
        Ok(Self {
            rss: guest.rss()?,
            page_tables: proc::status(guest.pid(), "VmPTE")? * 1024,
            memfd: memfd_blocks(guest.pid())?,
        })
    }
}

/// Bytes allocated for the process's memfds.
pub(super) fn memfd_blocks(pid: u32) -> Result<u64> {
    let mut bytes = 0;
    for fd in fs::read_dir(format!("/proc/{pid}/fd"))?.flatten() {
        let link = fs::read_link(fd.path()).unwrap_or_default();
        if link.to_string_lossy().starts_with("/memfd:") {
            bytes += fs::metadata(fd.path())?.blocks() * 512;
        }
    }
    Ok(bytes)
}

/// The rise from `before` to `after` in percent of `before`.
pub(super) fn rise(before: u64, after: u64) -> u64 {
    (after.saturating_sub(before) * 100).div_ceil(before.max(1))
}

/// Has QEMU answer once what the tool asks: its heap grows by some 400 KiB then, and only then, which is
/// one percent of a guest that has touched next to nothing. Guest memory has no part in that.
pub(super) fn ask_once(lab: &Lab, guest: &Guest) -> Result<()> {
    let before = Held::of(guest)?;
    let vm = guest.pid().to_string();
    lab.tool(["plan", &vm, "--method", "live"])?.expect_code(0)?;
    let after = Held::of(guest)?;
    assert!(after.rss < before.rss + (1 << 20), "{before:?} {after:?}");
    assert!(after.page_tables <= before.page_tables + (64 << 10), "{before:?} {after:?}");
    assert_eq!(after.memfd, before.memfd, "bytes of the guest's memory");
    Ok(())
}

/// Reads all RAM through the process's mapping, as a careless tool would.
fn read_carelessly(guest: &mut Guest) -> Result<()> {
    for range in guest.ram()? {
        guest.read_own(range.gpa, range.len)?;
    }
    Ok(())
}

/// While it lives, this process and those that it starts get pages of 4 KiB only. Else khugepaged
/// joins pages at its leisure, fills the gaps between them and tears merged ones apart: what it
/// costs the host would look like the acquisition's.
pub(super) struct SmallPages;

impl SmallPages {
    pub(super) fn only() -> Result<Self> {
        disable_transparent_huge_pages(true)?;
        Ok(Self)
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        let _ = disable_transparent_huge_pages(false);
    }
}

/// Waits until a blank guest's firmware has done its work: for a second it touches no more memory
/// and leaves the map as it is.
pub(super) fn settle(guest: &mut Guest) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(60);
    while Instant::now() < until {
        let before = (guest.rss()?, guest.flat_view()?);
        std::thread::sleep(Duration::from_secs(1));
        if (guest.rss()?, guest.flat_view()?) == before {
            return Ok(());
        }
    }
    Err(failed("the firmware does not come to rest"))
}

fn an_untouched_memfd_guest_stays_untouched(lab: &Lab) -> Result<()> {
    let _small = SmallPages::only()?;
    let mut guest = lab.guest().blank().memory_mib(512).backing(Backing::Memfd).boot()?;
    settle(&mut guest)?;
    ask_once(lab, &guest)?;
    let before = Held::of(&guest)?;
    for store in STORES {
        take(lab, &guest, &["--store", store])?;
        let after = Held::of(&guest)?;
        assert!(rise(before.rss, after.rss) <= 1, "{store}: {before:?} {after:?}");
        assert!(rise(before.memfd, after.memfd) <= 1, "{store}: {before:?} {after:?}");
    }
    read_carelessly(&mut guest)?;
    let control = Held::of(&guest)?;
    assert!(control.rss > before.rss + (400 << 20) && control.memfd > 500 << 20, "{control:?}");
    guest.finish()
}

fn an_untouched_anonymous_guest_stays_untouched(lab: &Lab) -> Result<()> {
    let _small = SmallPages::only()?;
    let mut guest = lab.guest().blank().memory_mib(512).boot()?;
    settle(&mut guest)?;
    ask_once(lab, &guest)?;
    let before = Held::of(&guest)?;
    for store in STORES {
        take(lab, &guest, &["--store", store])?;
        let after = Held::of(&guest)?;
        assert!(rise(before.rss, after.rss) <= 1, "{store}: {before:?} {after:?}");
        assert!(after.page_tables <= before.page_tables + (64 << 10), "{before:?} {after:?}");
    }
    read_carelessly(&mut guest)?;
    let control = Held::of(&guest)?;
    assert!(control.page_tables > before.page_tables + (512 << 10), "{before:?} {control:?}");
    guest.finish()
}

/// What an image cost: the least time, the most memory, the disk space of the exhibit.
#[derive(Debug, Clone, Copy)]
struct Cost {
    took: Duration,
    memory: u64,
    disk: u64,
}

impl Cost {
    /// The least time of some runs, so that a busy moment does not count.
    fn of(lab: &Lab, guest: &Guest, store: &str) -> Result<Self> {
        let mut all = Vec::new();
        for _ in 0..lab.scale(3, 5) {
            let out = new_dir(lab, "cost")?;
            let flags = ["--store", store, "--file-digest", "no"];
            let run = Running::start(run::acquire(lab, &guest.pid().to_string(), &out, &flags)?)?;
            let ended = run.end()?.expect(0)?;
            let (dir, _) = ended.exhibit()?;
            let mut disk = 0;
            for file in fs::read_dir(dir)?.flatten() {
                disk += file.metadata()?.blocks() * 512;
            }
            all.push(Self { took: ended.took, memory: ended.peak_kib * 1024, disk });
            fs::remove_dir_all(out)?;
        }
        let took = all.iter().map(|cost| cost.took).min();
        let most = |what: fn(&Cost) -> u64| all.iter().map(what).max().unwrap_or_default();
        Ok(Self {
            took: took.unwrap_or_default(),
            memory: most(|cost| cost.memory),
            disk: most(|cost| cost.disk),
        })
    }
}

/// Two guests that have touched the same little, of which one could have 32 times as much: memory and disk space are
/// within twice. The time is not, and is shown: docs/measurements.md.
fn a_guest_costs_what_it_has(lab: &Lab) -> Result<()> {
    let _small = SmallPages::only()?;
    for &backing in &[Backing::Anonymous, Backing::Memfd][..lab.scale(1, 2)] {
        let mut guests = Vec::new();
        for gib in [0, 16] {
            let guest = lab.guest().blank().backing(backing).memory_mib((gib << 10).max(512));
            let mut guest = guest.boot()?;
            settle(&mut guest)?;
            guests.push(guest);
        }
        for store in &STORES[..lab.scale(1, 2)] {
            let costs = guests.iter().map(|guest| Cost::of(lab, guest, store));
            let [small, large] = costs.collect::<Result<Vec<_>>>()?[..] else { continue };
            println!("         {backing:?}, {store}: 512 MiB {small:?}, 16 GiB {large:?}");
            let twice = |small: u64, large: u64| large <= 2 * small;
            assert!(twice(small.memory, large.memory), "{backing:?}, {store}: memory");
            assert!(twice(small.disk, large.disk), "{backing:?}, {store}: disk space");
        }
        for guest in guests {
            guest.finish()?;
        }
    }
    Ok(())
}

/// The host's KSM, turned on for a test and given back as it was: off, and with nothing merged.
#[derive(Debug)]
struct Ksm {
    found: Vec<(&'static str, String)>,
}

const KSM: &str = "/sys/kernel/mm/ksm";

impl Ksm {
    /// Starts merging at full speed. A machine whose KSM is in use is left alone.
    fn start() -> Result<Self> {
        if !fs::exists(KSM)? {
            return Err(skipped("this kernel has no KSM"));
        }
        if Self::figure("run")? != 0 || Self::figure("pages_shared")? != 0 {
            return Err(skipped("this machine uses KSM: it is left alone"));
        }
        let read = |name| Ok((name, fs::read_to_string(format!("{KSM}/{name}"))?));
        let ksm = Self {
            found: ["pages_to_scan", "sleep_millisecs"]
                .map(read)
                .into_iter()
                .collect::<Result<_>>()?,
        };
        for (name, value) in [("pages_to_scan", "20000"), ("sleep_millisecs", "10"), ("run", "1")] {
            Self::set(name, value).map_err(|e| skipped(format_args!("KSM cannot be set: {e}")))?;
        }
        Ok(ksm)
    }

    fn figure(name: &str) -> Result<u64> {
        let text = fs::read_to_string(format!("{KSM}/{name}")).doing(name)?;
        Ok(text.trim().parse()?)
    }

    fn set(name: &str, value: &str) -> Result<()> {
        fs::write(format!("{KSM}/{name}"), value).doing(format_args!("setting {KSM}/{name}"))
    }

    /// Waits until `wanted` pages of the guest's process are merged, and no more are found.
    fn wait(guest: &Guest, wanted: u64) -> Result<()> {
        let until = Instant::now() + Duration::from_secs(300);
        let file = format!("/proc/{}/ksm_merging_pages", guest.pid());
        let (mut merged, mut since) = (0, Self::figure("full_scans")?);
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(200));
            let now: u64 = fs::read_to_string(&file)?.trim().parse()?;
            let scans = Self::figure("full_scans")?;
            if now != merged {
                (merged, since) = (now, scans);
            } else if merged >= wanted && scans >= since + 2 {
                return Ok(());
            }
        }
        Err(failed(format_args!("KSM merged {merged} pages of {wanted}")))
    }
}

impl Drop for Ksm {
    fn drop(&mut self) {
        // 2 takes the merging back, 0 is what was found.
        for value in ["2", "0"] {
            let _ = Self::set("run", value);
        }
        for (name, value) in &self.found {
            let _ = Self::set(name, value);
        }
    }
}

/// The same so many MiB are in the guest three times.
const MERGED_MIB: u64 = 32;

/// A stopped guest whose equal pages are merged.
fn merged_guest(lab: &Lab) -> Result<Guest> {
    let mut guest = lab.guest().memory_mib(192).boot()?;
    for _ in 0..3 {
        guest.plant_noise(MERGED_MIB, 7)?;
    }
    guest.stop()?;
    Ksm::wait(&guest, 3 * (MERGED_MIB << 8) * 99 / 100)?;
    Ok(guest)
}

/// The process's share of the host's anonymous memory in KiB: a page merged from three counts
/// once. (The kernel's count of merged pages follows only when ksmd comes by again.)
fn pss(guest: &Guest) -> Result<u64> {
    let file = format!("/proc/{}/smaps_rollup", guest.pid());
    proc::number_in(Path::new(&file), "Pss_Anon")
}

/// What it costs the host in KiB when the copies in [`merged_guest`] are torn apart.
const TORN_KIB: u64 = MERGED_MIB << 11;

fn merged_pages_stay_merged(lab: &Lab) -> Result<()> {
    let (ksm, _small) = (Ksm::start()?, SmallPages::only()?);
    let mut guest = merged_guest(lab)?;
    // With ksmd at work, then with ksmd asleep, so that it cannot merge again what was torn.
    for (run, store) in ["1", "0"].into_iter().zip(STORES) {
        Ksm::set("run", run)?;
        let before = pss(&guest)?;
        take(lab, &guest, &["--store", store])?;
        let after = pss(&guest)?;
        // Guests of others may share pages with it too, and end meanwhile.
        assert!(after < before + TORN_KIB / 8, "ksmd {run}: {before} KiB, then {after}");
    }
    let before = pss(&guest)?;
    read_by_process_vm(&mut guest)?;
    let control = pss(&guest)?;
    assert!(control > before + TORN_KIB / 8 * 7, "{before} KiB, then {control}");
    drop(ksm);
    guest.finish()
}

/// Debian's 6.1 does not tear pages apart for a reader, newer kernels do: so the control is KSM's
/// own way to take a merge back.
fn merged_pages_stay_merged_on_a_kvm_host(lab: &Lab) -> Result<()> {
    lab.only_when_full()?;
    let (ksm, _small) = (Ksm::start()?, SmallPages::only()?);
    let guest = merged_guest(lab)?;
    Ksm::set("run", "0")?;
    let figures = || Ok::<_, lab::Failure>((pss(&guest)?, proc::meminfo_kib("MemAvailable")?));
    let before = figures()?;
    for store in STORES {
        take(lab, &guest, &["--store", store])?.remove()?;
        let after = figures()?;
        assert!(rise(before.0, after.0) <= 1, "{store}: {before:?} KiB, then {after:?}");
        // The rest of the host takes and gives some 16 MiB.
        assert!(after.1 + TORN_KIB / 2 > before.1, "{store}: {before:?} KiB, then {after:?}");
    }
    let before = figures()?;
    drop(ksm);
    let control = figures()?;
    assert!(control.0 > before.0 + TORN_KIB / 8 * 7, "{before:?} KiB, then {control:?}");
    assert!(control.1 + TORN_KIB / 2 < before.1, "{before:?} KiB, then {control:?}");
    guest.finish()
}

/// Reads all RAM as fast as it goes, which tears merged pages apart.
fn read_by_process_vm(guest: &mut Guest) -> Result<()> {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(guest.pid())?);
    for range in guest.ram()? {
        let mut bytes = vec![0; usize::try_from(range.len)?];
        let base = usize::try_from(guest.hva(range.gpa)?)?;
        let there = RemoteIoVec { base, len: bytes.len() };
        process_vm_readv(pid, &mut [IoSliceMut::new(&mut bytes)], &[there])?;
    }
    Ok(())
}
