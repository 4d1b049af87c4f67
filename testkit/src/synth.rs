//! A good exhibit, made up.

use crate::random::SplitMix;
use evidence::digest::{Digest, MemoryRoot, other_bytes_sha256, sha256};
use evidence::exhibit::{self, MemoryExhibit, image_name};
use evidence::format::elf::{Arch, Note};
use evidence::format::{self, Format};
use evidence::journal::Journal;
use evidence::manifest::{
    BlocksFile, Case, Change, Class, Clock, FileRecord, Footprint, Host, Image, JournalFile, Loss,
    LossKind, Manifest, MapCheck, Method, Operator, Pass, SCHEMA, Stable, StateBytes, Status,
    StoreKind, Tool, VOLATILE, Vm,
};
use evidence::map::Mapping;
use evidence::record::{PageRun, RecordReader, RecordWriter, Span};
use evidence::state::{pages, runs};
use evidence::sums::{self, Sum};
use evidence::{Block, BlockRecord, GuestRange, Kind, MemoryMap, PageState, Region, block};
use serde_json::json;
use std::error::Error;

/// Any error: a recipe that cannot be carried out is a mistake in the test that asks for it.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A page that the host could not read, when the recipe has losses.
pub const UNREADABLE_PAGE: u64 = 0x30_5000;

/// The first address that a partial acquisition did not reach.
pub const NOT_REACHED: u64 = 0x100_0000;

/// What kind of good exhibit.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// The image's format.
    pub format: Format,
    /// Whether the image has a digest of its own.
    pub file_digest: bool,
    /// Complete, or partial: then memory from [`NOT_REACHED`] on was not read; or failed: then
    /// there is no image.
    pub status: Status,
    /// Whether [`UNREADABLE_PAGE`] could not be read.
    pub losses: bool,
    /// Whether a custody log and reports were added later.
    pub added_later: bool,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            format: Format::Elf,
            file_digest: true,
            status: Status::Complete,
            losses: false,
            added_later: false,
        }
    }
}

/// The made-up machine's memory: 16 MiB in the image, some of it cut at odd places, and a flash
/// region that is not in it.
///
/// # Errors
/// None: the regions are in order.
pub fn map() -> Result<MemoryMap> {
    let region = |gpa, len, kind, name: &str| Region {
        gpa,
        len,
        kind,
        name: name.into(),
        owner: None,
        block: Some(name.into()),
        block_offset: 0,
        mapping: (kind != Kind::Romd).then_some(Mapping::Anonymous),
        page_size: (kind != Kind::Romd).then_some(4096),
        readonly: kind == Kind::Rom,
    };
    Ok(MemoryMap::new(vec![
        region(0, 0xa_0000, Kind::Ram, "pc.ram"),
        region(0xa_0000, 0x2_0000, Kind::DeviceRam, "vga.vram"),
        region(0xc_0000, 0x4_0000, Kind::Rom, "pc.rom"),
        region(0x10_0000, 0xb0_0000, Kind::Ram, "pc.ram"),
        region(0xd0_0800, 0x1800, Kind::Rom, "odd.rom"),
        region(0xe0_0000, 0x20_0000, Kind::Romd, "system.flash0"),
        region(NOT_REACHED, 0x3f_e800, Kind::Ram, "dimm0"),
    ])?)
}

/// The exhibit of `recipe`.
///
/// # Errors
/// Whatever the evidence crate says of its own writers.
pub fn build(recipe: Recipe) -> Result<MemoryExhibit> {
    let mut exhibit = MemoryExhibit::default();
    exhibit.put(exhibit::MAP_BEFORE, "FlatView #0\n  0000000000000000-000000000009ffff pc.ram\n");
    exhibit.put(exhibit::MAP_AFTER, "FlatView #1\n  0000000000000000-000000000009ffff pc.ram\n");
    exhibit.put("registers.json", "[]\n");
    write_journal(&mut exhibit)?;
    let mut manifest = blank_manifest()?;
    manifest.status = recipe.status;
    if recipe.status != Status::Complete {
        manifest.end_reason = Some("interrupted".into());
    }
    if recipe.status == Status::Failed {
        (manifest.window, manifest.passes) = (None, Vec::new());
    } else {
        write_image(&mut exhibit, &mut manifest, recipe)?;
    }
    seal(&mut exhibit, manifest)?;
    if recipe.added_later {
        add_later(&mut exhibit)?;
    }
    Ok(exhibit)
}

