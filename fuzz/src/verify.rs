//! `verify` on small exhibits that the input edits.
//!
//! Without new digests, every change to a file that is covered must be called altered, in that
//! file. With new digests (what a forger makes, or a broken writer) the exhibit is judged by what it
//! says, and whatever passes must hold when it is checked in the plainest way.

use crate::record::stored;
use crate::take;
use evidence::digest::{memory_root, other_bytes_sha256, sha256};
use evidence::exhibit::{self, MemoryExhibit, image_name};
use evidence::format::{self, Format, elf::Arch};
use evidence::manifest::{BlocksFile, Image, Loss, LossKind, Pass, Stable, StateBytes, Status};
use evidence::record::{PageRun, Span};
use evidence::state::{pages, runs};
use evidence::verify::{Options, Outcome, Verdict, VerifyError, verify};
use evidence::{Block, BlockRecord, Digest, MemoryMap, PageState, block, sums};
use std::collections::BTreeSet;
use std::sync::LazyLock;
use testkit::synth::{self, Recipe, Result};

/// The exhibits and how each must be judged as it is.
static BASES: LazyLock<Vec<(MemoryExhibit, Outcome)>> = LazyLock::new(|| {
    let recipe = Recipe { format: Format::Lime, ..Recipe::default() };
    let recipes = [
        (recipe, Outcome::Intact),
        (Recipe { file_digest: false, added_later: true, ..recipe }, Outcome::Intact),
        (Recipe { status: Status::Partial, losses: true, ..recipe }, Outcome::Losses),
        (Recipe { format: Format::Elf, file_digest: false, ..recipe }, Outcome::Intact),
        (Recipe { format: Format::Raw, file_digest: false, ..recipe }, Outcome::Intact),
    ];
    let build = |(recipe, outcome)| (small(recipe).expect("a small exhibit"), outcome);
    recipes.into_iter().map(build).collect()
});

/// A byte that chooses the exhibit, one of flags, then edits of 8 bytes each.
pub fn edits(data: &[u8]) {
    let mut rest = data;
    let [base, flags] = take(&mut rest);
    // ELF and raw images are megabytes long, and slow.
    let number = match base {
        0xe0.. => base % 2 + 3,
        _ => base % 3,
    };
    let (base, expected) = &BASES[usize::from(number)];
    let mut exhibit = base.clone();
    for edit in rest.chunks(8).take(16) {
        edit_one(&mut exhibit, edit);
    }
    if flags & 1 != 0 {
        if let Some(verdict) = resealed(&mut exhibit) {
            check_plainly(&exhibit, &verdict);
        }
        return;
    }
    let verdict = verify(&exhibit, &Options::default());
    if flags & 2 != 0 {
        let two = verify(&exhibit, &Options { threads: 2, progress: None });
        assert_eq!(two.ok(), verdict.as_ref().ok().cloned(), "threads change the verdict");
    }
    judge(&changed(base, &exhibit), verdict, *expected);
}

/// Names of the files that are not as they were, without those that may be added later.
fn changed<'a>(base: &'a MemoryExhibit, exhibit: &'a MemoryExhibit) -> BTreeSet<&'a str> {
    let names = base.files.keys().chain(exhibit.files.keys()).map(String::as_str);
    names
        .filter(|name| base.get(name) != exhibit.get(name))
        .filter(|name| !exhibit::ADDED_LATER.contains(name) || *name == exhibit::CUSTODY)
        .collect()
}

