//! Raw: the byte at file offset X is the byte at guest-physical address X.
//!
//! The file is sparse and as long as the last region's end, which on hosts whose guests keep RAM
//! behind 1 TiB makes it look enormous. It has no header: only the record says which parts of it
//! are memory, and which zeros are not.

use super::{Decoded, FormatError, Layout, merged};
use crate::{MemoryMap, Segment, Segments};

/// The layout of `map`; the file ends where its last region ends.
///
/// # Errors
/// As [`super::encode`].
pub fn encode(map: &MemoryMap) -> Result<Layout, FormatError> {
    let list = merged(map).into_iter().map(|range| Segment { range, offset: range.start() });
    let segments = Segments::new(list.collect())?;
    let len = segments.end();
    Layout::new(segments, Vec::new(), len)
}

/// The layout that `map` gives, when the file has the length that belongs to it.
///
/// # Errors
/// [`FormatError::Length`] else.
pub fn decode(map: &MemoryMap, file_len: u64) -> Result<Decoded, FormatError> {
    let layout = encode(map)?;
    if layout.len != file_len {
        return Err(FormatError::Length { found: file_len, expected: layout.len });
    }
    Ok(Decoded { layout, notes: Vec::new(), machine: None })
}
