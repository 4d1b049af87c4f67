//! What can be done to an exhibit, and what `verify` must say then.

use crate::synth::{
    self, NOT_REACHED, Recipe, Result, block_at, build, manifest, put_records, put_sums, records,
    seal,
};
use evidence::digest::{memory_root, sha256};
use evidence::exhibit::{self, MemoryExhibit, image_name};
use evidence::format::elf::{Arch, NOTES_OFFSET};
use evidence::format::{self, Format};
use evidence::manifest::{Manifest, Status};
use evidence::state::Run;
use evidence::{GuestRange, Kind, PageState};
use serde::Serialize;

/// A verdict as expected.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Expected {
    /// Exit code of `verify`; 1 when there is no verdict.
    pub exit: u8,
    /// Exactly the files that the findings name, sorted.
    pub files: Vec<String>,
    /// Exactly the blocks that the findings name, by guest-physical address, sorted.
    pub blocks: Vec<String>,
}

/// An exhibit and its verdict.
#[derive(Clone, Debug)]
pub struct Case {
    /// Its name, for a directory.
    pub name: &'static str,
    /// What was done to it.
    pub why: &'static str,
    /// The exhibit.
    pub exhibit: MemoryExhibit,
    /// Its verdict.
    pub expected: Expected,
}

/// Offset of guest-physical `gpa` in the image of `exhibit`.
///
/// # Errors
/// When it is in no region of the image.
pub fn offset_of(manifest: &Manifest, gpa: u64) -> Result<usize> {
    let image = manifest.image.as_ref().ok_or("no image")?;
    let layout = format::encode(image.format, Arch::X86_64, &manifest.map, &[])?;
    let byte = GuestRange::new(gpa, 1).ok_or("no address")?;
    Ok(usize::try_from(layout.segments.offset_of(byte).ok_or("not in the image")?)?)
}

/// Collects cases; `build` once for each recipe.
struct Cases {
    good: MemoryExhibit,
    list: Vec<Case>,
}

type Edit<'a> = &'a dyn Fn(&mut MemoryExhibit) -> Result<()>;

impl Cases {
    fn good(
        &mut self,
        name: &'static str,
        why: &'static str,
        exit: u8,
        recipe: Recipe,
    ) -> Result<()> {
        let expected = Expected { exit, files: Vec::new(), blocks: Vec::new() };
        self.list.push(Case { name, why, exhibit: build(recipe)?, expected });
        Ok(())
    }

    /// A good ELF exhibit with `edit` done to it: findings in `files`, and for blocks at `blocks`.
    fn broken(
        &mut self,
        name: &'static str,
        why: &'static str,
        files: &[&str],
        blocks: &[u64],
        edit: Edit<'_>,
    ) -> Result<()> {
        let mut exhibit = self.good.clone();
        edit(&mut exhibit).map_err(|error| format!("{name}: {error}"))?;
        let expected = Expected {
            exit: if files.is_empty() { 0 } else { 5 },
            files: files.iter().map(|file| (*file).to_string()).collect(),
            blocks: blocks.iter().map(|gpa| format!("{gpa:#x}")).collect(),
        };
        self.list.push(Case { name, why, exhibit, expected });
        Ok(())
    }
}

/// All cases.
///
/// # Errors
/// Whatever the evidence crate says of its own writers.
pub fn all() -> Result<Vec<Case>> {
    let mut cases = Cases { good: build(Recipe::default())?, list: Vec::new() };
    good(&mut cases)?;
    image(&mut cases)?;
    blocks(&mut cases)?;
    texts(&mut cases)?;
    resealed(&mut cases)?;
    Ok(cases.list)
}

fn good(cases: &mut Cases) -> Result<()> {
    let recipe = Recipe::default();
    cases.good("good-elf", "nothing", 0, recipe)?;
    cases.good("good-raw", "nothing", 0, Recipe { format: Format::Raw, ..recipe })?;
    cases.good("good-lime", "nothing", 0, Recipe { format: Format::Lime, ..recipe })?;
    cases.good(
        "good-no-file-digest",
        "made with --file-digest no",
        0,
        Recipe { file_digest: false, ..recipe },
    )?;
    cases.good(
        "good-added-later",
        "custody log, reports and a signature were added",
        0,
        Recipe { added_later: true, ..recipe },
    )?;
    cases.good("losses", "a page was unreadable", 3, Recipe { losses: true, ..recipe })?;
    let partial = Recipe { status: Status::Partial, ..recipe };
    cases.good("partial", "the acquisition was interrupted", 3, partial)?;
    let failed = Recipe { status: Status::Failed, ..recipe };
    cases.good("failed", "nothing was read", 3, failed)
}