fn judge(
    changed: &BTreeSet<&str>,
    verdict: std::result::Result<Verdict, VerifyError>,
    expected: Outcome,
) {
    let verdict = match verdict {
        Ok(verdict) => verdict,
        Err(VerifyError::NotAnExhibit) => {
            assert!([exhibit::MANIFEST, exhibit::SUMS].iter().all(|name| changed.contains(name)));
            return;
        }
        Err(VerifyError::UnknownVersion { .. }) => {
            assert!([exhibit::MANIFEST, exhibit::SUMS].iter().all(|name| changed.contains(name)));
            return;
        }
        Err(error) => panic!("memory can be read: {error}"),
    };
    assert_eq!(verdict.outcome == Outcome::Altered, !verdict.findings.is_empty());
    let sealed: Vec<&str> =
        changed.iter().copied().filter(|name| *name != exhibit::CUSTODY).collect();
    match sealed.as_slice() {
        // The custody log grows: a change to it may be a line more.
        [] if changed.is_empty() => assert_eq!(verdict.outcome, expected, "{verdict:?}"),
        [] => {}
        [one] => {
            assert_eq!(verdict.outcome, Outcome::Altered, "{one} was changed");
            let named = verdict.findings.iter().any(|finding| finding.place.file() == *one);
            assert!(named, "{one} was changed, but not named: {:?}", verdict.findings);
        }
        many => assert_eq!(verdict.outcome, Outcome::Altered, "{many:?} were changed"),
    }
}

/// Digests and sums made anew, if the manifest can still be read.
fn resealed(exhibit: &mut MemoryExhibit) -> Option<Verdict> {
    let manifest = synth::manifest(exhibit).ok()?;
    // A list of 2^26 blocks is allowed and takes more memory than a fuzzer has.
    if manifest.map.imaged_len() > 1 << 32 {
        return None;
    }
    synth::seal(exhibit, manifest).ok()?;
    verify(exhibit, &Options::default()).ok()
}

/// What was not called altered has the blocks that its records name, and their root.
fn check_plainly(exhibit: &MemoryExhibit, verdict: &Verdict) {
    let manifest = synth::manifest(exhibit).expect("it was read before");
    let (Some(image), false) = (&manifest.image, verdict.outcome == Outcome::Altered) else {
        return;
    };
    let records = synth::records(exhibit).expect("intact records are read");
    let layout = format::encode(image.format, Arch::X86_64, &manifest.map, &[]).expect("it fits");
    let bytes = exhibit.get(&image.file).expect("an intact exhibit has its image");
    for record in &records {
        let at = layout.segments.offset_of(record.range).expect("a block of the image");
        let at = usize::try_from(at).expect("a small image");
        let len = usize::try_from(record.range.len()).expect("at most 1 MiB");
        assert_eq!(sha256(&bytes[at..at + len]), record.sha256, "block {}", record.range);
    }
    let root = memory_root(records.iter().map(|r| (r.range, r.known(), r.sha256)));
    assert_eq!(manifest.memory_root, Some(root));
    let missing = block::cut(&manifest.map).expect("a small map").len() - records.len();
    assert!(missing == 0 || verdict.outcome == Outcome::Losses, "{missing} blocks have no record");
}

/// One edit: which file, what, where, with what.
fn edit_one(exhibit: &mut MemoryExhibit, mut edit: &[u8]) {
    let [file, what] = take(&mut edit);
    let at = u32::from_le_bytes(take(&mut edit));
    let [value, other] = take(&mut edit);
    let names: Vec<String> = exhibit.files.keys().cloned().collect();
    let pick = |number: u8| names.get(usize::from(number) % names.len().max(1)).cloned();
    let (Some(name), Some(other)) = (pick(file), pick(other)) else { return };
    let theirs = exhibit.get(&other).unwrap_or_default().to_vec();
    let bytes = exhibit.get_mut(&name).expect("a file that is there");
    let at = usize::try_from(at).unwrap_or(0) % (bytes.len() + 1);
    match what % 10 {
        0 => bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= value.max(1)),
        1 => bytes.truncate(at),
        2 => bytes.insert(at, value),
        3 => drop(bytes.drain(at..(at + usize::from(value)).min(bytes.len()))),
        4 => drop(exhibit.files.remove(&name)),
        5 => {
            let ours = std::mem::take(bytes);
            exhibit.put(other, ours);
            exhibit.put(name, theirs);
        }
        6 => {
            let new = ["x", "memory.raw", "a/b", ".x", "report.txt", "custody.jsonl", "\u{1b}[2J"];
            exhibit.put(new[usize::from(value) % new.len()], theirs);
        }
        7 => bytes.iter_mut().skip(at).zip(&theirs).take(value.into()).for_each(|(b, o)| *b = *o),
        // Numbers and words of texts stay what they are: these edits get past the parsers.
        8 => {
            let digit = bytes.iter_mut().skip(at).find(|byte| byte.is_ascii_digit());
            digit.into_iter().for_each(|digit| *digit = b'0' + value % 10);
        }
        _ => swap_words(bytes, at, value),
    }
}

