//! `live` on real guests: the image is what QEMU itself says, page by page where it belongs, in
//! every format; the record says truly what moved meanwhile.

use std::collections::BTreeSet;
use std::time::Duration;

use lab::{Backing, Doing, Guest, Lab, Machine, Range, Result, Version, failed, file_filler};
use lab::{here, outer, pattern};
use serde_json::json;

use super::exhibit::{Exhibit, FORMATS, Image, STORES, take};
use super::footprint::settle;

pub(crate) const TESTS: &[lab::runner::Test] = here![
    a_stopped_guest_equals_pmemsave,
    pages_lie_at_their_frame_number_in_every_format,
    a_busy_guest_is_smeared_and_the_record_names_the_pages,
    an_idle_guest_is_nearly_all_stable,
    the_run_state_stays_as_found,
];

pub(crate) const OUTER: &[lab::runner::Test] =
    outer![a_stopped_kvm_guest_equals_pmemsave, a_stopped_guest_on_hugepages_equals_pmemsave];

/// One kind of guest, and how it is acquired.
#[derive(Debug, Clone, Copy)]
struct Case {
    machine: Machine,
    both_sides: bool,
    backing: Backing,
    version: Version,
    memory_mib: u64,
    format: &'static str,
    store: &'static str,
}

/// {pc, q35} x {one side, both sides of the hole} x `backings` x both QEMUs. All of them, or two
/// for each backing, which are the pairwise choice: with four backings, any two settings of any
/// two of these occur together.
fn cases(all: bool, memory_mib: u64, backings: &[Backing], formats: &[&'static str]) -> Vec<Case> {
    let mut cases = Vec::new();
    for (number, backing) in backings.iter().enumerate() {
        for bits in 0..8 {
            let [machine, side, version] = [0, 1, 2].map(|bit| bits >> bit & 1);
            let pairwise = side == machine ^ (number & 1) && version == machine ^ (number >> 1 & 1);
            if !all && !pairwise {
                continue;
            }
            cases.push(Case {
                machine: [Machine::Pc, Machine::Q35][machine],
                both_sides: side == 1,
                backing: *backing,
                version: [Version::V7_2, Version::V10_0][version],
                memory_mib,
                format: formats[cases.len() % formats.len()],
                store: STORES[cases.len() / formats.len() % STORES.len()],
            });
        }
    }
    cases
}

impl Case {
    fn boot(&self, lab: &Lab) -> Result<Guest> {
        let guest = lab.guest().machine(self.machine).backing(self.backing).version(self.version);
        // Linux would set 64 MiB aside to bounce DMA with, of the little that lies below.
        let guest = guest.memory_mib(self.memory_mib).append("swiotlb=noforce");
        let guest = if self.both_sides { guest.both_sides_of_the_hole() } else { guest };
        guest.boot()
    }

    fn check(&self, lab: &Lab) -> Result<()> {
        let mut guest = self.boot(lab)?;
        guest.stop()?;
        // A raw image is 4 GiB of holes: what its digest is, another test looks at.
        let digest = if self.format == "raw" { "no" } else { "yes" };
        let flags = ["--format", self.format, "--store", self.store, "--file-digest", digest];
        let exhibit = take(lab, &guest, &flags)?;
        let image = exhibit.image()?;
        assert_covers(&mut guest, &image, self.format)?;
        assert_equals_pmemsave(&mut guest, &image)?;
        if self.backing == Backing::PrivateFile {
            assert_filler(&mut guest, &image)?;
        }
        assert_eq!(exhibit.stable().1, 0, "pages of a stopped guest changed");
        exhibit.remove()?;
        guest.finish()
    }
}

fn check_all(lab: &Lab, cases: &[Case]) -> Result<()> {
    cases.iter().try_for_each(|case| case.check(lab).doing(format_args!("{case:?}")))
}

fn a_stopped_guest_equals_pmemsave(lab: &Lab) -> Result<()> {
    let kinds = [Backing::Anonymous, Backing::Memfd, Backing::PrivateFile, Backing::Numa2];
    check_all(lab, &cases(lab.full, MEMORY_MIB, &kinds, &FORMATS))
}

/// A raw image is 4 GiB long, and hashing it takes minutes in the outer guest: so ELF and LiME.
const OUTER_FORMATS: [&str; 2] = ["elf", "lime"];
/// Memory of a guest. Linux does not come up with half of 128 MiB below 4 GiB.
const MEMORY_MIB: u64 = 192;

/// One case in the short form: each takes half a minute there.
fn check_outer(lab: &Lab, kinds: &[Backing]) -> Result<()> {
    // The first lies on one side of the hole.
    let cases = cases(lab.full, lab.scale(128, MEMORY_MIB), kinds, &OUTER_FORMATS);
    check_all(lab, &cases[..lab.scale(1, cases.len())])
}

fn a_stopped_kvm_guest_equals_pmemsave(lab: &Lab) -> Result<()> {
    check_outer(lab, &[Backing::Anonymous])
}

fn a_stopped_guest_on_hugepages_equals_pmemsave(lab: &Lab) -> Result<()> {
    lab::outer::reserve_hugepages(MEMORY_MIB / 2)?;
    let kinds = [Backing::HugetlbPrivate, Backing::HugetlbShared];
    check_outer(lab, &kinds)?;
    lab::outer::reserve_hugepages(0)
}

/// What QEMU's own dump holds too: the lines of kind `ram` and `rom`.
fn imaged(guest: &mut Guest) -> Result<Vec<Range>> {
    let is_imaged = |range: &Range| matches!(&*range.kind, "ram" | "rom");
    Ok(guest.flat_view()?.into_iter().filter(is_imaged).collect())
}

/// The image has as many bytes as those lines; `raw` has all up to the end of the last.
fn assert_covers(guest: &mut Guest, image: &Image, format: &str) -> Result<()> {
    let lines = imaged(guest)?;
    let sum = lines.iter().map(|line| line.len).sum();
    let end = lines.iter().map(Range::end).max().unwrap_or_default();
    assert_eq!(image.len(), if format == "raw" { end } else { sum }, "{format}");
    Ok(())
}

pub(super) fn assert_equals_pmemsave(guest: &mut Guest, image: &Image) -> Result<()> {
    for line in imaged(guest)? {
        let theirs = guest.pmemsave(line.gpa, line.len)?;
        let ours = image.read(line.gpa, line.len)?;
        if let Some(at) = (0..theirs.len()).find(|&at| ours.get(at) != theirs.get(at)) {
            return Err(failed(format_args!("differs from pmemsave at {at:#x} of {line:x?}")));
        }
    }
    Ok(())
}

/// The file's content shows where the guest wrote nothing: else the case says nothing of it. Below
/// the hole a page's number in the file is its frame number.
fn assert_filler(guest: &mut Guest, image: &Image) -> Result<()> {
    let mut filler = 0;
    for line in guest.ram()? {
        let bytes = image.read(line.gpa, line.len)?;
        let pages = (line.gpa / 4096..).zip(bytes.chunks_exact(pattern::PAGE));
        filler += pages.filter(|(number, page)| *page == file_filler(*number)).count();
    }
    assert!(filler > 1000, "only {filler} pages of the file show");
    Ok(())
}

fn pages_lie_at_their_frame_number_in_every_format(lab: &Lab) -> Result<()> {
    let run = 0x5eed;
    let guest = lab.guest().machine(Machine::Q35).memory_mib(384);
    let mut guest = guest.both_sides_of_the_hole().boot()?;
    let planted = guest.plant_frames(224, run)?; // more than lies on either side of the hole
    for (format, store) in FORMATS.into_iter().zip(["ram", "disk", "ram"]) {
        // Of all the holes of a raw image a digest takes its time.
        let digest = if format == "raw" { lab.scale("no", "yes") } else { "yes" };
        let flags = ["--format", format, "--store", store, "--file-digest", digest];
        let exhibit = take(lab, &guest, &flags)?;
        let found = numbered_frames(&mut guest, &exhibit.image()?, run)?;
        let above = found.iter().filter(|&&pfn| pfn >= 1 << 20).count();
        assert_eq!(u64::try_from(found.len())?, planted, "{format}");
        assert!(above > 1000 && found.len() - above > 1000, "{format}: {above} above the hole");
        if format == "raw" && lab.full {
            exhibit.assert_raw_sum()?;
        }
        exhibit.remove()?;
    }
    guest.finish()
}

/// Frames whose page in the image is just what was planted there. A page that carries a number
/// and lies elsewhere, or is not whole, is a failure.
pub(super) fn numbered_frames(guest: &mut Guest, image: &Image, run: u64) -> Result<BTreeSet<u64>> {
    let (mut found, mut expected) = (BTreeSet::new(), [0; pattern::PAGE]);
    for line in guest.ram()? {
        let bytes = image.read(line.gpa, line.len)?;
        for (pfn, page) in (line.gpa / 4096..).zip(bytes.chunks(pattern::PAGE)) {
            if !page.starts_with(&pattern::MAGIC) || page[8..16] != run.to_le_bytes() {
                continue;
            }
            pattern::frame_page(run, pfn, &mut expected);
            if page != expected {
                return Err(failed(format_args!("frame {pfn:#x} holds another's page")));
            }
            found.insert(pfn);
        }
    }
    Ok(found)
}

/// Frames that carry their own number, whatever else is in them.
fn marked_frames(guest: &mut Guest, image: &Image) -> Result<BTreeSet<u64>> {
    let mut found = BTreeSet::new();
    for line in guest.ram()? {
        let bytes = image.read(line.gpa, line.len)?;
        let pages = (line.gpa / 4096..).zip(bytes.chunks_exact(pattern::PAGE));
        let marked = pages.filter(|(pfn, page)| {
            page.starts_with(&pattern::MAGIC) && page[16..24] == pfn.to_le_bytes()
        });
        found.extend(marked.map(|(pfn, _)| pfn));
    }
    Ok(found)
}

fn a_busy_guest_is_smeared_and_the_record_names_the_pages(lab: &Lab) -> Result<()> {
    let (mib, pages) = (16, 16 << 8);
    let mut guest = lab.guest().boot()?;
    guest.plant(&format!("dirty {mib} {}", 10 * pages), Duration::from_secs(60))?;
    // Seconds for each pass: the program comes round at least twenty times between the reads of a page.
    let exhibit = take(lab, &guest, &["--max-rate", "32M"])?;
    let dirtied = marked_frames(&mut guest, &exhibit.image()?)?;
    let changed = exhibit.changed_frames()?;
    assert_eq!(u64::try_from(dirtied.len())?, pages);
    let missed: Vec<_> = dirtied.difference(&changed).take(5).collect();
    assert!(missed.is_empty(), "written all the time, and not among the changed: {missed:x?}");
    assert_eq!(exhibit.stable().1, u64::try_from(changed.len())?);
    assert!(share(&exhibit) < 1.0);
    guest.finish()
}

fn an_idle_guest_is_nearly_all_stable(lab: &Lab) -> Result<()> {
    let mut guest = lab.guest().boot()?;
    guest.plant_frames(64, 7)?;
    let exhibit = take(lab, &guest, &[])?;
    let (planted, changed) =
        (numbered_frames(&mut guest, &exhibit.image()?, 7)?, exhibit.changed_frames()?);
    assert!(planted.is_disjoint(&changed), "pages that nobody wrote are among the changed");
    assert!(share(&exhibit) > 0.99, "stable share of an idle guest: {}", share(&exhibit));
    guest.finish()
}

/// The stable share that the manifest claims, which must follow from its own figures.
fn share(exhibit: &Exhibit) -> f64 {
    let claimed = exhibit.manifest["stable"]["share"].as_f64().unwrap_or(f64::NAN);
    let [equal, changed] = <[u64; 2]>::from(exhibit.stable())
        .map(|pages| u32::try_from(pages).map_or(f64::NAN, f64::from));
    assert!((claimed - equal / (equal + changed)).abs() < 1e-6, "{claimed}, {equal}, {changed}");
    claimed
}

fn the_run_state_stays_as_found(lab: &Lab) -> Result<()> {
    for state in ["running", "paused", "prelaunch"] {
        let guest = lab.guest().memory_mib(64);
        let mut guest = if state == "prelaunch" { guest.paused() } else { guest.blank() }.boot()?;
        if state != "prelaunch" {
            settle(&mut guest)?;
        }
        if state == "paused" {
            guest.stop()?;
        }
        let events = guest.events()?.len();
        let exhibit = take(lab, &guest, &[])?;
        let vm = &exhibit.manifest["vm"];
        assert_eq!([&vm["run_state_before"], &vm["run_state_after"]], [&json!(state); 2]);
        let new = guest.events()?.split_off(events);
        assert!(new.iter().all(|e| !matches!(&**e, "STOP" | "RESUME")), "{state}: {new:?}");
        guest.finish()?;
    }
    Ok(())
}
