//! Methods that read QEMU's process from outside: passes over the memory, with or without a hold.
//!
//! `live` is two whole passes over the running guest and no hold. A page that is the same in both
//! had that value at the instant between them (unless it changed and changed back); the others
//! are the smear map. The second pass is what the store keeps.

use crate::copy::{self, Cell, Changed, Cut, Scratch, Setting};
use crate::event::{Event, Observer, Phase};
use crate::stop::Stop;
use evidence::block::index;
use evidence::digest::{Digest, sha256};
use evidence::record::Span;
use evidence::state::pages;
use evidence::{GuestRange, PageState};
use host::{Gone, GuestMemory, Source, Store};
use std::io;
use std::time::Instant;

/// Why a pass could not go on.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The process is gone, or is no longer the one that was found.
    #[error("the source is gone")]
    Gone(#[from] Gone),
    /// The store did not take or give bytes.
    #[error("the store failed at {at}")]
    Store {
        /// The block.
        at: GuestRange,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// The host's side of the map is no longer what it was.
    #[error("the process's mappings changed")]
    Mappings(#[source] host::HostError),
}

/// One pass that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Its number, from 1.
    pub n: u32,
    /// From the first to the last read, in nanoseconds since the acquisition began.
    pub span: Span,
    /// Bytes looked at, holes included.
    pub bytes: u64,
    /// Pages that differ from the pass before; `None` for the first.
    pub changed_pages: Option<u64>,
}

/// Everything that a pass works with.
pub struct Work<'a> {
    /// Where bytes are read from.
    pub source: &'a GuestMemory,
    /// Where they rest.
    pub store: &'a dyn Store,
    /// The beginning of the acquisition.
    pub origin: Instant,
    /// Worker threads.
    pub workers: usize,
    /// Bytes per second, all workers together.
    pub max_rate: Option<u64>,
    /// The operator's wish to end.
    pub stop: &'a Stop,
    /// Whoever listens.
    pub observer: &'a dyn Observer,
}

impl Work<'_> {
    /// Nanoseconds since the acquisition began: 2^64 of them are 584 years.
    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn pass(
        &self,
        n: u32,
        passes: &mut Vec<Pass>,
        cells: &mut [Cell],
        block: impl Fn(&mut Cell, &mut Scratch) -> Result<(), PassError> + Sync,
    ) -> Result<(), Cut<PassError>> {
        self.source.begin_pass().map_err(|error| Cut::Failed(PassError::Mappings(error)))?;
        let setting = Setting {
            workers: self.workers,
            max_rate: self.max_rate,
            stop: self.stop,
            observer: self.observer,
            phase: Phase::Capture,
            pass: Some(n),
        };
        let t0_ns = self.now();
        let result = copy::each(cells, &setting, block);
        let span = Span { t0_ns, t1_ns: self.now() };
        let changed_pages = (n > 1).then(|| cells.iter().map(changed_pages).sum());
        let bytes = cells.iter().filter(|cell| cell.pass == n).map(|cell| cell.block.len()).sum();
        // A pass that was cut short is one too: block records name it.
        if bytes > 0 {
            passes.push(Pass { n, span, bytes, changed_pages });
        }
        result?;
        self.observer.event(Event::Pass {
            pass: n,
            bytes,
            took_ns: span.t1_ns - span.t0_ns,
            changed_pages,
        });
        Ok(())
    }

    /// Reads a block; leaves the bytes of holes alone.
    fn read(
        &self,
        block: GuestRange,
        buf: &mut [u8],
        states: &mut [PageState],
    ) -> Result<Span, PassError> {
        let t0_ns = self.now();
        self.source.read_but_holes(block, buf, states)?;
        Ok(Span { t0_ns, t1_ns: self.now() })
    }
}

/// How many of the block's pages differed between two reads.
pub fn changed_pages(cell: &Cell) -> u64 {
    cell.changed.as_ref().map_or(0, |bits| bits.iter().map(|w| u64::from(w.count_ones())).sum())
}

/// `live`: two whole passes, nothing held.
///
/// # Errors
/// [`Cut`]. Passes made so far, also one that was cut short, are in `passes`, and the cells say
/// which pass each block's bytes come from.
pub fn live(
    work: &Work<'_>,
    cells: &mut [Cell],
    passes: &mut Vec<Pass>,
) -> Result<(), Cut<PassError>> {
    work.pass(1, passes, cells, |cell, scratch| first(work, cell, scratch))?;
    work.pass(2, passes, cells, |cell, scratch| again(work, 2, cell, scratch))
}

/// Reads a block for the first time. The store holds zeros until then: what it lends is read
/// into right there, else only data is put.
fn first(work: &Work<'_>, cell: &mut Cell, scratch: &mut Scratch) -> Result<(), PassError> {
    let (new, old, states) = scratch.parts(cell.block);
    let in_place = lend(work.store, cell.block, |kept| {
        // A block that is not wholly there is not there.
        work.read(cell.block, kept, states).inspect_err(|_| kept.fill(0))
    })?;
    let span = match in_place {
        Some(read) => read?,
        None => {
            let span = work.read(cell.block, new, states)?;
            put_first(work.store, cell.block, new, old, states)?;
            span
        }
    };
    cell.states.copy_from_slice(states);
    cell.stored = span;
    cell.pass = 1;
    Ok(())
}

