//! What has to be undone when everything else died: a small file for each VM that is being worked
//! on, and the lock that makes one acquirer per VM.
//!
//! `/run/stillframe/PID-STARTTIME.json`; without root `stillframe` in `/run/user/UID`, else in
//! `/tmp`. JSON lines are only ever appended, one `write` each, *before* what they announce is
//! done: the last whole line says what may have to be undone. A torn line is one whose
//! announcement was never acted on. The lock is the file's (`flock`), shared by capture and
//! guardian through one open file: it lasts until both are gone.

use crate::find::LibvirtDomain;
use qemu::qmp::Capability;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Greatest length of the file in bytes: a run writes some lines for each hold.
const MAX_LEN: u64 = 16 << 20;

/// A process by number and start time (field 22 of `/proc/PID/stat`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Who {
    /// Its process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
}

impl Who {
    /// The process that we are.
    pub fn me() -> Option<Self> {
        host::Process::open(std::process::id()).ok().as_ref().map(Self::of)
    }

    /// A process that is held.
    pub fn of(process: &host::Process) -> Self {
        Self { pid: process.pid(), start_time: process.start_time() }
    }

    /// A handle of it, while it lives.
    pub fn open(self) -> Option<host::Process> {
        let process = host::Process::open(self.pid).ok()?;
        (process.start_time() == self.start_time).then_some(process)
    }
}

/// One line of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "at", rename_all = "kebab-case")]
pub enum Line {
    /// A run began.
    Begin {
        /// The VM.
        target: Who,
        /// Its name.
        name: String,
        /// Its monitors, in the order in which they are tried.
        sockets: Vec<PathBuf>,
        /// libvirt has its monitor.
        #[serde(default)]
        through: Option<LibvirtDomain>,
        /// The process that reads.
        capture: Who,
        /// The process that undoes.
        guardian: Who,
    },
    /// QEMU's threads are about to be stopped by ptrace; the kernel lets them go when the holder ends.
    Ptrace {
        /// CLOCK_MONOTONIC in nanoseconds at which they must have been let go.
        until_ns: u64,
        /// The process that holds them.
        #[serde(default)]
        holder: Option<Who>,
    },
    /// `stop` is about to be sent to a VM that runs.
    Stop {
        /// CLOCK_MONOTONIC in nanoseconds at which `cont` must have been sent.
        until_ns: u64,
    },
    /// QEMU is about to be told to take a snapshot of a VM that runs.
    Snapshot {
        /// The settings of its migration as they were found, and will be again.
        found: Vec<Capability>,
        /// QEMU is about to be told to begin: what it does from now on is ours to cancel.
        begun: bool,
        /// Whoever stops the guest from now on is not QEMU for the snapshot's sake: that has been, or
        /// somebody else came first.
        let_be: bool,
        /// CLOCK_MONOTONIC in nanoseconds from which on somebody must have an eye on it.
        until_ns: u64,
    },
    /// QEMU is about to be given a file of ours to copy memory into.
    Slices {
        /// The directory that holds it, where QEMU opens it by its path.
        #[serde(default)]
        dir: Option<PathBuf>,
    },
    /// QEMU is about to be told to dump into a socket of ours.
    Dump {
        /// CLOCK_MONOTONIC in nanoseconds at which the socket must have been closed.
        until_ns: u64,
    },
    /// Nothing is held any more.
    Free,
}

/// What the file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// The last beginning.
    pub begin: Option<Line>,
    /// What was announced since and not yet taken back.
    pub held: Option<Line>,
}

impl Left {
    /// Whether one of its processes lives.
    pub fn has_owner(&self) -> bool {
        match &self.begin {
            Some(Line::Begin { capture, guardian, .. }) => {
                capture.open().is_some() || guardian.open().is_some()
            }
            _ => false,
        }
    }

    /// Reads the lines; one that is torn or not understood is none.
    fn parse(text: &str) -> Self {
        let mut left = Self::default();
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            match serde_json::from_str(line) {
                // A new beginning does not take back what was held before it.
                Ok(line @ Line::Begin { .. }) => left.begin = Some(line),
                Ok(Line::Free) => left.held = None,
                Ok(line) => left.held = Some(line),
                Err(_) => {}
            }
        }
        left
    }
}

