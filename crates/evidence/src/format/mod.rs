//! The image formats `elf`, `raw` and `lime`: encoders and decoders.
//!
//! An encoder does not write a file: it says where everything lies. Memory goes to the offsets of
//! [`Layout::segments`], headers and notes are the bytes of [`Layout::pieces`], and every byte of
//! the file that is in neither is zero (a hole). So the same layout serves a copy into a new file,
//! sealing in place, and a stream. A decoder goes the other way, from the file's own bytes to the
//! same layout, and takes nothing on trust: every length is bounded before memory is taken for it,
//! every sum is checked, and what does not fit together is refused.
//!
//! What a decoder finds in a file of ours can be held against what the record's map demands:
//! [`encode`] with the decoded notes must give an equal [`Layout`].

pub mod elf;
pub mod lime;
pub mod raw;

use crate::layout::LayoutError;
use crate::{GuestRange, MemoryMap, Segment, Segments};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::str::FromStr;

pub use elf::{Arch, Note};

/// Segments that a decoder takes from one file: as many as a map may have regions.
pub const MAX_SEGMENTS: u64 = 65_536;

/// How guest memory is written into the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// ELF64 core: read by Volatility, MemProcFS, crash, drgn, makedumpfile and gdb alike.
    Elf,
    /// File offset = guest-physical address; sparse.
    Raw,
    /// LiME version 1.
    Lime,
}

impl Format {
    /// All formats, the default first.
    pub const ALL: [Format; 3] = [Format::Elf, Format::Raw, Format::Lime];

    /// The image is called `memory.` and this.
    pub fn extension(self) -> &'static str {
        match self {
            Format::Elf => "elf",
            Format::Raw => "raw",
            Format::Lime => "lime",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.extension())
    }
}

/// A word that names no format.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is no image format; there are elf, raw and lime")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(word: &str) -> Result<Self, UnknownFormat> {
        Format::ALL
            .into_iter()
            .find(|format| format.extension() == word)
            .ok_or_else(|| UnknownFormat(word.into()))
    }
}

