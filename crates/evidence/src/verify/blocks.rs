//! The block records against the map, and the image against the block records.

use super::findings::{Findings, Place};
use super::witness::Witnesses;
use super::{LostBytes, Run, VerifyError, Work, read_error};
use crate::block::Blocks;
use crate::digest::{Digest, Hasher, MemoryRoot, other_bytes_sha256, sha256, sha256_of_zeros};
use crate::exhibit::{self, ExhibitDir, ExhibitFile, image_name, is_zero};
use crate::format::elf::Arch;
use crate::format::{self, FormatError};
use crate::manifest::{BlocksFile, Image, LossKind, Manifest, Stable, StateBytes, Status};
use crate::record::{RecordError, RecordReader};
use crate::state::PAGE;
use crate::{BLOCK_LEN, Block, BlockRecord, PageState, Segments};
use std::io::{self, SeekFrom};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

/// What the pass over the blocks found out.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Checked {
    pub(super) lost: LostBytes,
    pub(super) blocks: u64,
}

/// The digest of a block in a hole of the file.
static ZERO_BLOCK: LazyLock<Digest> = LazyLock::new(|| sha256_of_zeros(BLOCK_LEN));

/// Bytes that the file digest takes in one step.
const STEP: u64 = 1 << 20;

impl Run<'_> {
    /// The image, its block records, and what the manifest says of both.
    pub(super) fn check_image(
        &mut self,
        manifest: &Manifest,
        witnesses: &Witnesses,
    ) -> Result<Checked, VerifyError> {
        let (Some(image), Some(blocks)) = (&manifest.image, &manifest.blocks) else {
            return Ok(Checked::default());
        };
        let blocks_ok = self.check_blocks_file(blocks, witnesses)?;
        let expected = match Blocks::of(&manifest.map) {
            Ok(expected) => expected,
            Err(error) => {
                self.findings.field("map", error.to_string());
                return Ok(Checked::default());
            }
        };
        let records = match blocks_ok {
            Some(_) => {
                let records = RecordReader::new(self.open(exhibit::BLOCKS)?, expected.total());
                Some(records.map_err(|source| read_error(exhibit::BLOCKS, source))?)
            }
            None => None,
        };
        let name = image_name(image.format);
        let structure = match self.files.get(&name) {
            Some(&len) => Some(Structure::read(self.dir, &name, len, image, manifest)?),
            None => None,
        };
        if let Some(structure) = &structure {
            // The directory's lengths count the image once, for its file digest.
            let once = if image.sha256.is_some() { 0 } else { structure.len };
            let twice = self.work.total.saturating_add(manifest.map.imaged_len());
            self.work.total = twice.saturating_sub(once);
        }
        let feed = Mutex::new(Feed::new(records, expected, manifest));
        let pass = Pass {
            dir: self.dir,
            work: &self.work,
            name: &name,
            structure: structure.as_ref(),
            feed: &feed,
            problems: Mutex::new(Findings::default()),
            stop: AtomicBool::new(false),
        };
        let found = pass.run(self.options.threads, image.sha256.is_some())?;
        let mut problems = pass.problems.into_inner().unwrap_or_else(PoisonError::into_inner);
        let feed = feed.into_inner().unwrap_or_else(PoisonError::into_inner);

        let blamed = Blamed { blocks: blocks_ok == Some(true), manifest: witnesses.manifest_ok() };
        self.take_record_problems(&feed, manifest, blamed);
        let image_ok = found.is_some_and(|found| {
            let says = image.sha256.map(|sha256| (sha256 == found, "image.sha256"));
            witnesses.judge(&name, found, says, &mut self.findings)
        });
        let there = structure.is_some();
        if let Some(structure) = structure {
            problems.append(structure.problems);
        }
        self.take_image_problems(&name, problems, image_ok, blamed);
        let lost = feed.lost();
        Ok(Checked { lost, blocks: if there { feed.count } else { 0 } })
    }

    /// The file of the block records: `None` when it is missing, else whether it is confirmed.
    fn check_blocks_file(
        &mut self,
        blocks: &BlocksFile,
        witnesses: &Witnesses,
    ) -> Result<Option<bool>, VerifyError> {
        if !self.files.contains_key(exhibit::BLOCKS) {
            return Ok(None);
        }
        let (found, _) = self.digest(exhibit::BLOCKS)?;
        let says = Some((found == blocks.sha256, "blocks.sha256"));
        Ok(Some(witnesses.judge(exhibit::BLOCKS, found, says, &mut self.findings)))
    }

    /// Problems between records and manifest, put where the fault is.
    fn take_record_problems(&mut self, feed: &Feed, manifest: &Manifest, blamed: Blamed) {
        for (range, text) in &feed.problems {
            let place = match blamed {
                Blamed { blocks: true, manifest: false } => Place::of_field("map"),
                _ => Place::of_block(exhibit::BLOCKS, *range),
            };
            let text = match &place {
                Place::Field { .. } => format!("block {range} {text}"),
                _ => (*text).to_string(),
            };
            self.findings.add(place, text);
        }
        self.findings.add_more(feed.more_problems);
        if let Some((line, text)) = &feed.broken {
            match line {
                // A map that was cut leaves records over.
                _ if blamed.blocks && !blamed.manifest => self.findings.field("map", text.as_str()),
                Some(line) => self.findings.line(exhibit::BLOCKS, *line, text.as_str()),
                None => self.findings.file(exhibit::BLOCKS, text.as_str()),
            }
            // Totals over half of the records would only repeat it.
            return;
        }
        if feed.absent {
            return;
        }
        for (field, text) in feed.totals(manifest) {
            if blamed.blocks {
                self.findings.field(field, text);
            } else {
                self.findings.file(exhibit::BLOCKS, format!("does not fit {field}: {text}"));
            }
        }
    }

    /// Problems of the image, unless its own digest says that the fault is elsewhere.
    fn take_image_problems(
        &mut self,
        name: &str,
        problems: Findings,
        image_ok: bool,
        blamed: Blamed,
    ) {
        let elsewhere = image_ok && !(blamed.blocks && blamed.manifest);
        let Some(first) = problems.first().filter(|_| elsewhere) else {
            self.findings.append(problems);
            return;
        };
        let culprit = if blamed.blocks { exhibit::MANIFEST } else { exhibit::BLOCKS };
        let text = format!(
            "does not fit {name}, which has its recorded digest, in {} places, such as: {first}",
            problems.count()
        );
        self.findings.file(culprit, text);
    }
}

