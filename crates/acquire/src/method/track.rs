//! `track`: passes over the running guest under the kernel's tracking of written pages, then a hold
//! in which only the rest is read. The image is that of the hold's instant.
//!
//! Why no write is lost: after every copy, each page either is in the store as it is in memory, or
//! any look from now on shows it as written.
//!
//! * Clear, then copy. A store that the copy missed came after the marks were cleared, and has its
//!   mark. The other order loses writes.
//! * The look at the marks and their clearing are in one hold: nothing of the guest runs between
//!   them, so no mark is dropped unseen.
//! * In the last hold all that is marked is read, and then memory and store are the same.
//!
//! A device's write reaches memory some time after its page was given to the device, and marks
//! nothing then. So what was seen written is read no sooner than the *I/O horizon* later, and first
//! of all no page is read sooner than that after the marks were first cleared.

use super::hold::{self, NotHeld};
use super::process::{
    Pass, PassError, Pick, Picks, RELEASE, Work, audit, bit, first, keep_again, page_runs,
};
use crate::copy::{self, Cell, Changed, Cut, Item, PAGE_BYTES, Scratch};
use crate::event::Event;
use crate::guardian::Guardian;
use crate::plan::{AUDIT_PAGES, HoldKind, PlannedHold, PlannedTracking};
use evidence::block::{BLOCK_PAGES, index};
use evidence::manifest::{Audit, Hold, Round, Tracking};
use evidence::record::Span;
use evidence::{GuestRange, PAGE, PageState};
use host::own_memory::OwnMemory;
use host::pagemap::Entry;
use host::soft_dirty::SoftDirty;
use host::{HostError, Process, Source};
use qemu::facts::BlockTimes;
use serde_json::json;
use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

/// Why the guest could not be followed. It runs, and nothing of it was changed but marks.
#[derive(Debug, thiserror::Error)]
pub enum TrackError {
    /// The kernel does not let us clear the marks.
    #[error("the marks of written pages cannot be cleared")]
    Clear(#[source] HostError),
    /// Memory for what is read in the hold.
    #[error("{bytes} bytes of memory could not be taken and locked for the last pass")]
    Buffer {
        /// How many.
        bytes: u64,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
    /// A mark vanished that we did not clear.
    #[error(
        "somebody else clears the marks of written pages in QEMU's process: the mark of {0} vanished"
    )]
    NotAlone(GuestRange),
    /// The guest writes faster than can be followed within the stall budget.
    #[error(
        "the guest writes too much to be followed: after {rounds} rounds {pages} pages are still to be \
         read, which takes {} ms in a hold of {} ms at most", needed.as_millis(), allowed.as_millis()
    )]
    Behind {
        /// Looks at the marks.
        rounds: u32,
        /// Pages that are not known.
        pages: u64,
        /// How long reading them would have taken, with what goes with it.
        needed: Duration,
        /// The hold's limit.
        allowed: Duration,
    },
    /// Looking at the marks alone takes too long.
    #[error(
        "looking at the marks of all pages was not done within the {} ms that the guest may be held",
        .0.as_millis()
    )]
    SlowScan(Duration),
}

/// What came of it.
pub struct Tracked {
    /// The last hold, in which the rest was read.
    pub hold: Option<Hold>,
    /// The audit read in it, and when.
    pub audit: Option<(Audit, Span)>,
    /// For the record; absent when the marks were never cleared.
    pub tracking: Option<Tracking>,
    /// What became of guardian or holder in a hold, if one was lost.
    pub doubts: Vec<String>,
    /// How it ended.
    pub end: Result<(), Cut<PassError>>,
}

/// A block's page table entries, beside its [`Cell`]: 4 KiB for a MiB of guest.
struct Watched {
    /// As they were before the block's pages were last read.
    before: Box<[Entry]>,
    /// As they are now.
    now: Box<[Entry]>,
    /// Pages to be read.
    todo: Changed,
    /// Pages that were given back and now read as zeros.
    emptied: Changed,
}

