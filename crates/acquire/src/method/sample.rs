//! Pages that are read from outside while QEMU sends its memory, and nobody can write them: what QEMU
//! sent of them must be the same.

use super::process::{Picks, Work};
use crate::copy::Cell;
use crate::plan::AUDIT_PAGES;
use evidence::block::{BLOCK_PAGES, index};
use evidence::digest::{Digest, sha256};
use evidence::manifest::Audit;
use evidence::record::Span;
use evidence::state::pages;
use evidence::{GuestRange, PageState};
use host::pagemap::Entry;
use host::{Source, Store};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// Pages that were read from outside while nobody could write them.
#[derive(Default)]
pub struct Samples {
    list: Vec<(GuestRange, Digest, Span)>,
}

impl Samples {
    /// Those that were read before `until_ns` of the record.
    pub(super) fn before(mut self, until_ns: u64) -> Self {
        self.list.retain(|(_, _, span)| span.t1_ns <= until_ns);
        self
    }

    /// Holds those that came against what `store` has of them; `None` when there are none.
    pub fn audit(&self, cells: &[Cell], store: &dyn Store) -> Option<(Audit, Span)> {
        let span = self.list.iter().map(|(_, _, span)| *span).reduce(Span::join)?;
        let (mut count, mut differing, mut buffer) = (0, Vec::new(), Vec::new());
        for (at, digest, _) in self.list.iter().filter(|(at, ..)| came(cells, *at)) {
            count += 1;
            buffer.resize(index(at.len()), 0);
            if store.get(*at, &mut buffer).is_err() || sha256(&buffer) != *digest {
                differing.push(at.start());
            }
        }
        differing.sort_unstable();
        Some((Audit::new(count, &differing), span))
    }
}

/// Whether the page `at` came: what was cut off is a loss, and differs from nothing.
fn came(cells: &[Cell], at: GuestRange) -> bool {
    let cell = cells.partition_point(|cell| cell.block.end() <= at.start());
    let Some(cell) = cells.get(cell).filter(|cell| cell.block.covers(at)) else { return false };
    let page = pages(cell.block).position(|page| page == at);
    let state = page.and_then(|page| cell.states.get(page));
    matches!(state, Some(PageState::Data | PageState::Zero))
}

/// One page: its digest, and when it was read; `None` if nobody could say what it shows.
pub(super) type Look = fn(&Work<'_>, GuestRange, &mut Vec<u8>) -> Option<(Digest, Span)>;

/// Reads pages at random by `look`, until it has `ended` or they are enough.
pub(super) fn sample(work: &Work<'_>, cells: &[Cell], look: Look, ended: &AtomicBool) -> Samples {
    let (mut samples, mut picks) = (Samples::default(), Picks::new());
    let mut buffer = Vec::new();
    let count = index(AUDIT_PAGES);
    while samples.list.len() < count && !ended.load(Ordering::Relaxed) && !cells.is_empty() {
        let mut found = false;
        for _ in 0..BATCH {
            let Some(cell) = cells.get(picks.below(cells.len())) else { continue };
            let Some(at) = pages(cell.block).nth(picks.below(BLOCK_PAGES)) else { continue };
            if let Some((digest, span)) = look(work, at, &mut buffer) {
                found = true;
                samples.list.push((at, digest, span));
            }
        }
        if !found {
            // Nothing is protected yet, or any more: the guest shall have the CPU.
            thread::sleep(Duration::from_millis(1));
        }
    }
    samples.list.truncate(count);
    samples
}

/// Pages that are tried before the others get a turn.
const BATCH: usize = 64;

/// A page that is protected from writing before it is read and after: its bytes are those of the stop.
pub(super) fn protected(
    work: &Work<'_>,
    at: GuestRange,
    buffer: &mut Vec<u8>,
) -> Option<(Digest, Span)> {
    let is_protected = || {
        let entry = entry(work, at)?;
        (entry.present() && entry.write_protected()).then_some(())
    };
    is_protected()?;
    let looked = read(work, at, buffer)?;
    is_protected()?;
    Some(looked)
}

/// A page of a guest that stands.
pub(super) fn standing(
    work: &Work<'_>,
    at: GuestRange,
    buffer: &mut Vec<u8>,
) -> Option<(Digest, Span)> {
    // Nothing is given memory for being looked at.
    entry(work, at)?.present().then_some(())?;
    read(work, at, buffer)
}

fn entry(work: &Work<'_>, at: GuestRange) -> Option<Entry> {
    let mut entry = [Entry::default()];
    work.source.entries(at, &mut entry).ok()?;
    let [entry] = entry;
    Some(entry)
}

fn read(work: &Work<'_>, at: GuestRange, buffer: &mut Vec<u8>) -> Option<(Digest, Span)> {
    let t0_ns = work.log.now_ns();
    buffer.resize(index(at.len()), 0);
    let mut states = [PageState::Hole];
    work.source.read(at, buffer, &mut states).ok()?;
    (states == [PageState::Data] || states == [PageState::Zero])
        .then(|| (sha256(buffer), Span { t0_ns, t1_ns: work.log.now_ns() }))
}
