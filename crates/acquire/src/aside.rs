//! Asides: memory that is not in the image and has files of its own. RAM that lies under something else,
//! flash (UEFI's variables), on request NVDIMMs.
//!
//! They are read from outside, as all memory is, behind the last read of the image: after a hold the guest runs
//! again by then, and what is read is not of the image's instant. The record says when each was read.

use crate::guard::Guarded;
use crate::log::Log;
use crate::look::Looked;
use crate::plan::{Part, SwapWish, Wish};
use crate::stop::Stop;
use crate::{Request, told};
use evidence::block::BLOCK_LEN;
use evidence::digest::{Digest, Hasher};
use evidence::manifest::{Decided, FileRecord, Taken};
use evidence::map::Mapping;
use evidence::record::Span;
use evidence::state::page_count;
use evidence::{GuestRange, Kind, PageState, Region};
use host::guest_memory::Place;
use host::source::Source as _;
use host::{GuestMemory, Process};
use qemu::GuestView;
use qemu::graph::Hidden;
use qemu::view::ViewRegion;
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

/// More files than any machine gives cause for: what is beyond is named and left out.
const MAX_FILES: usize = 256;

/// More pieces of hidden memory than any machine has: of what is beyond only the number is told.
const MAX_HIDDEN: usize = 4096;

/// The longest that one of the pieces may be that are taken unasked, in bytes: what is hidden of an ordinary machine is a few
/// MiB, and flash no more than 64.
const MAX_UNASKED: u64 = 1 << 30;

/// The kind of memory that lies under something else, as the record has it.
const HIDDEN: &str = "hidden";

/// Why hidden memory is not read of which nothing is lost by that.
const SEEN: &str = "the guest sees the same bytes at";

/// Memory that may get a file of its own, and what is done with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aside {
    /// What stands in the record; the file's name in it is the one that it will have.
    pub decided: Decided,
    /// Where it lies in QEMU's process; absent of what is left out.
    pub place: Option<Place>,
}

/// What is done with each region of the map, and with what is hidden: in address order of either.
pub fn decide(view: &GuestView, hidden: &Result<Vec<Hidden>, String>, wish: &Wish) -> Vec<Aside> {
    let mut asides: Vec<Aside> =
        view.regions.iter().map(|place| region(view, place, wish)).collect();
    let (hidden, unknown) = match hidden {
        Ok(all) => {
            let more = all.len().saturating_sub(MAX_HIDDEN);
            let text = format!("{more} more pieces that lie under something else");
            (all.as_slice(), (more > 0).then_some(text))
        }
        Err(why) => (&[][..], Some(format!("what lies under something else is not known: {why}"))),
    };
    asides.extend(hidden.iter().take(MAX_HIDDEN).map(|one| beneath(view, one, wish)));
    asides.extend(unknown.map(|why| Aside::of(HIDDEN, "", (0, 0), 0, why)));
    name_files(&mut asides);
    asides
}

/// Gives each file a name of its own: regions of one name may begin at one address.
fn name_files(asides: &mut [Aside]) {
    let mut names = HashSet::new();
    for aside in asides.iter_mut().filter(|aside| aside.place.is_some()) {
        if names.len() == MAX_FILES {
            leave_out(aside, format!("more than {MAX_FILES} pieces"));
            continue;
        }
        let stem = file_stem(&aside.decided);
        let mut name = format!("{stem}.bin");
        for number in 2.. {
            if names.insert(name.clone()) {
                break;
            }
            name = format!("{stem}-{number}.bin");
        }
        aside.decided.file = Some(name);
    }
}

/// What the operator should know beforehand: what was wanted, and will not be had.
pub fn warnings(asides: &[Aside], wish: &Wish) -> Vec<String> {
    let wanted = |kind: &str| match kind {
        "nvdimm" => wish.wants(Part::Nvdimm),
        "romd" => wish.wants(Part::Romd),
        HIDDEN => wish.wants(Part::Hidden),
        _ => false,
    };
    let lost = |decided: &&Decided| decided.taken == Taken::Nowhere && wanted(&decided.kind);
    // What the guest sees elsewhere is not lost.
    let told = |decided: &&Decided| !decided.why.starts_with(SEEN);
    let decided = asides.iter().map(|aside| &aside.decided).filter(lost).filter(told);
    decided
        .take(16)
        .map(|one| format!("not read: {} {:?} at {:#x}: {}", one.kind, one.name, one.gpa, one.why))
        .collect()
}