impl Watched {
    fn new(cell: &Cell) -> Self {
        let entries = || vec![Entry::default(); cell.states.len()].into();
        Self {
            before: entries(),
            now: entries(),
            todo: Changed::default(),
            emptied: Changed::default(),
        }
    }

    fn is_touched(&self) -> bool {
        self.todo.iter().chain(&self.emptied).any(|word| *word != 0)
    }

    /// Takes the entries read now; says which page's mark vanished, if one did.
    fn take(&mut self, entries: &[Entry]) -> Option<usize> {
        let mut vanished = None;
        (self.todo, self.emptied) = (Changed::default(), Changed::default());
        for (page, (new, (now, before))) in
            entries.iter().zip(self.now.iter_mut().zip(&self.before)).enumerate()
        {
            let same_page = new.present() && new.frame() == now.frame();
            if now.soft_dirty() && same_page && !new.soft_dirty() {
                vanished.get_or_insert(page);
            }
            *now = *new;
            if !new.is_as(*before) {
                let list = if new.kept() { &mut self.todo } else { &mut self.emptied };
                set(list, page);
            }
        }
        vanished
    }
}

fn set(bits: &mut Changed, page: usize) {
    if let Some(word) = bits.get_mut(page / 64) {
        *word |= 1 << (page % 64);
    }
}

fn count(bits: &Changed) -> u64 {
    bits.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// What a look at the marks found.
#[derive(Clone, Copy, Debug, Default)]
struct Found {
    /// Pages to be read.
    pages: u64,
    /// Runs of neighbours among them.
    runs: u64,
    /// Bytes that they have.
    bytes: u64,
}

impl Found {
    fn add(&mut self, cell: &Cell, watched: &Watched) {
        let runs = page_runs(cell.block, |page| bit(&watched.todo, page));
        self.pages += count(&watched.todo);
        self.runs += runs.len() as u64;
        self.bytes += runs.iter().map(|run| run.len() as u64).sum::<u64>();
    }

    fn and(self, other: Self) -> Self {
        Self {
            pages: self.pages + other.pages,
            runs: self.runs + other.runs,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// A block, what is known of it, and how much of it is read: what a pass takes.
struct Pair<'a> {
    cell: &'a mut Cell,
    watched: &'a mut Watched,
    bytes: u64,
}

impl Item for Pair<'_> {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn cost(&self) -> u64 {
        self.bytes.min(self.cell.cost())
    }
}

/// The pages of a block that are read in the hold, into memory that is there.
struct Rest<'a> {
    cell: usize,
    block: GuestRange,
    todo: Changed,
    into: &'a mut [u8],
    states: Vec<PageState>,
    span: Span,
}

impl Item for Rest<'_> {
    fn bytes(&self) -> u64 {
        self.into.len() as u64
    }

    fn cost(&self) -> u64 {
        self.into.len() as u64
    }
}

/// What is left of a [`Rest`] after the hold: the bytes lie in the buffer, in order.
struct Kept {
    cell: usize,
    len: usize,
    states: Vec<PageState>,
    span: Span,
}

/// How a hold ended.
enum Outcome {
    /// The marks were cleared; what was found is read while the guest runs.
    Cleared(Span),
    /// All that was found was read.
    Read { span: Span, kept: Vec<Kept>, audit: (Audit, Span) },
}

/// What was done in a hold.
struct Inside {
    held_ns: u64,
    released_ns: u64,
    scan: Span,
    found: Found,
    outcome: Result<Outcome, Cut<PassError>>,
}