/// Why a VM could not be taken for oneself.
#[derive(Debug, thiserror::Error)]
pub enum UndoError {
    /// Somebody else works on it.
    #[error("another acquisition of this VM is under way{}", who.map_or_else(String::new, |who| format!(": process {}", who.pid)))]
    Taken {
        /// The process that reads, as the file says.
        who: Option<Who>,
    },
    /// The file or its directory cannot be used.
    #[error("{} cannot be used", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// The file of one VM, locked.
#[derive(Debug)]
pub struct Undo {
    file: File,
    path: PathBuf,
}

/// Where the files are.
pub fn directory() -> PathBuf {
    if rustix::process::geteuid().is_root() {
        return PathBuf::from("/run/stillframe");
    }
    // Not by the environment: cron has none, and looks for what a session left.
    let uid = rustix::process::geteuid().as_raw();
    let runtime = PathBuf::from(format!("/run/user/{uid}"));
    if runtime.is_dir() {
        return runtime.join("stillframe");
    }
    PathBuf::from(format!("/tmp/stillframe-{uid}"))
}

/// The VM's process id, by the name of its file.
pub fn pid_of(path: &Path) -> Option<u32> {
    path.file_stem()?.to_str()?.split_once('-')?.0.parse().ok()
}

/// Makes the directory if need be; it must be ours alone, for what is in it is acted on.
fn own_directory() -> Result<PathBuf, UndoError> {
    let path = directory();
    let fail = |cause: io::Error| UndoError::File { path: path.clone(), cause };
    match rustix::fs::mkdir(&path, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(fail(error.into())),
    }
    let meta = std::fs::symlink_metadata(&path).map_err(fail)?;
    let ours = meta.uid() == rustix::process::geteuid().as_raw();
    if meta.is_dir() && ours && meta.mode() & 0o022 == 0 {
        return Ok(path);
    }
    let what = "it is no directory of this user's, or others may write in it";
    Err(fail(io::Error::new(io::ErrorKind::PermissionDenied, what)))
}

impl Undo {
    /// Takes the VM `target` for this process: its file, locked.
    ///
    /// # Errors
    /// [`UndoError::Taken`] when somebody else has it.
    pub fn take(target: Who) -> Result<Self, UndoError> {
        let name = format!("{}-{}.json", target.pid, target.start_time);
        Self::open(&own_directory()?.join(name), true)
    }

    /// Every file that is there.
    ///
    /// # Errors
    /// The directory cannot be read; that there is none is no error.
    pub fn all() -> Result<Vec<PathBuf>, UndoError> {
        let dir = directory();
        let entries = match std::fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(cause) => return Err(UndoError::File { path: dir, cause }),
        };
        own_directory()?;
        let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort();
        Ok(paths)
    }