/// Which of the two that speak of the image are confirmed.
#[derive(Clone, Copy)]
struct Blamed {
    blocks: bool,
    manifest: bool,
}

/// Where memory lies in the image, and what is wrong with its headers.
struct Structure {
    segments: Segments,
    /// Parts of the file that hold neither memory nor headers.
    gaps: Vec<Range<u64>>,
    len: u64,
    problems: Findings,
}

impl Structure {
    /// Holds the file's own structure against the one that the map demands. Memory is looked for
    /// where the map puts it.
    fn read(
        dir: &dyn ExhibitDir,
        name: &str,
        len: u64,
        image: &Image,
        manifest: &Manifest,
    ) -> Result<Self, VerifyError> {
        let mut problems = Findings::default();
        if image.len != len {
            let text = format!("is {len} bytes long, the manifest says {}", image.len);
            problems.file(name, text);
        }
        let mut file = dir.open(name).map_err(|source| read_error(name, source))?;
        let decoded = match format::decode(image.format, &manifest.map, &mut file, len) {
            Ok(decoded) => Some(decoded),
            Err(FormatError::Read { source, .. })
                if source.kind() != io::ErrorKind::UnexpectedEof =>
            {
                return Err(read_error(name, source));
            }
            Err(error) => {
                problems.file(name, format!("its headers: {error}"));
                None
            }
        };
        let machine = decoded.as_ref().and_then(|decoded| decoded.machine);
        let arch = match machine {
            Some(machine) if machine == Arch::Aarch64.machine() => Arch::Aarch64,
            _ => Arch::X86_64,
        };
        let notes = decoded.as_ref().map(|decoded| decoded.notes.as_slice()).unwrap_or_default();
        let wanted = match format::encode(image.format, arch, &manifest.map, notes) {
            Ok(wanted) => wanted,
            Err(error) => {
                problems.file(name, format!("its format cannot hold the map: {error}"));
                return Ok(Self { segments: Segments::default(), gaps: Vec::new(), len, problems });
            }
        };
        let mut gaps = Vec::new();
        if let Some(decoded) = decoded {
            if decoded.layout == wanted {
                gaps = wanted.gaps();
            } else if decoded.layout.segments != wanted.segments {
                problems.file(name, "its headers put memory elsewhere than the map does");
            } else {
                problems.file(name, "its headers are not those that the map demands");
            }
            if other_bytes_sha256(&decoded.layout) != image.other_bytes_sha256 {
                problems.file(name, "its headers and notes do not have the recorded digest");
            }
        }
        let segments = u64::try_from(wanted.segments.list().len()).unwrap_or(u64::MAX);
        if segments != image.segments {
            let text = format!("has {segments} segments, the manifest says {}", image.segments);
            problems.file(name, text);
        }
        Ok(Self { segments: wanted.segments, gaps, len, problems })
    }
}

