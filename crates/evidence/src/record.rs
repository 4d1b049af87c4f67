//! Block records: what is known of each block, one JSON line each, in `blocks.jsonl.zst`.

use crate::digest::Digest;
use crate::lines::{LineError, next_line};
use crate::range::hex;
use crate::state::{PAGE, Run, page_count, pages};
use crate::{BLOCK_LEN, GuestRange, PageState};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::io::{self, BufReader, Read, Write};

/// Greatest length of one line in bytes. The longest that a record can need, 257 runs and 128
/// ranges of changed pages, stays below 8 KiB.
pub const MAX_LINE: usize = 16 * 1024;

/// zstd level of `blocks.jsonl.zst`.
const LEVEL: i32 = 3;

/// Greatest zstd window that is accepted, as a power of two: 8 MiB. Level 3 uses 2 MiB.
const MAX_WINDOW_LOG: u32 = 23;

/// A stretch of time in nanoseconds of the monotonic clock since the start of the acquisition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Span {
    /// Its first instant.
    pub t0_ns: u64,
    /// Its last instant.
    pub t1_ns: u64,
}

impl Span {
    /// Whether all of `other` lies in the span.
    pub fn covers(self, other: Span) -> bool {
        self.t0_ns <= other.t0_ns && other.t1_ns <= self.t1_ns
    }

    /// From the first to the last instant of both.
    pub fn join(self, other: Span) -> Span {
        Span { t0_ns: self.t0_ns.min(other.t0_ns), t1_ns: self.t1_ns.max(other.t1_ns) }
    }
}

/// `count` pages of a block from page `first` (0 is the block's first); in JSON `[17, 3]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PageRun(pub u32, pub u32);

/// What is known of one block.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Wire", into = "Wire")]
pub struct BlockRecord {
    /// The block.
    pub range: GuestRange,
    /// The states of its pages in address order: [`page_count`] pages, neighbours of one state
    /// merged.
    pub runs: Vec<Run>,
    /// SHA-256 of the block's bytes as they stand in the image (zeros where nothing was read).
    pub sha256: Digest,
    /// When the bytes in the image were read.
    pub read: Span,
    /// Number of the pass that read them, from 1.
    pub pass: u32,
    /// When the block was read before that, if it was: the block check's other read.
    pub earlier: Option<Span>,
    /// SHA-256 of the earlier read's bytes, only when they differed from those in the image.
    pub first: Option<Digest>,
    /// The pages that differed between the two reads, in order: the smear map. Empty exactly when
    /// `first` is absent.
    pub changed: Vec<PageRun>,
}

/// A line of `blocks.jsonl`: one block of guest-physical memory.
#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "BlockRecord")]
struct Wire {
    /// First guest-physical address.
    #[serde(with = "hex")]
    #[schemars(with = "String", regex(pattern = r"^0x(0|[1-9a-f][0-9a-f]{0,15})$"))]
    gpa: u64,
    /// Length in bytes, at most 1 MiB. The block does not cross a multiple of 1 MiB.
    #[schemars(range(min = 1, max = 1_048_576))]
    len: u64,
    /// States of the 4 KiB pages that the block touches, in address order, as
    /// `[state, count]`; neighbours of one state are merged.
    runs: Vec<Run>,
    /// SHA-256 of the block's bytes as they stand in the image.
    sha256: Digest,
    /// Start of the read whose bytes are in the image: monotonic nanoseconds since the start of
    /// the acquisition.
    t0_ns: u64,
    /// End of that read.
    t1_ns: u64,
    /// Number of the pass that made it, from 1.
    #[schemars(range(min = 1))]
    pass: u32,
    /// The block's earlier read, when there was one.
    #[serde(default)]
    earlier: Option<Span>,
    /// SHA-256 of the earlier read's bytes; null when they equalled those in the image or when
    /// there was no earlier read.
    first: Option<Digest>,
    /// Pages that differed between the two reads as `[first page, count]`, counted from the
    /// block's first page; there exactly when `first` is a digest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    changed: Vec<PageRun>,
}

/// The JSON Schema of one line.
pub fn schema() -> schemars::Schema {
    schemars::schema_for!(Wire)
}

impl From<BlockRecord> for Wire {
    fn from(record: BlockRecord) -> Wire {
        Wire {
            gpa: record.range.start(),
            len: record.range.len(),
            runs: record.runs,
            sha256: record.sha256,
            t0_ns: record.read.t0_ns,
            t1_ns: record.read.t1_ns,
            pass: record.pass,
            earlier: record.earlier,
            first: record.first,
            changed: record.changed,
        }
    }
}