impl Aside {
    /// A piece of memory, by kind, name, address with length, and offset, that is not read for this reason.
    fn of(kind: &str, name: &str, (gpa, len): (u64, u64), offset: u64, why: String) -> Self {
        let (kind, name) = (kind.to_owned(), name.to_owned());
        let (under, taken, file, read, known) = (None, Taken::Nowhere, None, None, false);
        let decided =
            Decided { gpa, len, kind, name, offset, under, taken, file, why, read, known };
        Self { decided, place: None }
    }

    /// It is not read after all.
    pub fn leave(&mut self, why: &str) {
        if self.place.is_some() {
            leave_out(self, format!("not read: {why}"));
        }
    }
}

/// Bytes that the files may take.
pub fn bytes(asides: &[Aside]) -> u64 {
    let taken = asides.iter().filter(|aside| aside.decided.taken == Taken::File);
    taken.fold(0u64, |sum, aside| sum.saturating_add(aside.decided.len))
}

/// Nothing beside the image is read: the decisions say so.
pub fn none(decisions: &mut [Decided], why: &str) {
    let beside = |decided: &&mut Decided| decided.taken == Taken::File;
    decisions.iter_mut().filter(beside).for_each(|decided| drop_it(decided, why));
}

/// There is no image: the decisions say so.
pub fn no_image(decisions: &mut [Decided]) {
    let imaged = |decided: &&mut Decided| matches!(decided.taken, Taken::Image | Taken::Excluded);
    decisions.iter_mut().filter(imaged).for_each(|one| drop_it(one, "there is no image"));
}

fn drop_it(decided: &mut Decided, why: &str) {
    (decided.taken, decided.file) = (Taken::Nowhere, None);
    decided.why = format!("not read: {why}");
}

fn leave_out(aside: &mut Aside, why: String) {
    (aside.decided.taken, aside.decided.file) = (Taken::Nowhere, None);
    aside.decided.why = why;
    aside.place = None;
}

/// Why a region of this kind is where it is.
pub(crate) fn why(kind: Kind) -> &'static str {
    match kind {
        Kind::Ram => "the guest's RAM",
        Kind::Rom => "ROM that is plain memory to the host",
        Kind::DeviceRam => "memory of an emulated device",
        Kind::Romd => {
            "flash: a device model answers the guest's reads, its memory is read from outside"
        }
        Kind::Nvdimm => "persistent memory: a file of the host's",
        Kind::RamDevice => "a passed-through device's: to read it is to touch hardware",
    }
}

/// The part that a kind of region is called by on the command line; `None` of what is always or never taken.
fn part(kind: Kind) -> Option<Part> {
    match kind {
        Kind::Rom => Some(Part::Rom),
        Kind::DeviceRam => Some(Part::DeviceRam),
        Kind::Romd => Some(Part::Romd),
        Kind::Nvdimm => Some(Part::Nvdimm),
        Kind::Ram | Kind::RamDevice => None,
    }
}

fn region(view: &GuestView, place: &ViewRegion, wish: &Wish) -> Aside {
    let region = &place.region;
    let (kind, why) = (region.kind, why(region.kind).to_owned());
    let at = (region.gpa, region.len);
    let mut aside = Aside::of(kind.word(), &region.name, at, region.block_offset, why);
    let part = part(kind);
    match part {
        Some(part) if !wish.wants(part) => {
            if kind.in_image() {
                aside.decided.taken = Taken::Excluded;
            }
            match wish.excluded(part) {
                true => aside.decided.why = format!("--exclude {}", part.word()),
                false => {
                    aside.decided.why.push_str(&format!("; --include {} takes it", part.word()));
                }
            }
        }
        _ if kind.in_image() => aside.decided.taken = Taken::Image,
        Some(_) => put_aside(&mut aside, block_address(view, place), wish),
        // A passed-through device's.
        None => {}
    }
    aside
}

/// Where QEMU's process has a region that is not in the image: by its RAMBlock's address.
fn block_address(view: &GuestView, place: &ViewRegion) -> Result<u64, String> {
    let block = place.block_index.and_then(|index| view.blocks.get(index));
    let block = block.ok_or("which RAMBlock it is is not certain")?;
    let base = block.hva.ok_or("this QEMU does not tell where the RAMBlock lies (since 8.0)")?;
    within(base, place.region.block_offset, place.region.len, block.total)
}

/// The address of a piece of a block that begins at `base`, and has `total` bytes.
fn within(base: u64, offset: u64, len: u64, total: u64) -> Result<u64, String> {
    let fits = offset.checked_add(len).is_some_and(|end| end <= total);
    base.checked_add(offset)
        .filter(|_| fits)
        .ok_or_else(|| "it is longer than its RAMBlock".to_owned())
}