/// Follows the guest and holds it in the end. Passes that were made are in `passes`, and `stalls_ns`
/// gets what holds that were given up stalled the guest.
#[expect(
    clippy::too_many_arguments,
    reason = "as of a method: what it works with, and its results"
)]
pub fn track(
    work: &Work<'_>,
    process: &Process,
    held: &PlannedHold,
    planned: &PlannedTracking,
    guardian: &mut Guardian,
    cells: &mut [Cell],
    passes: &mut Vec<Pass>,
    stalls_ns: &mut Vec<u64>,
) -> Tracked {
    let mut follower = Follower {
        work,
        process,
        held,
        planned,
        watched: cells.iter().map(Watched::new).collect(),
        cells,
        passes,
        scratches: Scratch::for_workers(work.workers),
        picks: Picks::new(),
        latency: Latency::default(),
        longest_clear: Duration::ZERO,
        before: None,
        tracked: Tracked {
            hold: None,
            audit: None,
            tracking: None,
            doubts: Vec::new(),
            end: Ok(()),
        },
    };
    let end = follower.run(guardian, stalls_ns);
    let mut tracked = follower.tracked;
    tracked.end = end;
    if let Some(tracking) = &mut tracked.tracking {
        tracking.block_latency_ns = follower.latency.worst_ns;
    }
    tracked
}

struct Follower<'a> {
    work: &'a Work<'a>,
    process: &'a Process,
    held: &'a PlannedHold,
    planned: &'a PlannedTracking,
    cells: &'a mut [Cell],
    watched: Vec<Watched>,
    passes: &'a mut Vec<Pass>,
    scratches: Vec<Scratch>,
    picks: Picks,
    latency: Latency,
    longest_clear: Duration,
    /// Pages that the round before found.
    before: Option<u64>,
    tracked: Tracked,
}

