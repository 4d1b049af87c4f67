//! Passes over memory of the test process, into stores that lend and stores that do not.
#![expect(clippy::cast_possible_truncation, reason = "small numbers")]

use super::*;
use evidence::map::{Kind, Region};
use evidence::{MemoryMap, Segment, Segments};
use host::ram_store::{Bound, Limit};
use host::{DiskStore, Place, Process, RamStore};
use std::fs::File;
use std::sync::atomic::{AtomicU32, Ordering};

/// A part of a block, two blocks, and a part of one again.
const GUEST: (u64, u64) = (0x18_0000, 0x30_0000);

pub(crate) fn guest() -> GuestRange {
    GuestRange::new(GUEST.0, GUEST.1).unwrap()
}

pub(crate) fn memory_at(process: u32, hva: u64, range: GuestRange) -> GuestMemory {
    GuestMemory::open(&Process::open(process).unwrap(), &[Place { range, hva }]).unwrap()
}

fn segments(range: GuestRange, offset: u64) -> Segments {
    Segments::new(vec![Segment { range, offset }]).unwrap()
}

/// A store with its blocks in one cell each, or with each in two.
pub(crate) fn ram(range: GuestRange, offset: u64, needed: &[GuestRange]) -> RamStore {
    let limit = Limit { bytes: 16 << 20, bound: Bound::MaxRam };
    RamStore::reserve(segments(range, offset), needed, &limit, |_, _| (), || false).unwrap()
}

