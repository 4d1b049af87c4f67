//! Methods that read QEMU's process from outside: passes over the memory, with or without a hold.
//!
//! `live` is two whole passes over the running guest and no hold. A page that is the same in both
//! had that value at the instant between them (unless it changed and changed back); the others
//! are the smear map. The second pass is what the store keeps.
//!
//! `freeze` is one pass inside a hold, and before it ends an audit read: a random sample of the
//! pages is read again and compared. While the guest is held only memory is written that was
//! faulted in before.

use super::hold::{by_ptrace, doubt, nanos};
use crate::copy::{self, Cell, Changed, Cut, Scratch, Setting};
use crate::event::{Event, Observer, Phase};
use crate::guardian::{GRACE, Guardian};
use crate::log::Log;
use crate::plan::{AUDIT_PAGES, HoldKind, PlannedHold};
use crate::stop::Stop;
use evidence::block::{BLOCK_PAGES, index};
use evidence::digest::{Digest, sha256};
use evidence::manifest::{Audit, Hold};
use evidence::record::Span;
use evidence::state::pages;
use evidence::{GuestRange, PageState};
use host::{Gone, GuestMemory, Process, Source, Store};
use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub use super::hold::NotHeld;

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
    /// The guest could not be held.
    #[error(transparent)]
    NotHeld(NotHeld),
    /// The guest could not be followed.
    #[error(transparent)]
    Track(super::track::TrackError),
    /// QEMU gave no snapshot.
    #[error(transparent)]
    Snapshot(super::snapshot::SnapshotError),
    /// QEMU's dump.
    #[error(transparent)]
    Dump(super::dump::DumpError),
    /// A stream of QEMU's.
    #[error(transparent)]
    Stream(super::stream::StreamError),
    /// QEMU did not copy a slice.
    #[error(transparent)]
    Slices(super::pmemsave::SliceError),
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
    /// The journal, whose beginning is time 0. Nothing is added while the guest is held.
    pub log: &'a Log,
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
    /// Nanoseconds since the acquisition began.
    pub(super) fn now(&self) -> u64 {
        self.log.now_ns()
    }

    /// How pass `n` runs, until `until` at the latest.
    pub(super) fn setting(&self, n: u32, until: Option<Instant>) -> Setting<'_> {
        Setting {
            max_rate: self.max_rate,
            stop: self.stop,
            until,
            observer: self.observer,
            phase: Phase::Capture,
            pass: Some(n),
        }
    }

    /// One pass, which ends at `until`, done or not.
    pub(super) fn pass(
        &self,
        n: u32,
        until: Option<Instant>,
        passes: &mut Vec<Pass>,
        cells: &mut [Cell],
        scratches: &mut [Scratch],
        block: impl Fn(&mut Cell, &mut Scratch) -> Result<(), PassError> + Sync,
    ) -> Result<(), Cut<PassError>> {
        let setting = self.setting(n, until);
        let t0_ns = self.now();
        let result = copy::each(cells, &setting, scratches, block);
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

    /// Looks at the mappings and decides how each is read: before the guest is held.
    pub(super) fn begin_pass(&self) -> Result<(), Cut<PassError>> {
        self.source.begin_pass().map_err(|error| Cut::Failed(PassError::Mappings(error)))
    }

    /// Reads a block; leaves the bytes of holes alone.
    pub(super) fn read(
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
    let mut scratches = Scratch::for_workers(work.workers);
    let scratches = scratches.as_mut_slice();
    work.begin_pass()?;
    work.pass(1, None, passes, cells, scratches, |cell, scratch| first(work, cell, scratch))?;
    work.begin_pass()?;
    work.pass(2, None, passes, cells, scratches, |cell, scratch| again(work, 2, cell, scratch))
}

/// What a hold gave.
#[derive(Debug)]
pub struct Frozen {
    /// The hold.
    pub hold: Hold,
    /// The audit read and its time; absent when the pass was cut short.
    pub audit: Option<(Audit, Span)>,
    /// How the pass ended.
    pub end: Result<(), Cut<PassError>>,
    /// What became of guardian or holder meanwhile, if one was lost.
    pub doubt: Option<String>,
    /// QEMU was told to stop the guest: not by ptrace, and not when the VM was found paused.
    pub told_qemu: bool,
}

/// `freeze`: one pass and an audit read inside a hold of the guest. How long tries that were given
/// up stalled it, in nanoseconds, goes into `stalls_ns`.
///
/// # Errors
/// [`NotHeld`]; all that happens after the guest was held is in [`Frozen`].
pub fn freeze(
    work: &Work<'_>,
    process: &Process,
    planned: &PlannedHold,
    guardian: &mut Guardian,
    cells: &mut [Cell],
    passes: &mut Vec<Pass>,
    stalls_ns: &mut Vec<u64>,
) -> Result<Frozen, NotHeld> {
    work.source.begin_pass().map_err(NotHeld::Mappings)?;
    let mut freezer = Freezer {
        work,
        planned,
        cells,
        passes,
        scratches: Scratch::for_workers(work.workers),
        picks: Picks::new(),
    };
    match planned.kind {
        HoldKind::Ptrace => freezer.by_ptrace(process, guardian, stalls_ns),
        // A dump's hold is that of its method, and never planned for this one.
        HoldKind::Stop | HoldKind::Dump => freezer.by_stop(guardian),
    }
}

/// Everything that the hold needs, ready before it.
struct Freezer<'a> {
    work: &'a Work<'a>,
    planned: &'a PlannedHold,
    cells: &'a mut [Cell],
    passes: &'a mut Vec<Pass>,
    scratches: Vec<Scratch>,
    picks: Picks,
}