impl TryFrom<Wire> for BlockRecord {
    type Error = BadRecord;

    fn try_from(wire: Wire) -> Result<Self, BadRecord> {
        let record = BlockRecord {
            range: GuestRange::new(wire.gpa, wire.len).ok_or(BadRecord::Range)?,
            runs: wire.runs,
            sha256: wire.sha256,
            read: Span { t0_ns: wire.t0_ns, t1_ns: wire.t1_ns },
            pass: wire.pass,
            earlier: wire.earlier,
            first: wire.first,
            changed: wire.changed,
        };
        record.check()?;
        Ok(record)
    }
}

/// Why a record contradicts itself.
#[derive(Debug, Clone, Copy, thiserror::Error, PartialEq, Eq)]
pub enum BadRecord {
    /// Not a block: empty, wrapping, or across a multiple of 1 MiB.
    #[error("its addresses are no block")]
    Range,
    /// The runs do not cover the block's pages exactly.
    #[error("its runs cover {0} pages, the block has {1}")]
    Cover(u64, u64),
    /// A run is empty or has the state of the run before it.
    #[error("its runs are empty or not merged")]
    Runs,
    /// A read ends before it starts, or the earlier read ends after the later one.
    #[error("its times run backwards")]
    Times,
    /// Passes are counted from 1.
    #[error("its pass is 0")]
    Pass,
    /// `earlier`, `first` and `changed` do not fit together.
    #[error("its two reads do not fit together: earlier, first and changed contradict each other")]
    TwoReads,
    /// Changed pages out of order, empty, or outside the block.
    #[error("its changed pages are not ascending pages of the block")]
    Changed,
}

impl BlockRecord {
    /// Checks everything that one record can say wrong about itself.
    ///
    /// # Errors
    /// [`BadRecord`] says what.
    pub fn check(&self) -> Result<(), BadRecord> {
        if self.range.start() / BLOCK_LEN != self.range.last() / BLOCK_LEN {
            return Err(BadRecord::Range);
        }
        self.check_runs()?;
        let earlier_ok =
            self.earlier.is_none_or(|e| e.t0_ns <= e.t1_ns && e.t1_ns <= self.read.t1_ns);
        if self.read.t0_ns > self.read.t1_ns || !earlier_ok {
            return Err(BadRecord::Times);
        }
        if self.pass == 0 {
            return Err(BadRecord::Pass);
        }
        self.check_two_reads()
    }

    fn check_runs(&self) -> Result<(), BadRecord> {
        let covered = self.runs.iter().fold(0u64, |sum, run| sum + u64::from(run.1));
        let pages = page_count(self.range);
        if covered != pages {
            return Err(BadRecord::Cover(covered, pages));
        }
        let merged = self.runs.windows(2).all(|pair| match pair {
            [a, b] => a.0 != b.0,
            _ => true,
        });
        let filled = self.runs.iter().all(|run| run.1 > 0);
        if merged && filled { Ok(()) } else { Err(BadRecord::Runs) }
    }

    fn check_two_reads(&self) -> Result<(), BadRecord> {
        let differed = self.first.is_some();
        if differed == self.changed.is_empty()
            || (differed && self.earlier.is_none())
            || self.first == Some(self.sha256)
        {
            return Err(BadRecord::TwoReads);
        }
        let mut behind = 0u64;
        for (at, &PageRun(first, count)) in self.changed.iter().enumerate() {
            let (first, count) = (u64::from(first), u64::from(count));
            // Runs that touch would be one run: each set of pages has one spelling.
            if count == 0 || first < behind || (at > 0 && first == behind) {
                return Err(BadRecord::Changed);
            }
            behind = first + count;
        }
        if behind > page_count(self.range) { Err(BadRecord::Changed) } else { Ok(()) }
    }

    /// Whether all bytes of the block are known: no page is unreadable or excluded.
    pub fn known(&self) -> bool {
        self.runs.iter().all(|run| run.0.known())
    }

    /// The block's pages with their states, in order; the first and last may be partly covered.
    pub fn pages(&self) -> impl Iterator<Item = (GuestRange, PageState)> {
        let states = self.runs.iter().flat_map(|&Run(state, count)| (0..count).map(move |_| state));
        pages(self.range).zip(states)
    }