/// What a worker does next.
enum Task {
    /// Hold the image against the record.
    Check(BlockRecord),
    /// The block has no record: the image must be zero there.
    Zeros(Block),
}

/// Hands the records out in order, and sums them up as they pass: one is in memory at a time.
struct Feed {
    records: Option<RecordReader<Box<dyn ExhibitFile>>>,
    pending: Option<BlockRecord>,
    expected: Blocks,
    partial: bool,
    window: Option<crate::record::Span>,
    passes: usize,
    root: MemoryRoot,
    states: StateBytes,
    pages_equal: u64,
    pages_changed: u64,
    count: u64,
    missing: u64,
    absent: bool,
    broken: Option<(Option<u64>, String)>,
    problems: Vec<(Block, &'static str)>,
    more_problems: u64,
}

impl Feed {
    fn new(
        records: Option<RecordReader<Box<dyn ExhibitFile>>>,
        expected: Blocks,
        manifest: &Manifest,
    ) -> Self {
        Self {
            absent: records.is_none(),
            records,
            pending: None,
            expected,
            partial: manifest.status == Status::Partial,
            window: manifest.window,
            passes: manifest.passes.len(),
            root: MemoryRoot::default(),
            states: StateBytes::default(),
            pages_equal: 0,
            pages_changed: 0,
            count: 0,
            missing: 0,
            broken: None,
            problems: Vec::new(),
            more_problems: 0,
        }
    }

    /// The next task; `None` at the end. What lies behind a broken record is not handed out.
    fn next(&mut self) -> Option<Task> {
        loop {
            let record = match self.pending.take() {
                Some(record) => Some(record),
                None => self.read(),
            };
            if self.broken.is_some() || self.absent {
                return None;
            }
            let next = self.expected.peek();
            let Some(record) = record else {
                match next.map(|block| self.without_record(block)) {
                    Some(None) => continue,
                    task => return task.flatten(),
                }
            };
            if next == Some(record.range) {
                self.expected.next();
                self.count_in(&record);
                return Some(Task::Check(record));
            }
            if self.expected.will_come(record.range) {
                self.pending = Some(record);
                if let Some(task) = next.and_then(|block| self.without_record(block)) {
                    return Some(task);
                }
            } else {
                self.problem(record.range, "has a record but is no block of the map");
            }
        }
    }

    fn read(&mut self) -> Option<BlockRecord> {
        match self.records.as_mut()?.next()? {
            Ok(record) => Some(record),
            Err(error) => {
                self.broken = Some(match error {
                    RecordError::Line { line, why } => (Some(line), why),
                    RecordError::Io(error) => (None, format!("cannot be decompressed: {error}")),
                    other => (None, other.to_string()),
                });
                None
            }
        }
    }

