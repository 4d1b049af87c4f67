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

/// The blocks of one region.
fn cells(range: GuestRange) -> impl Iterator<Item = Block> {
    (range.start() / BLOCK_LEN..=range.last() / BLOCK_LEN).filter_map(move |cell| {
        let start = (cell * BLOCK_LEN).max(range.start());
        let end = (cell * BLOCK_LEN).saturating_add(BLOCK_LEN).min(range.end());
        GuestRange::from_ends(start, end)
    })
}

/// Cuts the imaged regions of `map` into blocks, in address order.
///
/// # Errors
/// [`TooManyBlocks`] before anything is allocated.
pub fn cut(map: &MemoryMap) -> Result<Vec<Block>, TooManyBlocks> {
    let count = map.imaged().fold(0u64, |sum, (_, r)| {
        sum.saturating_add(r.last() / BLOCK_LEN - r.start() / BLOCK_LEN + 1)
    });
    if count > MAX_BLOCKS {
        return Err(TooManyBlocks(count));
    }
    Ok(map.imaged().flat_map(|(_, range)| cells(range)).collect())
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
