//! `snapshot`: QEMU stops the guest, protects its RAM from writing, lets it go on, and sends RAM as it
//! was at the stop; a process without rights reads the stream into the store.
//!
//! The image is that of the stop: a page that the guest writes later is sent before the write is let
//! through. Beside QEMU's word for that there is the *audit*: pages are read from outside while the
//! kernel shows them as still protected, and held against what QEMU sent of them.

use super::process::{Pass, PassError, Picks, Work};
use crate::copy::{Cell, Cut};
use crate::event::{Event, Phase};
use crate::guardian::{Guardian, GuardianError, ShotEnd, Stops};
use crate::handed::wheres;
use crate::plan::{AUDIT_PAGES, PlannedSnapshot};
use crate::reader::{self, Begin, Place, Reader, Whole, scratch_file};
use crate::seal::table::Table;
use crate::stall::{self, Watch};
use crate::told;
use evidence::block::{BLOCK_PAGES, index};
use evidence::digest::{Digest, sha256};
use evidence::manifest::{self, Audit};
use evidence::record::Span;
use evidence::state::pages;
use evidence::{GuestRange, MemoryMap, PageState, Segments};
use host::clock::Moment;
use host::guest_memory::Held;
use host::pagemap::Entry;
use host::{Source, Store};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked whether the stream is read.
const LOOK: Duration = Duration::from_millis(3);

/// How long QEMU may be silent: it gives every page memory first, which takes a while. As long a disk may
/// take for what waits for it when all has come: QEMU and the guest have no part in that any more.
const SILENT: Duration = Duration::from_secs(120);

/// How long a disk may stand still while it is given what had come of a stream that was broken off.
const STANDS: Duration = Duration::from_secs(10);

/// Why there is no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Sockets and files in memory.
    #[error("{what} could not be made")]
    Make {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The process that reads.
    #[error("the snapshot's stream: {0}")]
    Reader(String),
    /// QEMU would not, or the guardian was lost.
    #[error("QEMU's snapshot did not begin")]
    Begin(#[source] GuardianError),
    /// QEMU waited too long for us.
    #[error(
        "the snapshot's stream was not read for {} ms, and the guest may be held for {} ms: it was \
         broken off, and the guest goes on", waited.as_millis(), budget.as_millis()
    )]
    Stalled {
        /// How long.
        waited: Duration,
        /// The stall budget.
        budget: Duration,
    },
    /// QEMU sends nothing.
    #[error("QEMU sent nothing of its snapshot for {} s", SILENT.as_secs())]
    Silent,
    /// The disk takes nothing of what QEMU has sent.
    #[error("nothing of the snapshot that had come was written for {} s", SILENT.as_secs())]
    Unwritten,
    /// What QEMU says of it in the end.
    #[error("QEMU's snapshot ended as {0}")]
    Ended(String),
}

/// Where what is read goes.
pub struct Destination<'a> {
    /// Where memory lies in it.
    pub segments: &'a Segments,
    /// It, to be written by position.
    pub file: BorrowedFd<'a>,
    /// Memory that it has room for.
    pub reserved: &'a [GuestRange],
    /// Bytes that may be put beside that; `None`: no limit but its own.
    pub spare: Option<u64>,
    /// Where the guest may have no memory, by QEMU's word: its virtio-mem devices.
    pub pluggable: &'a [GuestRange],
}

/// What came of it.
pub struct Shot {
    /// For the record; absent when QEMU was not told to begin.
    pub snapshot: Option<manifest::Snapshot>,
    /// Pages read while they were protected.
    pub samples: Samples,
    /// State of the devices; empty when the stream was not whole.
    pub device_state: Vec<u8>,
    /// The rights of the process that read.
    pub rights: Option<manifest::Process>,
    /// What went otherwise than it should.
    pub doubts: Vec<String>,
    /// How it ended.
    pub end: Result<(), Cut<PassError>>,
}

