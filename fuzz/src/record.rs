//! The record: block records, manifest, journal, sums.

use evidence::digest::{Digest, sha256};
use evidence::journal::{self as chain, Journal, Line};
use evidence::record::{PageRun, RecordReader, RecordWriter, Span};
use evidence::state::{Run, page_count};
use evidence::{BlockRecord, GuestRange, Manifest, PageState, sums as list};
use std::io::Read;
use testkit::synth::{self, Recipe};

/// Records that one input may have.
const MOST: u64 = 1000;

/// `blocks.jsonl.zst`: the input as the file, and as the lines in it.
pub fn blocks(data: &[u8]) {
    check_records(data);
    check_records(&stored(data)[..]);
}

fn check_records(input: impl Read) {
    let mut reader = RecordReader::new(input, MOST).expect("parameters that zstd knows");
    let mut records = Vec::new();
    while let Some(Ok(record)) = reader.next() {
        check_record(&record);
        records.push(record);
    }
    assert!(reader.next().is_none(), "nothing comes behind an error");
    if records.is_empty() {
        return;
    }
    let mut writer = RecordWriter::new(Vec::new()).expect("parameters that zstd knows");
    for record in &records {
        writer.push(record).expect("what was read can be written");
    }
    let (bytes, count) = writer.finish().expect("memory can be written");
    assert_eq!(count, records.len() as u64);
    let again = RecordReader::new(&bytes[..], MOST).expect("parameters that zstd knows");
    assert_eq!(again.collect::<Result<Vec<_>, _>>().expect("what was written is read"), records);
}

fn check_record(record: &BlockRecord) {
    assert_eq!(record.pages().count() as u64, page_count(record.range));
    let sum = |ranges: &mut dyn Iterator<Item = (GuestRange, PageState)>| {
        let mut at = record.range.start();
        ranges.for_each(|(range, _)| {
            assert_eq!(range.start(), at, "parts follow each other");
            at = range.end();
        });
        assert_eq!(at, record.range.end(), "parts end where the block does");
    };
    sum(&mut record.pages());
    sum(&mut record.extents());
    assert!(record.pages_equal() + record.pages_changed() <= page_count(record.range));
    assert!(record.span().covers(record.read));
    let known = record.pages().all(|(_, state)| state.known());
    assert_eq!(record.known(), known);
}

/// A zstd frame (RFC 8878) that holds `text` as it is, so that the fuzzer sees its bytes.
pub(crate) fn stored(text: &[u8]) -> Vec<u8> {
    let len = u32::try_from(text.len()).expect("a short text");
    // Magic number; one segment with a content size of 4 bytes.
    let mut out = vec![0x28, 0xb5, 0x2f, 0xfd, 0xa0];
    out.extend(len.to_le_bytes());
    let mut chunks = text.chunks(1 << 16).peekable();
    if chunks.peek().is_none() {
        out.extend([1, 0, 0]);
    }
    while let Some(chunk) = chunks.next() {
        // A raw block: whether it is the last one, type 0, its size.
        let size = u32::try_from(chunk.len()).expect("at most 64 KiB");
        let header = (size << 3) | u32::from(chunks.peek().is_none());
        out.extend(&header.to_le_bytes()[..3]);
        out.extend(chunk);
    }
    out
}

/// Lines of every form, and a compressed file.
pub fn blocks_seeds() -> Vec<Vec<u8>> {
    let record = |gpa, len, runs: Vec<Run>| BlockRecord {
        range: GuestRange::new(gpa, len).expect("a range"),
        runs,
        sha256: sha256(b"seed"),
        read: Span { t0_ns: 50, t1_ns: 60 },
        pass: 2,
        earlier: Some(Span { t0_ns: 10, t1_ns: 20 }),
        first: None,
        changed: Vec::new(),
    };
    let all = [
        record(0, 0x3000, vec![Run(PageState::Data, 2), Run(PageState::Zero, 1)]),
        BlockRecord {
            earlier: None,
            pass: 1,
            ..record(0x4800, 0x900, vec![Run(PageState::Hole, 2)])
        },
        BlockRecord {
            first: Some(Digest::ZERO),
            changed: vec![PageRun(0, 1), PageRun(17, 3)],
            ..record(
                0x10_0000,
                1 << 20,
                vec![Run(PageState::Unreadable, 16), Run(PageState::Data, 240)],
            )
        },
    ];
    let lines = all.iter().flat_map(|record| {
        let mut line = serde_json::to_vec(record).expect("records are JSON");
        line.push(b'\n');
        line
    });
    let mut writer = RecordWriter::new(Vec::new()).expect("parameters that zstd knows");
    all.iter().for_each(|record| writer.push(record).expect("ascending records"));
    vec![lines.collect(), writer.finish().expect("memory can be written").0]
}