    /// Passes over a block. A partial acquisition did not reach it, so the image is zero there; a
    /// complete one is not complete then.
    fn without_record(&mut self, block: Block) -> Option<Task> {
        self.expected.next();
        self.missing = self.missing.saturating_add(block.len());
        if self.partial {
            return Some(Task::Zeros(block));
        }
        self.problem(block, "has no record");
        None
    }

    fn count_in(&mut self, record: &BlockRecord) {
        self.count += 1;
        self.root.add(record.range, record.known(), record.sha256);
        for (range, state) in record.extents() {
            self.states.add(state, range.len());
        }
        if record.earlier.is_some() {
            self.pages_changed = self.pages_changed.saturating_add(record.pages_changed());
            self.pages_equal = self.pages_equal.saturating_add(record.pages_equal());
        }
        if self.window.is_some_and(|window| !window.covers(record.span())) {
            self.problem(record.range, "was read outside the window");
        }
        if usize::try_from(record.pass).is_ok_and(|pass| pass > self.passes) {
            self.problem(record.range, "was read in a pass that there was not");
        }
    }

    fn problem(&mut self, block: Block, text: &'static str) {
        if self.problems.len() < super::MAX_FINDINGS {
            self.problems.push((block, text));
        } else {
            self.more_problems = self.more_problems.saturating_add(1);
        }
    }

    /// What the records add up to, where the manifest says otherwise.
    fn totals(&self, manifest: &Manifest) -> Vec<(&'static str, String)> {
        let mut out = Vec::new();
        if let Some(blocks) = &manifest.blocks
            && blocks.count != self.count
        {
            out.push(("blocks.count", format!("there are {} records", self.count)));
        }
        let root = self.root.clone().finish();
        if manifest.memory_root != Some(root) {
            out.push(("memory_root", format!("that of the records is {root}")));
        }
        if manifest.states != self.states {
            out.push(("states", format!("the records add up to {:?}", self.states)));
        }
        let counts = |stable: Stable| (stable.pages_equal, stable.pages_changed);
        // Of a guest that was followed only what had been written was read again.
        let stable = match manifest.tracking {
            Some(_) => None,
            None => Stable::new(self.pages_equal, self.pages_changed).map(counts),
        };
        if manifest.stable.map(counts) != stable {
            let text = format!(
                "by the records {} pages were equal and {} had changed",
                self.pages_equal, self.pages_changed
            );
            out.push(("stable", text));
        }
        if self.partial && manifest.lost(LossKind::NotReached) != self.missing {
            out.push(("losses", format!("{} bytes have no record", self.missing)));
        }
        out
    }

    fn lost(&self) -> LostBytes {
        LostBytes {
            unreadable: self.states.unreadable,
            excluded: self.states.excluded,
            not_reached: self.missing,
        }
    }
}

/// One pass of all workers over the image.
struct Pass<'a> {
    dir: &'a dyn ExhibitDir,
    work: &'a Work<'a>,
    name: &'a str,
    structure: Option<&'a Structure>,
    feed: &'a Mutex<Feed>,
    problems: Mutex<Findings>,
    stop: AtomicBool,
}