/// Pages that were read from outside while nobody could write them.
#[derive(Default)]
pub struct Samples {
    list: Vec<(GuestRange, Digest)>,
    span: Option<Span>,
}

impl Samples {
    /// Holds those that came against what `store` has of them; `None` when there are none.
    pub fn audit(&self, cells: &[Cell], store: &dyn Store) -> Option<(Audit, Span)> {
        let span = self.span?;
        let (mut count, mut differing, mut buffer) = (0, Vec::new(), Vec::new());
        for (at, digest) in self.list.iter().filter(|(at, _)| came(cells, *at)) {
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

/// Has QEMU take a snapshot and reads it. The cells know what came; nothing of the store is looked
/// at, for the reader writes it.
pub fn snapshot(
    work: &Work<'_>,
    map: &MemoryMap,
    planned: &PlannedSnapshot,
    into: &Destination<'_>,
    guardian: &mut Guardian,
    cells: &mut [Cell],
    passes: &mut Vec<Pass>,
) -> Shot {
    let mut shot = Shot {
        snapshot: None,
        samples: Samples::default(),
        device_state: Vec::new(),
        rights: None,
        doubts: Vec::new(),
        end: Ok(()),
    };
    let budget = Duration::from_nanos(planned.at_most_ns);
    let before = host::clock::now();
    let started = work.begin_pass().and_then(|()| Taking::start(work, map, budget, into, cells));
    let mut taking = match started {
        Ok(taking) => taking,
        Err(cut) => return Shot { end: Err(cut), ..shot },
    };
    shot.rights = Some(taking.reader.rights.clone());
    if let Err(error) = taking.begin(guardian) {
        taking.reader.kill();
        return Shot { end: Err(failed(SnapshotError::Begin(error))), ..shot };
    }
    let (samples, read) = taking.read(cells);
    let end = guardian.end_snapshot(read.is_ok());
    let clocks = (before, host::clock::now());
    if read.is_err() {
        taking.keep_what_came();
    }
    // From here on nothing writes into the store any more.
    taking.reader.kill();
    shot.samples = samples;
    taking.collect(cells, into.pluggable, read.as_ref().ok(), passes);
    let ended = match &end {
        Ok(end) => as_ended(end),
        Err(error) => Err(SnapshotError::Ended(told(error))),
    };
    if let Ok(whole) = &read {
        shot.device_state = taking.device_state(whole);
    }
    let longest_wait_ns = nanos(taking.watch.longest());
    // A successor of a guardian that was lost has put QEMU's settings back, or is at it.
    let restored = end.is_ok() || guardian.undone.iter().any(|undone| undone.held == "snapshot");
    let end = end.ok();
    let whole = read.as_ref().ok();
    let mut snapshot = record(work, &clocks, planned, end.as_ref(), whole);
    (snapshot.longest_wait_ns, snapshot.restored) = (longest_wait_ns, restored);
    shot.doubts.extend(doubts(&snapshot, &clocks, end.as_ref()));
    if whole.is_some() && shot.device_state.is_empty() {
        shot.doubts.push("the devices' state could not be kept".to_owned());
    }
    shot.snapshot = Some(snapshot);
    // Why the reading ended is why QEMU ended it, unless the guardian knows better.
    shot.end = match (read, ended) {
        (Ok(_), ended) => ended.map_err(failed),
        (Err(Cut::Failed(_)), Err(broken @ SnapshotError::Ended(_)))
            if end.is_some_and(|end| end.broken.is_some()) =>
        {
            Err(failed(broken))
        }
        (Err(cut), _) => Err(cut),
    };
    shot
}

fn failed(error: SnapshotError) -> Cut<PassError> {
    Cut::Failed(PassError::Snapshot(error))
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn make(what: &'static str) -> impl FnOnce(io::Error) -> Cut<PassError> {
    move |cause| failed(SnapshotError::Make { what, cause })
}

/// A snapshot that QEMU ended in any way but whole.
fn as_ended(end: &ShotEnd) -> Result<(), SnapshotError> {
    let status = end.migration.status.as_deref().unwrap_or("none");
    let why = end.broken.as_ref().or(end.migration.error_desc.as_ref());
    match (status, why) {
        ("completed", None) => Ok(()),
        (status, Some(why)) => Err(SnapshotError::Ended(format!("{status:?}: {why}"))),
        (status, None) => Err(SnapshotError::Ended(format!("{status:?}"))),
    }
}

/// What the manifest says of it.
fn record(
    work: &Work<'_>,
    clocks: &(Moment, Moment),
    planned: &PlannedSnapshot,
    end: Option<&ShotEnd>,
    whole: Option<&Whole>,
) -> manifest::Snapshot {
    let at = |us: i64| host::clock::monotonic_at(&clocks.0, us).map(|ns| work.log.since_ns(ns));
    let page_ns = whole.map(|whole| work.log.since_ns(whole.first_page_ns));
    let stop = end.zip(page_ns).and_then(|(end, page_ns)| stop_of(&end.told, at, page_ns));
    manifest::Snapshot {
        status: end.and_then(|end| end.migration.status.clone()),
        error: end.and_then(|end| end.migration.error_desc.clone()),
        stop: stop.filter(|_| !is_stepped(clocks)),
        qemu_downtime_ms: end.and_then(|end| end.migration.downtime),
        qemu_total_ms: end.and_then(|end| end.migration.total_time),
        expected_ns: planned.expected_ns,
        budget_ns: planned.at_most_ns,
        longest_wait_ns: 0,
        restored: false,
        machine: whole.map(|whole| whole.machine.clone()),
        stream_bytes: whole.map(|whole| whole.len),
        pages: whole.map(|whole| whole.pages),
        zero_pages: whole.map(|whole| whole.zero_pages),
        other_pages: whole.map(|whole| whole.other_pages),
        devices: whole.map(|whole| whole.devices.clone()).unwrap_or_default(),
        unaccounted: whole.and_then(|whole| whole.unaccounted.clone()),
    }
}

/// The stop that was the snapshot's: the last before its first page came. `at` brings a time of
/// QEMU's to that of the record.
fn stop_of(told: &Stops, at: impl Fn(i64) -> Option<u64>, page_ns: u64) -> Option<Span> {
    let mut stops = told.stops_us.iter().rev().filter_map(|us| at(*us));
    let t0_ns = stops.find(|ns| *ns <= page_ns)?;
    let t1_ns = told.resumes_us.iter().filter_map(|us| at(*us)).find(|ns| *ns >= t0_ns)?;
    Some(Span { t0_ns, t1_ns })
}

/// Whether UTC was set meanwhile, by which QEMU tells of the stop.
fn is_stepped(clocks: &(Moment, Moment)) -> bool {
    host::clock::step_us(&clocks.0, &clocks.1).is_none_or(|step| step.unsigned_abs() > STEP_US)
}

/// How far UTC and monotonic time drift apart in an hour under a time service that slews.
const STEP_US: u64 = 5_000;

/// What went otherwise than it should, and may be whole all the same.
fn doubts(
    snapshot: &manifest::Snapshot,
    clocks: &(Moment, Moment),
    end: Option<&ShotEnd>,
) -> Vec<String> {
    let ms = |ns: u64| ns.div_ceil(1_000_000);
    let mut doubts = Vec::new();
    let stood = snapshot.stop.map(|stop| stop.t1_ns - stop.t0_ns);
    if let Some(stood) = stood.filter(|stood| *stood > snapshot.budget_ns) {
        doubts.push(format!(
            "QEMU stopped the guest for {} ms; {} ms were expected and {} ms allowed: once begun, the \
             stop could not be cut short",
            ms(stood),
            ms(snapshot.expected_ns),
            ms(snapshot.budget_ns)
        ));
    }
    if let Some(place) = &snapshot.unaccounted {
        doubts.push(format!("the devices' state is not as QEMU describes it: {place}"));
    }
    if is_stepped(clocks) {
        doubts.push("the host's clock was set while QEMU sent its snapshot".to_owned());
    }
    if end.is_some_and(|end| end.parameters_differ) {
        doubts.push(
            "somebody else changed QEMU's parameters of migration meanwhile; a snapshot sets none"
                .to_owned(),
        );
    }
    doubts
}

/// A snapshot under way.
struct Taking<'a> {
    work: &'a Work<'a>,
    budget: Duration,
    /// That of [`stall`].
    turn: u64,
    reader: Reader,
    table: Table,
    state: File,
    /// The socket's end for QEMU, until it has it.
    theirs: Option<UnixStream>,
    /// The reader's.
    ours: UnixStream,
    pulse: File,
    watch: Watch,
    began_ns: u64,
}

impl<'a> Taking<'a> {
    /// Makes everything, and starts the reader.
    fn start(
        work: &'a Work<'a>,
        map: &MemoryMap,
        budget: Duration,
        into: &Destination<'_>,
        cells: &[Cell],
    ) -> Result<Self, Cut<PassError>> {
        let (ours, theirs) = UnixStream::pair().map_err(make("a socket"))?;
        let file = |name, len: usize| {
            scratch_file(name, len as u64).map_err(make("a file in memory")).map(File::from)
        };
        let pulse = file("stillframe-pulse", stall::PULSE)?;
        let state = file("stillframe-devices", reader::DEVICE_STATE)?;
        let table = Table::new(file("stillframe-pages", Table::len_of(cells.len()))?);
        for (number, cell) in (0u64..).zip(cells) {
            table.put(number, &Table::unknown(cell)).map_err(make("the table of blocks"))?;
        }
        let begin = Begin {
            store: wheres(into.segments),
            places: places(map),
            reserved: into.reserved.iter().map(|range| (range.start(), range.len())).collect(),
            spare: into.spare,
        };
        let fds = [ours.as_fd(), into.file, table.file().as_fd(), state.as_fd(), pulse.as_fd()];
        let reader =
            Reader::start(begin, fds).map_err(|text| failed(SnapshotError::Reader(text)))?;
        let clones = ours.try_clone().and_then(|ours| Ok((ours, pulse.try_clone()?)));
        let (stream, beats) = clones.map_err(make("a descriptor"))?;
        let page_sizes = work.source.places().iter().map(Held::page_size);
        let turn = page_sizes.map(stall::turn).max().unwrap_or(0);
        let watch = Watch::new(stream.into(), beats.into(), turn);
        let theirs = Some(theirs);
        let began_ns = work.log.now_ns();
        Ok(Self { work, budget, turn, reader, table, state, theirs, ours, pulse, watch, began_ns })
    }

    /// Has QEMU begin. The guardian may hang just then: so it is looked already whether the stream is
    /// read.
    fn begin(&mut self, guardian: &mut Guardian) -> Result<(), GuardianError> {
        // Nobody but QEMU and the guardian has it from here on: its end is the stream's.
        let Some(theirs) = self.theirs.take() else { return Ok(()) };
        let (ours, pulse) = (self.ours.as_fd(), self.pulse.as_fd());
        let (begun, budget, watch) = (AtomicBool::new(false), self.budget, &mut self.watch);
        let turn = self.turn;
        thread::scope(|scope| {
            scope.spawn(|| {
                while !begun.load(Ordering::Relaxed) {
                    if watch.look().is_ok_and(|waited| waited > budget) {
                        return watch.cut();
                    }
                    thread::sleep(LOOK);
                }
            });
            let result = guardian.snapshot(nanos(budget), turn, theirs.as_fd(), ours, pulse);
            begun.store(true, Ordering::Relaxed);
            result
        })
    }

    /// Waits until all has come, and samples protected pages meanwhile.
    fn read(&mut self, cells: &[Cell]) -> (Samples, Result<Whole, Cut<PassError>>) {
        let (ended, work) = (AtomicBool::new(false), self.work);
        thread::scope(|scope| {
            let sampler = scope.spawn(|| sample(work, cells, &ended));
            let read = self.wait();
            if read.is_err() {
                self.watch.cut();
            }
            ended.store(true, Ordering::Relaxed);
            (sampler.join().unwrap_or_default(), read)
        })
    }

    fn wait(&mut self) -> Result<Whole, Cut<PassError>> {
        let total = self.work.source.places().iter().map(|held| held.place().range.len()).sum();
        let (mut heard, mut told_at) = (((0, 0), Instant::now()), Instant::now());
        loop {
            let read = self.reader.wait(LOOK);
            if let Some(whole) = read.map_err(|text| failed(SnapshotError::Reader(text)))? {
                return Ok(whole);
            }
            if self.work.stop.asked() {
                return Err(Cut::Stopped);
            }
            let waited = self.watch.look().map_err(make("a look at the stream"))?;
            if waited > self.budget {
                return Err(failed(SnapshotError::Stalled { waited, budget: self.budget }));
            }
            let written = self.watch.written().map_err(make("a look at the reader"))?;
            let now = (self.watch.count(), written);
            if now != heard.0 {
                heard = (now, Instant::now());
            }
            if heard.1.elapsed() > SILENT {
                let all_has_come = self.watch.is_hung_up();
                return Err(failed(match all_has_come {
                    true => SnapshotError::Unwritten,
                    false => SnapshotError::Silent,
                }));
            }
            if told_at.elapsed() >= PROGRESS {
                told_at = Instant::now();
                self.work.observer.event(Event::Progress {
                    phase: Phase::Capture,
                    pass: Some(1),
                    done_bytes: self.watch.count().min(total),
                    total_bytes: total,
                });
            }
        }
    }

    /// The stream was broken off: what had come may wait for the disk, and nobody waits for that. The
    /// reader has the time that it needs, but for a second wish of the operator's.
    fn keep_what_came(&mut self) {
        let stop = self.work.stop.next();
        let mut seen = (0, Instant::now());
        while seen.1.elapsed() < STANDS && !stop.asked() {
            if !matches!(self.reader.wait(LOOK), Ok(None)) {
                return;
            }
            let written = self.watch.written().unwrap_or_default();
            if written != seen.0 {
                seen = (written, Instant::now());
            }
        }
    }

    /// Takes over what the reader says of each block.
    fn collect(
        &self,
        cells: &mut [Cell],
        pluggable: &[GuestRange],
        whole: Option<&Whole>,
        passes: &mut Vec<Pass>,
    ) {
        let log = self.work.log;
        let came =
            whole.map(|whole| (log.since_ns(whole.first_page_ns), log.since_ns(whole.last_ns)));
        let (t0_ns, t1_ns) = came.unwrap_or((self.began_ns, log.now_ns()));
        let span = Span { t0_ns, t1_ns };
        let mut bytes = 0;
        for (number, cell) in (0u64..).zip(cells.iter_mut()) {
            let may = |(page, state): (GuestRange, &PageState)| match state {
                PageState::Data | PageState::Zero | PageState::Unreadable => true,
                PageState::Discarded => pluggable.iter().any(|device| device.covers(page)),
                PageState::Hole | PageState::Excluded => false,
            };
            let known = self.table.get(number).ok().filter(|entry| {
                entry.block == cell.block
                    && entry.states.len() == cell.states.len()
                    && pages(entry.block).zip(&entry.states).all(may)
            });
            let Some(entry) = known else { continue };
            // Of a stream that was cut off, a block of which nothing came was not reached.
            let came = entry.states.iter().any(|state| *state != PageState::Unreadable);
            if whole.is_none() && !(came && entry.sealed) {
                continue;
            }
            cell.states = entry.states.into();
            (cell.stored, cell.pass) = (span, 1);
            bytes += cell.block.len();
        }
        if bytes > 0 {
            passes.push(Pass { n: 1, span, bytes, changed_pages: None });
            let took_ns = span.t1_ns.saturating_sub(span.t0_ns);
            let event = Event::Pass { pass: 1, bytes, took_ns, changed_pages: None };
            self.work.observer.event(event);
        }
    }

    fn device_state(&self, whole: &Whole) -> Vec<u8> {
        let mut bytes = vec![0; index(whole.device_state.min(reader::DEVICE_STATE as u64))];
        // What cannot be read back is missing in the record.
        if self.state.read_exact_at(&mut bytes, 0).is_err() {
            bytes.clear();
        }
        bytes
    }
}

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(200);

/// Where QEMU's blocks lie in the guest's memory, as far as the image has it.
fn places(map: &MemoryMap) -> Vec<Place> {
    let place = |(region, range): (&evidence::Region, GuestRange)| {
        Some(Place {
            block: region.block.clone()?,
            offset: region.block_offset,
            gpa: range.start(),
            len: range.len(),
        })
    };
    map.imaged().filter_map(place).collect()
}

/// Reads pages at random that are protected from writing: their bytes are those of the stop.
fn sample(work: &Work<'_>, cells: &[Cell], ended: &AtomicBool) -> Samples {
    let (mut samples, mut picks) = (Samples::default(), Picks::new());
    let mut buffer = Vec::new();
    let count = index(AUDIT_PAGES);
    while samples.list.len() < count && !ended.load(Ordering::Relaxed) && !cells.is_empty() {
        let mut found = false;
        for _ in 0..BATCH {
            let Some(cell) = cells.get(picks.below(cells.len())) else { continue };
            let Some(at) = pages(cell.block).nth(picks.below(BLOCK_PAGES)) else { continue };
            if let Some((digest, span)) = protected(work, at, &mut buffer) {
                found = true;
                samples.list.push((at, digest));
                samples.span = Some(samples.span.map_or(span, |all| all.join(span)));
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

/// The page's digest, if it was protected before it was read and after.
fn protected(work: &Work<'_>, at: GuestRange, buffer: &mut Vec<u8>) -> Option<(Digest, Span)> {
    let is_protected = || {
        let mut entry = [Entry::default()];
        work.source.entries(at, &mut entry).ok()?;
        let [entry] = entry;
        (entry.present() && entry.write_protected()).then_some(())
    };
    let t0_ns = work.log.now_ns();
    is_protected()?;
    buffer.resize(index(at.len()), 0);
    let mut states = [PageState::Hole];
    work.source.read(at, buffer, &mut states).ok()?;
    is_protected()?;
    (states == [PageState::Data] || states == [PageState::Zero])
        .then(|| (sha256(buffer), Span { t0_ns, t1_ns: work.log.now_ns() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stop_is_the_last_before_the_first_page() {
        let end = |stops_us: &[i64], resumes_us: &[i64]| Stops {
            stops_us: stops_us.to_vec(),
            resumes_us: resumes_us.to_vec(),
        };
        let stop = |told: &Stops| stop_of(told, |us| u64::try_from(us).ok(), 100);
        let span = |t0_ns, t1_ns| Some(Span { t0_ns, t1_ns });
        assert_eq!(stop(&end(&[90], &[110])), span(90, 110));
        // Others stopped it before, and after.
        assert_eq!(stop(&end(&[10, 90, 200], &[20, 95, 210])), span(90, 95));
        assert_eq!(stop(&end(&[200], &[210])), None);
        assert_eq!(stop(&end(&[90], &[])), None);
    }
}