/// `manifest.json`
pub fn manifest(data: &[u8]) {
    let Ok(manifest) = Manifest::parse(data) else { return };
    let found = manifest.contradictions();
    let bytes = manifest.to_json().expect("what was JSON is JSON again");
    let mut again = Manifest::parse(&bytes).expect("what was written is read");
    assert_eq!(again.contradictions(), found);
    // serde_json without its feature `float_roundtrip` reads some fractions one unit in the last
    // place beside what it wrote.
    if let (Some(again), Some(stable)) = (&mut again.stable, &manifest.stable) {
        assert!((again.share - stable.share).abs() <= stable.share.abs() * 4.0 * f64::EPSILON);
        again.share = stable.share;
    }
    let fractions = |value: &serde_json::Value| value.to_string().contains(['.', 'e']);
    if manifest.parameters.values().any(fractions) {
        again.parameters = manifest.parameters.clone();
    }
    assert_eq!(again, manifest);
}

/// The manifests of a few synthetic exhibits.
pub fn manifest_seeds() -> Vec<Vec<u8>> {
    use evidence::manifest::Status::{Failed, Partial};
    let recipes = [
        Recipe::default(),
        Recipe { losses: true, file_digest: false, ..Recipe::default() },
        Recipe { status: Partial, ..Recipe::default() },
        Recipe { status: Failed, ..Recipe::default() },
    ];
    let bytes = |recipe| {
        let exhibit = synth::build(recipe).expect("a synthetic exhibit");
        serde_json::to_vec(&synth::manifest(&exhibit).expect("its manifest")).expect("JSON")
    };
    recipes.into_iter().map(bytes).collect()
}

/// `journal.jsonl`: the input as it is, and its lines with the chain put right.
pub fn journal(data: &[u8]) {
    let mut text = data;
    if let Ok(found) = chain::check(&mut text, Digest::ZERO) {
        assert_eq!(found.lines, data.iter().filter(|&&byte| byte == b'\n').count() as u64);
    }
    let mut journal = Journal::new(Vec::new());
    let lines = data.split(|&byte| byte == b'\n').filter_map(|l| serde_json::from_slice(l).ok());
    for Line { mono_ns, utc, what, data, .. } in lines {
        // A line that may not be appended leaves the chain as it was.
        let _ = journal.append(mono_ns, &utc, &what, data);
    }
    let (head, lines) = (journal.head(), journal.lines());
    let mut bytes = journal.into_inner();
    let whole = chain::check(&mut &bytes[..], Digest::ZERO).expect("a journal of ours");
    assert_eq!((whole.head, whole.lines), (head, lines));
    // Another text has another head, or none.
    let at = data.iter().fold(0usize, |sum, &byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
    if let Some(len) = std::num::NonZero::new(bytes.len()) {
        bytes[at % len] ^= 1 << (at % 7);
        let changed = chain::check(&mut &bytes[..], Digest::ZERO);
        assert!(changed.is_err() || changed.is_ok_and(|changed| changed != whole));
    }
}

/// Three lines.
pub fn journal_seeds() -> Vec<Vec<u8>> {
    let mut journal = Journal::new(Vec::new());
    for (what, data) in
        [("started", "{}"), ("map-taken", r#"{"a":[1,null]}"#), ("end", r#"{"b":-1.5e3}"#)]
    {
        let data = serde_json::from_str(data).expect("JSON");
        journal.append(7, "2026-11-22T21:30:00.5Z", what, data).expect("a good line");
    }
    vec![journal.into_inner()]
}

/// `SHA256SUMS`: exactly what is written is read.
pub fn sums(data: &[u8]) {
    if let Ok(sums) = list::parse(data) {
        assert_eq!(list::write(sums).as_bytes(), data);
    }
}

/// Three files.
pub fn sums_seeds() -> Vec<Vec<u8>> {
    let names = ["journal.jsonl", "manifest.json", "memory.elf"];
    let sums = names.map(|name| list::Sum { name: name.into(), sha256: sha256(name.as_bytes()) });
    vec![list::write(sums.to_vec()).into()]
}
