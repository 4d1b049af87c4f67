//! Blocks: the unit of copying, of digests and of records.

use crate::{GuestRange, MemoryMap};

/// Alignment and greatest length of a block in bytes: 1 MiB.
pub const BLOCK_LEN: u64 = 1 << 20;

/// Blocks that one image may have: 64 TiB of memory.
pub const MAX_BLOCKS: u64 = 1 << 26;

/// A 1 MiB-aligned cell of guest-physical space cut with one region of the map.
pub type Block = GuestRange;

/// The map holds more memory than an image can describe.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the map holds {0} blocks, more than the {MAX_BLOCKS} that an image may have")]
pub struct TooManyBlocks(pub u64);

/// `BLOCK_LEN` as a length of buffers.
pub const BLOCK_BYTES: usize = 1 << 20;

/// Pages that a block can touch: 256, and one more when it begins and ends amid a page.
pub const BLOCK_PAGES: usize = 257;

/// A length or count within one block as an index. Lengths of blocks are at most [`BLOCK_LEN`], so
/// nothing is lost; a greater number gives `usize::MAX`, which no buffer has.
pub fn index(within_block: u64) -> usize {
    usize::try_from(within_block).unwrap_or(usize::MAX)
}

/// The block of `range` in the cell that holds `addr`.
fn at(range: GuestRange, addr: u64) -> Option<Block> {
    let cell = addr / BLOCK_LEN * BLOCK_LEN;
    GuestRange::new(cell, BLOCK_LEN).map_or_else(
        // The last cell of the address space.
        || GuestRange::from_ends(cell.max(range.start()), range.end()),
        |cell| cell.intersect(range),
    )
}

/// The blocks of a map in address order, none of them kept in memory: a forged map may name
/// millions.
#[derive(Clone, Debug)]
pub struct Blocks {
    ranges: Vec<GuestRange>,
    /// The range that the next block is in.
    range: usize,
    /// The next block.
    next: Option<Block>,
    total: u64,
}

impl Blocks {
    /// The blocks of the imaged regions of `map`.
    ///
    /// # Errors
    /// [`TooManyBlocks`].
    pub fn of(map: &MemoryMap) -> Result<Self, TooManyBlocks> {
        let ranges: Vec<GuestRange> = map.imaged().map(|(_, range)| range).collect();
        let count = ranges.iter().fold(0u64, |sum, r| {
            sum.saturating_add(r.last() / BLOCK_LEN - r.start() / BLOCK_LEN + 1)
        });
        if count > MAX_BLOCKS {
            return Err(TooManyBlocks(count));
        }
        let next = ranges.first().and_then(|&range| at(range, range.start()));
        Ok(Self { ranges, range: 0, next, total: count })
    }

    /// How many there are in all.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The next one; it is not taken.
    pub fn peek(&self) -> Option<Block> {
        self.next
    }

    /// Whether `block` is one of those that are still to come.
    pub fn will_come(&self, block: Block) -> bool {
        let after = self.ranges.partition_point(|range| range.start() <= block.start());
        let range = after.checked_sub(1).and_then(|index| self.ranges.get(index));
        let is_one = range.is_some_and(|&range| at(range, block.start()) == Some(block));
        is_one && self.next.is_some_and(|next| next.start() <= block.start())
    }
}

impl Iterator for Blocks {
    type Item = Block;

    fn next(&mut self) -> Option<Block> {
        let block = self.next?;
        let range = self.ranges.get(self.range)?;
        self.next = if block.end() < range.end() {
            at(*range, block.end())
        } else {
            self.range += 1;
            self.ranges.get(self.range).and_then(|&range| at(range, range.start()))
        };
        Some(block)
    }
}

/// Cuts the imaged regions of `map` into blocks, in address order.
///
/// # Errors
/// [`TooManyBlocks`] before anything is allocated.
pub fn cut(map: &MemoryMap) -> Result<Vec<Block>, TooManyBlocks> {
    Ok(Blocks::of(map)?.collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::tests::ram;
    use proptest::prelude::*;

    #[test]
    fn a_region_is_cut_at_every_mebibyte() {
        let map = MemoryMap::new(vec![ram(0, 0xa_0000), ram(0xc_0000, 0x24_0001)]).unwrap();
        let blocks: Vec<_> = cut(&map).unwrap().iter().map(|b| (b.start(), b.len())).collect();
        assert_eq!(
            blocks,
            [
                (0, 0xa_0000),
                (0xc_0000, 0x4_0000),
                (0x10_0000, 0x10_0000),
                (0x20_0000, 0x10_0000),
                (0x30_0000, 1),
            ]
        );
    }

    #[test]
    fn an_absurd_map_is_refused_before_allocation() {
        let map = MemoryMap::new(vec![ram(0, 1 << 60)]).unwrap();
        assert_eq!(cut(&map), Err(TooManyBlocks(1 << 40)));
    }

    #[test]
    fn the_last_cell_of_the_address_space_is_one() {
        let map = MemoryMap::new(vec![ram(u64::MAX - 0x30_0000, 0x30_0000)]).unwrap();
        let blocks = cut(&map).unwrap();
        assert_eq!(blocks.iter().map(|b| b.len()).sum::<u64>(), 0x30_0000);
        assert_eq!(blocks.last().unwrap().end(), u64::MAX);
    }

    proptest! {
        #[test]
        fn blocks_tile_the_regions(gaps in proptest::collection::vec((0u64..0x30_0000, 1u64..0x40_0000), 1..20)) {
            let mut at = 0;
            let mut regions = Vec::new();
            for (gap, len) in gaps {
                at += gap;
                regions.push(ram(at, len));
                at += len;
            }
            let map = MemoryMap::new(regions.clone()).unwrap();
            let blocks = cut(&map).unwrap();
            let mut lazy = Blocks::of(&map).unwrap();
            prop_assert_eq!(lazy.total(), blocks.len() as u64);
            for (number, block) in blocks.iter().enumerate() {
                prop_assert_eq!(lazy.peek(), Some(*block));
                prop_assert!(blocks[number..].iter().all(|later| lazy.will_come(*later)));
                prop_assert!(!blocks[..number].iter().any(|gone| lazy.will_come(*gone)));
                prop_assert!(block.len() == 1 || !lazy.will_come(GuestRange::new(block.start(), 1).unwrap()));
                lazy.next();
            }
            prop_assert_eq!(lazy.peek(), None);
            prop_assert_eq!(blocks.iter().map(|b| b.len()).sum::<u64>(), map.imaged_len());
            for pair in blocks.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].start());
            }
            for block in blocks {
                prop_assert!(block.len() <= BLOCK_LEN);
                prop_assert_eq!(block.start() / BLOCK_LEN, block.last() / BLOCK_LEN);
                prop_assert!(map.find(block).is_some());
            }
        }
    }
}