/// What was done inside the hold.
struct Inside {
    end: Result<(), Cut<PassError>>,
    audit: Option<(Audit, Span)>,
    /// Just before the first read.
    held_ns: u64,
    /// Just after the last.
    released_ns: u64,
}

impl Freezer<'_> {
    /// Holds by ptrace.
    fn by_ptrace(
        &mut self,
        process: &Process,
        guardian: &mut Guardian,
        stalls_ns: &mut Vec<u64>,
    ) -> Result<Frozen, NotHeld> {
        let (work, planned) = (self.work, self.planned);
        let inside = |threads, until| self.inside(threads, until);
        let once = by_ptrace(work, process, guardian, planned.at_most_ns, stalls_ns, inside)?;
        let span = (once.began_ns, once.ended_ns);
        let mut hold = self.hold(HoldKind::Ptrace, once.threads, once.lasted, span, &once.value);
        hold.tries = once.tries;
        Ok(self.frozen(hold, once.value, once.doubt, false))
    }

    /// Holds by QEMU's `stop` and `cont`.
    fn by_stop(&mut self, guardian: &mut Guardian) -> Result<Frozen, NotHeld> {
        let at_most = Duration::from_nanos(self.planned.at_most_ns);
        let until = Instant::now() + at_most;
        let force = host::clock::monotonic_ns() + self.planned.at_most_ns + nanos(GRACE);
        let stopped = guardian.stop(force)?;
        let inside = self.inside(0, until);
        let continued = guardian.cont(force);
        let log = self.work.log;
        let (lasted, ended_ns) = match &continued {
            Ok(continued) => (continued.lasted, log.since_ns(continued.ended_ns)),
            // Its successor let the guest go; nobody can say that it was held all the time.
            Err(_) => (false, log.now_ns()),
        };
        let span = (log.since_ns(stopped.began_ns), ended_ns);
        let hold = self.hold(HoldKind::Stop, 0, lasted, span, &inside);
        Ok(self.frozen(hold, inside, continued.err().map(doubt), stopped.asked))
    }

    /// The hold for the record; `span` is from the first that the guest can have felt to the last.
    fn hold(
        &self,
        kind: HoldKind,
        threads: u32,
        lasted: bool,
        span: (u64, u64),
        inside: &Inside,
    ) -> Hold {
        Hold {
            kind,
            began_ns: span.0,
            held_ns: inside.held_ns,
            released_ns: inside.released_ns,
            ended_ns: span.1,
            threads,
            tries: 1,
            lasted,
            budget_ns: self.planned.at_most_ns,
            expected_ns: self.planned.expected_ns,
        }
    }

    /// Tells that the guest goes on, and gathers what is known of the hold.
    fn frozen(&self, hold: Hold, inside: Inside, doubt: Option<String>, told_qemu: bool) -> Frozen {
        self.work.observer.event(Event::Released { held_ns: hold.stall_ns() });
        Frozen { hold, audit: inside.audit, end: inside.end, doubt, told_qemu }
    }

    /// The pass and the audit read: the guest is held.
    fn inside(&mut self, threads: u32, until: Instant) -> Inside {
        let work = self.work;
        work.observer.event(Event::Held { threads });
        let held_ns = work.now();
        let scratches = self.scratches.as_mut_slice();
        let block = |cell: &mut Cell, scratch: &mut Scratch| first(work, cell, scratch);
        let end = work.pass(1, Some(until), self.passes, self.cells, scratches, block);
        let release = Duration::from_nanos(self.planned.at_most_ns) / RELEASE;
        let until = until.checked_sub(release).unwrap_or(until);
        let audit = end.is_ok().then(|| {
            let wanted = if Instant::now() < until { AUDIT_PAGES } else { 0 };
            let picked = self.picks.pages(self.cells, wanted);
            audit(work, &picked, scratches, until, |number, new, old| {
                let pick = picked.get(number);
                pick.is_some_and(|pick| work.store.get(pick.at, old).is_ok() && new == old)
            })
        });
        Inside { end, audit, held_ns, released_ns: work.now() }
    }
}

