//! A stream that QEMU sends, and a process without rights reads into the store: what `snapshot` and
//! `dump` have in common. QEMU waits for whoever reads, and the guest with it: so it is looked all the
//! time whether the stream is read, and it is cut when that takes too long.

use super::dump::DumpError;
use super::process::{Pass, PassError, Work};
use crate::copy::{Cell, Cut};
use crate::event::{Event, Phase};
use crate::guardian::{DumpBegun, DumpEnd, Guardian, GuardianError};
use crate::handed::wheres;
use crate::reader::{self, Begin, Kind, Place, Reader, Whole, scratch_file};
use crate::seal::table::Table;
use crate::stall::{self, Watch};
use evidence::block::index;
use evidence::manifest;
use evidence::record::Span;
use evidence::state::pages;
use evidence::{GuestRange, MemoryMap, PageState, Segments};
use host::clock::monotonic_ns;
use host::guest_memory::Held;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked whether the stream is read.
const LOOK: Duration = Duration::from_millis(3);

/// How long QEMU may be silent: before a snapshot it gives every page memory, which takes a while. As long
/// a disk may take for what waits for it when all has come: QEMU and the guest have no part in that any
/// more.
const SILENT: Duration = Duration::from_secs(120);

/// How long a disk may stand still while it is given what had come of a stream that was broken off.
const STANDS: Duration = Duration::from_secs(10);

/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(200);

/// Why a stream was not taken.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
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
    #[error("QEMU's stream: {0}")]
    Reader(String),
    /// QEMU waited too long for us.
    #[error(
        "QEMU's stream was not read for {} ms, and the guest may be held for {} ms: it was broken off, \
         and the guest goes on", waited.as_millis(), budget.as_millis()
    )]
    Stalled {
        /// How long.
        waited: Duration,
        /// The stall budget.
        budget: Duration,
    },
    /// QEMU sends nothing.
    #[error("QEMU sent nothing for {} s and more", SILENT.as_secs())]
    Silent,
    /// The disk takes nothing of what QEMU has sent.
    #[error("nothing of what had come from QEMU was written for {} s and more", SILENT.as_secs())]
    Unwritten,
    /// It did not end in time.
    #[error("QEMU's stream did not end in time: it was broken off, and the guest goes on")]
    Late,
}

pub(super) fn failed(error: StreamError) -> Cut<PassError> {
    Cut::Failed(PassError::Stream(error))
}

/// Where what is read goes.
pub struct Destination<'a> {
    /// It, to be written by position.
    pub file: OwnedFd,
    /// Where memory lies in it.
    pub segments: &'a Segments,
    /// Memory that it has room for.
    pub reserved: &'a [GuestRange],
    /// Bytes that may be put beside that; `None`: no limit but its own.
    pub spare: Option<u64>,
    /// Where the guest may have no memory, by QEMU's word: its virtio-mem devices.
    pub pluggable: Vec<GuestRange>,
}

fn make(what: &'static str) -> impl FnOnce(io::Error) -> Cut<PassError> {
    move |cause| failed(StreamError::Make { what, cause })
}

pub(super) fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Both ends of a socket, and the files that its reader writes into.
struct Ends {
    /// The end for QEMU, until it has it.
    theirs: Option<UnixStream>,
    /// The reader's.
    ours: UnixStream,
    pulse: File,
    state: File,
    watch: Watch,
}

impl Ends {
    /// `turn` is that of [`stall`].
    fn make(turn: u64) -> Result<Self, Cut<PassError>> {
        let (ours, theirs) = UnixStream::pair().map_err(make("a socket"))?;
        let pulse = file("stillframe-pulse", stall::PULSE)?;
        let state = file("stillframe-devices", reader::DEVICE_STATE)?;
        let clones = ours.try_clone().and_then(|ours| Ok((ours, pulse.try_clone()?)));
        let (stream, beats) = clones.map_err(make("a descriptor"))?;
        let watch = Watch::new(stream.into(), beats.into(), turn);
        Ok(Self { theirs: Some(theirs), ours, pulse, state, watch })
    }

    /// Starts who reads, and writes into `store` and `table`.
    fn reader(
        &self,
        begin: Begin,
        store: BorrowedFd<'_>,
        table: BorrowedFd<'_>,
    ) -> Result<Reader, Cut<PassError>> {
        let fds = [self.ours.as_fd(), store, table, self.state.as_fd(), self.pulse.as_fd()];
        Reader::start(begin, fds).map_err(|text| failed(StreamError::Reader(text)))
    }

    /// What the reader kept: the devices' state, or a dump's head.
    fn state(&self, whole: &Whole) -> Vec<u8> {
        let mut bytes = vec![0; index(whole.device_state.min(reader::DEVICE_STATE as u64))];
        // What cannot be read back is missing in the record.
        if self.state.read_exact_at(&mut bytes, 0).is_err() {
            bytes.clear();
        }
        bytes
    }
}

fn file(name: &str, len: usize) -> Result<File, Cut<PassError>> {
    scratch_file(name, len as u64).map_err(make("a file in memory")).map(File::from)
}

