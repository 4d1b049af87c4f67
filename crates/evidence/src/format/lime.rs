//! LiME version 1: a sequence of records, each a header of 32 bytes and its memory.
//!
//! Written to the strictest of its readers: ascending, one record for each contiguous range,
//! reserved 0, nothing behind the last record (Volatility 3's `layers/lime.py` rejects the whole
//! file for 2 bytes more). Every page is written, zero pages too: LiME cannot say "zero" apart
//! from "not acquired", so a record left out would be a loss.
//!
//! A header of 32 bytes before each payload means that no payload is aligned to more than 32
//! bytes: an image in this format cannot be written with `O_DIRECT`, and a guest's zero page
//! becomes a file hole only where whole file-system blocks are zero.
//!
//! A range whose ends are not multiples of 4 KiB is written as it is. MemProcFS refuses a file
//! with such a record (LeechCore `device_file.c`, `DeviceFile_DumpInitialize_LiME`); padding it
//! would claim bytes that the guest does not have. QEMU's machines have no such ranges.

use super::{
    Decoded, Fields, FormatError, Layout, MAX_SEGMENTS, Piece, check_limit, count, merged, read_at,
};
use crate::{GuestRange, MemoryMap, Segment, Segments};
use std::io::{Read, Seek};

/// The first bytes of every record: `0x4C694D45`, little-endian.
pub const MAGIC: [u8; 4] = *b"EMiL";

/// Length of a record's header in bytes.
pub const HEADER_LEN: u64 = 32;

const VERSION: u32 = 1;
const WHAT: &str = "LiME header";

/// The layout of `map`.
///
/// # Errors
/// As [`super::encode`].
pub fn encode(map: &MemoryMap) -> Result<Layout, FormatError> {
    let mut pieces = Vec::new();
    let mut list = Vec::new();
    let mut at = 0u64;
    for range in merged(map) {
        let too_far = || crate::layout::LayoutError::Offset { range, offset: at };
        let offset = at.checked_add(HEADER_LEN).ok_or_else(too_far)?;
        let end = offset.checked_add(range.len()).ok_or_else(too_far)?;
        pieces.push(Piece { offset: at, bytes: header(range), what: WHAT });
        list.push(Segment { range, offset });
        at = end;
    }
    Layout::new(Segments::new(list)?, pieces, at)
}

/// The header of a record: magic, version, first and last address, reserved.
fn header(range: GuestRange) -> Vec<u8> {
    let mut bytes = Vec::from(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend(range.start().to_le_bytes());
    bytes.extend(range.last().to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes
}

/// Reads the headers of a file of `file_len` bytes, which must end where its last record ends.
///
/// Records that follow each other without a gap in the guest stay separate segments, as a header
/// lies between them.
///
/// # Errors
/// [`FormatError`] names the header that is wrong.
pub fn decode(reader: &mut (impl Read + Seek), file_len: u64) -> Result<Decoded, FormatError> {
    let mut pieces = Vec::new();
    let mut list = Vec::new();
    let mut at = 0;
    while at < file_len {
        check_limit("LiME records", count(&list).saturating_add(1), MAX_SEGMENTS)?;
        let piece = read_at(reader, WHAT, at, HEADER_LEN, file_len)?;
        let range = addresses(&piece.bytes, at, file_len)?;
        let offset = at.saturating_add(HEADER_LEN);
        at = offset.checked_add(range.len()).filter(|&end| end <= file_len).ok_or(
            FormatError::Truncated { what: "LiME payload", offset, len: range.len(), file_len },
        )?;
        pieces.push(piece);
        list.push(Segment { range, offset });
    }
    let layout = Layout::new(Segments::new(list)?, pieces, file_len)?;
    Ok(Decoded { layout, notes: Vec::new(), machine: None })
}

/// The addresses that the header at `offset` names.
fn addresses(header: &[u8], offset: u64, file_len: u64) -> Result<GuestRange, FormatError> {
    let mut fields = Fields(header);
    let mut take =
        || Some((fields.u32()?, fields.u32()?, fields.u64()?, fields.u64()?, fields.u64()?));
    let (magic, version, first, last, reserved) =
        take().ok_or(FormatError::Truncated { what: WHAT, offset, len: HEADER_LEN, file_len })?;
    let field = |what, found: u64, expected| FormatError::Field { what, offset, found, expected };
    if magic != u32::from_le_bytes(MAGIC) {
        return Err(field("LiME magic", magic.into(), "0x4c694d45"));
    }
    if version != VERSION {
        return Err(field("LiME version", version.into(), "1"));
    }
    if reserved != 0 {
        return Err(field("LiME reserved", reserved, "0"));
    }
    GuestRange::from_inclusive(first, last).ok_or(FormatError::Range {
        offset,
        gpa: first,
        len: last.wrapping_sub(first).wrapping_add(1),
    })
}