impl Follower<'_> {
    fn run(
        &mut self,
        guardian: &mut Guardian,
        stalls_ns: &mut Vec<u64>,
    ) -> Result<(), Cut<PassError>> {
        let buffer_len = index(self.planned.buffer_bytes);
        let mut buffer = own_memory(buffer_len)?;
        let marks = SoftDirty::open(self.process).map_err(|e| failed(TrackError::Clear(e)))?;
        self.latency.look(guardian);
        self.begin(&marks)?;
        self.work.begin_pass()?;
        self.pass(1, |work, cell, watched, scratch| {
            // The entries first: a page that changes its frame after this is read again.
            work.source.entries(cell.block, &mut watched.before)?;
            first(work, cell, scratch)
        })?;
        for round in 1u32.. {
            self.latency.look(guardian);
            if round > self.planned.rounds_unheld {
                if self.round(&marks, guardian, stalls_ns, round, &mut buffer)? {
                    break;
                }
            } else {
                self.unheld_round(&marks)?;
            }
            self.settle()?;
            self.work.begin_pass()?;
            self.pass(round + 1, |work, cell, watched, scratch| {
                let pass = round + 1;
                read_again(work, pass, cell, watched, scratch)
            })?;
        }
        self.latency.look(guardian);
        Ok(())
    }

    /// Clears the marks for the first time, while the guest runs, and waits until what devices had
    /// under way has come to rest.
    fn begin(&mut self, marks: &SoftDirty) -> Result<(), Cut<PassError>> {
        let first_clear = self.clear(marks)?;
        let took = Duration::from_nanos(first_clear.t1_ns - first_clear.t0_ns);
        self.work.log.add("clear", json!({ "span": first_clear }));
        self.tracked.tracking = Some(Tracking {
            io_horizon_ns: self.planned.io_horizon_ns,
            block_latency_ns: None,
            held: self.planned.rounds_unheld == 0,
            first_clear,
            rounds: Vec::new(),
        });
        if took > self.at_most() {
            let text = format!(
                "clearing the marks of written pages took {} ms, longer than the stall budget; it is \
                 not done again",
                took.as_millis()
            );
            self.tracked.doubts.push(text);
        }
        self.settle()
    }

    fn clear(&mut self, marks: &SoftDirty) -> Result<Span, Cut<PassError>> {
        let t0_ns = self.work.log.now_ns();
        marks.clear().map_err(|e| failed(TrackError::Clear(e)))?;
        let span = Span { t0_ns, t1_ns: self.work.log.now_ns() };
        self.longest_clear = self.longest_clear.max(Duration::from_nanos(span.t1_ns - t0_ns));
        Ok(span)
    }

    /// Waits for the I/O horizon.
    fn settle(&self) -> Result<(), Cut<PassError>> {
        let until = Instant::now() + Duration::from_nanos(self.planned.io_horizon_ns);
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            if self.work.stop.asked() {
                return Err(Cut::Stopped);
            }
            thread::sleep(left.min(Duration::from_millis(10)));
        }
        Ok(())
    }

    fn at_most(&self) -> Duration {
        Duration::from_nanos(self.held.at_most_ns)
    }

    /// A pass over the blocks that have something to be read, while the guest runs.
    fn pass(
        &mut self,
        n: u32,
        read: impl Fn(&Work<'_>, &mut Cell, &mut Watched, &mut Scratch) -> Result<(), PassError> + Sync,
    ) -> Result<(), Cut<PassError>> {
        let work = self.work;
        let pairs = self.cells.iter_mut().zip(&mut self.watched);
        let mut pairs: Vec<Pair<'_>> = pairs
            .filter(|(_, watched)| n == 1 || watched.is_touched())
            .map(|(cell, watched)| {
                let bytes = if n == 1 { cell.block.len() } else { count(&watched.todo) * PAGE };
                Pair { cell, watched, bytes }
            })
            .collect();
        let setting = work.setting(n, None);
        let t0_ns = work.log.now_ns();
        let done = copy::each(&mut pairs, &setting, &mut self.scratches, |pair, scratch| {
            read(work, pair.cell, pair.watched, scratch)
        });
        let span = Span { t0_ns, t1_ns: work.log.now_ns() };
        let bytes = pairs.iter().filter(|pair| pair.cell.pass == n).map(Item::bytes).sum();
        self.note_pass(n, span, bytes);
        done
    }

    fn note_pass(&mut self, n: u32, span: Span, bytes: u64) {
        let changed_pages = self.before.filter(|_| n > 1);
        self.passes.push(Pass { n, span, bytes, changed_pages });
        let took_ns = span.t1_ns - span.t0_ns;
        self.work.observer.event(Event::Pass { pass: n, bytes, took_ns, changed_pages });
    }

    /// A look at the marks and their clearing with the guest running: writes between the two are
    /// lost. The control of the tear benchmark, which must see them.
    fn unheld_round(&mut self, marks: &SoftDirty) -> Result<(), Cut<PassError>> {
        let found = self.scan(None)?;
        self.before = Some(found.pages);
        self.clear(marks)?;
        self.turn();
        Ok(())
    }

    /// The entries of now are those that the next look is compared with.
    fn turn(&mut self) {
        for watched in &mut self.watched {
            std::mem::swap(&mut watched.before, &mut watched.now);
            watched.now.copy_from_slice(&watched.before);
            // A mark that was just cleared did not vanish.
            for entry in &mut watched.now {
                *entry = entry.without_mark();
            }
        }
    }

    /// One round: a hold in which the marks are looked at, and then either all that is marked is
    /// read, or the marks are cleared. Whether it was the last.
    fn round(
        &mut self,
        marks: &SoftDirty,
        guardian: &mut Guardian,
        stalls_ns: &mut Vec<u64>,
        round: u32,
        buffer: &mut OwnMemory,
    ) -> Result<bool, Cut<PassError>> {
        // Without the hold: how long a look takes, and marks that must still be there in it.
        let began = Instant::now();
        self.scan(None)?;
        let scan_time = began.elapsed();
        if scan_time * 2 > self.at_most() {
            return Err(failed(TrackError::SlowScan(self.at_most())));
        }
        let sample = self.sample()?;
        self.work.begin_pass()?;
        let (work, process, at_most_ns) = (self.work, self.process, self.held.at_most_ns);
        let inside = |threads, until| {
            work.observer.event(Event::Held { threads });
            self.inside(marks, round, until, buffer.bytes(), &sample)
        };
        let once = hold::by_ptrace(work, process, guardian, at_most_ns, stalls_ns, inside)
            .map_err(|error| Cut::Failed(PassError::NotHeld(error)))?;
        self.tracked.doubts.extend(once.doubt);
        let stall = Span { t0_ns: once.began_ns, t1_ns: once.ended_ns };
        work.observer.event(Event::Released { held_ns: stall.t1_ns - stall.t0_ns });
        let Inside { held_ns, released_ns, scan, found, outcome } = once.value;
        let (clear, read) = match &outcome {
            Ok(Outcome::Cleared(span)) => (Some(*span), None),
            Ok(Outcome::Read { span, .. }) => (None, Some(*span)),
            Err(_) => (None, None),
        };
        let record = Round { stall, scan, written_pages: found.pages, clear, read };
        work.log.add("round", &record);
        if let Some(tracking) = &mut self.tracked.tracking {
            tracking.rounds.push(record);
        }
        let lasted = once.lasted;
        match outcome? {
            // Something ran between the look and the clearing.
            Outcome::Cleared(_) if !lasted => {
                Err(Cut::Failed(PassError::NotHeld(NotHeld::NotLasted)))
            }
            Outcome::Cleared(_) => {
                self.before = Some(found.pages);
                self.turn();
                Ok(false)
            }
            Outcome::Read { span, kept, audit } => {
                self.tracked.audit = Some(audit);
                self.tracked.hold = Some(Hold {
                    kind: HoldKind::Ptrace,
                    began_ns: stall.t0_ns,
                    held_ns,
                    released_ns,
                    ended_ns: stall.t1_ns,
                    threads: once.threads,
                    tries: once.tries,
                    lasted,
                    budget_ns: self.held.at_most_ns,
                    expected_ns: self.held.expected_ns,
                });
                self.before = Some(found.pages);
                self.merge(round + 1, span, &kept, found.bytes, buffer.bytes())?;
                Ok(true)
            }
        }
    }

    /// The guest is held. Nothing is written here but memory that is there already.
    fn inside(
        &mut self,
        marks: &SoftDirty,
        round: u32,
        until: Instant,
        buffer: &mut [u8],
        sample: &Sample,
    ) -> Inside {
        let held_ns = self.work.log.now_ns();
        let looked = self.scan(Some(until));
        let scan = Span { t0_ns: held_ns, t1_ns: self.work.log.now_ns() };
        let (found, outcome) = match looked {
            Err(error) => (Found::default(), Err(error)),
            Ok(found) => {
                let took = Duration::from_nanos(scan.t1_ns - scan.t0_ns);
                let outcome = match self.decide(found, took, round, until, buffer.len() as u64) {
                    Decision::Read => {
                        self.read_rest(round + 1, found, (held_ns, until), buffer, sample)
                    }
                    Decision::Clear => self.clear(marks).map(Outcome::Cleared),
                    Decision::GiveUp(needed) => Err(failed(TrackError::Behind {
                        rounds: round,
                        pages: found.pages,
                        needed,
                        allowed: self.at_most(),
                    })),
                };
                (found, outcome)
            }
        };
        Inside { held_ns, released_ns: self.work.log.now_ns(), scan, found, outcome }
    }

    /// How long reading what was `found` takes in the hold.
    fn reading(&self, found: Found) -> Duration {
        let speed = self.planned.speed;
        let rate = self.work.max_rate.map_or(speed.bytes_per_s, |max| max.min(speed.bytes_per_s));
        let bytes = u128::from(found.bytes) * 1_000_000_000 / u128::from(rate.max(1));
        let workers = u128::from(speed.workers.max(1));
        let calls = u128::from(found.runs) * u128::from(speed.page_ns) / workers;
        Duration::from_nanos(u64::try_from(bytes + calls).unwrap_or(u64::MAX))
    }

    fn decide(
        &self,
        found: Found,
        scan: Duration,
        round: u32,
        until: Instant,
        buffer_len: u64,
    ) -> Decision {
        let reading = self.reading(found);
        let left = until.saturating_duration_since(Instant::now());
        let release = self.at_most() / RELEASE;
        // With a quarter more for what others do meanwhile.
        let needed = reading + reading / 4 + release;
        let fits = needed <= left && found.bytes <= buffer_len;
        let clearing = self.longest_clear + self.longest_clear / 4;
        let may_clear = !self.planned.clears_once
            && self.longest_clear <= self.at_most()
            && clearing + release <= left;
        // Another round costs the guest a look and a clearing at least.
        let cheap = reading <= scan + clearing;
        let shrinks = self.before.is_none_or(|before| found.pages * 10 < before * 9);
        match (fits, may_clear) {
            (true, _) if cheap || !shrinks || !may_clear || round >= ROUNDS => Decision::Read,
            (_, true) if shrinks && round < ROUNDS => Decision::Clear,
            _ => Decision::GiveUp(scan + needed),
        }
    }

    /// Looks at the marks of all pages, on all cores; what is to be read is then in
    /// [`Watched::todo`].
    fn scan(&mut self, until: Option<Instant>) -> Result<Found, Cut<PassError>> {
        let source = self.work.source;
        let share = self.cells.len().div_ceil(self.work.workers.max(1)).max(1);
        let look = |cells: &[Cell], watched: &mut [Watched]| -> Result<Found, Cut<PassError>> {
            let mut entries = [Entry::default(); BLOCK_PAGES + 1];
            let mut found = Found::default();
            for (cell, watched) in cells.iter().zip(watched) {
                if until.is_some_and(|until| Instant::now() >= until) {
                    return Err(Cut::Late);
                }
                let entries = &mut entries[..cell.states.len()];
                source.entries(cell.block, entries).map_err(|e| Cut::Failed(e.into()))?;
                if let Some(page) = watched.take(entries) {
                    let page = evidence::state::pages(cell.block).nth(page).unwrap_or(cell.block);
                    return Err(failed(TrackError::NotAlone(page)));
                }
                found.add(cell, watched);
            }
            Ok(found)
        };
        let look = &look;
        let results: Vec<_> = thread::scope(|scope| {
            let parts = self.cells.chunks(share).zip(self.watched.chunks_mut(share));
            let threads: Vec<_> =
                parts.map(|(cells, watched)| scope.spawn(move || look(cells, watched))).collect();
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            threads.into_iter().map(join).collect()
        });
        let late = |cut| match cut {
            Cut::Late => failed(TrackError::SlowScan(self.at_most())),
            other => other,
        };
        results
            .into_iter()
            .try_fold(Found::default(), |sum, found| Ok(sum.and(found.map_err(late)?)))
    }

    /// Pages to be read again in the hold, and what the store has of them: drawn before it, so that
    /// no store is asked in it.
    fn sample(&mut self) -> Result<Sample, Cut<PassError>> {
        let picks = self.picks.pages(self.cells, AUDIT_PAGES);
        let mut bytes = vec![0u8; picks.len() * PAGE_BYTES];
        for (pick, bytes) in picks.iter().zip(bytes.chunks_mut(PAGE_BYTES)) {
            let (at, len) = (pick.at, index(pick.at.len()));
            let store = self.work.store;
            store
                .get(at, &mut bytes[..len])
                .map_err(|cause| Cut::Failed(PassError::Store { at, cause }))?;
        }
        Ok(Sample { picks, bytes })
    }

    /// Reads all that is to be read into `buffer`, and a sample of the rest again.
    fn read_rest(
        &mut self,
        pass: u32,
        found: Found,
        (held_ns, until): (u64, Instant),
        buffer: &mut [u8],
        sample: &Sample,
    ) -> Result<Outcome, Cut<PassError>> {
        let work = self.work;
        let mut left = buffer;
        let mut rests = Vec::new();
        for (cell, (data, watched)) in self.cells.iter().zip(&self.watched).enumerate() {
            let runs = page_runs(data.block, |page| bit(&watched.todo, page));
            let len: usize = runs.iter().map(std::ops::Range::len).sum();
            if len == 0 {
                continue;
            }
            let Some((into, rest)) = left.split_at_mut_checked(len) else {
                return Err(Cut::Late);
            };
            left = rest;
            let states = vec![PageState::Data; index(count(&watched.todo))];
            let (block, todo, span) = (data.block, watched.todo, Span { t0_ns: 0, t1_ns: 0 });
            rests.push(Rest { cell, block, todo, into, states, span });
        }
        let t0_ns = work.log.now_ns();
        let setting = work.setting(pass, Some(until));
        if found.pages > 0 {
            copy::each(&mut rests, &setting, &mut self.scratches, |rest, _| read_runs(work, rest))?;
        }
        let span = Span { t0_ns, t1_ns: work.log.now_ns() };
        let release = self.at_most() / RELEASE;
        let until = until.checked_sub(release).unwrap_or(until);
        // The guest shall not stand longer for the sample than for the image.
        let long = Duration::from_nanos(span.t1_ns.saturating_sub(held_ns)).max(LEAST_AUDIT);
        let until = until.min(Instant::now() + long);
        // A page that changed since the sample was drawn is not believed to be as it was.
        let clean = |pick: &Pick| {
            let watched = self.watched.get(pick.cell);
            watched.is_some_and(|w| !bit(&w.todo, pick.page) && !bit(&w.emptied, pick.page))
        };
        let (picks, kept): (Vec<Pick>, Vec<&[u8]>) = sample
            .picks
            .iter()
            .zip(sample.bytes.chunks(PAGE_BYTES))
            .filter(|(pick, _)| clean(pick))
            .map(|(pick, bytes)| (*pick, bytes))
            .unzip();
        let same = |number: usize, new: &[u8], _: &mut [u8]| {
            kept.get(number).and_then(|old| old.get(..new.len())).is_some_and(|old| old == new)
        };
        let audit = audit(work, &picks, &mut self.scratches, until, same);
        let kept = rests
            .into_iter()
            .map(|rest| Kept {
                cell: rest.cell,
                len: rest.into.len(),
                states: rest.states,
                span: rest.span,
            })
            .collect();
        Ok(Outcome::Read { span, kept, audit })
    }

    /// Brings what was read in the hold into the store, and what was found given back: the guest
    /// runs.
    fn merge(
        &mut self,
        pass: u32,
        span: Span,
        kept: &[Kept],
        bytes: u64,
        buffer: &[u8],
    ) -> Result<(), Cut<PassError>> {
        let mut left = buffer;
        let mut kept = kept.iter().peekable();
        let Some(scratch) = self.scratches.first_mut() else { return Ok(()) };
        for (number, (cell, watched)) in self.cells.iter_mut().zip(&self.watched).enumerate() {
            let read = kept.next_if(|kept| kept.cell == number);
            if read.is_none() && !watched.is_touched() {
                continue;
            }
            let (new, old, states) = scratch.parts(cell.block);
            states.copy_from_slice(&cell.states);
            let mut at = span;
            if let Some(read) = read {
                let (mine, rest) = left.split_at(read.len);
                left = rest;
                at = read.span;
                let mut mine = mine;
                for run in page_runs(cell.block, |page| bit(&watched.todo, page)) {
                    let (bytes, rest) = mine.split_at(run.len());
                    new[run].copy_from_slice(bytes);
                    mine = rest;
                }
                let pages = (0..states.len()).filter(|page| bit(&watched.todo, *page));
                for (page, state) in pages.zip(&read.states) {
                    states[page] = *state;
                }
            }
            keep(self.work, pass, cell, watched, at, new, old, states).map_err(Cut::Failed)?;
        }
        self.note_pass(pass, span, bytes);
        Ok(())
    }
}

