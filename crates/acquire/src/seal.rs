//! Seal: the store's bytes become the image, and every byte of it gets its digest.
//!
//! The same loop as capture, from the store to the image. With a disk store the image *is* the
//! store: blocks are read back, hashed and their zero pages given back to the filesystem.

pub mod process;
pub mod table;

use crate::copy::{self, Cell, Changed, Cut, Item, Scratch, Setting};
use crate::event::{Event, Observer, Phase};
use crate::guard::Guarded;
use crate::method::process::{bit, page_runs, page_spans};
use crate::seal::table::{Entry, Table};
use crate::stop::Stop;
use evidence::Block;
use evidence::block::BLOCK_LEN;
use evidence::digest::{
    Digest, Hasher, HashingWriter, MemoryRoot, other_bytes_sha256, sha256, sha256_of_zeros,
};
use evidence::exhibit;
use evidence::format::Layout;
use evidence::manifest::Manifest;
use evidence::record::{BlockRecord, PageRun, RecordError, RecordWriter};
use evidence::sums::{self, Sum};
use evidence::{GuestRange, PageState};
use host::exhibit_dir::ExhibitError;
use host::{DiskStore, Store};
use std::io::{self, Write};
use std::ops::Range;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// Why sealing failed. The guest is not involved any more.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The image did not take bytes.
    #[error("cannot write the image at {at}")]
    Image {
        /// The block.
        at: GuestRange,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// The image did not take its head.
    #[error("cannot write the image's {what}")]
    Piece {
        /// The piece.
        what: &'static str,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// A file of the exhibit could not be made.
    #[error("cannot make {name}")]
    File {
        /// The file.
        name: &'static str,
        /// Why.
        #[source]
        cause: ExhibitError,
    },
    /// The image could not be made durable, or read back for its digest.
    #[error("cannot {what} the image")]
    Whole {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// The table of blocks could not be read or written.
    #[error("the table of blocks cannot be used")]
    Table(#[source] io::Error),
    /// The process that seals could not do it.
    #[error("the process that seals {0}")]
    Process(String),
    /// The block records were not taken.
    #[error("cannot write the block records")]
    Records(#[from] RecordError),
}

/// Where the image is written.
pub enum Image<'a> {
    /// A file beside the store.
    Apart(&'a DiskStore),
    /// The store is the image.
    InPlace(&'a DiskStore),
}

/// A block that is to be sealed: its number in the table and its addresses.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// The entry.
    pub number: u64,
    /// The block.
    pub block: Block,
}

impl Item for Slot {
    fn bytes(&self) -> u64 {
        self.block.len()
    }

    fn cost(&self) -> u64 {
        self.block.len()
    }
}

/// Seals blocks without a byte: their digest is known, and space that was set aside for them is given back. So a guest
/// costs what it has and not what it could have. Gives them back; the others stay in `cells`, with those that may
/// have something in place all the same, as a process leaves that was ended before it could say so.
pub fn empty(cells: &mut Vec<Cell>, image: &DiskStore, in_place: bool) -> Vec<Cell> {
    let is_empty = |cell: &Cell| {
        let without = !cell.states.iter().any(|state| state.has_bytes());
        without && !(in_place && image.may_have_data(cell.block))
    };
    let (mut empty, others): (Vec<Cell>, Vec<Cell>) =
        std::mem::take(cells).into_iter().partition(is_empty);
    *cells = others;
    let mut run: Option<GuestRange> = None;
    for cell in &mut empty {
        cell.digest = digest_of_zeros(cell.block.len());
        cell.sealed = true;
        let joined = run.filter(|run| run.end() == cell.block.start());
        let joined = joined.and_then(|run| GuestRange::from_ends(run.start(), cell.block.end()));
        if let (None, Some(whole)) = (joined, run) {
            release(image, whole);
        }
        run = joined.or(Some(cell.block));
    }
    if let Some(whole) = run {
        release(image, whole);
    }
    empty
}

/// Gives space back. What cannot be given back costs space and nothing else.
fn release(image: &DiskStore, whole: GuestRange) {
    // Neighbours in the guest need not be neighbours in the file.
    if image.release(whole).is_ok() {
        return;
    }
    let mut start = whole.start();
    while start < whole.end() {
        let end = (start / BLOCK_LEN + 1).saturating_mul(BLOCK_LEN).min(whole.end());
        if let Some(block) = GuestRange::from_ends(start, end) {
            let _ = image.release(block);
        }
        start = end;
    }
}

/// The digest of a block of zeros: nearly all have one length.
fn digest_of_zeros(len: u64) -> Digest {
    static WHOLE: LazyLock<Digest> = LazyLock::new(|| sha256_of_zeros(BLOCK_LEN));
    match len {
        BLOCK_LEN => *WHOLE,
        _ => sha256_of_zeros(len),
    }
}

/// What reads captured bytes back.
pub type Get<'a> = &'a (dyn Fn(GuestRange, &mut [u8]) -> io::Result<()> + Sync);

/// Hashes every block of `slots`, brings it into the image, and says so in the table.
///
/// # Errors
/// [`Cut`].
pub fn blocks(
    slots: &mut [Slot],
    table: &Table,
    get: Get<'_>,
    image: &Image<'_>,
    setting: &Setting<'_>,
    scratches: &mut [Scratch],
) -> Result<(), Cut<SealError>> {
    copy::each(slots, setting, scratches, |slot, scratch| {
        let mut entry = table.get(slot.number).map_err(SealError::Table)?;
        let (bytes, _, _) = scratch.parts(entry.block);
        if get(entry.block, bytes).is_err() {
            // What the store does not give back is lost, and the rest is not.
            bytes.fill(0);
            entry.states.fill(PageState::Unreadable);
        }
        let strays = take_strays(&entry, bytes);
        note_zeros(&mut entry, bytes);
        entry.digest = sha256(bytes);
        write(&entry, bytes, &strays, image)
            .map_err(|cause| SealError::Image { at: entry.block, cause })?;
        entry.sealed = true;
        table.put(slot.number, &entry).map_err(SealError::Table)
    })
}

/// Empties pages that hold bytes though they are said to have none, and gives back where they were: a
/// process that was ended between writing a page and saying so leaves one.
fn take_strays(entry: &Entry, bytes: &mut [u8]) -> Vec<Range<usize>> {
    let mut strays = Vec::new();
    for (state, span) in entry.states.iter().zip(page_spans(entry.block)) {
        let Some(page) = bytes.get_mut(span.clone()) else { continue };
        if !state.has_bytes() && !is_zero(page) {
            page.fill(0);
            strays.push(span);
        }
    }
    strays
}

/// A page that was read and holds only zeros is `zero`.
fn note_zeros(entry: &mut Entry, bytes: &[u8]) {
    for (state, span) in entry.states.iter_mut().zip(page_spans(entry.block)) {
        if *state == PageState::Data && bytes.get(span).is_some_and(is_zero) {
            *state = PageState::Zero;
        }
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| word == &[0; 64]) && rest.iter().all(|&byte| byte == 0)
}

/// Zero pages between two data pages that are written rather than left out, in bytes. One write of
/// a few zeros is quicker than two writes and a hole, and disks have no use for smaller holes.
const MEND: usize = 64 << 10;

fn write(
    entry: &Entry,
    bytes: &[u8],
    strays: &[Range<usize>],
    image: &Image<'_>,
) -> io::Result<()> {
    let data = mended(page_runs(entry.block, |page| {
        entry.states.get(page).is_some_and(|state| state.has_bytes())
    }));
    let at = |run: &Range<usize>| {
        GuestRange::new(entry.block.start() + run.start as u64, (run.end - run.start) as u64)
    };
    let (file, apart) = match image {
        Image::Apart(file) => (file, true),
        Image::InPlace(file) => (file, false),
    };
    // What lies in place already needs no more than that nothing else does.
    for run in if apart { &data } else { strays } {
        if let (Some(at), Some(bytes)) = (at(run), bytes.get(run.clone())) {
            file.put(at, bytes)?;
        }
    }
    // Space was set aside for the whole block; what holds no data is given back.
    for hole in between(&data, bytes.len()) {
        if let Some(at) = at(&hole) {
            file.release(at)?;
        }
    }
    Ok(())
}

/// Runs with the small gaps between them filled.
fn mended(runs: Vec<Range<usize>>) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    for run in runs {
        match out.last_mut() {
            Some(last) if run.start - last.end < MEND => last.end = run.end,
            _ => out.push(run),
        }
    }
    out
}

/// What lies before, between and behind `runs` in `0..len`.
fn between(runs: &[Range<usize>], len: usize) -> Vec<Range<usize>> {
    let starts = std::iter::once(0).chain(runs.iter().map(|run| run.end));
    let ends = runs.iter().map(|run| run.start).chain(std::iter::once(len));
    starts.zip(ends).map(|(start, end)| start..end).filter(|gap| !gap.is_empty()).collect()
}

/// Writes what the image holds beside memory: headers and notes. Gives back their digest, as
/// [`evidence::verify`] computes it.
///
/// # Errors
/// [`SealError::Piece`].
pub fn pieces(layout: &Layout, image: &DiskStore) -> Result<Digest, SealError> {
    for piece in &layout.pieces {
        image
            .put_at(piece.offset, &piece.bytes)
            .map_err(|cause| SealError::Piece { what: piece.what, cause })?;
    }
    Ok(other_bytes_sha256(layout))
}

/// Gives the image its length and brings it to the disk.
///
/// # Errors
/// [`SealError::Whole`].
pub fn finish(image: &DiskStore, len: u64) -> Result<(), SealError> {
    let whole = |what| move |cause| SealError::Whole { what, cause };
    image.file().set_len(len).map_err(whole("size"))?;
    image.sync().map_err(whole("sync"))
}

/// SHA-256 of the whole image, for `sha256sum -c`: read back from the file, so it is the digest of
/// what the disk holds.
///
/// # Errors
/// [`Cut`].
pub fn file_digest(
    image: &DiskStore,
    len: u64,
    tell: &dyn Observer,
    stop: &Stop,
) -> Result<Digest, Cut<SealError>> {
    let mut hasher = Hasher::default();
    let mut buffer = vec![0u8; 1 << 20];
    let mut done = 0u64;
    let mut told = Instant::now();
    while done < len {
        if stop.asked() {
            return Err(Cut::Stopped);
        }
        let want = usize::try_from(len - done).map_or(buffer.len(), |left| left.min(buffer.len()));
        let Some(piece) = buffer.get_mut(..want) else { break };
        image
            .read_at(done, piece)
            .map_err(|cause| Cut::Failed(SealError::Whole { what: "read back", cause }))?;
        hasher.update(piece);
        done += want as u64;
        if told.elapsed() >= Duration::from_millis(200) || done == len {
            told = Instant::now();
            tell.event(Event::Progress {
                phase: Phase::FileDigest,
                pass: None,
                done_bytes: done,
                total_bytes: len,
            });
        }
    }
    Ok(hasher.finish())
}

/// The text of SHA256SUMS: every file that is written and digested, the manifest's bytes given.
///
/// # Errors
/// A file could not be read back.
pub fn sums(manifest: &Manifest, bytes: &[u8], guarded: &Guarded) -> Result<String, ExhibitError> {
    let mut sums: Vec<Sum> =
        manifest.files().map(|file| Sum { name: file.file.clone(), sha256: file.sha256 }).collect();
    sums.push(Sum { name: exhibit::MANIFEST.to_owned(), sha256: sha256(bytes) });
    sums.push(Sum {
        name: exhibit::JOURNAL.to_owned(),
        sha256: guarded.digest_of(exhibit::JOURNAL)?,
    });
    if let Some(blocks) = &manifest.blocks {
        sums.push(Sum { name: blocks.file.clone(), sha256: blocks.sha256 });
    }
    if let Some(image) = &manifest.image
        && let Some(sha256) = image.sha256
    {
        sums.push(Sum { name: image.file.clone(), sha256 });
    }
    Ok(sums::write(sums))
}

/// What the block records come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Records {
    /// Number of blocks.
    pub count: u64,
    /// Digest of the compressed file.
    pub sha256: Digest,
    /// Length of the compressed file in bytes.
    pub len: u64,
    /// The memory root.
    pub memory_root: Digest,
}

/// Writes the block records in address order.
///
/// # Errors
/// [`SealError::Records`].
pub fn records(cells: &[Cell], out: impl Write) -> Result<Records, SealError> {
    let mut root = MemoryRoot::default();
    let mut writer = RecordWriter::new(HashingWriter::new(out)).map_err(RecordError::from)?;
    for cell in cells {
        let record = record(cell);
        root.add(cell.block, record.known(), cell.digest);
        writer.push(&record)?;
    }
    let (hashing, count) = writer.finish().map_err(RecordError::from)?;
    let (mut out, sha256, len) = hashing.finish();
    out.flush().map_err(RecordError::from)?;
    Ok(Records { count, sha256, len, memory_root: root.finish() })
}

/// The record of a block.
pub(crate) fn record(cell: &Cell) -> BlockRecord {
    BlockRecord {
        range: cell.block,
        runs: evidence::state::runs(&cell.states),
        sha256: cell.digest,
        read: cell.stored,
        pass: cell.pass,
        earlier: cell.earlier,
        first: cell.first.as_deref().copied(),
        changed: cell.changed.as_deref().map(page_runs_of).unwrap_or_default(),
    }
}

/// Set bits as runs of pages.
fn page_runs_of(changed: &Changed) -> Vec<PageRun> {
    let mut runs: Vec<PageRun> = Vec::new();
    let pages = u32::try_from(changed.len() * 64).unwrap_or(0);
    for page in (0..pages).filter(|&page| bit(changed, page as usize)) {
        match runs.last_mut() {
            Some(PageRun(first, count)) if *first + *count == page => *count += 1,
            _ => runs.push(PageRun(page, 1)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use evidence::{Segment, Segments};

    #[test]
    fn small_gaps_are_mended_and_the_rest_is_given_back() {
        let runs = mended(vec![4096..8192, 8192 + MEND - 4096..8192 + MEND, 500_000..504_096]);
        assert_eq!(runs, [4096..8192 + MEND, 500_000..504_096]);
        assert_eq!(between(&runs, 1 << 20), [0..4096, 8192 + MEND..500_000, 504_096..1 << 20]);
        assert!(between(&[], 10).iter().eq(std::iter::once(&(0..10))));
        assert!(between(std::slice::from_ref(&(0..10)), 10).is_empty());
    }

    #[test]
    fn bits_become_runs() {
        let mut changed = Changed::default();
        for page in [0, 1, 63, 64, 256] {
            changed[page / 64] |= 1 << (page % 64);
        }
        assert_eq!(page_runs_of(&changed), [PageRun(0, 2), PageRun(63, 2), PageRun(256, 1)]);
    }

    /// What a process wrote into the store and could not tell of any more.
    #[test]
    fn a_page_that_nobody_told_of_is_not_sealed() {
        const P: u64 = evidence::PAGE;
        const P_LEN: usize = 4096;
        let block = GuestRange::new(0, 64 * P).unwrap();
        let segments = Segments::new(vec![Segment { range: block, offset: 0 }]).unwrap();
        let store = DiskStore::new(tempfile::tempfile().unwrap(), segments).unwrap();
        store.put(block, &[7; 64 * P_LEN]).unwrap();
        // The second lies between pages with bytes, the others do not.
        let mut states = vec![PageState::Unreadable; 64];
        (states[0], states[2]) = (PageState::Data, PageState::Data);
        let table = Table::new(tempfile::tempfile().unwrap());
        table.put(0, &Entry { block, states, digest: Digest::ZERO, sealed: false }).unwrap();
        let (stop, observer) = (Stop::new(), |_: Event| {});
        let setting = Setting {
            max_rate: None,
            stop: &stop,
            until: None,
            observer: &observer,
            phase: Phase::Seal,
            pass: None,
        };
        let get = |at: GuestRange, buf: &mut [u8]| store.get(at, buf);
        let (mut slots, mut scratches) = ([Slot { number: 0, block }], Scratch::for_workers(1));
        let image = Image::InPlace(&store);
        blocks(&mut slots, &table, &get, &image, &setting, &mut scratches).unwrap();
        let mut bytes = vec![1; 64 * P_LEN];
        store.get(block, &mut bytes).unwrap();
        let full = |page: &[u8]| page.iter().all(|byte| *byte == 7);
        let pages: Vec<usize> = (0..64).filter(|n| full(&bytes[n * P_LEN..][..P_LEN])).collect();
        assert_eq!(pages, [0, 2]);
        assert!(is_zero(&bytes[P_LEN..2 * P_LEN]) && is_zero(&bytes[3 * P_LEN..]));
        assert_eq!(table.get(0).unwrap().digest, sha256(&bytes));
    }
}