    /// Opens the file at `path` and locks it; with `make`, makes it.
    ///
    /// # Errors
    /// As [`Undo::take`].
    pub fn open(path: &Path, make: bool) -> Result<Self, UndoError> {
        let fail = |cause: io::Error| UndoError::File { path: path.to_owned(), cause };
        loop {
            let mut flags = OFlags::RDWR | OFlags::APPEND | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            flags.set(OFlags::CREATE, make);
            let mode = Mode::RUSR | Mode::WUSR;
            let fd = rustix::fs::open(path, flags, mode).map_err(|e| fail(e.into()))?;
            let mut undo = Self { file: File::from(fd), path: path.to_owned() };
            match rustix::fs::flock(&undo.file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    let begin = undo.left().ok().and_then(|left| left.begin);
                    let who = match begin {
                        Some(Line::Begin { capture, .. }) => Some(capture),
                        _ => None,
                    };
                    return Err(UndoError::Taken { who });
                }
                Err(error) => return Err(fail(error.into())),
            }
            // Whoever had it may have removed it between our open and our lock.
            if undo.is_here() {
                return Ok(undo);
            }
            if !make {
                return Err(fail(io::ErrorKind::NotFound.into()));
            }
        }
    }

    /// Whether the path still leads to this file.
    fn is_here(&self) -> bool {
        let id = |meta: std::fs::Metadata| (meta.dev(), meta.ino());
        let here = std::fs::symlink_metadata(&self.path).map(id);
        here.is_ok_and(|here| self.file.metadata().map(id).is_ok_and(|own| own == here))
    }

    /// How long ago the last line was written.
    pub fn age(&self) -> Option<std::time::Duration> {
        self.file.metadata().ok()?.modified().ok()?.elapsed().ok()
    }

    /// What the file at `path` says; it is read only, and no lock is taken.
    pub fn peek(path: &Path) -> Left {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty());
        fd.ok().and_then(|fd| Self::of(fd, path.to_owned()).left().ok()).unwrap_or_default()
    }

    /// The file that came as a descriptor from the process that locked it.
    pub fn of(fd: OwnedFd, path: PathBuf) -> Self {
        Self { file: File::from(fd), path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Announces: the line is in the file when this returns.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&mut self, line: &Line) -> io::Result<()> {
        // Whoever died in the middle of a line before us did not end it.
        let text = format!("\n{}\n", serde_json::to_string(line)?);
        self.file.write_all(text.as_bytes())
    }

    /// What the file says.
    ///
    /// # Errors
    /// The file system's.
    pub fn left(&mut self) -> io::Result<Left> {
        let mut text = Vec::new();
        self.file.seek(SeekFrom::Start(0))?;
        (&self.file).take(MAX_LEN).read_to_end(&mut text)?;
        Ok(Left::parse(&String::from_utf8_lossy(&text)))
    }

    /// Takes the file away: nothing is left to be undone. The lock lasts until all handles are
    /// closed.
    pub fn remove(&self) {
        if !self.is_here() {
            return;
        }
        // What cannot be removed says `free`, and the next run or `recover` removes it.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl AsFd for Undo {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who(pid: u32) -> Who {
        Who { pid, start_time: 7 }
    }

    fn begin(pid: u32) -> Line {
        Line::Begin {
            target: who(1),
            name: "web".into(),
            sockets: vec!["/run/q".into()],
            through: None,
            capture: who(pid),
            guardian: who(3),
        }
    }

    #[test]
    fn the_last_whole_line_counts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1-7.json");
        let mut undo = Undo::open(&path, true).unwrap();
        assert_eq!(undo.left().unwrap(), Left::default());
        undo.write(&begin(2)).unwrap();
        undo.write(&Line::Stop { until_ns: 5 }).unwrap();
        let held = Some(Line::Stop { until_ns: 5 });
        assert_eq!(undo.left().unwrap(), Left { begin: Some(begin(2)), held: held.clone() });
        // A run that died while it wrote, and one that came after it.
        undo.file.write_all(b"{\"at\":\"fr").unwrap();
        assert_eq!(undo.left().unwrap().held, held);
        undo.write(&begin(4)).unwrap();
        assert_eq!(undo.left().unwrap(), Left { begin: Some(begin(4)), held });
        undo.write(&Line::Free).unwrap();
        assert_eq!(undo.left().unwrap().held, None);
    }

    #[test]
    fn one_acquirer_per_vm() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("1-7.json");
        let mut undo = Undo::open(&path, true).unwrap();
        undo.write(&begin(2)).unwrap();
        let taken = Undo::open(&path, true).unwrap_err();
        assert!(matches!(taken, UndoError::Taken { who: Some(w) } if w == who(2)), "{taken}");
        // The lock is the open file's: a copy of the descriptor keeps it.
        let copy = undo.as_fd().try_clone_to_owned().unwrap();
        drop(undo);
        assert!(Undo::open(&path, true).is_err());
        drop(copy);
        let undo = Undo::open(&path, true).unwrap();
        undo.remove();
        drop(undo);
        assert!(matches!(Undo::open(&path, false), Err(UndoError::File { .. })));
    }
}