/// Lets two words of a text, each between quotes, change places.
fn swap_words(bytes: &mut Vec<u8>, at: usize, skip: u8) {
    let quotes: Vec<usize> = (at..bytes.len()).filter(|&at| bytes[at] == b'"').take(600).collect();
    let word = |number: usize| Some((quotes.get(number)? + 1, *quotes.get(number + 1)?));
    let second = 2 + 2 * usize::from(skip);
    let (Some((a, b)), Some((c, d))) = (word(0), word(second)) else { return };
    let text = [&bytes[..a], &bytes[c..d], &bytes[b..c], &bytes[a..b], &bytes[d..]].concat();
    *bytes = text;
}

/// One edit of each kind, to several files, with and without new digests.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut out = vec![vec![0, 0], vec![1, 2], vec![2, 1], vec![0xf0, 0], vec![0xf1, 3]];
    for file in 0..8u8 {
        // Where neither memory nor a header lies.
        out.extend([0xf0, 0xf1].map(|base| vec![base, 0, file, 0, 0, 0, 8, 0, 1, 0]));
    }
    for what in 0..10u8 {
        for file in 0..8u8 {
            out.push(vec![
                file % 3,
                what % 2 * 2,
                file,
                what,
                what * 13,
                file,
                0,
                0,
                3 + what,
                file + 3,
            ]);
            out.push(vec![file % 3, 1, file, what, file * 29, what % 4, 0, 0, 2, 2]);
        }
    }
    out
}

