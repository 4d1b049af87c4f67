//! The reader: takes the guest's memory out of QEMU's migration stream, or out of its dump, and puts it
//! into the store, and can do nothing else. One for each snapshot or dump.
//!
//! The stream is as hostile as the guest: so it is parsed by a process that has no rights, cannot
//! open a file, and holds nothing but the socket, the store and three files that capture looks
//! into: the [`Table`] of what is there, the devices' state (the dump's head), and its pulse
//! ([`crate::stall`]).
//!
//! QEMU waits while the socket is full, and the guest may wait with it: what goes to a disk goes
//! through a queue in memory, and a thread of its own writes.

use crate::handed::{NOBODY, Where, segments};
use crate::role::{self, Peer, Role};
use crate::seal::is_zero;
use crate::seal::table::{Entry, Table};
use crate::stall;
use crate::told;
use evidence::digest::Digest;
use evidence::manifest::{self, SnapshotDevice};
use evidence::state::pages;
use evidence::{GuestRange, PAGE, PageState};
use host::channel::{self, Channel, ChannelError};
use host::clock::monotonic_ns;
use host::{DiskStore, Store};
use qemu::dump;
use qemu::stream::{self, Sink, VirtioMem};
use qemu::text::Excerpt;
use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// How long a message may take.
const PROMPT: Duration = Duration::from_secs(10);

/// Bytes of device state that are kept at most: one with hundreds of vCPUs has some MiB.
pub const DEVICE_STATE: usize = 64 << 20;

/// Bytes that may wait for the disk.
const QUEUE: usize = 128 << 20;

/// Devices that are told of at most; a large machine has some hundred.
const DEVICES: usize = 4096;

/// What a page takes of the store where no room was made for its block: the store takes memory a MiB
/// at a time.
const CELL: u64 = 1 << 20;

/// What capture says.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// The only message; behind it come the stream, the store, the table, and the two files.
    Begin(Begin),
}

/// What comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// QEMU's stream of migration: a snapshot.
    Snapshot,
    /// QEMU's dump.
    Dump,
    /// The same, of which nothing but the head is read.
    DumpHead,
}

/// What the reader has to know.
#[derive(Debug, Serialize, Deserialize)]
pub struct Begin {
    /// What comes.
    pub kind: Kind,
    /// Where memory lies in the store.
    pub store: Vec<Where>,
    /// Where QEMU's blocks lie in the guest's memory.
    pub places: Vec<Place>,
    /// Memory that the store has room for: start and length, ascending.
    pub reserved: Vec<(u64, u64)>,
    /// Bytes that may be put beside that; `None`: as much as there is.
    pub spare: Option<u64>,
}

/// Where a part of one of QEMU's blocks lies in the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// QEMU's name of the block.
    pub block: String,
    /// Offset in the block, in bytes.
    pub offset: u64,
    /// Guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

#[derive(Debug, Serialize, Deserialize)]
enum Said {
    /// Begun, with these rights.
    Begun(manifest::Process),
    /// The stream is over.
    Ended(Result<Box<Whole>, String>),
}

/// A stream that was read to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whole {
    /// Bytes.
    pub len: u64,
    /// QEMU's machine type.
    pub machine: String,
    /// Pages with bytes.
    pub pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Pages of memory that is at no place.
    pub other_pages: u64,
    /// The devices.
    pub devices: Vec<SnapshotDevice>,
    /// Where description and stream disagree.
    pub unaccounted: Option<String>,
    /// Bytes of the devices' state, or of the dump's head, in their file.
    pub device_state: u64,
    /// What the dump's head says.
    pub head: Option<Head>,
    /// When the first page had come, by CLOCK_MONOTONIC in nanoseconds; 0 if none did.
    pub first_page_ns: u64,
    /// When the stream's last bytes came.
    pub last_ns: u64,
}

/// What a dump says before its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The guest's instruction set.
    pub machine: String,
    /// The vCPUs by QEMU's index, in the order of the notes.
    pub cpus: Vec<u32>,
    /// Memory: start and length, in the stream's order.
    pub memory: Vec<(u64, u64)>,
    /// The guest left a note of its own.
    pub guest_note: bool,
}

