//! The journal while it is written: kept in memory until the exhibit has a place, then a file.

use evidence::digest::Digest;
use evidence::journal::{AppendError, Journal};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

/// A writer that keeps bytes until it is given a file.
enum Sink {
    Memory(Vec<u8>),
    File(File),
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Memory(kept) => kept.write(bytes),
            Sink::File(file) => file.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Sink::Memory(_) => Ok(()),
            Sink::File(file) => file.flush(),
        }
    }
}

struct Inner {
    journal: Journal<Sink>,
    /// The first line that could not be written: told when the record is made.
    failure: Option<AppendError>,
}

/// Every action with its time. Nothing is added while the guest is held: a line may have to wait
/// for a disk. Cheap to clone: the QMP client writes its own lines.
#[derive(Clone)]
pub struct Log {
    /// The beginning by CLOCK_MONOTONIC, which other processes have too.
    origin_ns: u64,
    inner: Arc<Mutex<Inner>>,
}

/// Where the journal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Digest of the last line.
    pub digest: Digest,
    /// Number of lines.
    pub lines: u64,
}

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Log").finish_non_exhaustive()
    }
}

impl Log {
    /// Begins now, in memory.
    pub fn begin() -> Self {
        let journal = Journal::new(Sink::Memory(Vec::new()));
        let origin_ns = host::clock::monotonic_ns();
        Self { origin_ns, inner: Arc::new(Mutex::new(Inner { journal, failure: None })) }
    }

    /// Nanoseconds since the beginning.
    pub fn now_ns(&self) -> u64 {
        self.since_ns(host::clock::monotonic_ns())
    }

    /// Nanoseconds since the beginning at a time of CLOCK_MONOTONIC.
    pub fn since_ns(&self, monotonic_ns: u64) -> u64 {
        monotonic_ns.saturating_sub(self.origin_ns)
    }

    /// Writes what was kept to `file` and goes on there.
    ///
    /// # Errors
    /// The file's.
    pub fn move_to(&self, mut file: File) -> io::Result<()> {
        let mut inner = self.lock();
        let sink = inner.journal.get_mut();
        if let Sink::Memory(kept) = sink {
            file.write_all(kept)?;
        }
        *sink = Sink::File(file);
        Ok(())
    }

    /// Adds a line. A line that cannot be written is remembered: [`Log::close`] fails then.
    pub fn add(&self, what: &str, data: impl Serialize) {
        self.append(self.now_ns(), &host::clock::utc(), what, data);
    }

    /// Adds lines of another process, with its times.
    pub fn add_notes(&self, notes: Vec<Note>) {
        for note in notes {
            self.append(self.since_ns(note.monotonic_ns), &note.utc, &note.what, note.data);
        }
    }

    fn append(&self, mono_ns: u64, utc: &str, what: &str, data: impl Serialize) {
        let data = match serde_json::to_value(data) {
            Ok(Value::Object(object)) => object,
            Ok(other) => Map::from_iter([("value".to_owned(), other)]),
            Err(error) => Map::from_iter([("error".to_owned(), Value::from(error.to_string()))]),
        };
        let mut inner = self.lock();
        if let Err(error) = inner.journal.append(mono_ns, utc, what, data) {
            inner.failure.get_or_insert(error);
        }
    }

    /// The last line's digest and the number of lines.
    ///
    /// # Errors
    /// The first line that could not be written.
    pub fn close(&self) -> Result<Head, AppendError> {
        let mut inner = self.lock();
        match inner.failure.take() {
            Some(error) => Err(error),
            None => Ok(Head { digest: inner.journal.head(), lines: inner.journal.lines() }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A line for the journal, by whoever did what it says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Note {
    /// CLOCK_MONOTONIC in nanoseconds.
    pub monotonic_ns: u64,
    /// UTC then.
    pub utc: String,
    /// The journal's word.
    pub what: String,
    /// The particulars.
    pub data: Value,
}

/// Lines that were not yet written into the journal.
#[derive(Clone, Debug, Default)]
pub struct Notes(Arc<Mutex<Vec<Note>>>);

impl Notes {
    /// Adds a line now.
    pub fn add(&self, what: &str, data: Value) {
        let (monotonic_ns, utc) = (host::clock::monotonic_ns(), host::clock::utc());
        let note = Note { monotonic_ns, utc, what: what.to_owned(), data };
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(note);
    }

    /// Takes the lines.
    pub fn take(&self) -> Vec<Note> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