/// An exhibit of some pages of memory. Its block records are a frame of plain text, so that edits
/// reach the records.
fn small(recipe: Recipe) -> Result<MemoryExhibit> {
    let mut exhibit = synth::build(Recipe { status: Status::Failed, ..recipe })?;
    let mut manifest = synth::manifest(&exhibit)?;
    manifest.status = recipe.status;
    if recipe.status == Status::Complete {
        manifest.end_reason = None;
    }
    manifest.window = Some(Span { t0_ns: 1_000_000, t1_ns: 3_000_000 });
    manifest.passes = vec![
        Pass { n: 1, t0_ns: 1_000_000, t1_ns: 2_000_000, bytes: 1 },
        Pass { n: 2, t0_ns: 2_000_000, t1_ns: 3_000_000, bytes: 1 },
    ];
    manifest.map = map()?;
    let layout = format::encode(recipe.format, Arch::X86_64, &manifest.map, &[])?;
    let mut image = vec![0; usize::try_from(layout.len)?];
    for piece in &layout.pieces {
        put_at(&mut image, piece.offset, &piece.bytes)?;
    }
    let (mut lines, mut records) = (Vec::new(), Vec::new());
    let (mut states, mut equal, mut changed) = (StateBytes::default(), 0, 0);
    for (range, number) in block::cut(&manifest.map)?.into_iter().zip(0u64..) {
        if recipe.status == Status::Partial && range.start() >= 0x10_0000 {
            let (gpa, len, kind) = (range.start(), range.len(), LossKind::NotReached);
            manifest.losses.push(Loss { gpa, len, kind, reason: "interrupted".into() });
            continue;
        }
        let (bytes, record) = make_up(range, number, recipe.losses)?;
        put_at(&mut image, layout.segments.offset_of(range).ok_or("no segment")?, &bytes)?;
        for (extent, state) in record.extents() {
            states.add(state, extent.len());
            if state == PageState::Unreadable {
                let (gpa, len, kind) = (extent.start(), extent.len(), LossKind::Unreadable);
                manifest.losses.push(Loss { gpa, len, kind, reason: "EIO".into() });
            }
        }
        changed += record.pages_changed();
        equal += record.pages_equal();
        lines.extend(serde_json::to_vec(&record)?);
        lines.push(b'\n');
        records.push(record);
    }
    exhibit.put(exhibit::BLOCKS, stored(&lines));
    let file = image_name(recipe.format);
    exhibit.put(file.as_str(), image);
    manifest.states = states;
    manifest.stable = Stable::new(equal, changed);
    manifest.memory_root =
        Some(memory_root(records.iter().map(|r| (r.range, r.known(), r.sha256))));
    let count = u64::try_from(records.len())?;
    manifest.blocks =
        Some(BlocksFile { file: exhibit::BLOCKS.into(), count, sha256: Digest::ZERO });
    manifest.image = Some(Image {
        file,
        format: recipe.format,
        len: layout.len,
        sha256: recipe.file_digest.then_some(Digest::ZERO),
        segments: u64::try_from(layout.segments.list().len())?,
        other_bytes_sha256: other_bytes_sha256(&layout),
    });
    synth::seal(&mut exhibit, manifest)?;
    assert!(exhibit.files.keys().filter(|name| sums::covers(name)).count() > 5);
    Ok(exhibit)
}

/// The regions of testkit's machine at addresses of our own.
fn map() -> Result<MemoryMap> {
    let places = [
        (0, 0x3000),
        (0x3000, 0x1000),
        (0x4000, 0x1000),
        (0x8000, 0x4000),
        (0xd_0800, 0x1800),
        (0xe_0000, 0x1000),
        (0xf_f000, 0x2800),
    ];
    let mut regions = synth::map()?.regions().to_vec();
    for (region, (gpa, len)) in regions.iter_mut().zip(places) {
        (region.gpa, region.len) = (gpa, len);
    }
    Ok(MemoryMap::new(regions)?)
}

/// A block's bytes and record; with losses, the last page of the block at 0x8000 is one.
fn make_up(range: Block, number: u64, losses: bool) -> Result<(Vec<u8>, BlockRecord)> {
    let all = [PageState::Data, PageState::Data, PageState::Zero, PageState::Hole, PageState::Data];
    let (mut bytes, mut states) = (Vec::new(), Vec::new());
    for (page, count) in pages(range).zip(0usize..) {
        let lost = losses && page.start() == 0xb000;
        let state = if lost { PageState::Unreadable } else { all[count % all.len()] };
        let byte = if state.has_bytes() { b'a' + u8::try_from(number)? } else { 0 };
        bytes.resize(bytes.len() + usize::try_from(page.len())?, byte);
        states.push(state);
    }
    let changed = if number == 1 { vec![PageRun(0, 1)] } else { Vec::new() };
    let record = BlockRecord {
        range,
        runs: runs(&states),
        sha256: sha256(&bytes),
        read: Span { t0_ns: 2_000_000, t1_ns: 2_000_900 },
        pass: 2,
        earlier: Some(Span { t0_ns: 1_000_000, t1_ns: 1_000_900 }),
        first: (!changed.is_empty()).then_some(Digest::ZERO),
        changed,
    };
    Ok((bytes, record))
}

fn put_at(image: &mut [u8], offset: u64, bytes: &[u8]) -> Result<()> {
    let start = usize::try_from(offset)?;
    let place = image.get_mut(start..start + bytes.len()).ok_or("outside the image")?;
    place.copy_from_slice(bytes);
    Ok(())
}
