//! One process, named so that no other can take its place, and what `/proc` says of it.

use crate::HostError;
use crate::kernel_text::{kib_field, open_under, read_all};
use crate::maps::{self, MapsError, Smap, Vma};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// A command line longer than this is refused: 4 MiB, above the kernel's limit for arguments
/// with the default stack.
const MAX_ARGV: u64 = 4 << 20;

/// `/proc/PID/net/unix` is read up to here.
const MAX_UNIX: u64 = 64 << 20;

/// File descriptors and threads that are listed at most.
const MAX_ENTRIES: usize = 1 << 20;

/// A running process.
///
/// Held by a pidfd and by its open `/proc/PID` directory. Both belong to the process and not to
/// the number: when the process is gone, reads through the directory fail and never show another
/// process that got the number (kernel: fs/proc/base.c, `get_proc_task`).
#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
    dir: OwnedFd,
    start_time: u64,
}

impl Process {
    /// Opens process `pid` (not a thread's id).
    ///
    /// # Errors
    /// [`HostError::Exited`] when there is none.
    pub fn open(pid: u32) -> Result<Self, HostError> {
        let gone = || HostError::Exited { pid };
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
        let path = format!("/proc/{pid}");
        let pidfd = pidfd_open(raw, PidfdFlags::empty()).map_err(|e| match e {
            Errno::SRCH => gone(),
            e => HostError::file(format!("pidfd of process {pid}"), e),
        })?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path.as_str(), flags, Mode::empty()).map_err(|e| match e {
            Errno::NOENT => gone(),
            e => HostError::file(path, e),
        })?;
        let mut process = Self { pid, pidfd, dir, start_time: 0 };
        process.start_time = process.read_start_time()?;
        // The pidfd still lives, so the number was its own while the directory was opened.
        if process.alive() { Ok(process) } else { Err(gone()) }
    }

    /// A second handle of the same process.
    ///
    /// # Errors
    /// The process has no file descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        let (pidfd, dir) = (self.pidfd.try_clone()?, self.dir.try_clone()?);
        Ok(Self { pid: self.pid, pidfd, dir, start_time: self.start_time })
    }

    /// Its process id in our pid namespace.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// When it started, in clock ticks since boot: field 22 of `/proc/PID/stat`.
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// The pidfd, for polling and for handing to another process.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The open `/proc/PID`.
    pub(crate) fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Whether it has not exited.
    pub fn alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            match poll(&mut fds, Some(&now)) {
                Err(Errno::INTR) => continue,
                // Readable means exited. An error says nothing of life: take it as gone.
                result => return result == Ok(0),
            }
        }
    }

    /// Whether the number still names this process: alive, and started when it started.
    pub fn still_same(&self) -> bool {
        self.alive() && self.read_start_time().is_ok_and(|t| t == self.start_time)
    }

    /// The error for the file `name` of this process.
    pub(crate) fn error(&self, name: &str, source: impl Into<io::Error>) -> HostError {
        let source = source.into();
        let raw = source.raw_os_error().map(Errno::from_raw_os_error);
        match raw {
            Some(Errno::SRCH) => HostError::Exited { pid: self.pid },
            _ if !self.alive() => HostError::Exited { pid: self.pid },
            _ => HostError::file(self.path(name), source),
        }
    }

    /// `/proc/PID/NAME`, for messages.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("/proc/{}/{name}", self.pid)
    }

    /// The whole of one of its small files.
    fn read(&self, name: &str, limit: u64) -> Result<Vec<u8>, HostError> {
        let file = open_under(&self.dir, name).map_err(|e| self.error(name, e))?;
        read_all(&file, &self.path(name), limit).map_err(|e| match e {
            HostError::File { source, .. } | HostError::Refused { source, .. } => {
                self.error(name, source)
            }
            other => other,
        })
    }

    /// One of its small files as text; bytes that are no UTF-8 are replaced.
    pub(crate) fn small_text(&self, name: &str) -> Result<String, HostError> {
        Ok(String::from_utf8_lossy(&self.read(name, 1 << 20)?).into_owned())
    }

    fn format(&self, name: &str, what: impl Into<String>) -> HostError {
        HostError::Format { path: self.path(name), what: what.into() }
    }

    fn read_start_time(&self) -> Result<u64, HostError> {
        let text = self.small_text("stat")?;
        start_time(&text).ok_or_else(|| self.format("stat", "no field 22"))
    }

    /// Its arguments as bytes; empty for a kernel thread.
    ///
    /// The process can rewrite them: they are a claim, not a fact.
    ///
    /// # Errors
    /// [`HostError::TooLong`] above 4 MiB.
    pub fn argv(&self) -> Result<Vec<Vec<u8>>, HostError> {
        let mut raw = self.read("cmdline", MAX_ARGV)?;
        if raw.last() == Some(&0) {
            raw.pop();
        } else if raw.is_empty() {
            return Ok(Vec::new());
        }
        Ok(raw.split(|b| *b == 0).map(<[u8]>::to_vec).collect())
    }

    /// Where its executable lies, as the kernel says; ` (deleted)` is appended for unlinked ones.
    ///
    /// # Errors
    /// [`HostError::Refused`] for another user's process without privilege.
    pub fn exe(&self) -> Result<Vec<u8>, HostError> {
        self.link("exe")
    }

    /// Its working directory; `None` when it cannot be told.
    pub fn cwd(&self) -> Option<PathBuf> {
        use std::os::unix::ffi::OsStringExt;
        self.link("cwd").ok().map(|path| std::ffi::OsString::from_vec(path).into())
    }

    fn link(&self, name: &str) -> Result<Vec<u8>, HostError> {
        let link = rustix::fs::readlinkat(&self.dir, name, Vec::new());
        Ok(link.map_err(|e| self.error(name, e))?.into_bytes())
    }

    /// Its real and effective user ids.
    ///
    /// # Errors
    /// As for every file of `/proc/PID`.
    pub fn uids(&self) -> Result<Uids, HostError> {
        let status = self.small_text("status")?;
        uids(&status).ok_or_else(|| self.format("status", "no line \"Uid:\" with four numbers"))
    }

    /// Whether it is stopped by a signal such as SIGSTOP, or traced and stopped.
    pub fn is_stopped(&self) -> bool {
        let status = self.small_text("status").unwrap_or_default();
        let state = status.lines().find_map(|line| line.strip_prefix("State:"));
        state.is_some_and(|state| state.trim_start().starts_with(['T', 't']))
    }

    /// Who traces its first thread (`TracerPid`): a debugger, or another acquirer.
    ///
    /// # Errors
    /// As for every file of `/proc/PID`.
    pub fn tracer(&self) -> Result<Option<u32>, HostError> {
        let status = self.small_text("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:"));
        let tracer = line.and_then(|pid| pid.trim().parse::<u32>().ok());
        let tracer = tracer.ok_or_else(|| self.format("status", "no line \"TracerPid:\""))?;
        Ok(Some(tracer).filter(|&pid| pid != 0))
    }

    /// The ids of its threads, ascending.
    ///
    /// # Errors
    /// As for every file of `/proc/PID`.
    pub fn threads(&self) -> Result<Vec<u32>, HostError> {
        let dir = self.open_dir("task")?;
        numbers(dir, || self.path("task"))
    }

    /// The names of its threads; of those that end meanwhile none.
    pub fn thread_names(&self) -> Vec<String> {
        let threads = self.threads().unwrap_or_default();
        let name = |tid: &u32| self.small_text(&format!("task/{tid}/comm")).ok();
        threads.iter().filter_map(name).map(|name| name.trim_end().to_owned()).collect()
    }

    fn open_dir(&self, name: &str) -> Result<Dir, HostError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&self.dir, name, flags, Mode::empty())
            .map_err(|e| self.error(name, e))?;
        Dir::new(fd).map_err(|e| self.error(name, e))
    }

    /// What its file descriptors are, ascending by number. Nothing is opened.
    ///
    /// # Errors
    /// [`HostError::Refused`] for another user's process without privilege.
    pub fn fds(&self) -> Result<Vec<Fd>, HostError> {
        let open = numbers(self.open_dir("fd")?, || self.path("fd"))?;
        // One that was closed since the listing is left out.
        Ok(open.into_iter().filter_map(|number| self.fd(number)).collect())
    }

    fn fd(&self, number: u32) -> Option<Fd> {
        let name = format!("fd/{number}");
        let link = rustix::fs::readlinkat(&self.dir, name.as_str(), Vec::new()).ok()?;
        let stat = rustix::fs::statat(&self.dir, name.as_str(), AtFlags::empty()).ok()?;
        let info = self.small_text(&format!("fdinfo/{number}")).ok()?;
        let flags = info.lines().find_map(|l| l.strip_prefix("flags:"))?;
        let access = u32::from_str_radix(flags.trim(), 8).ok()? & 0o3;
        Some(Fd {
            number,
            link: link.into_bytes(),
            writable: access != 0,
            kind: FileType::from_raw_mode(stat.st_mode),
            file: FileId::of(&stat),
            rdev: stat.st_rdev,
        })
    }

    /// The files and block devices that it holds open beside its memory: its disks, their
    /// backing files, firmware, logs.
    ///
    /// # Errors
    /// As [`Process::fds`].
    pub fn disks(&self) -> Result<Vec<Fd>, HostError> {
        let is_memory = |fd: &Fd| {
            [&b"/memfd:"[..], b"/dev/shm/", b"/dev/hugepages", b"/anon_hugepage", b"/dev/zero"]
                .iter()
                .any(|p| fd.link.starts_with(p))
        };
        let mut fds = self.fds()?;
        fds.retain(|fd| match fd.kind {
            FileType::BlockDevice => true,
            FileType::RegularFile => !is_memory(fd) && !fd.link.starts_with(b"/proc/"),
            _ => false,
        });
        Ok(fds)
    }

    /// How much memory it has, by kind.
    ///
    /// # Errors
    /// As for every file of `/proc/PID`.
    pub fn memory(&self) -> Result<ProcessMemory, HostError> {
        let status = self.small_text("status")?;
        process_memory(&status)
            .ok_or_else(|| self.format("status", "no VmRSS: a kernel thread, or exiting"))
    }

    /// The path that the unix socket with `inode` is bound to, as seen in the process's network
    /// namespace; `None` for an unbound one. Abstract ones begin with `@`.
    ///
    /// # Errors
    /// As for every file of `/proc/PID`.
    pub fn unix_socket_path(&self, inode: u64) -> Result<Option<Vec<u8>>, HostError> {
        let mut path = None;
        self.unix_sockets(|socket| {
            if socket.inode == inode {
                path = (!socket.path.is_empty()).then(|| socket.path.to_vec());
            }
            socket.inode == inode
        })?;
        Ok(path)
    }

    /// The paths of the unix sockets that somebody listens on, in the process's network namespace:
    /// those in its file system, each once.
    ///
    /// # Errors
    /// As for every file of `/proc/PID`.
    pub fn unix_listeners(&self) -> Result<Vec<PathBuf>, HostError> {
        let mut paths = Vec::new();
        self.unix_sockets(|socket| {
            if socket.listens && socket.path.starts_with(b"/") {
                paths.push(PathBuf::from(OsString::from_vec(socket.path.to_vec())));
            }
            false
        })?;
        paths.sort();
        paths.dedup();
        Ok(paths)
    }

    /// Shows `look` the unix sockets of the process's network namespace, until it has seen enough.
    fn unix_sockets(&self, mut look: impl FnMut(UnixSocket<'_>) -> bool) -> Result<(), HostError> {
        let name = "net/unix";
        let file = open_under(&self.dir, name).map_err(|e| self.error(name, e))?;
        let mut lines = BufReader::new(file.take(MAX_UNIX));
        let mut line = Vec::new();
        loop {
            line.clear();
            let got = lines.read_until(b'\n', &mut line).map_err(|e| self.error(name, e))?;
            if got == 0 || unix_line(&line).is_some_and(&mut look) {
                return Ok(());
            }
        }
    }

    /// Whether it sees other mounts than this process does, as in a container. libvirt gives its QEMUs
    /// such a view too, in which all but `/dev` is the host's.
    pub fn has_own_mounts(&self) -> bool {
        let view = |dir: &str| std::fs::read_link(format!("/proc/{dir}/ns/mnt"));
        match (view(&self.pid.to_string()), view("self")) {
            (Ok(its), Ok(ours)) => its != ours,
            _ => false,
        }
    }

    /// Its mappings, ascending. Listed again when it changed them meanwhile.
    ///
    /// # Errors
    /// [`HostError::Maps`] when the text is not the kernel's.
    pub fn maps(&self) -> Result<Vec<Vma>, HostError> {
        self.listed("maps", maps::parse_maps)
    }

    /// The `smaps` entries of the mappings for which `wanted` says yes. The kernel walks the
    /// page tables of all of the process's memory for it; no page is touched.
    ///
    /// # Errors
    /// As [`Process::maps`].
    pub fn smaps(&self, wanted: impl Fn(&Vma) -> bool) -> Result<Vec<Smap>, HostError> {
        self.listed("smaps", |text| maps::parse_smaps(text, &wanted))
    }

    fn listed<T>(
        &self,
        name: &str,
        parse: impl Fn(BufReader<std::fs::File>) -> Result<T, MapsError>,
    ) -> Result<T, HostError> {
        let mut tries = 0;
        loop {
            let file = open_under(&self.dir, name).map_err(|e| self.error(name, e))?;
            // One page at a time is what the kernel gives; more only costs memory here.
            match parse(BufReader::with_capacity(1 << 16, file)) {
                Err(MapsError::Order { .. }) if tries < 3 => tries += 1,
                Err(MapsError::Read(e)) => return Err(self.error(name, e)),
                Err(source) => return Err(HostError::Maps { path: self.path(name), source }),
                Ok(found) => return Ok(found),
            }
        }
    }
}