/// A page drawn for an audit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pick {
    /// Number of its block's cell.
    pub cell: usize,
    /// Its number in the block.
    pub page: usize,
    /// Its addresses.
    pub at: GuestRange,
}

/// Random numbers, seeded by the kernel before the guest is held: nobody can know which pages are
/// read again.
pub(super) struct Picks(u64);

impl Picks {
    pub(super) fn new() -> Self {
        Self(host::random::seed())
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `end`, which is not 0.
    pub(super) fn below(&mut self, end: usize) -> usize {
        index(self.next() % (end.max(1) as u64))
    }

    /// Pages that were read, at most `count`, each as likely as any other.
    pub(super) fn pages(&mut self, cells: &[Cell], count: u64) -> Vec<Pick> {
        let count = index(count);
        let mut picked = Vec::with_capacity(count);
        // A guest of mostly holes gives fewer.
        for _ in 0..count * 16 {
            if picked.len() == count || cells.is_empty() {
                break;
            }
            let (cell, page) = (self.below(cells.len()), self.below(BLOCK_PAGES));
            let Some(known) = cells.get(cell) else { continue };
            if known.states.get(page) == Some(&PageState::Data) {
                let at = pages(known.block).nth(page);
                picked.extend(at.map(|at| Pick { cell, page, at }));
            }
        }
        picked
    }
}

/// The part of a hold's budget that the audit read leaves for letting go: on a busy host that takes
/// a while, and past the budget it is done by force.
pub(super) const RELEASE: u32 = 10;

/// Reads the pages `picked` again: as much as fits before `until`. `same(number, new, buffer)` says
/// whether what was read of a page is what is kept of it.
pub(super) fn audit(
    work: &Work<'_>,
    picked: &[Pick],
    scratches: &mut [Scratch],
    until: Instant,
    same: impl Fn(usize, &[u8], &mut [u8]) -> bool + Sync,
) -> (Audit, Span) {
    let t0_ns = work.now();
    let share = picked.len().div_ceil(scratches.len().max(1)).max(1);
    let differing = Mutex::new(Vec::new());
    let read = |first: usize, picks: &[Pick], scratch: &mut Scratch| -> u64 {
        let mut count = 0;
        for (number, Pick { at, .. }) in (first..).zip(picks) {
            if Instant::now() >= until {
                break;
            }
            let (new, old, states) = scratch.parts(*at);
            let read = work.source.read(*at, new, states).is_ok();
            if read && states.contains(&PageState::Excluded) {
                // It went into swap meanwhile, and is left there.
                continue;
            }
            let same = read
                && states.iter().all(|state| *state == PageState::Data)
                && same(number, new, old);
            if !same {
                differing.lock().unwrap_or_else(PoisonError::into_inner).push(at.start());
            }
            count += 1;
        }
        count
    };
    let read = &read;
    let count = thread::scope(|scope| {
        let threads: Vec<_> = picked
            .chunks(share)
            .zip((0..).step_by(share))
            .zip(scratches)
            .map(|((picks, first), scratch)| scope.spawn(move || read(first, picks, scratch)))
            .collect();
        // A worker that panicked has compared nothing.
        threads.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
    });
    let mut differing = differing.into_inner().unwrap_or_else(PoisonError::into_inner);
    differing.sort_unstable();
    (Audit::new(count, &differing), Span { t0_ns, t1_ns: work.now() })
}

/// Reads a block for the first time. The store holds zeros until then: what it lends is read
/// into right there, else only data is put.
pub(super) fn first(
    work: &Work<'_>,
    cell: &mut Cell,
    scratch: &mut Scratch,
) -> Result<(), PassError> {
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
pub(super) fn put_first(
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
    second(work.store, cell, new, old, states)?;
    cell.states.copy_from_slice(states);
    cell.earlier = Some(cell.stored);
    cell.stored = span;
    cell.pass = pass;
    Ok(())
}

/// Brings a block's second read, `new` with its `states`, into the store, and keeps where it differs from the
/// first; `old` is a buffer. What was left in swap the second time keeps what it was the first.
fn second(
    store: &dyn Store,
    cell: &mut Cell,
    new: &mut [u8],
    old: &mut [u8],
    states: &mut [PageState],
) -> Result<(), PassError> {
    let is_hole = |state: &PageState| *state == PageState::Hole;
    // What was a hole and is one needs no look.
    if states.iter().chain(&cell.states).all(is_hole) {
        return Ok(());
    }
    for run in page_runs(cell.block, |page| states.get(page).is_some_and(is_hole)) {
        new[run].fill(0);
    }
    let before = cell.states.clone();
    let left = |states: &[PageState], page: usize| states.get(page) == Some(&PageState::Excluded);
    // What was left in swap, this time or the time before, was not read twice.
    let twice = |page: usize| !left(states, page) && !left(&before, page);
    if let Some((changed, first)) = keep_again(store, cell, new, old, twice)? {
        cell.first = Some(Box::new(first));
        cell.changed = Some(Box::new(changed));
    }
    let came = |page: usize| left(&before, page) && states.get(page) == Some(&PageState::Data);
    put(store, cell.block, new, came)?;
    for (state, before) in states.iter_mut().zip(&before) {
        if *state == PageState::Excluded {
            *state = *before;
        }
    }
    Ok(())
}

/// Brings the pages that were `read` again and differ into the store; `old` is a buffer for what it
/// held.
pub(super) fn keep_again(
    store: &dyn Store,
    cell: &mut Cell,
    new: &[u8],
    old: &mut [u8],
    read: impl Fn(usize) -> bool,
) -> Result<Option<(Changed, Digest)>, PassError> {
    let at = cell.block;
    let in_place = lend(store, at, |kept| {
        let (changed, first) = differences(at, new, kept, &read)?;
        for run in page_runs(at, |page| bit(&changed, page)) {
            kept[run.clone()].copy_from_slice(&new[run]);
        }
        Some((changed, first))
    })?;
    if let Some(difference) = in_place {
        return Ok(difference);
    }
    store.get(at, old).map_err(|cause| PassError::Store { at, cause })?;
    let Some((changed, first)) = differences(at, new, old, &read) else { return Ok(None) };
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

/// The pages that were `read` and whose bytes differ, and the digest of `old`; `None` when no byte
/// does.
pub(super) fn differences(
    block: GuestRange,
    new: &[u8],
    old: &[u8],
    read: impl Fn(usize) -> bool,
) -> Option<(Changed, Digest)> {
    if new == old {
        return None;
    }
    let mut changed = Changed::default();
    for (page, span) in page_spans(block).enumerate() {
        if read(page)
            && new.get(span.clone()) != old.get(span)
            && let Some(word) = changed.get_mut(page / 64)
        {
            *word |= 1 << (page % 64);
        }
    }
    (changed != Changed::default()).then(|| (changed, sha256(old)))
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
pub(super) mod tests;