fn disk(range: GuestRange) -> DiskStore {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("stillframe-pass-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    DiskStore::new(file, segments(range, 0)).unwrap()
}

pub(crate) fn cells(range: GuestRange) -> Vec<Cell> {
    let (gpa, len) = (range.start(), range.len());
    let region = Region {
        gpa,
        len,
        kind: Kind::Ram,
        name: "pc.ram".to_owned(),
        owner: None,
        block: None,
        block_offset: 0,
        mapping: None,
        page_size: None,
        readonly: false,
    };
    copy::cells(&MemoryMap::new(vec![region]).unwrap()).unwrap()
}

pub(crate) fn with_work<T>(
    source: &GuestMemory,
    store: &dyn Store,
    then: impl FnOnce(&Work<'_>) -> T,
) -> T {
    let (log, stop, observer) = (&Log::begin(), &Stop::new(), &|_: Event| ());
    then(&Work { source, store, log, workers: 1, max_rate: None, stop, observer })
}

fn kept(store: &dyn Store, block: GuestRange) -> Vec<u8> {
    let mut bytes = vec![0xee; index(block.len())];
    store.get(block, &mut bytes).unwrap();
    bytes
}

/// Two passes over memory that changes between them, into `store`.
fn two_passes(store: &dyn Store) {
    let len = index(GUEST.1);
    // Not written yet, and so holes: they stay so in the last block but for one page.
    let mut own = vec![0u8; len + 4096];
    let skip = own.as_ptr().align_offset(4096);
    for page in (0..0x280).filter(|page| page % 32 != 5) {
        own[skip + page * 4096..][..4096].fill(page as u8 | 1);
    }
    let source = memory_at(std::process::id(), own[skip..].as_ptr().addr() as u64, guest());
    with_work(&source, store, |work| {
        let (mut cells, mut scratch) = (cells(guest()), Scratch::new());
        for cell in &mut cells {
            first(work, cell, &mut scratch).unwrap();
        }
        let earlier = own[skip..][..len].to_vec();
        // The first and the last page, two neighbours over blocks, and all of the third block.
        let changed: Vec<usize> = [0, 0x7f, 0x80, 0x2ff].into_iter().chain(0x180..0x280).collect();
        changed.iter().for_each(|page| own[skip + page * 4096 + 77] ^= 0xff);
        for cell in &mut cells {
            let at = index(cell.block.start() - GUEST.0)..index(cell.block.end() - GUEST.0);
            assert!(kept(store, cell.block) == earlier[at.clone()], "{} once", cell.block);
            again(work, 2, cell, &mut scratch).unwrap();
            assert!(kept(store, cell.block) == own[skip..][at.clone()], "{} twice", cell.block);
            let pages = at.start / 4096..at.end / 4096;
            let seen: Vec<usize> = pages
                .clone()
                .filter(|page| cell.changed.as_ref().is_some_and(|c| bit(c, page - pages.start)))
                .collect();
            let mut due: Vec<_> = changed.iter().copied().filter(|p| pages.contains(p)).collect();
            due.sort_unstable();
            assert_eq!(seen, due, "{}", cell.block);
            let digest = (!due.is_empty()).then(|| sha256(&earlier[at]));
            assert_eq!(cell.first.as_deref().copied(), digest, "{}", cell.block);
            assert_eq!((cell.pass, cell.earlier.is_some()), (2, true));
        }
    });
}

#[test]
fn every_store_keeps_the_second_pass_and_the_differences() {
    two_passes(&ram(guest(), 0x8_0000, &[guest()]));
    // Not faulted in before: put on the first pass, lent on the second.
    two_passes(&ram(guest(), 0x8_0000, &[]));
    // Every block in two cells: never lent.
    two_passes(&ram(guest(), 0x1000, &[guest()]));
    two_passes(&disk(guest()));
}

#[test]
fn a_page_that_is_not_what_is_kept_of_it_shows_in_the_audit() {
    let len = index(GUEST.1);
    let mut own = vec![7u8; len + 4096];
    let skip = own.as_ptr().align_offset(4096);
    let source = memory_at(std::process::id(), own[skip..].as_ptr().addr() as u64, guest());
    let store = ram(guest(), 0x8_0000, &[guest()]);
    with_work(&source, &store, |work| {
        let (mut cells, mut scratches) = (cells(guest()), [Scratch::new(), Scratch::new()]);
        for cell in &mut cells {
            first(work, cell, &mut scratches[0]).unwrap();
        }
        let picked = Picks::new().pages(&cells, 64);
        let until = Instant::now() + Duration::from_secs(60);
        let mut audited = || {
            let same = |number: usize, new: &[u8], old: &mut [u8]| {
                store.get(picked[number].at, old).is_ok() && new == old
            };
            audit(work, &picked, &mut scratches, until, same).0
        };
        let calm = audited();
        assert_eq!((calm.pages, calm.differing), (picked.len() as u64, 0));
        // One byte of one page.
        let changed = picked[picked.len() / 2].at.start();
        own[skip + index(changed - GUEST.0) + 4095] ^= 1;
        let found = audited();
        let hits = picked.iter().filter(|pick| pick.at.start() == changed).count() as u64;
        assert_eq!((found.pages, found.differing), (calm.pages, hits));
        assert_eq!((found.bound_95, &*found.differing_at[0]), (None, &*format!("{changed:#x}")));
    });
}

#[test]
fn data_that_became_a_hole_is_kept_as_zeros() {
    // Of two blocks the first is data, which is then in the buffers, and the second a hole.
    let range = GuestRange::new(0, 2 << 20).unwrap();
    let mut own = vec![0u8; (2 << 20) + 4096];
    let skip = own.as_ptr().align_offset(4096);
    own[skip..][..1 << 20].fill(7);
    let source = memory_at(std::process::id(), own[skip..].as_ptr().addr() as u64, range);
    let (ram, disk) = (ram(range, 0, &[range]), disk(range));
    for store in [&ram as &dyn Store, &disk] {
        with_work(&source, store, |work| {
            let (mut cells, mut scratch) = (cells(range), Scratch::new());
            for cell in &mut cells {
                first(work, cell, &mut scratch).unwrap();
            }
            // As if its third page had been data at the first read.
            let page = GuestRange::new((1 << 20) + 0x2000, 4096).unwrap();
            store.put(page, &[9; 4096]).unwrap();
            cells[1].states[2] = PageState::Data;
            for cell in &mut cells {
                again(work, 2, cell, &mut scratch).unwrap();
            }
            assert_eq!(cells[1].changed.as_deref(), Some(&[4, 0, 0, 0, 0]));
            assert!(kept(store, cells[1].block).iter().all(|byte| *byte == 0));
            assert!(kept(store, cells[0].block).iter().all(|byte| *byte == 7));
        });
    }
}

#[test]
fn what_was_left_in_swap_once_was_not_read_twice() {
    use PageState::{Data, Excluded};
    let range = GuestRange::new(0, 4 * 4096).unwrap();
    let (ram, disk) = (ram(range, 0, &[range]), disk(range));
    for store in [&ram as &dyn Store, &disk] {
        let mut cell = cells(range).remove(0);
        // Read and swapped out, swapped out and read, twice in swap, read twice and others.
        cell.states.copy_from_slice(&[Data, Excluded, Excluded, Data]);
        let (zeros, bytes) = ([0; 4096], |byte| [byte; 4096]);
        store.put(range, &[bytes(1), zeros, zeros, bytes(4)].concat()).unwrap();
        let mut new = [zeros, bytes(2), zeros, bytes(5)].concat();
        let mut states = [Excluded, Data, Excluded, Data];
        second(store, &mut cell, &mut new, &mut [0; 4 * 4096], &mut states).unwrap();
        assert_eq!(states, [Data, Data, Excluded, Data]);
        assert!(kept(store, range) == [bytes(1), bytes(2), zeros, bytes(5)].concat());
        assert_eq!(cell.changed.as_deref(), Some(&[8, 0, 0, 0, 0]), "the last page alone");
    }
}

#[test]
fn a_block_whose_reading_failed_is_zeros() {
    let mut other = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let process = Process::open(other.id()).unwrap();
    // Its stack has data from the moment that it runs.
    let maps = process.maps().unwrap();
    let stack = maps.iter().find(|vma| vma.path == b"[stack]").unwrap();
    let range = GuestRange::new(stack.start % (1 << 20), stack.end - stack.start).unwrap();
    let source = memory_at(other.id(), stack.start, range);
    other.kill().unwrap();
    other.wait().unwrap();
    let store = ram(range, range.start(), &[range]);
    let block = cells(range)[0].block;
    // What a read that stopped half-way may have left.
    assert!(store.lend(block, &mut |bytes| bytes.fill(9)).unwrap());
    with_work(&source, &store, |work| {
        let mut cell = cells(range).remove(0);
        let failed = first(work, &mut cell, &mut Scratch::new());
        assert!(matches!(failed, Err(PassError::Gone(_))), "{failed:?}");
        assert_eq!(cell.pass, 0);
    });
    assert!(kept(&store, block).iter().all(|byte| *byte == 0));
}
