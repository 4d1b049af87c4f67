//! What capture and seal know of each block, in a memfd that both have open: seal may die at any
//! moment, and what it had sealed by then is sealed.
//!
//! One entry of fixed length for each block, in address order. Seal may be hostile by the time
//! capture reads an entry back: only what seal may say is taken from it.

use crate::copy::Cell;
use evidence::block::{BLOCK_PAGES, index};
use evidence::digest::Digest;
use evidence::state::{Run, page_count};
use evidence::{Block, GuestRange, PageState};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Length of an entry in bytes.
const ENTRY: usize = 320;

/// Where in an entry what stands; numbers are little endian.
const LEN_AT: usize = 8;
const SEALED_AT: usize = 16;
const DIGEST_AT: usize = 17;
const STATES_AT: usize = 49;

const _: () = assert!(STATES_AT + BLOCK_PAGES <= ENTRY);

/// What stands for the states, by position.
const STATES: [PageState; 6] = [
    PageState::Data,
    PageState::Zero,
    PageState::Hole,
    PageState::Discarded,
    PageState::Unreadable,
    PageState::Excluded,
];

/// One block as the table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The addresses.
    pub block: Block,
    /// A state for each page.
    pub states: Vec<PageState>,
    /// Digest of its bytes; known once it is sealed.
    pub digest: Digest,
    /// The image holds it.
    pub sealed: bool,
}

/// The file.
#[derive(Debug)]
pub struct Table {
    file: File,
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the table of blocks {what}"))
}

impl Table {
    /// A table in `file`.
    pub fn new(file: File) -> Self {
        Self { file }
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of a table for `cells` blocks.
    pub fn len_of(cells: usize) -> usize {
        cells.saturating_mul(ENTRY)
    }

    /// Number of entries.
    ///
    /// # Errors
    /// The file system's.
    pub fn count(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len() / ENTRY as u64)
    }

    /// Writes what is known of `cells`, and takes their states, which the table has then; gives
    /// them back in short, so that what seal makes of them can be checked.
    ///
    /// # Errors
    /// The file system's.
    pub fn fill(&self, cells: &mut [Cell]) -> io::Result<Vec<Box<[Run]>>> {
        let mut kept = Vec::with_capacity(cells.len());
        for (number, cell) in (0u64..).zip(cells) {
            let states = std::mem::take(&mut cell.states).into_vec();
            kept.push(evidence::state::runs(&states).into());
            let (block, digest) = (cell.block, Digest::ZERO);
            self.put(number, &Entry { block, states, digest, sealed: false })?;
        }
        Ok(kept)
    }

    /// Gives `cells` their states back, and what seal found: a digest, and pages that are zero. A
    /// block whose entry cannot be read, or was changed as seal has no right to, is not sealed; gives
    /// back how many of these there are.
    pub fn collect(&self, cells: &mut [Cell], kept: &[Box<[Run]>]) -> u64 {
        let mut broken = 0;
        for ((number, cell), runs) in (0u64..).zip(cells).zip(kept) {
            let before: Vec<PageState> =
                runs.iter().flat_map(|Run(state, n)| (0..*n).map(|_| *state)).collect();
            let may = |(now, before): (&PageState, &PageState)| {
                now == before
                    || *now == PageState::Unreadable
                    || (*before == PageState::Data && *now == PageState::Zero)
            };
            let fits = |entry: &Entry| {
                entry.block == cell.block
                    && entry.states.len() == before.len()
                    && entry.states.iter().zip(&before).all(may)
            };
            match self.get(number).ok().filter(fits) {
                Some(entry) => {
                    cell.states = entry.states.into();
                    cell.digest = entry.digest;
                    cell.sealed = entry.sealed;
                }
                None => {
                    broken += 1;
                    cell.states = before.into();
                    cell.sealed = false;
                }
            }
        }
        broken
    }

    /// An entry for `cell`, of which nothing is there.
    pub fn unknown(cell: &Cell) -> Entry {
        let states = vec![PageState::Unreadable; cell.states.len()];
        Entry { block: cell.block, states, digest: Digest::ZERO, sealed: false }
    }