/// What QEMU is asked with: its end of the socket, the reader's, and the reader's pulse.
pub(super) type Fds<'a> = [BorrowedFd<'a>; 3];

/// A stream under way.
pub(super) struct Taking<'a> {
    work: &'a Work<'a>,
    budget: Duration,
    /// Bytes of memory that the image shall have.
    total: u64,
    /// That of [`stall`].
    pub(super) turn: u64,
    /// When it is cut, whoever waits: the guest stands meanwhile.
    until: Option<Instant>,
    ends: Ends,
    reader: Reader,
    table: Table,
    began_ns: u64,
}

impl<'a> Taking<'a> {
    /// Makes everything, and starts the reader.
    pub(super) fn start(
        work: &'a Work<'a>,
        kind: Kind,
        map: &MemoryMap,
        budget: Duration,
        into: &Destination<'_>,
        cells: &[Cell],
    ) -> Result<Self, Cut<PassError>> {
        let page_sizes = work.source.places().iter().map(Held::page_size);
        let turn = page_sizes.map(stall::turn).max().unwrap_or(0);
        let ends = Ends::make(turn)?;
        let table = Table::new(file("stillframe-pages", Table::len_of(cells.len()))?);
        for (number, cell) in (0u64..).zip(cells) {
            table.put(number, &Table::unknown(cell)).map_err(make("the table of blocks"))?;
        }
        let begin = Begin {
            kind,
            store: wheres(into.segments),
            places: places(map),
            reserved: into.reserved.iter().map(|range| (range.start(), range.len())).collect(),
            spare: into.spare,
        };
        let reader = ends.reader(begin, into.file.as_fd(), table.file().as_fd())?;
        let began_ns = work.log.now_ns();
        let total = map.imaged_len();
        Ok(Self { work, budget, total, turn, until: None, ends, reader, table, began_ns })
    }

    /// The rights that the reader kept.
    pub(super) fn rights(&self) -> manifest::Process {
        self.reader.rights.clone()
    }

    /// Has QEMU begin, by what is `asked` of the guardian. It may hang just then: so it is looked
    /// already whether the stream is read.
    pub(super) fn begin<T>(
        &mut self,
        stands: bool,
        asked: impl FnOnce(Fds<'_>) -> Result<T, GuardianError>,
    ) -> Result<Option<T>, GuardianError> {
        // Nobody but QEMU and the guardian has it from here on: its end is the stream's.
        let Some(theirs) = self.ends.theirs.take() else { return Ok(None) };
        self.until = stands.then(|| Instant::now() + self.budget);
        let fds = [theirs.as_fd(), self.ends.ours.as_fd(), self.ends.pulse.as_fd()];
        let (begun, budget, until) = (AtomicBool::new(false), self.budget, self.until);
        let watch = &mut self.ends.watch;
        thread::scope(|scope| {
            scope.spawn(|| {
                while !begun.load(Ordering::Relaxed) {
                    let late = until.is_some_and(|until| Instant::now() > until);
                    if late || watch.look().is_ok_and(|waited| waited > budget) {
                        return watch.cut();
                    }
                    thread::sleep(LOOK);
                }
            });
            let result = asked(fds);
            begun.store(true, Ordering::Relaxed);
            result.map(Some)
        })
    }

    /// Waits until all has come; `sampler` looks at the guest meanwhile, until it is told that it has.
    pub(super) fn read<S: Send + Default>(
        &mut self,
        sampler: impl FnOnce(&AtomicBool) -> S + Send,
    ) -> (S, Result<Whole, Cut<PassError>>) {
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let sampler = scope.spawn(|| sampler(&ended));
            let read = self.wait();
            if read.is_err() {
                self.ends.watch.cut();
            }
            ended.store(true, Ordering::Relaxed);
            (sampler.join().unwrap_or_default(), read)
        })
    }

    /// Ends the reader: from here on nothing writes into the store any more.
    pub(super) fn end_reader(&mut self) {
        self.reader.kill();
    }

    /// The longest that QEMU's bytes lay unread.
    pub(super) fn longest_wait_ns(&self) -> u64 {
        nanos(self.ends.watch.longest())
    }

    fn wait(&mut self) -> Result<Whole, Cut<PassError>> {
        let total = self.total;
        // It has the more to look at, the larger the guest is: a GiB a second at the least.
        let silent = SILENT + Duration::from_secs(total >> 30);
        let (mut heard, mut told_at) = (((0, 0), Instant::now()), Instant::now());
        loop {
            let read = self.reader.wait(LOOK);
            if let Some(whole) = read.map_err(|text| failed(StreamError::Reader(text)))? {
                return Ok(whole);
            }
            if self.work.stop.asked() {
                return Err(Cut::Stopped);
            }
            if self.until.is_some_and(|until| Instant::now() > until) {
                return Err(Cut::Late);
            }
            let waited = self.ends.watch.look().map_err(make("a look at the stream"))?;
            if waited > self.budget {
                return Err(failed(StreamError::Stalled { waited, budget: self.budget }));
            }
            let written = self.ends.watch.written().map_err(make("a look at the reader"))?;
            let now = (self.ends.watch.count(), written);
            if now != heard.0 {
                heard = (now, Instant::now());
            }
            if heard.1.elapsed() > silent {
                return Err(failed(match self.ends.watch.is_hung_up() {
                    true => StreamError::Unwritten,
                    false => StreamError::Silent,
                }));
            }
            if told_at.elapsed() >= PROGRESS {
                told_at = Instant::now();
                self.work.observer.event(Event::Progress {
                    phase: Phase::Capture,
                    pass: Some(1),
                    done_bytes: self.ends.watch.count().min(total),
                    total_bytes: total,
                });
            }
        }
    }

    /// The stream was broken off: what had come may wait for the disk, and nobody waits for that. The
    /// reader has the time that it needs, but for a second wish of the operator's.
    pub(super) fn keep_what_came(&mut self) {
        let stop = self.work.stop.next();
        let mut seen = (0, Instant::now());
        while seen.1.elapsed() < STANDS && !stop.asked() {
            if !matches!(self.reader.wait(LOOK), Ok(None)) {
                return;
            }
            let written = self.ends.watch.written().unwrap_or_default();
            if written != seen.0 {
                seen = (written, Instant::now());
            }
        }
    }

    /// Takes over what the reader says of each block; QEMU read nothing after `until_ns` of the record.
    pub(super) fn collect(
        &self,
        cells: &mut [Cell],
        pluggable: &[GuestRange],
        whole: Option<&Whole>,
        passes: &mut Vec<Pass>,
        until_ns: u64,
    ) {
        let log = self.work.log;
        let came =
            whole.map(|whole| (log.since_ns(whole.first_page_ns), log.since_ns(whole.last_ns)));
        let (t0_ns, t1_ns) = came.unwrap_or((self.began_ns, log.now_ns()));
        let t1_ns = t1_ns.min(until_ns);
        let span = Span { t0_ns: t0_ns.min(t1_ns), t1_ns };
        // Of virtio-mem a dump has what is plugged in, as its head says.
        let dumped = whole.and_then(|whole| whole.head.as_ref()).map(reader::Head::ranges);
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
            if let Some(dumped) = &dumped {
                cell.discard(PageState::Unreadable, pluggable, dumped);
            }
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

    /// What the reader kept beside memory: the devices' state, or a dump's head.
    pub(super) fn state(&self, whole: &Whole) -> Vec<u8> {
        self.ends.state(whole)
    }
}

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

