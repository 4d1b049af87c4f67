//! Asides: memory that is not in the image and has files of its own. RAM that lies under something else,
//! flash (UEFI's variables), on request NVDIMMs.
//!
//! They are read from outside, as all memory is, behind the last read of the image: after a hold the guest runs
//! again by then, and what is read is not of the image's instant. The record says when each was read.

use crate::guard::Guarded;
use crate::log::Log;
use crate::look::Looked;
use crate::plan::{Part, Wish};
use crate::told;
use evidence::block::BLOCK_LEN;
use evidence::digest::Hasher;
use evidence::manifest::{Decided, FileRecord, Taken};
use evidence::record::Span;
use evidence::state::page_count;
use evidence::{GuestRange, Kind, PageState, Region};
use host::guest_memory::Place;
use host::source::Source as _;
use host::{GuestMemory, Process};
use qemu::GuestView;
use qemu::graph::Hidden;
use std::os::unix::fs::FileExt as _;

/// More files than any machine gives cause for: what is beyond is named and left out.
const MAX_FILES: usize = 256;

/// The longest that one of the pieces may be that are taken unasked, in bytes: what is hidden of an ordinary machine is a few
/// MiB, and flash no more than 64.
const MAX_UNASKED: u64 = 1 << 30;

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
    match hidden {
        Ok(hidden) => asides.extend(hidden.iter().map(|one| beneath(view, one, wish))),
        Err(why) => asides.push(Aside {
            decided: Decided {
                gpa: 0,
                len: 0,
                kind: "hidden".to_owned(),
                name: String::new(),
                offset: 0,
                under: None,
                taken: Taken::Nowhere,
                file: None,
                why: format!("what lies under something else is not known: {why}"),
                read: None,
                known: false,
            },
            place: None,
        }),
    }
    let mut files = 0;
    for aside in asides.iter_mut().filter(|aside| aside.decided.taken == Taken::File) {
        files += 1;
        if files > MAX_FILES {
            leave_out(aside, format!("more than {MAX_FILES} pieces"));
        }
    }
    asides
}

/// Bytes that the files may take.
pub fn bytes(asides: &[Aside]) -> u64 {
    let taken = asides.iter().filter(|aside| aside.decided.taken == Taken::File);
    taken.fold(0u64, |sum, aside| sum.saturating_add(aside.decided.len))
}