/// Turns a bit of the byte at `at` round.
fn flip(exhibit: &mut MemoryExhibit, name: &str, at: usize) -> Result<()> {
    let byte = exhibit.get_mut(name).and_then(|bytes| bytes.get_mut(at)).ok_or("no such byte")?;
    *byte ^= 0x10;
    Ok(())
}

fn image(cases: &mut Cases) -> Result<()> {
    let name = &image_name(Format::Elf);
    let files = [name.as_str()];
    let manifest = manifest(&cases.good)?;
    let at = |gpa| offset_of(&manifest, gpa);
    let (low, odd, high) = (at(0x20_1234)?, at(0xd0_1fff)?, at(NOT_REACHED)?);
    cases.broken("image-bit", "a bit of memory", &files, &[0x20_0000], &|e| flip(e, name, low))?;
    cases.broken("image-odd-bit", "a bit of a short block", &files, &[0xd0_0800], &|e| {
        flip(e, name, odd)
    })?;
    cases.broken("image-header", "a bit of the ELF header", &files, &[], &|e| flip(e, name, 18))?;
    let note = usize::try_from(NOTES_OFFSET)? + 30;
    cases.broken("image-note", "a bit of a note", &files, &[], &|e| flip(e, name, note))?;
    cases.broken("image-gap", "a byte where nothing lies", &files, &[], &|e| {
        flip(e, name, 0x10_0000)
    })?;
    let last = block_at(NOT_REACHED + 0x3f_0000)?.start();
    cases.broken("image-truncated", "cut off by one byte", &files, &[last], &|e| {
        let image = e.get_mut(name).ok_or("no image")?;
        image.pop();
        Ok(())
    })?;
    cases.broken("image-appended", "zeros behind the end", &files, &[], &|e| {
        e.get_mut(name).ok_or("no image")?.extend([0; 512]);
        Ok(())
    })?;
    let swapped = [0x20_0000, NOT_REACHED];
    cases.broken("image-swapped", "two blocks changed places", &files, &swapped, &|e| {
        let image = e.get_mut(name).ok_or("no image")?;
        let first = low - 0x1234;
        let (before, behind) = image.split_at_mut(high);
        let block = 1 << 20;
        let one = before.get_mut(first..first + block).ok_or("short image")?;
        one.swap_with_slice(behind.get_mut(..block).ok_or("short image")?);
        Ok(())
    })?;
    cases.broken("image-missing", "the image is gone", &files, &[], &|e| remove(e, name))?;
    let no_digest = build(Recipe { file_digest: false, ..Recipe::default() })?;
    let good = std::mem::replace(&mut cases.good, no_digest);
    let why = "a bit of memory, and the image has no digest of its own";
    cases.broken("no-file-digest-bit", why, &files, &[0x20_0000], &|e| flip(e, name, low))?;
    let why = "a bit of a note, and the image has no digest of its own";
    cases.broken("no-file-digest-note", why, &files, &[], &|e| flip(e, name, note))?;
    let why = "a byte where nothing lies, and the image has no digest of its own";
    cases.broken("no-file-digest-gap", why, &files, &[], &|e| flip(e, name, 0x10_0000))?;
    let mut partial = build(Recipe { status: Status::Partial, ..Recipe::default() })?;
    flip(&mut partial, name, high + 5)?;
    cases.good = partial;
    let why = "a byte in a block that was not reached";
    cases.broken("partial-byte", why, &files, &[NOT_REACHED], &|_| Ok(()))?;
    cases.good = good;
    Ok(())
}

fn remove(exhibit: &mut MemoryExhibit, name: &str) -> Result<()> {
    exhibit.files.remove(name).map(|_| ()).ok_or_else(|| "no such file".into())
}

fn blocks(cases: &mut Cases) -> Result<()> {
    let files = [exhibit::BLOCKS];
    cases.broken("blocks-truncated", "cut off", &files, &[], &|e| {
        let bytes = e.get_mut(exhibit::BLOCKS).ok_or("no records")?;
        bytes.truncate(bytes.len() / 2);
        Ok(())
    })?;
    cases.broken("blocks-missing", "gone", &files, &[], &|e| remove(e, exhibit::BLOCKS))?;
    cases.broken("blocks-dropped", "a record left out", &files, &[0x20_0000], &|e| {
        let mut records = records(e)?;
        records.retain(|record| record.range.start() != 0x20_0000);
        put_records(e, &records)
    })?;
    cases.broken("blocks-digest", "a digest in a record", &files, &[], &|e| {
        let mut records = records(e)?;
        records.get_mut(3).ok_or("few records")?.sha256 = sha256(b"other");
        put_records(e, &records)
    })
}