/// What the audit may take of a hold, however short that was.
const LEAST_AUDIT: Duration = Duration::from_millis(10);

/// Looks at the marks, at most: what does not shrink until then will not.
const ROUNDS: u32 = 8;

enum Decision {
    Read,
    Clear,
    /// What reading would have taken.
    GiveUp(Duration),
}

/// Pages drawn for the audit, and their bytes as the store has them.
struct Sample {
    picks: Vec<Pick>,
    bytes: Vec<u8>,
}

fn own_memory(len: usize) -> Result<OwnMemory, Cut<PassError>> {
    let bytes = len as u64;
    let memory = OwnMemory::new(len).and_then(|own| own.lock().map(|()| own));
    memory.map_err(|cause| failed(TrackError::Buffer { bytes, cause }))
}

fn failed(error: TrackError) -> Cut<PassError> {
    Cut::Failed(PassError::Track(error))
}

/// Reads the runs of a block that are wanted, one behind the other.
fn read_runs(work: &Work<'_>, rest: &mut Rest<'_>) -> Result<(), PassError> {
    let t0_ns = work.log.now_ns();
    let (mut into, mut states) = (&mut *rest.into, rest.states.as_mut_slice());
    for run in page_runs(rest.block, |page| bit(&rest.todo, page)) {
        let Some(at) = part(rest.block, &run) else { continue };
        let (bytes, other) = into.split_at_mut(run.len());
        let (own, others) = states.split_at_mut(index(evidence::state::page_count(at)));
        work.source.read(at, bytes, own)?;
        (into, states) = (other, others);
    }
    rest.span = Span { t0_ns, t1_ns: work.log.now_ns() };
    Ok(())
}