/// Reads the manifest of `exhibit`.
///
/// # Errors
/// When there is none or it cannot be read.
pub fn manifest(exhibit: &MemoryExhibit) -> Result<Manifest> {
    Ok(Manifest::parse(exhibit.get(exhibit::MANIFEST).ok_or("no manifest")?)?)
}

/// Reads the block records of `exhibit`.
///
/// # Errors
/// When there are none or they cannot be read.
pub fn records(exhibit: &MemoryExhibit) -> Result<Vec<BlockRecord>> {
    let bytes = exhibit.get(exhibit::BLOCKS).ok_or("no block records")?;
    Ok(RecordReader::new(bytes, block::MAX_BLOCKS)?.collect::<std::result::Result<_, _>>()?)
}

/// Puts block records in place.
///
/// # Errors
/// When they are not in order or contradict themselves.
pub fn put_records(exhibit: &mut MemoryExhibit, records: &[BlockRecord]) -> Result<()> {
    let mut out = RecordWriter::new(Vec::new())?;
    for record in records {
        out.push(record)?;
    }
    exhibit.put(exhibit::BLOCKS, out.finish()?.0);
    Ok(())
}

/// Writes `manifest` and `SHA256SUMS` with the digests that the files now have: what the tool does
/// at the end, and what a forger does.
///
/// # Errors
/// When a file that the manifest names is missing.
pub fn seal(exhibit: &mut MemoryExhibit, mut manifest: Manifest) -> Result<()> {
    let digest = |exhibit: &MemoryExhibit, name: &str| -> Result<(Digest, u64)> {
        let bytes = exhibit.get(name).ok_or_else(|| format!("no {name}"))?;
        Ok((sha256(bytes), u64::try_from(bytes.len())?))
    };
    let checked = [&mut manifest.map_check.before, &mut manifest.map_check.after];
    for file in checked.into_iter().flatten().chain(&mut manifest.attachments) {
        (file.sha256, file.len) = digest(exhibit, &file.file)?;
    }
    if let Some(blocks) = &mut manifest.blocks {
        blocks.sha256 = digest(exhibit, exhibit::BLOCKS)?.0;
    }
    if let Some(image) = &mut manifest.image {
        let (sha256, len) = digest(exhibit, &image.file)?;
        image.len = len;
        image.sha256 = image.sha256.map(|_| sha256);
    }
    exhibit.put(exhibit::MANIFEST, manifest.to_json()?);
    put_sums(exhibit, &manifest);
    Ok(())
}

/// Writes `SHA256SUMS` with the digests that the files now have.
pub fn put_sums(exhibit: &mut MemoryExhibit, manifest: &Manifest) {
    let left_out = manifest.image.as_ref().filter(|image| image.sha256.is_none());
    let covered =
        |name: &str| sums::covers(name) && left_out.is_none_or(|image| image.file != name);
    let files = exhibit.files.iter().filter(|(name, _)| covered(name));
    let sums = files.map(|(name, bytes)| Sum { name: name.clone(), sha256: sha256(bytes) });
    let text = sums::write(sums.collect());
    exhibit.put(exhibit::SUMS, text);
}

/// One block's bytes and record.
struct MadeUp {
    bytes: Vec<u8>,
    record: BlockRecord,
}

/// Makes up a block. A quarter of the blocks are all hole, in the others runs of pages of every
/// state; some pages differed between the two reads.
fn make_up(range: Block, number: u64, recipe: Recipe) -> Result<MadeUp> {
    let mut random = SplitMix(range.start() ^ 0x5f);
    let hole = number % 4 == 3;
    let (mut bytes, mut states, mut state) = (Vec::new(), Vec::new(), PageState::Data);
    for page in pages(range) {
        if random.below(6) == 0 {
            let all = [PageState::Data, PageState::Zero, PageState::Hole, PageState::Discarded];
            state = all.get(random.below(all.len())).copied().unwrap_or(state);
        }
        let lost = recipe.losses && page.start() == UNREADABLE_PAGE;
        let this = match (lost, hole) {
            (true, _) => PageState::Unreadable,
            (_, true) => PageState::Hole,
            _ => state,
        };
        states.push(this);
        let len = usize::try_from(page.len())?;
        if this == PageState::Data {
            let words = std::iter::repeat_with(|| (random.next_u64() | 1).to_le_bytes());
            bytes.extend(words.flatten().take(len));
        } else {
            bytes.resize(bytes.len() + len, 0);
        }
    }
    let changed = if number % 3 == 1 { vec![PageRun(0, 1)] } else { Vec::new() };
    let at = |pass: u64| pass * 1_000_000 + number * 1_000;
    let record = BlockRecord {
        range,
        runs: runs(&states),
        sha256: sha256(&bytes),
        read: Span { t0_ns: at(2), t1_ns: at(2) + 900 },
        pass: 2,
        earlier: Some(Span { t0_ns: at(1), t1_ns: at(1) + 900 }),
        first: (!changed.is_empty()).then(|| sha256(&number.to_le_bytes())),
        changed,
    };
    Ok(MadeUp { bytes, record })
}