    /// Entry `number`.
    ///
    /// # Errors
    /// The file system's; an entry that is none.
    pub fn get(&self, number: u64) -> io::Result<Entry> {
        let mut bytes = [0; ENTRY];
        self.file.read_exact_at(&mut bytes, number * ENTRY as u64)?;
        let word = |at: usize| {
            let bytes = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>());
            bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        let block = GuestRange::new(word(0), word(LEN_AT)).ok_or_else(|| broken("has no block"))?;
        let pages = index(page_count(block));
        let states = bytes
            .get(STATES_AT..)
            .and_then(|states| states.get(..pages))
            .filter(|_| pages <= BLOCK_PAGES)
            .ok_or_else(|| broken("has too long a block"))?
            .iter()
            .map(|code| STATES.get(usize::from(*code)).copied())
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| broken("has an unknown state"))?;
        let digest = bytes.get(DIGEST_AT..).and_then(|rest| rest.first_chunk::<32>());
        let digest = Digest(*digest.ok_or_else(|| broken("has no digest"))?);
        Ok(Entry { block, states, digest, sealed: bytes[SEALED_AT] == 1 })
    }

    /// Writes entry `number`.
    ///
    /// # Errors
    /// The file system's.
    pub fn put(&self, number: u64, entry: &Entry) -> io::Result<()> {
        let mut bytes = [0; ENTRY];
        bytes[..LEN_AT].copy_from_slice(&entry.block.start().to_le_bytes());
        bytes[LEN_AT..SEALED_AT].copy_from_slice(&entry.block.len().to_le_bytes());
        bytes[SEALED_AT] = u8::from(entry.sealed);
        bytes[DIGEST_AT..STATES_AT].copy_from_slice(&entry.digest.0);
        for (byte, state) in bytes.iter_mut().skip(STATES_AT).zip(&entry.states) {
            let code = STATES.iter().position(|known| known == state);
            *byte = code.and_then(|code| u8::try_from(code).ok()).unwrap_or(u8::MAX);
        }
        self.file.write_all_at(&bytes, number * ENTRY as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use evidence::digest::sha256;

    fn table() -> Table {
        Table::new(tempfile::tempfile().unwrap())
    }

    fn entry() -> Entry {
        Entry {
            block: GuestRange::new(0x10_0000, 0x2800).unwrap(),
            states: vec![PageState::Data, PageState::Hole, PageState::Excluded],
            digest: sha256(b"x"),
            sealed: true,
        }
    }

    #[test]
    fn entries_come_back() {
        let table = table();
        table.put(3, &entry()).unwrap();
        assert_eq!(table.get(3).unwrap(), entry());
        assert_eq!(table.count().unwrap(), 4);
        // A hole of the file is no block.
        assert!(table.get(2).is_err() && table.get(4).is_err());
    }

    #[test]
    fn seal_may_say_what_it_found_and_no_more() {
        let table = table();
        let collect = |edit: &dyn Fn(&mut Entry)| {
            let mut cell = Cell::new(entry().block);
            cell.states = entry().states.into();
            let mut cells = vec![cell];
            let kept = table.fill(&mut cells).unwrap();
            assert!(cells[0].states.is_empty() && !table.get(0).unwrap().sealed);
            let mut changed = entry();
            edit(&mut changed);
            table.put(0, &changed).unwrap();
            match table.collect(&mut cells, &kept) {
                0 => Ok(cells.remove(0)),
                _ => Err(Box::new(cells.remove(0))),
            }
        };
        let cell = collect(&|entry| entry.states[0] = PageState::Zero).unwrap();
        assert_eq!(
            (cell.states[0], cell.digest, cell.sealed),
            (PageState::Zero, sha256(b"x"), true)
        );
        assert!(collect(&|entry| entry.states = vec![PageState::Unreadable; 3]).is_ok());
        let refused = collect(&|entry| entry.states[1] = PageState::Data).unwrap_err();
        assert!(!refused.sealed && *refused.states == *entry().states);
        assert!(collect(&|entry| entry.states[2] = PageState::Hole).is_err());
        assert!(collect(&|entry| entry.block = GuestRange::new(0, 0x2800).unwrap()).is_err());
    }
}
