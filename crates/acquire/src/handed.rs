//! What capture hands to the processes that parse: where guest memory lies in a file that comes as a
//! descriptor.

use evidence::{GuestRange, Segment, Segments};

/// Where a range of guest memory lies in a file: its start, its length, its offset.
pub type Where = (u64, u64, u64);

/// The user that such a process becomes: `nobody`, on every Linux.
pub const NOBODY: u32 = 65534;

/// To be handed.
pub fn wheres(segments: &Segments) -> Vec<Where> {
    segments.list().iter().map(|s| (s.range.start(), s.range.len(), s.offset)).collect()
}

/// As it was handed.
///
/// # Errors
/// They are no segments.
pub fn segments(wheres: &[Where]) -> Result<Segments, String> {
    let list: Option<Vec<Segment>> = wheres
        .iter()
        .map(|&(start, len, offset)| Some(Segment { range: GuestRange::new(start, len)?, offset }))
        .collect();
    Segments::new(list.ok_or("a segment is none")?).map_err(|error| error.to_string())
}