/// Rewrites a text file line by line.
fn edit_lines(
    exhibit: &mut MemoryExhibit,
    name: &str,
    edit: &dyn Fn(&mut Vec<String>),
) -> Result<()> {
    let text = String::from_utf8(exhibit.get(name).ok_or("no such file")?.to_vec())?;
    let mut lines = text.lines().map(String::from).collect();
    edit(&mut lines);
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    exhibit.put(name, text);
    Ok(())
}

fn texts(cases: &mut Cases) -> Result<()> {
    let journal = [exhibit::JOURNAL];
    cases.broken("journal-dropped", "a line left out", &journal, &[], &|e| {
        edit_lines(e, exhibit::JOURNAL, &|lines| drop(lines.remove(2)))
    })?;
    cases.broken("journal-last-dropped", "the last line left out", &journal, &[], &|e| {
        edit_lines(e, exhibit::JOURNAL, &|lines| drop(lines.pop()))
    })?;
    cases.broken("journal-reordered", "two lines changed places", &journal, &[], &|e| {
        edit_lines(e, exhibit::JOURNAL, &|lines| lines.swap(1, 2))
    })?;
    cases.broken("journal-edited", "a word in a line", &journal, &[], &|e| {
        edit_lines(e, exhibit::JOURNAL, &|lines| {
            lines.iter_mut().for_each(|line| *line = line.replace("found", "guess"));
        })
    })?;
    let sums = [exhibit::SUMS];
    cases.broken("sums-dropped", "a line left out", &sums, &[], &|e| {
        edit_lines(e, exhibit::SUMS, &|lines| drop(lines.remove(0)))
    })?;
    cases.broken("sums-reordered", "two lines changed places", &sums, &[], &|e| {
        edit_lines(e, exhibit::SUMS, &|lines| lines.swap(0, 1))
    })?;
    let why = "the digest of the journal, which the manifest confirms";
    cases.broken("sums-edited", why, &sums, &[], &|e| {
        edit_lines(e, exhibit::SUMS, &|lines| {
            for line in lines.iter_mut().filter(|line| line.ends_with(exhibit::JOURNAL)) {
                line.replace_range(..4, "0000");
            }
        })
    })?;
    cases.broken("sums-missing", "gone", &sums, &[], &|e| remove(e, exhibit::SUMS))?;
    let map = [exhibit::MAP_BEFORE];
    cases.broken("map-text-edited", "a byte", &map, &[], &|e| flip(e, exhibit::MAP_BEFORE, 3))?;
    cases.broken("map-text-missing", "gone", &map, &[], &|e| remove(e, exhibit::MAP_BEFORE))?;
    let registers = ["registers.json"];
    cases.broken("attachment-missing", "gone", &registers, &[], &|e| remove(e, registers[0]))?;
    cases.broken("file-added", "a file that was not there", &["notes.txt"], &[], &|e| {
        e.put("notes.txt", "x\n");
        Ok(())
    })?;
    let record = [exhibit::MANIFEST];
    cases.broken("manifest-missing", "gone", &record, &[], &|e| remove(e, exhibit::MANIFEST))?;
    let disputed = [exhibit::SUMS, exhibit::MANIFEST];
    cases.broken("manifest-edited", "the case number", &disputed, &[], &|e| {
        edit_lines(e, exhibit::MANIFEST, &|lines| {
            lines.iter_mut().for_each(|line| *line = line.replace("2026-117", "2026-118"));
        })
    })?;
    let why = "the digest of the block records, which SHA256SUMS confirms";
    cases.broken("manifest-digest", why, &record, &[], &|e| {
        let wrong = sha256(b"other").to_string();
        let right = sha256(e.get(exhibit::BLOCKS).ok_or("no records")?).to_string();
        edit_lines(e, exhibit::MANIFEST, &|lines| {
            lines.iter_mut().for_each(|line| *line = line.replace(&right, &wrong));
        })
    })?;
    let custody = build(Recipe { added_later: true, ..Recipe::default() })?;
    let good = std::mem::replace(&mut cases.good, custody);
    let why = "a line of the custody log left out";
    cases.broken("custody-dropped", why, &[exhibit::CUSTODY], &[], &|e| {
        edit_lines(e, exhibit::CUSTODY, &|lines| drop(lines.remove(1)))
    })?;
    cases.good = good;
    Ok(())
}