fn beneath(view: &GuestView, hidden: &Hidden, wish: &Wish) -> Aside {
    let why = "the guest does not see it: something else answers there".to_owned();
    let at = (hidden.gpa, hidden.len);
    let mut aside = Aside::of(HIDDEN, &hidden.name, at, hidden.offset, why);
    aside.decided.under = hidden.by.clone();
    if let Some(shown_at) = hidden.shown_at {
        leave_out(&mut aside, format!("{SEEN} {shown_at:#x}"));
    } else if !wish.wants(Part::Hidden) {
        leave_out(&mut aside, format!("--exclude {}", Part::Hidden.word()));
    } else {
        put_aside(&mut aside, seen_address(view, hidden), wish);
    }
    aside
}

/// Where QEMU's process has something hidden: by another piece of the same region that is in the image, and of
/// which it is known therefore that it is memory.
fn seen_address(view: &GuestView, hidden: &Hidden) -> Result<u64, String> {
    let same = |region: &Region| region.name == hidden.name && region.owner == hidden.owner;
    let seen =
        view.regions.iter().filter(|place| same(&place.region) && place.region.kind.in_image());
    let mut bases: Vec<(u64, usize)> = seen
        .filter_map(|place| {
            Some((place.hva?.checked_sub(place.region.block_offset)?, place.block_index?))
        })
        .collect();
    bases.sort_unstable();
    bases.dedup();
    let [(base, index)] = bases[..] else {
        return Err("no other piece of it is seen, so where it lies is not certain".to_owned());
    };
    let total = view.blocks.get(index).map_or(0, |block| block.total);
    within(base, hidden.offset, hidden.len, total)
}

/// Gives the aside its place, or leaves it out.
fn put_aside(aside: &mut Aside, hva: Result<u64, String>, wish: &Wish) {
    let Decided { gpa, len, kind, .. } = &aside.decided;
    let asked = wish.include.iter().any(|part| part.word() == kind);
    let place = match (hva, GuestRange::new(*gpa, *len)) {
        (Err(why), _) => Err(why),
        (Ok(_), None) => Err("its addresses wrap".to_owned()),
        (Ok(_), Some(range)) if range.len() > MAX_UNASKED && !asked => {
            Err(format!("longer than the {MAX_UNASKED} bytes that are taken unasked"))
        }
        (Ok(hva), Some(range)) => Ok(Place { range, hva }),
    };
    match place {
        Ok(place) => (aside.place, aside.decided.taken) = (Some(place), Taken::File),
        Err(why) => leave_out(aside, why),
    }
}

/// `hidden-0xa0000-pc.ram`: what may not stand in a file's name becomes `_`.
fn file_stem(decided: &Decided) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let name = decided.name.chars().map(|c| if fits(c) { c } else { '_' });
    let name: String = name.take(64).collect();
    format!("{}-{:#x}-{name}", decided.kind, decided.gpa)
}

/// What was read beside the image.
pub struct Read {
    /// The decisions, as they came out.
    pub decided: Vec<Decided>,
    /// The files.
    pub files: Vec<FileRecord>,
    /// The operator ended it before all was read.
    pub stopped: bool,
}

/// Reads each aside that is to have a file into one. What could not be read is left out, and said so: the image
/// does not depend on it.
pub fn read(
    asides: &[Aside],
    looked: &Looked,
    request: &Request,
    log: &Log,
    guarded: &Guarded,
    stop: &Stop,
) -> Read {
    let mut all = Read { decided: Vec::new(), files: Vec::new(), stopped: false };
    for aside in asides {
        let mut aside = aside.clone();
        if let (Some(place), Some(name)) = (aside.place, aside.decided.file.clone()) {
            let t0_ns = log.now_ns();
            match copy(&looked.target.process, place, &name, request, guarded, stop) {
                Ok((record, known)) => {
                    aside.decided.read = Some(Span { t0_ns, t1_ns: log.now_ns() });
                    aside.decided.known = known;
                    all.files.push(record);
                }
                Err(why) => {
                    // That the operator stops later is for those who seal.
                    all.stopped |= stop.asked();
                    leave_out(&mut aside, why);
                }
            }
        }
        all.decided.push(aside.decided);
    }
    all
}

/// Copies a place into a new file, which is taken away again where that fails. Gives back the file, and whether all of
/// it could be read.
fn copy(
    process: &Process,
    place: Place,
    name: &str,
    request: &Request,
    guarded: &Guarded,
    stop: &Stop,
) -> Result<(FileRecord, bool), String> {
    let mut memory = GuestMemory::open(process, &[place]).map_err(|error| told(&error))?;
    if request.wish.swap == SwapWish::Skip {
        let usage = memory.usage().map_err(|error| told(&error))?;
        let shared = memory.places().iter().any(|held| held.mapping() == Mapping::Shared);
        if shared && usage.iter().any(|usage| usage.swapped > 0) {
            return Err("some of it is in the host's swap, and which pages is not known".to_owned());
        }
        memory.leave_swapped();
    }
    let file = guarded.aside(name).map_err(|error| told(&error))?;
    fill(&memory, place, &file, request.max_rate, stop)
        .map(|(sha256, known)| {
            (FileRecord { file: name.to_owned(), len: place.range.len(), sha256 }, known)
        })
        .inspect_err(|_| guarded.remove_aside(name))
}