    /// The runs as address ranges with their states, in order.
    pub fn extents(&self) -> impl Iterator<Item = (GuestRange, PageState)> {
        let first = self.range.start() / PAGE;
        let ends = self.runs.iter().scan(0u64, |behind, run| {
            let before = *behind;
            *behind = before.saturating_add(u64::from(run.1));
            Some((before, *behind, run.0))
        });
        ends.filter_map(move |(before, behind, state)| {
            let address = |page: u64| first.saturating_add(page).saturating_mul(PAGE);
            let start = address(before).max(self.range.start());
            let end = address(behind).min(self.range.end());
            Some((GuestRange::from_ends(start, end)?, state))
        })
    }

    /// Number of pages that differed between the two reads.
    pub fn pages_changed(&self) -> u64 {
        self.changed.iter().fold(0, |sum, run| sum + u64::from(run.1))
    }

    /// Number of pages whose bytes were read both times and were the same; 0 without an earlier
    /// read. Pages that nothing was read of, such as holes, do not count.
    pub fn pages_equal(&self) -> u64 {
        if self.earlier.is_none() {
            return 0;
        }
        let changed = |page: u64| {
            self.changed
                .iter()
                .any(|run| (u64::from(run.0)..u64::from(run.0) + u64::from(run.1)).contains(&page))
        };
        let read = |state| matches!(state, PageState::Data | PageState::Zero);
        let equal =
            (0u64..).zip(self.pages()).filter(|(page, (_, state))| read(*state) && !changed(*page));
        u64::try_from(equal.count()).unwrap_or(u64::MAX)
    }

    /// All times of the block: of the read in the image and of the earlier one.
    pub fn span(&self) -> Span {
        self.earlier.map_or(self.read, |earlier| earlier.join(self.read))
    }
}

/// Why records could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// A record contradicts itself.
    #[error("block record {number} ({range}): {why}")]
    Bad {
        /// Number of the record, from 1.
        number: u64,
        /// The block.
        range: GuestRange,
        /// What is wrong.
        why: BadRecord,
    },
    /// A record does not lie behind the one before it.
    #[error("block record {number} ({range}) does not lie behind the one before it")]
    Order {
        /// Number of the record, from 1.
        number: u64,
        /// The block.
        range: GuestRange,
    },
    /// A line is not a record.
    #[error("line {line} is no block record: {why}")]
    Line {
        /// Number of the line, from 1.
        line: u64,
        /// What is wrong.
        why: String,
    },
    /// More lines than blocks.
    #[error("more than {0} block records")]
    TooMany(u64),
    /// The stream beneath.
    #[error("block records")]
    Io(#[from] io::Error),
}

/// Writes `blocks.jsonl.zst`: records in address order, one in memory at a time.
pub struct RecordWriter<W: Write> {
    out: zstd::Encoder<'static, W>,
    line: Vec<u8>,
    behind: u64,
    count: u64,
}

impl<W: Write> RecordWriter<W> {
    /// Starts the compressed stream.
    ///
    /// # Errors
    /// Whatever zstd says of its parameters.
    pub fn new(out: W) -> io::Result<Self> {
        let mut out = zstd::Encoder::new(out, LEVEL)?;
        // A flipped bit shows when the stream is read, also without SHA256SUMS.
        out.include_checksum(true)?;
        Ok(Self { out, line: Vec::new(), behind: 0, count: 0 })
    }

    /// Writes the next record.
    ///
    /// # Errors
    /// [`RecordError`] when the record contradicts itself, does not lie behind the one before it,
    /// or cannot be written.
    pub fn push(&mut self, record: &BlockRecord) -> Result<(), RecordError> {
        let (number, range) = (self.count + 1, record.range);
        record.check().map_err(|why| RecordError::Bad { number, range, why })?;
        if range.start() < self.behind {
            return Err(RecordError::Order { number, range });
        }
        self.line.clear();
        serde_json::to_writer(&mut self.line, record).map_err(io::Error::from)?;
        self.line.push(b'\n');
        self.out.write_all(&self.line)?;
        self.behind = range.end();
        self.count = number;
        Ok(())
    }

    /// Ends the stream; gives back the writer and the number of records.
    ///
    /// # Errors
    /// The writer's.
    pub fn finish(self) -> io::Result<(W, u64)> {
        Ok((self.out.finish()?, self.count))
    }
}

/// Reads `blocks.jsonl.zst` of unknown origin: bounded lines, count and window; order and each
/// record checked; one record in memory at a time. Ends after the first error.
pub struct RecordReader<R: Read> {
    input: BufReader<zstd::Decoder<'static, BufReader<R>>>,
    text: Vec<u8>,
    limit: u64,
    behind: u64,
    count: u64,
    ended: bool,
}