/// Nothing beside the image is read: the decisions say so.
pub fn none(decisions: &mut [Decided], why: &str) {
    for decided in decisions.iter_mut().filter(|decided| decided.taken == Taken::File) {
        (decided.taken, decided.file) = (Taken::Nowhere, None);
        decided.why = format!("not read: {why}");
    }
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

fn region(view: &GuestView, place: &qemu::view::ViewRegion, wish: &Wish) -> Aside {
    let region = &place.region;
    let wanted = part(region.kind).is_none_or(|part| wish.wants(part));
    let taken = match region.kind {
        Kind::RamDevice => Taken::Nowhere,
        kind if kind.in_image() => {
            if wanted {
                Taken::Image
            } else {
                Taken::Excluded
            }
        }
        _ if wanted => Taken::File,
        _ => Taken::Nowhere,
    };
    let mut aside = Aside {
        decided: Decided {
            gpa: region.gpa,
            len: region.len,
            kind: region.kind.word().to_owned(),
            name: region.name.clone(),
            offset: region.block_offset,
            under: None,
            taken,
            file: None,
            why: why(region.kind).to_owned(),
            read: None,
            known: false,
        },
        place: None,
    };
    match (taken, part(region.kind)) {
        (Taken::Excluded, Some(part)) => aside.decided.why = format!("--exclude {}", part.word()),
        (Taken::Nowhere, Some(part)) if wish.excluded(part) => {
            aside.decided.why = format!("--exclude {}", part.word());
        }
        (Taken::Nowhere, Some(part)) => {
            aside.decided.why = format!("{}; --include {} takes it", why(region.kind), part.word());
        }
        (Taken::File, _) => at(&mut aside, block_address(view, place), wish),
        _ => {}
    }
    aside
}

/// Where QEMU's process has a region that is not in the image: by its RAMBlock's address.
fn block_address(view: &GuestView, place: &qemu::view::ViewRegion) -> Result<u64, String> {
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
    let mut aside = Aside {
        decided: Decided {
            gpa: hidden.gpa,
            len: hidden.len,
            kind: "hidden".to_owned(),
            name: hidden.name.clone(),
            offset: hidden.offset,
            under: hidden.by.clone(),
            taken: Taken::File,
            file: None,
            why: "the guest does not see it: something else answers there".to_owned(),
            read: None,
            known: false,
        },
        place: None,
    };
    if let Some(shown_at) = hidden.shown_at {
        leave_out(&mut aside, format!("the guest sees the same bytes at {shown_at:#x}"));
    } else if !wish.wants(Part::Hidden) {
        leave_out(&mut aside, format!("--exclude {}", Part::Hidden.word()));
    } else {
        at(&mut aside, seen_address(view, hidden), wish);
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
    bases.dedup();
    let [(base, index)] = bases[..] else {
        return Err("no other piece of it is seen, so where it lies is not certain".to_owned());
    };
    let total = view.blocks.get(index).map_or(0, |block| block.total);
    within(base, hidden.offset, hidden.len, total)
}

/// Gives the aside its place, or leaves it out.
fn at(aside: &mut Aside, hva: Result<u64, String>, wish: &Wish) {
    let Decided { gpa, len, kind, name, .. } = &aside.decided;
    let place = GuestRange::new(*gpa, *len).ok_or_else(|| "its addresses wrap".to_owned());
    let asked = kind == Kind::Nvdimm.word() && wish.wants(Part::Nvdimm);
    let place = hva.and_then(|hva| Ok(Place { range: place?, hva })).and_then(|place| {
        match *len > MAX_UNASKED && !asked {
            true => Err(format!("longer than the {MAX_UNASKED} bytes that are taken unasked")),
            false => Ok(place),
        }
    });
    let file = file_name(kind, *gpa, name);
    match place {
        Ok(place) => (aside.place, aside.decided.file) = (Some(place), Some(file)),
        Err(why) => leave_out(aside, why),
    }
}

/// `hidden-0xa0000-pc.ram.bin`: what may not stand in a file's name becomes `_`.
fn file_name(kind: &str, gpa: u64, name: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let name: String = name.chars().map(|c| if fits(c) { c } else { '_' }).take(64).collect();
    format!("{kind}-{gpa:#x}-{name}.bin")
}

/// Reads each aside that is to have a file into one. What could not be read is left out, and
/// said so: the image does not depend on it. Gives back the decisions, and the files.
pub fn read(
    asides: &[Aside],
    looked: &Looked,
    log: &Log,
    guarded: &Guarded,
) -> (Vec<Decided>, Vec<FileRecord>) {
    let (mut all, mut files) = (Vec::new(), Vec::new());
    for aside in asides {
        let mut aside = aside.clone();
        if let (Some(place), Some(name)) = (aside.place, aside.decided.file.clone()) {
            let t0_ns = log.now_ns();
            match copy(&looked.target.process, place, &name, guarded) {
                Ok((record, known)) => {
                    aside.decided.read = Some(Span { t0_ns, t1_ns: log.now_ns() });
                    aside.decided.known = known;
                    files.push(record);
                }
                Err(why) => {
                    guarded.remove_aside(&name);
                    leave_out(&mut aside, why);
                }
            }
        }
        all.push(aside.decided);
    }
    (all, files)
}

/// Copies a place into a file, in which pages that hold nothing are left out. Gives back the file, and whether all of it
/// could be read.
fn copy(
    process: &Process,
    place: Place,
    name: &str,
    guarded: &Guarded,
) -> Result<(FileRecord, bool), String> {
    let memory = GuestMemory::open(process, &[place]).map_err(|error| told(&error))?;
    let file = guarded.aside(name).map_err(|error| told(&error))?;
    let (start, len) = (place.range.start(), place.range.len());
    let mut buffer = Vec::new();
    let (mut hasher, mut known, mut done) = (Hasher::default(), true, 0);
    while done < len {
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
    }
    file.set_len(len).map_err(|error| told(&error))?;
    // What was unmapped meanwhile looks like holes.
    memory.check_mappings().map_err(|error| told(&error))?;
    Ok((FileRecord { file: name.to_owned(), len, sha256: hasher.finish() }, known))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_files_name_is_one_component() {
        let name = file_name("hidden", 0xa_0000, "../pc ram/\u{1b}[1m");
        assert_eq!(name, "hidden-0xa0000-.._pc_ram___1m.bin");
        assert!(evidence::exhibit::is_file_name(&name));
        assert!(evidence::exhibit::is_file_name(&file_name("romd", u64::MAX, &"x".repeat(500))));
    }

    #[test]
    fn a_piece_lies_within_its_block() {
        assert_eq!(within(0x1000, 0x20, 0x10, 0x30), Ok(0x1020));
        assert!(within(0x1000, 0x21, 0x10, 0x30).is_err());
        assert!(within(u64::MAX, 0x20, 0x10, 0x30).is_err());
        assert!(within(0, u64::MAX, 2, u64::MAX).is_err());
    }
}