/// Why a map does not fit a format, or bytes are not an image of it.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// No region of the map, or no part of the file, is memory.
    #[error("there is no memory to make an image of")]
    NoMemory,
    /// The ELF image would need more program headers than all readers take.
    #[error(
        "the map needs {found} ELF segments, more than the {} that every reader takes; \
         raw and lime hold it",
        elf::MAX_LOADS
    )]
    TooManyLoads {
        /// Segments that the map needs.
        found: usize,
    },
    /// The notes do not fit before the first segment.
    #[error("{len} bytes of notes are more than the {room} that lie before the first segment")]
    NoRoomForNotes {
        /// Encoded length of all notes in bytes.
        len: u64,
        /// Bytes between the program headers and the first segment.
        room: u64,
    },
    /// A note cannot be written, or was written wrongly.
    #[error("note {index} {why}")]
    Note {
        /// Its number, from 0.
        index: usize,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A header field has a value that this format does not have.
    #[error("{what} at offset {offset:#x} is {found:#x}, expected {expected}")]
    Field {
        /// The field.
        what: &'static str,
        /// Where the header that holds it begins in the file.
        offset: u64,
        /// Its value.
        found: u64,
        /// What it should be.
        expected: &'static str,
    },
    /// A count or length is greater than any image has.
    #[error("{what}: {found} is more than the limit of {limit}")]
    Limit {
        /// What is counted.
        what: &'static str,
        /// The count.
        found: u64,
        /// The limit.
        limit: u64,
    },
    /// Something should lie where the file has ended.
    #[error("{what} ({len:#x} bytes at offset {offset:#x}) passes the file's end at {file_len:#x}")]
    Truncated {
        /// What should be there.
        what: &'static str,
        /// Its offset in the file.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// Length of the file in bytes.
        file_len: u64,
    },
    /// A segment's addresses wrap or are none.
    #[error("{len:#x} bytes at address {gpa:#x} (header at offset {offset:#x}) wrap or are none")]
    Range {
        /// Where the header that says so begins in the file.
        offset: u64,
        /// First address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// The file's length is not the one that the map gives.
    #[error("the file is {found:#x} bytes long, expected {expected:#x}")]
    Length {
        /// The file's length in bytes.
        found: u64,
        /// The length that the map gives.
        expected: u64,
    },
    /// Two parts of the file lie over each other.
    #[error("{first} (up to offset {end:#x}) and {second} (from {start:#x}) overlap in the file")]
    Overlap {
        /// The part that begins first.
        first: &'static str,
        /// Where it ends.
        end: u64,
        /// The part that begins inside it.
        second: &'static str,
        /// Where that begins.
        start: u64,
    },
    /// The segments make no layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The file could not be read.
    #[error("{what} at offset {offset:#x} could not be read")]
    Read {
        /// What was read.
        what: &'static str,
        /// Where.
        offset: u64,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// Bytes of the image that are not guest memory: a header or notes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// The bytes.
    pub bytes: Vec<u8>,
    /// What they are, for errors and the record.
    pub what: &'static str,
}

/// Where everything lies in an image file.
///
/// Segments and pieces do not overlap and do not pass `len`; what lies between them
/// ([`Layout::gaps`]) is zero in a file that stillframe wrote.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Guest memory. Contiguous ranges are one segment each, so a block never lies in two.
    pub segments: Segments,
    /// Headers and notes, ascending by offset.
    pub pieces: Vec<Piece>,
    /// Length of the file in bytes.
    pub len: u64,
}

impl Layout {
    /// Checks that segments and pieces are apart and inside the file, and orders the pieces.
    ///
    /// # Errors
    /// [`FormatError::NoMemory`], [`FormatError::Truncated`], [`FormatError::Overlap`].
    pub fn new(segments: Segments, pieces: Vec<Piece>, len: u64) -> Result<Self, FormatError> {
        if segments.list().is_empty() {
            return Err(FormatError::NoMemory);
        }
        let mut layout = Self { segments, pieces, len };
        layout.pieces.sort_by_key(|piece| piece.offset);
        let mut before = ("", 0);
        for (offset, part_len, what) in layout.parts() {
            let end = offset
                .checked_add(part_len)
                .filter(|&end| end <= len)
                .ok_or(FormatError::Truncated { what, offset, len: part_len, file_len: len })?;
            let (first, first_end) = before;
            if offset < first_end {
                return Err(FormatError::Overlap {
                    first,
                    end: first_end,
                    second: what,
                    start: offset,
                });
            }
            before = (what, end);
        }
        Ok(layout)
    }

    /// The parts of the file that are in no segment and no piece, ascending, never empty.
    pub fn gaps(&self) -> Vec<Range<u64>> {
        let mut gaps = Vec::new();
        let mut at = 0;
        for (offset, part_len, _) in self.parts() {
            if at < offset {
                gaps.push(at..offset);
            }
            at = at.max(offset.saturating_add(part_len));
        }
        if at < self.len {
            gaps.push(at..self.len);
        }
        gaps
    }

    /// Offset, length and word of every segment and piece, ascending by offset.
    fn parts(&self) -> Vec<(u64, u64, &'static str)> {
        let segments = self.segments.list().iter().map(|s| (s.offset, s.range.len(), "memory"));
        let pieces = self.pieces.iter().map(|p| (p.offset, count(&p.bytes), p.what));
        let mut parts: Vec<_> = segments.chain(pieces).collect();
        parts.sort_by_key(|&(offset, ..)| offset);
        parts
    }
}

/// What the bytes of an image say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decoded {
    /// Where everything lies.
    pub layout: Layout,
    /// The notes of an ELF image, in file order; other formats have none.
    pub notes: Vec<Note>,
    /// `e_machine` of an ELF image.
    pub machine: Option<u16>,
}