/// Ends a process of our own by SIGKILL: it cannot be mistaken for another.
///
/// # Errors
/// It is gone, or not ours to end.
pub fn end_by_force(process: &Process) -> io::Result<()> {
    let signal = rustix::process::Signal::KILL;
    Ok(rustix::process::pidfd_send_signal(&process.pidfd, signal)?)
}

/// The process ids in `/proc`, ascending.
///
/// # Errors
/// `/proc` cannot be listed.
pub fn all_pids() -> Result<Vec<u32>, HostError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let error = |e| HostError::file("/proc", e);
    let fd = rustix::fs::open("/proc", flags, Mode::empty()).map_err(error)?;
    numbers(Dir::new(fd).map_err(error)?, || "/proc".into())
}

/// Who beside process `but` can write into one of `files`, each a device and an inode, by a mapping of its
/// own. Of a process whose mappings are not shown to us nothing is known.
///
/// # Errors
/// `/proc` cannot be listed.
pub fn sharers(files: &[((u32, u32), u64)], but: u32) -> Result<Vec<Process>, HostError> {
    let writes =
        |vma: &Vma| vma.shared() && vma.perms[1] == b'w' && files.contains(&(vma.dev, vma.inode));
    let shares = |process: &Process| process.maps().is_ok_and(|maps| maps.iter().any(writes));
    // One that has ended meanwhile writes nothing.
    let others = all_pids()?.into_iter().filter(|pid| *pid != but);
    Ok(others.filter_map(|pid| Process::open(pid).ok()).filter(shares).collect())
}