/// Puts the data of a block into a store that holds zeros there.
fn put_first(
    store: &dyn Store,
    block: GuestRange,
    new: &[u8],
    zeros: &mut [u8],
    states: &[PageState],
) -> Result<(), PassError> {
    let is_data = |page: usize| states.get(page) == Some(&PageState::Data);
    put(store, block, new, is_data).inspect_err(|_| {
        // A block that is not wholly there is not there: what was put of it becomes zeros again.
        zeros.fill(0);
        let _ = put(store, block, zeros, is_data);
    })
}

/// Reads a block again and compares it with what the store holds.
fn again(
    work: &Work<'_>,
    pass: u32,
    cell: &mut Cell,
    scratch: &mut Scratch,
) -> Result<(), PassError> {
    let (new, old, states) = scratch.parts(cell.block);
    let span = work.read(cell.block, new, states)?;
    let is_hole = |state: &PageState| *state == PageState::Hole;
    // What was a hole and is one needs no look.
    if !states.iter().chain(&cell.states).all(is_hole) {
        for run in page_runs(cell.block, |page| states.get(page).is_some_and(is_hole)) {
            new[run].fill(0);
        }
        if let Some((changed, first)) = keep_again(work.store, cell, new, old)? {
            cell.first = Some(Box::new(first));
            cell.changed = Some(Box::new(changed));
        }
    }
    cell.states.copy_from_slice(states);
    cell.earlier = Some(cell.stored);
    cell.stored = span;
    cell.pass = pass;
    Ok(())
}

/// Brings the pages that differ into the store; `old` is a buffer for what it held.
fn keep_again(
    store: &dyn Store,
    cell: &mut Cell,
    new: &[u8],
    old: &mut [u8],
) -> Result<Option<(Changed, Digest)>, PassError> {
    let at = cell.block;
    let in_place = lend(store, at, |kept| {
        let (changed, first) = differences(at, new, kept)?;
        for run in page_runs(at, |page| bit(&changed, page)) {
            kept[run.clone()].copy_from_slice(&new[run]);
        }
        Some((changed, first))
    })?;
    if let Some(difference) = in_place {
        return Ok(difference);
    }
    store.get(at, old).map_err(|cause| PassError::Store { at, cause })?;
    let Some((changed, first)) = differences(at, new, old) else { return Ok(None) };
    put(store, at, new, |page| bit(&changed, page)).inspect_err(|_| {
        // The block stays what the pass before read, whole; its space is already held.
        if put(store, at, old, |page| bit(&changed, page)).is_err() {
            cell.pass = 0;
        }
    })?;
    Ok(Some((changed, first)))
}

/// What `work` gives for the bytes that the store lends; `None` when it does not lend them.
fn lend<T>(
    store: &dyn Store,
    block: GuestRange,
    mut work: impl FnMut(&mut [u8]) -> T,
) -> Result<Option<T>, PassError> {
    let mut given = None;
    store
        .lend(block, &mut |bytes| given = Some(work(bytes)))
        .map_err(|cause| PassError::Store { at: block, cause })?;
    Ok(given)
}

/// The pages whose bytes differ, and the digest of `old`; `None` when no byte does.
fn differences(block: GuestRange, new: &[u8], old: &[u8]) -> Option<(Changed, Digest)> {
    if new == old {
        return None;
    }
    let mut changed = Changed::default();
    for (page, span) in page_spans(block).enumerate() {
        if new.get(span.clone()) != old.get(span)
            && let Some(word) = changed.get_mut(page / 64)
        {
            *word |= 1 << (page % 64);
        }
    }
    Some((changed, sha256(old)))
}

/// Whether page `page` is among `bits`.
pub(crate) fn bit(bits: &Changed, page: usize) -> bool {
    bits.get(page / 64).is_some_and(|word| word >> (page % 64) & 1 == 1)
}

/// Where each page of `block` lies in a buffer that holds the block.
pub(crate) fn page_spans(block: GuestRange) -> impl Iterator<Item = std::ops::Range<usize>> {
    pages(block).map(move |page| {
        let at = index(page.start() - block.start());
        at..at + index(page.len())
    })
}

/// Runs of neighbouring pages that `wanted` picks, as addresses and buffer positions.
pub(crate) fn page_runs(
    block: GuestRange,
    wanted: impl Fn(usize) -> bool,
) -> Vec<std::ops::Range<usize>> {
    let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
    for (page, span) in page_spans(block).enumerate() {
        if !wanted(page) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == span.start => run.end = span.end,
            _ => runs.push(span),
        }
    }
    runs
}

fn put(
    store: &dyn Store,
    block: GuestRange,
    bytes: &[u8],
    wanted: impl Fn(usize) -> bool,
) -> Result<(), PassError> {
    for run in page_runs(block, wanted) {
        let at = GuestRange::new(block.start() + run.start as u64, (run.end - run.start) as u64);
        if let (Some(at), Some(bytes)) = (at, bytes.get(run)) {
            store.put(at, bytes).map_err(|cause| PassError::Store { at, cause })?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