/// The layout of `map`'s imaged regions in `format`.
///
/// `arch` and `notes` go into ELF only: `raw` and `lime` have no place for them and ignore them.
/// Neither moves a segment, so memory can be written before the notes are known.
///
/// # Errors
/// [`FormatError::NoMemory`], [`FormatError::Layout`] when an offset would pass 2^63 - 1, and of
/// ELF [`FormatError::TooManyLoads`], [`FormatError::NoRoomForNotes`], [`FormatError::Note`].
pub fn encode(
    format: Format,
    arch: Arch,
    map: &MemoryMap,
    notes: &[Note],
) -> Result<Layout, FormatError> {
    match format {
        Format::Elf => elf::encode(arch, map, notes),
        Format::Raw => raw::encode(map),
        Format::Lime => lime::encode(map),
    }
}

/// Reads the structure of an image of `file_len` bytes; never the memory in it.
///
/// `map` is the record's: a raw image has no structure of its own and is decoded by it. ELF and
/// LiME are decoded from their own bytes alone.
///
/// # Errors
/// [`FormatError`] names the field, count or part of the file that is wrong.
pub fn decode(
    format: Format,
    map: &MemoryMap,
    reader: &mut (impl Read + Seek),
    file_len: u64,
) -> Result<Decoded, FormatError> {
    match format {
        Format::Elf => elf::decode(reader, file_len),
        Format::Raw => raw::decode(map, file_len),
        Format::Lime => lime::decode(reader, file_len),
    }
}

/// The format whose magic number a file begins with. Raw has none, so `None` says nothing of it.
pub fn detect(first_bytes: &[u8]) -> Option<Format> {
    if first_bytes.starts_with(&elf::MAGIC) {
        Some(Format::Elf)
    } else if first_bytes.starts_with(&lime::MAGIC) {
        Some(Format::Lime)
    } else {
        None
    }
}

/// The imaged ranges of `map`, neighbours merged whatever their kinds.
fn merged(map: &MemoryMap) -> Vec<GuestRange> {
    let mut ranges: Vec<GuestRange> = Vec::new();
    for (_, range) in map.imaged() {
        match ranges.last_mut() {
            Some(last) if last.end() == range.start() => {
                *last = GuestRange::from_ends(last.start(), range.end()).unwrap_or(*last);
            }
            _ => ranges.push(range),
        }
    }
    ranges
}

/// The segments with those merged that follow each other in the guest and in the file.
fn joined(list: Vec<Segment>) -> Vec<Segment> {
    let mut out: Vec<Segment> = Vec::new();
    for segment in list {
        let (range, offset) = (segment.range, segment.offset);
        match out.last_mut() {
            Some(last)
                if last.range.end() == range.start()
                    && last.offset.checked_add(last.range.len()) == Some(offset) =>
            {
                last.range =
                    GuestRange::from_ends(last.range.start(), range.end()).unwrap_or(last.range);
            }
            _ => out.push(segment),
        }
    }
    out
}

/// The length of `list` as a file length or count.
fn count<T>(list: &[T]) -> u64 {
    u64::try_from(list.len()).unwrap_or(u64::MAX)
}

/// Refuses a count above its limit.
fn check_limit(what: &'static str, found: u64, limit: u64) -> Result<(), FormatError> {
    if found > limit { Err(FormatError::Limit { what, found, limit }) } else { Ok(()) }
}

/// Reads `len` bytes at `offset`. The caller has bounded `len`.
fn read_at(
    reader: &mut (impl Read + Seek),
    what: &'static str,
    offset: u64,
    len: u64,
    file_len: u64,
) -> Result<Piece, FormatError> {
    let truncated = || FormatError::Truncated { what, offset, len, file_len };
    if offset.checked_add(len).is_none_or(|end| end > file_len) {
        return Err(truncated());
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| truncated())?];
    reader
        .seek(SeekFrom::Start(offset))
        .and_then(|_| reader.read_exact(&mut bytes))
        .map_err(|source| FormatError::Read { what, offset, source })?;
    Ok(Piece { offset, bytes, what })
}

/// Little-endian fields, taken one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// The next `N` bytes; `None` behind the end.
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    /// The next `len` bytes, and behind them the padding to a multiple of 4 left out.
    fn padded(&mut self, len: u32) -> Option<&'a [u8]> {
        let len = usize::try_from(len).ok()?;
        let bytes = self.0.get(..len)?;
        self.0 = self.0.get(len.checked_next_multiple_of(4)?..)?;
        Some(bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests;
