//! The process that seals: it hashes and encodes what the guest wrote, and can do nothing else.
//!
//! This file is both ends: [`run`] is the process, [`Sealer`] is how capture drives it. It is
//! started after the last read, is given the store to read and the image to write as open files,
//! and gives its rights up before it starts threads: no other file can be opened, no socket made,
//! no process traced or started. What it finds is in a [`Table`] that capture checks; when it dies
//! or hangs, another one goes on where it ended, once.

use crate::copy::{Cell, Cut, Scratch, Setting};
use crate::event::{Event, Observer, Phase};
use crate::handed::{NOBODY, Where, segments, wheres};
use crate::role::{self, Peer, Role};
use crate::seal::table::Table;
use crate::seal::{self, Image, SealError, Slot};
use crate::stop::Stop;
use crate::told;
use evidence::GuestRange;
use evidence::digest::Digest;
use evidence::manifest;
use evidence::state::Run;
use host::channel::{self, Channel, ChannelError};
use host::{DiskStore, RamStore, SharedStore};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::AsFd;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long one message may take: the other end reads at once.
const PROMPT: Duration = Duration::from_secs(10);

/// How often the process says that it lives, whatever the disk does.
const ALIVE: Duration = Duration::from_secs(1);

/// How long it may be silent.
const SILENT: Duration = Duration::from_secs(30);

/// How often capture looks whether the operator wants an end.
const LOOK: Duration = Duration::from_millis(50);

/// What capture says.
#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    /// The first message; behind it come the table, the image, and the store when it is memory.
    Begin { workers: usize, in_place: bool, store: Vec<Where>, image: Vec<Where> },
    /// Seal every block that is not sealed.
    Blocks,
    /// Hash the image's first so many bytes.
    Digest { len: u64 },
    /// The operator wants an end.
    Stop,
}

/// What the process says.
#[derive(Debug, Serialize, Deserialize)]
enum Said {
    /// Begun, with these rights.
    Begun(manifest::Process),
    /// It lives.
    Alive,
    /// How far it is.
    Progress { phase: Phase, done_bytes: u64, total_bytes: u64 },
    /// Blocks ended.
    Blocks(End),
    /// The digest, if it was not cut short.
    Digest(Option<Digest>, End),
}

/// How a piece of work ended.
#[derive(Debug, Serialize, Deserialize)]
enum End {
    /// All of it was done.
    Done,
    /// The operator wanted an end.
    Stopped,
    /// It could not go on.
    Failed(String),
}

impl End {
    fn of(result: &Result<(), Cut<SealError>>) -> Self {
        match result {
            Ok(()) => End::Done,
            Err(Cut::Stopped | Cut::Late) => End::Stopped,
            Err(Cut::Failed(error)) => End::Failed(told(error)),
        }
    }
}