impl Pass<'_> {
    /// Runs `threads` workers; the first also makes the file digest when `whole` asks for it.
    fn run(&self, threads: usize, whole: bool) -> Result<Option<Digest>, VerifyError> {
        std::thread::scope(|scope| {
            let helpers: Vec<_> = (1..threads)
                .map(|_| scope.spawn(|| self.stopping(|| self.check_blocks())))
                .collect();
            let mut first = self.stopping(|| {
                let digest = if whole { self.digest_file()? } else { None };
                self.check_gaps()?;
                self.check_blocks()?;
                Ok(digest)
            });
            for helper in helpers {
                match helper.join() {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => first = first.and(Err(error)),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            first
        })
    }

    /// Runs `work`; its error stops all workers.
    fn stopping<T>(&self, work: impl FnOnce() -> Result<T, VerifyError>) -> Result<T, VerifyError> {
        let result = work();
        if result.is_err() {
            self.stop.store(true, Ordering::Relaxed);
        }
        result
    }

    fn error(&self, source: io::Error) -> VerifyError {
        read_error(self.name, source)
    }

    fn open(&self) -> Result<Box<dyn ExhibitFile>, VerifyError> {
        self.dir.open(self.name).map_err(|source| self.error(source))
    }

    fn problems(&self) -> MutexGuard<'_, Findings> {
        self.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// SHA-256 of the whole file; its holes are not read.
    fn digest_file(&self) -> Result<Option<Digest>, VerifyError> {
        let Some(structure) = self.structure else { return Ok(None) };
        let mut file = self.open()?;
        let mut hasher = Hasher::default();
        let mut buf = Vec::new();
        let (zeros, mut at, mut data) = (vec![0; 1 << 20], 0, 0);
        while at < structure.len && !self.stop.load(Ordering::Relaxed) {
            if data <= at {
                let next = file.next_data(at).map_err(|source| self.error(source))?;
                data = next.unwrap_or(structure.len).clamp(at, structure.len);
            }
            let hole = data > at;
            let step = if hole { data - at } else { structure.len - at }.min(STEP);
            let len = usize::try_from(step).unwrap_or(0);
            if hole {
                hasher.update(zeros.get(..len).unwrap_or(&zeros));
            } else {
                buf.resize(len, 0);
                let read = read_at(file.as_mut(), at, &mut buf);
                hasher.update(buf.get(..read.map_err(|s| self.error(s))?).unwrap_or_default());
            }
            at += step;
            self.work.add(step);
        }
        Ok(Some(hasher.finish()))
    }

    /// What is neither memory nor header must be zero.
    fn check_gaps(&self) -> Result<(), VerifyError> {
        let Some(structure) = self.structure.filter(|s| !s.gaps.is_empty()) else { return Ok(()) };
        let mut file = self.open()?;
        for gap in &structure.gaps {
            if let Some(at) = first_byte(file.as_mut(), gap.clone()).map_err(|s| self.error(s))? {
                let place = Place::Bytes { file: self.name.into(), offset: at, len: 1 };
                let text = "is not zero, though neither memory nor a header lies there";
                self.problems().add(place, text);
            }
        }
        Ok(())
    }

    /// Takes tasks until there are none.
    fn check_blocks(&self) -> Result<(), VerifyError> {
        let mut file = match self.structure {
            Some(_) => Some(self.open()?),
            None => None,
        };
        let mut buf = Vec::new();
        while !self.stop.load(Ordering::Relaxed) {
            let task = self.feed.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(task) = task else { break };
            let (Some(structure), Some(file)) = (self.structure, file.as_mut()) else { continue };
            let range = match &task {
                Task::Check(record) => record.range,
                Task::Zeros(block) => *block,
            };
            let read = read_block(file.as_mut(), structure, range, &mut buf);
            let problem = match (read.map_err(|source| self.error(source))?, &task) {
                (Bytes::Outside, _) => Some("lies outside the file".into()),
                (Bytes::Hole, Task::Zeros(_)) => None,
                (Bytes::Hole, Task::Check(record)) => check_hole(record),
                (Bytes::Read, Task::Zeros(_)) => {
                    (!is_zero(&buf)).then(|| "holds bytes, though it was not reached".into())
                }
                (Bytes::Read, Task::Check(record)) => check_bytes(record, &buf),
            };
            if let Some(text) = problem {
                self.problems().add(Place::of_block(self.name, range), text);
            }
            self.work.add(range.len());
        }
        Ok(())
    }
}

/// What the file has of a block.
enum Bytes {
    /// Its bytes, in the buffer.
    Read,
    /// A hole: all zero.
    Hole,
    /// The file ends before the block does.
    Outside,
}

fn read_block(
    file: &mut dyn ExhibitFile,
    structure: &Structure,
    range: Block,
    buf: &mut Vec<u8>,
) -> io::Result<Bytes> {
    let Some(offset) = structure.segments.offset_of(range) else { return Ok(Bytes::Outside) };
    let Some(end) = offset.checked_add(range.len()).filter(|&end| end <= structure.len) else {
        return Ok(Bytes::Outside);
    };
    if file.next_data(offset)?.is_none_or(|data| data >= end) {
        return Ok(Bytes::Hole);
    }
    // A block is at most 1 MiB.
    buf.resize(usize::try_from(range.len()).unwrap_or(0), 0);
    let read = read_at(file, offset, buf)?;
    Ok(if read == buf.len() { Bytes::Read } else { Bytes::Outside })
}

/// Reads at `offset` until `buf` is full or the file ends; the number of bytes read.
fn read_at(file: &mut dyn ExhibitFile, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    file.seek(SeekFrom::Start(offset))?;
    let mut filled = 0;
    while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read(rest) {
            Ok(0) => break,
            Ok(read) => filled = filled.saturating_add(read),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Offset of the first byte of `span` that is not zero.
fn first_byte(file: &mut dyn ExhibitFile, span: Range<u64>) -> io::Result<Option<u64>> {
    let (mut at, mut buf) = (span.start, vec![0; 1 << 16]);
    while at < span.end {
        at = match file.next_data(at)? {
            Some(data) if data < span.end => data.max(at),
            _ => return Ok(None),
        };
        let len = usize::try_from(span.end - at).unwrap_or(buf.len()).min(buf.len());
        let read = read_at(file, at, buf.get_mut(..len).unwrap_or_default())?;
        if read == 0 {
            return Ok(None);
        }
        let found = buf.iter().take(read).position(|&byte| byte != 0);
        if let Some(found) = found.and_then(|found| u64::try_from(found).ok()) {
            return Ok(Some(at + found));
        }
        at += u64::try_from(read).unwrap_or(1);
    }
    Ok(None)
}

/// A block that is a hole of the file, against its record.
fn check_hole(record: &BlockRecord) -> Option<String> {
    let found = match record.range.len() {
        BLOCK_LEN => *ZERO_BLOCK,
        len => sha256_of_zeros(len),
    };
    if found != record.sha256 {
        return Some(format!("is all zero, its recorded SHA-256 is {}", record.sha256));
    }
    let data = record.extents().find(|(_, state)| state.has_bytes());
    data.map(|(range, _)| format!("is all zero, the record has data in {range}"))
}

/// The bytes of a block against its record.
fn check_bytes(record: &BlockRecord, bytes: &[u8]) -> Option<String> {
    let wrong_page = wrong_page(record, bytes);
    let found = sha256(bytes);
    if found != record.sha256 {
        let page = wrong_page.map(|text| format!("; {text}")).unwrap_or_default();
        return Some(format!("its SHA-256 is {found}, recorded is {}{page}", record.sha256));
    }
    wrong_page
}

/// The first page whose bytes are not as its state has them.
fn wrong_page(record: &BlockRecord, bytes: &[u8]) -> Option<String> {
    let mut rest = bytes;
    for (range, state) in record.pages() {
        let (page, behind) = rest.split_at_checked(usize::try_from(range.len()).ok()?)?;
        rest = behind;
        if is_zero(page) == state.has_bytes() {
            let start = range.start() / PAGE * PAGE;
            return Some(match state {
                PageState::Data => format!("page {start:#x} is all zero, recorded as data"),
                _ => format!("page {start:#x} holds bytes, recorded as {}", word(state)),
            });
        }
    }
    None
}

fn word(state: PageState) -> &'static str {
    match state {
        PageState::Data => "data",
        PageState::Zero => "zero",
        PageState::Hole => "a hole",
        PageState::Discarded => "discarded",
        PageState::Unreadable => "unreadable",
        PageState::Excluded => "excluded",
    }
}