/// Changes to the manifest, with all digests of files made to fit again.
fn forge(exhibit: &mut MemoryExhibit, edit: impl FnOnce(&mut Manifest)) -> Result<()> {
    let mut manifest = manifest(exhibit)?;
    edit(&mut manifest);
    seal(exhibit, manifest)
}

fn resealed(cases: &mut Cases) -> Result<()> {
    let name = &image_name(Format::Elf);
    let record = [exhibit::MANIFEST];
    cases.broken("resealed-case-number", "only a signature shows this", &[], &[], &|e| {
        forge(e, |m| m.case.number = Some("2026-118".into()))
    })?;
    cases.broken("resealed-memory-root", "another memory root", &record, &[], &|e| {
        forge(e, |m| m.memory_root = Some(memory_root([])))
    })?;
    cases.broken("resealed-states", "bytes moved between states", &record, &[], &|e| {
        forge(e, |m| {
            m.states.zero += 4096;
            m.states.hole -= 4096;
        })
    })?;
    cases.broken("resealed-stable", "another stable share", &record, &[], &|e| {
        forge(e, |m| m.stable = evidence::manifest::Stable::new(4096, 0))
    })?;
    let why = "a byte of memory, its digest in the record and the digests of both files";
    cases.broken("resealed-byte", why, &record, &[], &|e| {
        let at = offset_of(&manifest(e)?, 0x20_0000)?;
        flip(e, name, at)?;
        let block = e.get(name).and_then(|image| image.get(at..at + (1 << 20)));
        let digest = sha256(block.ok_or("short image")?);
        let mut records = records(e)?;
        let at = records.iter_mut().find(|record| record.range.start() == 0x20_0000);
        at.ok_or("no record")?.sha256 = digest;
        put_records(e, &records)?;
        forge(e, |_| {})
    })?;
    let two = [exhibit::BLOCKS, exhibit::MANIFEST];
    cases.broken("resealed-dropped", "a record left out", &two, &[0x20_0000], &|e| {
        let mut records = records(e)?;
        records.retain(|record| record.range.start() != 0x20_0000);
        put_records(e, &records)?;
        forge(e, |_| {})
    })?;
    let three = [exhibit::MANIFEST, name.as_str()];
    let why = "a page with bytes recorded as zero";
    cases.broken("resealed-zero", why, &three, &[0], &|e| {
        let mut records = records(e)?;
        let first = records.first_mut().ok_or("no records")?;
        first.runs = vec![Run(PageState::Zero, 160)];
        put_records(e, &records)?;
        forge(e, |_| {})
    })?;
    cases.broken("resealed-journal", "a line left out", &[exhibit::JOURNAL], &[], &|e| {
        edit_lines(e, exhibit::JOURNAL, &|lines| drop(lines.remove(2)))?;
        forge(e, |_| {})
    })?;
    let raw = build(Recipe { format: Format::Raw, ..Recipe::default() })?;
    let elf = std::mem::replace(&mut cases.good, raw);
    let why = "a region of another kind, so that it is not in the image";
    let names = [exhibit::BLOCKS, exhibit::MANIFEST, &image_name(Format::Raw)];
    cases.broken("resealed-map", why, &names, &[0xc_0000], &|e| {
        forge(e, |m| {
            let mut regions = m.map.regions().to_vec();
            if let Some(rom) = regions.get_mut(2) {
                rom.kind = Kind::Romd;
            }
            m.map = evidence::MemoryMap::new(regions).unwrap_or_default();
        })
    })?;
    cases.good = elf;
    cases.broken("resealed-version", "a version that nobody knows", &[], &[], &|e| {
        let text = String::from_utf8(e.get(exhibit::MANIFEST).ok_or("no manifest")?.to_vec())?;
        let sealed = manifest(e)?;
        e.put(exhibit::MANIFEST, text.replace("manifest/1", "manifest/999"));
        put_sums(e, &sealed);
        Ok(())
    })?;
    if let Some(case) = cases.list.last_mut() {
        case.expected.exit = 1;
    }
    Ok(())
}

/// The image's name in [`synth::build`]'s default.
pub fn default_image() -> String {
    image_name(synth::Recipe::default().format)
}
