//! What pages of `diskread` and blocks of its disk hold. Compiled twice: into the guest's program,
//! which reads the disk, and into the lab, which writes it and finds the pages in an image. Numbers
//! are little endian.

use crate::pattern::PAGE;

/// The magics, inverted: so a program that holds these bytes does not match its own pages.
const INVERTED: [[u8; 8]; 2] = [
    [!b's', !b't', !b'i', !b'l', !b'l', !b'd', !b's', !b'k'],
    [!b's', !b't', !b'i', !b'l', !b'l', !b'l', !b'd', !b'g'],
];

/// Stands before the number, all over a block.
pub fn block_magic() -> [u8; 8] {
    std::hint::black_box(INVERTED[0]).map(|byte| !byte)
}

/// Stands at the start of a ledger's page.
pub fn ledger_magic() -> [u8; 8] {
    std::hint::black_box(INVERTED[1]).map(|byte| !byte)
}

/// Length of magic and number, of which a block is full.
pub const MARK: usize = 16;

/// Writes block `number` of the disk.
pub fn block(number: u64, page: &mut [u8; PAGE]) {
    for mark in page.chunks_exact_mut(MARK) {
        mark[..8].copy_from_slice(&block_magic());
        mark[8..].copy_from_slice(&number.to_le_bytes());
    }
}

/// What stands in a ledger's page before its entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The thread that writes here.
    pub thread: u32,
    /// How many there are, each with one such page.
    pub threads: u32,
    /// K, the pages that all threads read into. Thread t has those whose number is t modulo the
    /// number of threads.
    pub pages: u32,
    /// Blocks of the disk, a multiple of K.
    pub blocks: u32,
    /// Guest frame number of the ledger's page.
    pub pfn: u64,
}

/// Length of the header, the magic included.
pub const HEADER: usize = 32;
/// Where the entries begin.
pub const ENTRIES_AT: usize = 0x40;
/// Length of an entry: the frame number of a page, and the number of the last read into it that had
/// ended. Read n goes to page n modulo K and brings block n modulo the number of blocks.
pub const ENTRY: usize = 16;
/// Entries that a page has room for.
pub const ENTRIES: usize = (PAGE - ENTRIES_AT) / ENTRY;

impl Header {
    /// The bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[..8].copy_from_slice(&ledger_magic());
        let parts = [self.thread, self.threads, self.pages, self.blocks];
        for (at, part) in parts.into_iter().enumerate() {
            bytes[8 + at * 4..12 + at * 4].copy_from_slice(&part.to_le_bytes());
        }
        bytes[24..].copy_from_slice(&self.pfn.to_le_bytes());
        bytes
    }
}