/// Writes image and block records, and what the manifest says of both.
fn write_image(exhibit: &mut MemoryExhibit, manifest: &mut Manifest, recipe: Recipe) -> Result<()> {
    let notes = [Note { name: "VMCOREINFO".into(), kind: 0, desc: b"OSRELEASE=6.1\n".to_vec() }];
    let layout = format::encode(recipe.format, Arch::X86_64, &manifest.map, &notes)?;
    let mut image = vec![0; usize::try_from(layout.len)?];
    for piece in &layout.pieces {
        put_at(&mut image, piece.offset, &piece.bytes)?;
    }
    let (mut records, mut root) = (Vec::new(), MemoryRoot::default());
    let (mut states, mut equal, mut changed) = (StateBytes::default(), 0, 0);
    for (range, number) in block::cut(&manifest.map)?.into_iter().zip(0u64..) {
        if recipe.status == Status::Partial && range.start() >= NOT_REACHED {
            let (gpa, len, kind) = (range.start(), range.len(), LossKind::NotReached);
            manifest.losses.push(Loss { gpa, len, kind, reason: "interrupted".into() });
            continue;
        }
        let MadeUp { bytes, record } = make_up(range, number, recipe)?;
        put_at(&mut image, layout.segments.offset_of(range).ok_or("no segment")?, &bytes)?;
        root.add(range, record.known(), record.sha256);
        for (extent, state) in record.extents() {
            states.add(state, extent.len());
            if state == PageState::Unreadable {
                let (gpa, len, kind) = (extent.start(), extent.len(), LossKind::Unreadable);
                manifest.losses.push(Loss { gpa, len, kind, reason: "EIO".into() });
            }
        }
        changed += record.pages_changed();
        equal += record.pages_equal();
        records.push(record);
    }
    put_records(exhibit, &records)?;
    let file = image_name(recipe.format);
    exhibit.put(file.as_str(), image);
    let none = Digest::ZERO;
    manifest.states = states;
    manifest.stable = Stable::new(equal, changed);
    manifest.memory_root = Some(root.finish());
    manifest.blocks = Some(BlocksFile {
        file: exhibit::BLOCKS.into(),
        count: u64::try_from(records.len())?,
        sha256: none,
    });
    manifest.image = Some(Image {
        file,
        format: recipe.format,
        len: layout.len,
        sha256: recipe.file_digest.then_some(none),
        segments: u64::try_from(layout.segments.list().len())?,
        other_bytes_sha256: other_bytes_sha256(&layout),
    });
    Ok(())
}

fn put_at(image: &mut [u8], offset: u64, bytes: &[u8]) -> Result<()> {
    let start = usize::try_from(offset)?;
    let place = image.get_mut(start..start + bytes.len()).ok_or("outside the image")?;
    place.copy_from_slice(bytes);
    Ok(())
}

fn write_journal(exhibit: &mut MemoryExhibit) -> Result<()> {
    let mut journal = Journal::new(Vec::new());
    let steps = ["started", "found", "map-taken", "window-opened", "window-closed", "map-taken"];
    for (step, number) in steps.into_iter().zip(0u64..) {
        let data = serde_json::from_value(json!({"pid": 4711, "step": number}))?;
        journal.append(number * 1_000, &format!("2026-11-22T21:30:0{number}Z"), step, data)?;
    }
    exhibit.put(exhibit::JOURNAL, journal.into_inner());
    Ok(())
}

fn add_later(exhibit: &mut MemoryExhibit) -> Result<()> {
    let mut custody = Journal::following(Vec::new(), manifest(exhibit)?.journal.head);
    for (what, number) in ["verified", "exported", "transferred"].into_iter().zip(0u64..) {
        custody.append(number, "2026-11-23T08:00:00Z", what, serde_json::Map::new())?;
    }
    exhibit.put(exhibit::CUSTODY, custody.into_inner());
    exhibit.put(exhibit::REPORT_TXT, "report\n");
    exhibit.put(exhibit::REPORT_HTML, "<!doctype html>\n");
    exhibit.put(exhibit::MANIFEST_SIG, "signature\n");
    Ok(())
}