/// The addresses of the bytes `run` of a block.
fn part(block: GuestRange, run: &std::ops::Range<usize>) -> Option<GuestRange> {
    GuestRange::new(block.start() + run.start as u64, run.len() as u64)
}

/// Reads the pages of a block that were found written, while the guest runs.
fn read_again(
    work: &Work<'_>,
    pass: u32,
    cell: &mut Cell,
    watched: &mut Watched,
    scratch: &mut Scratch,
) -> Result<(), PassError> {
    let (new, old, states) = scratch.parts(cell.block);
    states.copy_from_slice(&cell.states);
    let t0_ns = work.log.now_ns();
    for run in page_runs(cell.block, |page| bit(&watched.todo, page)) {
        let Some(at) = part(cell.block, &run) else { continue };
        let page = index((at.start() / PAGE) - (cell.block.start() / PAGE));
        let own = &mut states[page..][..index(evidence::state::page_count(at))];
        work.source.read(at, &mut new[run], own)?;
    }
    let span = Span { t0_ns, t1_ns: work.log.now_ns() };
    keep(work, pass, cell, watched, span, new, old, states)
}

/// Brings the pages of a block that were read again, and those that were given back, into the store.
#[expect(clippy::too_many_arguments, reason = "two buffers and what is known of them")]
fn keep(
    work: &Work<'_>,
    pass: u32,
    cell: &mut Cell,
    watched: &Watched,
    span: Span,
    new: &mut [u8],
    old: &mut [u8],
    states: &mut [PageState],
) -> Result<(), PassError> {
    for run in page_runs(cell.block, |page| bit(&watched.emptied, page)) {
        new[run].fill(0);
    }
    for page in (0..states.len()).filter(|page| bit(&watched.emptied, *page)) {
        states[page] = PageState::Hole;
    }
    let read = |page: usize| bit(&watched.todo, page) || bit(&watched.emptied, page);
    let difference = keep_again(work.store, cell, new, old, read)?;
    let (changed, first) = difference.unzip();
    (cell.changed, cell.first) = (changed.map(Box::new), first.map(Box::new));
    cell.states.copy_from_slice(states);
    cell.earlier = Some(cell.stored);
    cell.stored = span;
    cell.pass = pass;
    Ok(())
}

/// How long QEMU's block devices take for a request.
#[derive(Default)]
struct Latency {
    last: BTreeMap<String, (u64, u64)>,
    worst_ns: Option<u64>,
}

impl Latency {
    /// Asks, and keeps the worst mean of any device since the last look.
    fn look(&mut self, guardian: &mut Guardian) {
        // A guardian that was lost, or a QEMU that will not say, tells nothing: the record says so.
        if let Ok(times) = guardian.block_times() {
            self.take(times);
        }
    }

    fn take(&mut self, times: Vec<BlockTimes>) {
        for BlockTimes { device, requests, total_ns } in times {
            let last = self.last.insert(device, (requests, total_ns));
            let Some((requests_before, total_before)) = last else { continue };
            let requests = requests.saturating_sub(requests_before);
            let mean = total_ns.saturating_sub(total_before).checked_div(requests);
            self.worst_ns = self.worst_ns.max(mean);
        }
    }
}

#[cfg(test)]
mod tests;