impl<R: Read> RecordReader<R> {
    /// Reads at most `limit` records from `input`.
    ///
    /// # Errors
    /// Whatever zstd says of its parameters; nothing is read yet.
    pub fn new(input: R, limit: u64) -> io::Result<Self> {
        let mut input = zstd::Decoder::new(input)?;
        input.window_log_max(MAX_WINDOW_LOG)?;
        let input = BufReader::with_capacity(64 * 1024, input);
        Ok(Self { input, text: Vec::new(), limit, behind: 0, count: 0, ended: false })
    }

    fn read(&mut self) -> Result<Option<BlockRecord>, RecordError> {
        let line = self.count + 1;
        let there = match next_line(&mut self.input, &mut self.text, MAX_LINE) {
            Ok(there) => there,
            Err(LineError::Io(error)) => return Err(error.into()),
            Err(error) => return Err(RecordError::Line { line, why: error.to_string() }),
        };
        if !there {
            return Ok(None);
        }
        if self.count == self.limit {
            return Err(RecordError::TooMany(self.limit));
        }
        let record: BlockRecord = serde_json::from_slice(&self.text)
            .map_err(|error| RecordError::Line { line, why: error.to_string() })?;
        if record.range.start() < self.behind {
            return Err(RecordError::Order { number: line, range: record.range });
        }
        self.behind = record.range.end();
        self.count = line;
        Ok(Some(record))
    }
}

impl<R: Read> Iterator for RecordReader<R> {
    type Item = Result<BlockRecord, RecordError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let record = self.read().transpose();
        self.ended = !matches!(record, Some(Ok(_)));
        record
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::digest::sha256;
    use proptest::prelude::*;

    /// A record of a block whose two reads differed.
    pub(crate) fn changed_record() -> BlockRecord {
        BlockRecord {
            range: GuestRange::new(0x10_0000, 0x10_0000).unwrap(),
            runs: vec![Run(PageState::Data, 200), Run(PageState::Hole, 56)],
            sha256: sha256(b"second"),
            read: Span { t0_ns: 300, t1_ns: 400 },
            pass: 2,
            earlier: Some(Span { t0_ns: 100, t1_ns: 200 }),
            first: Some(sha256(b"first")),
            changed: vec![PageRun(0, 2), PageRun(17, 1)],
        }
    }

    fn small(page: u64) -> BlockRecord {
        BlockRecord {
            range: GuestRange::new(page * PAGE, PAGE).unwrap(),
            runs: vec![Run(PageState::Zero, 1)],
            sha256: sha256(&[0; 4096]),
            read: Span { t0_ns: 0, t1_ns: 1 },
            pass: 1,
            earlier: None,
            first: None,
            changed: vec![],
        }
    }

    fn write(records: &[BlockRecord]) -> Vec<u8> {
        let mut out = RecordWriter::new(Vec::new()).unwrap();
        records.iter().for_each(|record| out.push(record).unwrap());
        out.finish().unwrap().0
    }

    fn read(bytes: &[u8], limit: u64) -> Result<Vec<BlockRecord>, RecordError> {
        RecordReader::new(bytes, limit).unwrap().collect()
    }