/// A manifest without image; digests are filled in by [`seal`].
fn blank_manifest() -> Result<Manifest> {
    let file = |name: &str| FileRecord { file: name.into(), len: 0, sha256: Digest::ZERO };
    let mut manifest = Manifest {
        schema: SCHEMA.into(),
        record_id: "3f2a0000-0000-7000-8000-00000000002a".into(),
        status: Status::Complete,
        end_reason: None,
        class: Class::None,
        method: Method::Live,
        tau: None,
        hold: None,
        audit: None,
        tracking: None,
        snapshot: None,
        slices: None,
        dump: None,
        registers: None,
        case: Case { number: Some("2026-117".into()), ..Case::default() },
        operator: Operator {
            uid: 0,
            euid: 0,
            gid: 0,
            loginuid: None,
            user: Some("root".into()),
            sudo_user: None,
            tty: None,
        },
        clock: Clock {
            utc_start: "2026-11-22T21:30:00Z".into(),
            utc_end: "2026-11-22T21:30:09Z".into(),
            mono_end_ns: 9_000_000_000,
            synchronised: Some(true),
            estimated_error_us: Some(20),
            max_error_us: Some(2_000),
            step_us: Some(0),
            local_offset_s: Some(0),
        },
        tool: Tool {
            name: "stillframe".into(),
            version: "0.1.0".into(),
            target: "x86_64-unknown-linux-gnu".into(),
            exe_sha256: None,
            argv: vec!["stillframe".into(), "acquire".into(), "web-07".into()],
        },
        processes: Vec::new(),
        host: Host {
            hostname: "host-1".into(),
            kernel: "6.1.0".into(),
            machine: "x86_64".into(),
            distribution: None,
            boot_id: "1d0c3a52-6f3c-4b8e-9b44-0f4f4f4a4b4c".into(),
            cpus: 2,
            mem_total: 8 << 30,
        },
        vm: Vm {
            name: "web-07".into(),
            uuid: None,
            pid: 4711,
            start_time_ticks: 123_456,
            exe: "/usr/bin/qemu-system-x86_64".into(),
            exe_sha256: None,
            qemu_version: "10.0.2".into(),
            machine: "pc-q35-10.0".into(),
            arch: "x86_64".into(),
            accelerator: "tcg".into(),
            cpus: 1,
            cmdline: vec!["qemu-system-x86_64".into()],
            monitor: "/run/web-07.qmp".into(),
            run_state_before: "running".into(),
            run_state_after: Some("running".into()),
        },
        map: map()?,
        map_check: MapCheck {
            before: Some(file(exhibit::MAP_BEFORE)),
            after: Some(file(exhibit::MAP_AFTER)),
            equal: Some(true),
        },
        decisions: Vec::new(),
        amount: None,
        parameters: serde_json::Map::new(),
        window: Some(Span { t0_ns: 1_000_000, t1_ns: 3_000_000 }),
        passes: vec![
            Pass { n: 1, t0_ns: 1_000_000, t1_ns: 2_000_000, bytes: 8 << 20 },
            Pass { n: 2, t0_ns: 2_000_000, t1_ns: 3_000_000, bytes: 8 << 20 },
        ],
        stable: None,
        states: StateBytes::default(),
        losses: Vec::new(),
        store: StoreKind::Ram,
        image: None,
        memory_root: None,
        blocks: None,
        journal: JournalFile { file: exhibit::JOURNAL.into(), lines: 6, head: Digest::ZERO },
        attachments: vec![file("registers.json")],
        footprint: Footprint::default(),
        changes_made: vec![Change {
            what: "one connection to the monitor, closed".into(),
            why: "the map comes from QEMU".into(),
        }],
        disturbances: Vec::new(),
        caveats: Vec::new(),
        limitations: vec![VOLATILE.into()],
        warnings: Vec::new(),
    };
    let mut journal = MemoryExhibit::default();
    write_journal(&mut journal)?;
    let mut text = journal.get(exhibit::JOURNAL).unwrap_or_default();
    manifest.journal.head = evidence::journal::check(&mut text, Digest::ZERO)?.head;
    Ok(manifest)
}

/// The block of the made-up machine that holds `gpa`.
///
/// # Errors
/// When none does.
pub fn block_at(gpa: u64) -> Result<GuestRange> {
    let blocks = block::cut(&map()?)?;
    blocks.into_iter().find(|block| block.contains(gpa)).ok_or_else(|| "no block".into())
}