/// The process.
pub fn run(channel: Channel) -> ExitCode {
    match serve(channel) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stillframe: seal: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Everything that the process works with.
struct Work {
    table: Table,
    image: DiskStore,
    /// The store, when it is not the image.
    store: Option<SharedStore>,
    out: Out,
    stop: Stop,
    workers: usize,
}

/// The way to capture, for all threads.
#[derive(Clone)]
struct Out(Arc<Mutex<Channel>>);

impl Out {
    fn say(&self, said: &Said) {
        let mut channel = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // When capture is gone nobody wants this work.
        if role::say(&mut channel, said, PROMPT).is_err() {
            std::process::exit(1);
        }
    }
}

impl Observer for Out {
    fn event(&self, event: Event) {
        if let Event::Progress { phase, done_bytes, total_bytes, .. } = event {
            self.say(&Said::Progress { phase, done_bytes, total_bytes });
        }
    }
}

fn serve(mut channel: Channel) -> Result<(), String> {
    let begin: Ask = role::hear(&mut channel, PROMPT).map_err(|e| e.to_string())?;
    let Ask::Begin { workers, in_place, store, image } = begin else {
        return Err("not asked to begin".to_owned());
    };
    let count = if in_place { 2 } else { 3 };
    let mut fds = channel.receive_fds(count, PROMPT).map_err(|e| e.to_string())?.into_iter();
    let mut next = || fds.next().ok_or_else(|| "a file is missing".to_owned());
    let table = Table::new(File::from(next()?));
    // Opened for direct I/O while files can be opened.
    let image = DiskStore::new(File::from(next()?), segments(&image)?).map_err(|e| told(&e))?;
    let store = match in_place {
        true => None,
        false => Some(SharedStore::new(next()?, segments(&store)?)),
    };
    let in_force = host::sandbox::seal(Some(NOBODY)).map_err(|e| told(&e))?;
    // From here on there is nothing that this process could do to anybody.
    let rights = role::rights(Role::Seal.word(), std::process::id(), &in_force);
    let reader = channel.try_clone().map_err(|e| told(&e))?;
    let out = Out(Arc::new(Mutex::new(channel)));
    let stop = Stop::new();
    let work = Work { table, image, store, out: out.clone(), stop: stop.clone(), workers };
    let asked = listen(reader, stop).map_err(|e| told(&e))?;
    let alive = out.clone();
    thread::Builder::new()
        .name("alive".to_owned())
        .spawn(move || {
            loop {
                alive.say(&Said::Alive);
                thread::sleep(ALIVE);
            }
        })
        .map_err(|e| told(&e))?;
    out.say(&Said::Begun(rights));
    for ask in asked {
        match ask {
            Ask::Blocks => out.say(&Said::Blocks(End::of(&work.blocks()))),
            Ask::Digest { len } => {
                let result = seal::file_digest(&work.image, len, &work.out, &work.stop);
                let digest = result.as_ref().ok().copied();
                out.say(&Said::Digest(digest, End::of(&result.map(drop))));
            }
            Ask::Begin { .. } | Ask::Stop => return Err("asked out of turn".to_owned()),
        }
    }
    Ok(())
}

/// Hears what capture says on a thread of its own: a wish to stop comes in the middle of work.
fn listen(mut reader: Channel, stop: Stop) -> std::io::Result<std::sync::mpsc::IntoIter<Ask>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::Builder::new().name("listen".to_owned()).spawn(move || {
        loop {
            match channel::wait(&[reader.as_fd()], None) {
                Ok(_) => {}
                Err(_) => std::process::exit(1),
            }
            match role::hear(&mut reader, PROMPT) {
                Ok(Ask::Stop) => stop.ask(),
                Ok(ask) => {
                    let _ = sender.send(ask);
                }
                Err(_) => std::process::exit(0),
            }
        }
    })?;
    Ok(receiver.into_iter())
}

impl Work {
    fn blocks(&self) -> Result<(), Cut<SealError>> {
        let mut slots = self.open_slots().map_err(|e| Cut::Failed(SealError::Table(e)))?;
        let setting = Setting {
            max_rate: None,
            stop: &self.stop,
            until: None,
            observer: &self.out,
            phase: Phase::Seal,
            pass: None,
        };
        let in_image = |at: GuestRange, buf: &mut [u8]| host::Store::get(&self.image, at, buf);
        let mut scratches = Scratch::for_workers(self.workers);
        match &self.store {
            Some(store) => {
                let get = |at: GuestRange, buf: &mut [u8]| store.get(at, buf);
                let image = Image::Apart(&self.image);
                seal::blocks(&mut slots, &self.table, &get, &image, &setting, &mut scratches)
            }
            None => {
                let image = Image::InPlace(&self.image);
                seal::blocks(&mut slots, &self.table, &in_image, &image, &setting, &mut scratches)
            }
        }
    }

    /// The blocks that are not sealed yet.
    fn open_slots(&self) -> std::io::Result<Vec<Slot>> {
        let mut slots = Vec::new();
        for number in 0..self.table.count()? {
            let entry = self.table.get(number)?;
            if !entry.sealed {
                slots.push(Slot { number, block: entry.block });
            }
        }
        Ok(slots)
    }
}

/// The process that seals, as capture has it.
pub struct Sealer<'a> {
    peer: Option<Peer>,
    table: Table,
    kept: Vec<Box<[Run]>>,
    image: &'a DiskStore,
    store: Option<&'a RamStore>,
    tell: &'a dyn Observer,
    workers: usize,
    /// The rights of every process that sealed.
    pub rights: Vec<manifest::Process>,
    /// How each that was lost was lost.
    pub lost: Vec<String>,
}

/// Processes that seal, one after the other: whatever ended the first may end the second too.
const TRIES: usize = 2;