/// Copies a place into a file, in which stretches of zeros are left out. Gives back the digest, and whether all of it could
/// be read.
fn fill(
    memory: &GuestMemory,
    place: Place,
    file: &File,
    max_rate: Option<u64>,
    stop: &Stop,
) -> Result<(Digest, bool), String> {
    let (start, len, began) = (place.range.start(), place.range.len(), Instant::now());
    let mut buffer = Vec::new();
    let (mut hasher, mut known, mut done) = (Hasher::default(), true, 0);
    while done < len {
        if stop.asked() {
            return Err("interrupted by the operator".to_owned());
        }
        let piece = (len - done).min(BLOCK_LEN);
        let Some(range) = GuestRange::new(start + done, piece) else { break };
        buffer.resize(evidence::block::index(piece), 0);
        let mut states = vec![PageState::Hole; evidence::block::index(page_count(range))];
        memory.read(range, &mut buffer, &mut states).map_err(|error| told(&error))?;
        known &= states.iter().all(|state| state.known());
        hasher.update(&buffer);
        if buffer.iter().any(|&byte| byte != 0) {
            file.write_all_at(&buffer, done).map_err(|error| told(&error))?;
        }
        done += piece;
        if let Some(rate) = max_rate.filter(|&rate| rate > 0) {
            let nanos = u128::from(done) * 1_000_000_000 / u128::from(rate);
            let due = Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX));
            std::thread::sleep(due.saturating_sub(began.elapsed()).min(Duration::from_secs(1)));
        }
    }
    file.set_len(len).map_err(|error| told(&error))?;
    // What was unmapped meanwhile looks like holes.
    memory.check_mappings().map_err(|error| told(&error))?;
    Ok((hasher.finish(), known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_file_has_a_name_of_its_own_that_is_one_component() {
        let piece = |name: &str, gpa| {
            let mut aside = Aside::of(HIDDEN, name, (gpa, 0x1000), 0, String::new());
            put_aside(&mut aside, Ok(0x7000), &Wish::default());
            aside
        };
        let mut asides = vec![
            piece("../pc ram/\u{1b}[1m", 0xa_0000),
            piece("vga", 0),
            piece("vga", 0),
            piece("vga-2", 0),
            piece("vga", 0),
            piece(&"x".repeat(500), u64::MAX - 0xfff),
        ];
        name_files(&mut asides);
        let names: Vec<_> =
            asides.iter().filter_map(|aside| aside.decided.file.as_deref()).collect();
        assert!(names.iter().all(|name| evidence::exhibit::is_file_name(name)), "{names:?}");
        let start = [
            "hidden-0xa0000-.._pc_ram___1m.bin",
            "hidden-0x0-vga.bin",
            "hidden-0x0-vga-2.bin",
            "hidden-0x0-vga-2-2.bin",
            "hidden-0x0-vga-3.bin",
        ];
        assert_eq!(names[..5], start);
        let mut many: Vec<_> = (0..300).map(|n| piece("x", n << 12)).collect();
        name_files(&mut many);
        let named = many.iter().filter(|aside| aside.decided.file.is_some()).count();
        let left = many.iter().filter(|aside| aside.decided.taken == Taken::Nowhere).count();
        assert_eq!((named, left), (MAX_FILES, 300 - MAX_FILES));
    }

    #[test]
    fn what_is_long_is_taken_only_when_it_is_asked_for() {
        let asked = Wish { include: vec![Part::Hidden], ..Wish::default() };
        for (wish, taken) in [(Wish::default(), Taken::Nowhere), (asked, Taken::File)] {
            let mut aside = Aside::of(HIDDEN, "x", (0, MAX_UNASKED + 1), 0, String::new());
            put_aside(&mut aside, Ok(0x7000), &wish);
            assert_eq!((aside.decided.taken, aside.place.is_some()), (taken, taken == Taken::File));
        }
    }

    #[test]
    fn a_piece_lies_within_its_block() {
        assert_eq!(within(0x1000, 0x20, 0x10, 0x30), Ok(0x1020));
        assert!(within(0x1000, 0x21, 0x10, 0x30).is_err());
        assert!(within(u64::MAX, 0x20, 0x10, 0x30).is_err());
        assert!(within(0, u64::MAX, 2, u64::MAX).is_err());
    }
}
