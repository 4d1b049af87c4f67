//! Where guest memory lies in a file or a store.

use crate::{BLOCK_LEN, GuestRange, MemoryMap};

/// A guest-physical range and the byte offset where it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// The guest-physical addresses.
    pub range: GuestRange,
    /// Offset of the first byte in the file or store.
    pub offset: u64,
}

impl Segment {
    /// Offset behind the segment's last byte.
    ///
    /// Cannot wrap: [`Segments::new`] checks it.
    pub fn end(&self) -> u64 {
        self.offset + self.range.len()
    }
}

/// Why segments do not make a layout.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    /// Two segments overlap or are not ascending in guest-physical space.
    #[error("segment {second} follows {first} but does not lie behind it")]
    Order {
        /// The earlier one.
        first: GuestRange,
        /// The later one.
        second: GuestRange,
    },
    /// A segment's end passes 2^63 - 1, the largest file offset.
    #[error("segment {range} at offset {offset:#x} ends behind the largest file offset")]
    Offset {
        /// The addresses.
        range: GuestRange,
        /// Where it should lie.
        offset: u64,
    },
    /// Two segments share bytes of the file.
    #[error("segments {first} and {second} overlap in the file")]
    Shared {
        /// The one that lies first in the file.
        first: GuestRange,
        /// The one that lies behind it.
        second: GuestRange,
    },
}

/// Segments in ascending guest-physical order, disjoint in the guest and in the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments {
    list: Vec<Segment>,
}

impl Segments {
    /// Checks order, overlap and offsets.
    ///
    /// # Errors
    /// [`LayoutError`] names the segments.
    pub fn new(list: Vec<Segment>) -> Result<Self, LayoutError> {
        for segment in &list {
            let end = segment.offset.checked_add(segment.range.len());
            if end.is_none_or(|end| end > i64::MAX as u64) {
                return Err(LayoutError::Offset { range: segment.range, offset: segment.offset });
            }
        }
        for pair in list.windows(2) {
            if let [first, second] = pair
                && second.range.start() < first.range.end()
            {
                return Err(LayoutError::Order { first: first.range, second: second.range });
            }
        }
        let mut by_offset: Vec<&Segment> = list.iter().collect();
        by_offset.sort_by_key(|s| s.offset);
        for pair in by_offset.windows(2) {
            if let [first, second] = pair
                && second.offset < first.end()
            {
                return Err(LayoutError::Shared { first: first.range, second: second.range });
            }
        }
        Ok(Self { list })
    }

    /// The imaged regions of `map` one behind the other, each at an offset that is its address but
    /// for a multiple of [`BLOCK_LEN`]: how a RAM store lies. A block of the guest is then in one MiB of the store, not in two.
    ///
    /// # Errors
    /// [`LayoutError::Offset`] when the sum is no file offset.
    pub fn packed(map: &MemoryMap) -> Result<Self, LayoutError> {
        let mut list = Vec::new();
        let mut end = 0u64;
        for (_, range) in map.imaged() {
            // Of 64 bits as well: 2^64 is a multiple of a block's length.
            let skew = range.start().wrapping_sub(end) & (BLOCK_LEN - 1);
            let offset = end.checked_add(skew).ok_or(LayoutError::Offset { range, offset: end })?;
            end = offset.checked_add(range.len()).ok_or(LayoutError::Offset { range, offset })?;
            list.push(Segment { range, offset });
        }
        Self::new(list)
    }

    /// The segments, ascending in guest-physical space.
    pub fn list(&self) -> &[Segment] {
        &self.list
    }

    /// Offset of `range`'s first byte, when one segment holds all of it.
    pub fn offset_of(&self, range: GuestRange) -> Option<u64> {
        let after = self.list.partition_point(|s| s.range.start() <= range.start());
        let segment = self.list.get(after.checked_sub(1)?)?;
        segment
            .range
            .covers(range)
            .then(|| segment.offset + (range.start() - segment.range.start()))
    }

    /// Offset behind the last byte of any segment; 0 when there is none.
    pub fn end(&self) -> u64 {
        self.list.iter().map(Segment::end).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::tests::ram;

    #[test]
    fn packed_lies_back_to_back() {
        let map = MemoryMap::new(vec![ram(0, 0x1001), ram(0x30_0000, 0x2000)]).unwrap();
        let segments = Segments::packed(&map).unwrap();
        let offsets: Vec<_> = segments.list().iter().map(|s| s.offset).collect();
        assert_eq!(offsets, [0, 0x10_0000]);
        assert_eq!(
            segments.offset_of(GuestRange::new(0x30_1000, 0x1000).unwrap()),
            Some(0x10_1000)
        );
        assert_eq!(segments.offset_of(GuestRange::new(0x30_1000, 0x1001).unwrap()), None);
        assert_eq!(segments.offset_of(GuestRange::new(0xf_ffff, 1).unwrap()), None);
        assert_eq!(segments.end(), 0x10_2000);
    }

    #[test]
    fn packed_blocks_lie_in_one_mib_each() {
        let map = MemoryMap::new(vec![
            ram(0, 0xa_0000),
            ram(0xc_0000, 0x44_0000),
            ram(0xfffc_0000, 0x4_0000),
            ram(0x1_0000_0000, 0x10_0000),
        ]);
        let segments = Segments::packed(&map.unwrap()).unwrap();
        let offsets: Vec<_> = segments.list().iter().map(|s| s.offset).collect();
        assert_eq!(offsets, [0, 0xc_0000, 0x5c_0000, 0x60_0000]);
    }

    #[test]
    fn overlap_in_guest_or_file_is_refused() {
        let at =
            |start, len, offset| Segment { range: GuestRange::new(start, len).unwrap(), offset };
        assert!(Segments::new(vec![at(0, 10, 100), at(10, 10, 0)]).is_ok());
        assert!(matches!(
            Segments::new(vec![at(0, 10, 0), at(9, 10, 100)]),
            Err(LayoutError::Order { .. })
        ));
        assert!(matches!(
            Segments::new(vec![at(0, 10, 5), at(10, 10, 0)]),
            Err(LayoutError::Shared { .. })
        ));
        assert!(matches!(
            Segments::new(vec![at(0, 10, i64::MAX as u64)]),
            Err(LayoutError::Offset { .. })
        ));
    }
}