    #[test]
    fn the_line_is_the_documented_one() {
        let line = serde_json::to_string(&changed_record()).unwrap();
        let want = format!(
            r#"{{"gpa":"0x100000","len":1048576,"runs":[["data",200],["hole",56]],"sha256":"{}","t0_ns":300,"t1_ns":400,"pass":2,"earlier":{{"t0_ns":100,"t1_ns":200}},"first":"{}","changed":[[0,2],[17,1]]}}"#,
            sha256(b"second"),
            sha256(b"first"),
        );
        assert_eq!(line, want);
        assert_eq!(serde_json::from_str::<BlockRecord>(&line).unwrap(), changed_record());
        let short = serde_json::to_string(&small(0)).unwrap();
        assert!(short.ends_with(r#""pass":1,"earlier":null,"first":null}"#), "{short}");
    }

    #[test]
    fn a_record_that_contradicts_itself_is_refused() {
        type Edit = fn(&mut BlockRecord);
        let cases: [(Edit, BadRecord); 13] = [
            (|r| r.range = GuestRange::new(0x10_1000, 0x10_0000).unwrap(), BadRecord::Range),
            (|r| r.runs = vec![], BadRecord::Cover(0, 256)),
            (|r| r.runs = vec![Run(PageState::Data, 257)], BadRecord::Cover(257, 256)),
            (|r| r.runs.push(Run(PageState::Data, 0)), BadRecord::Runs),
            (
                |r| r.runs = vec![Run(PageState::Data, 1), Run(PageState::Data, 255)],
                BadRecord::Runs,
            ),
            (|r| r.read = Span { t0_ns: 5, t1_ns: 4 }, BadRecord::Times),
            (|r| r.earlier = Some(Span { t0_ns: 100, t1_ns: 500 }), BadRecord::Times),
            (|r| r.pass = 0, BadRecord::Pass),
            (|r| r.first = None, BadRecord::TwoReads),
            (|r| r.first = Some(r.sha256), BadRecord::TwoReads),
            (|r| r.earlier = None, BadRecord::TwoReads),
            (|r| r.changed = vec![PageRun(250, 7)], BadRecord::Changed),
            (|r| r.changed = vec![PageRun(2, 2), PageRun(4, 1)], BadRecord::Changed),
        ];
        for (at, (edit, want)) in cases.into_iter().enumerate() {
            let mut record = changed_record();
            edit(&mut record);
            assert_eq!(record.check(), Err(want), "case {at}");
            let line = serde_json::to_string(&record).unwrap();
            assert!(serde_json::from_str::<BlockRecord>(&line).is_err(), "case {at}");
        }
    }

    #[test]
    fn extents_are_cut_with_the_block() {
        let mut record = small(0);
        record.range = GuestRange::from_ends(0x800, 0x3800).unwrap();
        record.runs =
            vec![Run(PageState::Data, 1), Run(PageState::Hole, 2), Run(PageState::Unreadable, 1)];
        record.check().unwrap();
        let extents: Vec<_> =
            record.extents().map(|(r, state)| (r.start(), r.end(), state)).collect();
        assert_eq!(
            extents,
            [
                (0x800, 0x1000, PageState::Data),
                (0x1000, 0x3000, PageState::Hole),
                (0x3000, 0x3800, PageState::Unreadable),
            ]
        );
        assert_eq!(record.pages().count(), 4);
        assert!(!record.known());
    }

    #[test]
    fn hostile_streams_are_refused_with_the_line() {
        let good = write(&[small(0), small(1), small(2)]);
        assert_eq!(read(&good, 3).unwrap().len(), 3);
        assert!(matches!(read(&good, 2), Err(RecordError::TooMany(2))));
        assert!(matches!(read(&good[..good.len() - 5], 3), Err(RecordError::Io(_))));
        let pack = |text: &str| zstd::encode_all(text.as_bytes(), 3).unwrap();
        let line = |n| serde_json::to_string(&small(n)).unwrap();
        let swapped = pack(&format!("{}\n{}\n", line(1), line(0)));
        assert!(matches!(read(&swapped, 9), Err(RecordError::Order { number: 2, .. })));
        let cut = pack(&format!("{}\n{}", line(0), line(1)));
        assert!(matches!(read(&cut, 9), Err(RecordError::Line { line: 2, .. })));
        let unknown = pack(&format!("{}\n", line(0).replace("\"pass\"", "\"x\":1,\"pass\"")));
        assert!(matches!(read(&unknown, 9), Err(RecordError::Line { line: 1, .. })));
        // 256 MiB of one line in a few KiB: refused after 16 KiB of it.
        let bomb = zstd::encode_all(io::repeat(b' ').take(256 << 20), 3).unwrap();
        assert!(matches!(read(&bomb, 9), Err(RecordError::Line { line: 1, .. })));
    }

    #[test]
    fn a_window_that_needs_much_memory_is_refused() {
        let mut out = zstd::Encoder::new(Vec::new(), 3).unwrap();
        out.window_log(27).unwrap();
        let text = format!("{}\n", serde_json::to_string(&small(0)).unwrap());
        out.write_all(text.as_bytes()).unwrap();
        let bytes = out.finish().unwrap();
        assert!(matches!(read(&bytes, 9), Err(RecordError::Io(_))));
    }

    #[test]
    fn the_writer_refuses_disorder() {
        let mut out = RecordWriter::new(Vec::new()).unwrap();
        out.push(&small(1)).unwrap();
        assert!(matches!(out.push(&small(1)), Err(RecordError::Order { number: 2, .. })));
        let mut bad = small(2);
        bad.pass = 0;
        assert!(matches!(out.push(&bad), Err(RecordError::Bad { number: 2, .. })));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            pages in proptest::collection::btree_set(0u64..1 << 40, 0..50),
            t0 in any::<u32>(),
        ) {
            let records: Vec<_> = pages.into_iter().map(small).map(|mut record| {
                record.read = Span { t0_ns: u64::from(t0), t1_ns: u64::MAX };
                record
            }).collect();
            prop_assert_eq!(read(&write(&records), 50).unwrap(), records);
        }
    }
}