/// The entries of `dir` that are numbers, ascending.
fn numbers(dir: Dir, path: impl Fn() -> String) -> Result<Vec<u32>, HostError> {
    let mut out = Vec::new();
    for entry in dir {
        let entry = entry.map_err(|e| HostError::file(path(), e))?;
        let number: Option<u32> = entry.file_name().to_str().ok().and_then(|t| t.parse().ok());
        out.extend(number);
        if out.len() > MAX_ENTRIES {
            return Err(HostError::TooLong { path: path(), limit: MAX_ENTRIES as u64 });
        }
    }
    out.sort_unstable();
    Ok(out)
}

/// Device and inode: what makes two descriptors the same file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Device, as `st_dev`.
    pub dev: u64,
    /// Inode number.
    pub inode: u64,
}

impl FileId {
    /// That of a `stat`.
    pub(crate) fn of(stat: &Stat) -> Self {
        Self { dev: stat.st_dev, inode: stat.st_ino }
    }
}

/// One file descriptor of a process.
#[derive(Clone, Debug)]
pub struct Fd {
    /// Its number there.
    pub number: u32,
    /// Where it leads: a path, `socket:[12345]`, `/memfd:name (deleted)`, `anon_inode:..`.
    pub link: Vec<u8>,
    /// Whether it was opened for writing.
    pub writable: bool,
    /// Regular file, block device, socket ...
    pub kind: FileType,
    /// The file.
    pub file: FileId,
    /// For devices, which: as `st_rdev`.
    pub rdev: u64,
}