impl<'a> Sealer<'a> {
    /// Prepares the sealing of `cells`; their states are away until [`Sealer::collect`].
    /// Without a `store` the image is it.
    ///
    /// # Errors
    /// [`SealError::Table`].
    pub fn new(
        cells: &mut [Cell],
        image: &'a DiskStore,
        store: Option<&'a RamStore>,
        workers: usize,
        tell: &'a dyn Observer,
    ) -> Result<Self, SealError> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = rustix::fs::memfd_create("stillframe-table", flags);
        let table = Table::new(File::from(file.map_err(|e| SealError::Table(e.into()))?));
        let kept = table.fill(cells).map_err(SealError::Table)?;
        let (peer, rights, lost) = (None, Vec::new(), Vec::new());
        Ok(Self { peer, table, kept, image, store, tell, workers, rights, lost })
    }

    /// Seals every block.
    ///
    /// # Errors
    /// [`Cut`]; what was sealed by then is sealed.
    pub fn blocks(&mut self, stop: &Stop) -> Result<(), Cut<SealError>> {
        match self.work(&Ask::Blocks, stop)? {
            Said::Blocks(end) => ended(end),
            other => Err(Cut::Failed(out_of_turn(&other))),
        }
    }

    /// Hashes the image.
    ///
    /// # Errors
    /// [`Cut`].
    pub fn digest(&mut self, len: u64, stop: &Stop) -> Result<Digest, Cut<SealError>> {
        match self.work(&Ask::Digest { len }, stop)? {
            Said::Digest(Some(digest), End::Done) => Ok(digest),
            Said::Digest(_, end) => {
                ended(end)?;
                Err(Cut::Failed(SealError::Process("gave no digest".to_owned())))
            }
            other => Err(Cut::Failed(out_of_turn(&other))),
        }
    }

    /// Gives `cells` their states back, and the digests; and back how many blocks seal told of as it
    /// may not: they are not sealed.
    pub fn collect(&self, cells: &mut [Cell]) -> u64 {
        self.table.collect(cells, &self.kept)
    }

    /// Asks until a process has answered, or too many were lost.
    fn work(&mut self, ask: &Ask, stop: &Stop) -> Result<Said, Cut<SealError>> {
        loop {
            let lost = match self.try_work(ask, stop) {
                Ok(said) => return Ok(said),
                Err(lost) => lost,
            };
            if let Some(mut peer) = self.peer.take() {
                peer.kill();
            }
            self.lost.push(lost.clone());
            if self.lost.len() >= TRIES {
                return Err(Cut::Failed(SealError::Process(format!("was lost: {lost}"))));
            }
            let text = format!("the process that seals was lost ({lost}); another one goes on");
            self.tell.event(Event::Warning { text });
        }
    }

    fn try_work(&mut self, ask: &Ask, stop: &Stop) -> Result<Said, String> {
        if self.peer.is_none() {
            self.peer = Some(self.start()?);
        }
        let Some(peer) = &mut self.peer else { return Err("it was not started".to_owned()) };
        peer.say(ask, PROMPT).map_err(|e| e.to_string())?;
        let (mut heard, mut stopped) = (Instant::now(), false);
        loop {
            if stop.asked() && !stopped {
                stopped = true;
                peer.say(&Ask::Stop, PROMPT).map_err(|e| e.to_string())?;
            }
            let ready = channel::wait(&[peer.channel().as_fd()], Some(LOOK));
            if !matches!(ready.as_deref(), Ok([true])) {
                if heard.elapsed() > SILENT {
                    return Err(ChannelError::Timeout { waited: SILENT }.to_string());
                }
                continue;
            }
            heard = Instant::now();
            match peer.hear(PROMPT).map_err(|e| e.to_string())? {
                Said::Alive => {}
                Said::Progress { phase, done_bytes, total_bytes } => {
                    self.tell.event(Event::Progress { phase, pass: None, done_bytes, total_bytes });
                }
                said => return Ok(said),
            }
        }
    }

    fn start(&mut self) -> Result<Peer, String> {
        let mut peer = Peer::start(Role::Seal).map_err(|e| told(&e))?;
        let store = self.store.map(|store| store.share().map(|fd| (fd, store.segments())));
        let store = store.transpose().map_err(|e| told(&e))?;
        let begin = Ask::Begin {
            workers: self.workers,
            in_place: store.is_none(),
            store: store.as_ref().map_or_else(Vec::new, |(_, segments)| wheres(segments)),
            image: wheres(self.image.segments()),
        };
        peer.say(&begin, PROMPT).map_err(|e| e.to_string())?;
        let mut fds = vec![self.table.file().as_fd(), self.image.file().as_fd()];
        fds.extend(store.as_ref().map(|(fd, _)| fd.as_fd()));
        peer.channel().send_fds(&fds).map_err(|e| told(&e))?;
        loop {
            match peer.hear(PROMPT).map_err(|e| e.to_string())? {
                Said::Begun(rights) => {
                    self.rights.push(rights);
                    return Ok(peer);
                }
                Said::Alive => {}
                other => return Err(out_of_turn(&other).to_string()),
            }
        }
    }
}

fn ended(end: End) -> Result<(), Cut<SealError>> {
    match end {
        End::Done => Ok(()),
        End::Stopped => Err(Cut::Stopped),
        End::Failed(text) => Err(Cut::Failed(SealError::Process(format!("failed: {text}")))),
    }
}

fn out_of_turn(said: &Said) -> SealError {
    SealError::Process(format!("said {said:?} out of turn"))
}