impl Head {
    /// The memory, sorted.
    pub fn ranges(&self) -> Vec<GuestRange> {
        let ranges = self.memory.iter().filter_map(|&(at, len)| GuestRange::new(at, len));
        let mut ranges: Vec<GuestRange> = ranges.collect();
        ranges.sort_unstable();
        ranges
    }
}

/// The process.
pub fn run(channel: Channel) -> ExitCode {
    match serve(channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stillframe: reader: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(mut channel: Channel) -> Result<(), String> {
    let Ask::Begin(begin) = role::hear(&mut channel, PROMPT).map_err(|e| e.to_string())?;
    let mut fds = channel.receive_fds(FILES, PROMPT).map_err(|e| e.to_string())?.into_iter();
    let mut next = || fds.next().ok_or_else(|| "a file is missing".to_owned());
    let (stream, store, table, state, pulse) = (next()?, next()?, next()?, next()?, next()?);
    // Opened for direct I/O while files can be opened.
    let store = match begin.kind {
        Kind::DumpHead => None,
        _ => {
            let segments = segments(&begin.store)?;
            Some(DiskStore::new(File::from(store), segments).map_err(|e| told(&e))?)
        }
    };
    let in_force = host::sandbox::seal(Some(NOBODY)).map_err(|e| told(&e))?;
    // From here on there is nothing that this process could do to anybody.
    let rights = role::rights(Role::Reader.word(), std::process::id(), &in_force);
    let listener = channel.try_clone().map_err(|e| told(&e))?;
    end_with_capture(listener).map_err(|e| told(&e))?;
    role::say(&mut channel, &Said::Begun(rights), PROMPT).map_err(|e| e.to_string())?;
    let pulse =
        Pulsed { stream: File::from(stream), pulse: File::from(pulse), count: 0, last_ns: 0 };
    let state = File::from(state);
    let ended = match store {
        None => take_head(pulse, &state),
        Some(store) => {
            let beats = pulse.pulse.try_clone().map_err(|e| told(&e))?;
            let taker = Taker::new(&begin, store, Table::new(File::from(table)), beats);
            let taker = taker.map_err(|e| told(&e))?;
            match begin.kind {
                Kind::Snapshot => take_snapshot(taker, pulse, &state),
                _ => take_dump(taker, pulse, &state),
            }
        }
    };
    role::say(&mut channel, &Said::Ended(ended.map(Box::new)), PROMPT).map_err(|e| e.to_string())
}

/// Files that come with the first message.
const FILES: usize = 5;

/// Ends this process when capture is gone: nobody wants the rest, and QEMU must not wait for it.
fn end_with_capture(channel: Channel) -> io::Result<()> {
    let listen = move || {
        // Capture says nothing more: what comes is its end.
        let _ = channel::wait(&[channel.as_fd()], None);
        std::process::exit(1);
    };
    thread::Builder::new().name("listen".to_owned()).spawn(listen).map(drop)
}

/// Takes the head of a dump. The stream is closed when this returns: QEMU ends its dump.
fn take_head(mut stream: Pulsed, state: &File) -> Result<Whole, String> {
    let (head, _) = dump::head(&mut stream, DEVICE_STATE).map_err(|error| told(&error))?;
    state.write_all_at(&head.bytes, 0).map_err(|e| told(&e))?;
    Ok(of_dump(&head, head.bytes.len() as u64, stream.last_ns))
}

/// Takes all of a dump.
fn take_dump(mut taker: Taker, mut stream: Pulsed, state: &File) -> Result<Whole, String> {
    let (head, memory) = dump::head(&mut stream, DEVICE_STATE).map_err(|error| told(&error))?;
    state.write_all_at(&head.bytes, 0).map_err(|e| told(&e))?;
    let read = memory.read(|gpa, bytes| taker.memory(gpa, bytes));
    // What came is kept, whatever ended it.
    let kept = taker.finish(&[]);
    read.map_err(|error| told(&error))?;
    let kept = kept.map_err(|e| told(&e))?;
    let whole = of_dump(&head, head.len, stream.last_ns);
    Ok(Whole {
        pages: kept.pages,
        zero_pages: kept.zero_pages,
        other_pages: kept.other_pages,
        first_page_ns: kept.first_page_ns,
        ..whole
    })
}

/// A dump of `len` bytes, of whose memory nothing is known.
fn of_dump(head: &dump::Head, len: u64, last_ns: u64) -> Whole {
    let machine = match head.machine {
        dump::Machine::I386 => "i386",
        dump::Machine::X86_64 => "x86-64",
        dump::Machine::Aarch64 => "aarch64",
    };
    let memory = head.segments.list().iter().map(|s| (s.range.start(), s.range.len()));
    Whole {
        len,
        machine: String::new(),
        pages: 0,
        zero_pages: 0,
        other_pages: 0,
        devices: Vec::new(),
        unaccounted: None,
        device_state: head.bytes.len() as u64,
        head: Some(Head {
            machine: machine.to_owned(),
            cpus: head.cpus.iter().map(|cpu| cpu.index).collect(),
            memory: memory.collect(),
            guest_note: head.guest_note.is_some(),
        }),
        first_page_ns: 0,
        last_ns,
    }
}

/// Takes all of a snapshot.
fn take_snapshot(mut taker: Taker, mut stream: Pulsed, state: &File) -> Result<Whole, String> {
    let read = stream::read(&mut stream, &mut taker, DEVICE_STATE);
    let discarded = read.as_ref().map(|rest| rest.virtio_mem.as_slice()).unwrap_or_default();
    // What came is kept, whatever ended it.
    let kept = taker.finish(discarded);
    let rest = read.map_err(|error| told(&error))?;
    let Kept { other_pages, first_page_ns, .. } = kept.map_err(|e| told(&e))?;
    state.write_all_at(&rest.device_state, 0).map_err(|e| told(&e))?;
    let devices = rest.devices.into_iter().take(DEVICES).map(|device| SnapshotDevice {
        name: Excerpt::new(&device.name).to_string(),
        instance: device.instance,
        version: device.version,
        len: device.len,
    });
    Ok(Whole {
        len: rest.len,
        machine: rest.machine,
        pages: rest.pages,
        zero_pages: rest.zero_pages,
        other_pages,
        devices: devices.collect(),
        unaccounted: rest.unaccounted.map(|place| place.to_string()),
        device_state: rest.device_state.len() as u64,
        head: None,
        first_page_ns,
        last_ns: stream.last_ns,
    })
}

/// The stream, whose bytes are counted.
struct Pulsed {
    stream: File,
    pulse: File,
    count: u64,
    /// When the last bytes came.
    last_ns: u64,
}

impl Read for Pulsed {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.last_ns = monotonic_ns();
        self.count += read as u64;
        stall::beat(&self.pulse, self.count)?;
        Ok(read)
    }
}

/// Neighbouring pages that have come and are not in the store yet.
struct Run {
    cell: usize,
    start: u64,
    bytes: Vec<u8>,
}

/// What a thread of its own writes: a run, and the entry that is true once it is written.
type Job = (GuestRange, Vec<u8>, u64, Entry);

/// Takes pages, and brings them into the store run by run.
struct Taker {
    /// Places by the stream's number of their block; known once that has come.
    by_block: Vec<Vec<Place>>,
    places: Vec<Place>,
    entries: Vec<Entry>,
    reserved: Vec<GuestRange>,
    spare: Option<u64>,
    run: Option<Run>,
    kept: Kept,
    out: Out,
}

/// What was taken.
#[derive(Clone, Copy, Debug, Default)]
struct Kept {
    /// Pages with bytes, of a dump.
    pages: u64,
    /// Pages of zeros, of a dump.
    zero_pages: u64,
    /// Pages at no place.
    other_pages: u64,
    /// When the first came.
    first_page_ns: u64,
}

/// The way into the store and the table.
enum Out {
    /// Memory: at once.
    Here(DiskStore, Table),
    /// A disk: by a thread.
    Queue(Sender<Job>, Arc<Room>, JoinHandle<io::Result<Table>>),
}

/// How many bytes wait for the disk.
#[derive(Default)]
struct Room {
    taken: Mutex<usize>,
    freed: Condvar,
}

impl Room {
    /// Waits until `len` more bytes may wait.
    fn take(&self, len: usize) {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |taken: &mut usize| *taken > 0 && *taken + len > QUEUE;
        let mut taken = self.freed.wait_while(taken, full).unwrap_or_else(PoisonError::into_inner);
        *taken += len;
    }

    fn free(&self, len: usize) {
        *self.taken.lock().unwrap_or_else(PoisonError::into_inner) -= len;
        self.freed.notify_one();
    }
}

impl Taker {
    fn new(begin: &Begin, store: DiskStore, table: Table, pulse: File) -> io::Result<Self> {
        let mut entries = Vec::new();
        for number in 0..table.count()? {
            let entry = table.get(number)?;
            // Until its page has come.
            let states = vec![PageState::Unreadable; entry.states.len()];
            // To capture this says that the entry is the reader's.
            entries.push(Entry { digest: Digest::ZERO, sealed: true, states, ..entry });
        }
        let out = if store.is_in_memory() {
            Out::Here(store, table)
        } else {
            let (sender, jobs) = channel();
            let room = Arc::new(Room::default());
            let freed = Arc::clone(&room);
            let work = move || write_all(&jobs, &store, table, &freed, &pulse);
            let thread = thread::Builder::new().name("write".to_owned()).spawn(work)?;
            Out::Queue(sender, room, thread)
        };
        let ranges = begin.reserved.iter().filter_map(|&(start, len)| GuestRange::new(start, len));
        Ok(Self {
            by_block: Vec::new(),
            places: begin.places.clone(),
            entries,
            reserved: ranges.collect(),
            spare: begin.spare,
            run: None,
            kept: Kept::default(),
            out,
        })
    }

    /// Takes the page at `gpa`, `bytes` of data or zeros.
    fn page_at(&mut self, gpa: u64, bytes: Option<&[u8]>) -> io::Result<()> {
        let unknown = || invalid(format!("a page at {gpa:#x} is of no block of the image"));
        let cell = self.entries.partition_point(|entry| entry.block.end() <= gpa);
        let entry = self.entries.get_mut(cell).filter(|entry| entry.block.start() <= gpa);
        let entry = entry.ok_or_else(unknown)?;
        let page = evidence::block::index((gpa - entry.block.start()) / PAGE);
        let state = entry.states.get_mut(page).ok_or_else(unknown)?;
        if *state != PageState::Unreadable {
            return Err(invalid(format!("the page at {gpa:#x} came twice")));
        }
        let Some(bytes) = bytes else {
            *state = PageState::Zero;
            return Ok(());
        };
        // A block may end inside its last page.
        let len = usize::try_from(entry.block.end() - gpa).unwrap_or(usize::MAX).min(bytes.len());
        let bytes = bytes.get(..len).unwrap_or_default();
        let follows = self
            .run
            .as_ref()
            .is_some_and(|run| run.cell == cell && run.start + run.bytes.len() as u64 == gpa);
        if !follows {
            self.flush()?;
        }
        self.count(cell, gpa)?;
        if let Some(state) = self.entries.get_mut(cell).and_then(|e| e.states.get_mut(page)) {
            *state = PageState::Data;
        }
        let new = || Run { cell, start: gpa, bytes: Vec::new() };
        self.run.get_or_insert_with(new).bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// A page that no room was made for needs what is to spare: with the first of its block.
    fn count(&mut self, cell: usize, gpa: u64) -> io::Result<()> {
        let Some(spare) = self.spare else { return Ok(()) };
        let held = self.entries.get(cell).is_some_and(|e| e.states.contains(&PageState::Data));
        if held {
            return Ok(());
        }
        let at = self.reserved.partition_point(|range| range.end() <= gpa);
        if self.reserved.get(at).is_some_and(|range| range.start() <= gpa) {
            return Ok(());
        }
        let text = "the RAM store's limit is used up";
        let left = spare.checked_sub(CELL);
        self.spare = Some(left.ok_or_else(|| io::Error::new(io::ErrorKind::OutOfMemory, text))?);
        Ok(())
    }

    /// Brings the run into the store, and then its block's entry into the table.
    fn flush(&mut self) -> io::Result<()> {
        let Some(Run { cell, start, bytes }) = self.run.take() else { return Ok(()) };
        let at = GuestRange::new(start, bytes.len() as u64);
        let (Some(at), Some(entry)) = (at, self.entries.get_mut(cell)) else { return Ok(()) };
        let put = match &self.out {
            Out::Here(store, table) => {
                store.put(at, &bytes).and_then(|()| table.put(cell as u64, entry))
            }
            Out::Queue(sender, room, _) => {
                room.take(bytes.len());
                // Whoever does not take it has failed, and says so in the end.
                let gone = |_| io::Error::other("the store could not be written");
                sender.send((at, bytes, cell as u64, entry.clone())).map_err(gone)
            }
        };
        if put.is_err() {
            let lost =
                pages(entry.block).zip(&mut entry.states).filter(|(page, _)| at.covers(*page));
            lost.for_each(|(_, state)| *state = PageState::Unreadable);
        }
        put
    }

    /// All has come. The table is whole then.
    fn finish(mut self, discarded: &[VirtioMem]) -> io::Result<Kept> {
        let flushed = self.flush();
        let table = match self.out {
            Out::Here(_, table) => table,
            Out::Queue(sender, _, thread) => {
                drop(sender);
                let gone = |_| Err(io::Error::other("the thread that writes the store panicked"));
                thread.join().unwrap_or_else(gone)?
            }
        };
        flushed?;
        for entry in &mut self.entries {
            discard(entry, discarded);
        }
        for (number, entry) in (0u64..).zip(&self.entries) {
            table.put(number, entry)?;
        }
        Ok(self.kept)
    }

    /// Takes a dump's memory from `gpa` on, whole pages of it: the image has some of it.
    fn memory(&mut self, gpa: u64, bytes: &[u8]) -> io::Result<()> {
        if self.kept.first_page_ns == 0 {
            self.kept.first_page_ns = monotonic_ns();
        }
        let (mut gpa, mut left) = (gpa, bytes);
        while !left.is_empty() {
            let to_border = usize::try_from(PAGE - gpa % PAGE).unwrap_or(left.len());
            let (page, rest) = left.split_at(to_border.min(left.len()));
            let bytes = (!is_zero(page)).then_some(page);
            if self.has(gpa) {
                match bytes {
                    Some(_) => self.kept.pages += 1,
                    None => self.kept.zero_pages += 1,
                }
                self.page_at(gpa, bytes)?;
            } else {
                self.kept.other_pages += 1;
            }
            gpa += page.len() as u64;
            left = rest;
        }
        Ok(())
    }

    /// Whether the image has the page at `gpa`.
    fn has(&self, gpa: u64) -> bool {
        let cell = self.entries.partition_point(|entry| entry.block.end() <= gpa);
        self.entries.get(cell).is_some_and(|entry| entry.block.start() <= gpa)
    }

    /// Gives the page at `offset` of the stream's block to every place that it has.
    fn each_place(&mut self, block: usize, offset: u64, bytes: Option<&[u8]>) -> io::Result<()> {
        if self.kept.first_page_ns == 0 {
            self.kept.first_page_ns = monotonic_ns();
        }
        let places = self.by_block.get(block).map(Vec::as_slice).unwrap_or_default();
        let inside = |place: &&Place| offset >= place.offset && offset - place.offset < place.len;
        let gpas: Vec<u64> =
            places.iter().filter(inside).map(|p| p.gpa + (offset - p.offset)).collect();
        if gpas.is_empty() {
            self.kept.other_pages += 1;
        }
        gpas.into_iter().try_for_each(|gpa| self.page_at(gpa, bytes))
    }
}

/// Writes runs until there are no more; gives the table back. After a failure it writes nothing, for
/// nobody else may wait for room.
fn write_all(
    jobs: &Receiver<Job>,
    store: &DiskStore,
    table: Table,
    room: &Room,
    pulse: &File,
) -> io::Result<Table> {
    let (mut result, mut written) = (Ok(()), 0);
    for (at, bytes, number, entry) in jobs {
        if result.is_ok() {
            written += at.len();
            result = store
                .put(at, &bytes)
                .and_then(|()| table.put(number, &entry))
                .and_then(|()| stall::beat_written(pulse, written));
        }
        room.free(bytes.len());
    }
    result.map(|()| table)
}

/// Pages that did not come because QEMU's bitmap has them unplugged.
fn discard(entry: &mut Entry, virtio_mem: &[VirtioMem]) {
    for device in virtio_mem {
        let end = device.gpa.saturating_add(device.len);
        if entry.block.start() >= end || entry.block.end() <= device.gpa {
            continue;
        }
        for (page, state) in pages(entry.block).zip(&mut entry.states) {
            let inside = (device.gpa..end).contains(&page.start());
            if inside && *state == PageState::Unreadable && !plugged(device, page.start()) {
                *state = PageState::Discarded;
            }
        }
    }
}

fn plugged(device: &VirtioMem, gpa: u64) -> bool {
    let unit = (gpa - device.gpa) / device.unit.max(1);
    let word = usize::try_from(unit / 64).ok().and_then(|word| device.plugged.get(word));
    // What the bitmap does not have is a loss, not a hole.
    word.is_none_or(|word| word >> (unit % 64) & 1 == 1)
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Sink for Taker {
    fn blocks(&mut self, blocks: &[stream::Block]) -> io::Result<()> {
        let of = |block: &stream::Block| -> Vec<Place> {
            self.places.iter().filter(|place| place.block == block.name).cloned().collect()
        };
        self.by_block = blocks.iter().map(of).collect();
        Ok(())
    }

    fn page(&mut self, block: usize, offset: u64, bytes: &[u8; stream::PAGE]) -> io::Result<()> {
        self.each_place(block, offset, Some(bytes))
    }

    fn zero_page(&mut self, block: usize, offset: u64) -> io::Result<()> {
        self.each_place(block, offset, None)
    }
}

/// The reader, as capture has it.
pub struct Reader {
    peer: Peer,
    /// The rights that it kept.
    pub rights: manifest::Process,
}

impl Reader {
    /// Starts it. `files` are the stream, the store, the table, and the files for the devices' state
    /// and the pulse.
    ///
    /// # Errors
    /// It could not be started, in words.
    pub fn start(begin: Begin, files: [BorrowedFd<'_>; FILES]) -> Result<Self, String> {
        let mut peer = Peer::start(Role::Reader).map_err(|e| told(&e))?;
        peer.say(&Ask::Begin(begin), PROMPT).map_err(|e| e.to_string())?;
        peer.channel().send_fds(&files).map_err(|e| told(&e))?;
        match peer.hear(PROMPT).map_err(|e| e.to_string())? {
            Said::Begun(rights) => Ok(Self { peer, rights }),
            Said::Ended(_) => Err("it ended before it began".to_owned()),
        }
    }

    /// Waits for the stream's end, `within` at most; `None`: it goes on.
    ///
    /// # Errors
    /// The reader was lost, or the stream is not what it should be, in words.
    pub fn wait(&mut self, within: Duration) -> Result<Option<Whole>, String> {
        match channel::wait(&[self.peer.channel().as_fd()], Some(within)) {
            Ok(ready) if ready == [false] => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(told(&error)),
        }
        let said: Result<Said, ChannelError> = self.peer.hear(PROMPT);
        match said.map_err(|error| format!("the process that reads was lost: {error}"))? {
            Said::Ended(ended) => ended.map(|read| Some(*read)),
            Said::Begun(_) => Err("it began twice".to_owned()),
        }
    }

    /// Ends it at once: nothing of it writes into the store when this returns.
    pub fn kill(&mut self) {
        self.peer.kill();
    }
}

/// A file of `len` zeros in memory, whose length nobody can change.
///
/// # Errors
/// No memory, no descriptors.
pub fn scratch_file(name: &str, len: u64) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create(name, flags)?;
    rustix::fs::ftruncate(&file, len)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use evidence::{Segment, Segments};
    use std::path::Path;

    const BLOCK: u64 = 1 << 20;
    const P: u64 = PAGE;

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(start, len).unwrap()
    }

    /// Two blocks of the image, the second at an odd distance in the store.
    fn layout() -> Segments {
        let segments = [(0, BLOCK, 0), (8 * BLOCK, 4 * P, BLOCK + 4 * P)];
        let segments =
            segments.map(|(start, len, offset)| Segment { range: range(start, len), offset });
        Segments::new(segments.to_vec()).unwrap()
    }

    /// "ram" lies at 0, its last pages once more at 8 MiB.
    fn begin(spare: Option<u64>) -> Begin {
        let place = |offset, gpa, len| Place { block: "ram".into(), offset, gpa, len };
        Begin {
            kind: Kind::Snapshot,
            store: Vec::new(),
            places: vec![place(0, 0, BLOCK), place(BLOCK - 4 * P, 8 * BLOCK, 4 * P)],
            reserved: vec![(0, 2 * P)],
            spare,
        }
    }

    fn taker(begin: &Begin, file: File) -> (Taker, File, File) {
        let (taker, file, table, _) = pulsed(begin, file);
        (taker, file, table)
    }

    /// The same, and its pulse.
    fn pulsed(begin: &Begin, file: File) -> (Taker, File, File, File) {
        let table = tempfile::tempfile().unwrap();
        let pulse = File::from(scratch_file("pulse", stall::PULSE as u64).unwrap());
        let entry = |block, pages| Entry {
            block,
            states: vec![PageState::Hole; pages],
            digest: Digest::ZERO,
            sealed: false,
        };
        let fresh = Table::new(table.try_clone().unwrap());
        fresh.put(0, &entry(range(0, BLOCK), 256)).unwrap();
        fresh.put(1, &entry(range(8 * BLOCK, 4 * P), 4)).unwrap();
        let store = DiskStore::new(file.try_clone().unwrap(), layout()).unwrap();
        let beats = pulse.try_clone().unwrap();
        let mut taker = Taker::new(begin, store, fresh, beats).unwrap();
        let block = |name: &str, used| stream::Block { name: name.into(), used };
        taker.blocks(&[block("vga", BLOCK), block("ram", BLOCK)]).unwrap();
        (taker, file, table, pulse)
    }

    fn in_memory() -> File {
        File::from(scratch_file("test", 2 * BLOCK).unwrap())
    }

    fn on_disk() -> File {
        // The build's own directory, for /tmp may be memory.
        tempfile::tempfile_in(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap()
    }

    fn page(byte: u8) -> [u8; stream::PAGE] {
        [byte; stream::PAGE]
    }

    #[test]
    fn pages_go_to_every_place_that_they_have() {
        for file in [in_memory(), on_disk()] {
            let (mut taker, file, table) = taker(&begin(None), file);
            for (number, byte) in [(0, 1), (1, 2), (5, 3), (254, 4)] {
                taker.page(1, number * P, &page(byte)).unwrap();
            }
            taker.zero_page(1, 2 * P).unwrap();
            taker.page(0, 0, &page(9)).unwrap();
            assert_eq!(
                taker.finish(&[]).unwrap().other_pages,
                1,
                "of video memory nothing is in the image"
            );
            let table = Table::new(table);
            let (low, high) = (table.get(0).unwrap(), table.get(1).unwrap());
            assert!(low.sealed && high.sealed);
            assert_eq!(low.states[..3], [PageState::Data, PageState::Data, PageState::Zero]);
            assert_eq!((low.states[3], low.states[5]), (PageState::Unreadable, PageState::Data));
            assert_eq!((low.states[254], high.states[2]), (PageState::Data, PageState::Data));
            let byte_at = |offset| {
                let mut byte = [0];
                file.read_exact_at(&mut byte, offset).unwrap();
                byte[0]
            };
            assert_eq!([byte_at(P - 1), byte_at(P), byte_at(5 * P)], [1, 2, 3]);
            assert_eq!([byte_at(254 * P), byte_at(BLOCK + 6 * P)], [4, 4]);
        }
    }

    #[test]
    fn what_was_written_to_a_disk_is_counted() {
        let (mut taker, _, _, pulse) = pulsed(&begin(None), on_disk());
        for number in [0, 1, 5] {
            taker.page(1, number * P, &page(1)).unwrap();
        }
        taker.finish(&[]).unwrap();
        let ours = std::os::unix::net::UnixStream::pair().unwrap().0;
        let watch = stall::Watch::new(ours.into(), pulse.into(), 0);
        assert_eq!(watch.written().unwrap(), 3 * P);
    }

    #[test]
    fn what_no_stream_of_qemu_has_is_refused() {
        let (mut taker, _, _) = taker(&begin(None), in_memory());
        taker.zero_page(1, 0).unwrap();
        let twice = taker.page(1, 0, &page(1)).unwrap_err();
        assert!(twice.to_string().contains("twice"), "{twice}");
        // What was kept until then stays.
        taker.finish(&[]).unwrap();
    }

    #[test]
    fn no_more_memory_is_taken_than_allowed() {
        // For the high block no room was made: its first page takes a MiB.
        let last = BLOCK - 4 * P;
        for (spare, fits) in [(CELL, true), (CELL - 1, false)] {
            let (mut taker, _, table) = taker(&begin(Some(spare)), in_memory());
            taker.page(1, 0, &page(1)).unwrap();
            let taken = taker.page(1, last, &page(1));
            assert_eq!(taken.is_ok(), fits);
            let refused = taken.is_err_and(|e| e.kind() == io::ErrorKind::OutOfMemory);
            assert_eq!(refused, !fits);
            if fits {
                taker.page(1, last + P, &page(1)).unwrap();
            }
            taker.zero_page(1, 4 * P).unwrap();
            taker.finish(&[]).unwrap();
            let states = Table::new(table).get(1).unwrap().states;
            assert_eq!(states[0] == PageState::Data, fits, "{states:?}");
        }
    }

    #[test]
    fn what_could_not_be_stored_is_lost() {
        let short = File::from(scratch_file("short", 8 * P).unwrap());
        let (mut taker, _, table) = taker(&begin(None), short);
        taker.page(1, 2 * P, &page(1)).unwrap();
        taker.page(1, 100 * P, &page(1)).unwrap();
        // The page before it goes into the store, which has room for that; then this one does not.
        assert!(taker.page(1, 4 * P, &page(1)).is_err());
        assert!(taker.finish(&[]).is_ok());
        let states = Table::new(table).get(0).unwrap().states;
        assert_eq!([states[2], states[100]], [PageState::Data, PageState::Unreadable]);
    }

    #[test]
    fn unplugged_memory_is_none_and_memory_that_did_not_come_is_lost() {
        let device = VirtioMem {
            name: "virtio-mem".into(),
            gpa: 8 * BLOCK,
            len: 3 * P,
            unit: P,
            plugged_len: P,
            plugged: vec![0b010],
        };
        let (mut taker, _, table) = taker(&begin(None), in_memory());
        taker.page(1, BLOCK - 4 * P, &page(1)).unwrap();
        taker.finish(&[device]).unwrap();
        let states = Table::new(table).get(1).unwrap().states;
        // What came is there, whatever the bitmap says; the last page is of no device.
        let (lost, none) = (PageState::Unreadable, PageState::Discarded);
        assert_eq!(states, [PageState::Data, lost, none, lost]);
    }
}