impl Fd {
    /// The inode of the socket that it is, if it is one.
    pub fn socket(&self) -> Option<u64> {
        let inode = self.link.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
        std::str::from_utf8(inode).ok()?.parse().ok()
    }
}

/// User ids of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Uids {
    /// Who started it.
    pub real: u32,
    /// With whose rights it runs.
    pub effective: u32,
}

/// Memory of a process in bytes, from `/proc/PID/status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessMemory {
    /// `VmRSS`: all that is resident.
    pub rss: u64,
    /// `VmHWM`: the most that ever was.
    pub peak_rss: u64,
    /// `RssAnon`: private memory.
    pub anon: u64,
    /// `RssFile`: pages of files.
    pub file: u64,
    /// `RssShmem`: shared memory, memfd, tmpfs.
    pub shmem: u64,
    /// `VmPTE`: page tables.
    pub page_tables: u64,
    /// `VmSwap`: swapped out private memory.
    pub swap: u64,
}

fn process_memory(status: &str) -> Option<ProcessMemory> {
    let field = |name| kib_field(status, name);
    Some(ProcessMemory {
        rss: field("VmRSS")?,
        peak_rss: field("VmHWM")?,
        anon: field("RssAnon")?,
        file: field("RssFile")?,
        shmem: field("RssShmem")?,
        page_tables: field("VmPTE")?,
        // Absent from kernels without swap.
        swap: field("VmSwap").unwrap_or(0),
    })
}