/// The head of a dump: what QEMU has before memory.
pub struct DumpHead {
    /// What it says.
    pub head: reader::Head,
    /// Byte for byte.
    pub bytes: Vec<u8>,
    /// The rights of the process that read it.
    pub rights: manifest::Process,
    /// What QEMU said at its beginning and its end.
    pub stood: (DumpBegun, DumpEnd),
}

/// Has QEMU dump, and closes the socket before memory: the guest stands for about a millisecond, and
/// `at_most` at the longest.
///
/// # Errors
/// [`PassError`]; the guest goes on.
pub fn dump_head(guardian: &mut Guardian, at_most: Duration) -> Result<DumpHead, PassError> {
    let error = |cut: Cut<PassError>| match cut {
        Cut::Failed(error) => error,
        Cut::Stopped | Cut::Late => PassError::Stream(StreamError::Late),
    };
    let mut ends = Ends::make(0).map_err(error)?;
    let begin = Begin {
        kind: Kind::DumpHead,
        store: Vec::new(),
        places: Vec::new(),
        reserved: Vec::new(),
        spare: None,
    };
    let none = file("stillframe-none", 0).map_err(error)?;
    let mut reader = ends.reader(begin, none.as_fd(), none.as_fd()).map_err(error)?;
    let Some(theirs) = ends.theirs.take() else { return Err(PassError::Stream(StreamError::Late)) };
    let until = Instant::now() + at_most;
    let until_ns = monotonic_ns().saturating_add(nanos(at_most));
    let begun = guardian.dump(until_ns, theirs.as_fd(), ends.ours.as_fd());
    drop(theirs);
    let begun = begun.map_err(|cause| PassError::Dump(DumpError::Begin(cause)))?;
    let read = loop {
        match reader.wait(LOOK) {
            Ok(Some(whole)) => break Ok(whole),
            Err(text) => break Err(StreamError::Reader(text)),
            Ok(None) if Instant::now() > until => break Err(StreamError::Late),
            Ok(None) => {}
        }
    };
    ends.watch.cut();
    let end = guardian.end_dump().map_err(|cause| PassError::Dump(DumpError::End(cause)));
    reader.kill();
    let (whole, end) = (read.map_err(PassError::Stream)?, end?);
    let Some(head) = whole.head.clone() else {
        return Err(PassError::Stream(StreamError::Reader("it read no head".to_owned())));
    };
    let bytes = ends.state(&whole);
    Ok(DumpHead { head, bytes, rights: reader.rights.clone(), stood: (begun, end) })
}
