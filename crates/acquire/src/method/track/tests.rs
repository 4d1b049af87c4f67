//! The bookkeeping of written pages; the method itself is tried on real guests, whose kernels track.

use super::*;
use crate::method::process::tests::{cells, guest, memory_at, ram, with_work};

fn present(frame: u64, written: bool) -> Entry {
    Entry(1 << 63 | u64::from(written) << 55 | frame)
}

fn watched(entries: &[Entry]) -> Watched {
    let before: Box<[Entry]> = entries.into();
    let now = before.clone();
    Watched { before, now, todo: Changed::default(), emptied: Changed::default() }
}

fn listed(bits: &Changed) -> Vec<usize> {
    (0..BLOCK_PAGES).filter(|page| bit(bits, *page)).collect()
}

#[test]
fn what_was_written_is_read_and_what_was_given_back_is_empty() {
    let absent = Entry(0);
    let mut watched = watched(&[present(1, true), present(2, false), absent, present(4, false)]);
    let now = [present(1, true), present(9, false), present(3, true), absent];
    assert_eq!(watched.take(&now), None);
    assert_eq!((listed(&watched.todo), listed(&watched.emptied)), (vec![0, 1, 2], vec![3]));
    // Looked at again: the same, and nothing is added up.
    assert_eq!(watched.take(&now), None);
    assert_eq!((listed(&watched.todo), listed(&watched.emptied)), (vec![0, 1, 2], vec![3]));
    assert!(watched.is_touched());
}

#[test]
fn a_mark_that_vanishes_from_the_same_page_is_not_ours() {
    let mut watched = watched(&[present(1, false), present(2, false)]);
    assert_eq!(watched.take(&[present(1, true), present(2, true)]), None);
    // Another page took its place: that is the guest's doing, and it is read.
    assert_eq!(watched.take(&[present(7, false), present(2, true)]), None);
    assert_eq!(listed(&watched.todo), [0, 1]);
    assert_eq!(watched.take(&[present(7, false), present(2, false)]), Some(1));
}

#[test]
fn only_what_was_marked_is_read_again() {
    let range = guest();
    let mut memory = vec![0u8; index(range.len()) + 4096];
    let skip = memory.as_ptr().align_offset(4096);
    let page = |number: usize| skip + number * 4096..skip + (number + 1) * 4096;
    for (number, byte) in [(0, 1), (1, 2), (2, 3)] {
        memory[page(number)].fill(byte);
    }
    let source = memory_at(std::process::id(), memory.as_ptr() as u64 + skip as u64, range);
    let store = ram(range, 0, &[range]);
    let mut cells = cells(range);
    with_work(&source, &store, |work| {
        let mut scratch = Scratch::new();
        first(work, &mut cells[0], &mut scratch).unwrap();
        // Page 1 is written and marked, page 0 is written too, but nobody says so.
        memory[page(0)].fill(8);
        memory[page(1)].fill(9);
        let mut watched = Watched::new(&cells[0]);
        set(&mut watched.todo, 1);
        set(&mut watched.emptied, 2);
        read_again(work, 2, &mut cells[0], &mut watched, &mut scratch).unwrap();
    });
    let block = cells[0].block;
    let mut kept = vec![0; 3 * 4096];
    let at = GuestRange::new(block.start(), 3 * 4096).unwrap();
    host::Store::get(&store, at, &mut kept).unwrap();
    let bytes: Vec<u8> = kept.iter().step_by(4096).copied().collect();
    assert_eq!(bytes, [1, 9, 0]);
    assert!(kept.chunks(4096).all(|page| page.iter().all(|byte| *byte == page[0])));
    let cell = &cells[0];
    assert_eq!(cell.states[..3], [PageState::Data, PageState::Data, PageState::Hole]);
    assert_eq!(listed(cell.changed.as_ref().unwrap()), [1, 2]);
    assert_eq!(cell.pass, 2);
}

#[test]
fn the_latency_is_the_worst_mean_between_two_looks() {
    let mut latency = Latency::default();
    let times =
        |device: &str, requests, total_ns| BlockTimes { device: device.into(), requests, total_ns };
    latency.take(vec![times("a", 10, 1000), times("b", 0, 0)]);
    assert_eq!(latency.worst_ns, None, "what was before is not ours");
    latency.take(vec![times("a", 12, 1500), times("b", 0, 0)]);
    latency.take(vec![times("a", 112, 2500), times("b", 1, 90)]);
    assert_eq!(latency.worst_ns, Some(250));
}