fn uids(status: &str) -> Option<Uids> {
    let line = status.lines().find_map(|l| l.strip_prefix("Uid:"))?;
    let mut ids = line.split_ascii_whitespace().map(str::parse);
    Some(Uids { real: ids.next()?.ok()?, effective: ids.next()?.ok()? })
}

/// Field 22 of a `stat` line. Field 2, the name, may hold spaces and parentheses: the fields
/// behind it are counted from the last `)`.
fn start_time(stat: &str) -> Option<u64> {
    let (_, behind) = stat.rsplit_once(')')?;
    behind.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

/// A unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct UnixSocket<'a> {
    inode: u64,
    path: &'a [u8],
    /// Somebody listens on it.
    listens: bool,
}

/// One line of `/proc/net/unix`: `Num RefCount Protocol Flags Type St Inode Path`, where the path may
/// hold spaces or be missing.
fn unix_line(line: &[u8]) -> Option<UnixSocket<'_>> {
    let mut rest = line.strip_suffix(b"\n").unwrap_or(line).trim_ascii_start();
    let mut listens = false;
    for field in 0..6 {
        // `__SO_ACCEPTCON`
        listens |= field == 3 && rest.starts_with(b"00010000 ");
        let end = rest.iter().position(|b| *b == b' ')?;
        rest = rest.get(end..)?.trim_ascii_start();
    }
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    let (inode, path) = rest.split_at(digits);
    let inode = std::str::from_utf8(inode).ok()?.parse().ok()?;
    match path {
        [] => Some(UnixSocket { inode, path, listens }),
        [b' ', path @ ..] => Some(UnixSocket { inode, path, listens }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;
    use std::process::{Child, Command, Stdio};

    /// A child that waits for its input; ends with the test.
    struct Waiting(Child);

    impl Waiting {
        fn new() -> Self {
            Self(Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap())
        }

        fn end(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    impl Drop for Waiting {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn the_name_may_hold_anything() {
        let stat = "12 (a) R (b c)) S 1 1 1 0 -1 4 0 0 0 0 0 0 0 0 20 0 1 0 98765 1 2\n";
        assert_eq!(start_time(stat), Some(98765));
        assert_eq!(start_time("12 (a) S 1"), None);
        assert_eq!(start_time(""), None);
    }

    #[test]
    fn we_find_ourselves() {
        let me = Process::open(std::process::id()).unwrap();
        assert!(me.still_same() && me.start_time() > 0);
        assert!(all_pids().unwrap().contains(&me.pid()));
        let argv: Vec<_> = std::env::args().map(String::into_bytes).collect();
        assert_eq!(me.argv().unwrap(), argv);
        let exe = std::env::current_exe().unwrap();
        assert_eq!(me.exe().unwrap(), exe.into_os_string().into_encoded_bytes());
        assert_eq!(me.uids().unwrap().real, rustix::process::getuid().as_raw());
        assert!(me.threads().unwrap().contains(&me.pid()));
        let memory = me.memory().unwrap();
        assert!(memory.rss >= memory.anon && memory.peak_rss > 0 && memory.page_tables > 0);
    }

    #[test]
    fn a_process_that_exits_is_noticed_everywhere() {
        let mut child = Waiting::new();
        let process = Process::open(child.0.id()).unwrap();
        let other = process.try_clone().unwrap();
        assert!(process.still_same());
        child.end();
        assert!(!process.alive() && !process.still_same() && !other.alive());
        assert!(matches!(process.maps(), Err(HostError::Exited { .. })));
        assert!(matches!(process.argv(), Err(HostError::Exited { .. })));
        assert!(matches!(process.fds(), Err(HostError::Exited { .. })));
        assert!(matches!(Process::open(u32::MAX), Err(HostError::Exited { .. })));
    }

    #[test]
    fn descriptors_show_file_and_access() {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let reader = std::fs::File::open(file.path()).unwrap();
        let (a, _b) = std::os::unix::net::UnixStream::pair().unwrap();
        let me = Process::open(std::process::id()).unwrap();
        let fds = me.fds().unwrap();
        let find = |raw: i32| fds.iter().find(|f| f.number == raw.cast_unsigned()).unwrap();
        let (write, read) = (find(file.as_file().as_raw_fd()), find(reader.as_raw_fd()));
        assert!(write.writable && !read.writable && write.file == read.file);
        assert_eq!(write.link, file.path().as_os_str().as_encoded_bytes());
        assert!(find(a.as_raw_fd()).socket().is_some() && write.socket().is_none());
        let memfd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let disks: Vec<_> = me.disks().unwrap().iter().map(|d| d.number).collect();
        assert!(disks.contains(&write.number));
        assert!(!disks.contains(&memfd.as_raw_fd().cast_unsigned()));
    }

    #[test]
    fn a_bound_socket_has_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("with space.sock");
        let socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let me = Process::open(std::process::id()).unwrap();
        let inode = me.fd(socket.as_raw_fd().cast_unsigned()).unwrap().socket().unwrap();
        let found = me.unix_socket_path(inode).unwrap().unwrap();
        assert_eq!(found, path.into_os_string().into_encoded_bytes());
        assert_eq!(me.unix_socket_path(1).unwrap(), None);
    }

    #[test]
    fn lines_of_net_unix() {
        let line = b"ffff8881: 00000002 00000000 00010000 0001 01 12345 /run/a b.sock\n";
        let socket = UnixSocket { inode: 12345, path: b"/run/a b.sock", listens: true };
        assert_eq!(unix_line(line), Some(socket));
        let line = b"ffff8881: 00000003 00000000 00000000 0001 03 77\n";
        let socket = UnixSocket { inode: 77, path: b"", listens: false };
        assert_eq!(unix_line(line), Some(socket));
        assert_eq!(unix_line(b"Num       RefCount Protocol Flags    Type St Inode Path\n"), None);
        assert_eq!(unix_line(b"\n"), None);
    }
}
