//! A blocking client for QEMU's monitor protocol, with a deadline on everything.
//!
//! Only the members of [`Command`] and [`Hmp`], all of them queries, those of [`Change`], and `getfd`
//! ([`Qmp::pass`]) can be sent: a command that changes a guest has to be added there, where a reviewer
//! sees it.
//!
//! The peer is not trusted: the length of a message, the number of events and each wait are
//! bounded, ids are checked, and after a breach of protocol the connection is not used again.

use crate::deadline::Deadline;
use crate::frame::{FrameError, Framer};
use crate::libvirt::{
    Domain, Libvirt, LibvirtError, OPERATION_INVALID, OPERATION_TIMEOUT, Procedure,
};
use crate::queue::{self, Queue};
use crate::text::Excerpt;
use crate::unix::{self, Failed};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::BTreeSet;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Greatest length of one message in bytes. `info mtree -f -o` of a large machine stays below
/// 1 MiB.
pub const MAX_MESSAGE: usize = 16 << 20;

/// Events that may wait to be taken by [`Qmp::take_events`]; and 16 MiB of them.
pub const MAX_EVENTS: usize = queue::MAX_EVENTS;

/// Pause between two tries to reach a libvirt that was lost.
const RECONNECT_PAUSE: Duration = Duration::from_millis(100);

/// The QMP commands that this crate sends. All of them are queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// `qmp_capabilities`: ends the negotiation; no capability is enabled.
    QmpCapabilities,
    /// `human-monitor-command`; only with an [`Hmp`] line.
    HumanMonitorCommand,
    /// `qom-get`
    QomGet,
    /// `qom-list`
    QomList,
    /// `query-balloon`
    QueryBalloon,
    /// `query-block-jobs`
    QueryBlockJobs,
    /// `query-blockstats`
    QueryBlockstats,
    /// `query-commands`
    QueryCommands,
    /// `query-cpus-fast`
    QueryCpusFast,
    /// `query-dump`
    QueryDump,
    /// `query-kvm`
    QueryKvm,
    /// `query-memory-devices`
    QueryMemoryDevices,
    /// `query-memory-size-summary`
    QueryMemorySizeSummary,
    /// `query-migrate`
    QueryMigrate,
    /// `query-migrate-capabilities`
    QueryMigrateCapabilities,
    /// `query-migrate-parameters`
    QueryMigrateParameters,
    /// `query-name`
    QueryName,
    /// `query-sev`
    QuerySev,
    /// `query-status`
    QueryStatus,
    /// `query-target`
    QueryTarget,
    /// `query-uuid`
    QueryUuid,
    /// `query-version`
    QueryVersion,
    /// `x-query-ramblock`
    XQueryRamblock,
}

impl Command {
    /// The command's name on the wire.
    pub fn word(self) -> &'static str {
        match self {
            Self::QmpCapabilities => "qmp_capabilities",
            Self::HumanMonitorCommand => "human-monitor-command",
            Self::QomGet => "qom-get",
            Self::QomList => "qom-list",
            Self::QueryBalloon => "query-balloon",
            Self::QueryBlockJobs => "query-block-jobs",
            Self::QueryBlockstats => "query-blockstats",
            Self::QueryCommands => "query-commands",
            Self::QueryCpusFast => "query-cpus-fast",
            Self::QueryDump => "query-dump",
            Self::QueryKvm => "query-kvm",
            Self::QueryMemoryDevices => "query-memory-devices",
            Self::QueryMemorySizeSummary => "query-memory-size-summary",
            Self::QueryMigrate => "query-migrate",
            Self::QueryMigrateCapabilities => "query-migrate-capabilities",
            Self::QueryMigrateParameters => "query-migrate-parameters",
            Self::QueryName => "query-name",
            Self::QuerySev => "query-sev",
            Self::QueryStatus => "query-status",
            Self::QueryTarget => "query-target",
            Self::QueryUuid => "query-uuid",
            Self::QueryVersion => "query-version",
            Self::XQueryRamblock => "x-query-ramblock",
        }
    }
}

/// The commands that change a guest or its QEMU, each with what takes it back.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// `stop`, through libvirt DOMAIN_SUSPEND: stops the guest's CPUs and its clock, then flushes its disks.
    /// Taken back by `cont`.
    Stop,
    /// `cont`, through libvirt DOMAIN_RESUME: only ever for a guest that [`Change::Stop`], or a snapshot of
    /// ours, stopped.
    Cont,
    /// `migrate-set-capabilities`: taken back by itself, with what was found before.
    SetCapabilities(Vec<Capability>),
    /// `closefd`: takes a [`Qmp::pass`] back that nobody used.
    CloseFd(String),
    /// `migrate` to the descriptor that was passed under this name. Only ever with
    /// `background-snapshot` set: else the guest is left stopped in the end. Taken back by
    /// `migrate_cancel`.
    MigrateToFd(String),
    /// `migrate_cancel`: only ever for a migration that [`Change::MigrateToFd`] began.
    MigrateCancel,
    /// `pmemsave`: QEMU copies guest-physical memory, RAM only ever, into a file; the guest's CPUs wait
    /// for it where they need QEMU. Nothing is left of it but what the file holds.
    Pmemsave {
        /// First guest-physical address.
        gpa: u64,
        /// Number of bytes.
        len: u64,
        /// The file, which QEMU truncates first.
        file: String,
    },
    /// `dump-guest-memory`: QEMU stops the guest and writes an ELF core, without paging, to the
    /// descriptor that was passed; then it lets go on a guest that ran. For as long as nobody reads, the
    /// guest stands and nothing but the other end's closing ends it (`docs/dump.md`). Taken back by that.
    DumpToFd {
        /// The name under which the descriptor was passed. It is used up; but not when the command is
        /// refused for its arguments, or for a dump under way.
        name: String,
        /// The monitor answers meanwhile, and `DUMP_COMPLETED` tells of the end. Without it the answer
        /// comes at the end, and QEMU answers nobody until then.
        detach: bool,
        /// First guest-physical address and number of bytes, at least 1; all memory without it.
        range: Option<(u64, u64)>,
    },
}

impl Change {
    /// The command's name on the wire.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Cont => "cont",
            Self::SetCapabilities(_) => "migrate-set-capabilities",
            Self::CloseFd(_) => "closefd",
            Self::MigrateToFd(_) => "migrate",
            Self::MigrateCancel => "migrate_cancel",
            Self::Pmemsave { .. } => "pmemsave",
            Self::DumpToFd { .. } => "dump-guest-memory",
        }
    }

    /// The command's arguments.
    fn arguments(&self) -> Value {
        match self {
            Self::Stop | Self::Cont | Self::MigrateCancel => json!({}),
            Self::SetCapabilities(capabilities) => json!({ "capabilities": capabilities }),
            Self::CloseFd(name) => json!({ "fdname": name }),
            Self::MigrateToFd(name) => json!({ "uri": format!("fd:{name}") }),
            Self::Pmemsave { gpa, len, file } => {
                json!({ "val": gpa, "size": len, "filename": file })
            }
            Self::DumpToFd { name, detach, range } => {
                let mut arguments =
                    json!({ "paging": false, "protocol": format!("fd:{name}"), "detach": detach });
                if let Some((begin, length)) = range {
                    arguments["begin"] = json!(begin);
                    arguments["length"] = json!(length);
                }
                arguments
            }
        }
    }
}

/// A capability of QEMU's migration (`query-migrate-capabilities`).
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Capability {
    /// Its name: `background-snapshot`, `events` ..
    pub capability: String,
    /// Whether it is set.
    pub state: bool,
}

/// The lines of the human monitor that this crate sends. All of them are queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hmp {
    /// `info mtree -f`
    InfoMtreeFlat,
    /// `info mtree -f -o`
    InfoMtreeFlatOwners,
    /// `info mtree -o -D`
    InfoMtreeGraph,
    /// `info ramblock`
    InfoRamblock,
    /// `info registers -a`
    InfoRegisters,
    /// `gpa2hva ADDR`
    Gpa2Hva(u64),
}

impl Hmp {
    /// The line.
    pub fn line(self) -> String {
        match self {
            Self::InfoMtreeFlat => "info mtree -f".into(),
            Self::InfoMtreeFlatOwners => "info mtree -f -o".into(),
            Self::InfoMtreeGraph => "info mtree -o -D".into(),
            Self::InfoRamblock => "info ramblock".into(),
            Self::InfoRegisters => "info registers -a".into(),
            Self::Gpa2Hva(gpa) => format!("gpa2hva {gpa:#x}"),
        }
    }
}

/// What went wrong between us and the monitor.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket cannot be reached.
    #[error("cannot connect to the monitor {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else uses the monitor: it serves one client at a time and greets no second one.
    #[error("the monitor {} is busy: no greeting within {:.1} s, so another client holds it", path.display(), waited.as_secs_f64())]
    Busy {
        /// The socket.
        path: PathBuf,
        /// How long we waited.
        waited: Duration,
    },
    /// No answer in time. A late answer is dropped when it comes.
    #[error("{doing} was not answered within {:.1} s", waited.as_secs_f64())]
    Timeout {
        /// The command, or the greeting.
        doing: &'static str,
        /// How long we waited.
        waited: Duration,
    },
    /// The monitor closed the connection: QEMU ended, or it was taken from us.
    #[error("the monitor closed the connection during {doing}")]
    Closed {
        /// The command, or the greeting.
        doing: &'static str,
    },
    /// The socket failed.
    #[error("the monitor's socket failed during {doing}")]
    Io {
        /// The command, or the greeting.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The peer does not keep to the protocol.
    #[error("the monitor broke the protocol during {doing}: {what}")]
    Protocol {
        /// The command, or the greeting.
        doing: &'static str,
        /// What it did.
        what: String,
    },
    /// QEMU refused the command.
    #[error("{command} was refused with {class}: {desc}")]
    Refused {
        /// The command.
        command: &'static str,
        /// QEMU's error class, such as `GenericError` or `CommandNotFound`.
        class: Excerpt,
        /// QEMU's text.
        desc: Excerpt,
    },
    /// The answer has another shape than QEMU's schema says.
    #[error("{command} was answered in an unknown shape: {what}")]
    Shape {
        /// The command.
        command: &'static str,
        /// What does not fit.
        what: String,
    },
    /// An earlier failure left the connection unusable.
    #[error("the connection to the monitor is no longer usable after an earlier failure")]
    Broken,
    /// libvirt did not pass it on, or its answer.
    #[error("{doing} did not go through libvirt")]
    Libvirt {
        /// The command.
        doing: &'static str,
        /// Why.
        #[source]
        cause: LibvirtError,
    },
}

impl QmpError {
    /// QEMU's error class when it refused the command.
    pub fn class(&self) -> Option<String> {
        match self {
            Self::Refused { class, .. } => Some(class.to_string()),
            _ => None,
        }
    }

    /// Whether this QEMU does not know the command.
    pub fn is_unknown_command(&self) -> bool {
        self.class().as_deref() == Some("CommandNotFound")
    }

    /// The outcome's class for the transcript.
    fn outcome(&self) -> Outcome {
        match self {
            Self::Refused { .. } => Outcome::Refused,
            Self::Timeout { .. } | Self::Busy { .. } => Outcome::TimedOut,
            Self::Closed { .. } | Self::Connect { .. } | Self::Io { .. } => Outcome::Lost,
            Self::Protocol { .. } | Self::Shape { .. } | Self::Broken => Outcome::Breach,
            Self::Libvirt { cause, .. } => match cause {
                LibvirtError::Refused { .. }
                | LibvirtError::Authentication { .. }
                | LibvirtError::ReadOnly { .. } => Outcome::Refused,
                LibvirtError::Timeout { .. } => Outcome::TimedOut,
                LibvirtError::Protocol { .. } | LibvirtError::Broken => Outcome::Breach,
                _ => Outcome::Lost,
            },
        }
    }
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It was answered.
    Answered,
    /// QEMU refused it.
    Refused,
    /// No answer in time; QEMU may still carry it out.
    TimedOut,
    /// The connection was lost; QEMU may or may not have carried it out.
    Lost,
    /// The peer broke the protocol.
    Breach,
}

impl Outcome {
    /// The outcome's word in the journal.
    pub fn word(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::TimedOut => "timed-out",
            Self::Lost => "lost",
            Self::Breach => "breach",
        }
    }
}

/// One command and how it ended, as the transcript is told.
#[derive(Debug)]
pub struct Exchange<'a> {
    /// The command's name on the wire.
    pub command: &'static str,
    /// Its arguments: a JSON object.
    pub arguments: &'a Value,
    /// How it ended.
    pub outcome: Outcome,
    /// The refusal's or failure's text.
    pub error: Option<&'a QmpError>,
    /// Before the first byte was written.
    pub started: Instant,
    /// After the last byte of the answer was read.
    pub finished: Instant,
}

/// Told of every command, after it ended; called on the thread that sent it.
pub type Transcript = Box<dyn FnMut(&Exchange<'_>) + Send>;

/// An event that QEMU sent unasked.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// Its data; null when it has none.
    pub data: Value,
    /// QEMU's clock: seconds since 1970 UTC; -1 when QEMU could not read it.
    pub seconds: i64,
    /// QEMU's clock: microseconds in the second.
    pub microseconds: i64,
    /// When it was read from the socket. Events are read while an answer is waited for, or by
    /// [`Qmp::poll_events`], so this can be later than its arrival.
    pub received: Instant,
}

/// Who is at the other end of the socket (SO_PEERCRED: who called `listen`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCred {
    /// The process; `None` when our pid namespace does not show it.
    pub pid: Option<u32>,
    /// Its user.
    pub uid: u32,
}

/// QEMU's version, as it greets and as `query-version` answers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct Version {
    /// The three numbers.
    pub qemu: VersionNumber,
    /// The distributor's text, such as `Debian 1:7.2+dfsg-7`; often empty.
    pub package: String,
}

/// The three numbers of a QEMU version, compared in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct VersionNumber {
    /// 10 of 10.0.2.
    pub major: u32,
    /// 0 of 10.0.2.
    pub minor: u32,
    /// 2 of 10.0.2.
    pub micro: u32,
}

/// What commands travel by.
enum Wire {
    /// A socket of QEMU's own.
    Socket(Socket),
    /// libvirt, which holds QEMU's socket.
    Libvirt(Passage),
}

struct Socket {
    stream: UnixStream,
    framer: Framer,
    next_id: u64,
    /// Ids of commands that timed out: their late answers are dropped.
    given_up: BTreeSet<u64>,
    /// A command was sent in part: whatever follows is no command.
    torn: bool,
}

/// A command on its way.
#[derive(Clone, Copy)]
struct Request<'a> {
    word: &'static str,
    arguments: &'a Value,
    /// Goes with it.
    fd: Option<BorrowedFd<'a>>,
    once: Once,
    deadline: Deadline,
}

/// A domain's monitor through libvirt.
struct Passage {
    libvirt: Libvirt,
    domain: Domain,
    uri: String,
    /// How often libvirt was lost and found again.
    reconnects: u32,
}

/// A connection to one monitor.
pub struct Qmp {
    wire: Wire,
    path: PathBuf,
    greeting: Version,
    events: Queue<Event>,
    usable: bool,
    transcript: Option<Transcript>,
    /// Nothing is told to the transcript.
    quiet: bool,
}

impl std::fmt::Debug for Qmp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qmp").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Qmp {
    /// Connects to the monitor's socket at `path`, reads its greeting and ends the negotiation,
    /// all within `deadline`.
    ///
    /// # Errors
    /// [`QmpError::Busy`] when the connection is made (or the listen queue is full) but no byte of
    /// a greeting comes; any other variant but `Refused` and `Shape` as it says.
    pub fn connect(path: &Path, deadline: Duration) -> Result<Self, QmpError> {
        Self::connect_with(path, path, deadline, None)
    }

    /// As [`Qmp::connect`]; the socket is reached at `reach`, as where it lies is seen otherwise from
    /// here, and `transcript` is told of every command, the first one too.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub fn connect_with(
        path: &Path,
        reach: &Path,
        deadline: Duration,
        transcript: Option<Transcript>,
    ) -> Result<Self, QmpError> {
        let deadline = Deadline::new(deadline);
        let stream = connect_unix(reach, deadline)?;
        Self::greet(stream, path, deadline, transcript)
    }

    /// Speaks QMP over a connected stream; `path` is what errors call it.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub fn over(
        stream: UnixStream,
        path: &Path,
        deadline: Duration,
        transcript: Option<Transcript>,
    ) -> Result<Self, QmpError> {
        Self::greet(stream, path, Deadline::new(deadline), transcript)
    }

    fn greet(
        stream: UnixStream,
        path: &Path,
        deadline: Deadline,
        transcript: Option<Transcript>,
    ) -> Result<Self, QmpError> {
        const DOING: &str = "the greeting";
        stream
            .set_nonblocking(false)
            .map_err(|source| QmpError::Connect { path: path.into(), source })?;
        let none = VersionNumber { major: 0, minor: 0, micro: 0 };
        let socket = Socket {
            stream,
            framer: Framer::default(),
            next_id: 1,
            given_up: BTreeSet::new(),
            torn: false,
        };
        let mut qmp = Self {
            wire: Wire::Socket(socket),
            path: path.into(),
            greeting: Version { qemu: none, package: String::new() },
            events: Queue::default(),
            usable: true,
            transcript,
            quiet: false,
        };
        let Wire::Socket(socket) = &mut qmp.wire else { return Err(QmpError::Broken) };
        let (greeting, _) = socket.receive(DOING, deadline).map_err(|error| match error {
            QmpError::Timeout { waited, .. } if socket.framer.is_empty() => {
                QmpError::Busy { path: path.into(), waited }
            }
            other => other,
        })?;
        qmp.greeting = greeting
            .get("QMP")
            .and_then(|qmp| Version::deserialize(qmp.get("version")?).ok())
            .ok_or_else(|| QmpError::Protocol {
                doing: DOING,
                what: format!("no greeting but {:?}", Excerpt::new(&show(&greeting))),
            })?;
        qmp.run(Command::QmpCapabilities.word(), json!({}), deadline)?;
        Ok(qmp)
    }

    /// The monitor of `domain` through `libvirt`, which opened `uri`; its events come too. Marks the
    /// domain as tainted in libvirt's eyes (`custom-monitor`). A libvirt that is lost is connected to
    /// anew for queries, and for what was surely not sent.
    ///
    /// # Errors
    /// [`QmpError::Libvirt`]; as [`Qmp::execute`].
    pub fn through(
        mut libvirt: Libvirt,
        uri: &str,
        domain: Domain,
        deadline: Duration,
        transcript: Option<Transcript>,
    ) -> Result<Self, QmpError> {
        let deadline = Deadline::new(deadline);
        let left = deadline.left().unwrap_or_default();
        libvirt
            .listen(&domain, left)
            .map_err(|cause| QmpError::Libvirt { doing: "listening to events", cause })?;
        let none = VersionNumber { major: 0, minor: 0, micro: 0 };
        let path = libvirt.path().to_owned();
        let passage = Passage { libvirt, domain, uri: uri.to_owned(), reconnects: 0 };
        let mut qmp = Self {
            wire: Wire::Libvirt(passage),
            path,
            greeting: Version { qemu: none, package: String::new() },
            events: Queue::default(),
            usable: true,
            transcript,
            quiet: false,
        };
        let left = deadline.left().unwrap_or_default();
        qmp.greeting = qmp.query(Command::QueryVersion, json!({}), left)?;
        Ok(qmp)
    }

    /// The domain whose monitor this is, when libvirt holds it.
    pub fn domain(&self) -> Option<&Domain> {
        match &self.wire {
            Wire::Libvirt(passage) => Some(&passage.domain),
            Wire::Socket(_) => None,
        }
    }

    /// How often libvirt was lost and found again: events may be missing then.
    pub fn reconnects(&self) -> u32 {
        match &self.wire {
            Wire::Libvirt(passage) => passage.reconnects,
            Wire::Socket(_) => 0,
        }
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The version that QEMU named in its greeting.
    pub fn version(&self) -> &Version {
        &self.greeting
    }

    /// Who listens on the socket. With QMP served by QEMU itself this is QEMU; nobody where libvirt
    /// stands between.
    ///
    /// # Errors
    /// [`QmpError::Io`].
    pub fn peer(&self) -> Result<Option<PeerCred>, QmpError> {
        match &self.wire {
            Wire::Socket(socket) => peer(&socket.stream).map(Some),
            Wire::Libvirt(_) => Ok(None),
        }
    }

    /// Sends a query and waits for its answer: the value of `return`.
    ///
    /// `human-monitor-command` is not sent this way but by [`Qmp::hmp`], which knows the lines
    /// that may be sent.
    ///
    /// # Errors
    /// [`QmpError::Refused`] when QEMU refuses and [`QmpError::Timeout`] when no answer came: the
    /// next command may be tried. After the others every command is [`QmpError::Broken`].
    pub fn execute(
        &mut self,
        command: Command,
        arguments: Value,
        timeout: Duration,
    ) -> Result<Value, QmpError> {
        if command == Command::HumanMonitorCommand {
            return Err(QmpError::Protocol {
                doing: command.word(),
                what: "lines of the human monitor go through hmp()".into(),
            });
        }
        self.run(command.word(), arguments, Deadline::new(timeout))
    }

    /// Changes the guest, and waits until QEMU says that it is done.
    ///
    /// Through libvirt the guest is stopped and let go on by libvirt's own calls: so it knows why the
    /// domain stands, and takes the leases of its disks back, which it does not after a passed `cont`.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; after [`QmpError::Timeout`] QEMU may still carry it out.
    pub fn change(&mut self, change: &Change, timeout: Duration) -> Result<(), QmpError> {
        let deadline = Deadline::new(timeout);
        match (&self.wire, change) {
            (Wire::Libvirt(_), Change::Stop) => return self.suspend(deadline),
            (Wire::Libvirt(_), Change::Cont) => return self.resume(deadline),
            _ => {}
        }
        self.run_with(change.word(), change.arguments(), Once::Sent, None, deadline).map(drop)
    }

    fn suspend(&mut self, deadline: Deadline) -> Result<(), QmpError> {
        let word = Procedure::Suspend.word();
        self.run_with(word, json!({}), Once::Suspended, None, deadline).map(drop)
    }

    /// The guest must run again: half the time is for libvirt's own call, which waits for a job that is
    /// under way or knows the domain as running, the rest for QEMU's. Any other refusal stands: who cannot
    /// have a disk's lease back must not write to the disk.
    fn resume(&mut self, deadline: Deadline) -> Result<(), QmpError> {
        let (word, cont) = (Procedure::Resume.word(), Change::Cont.word());
        let first = Deadline::new(deadline.left().unwrap_or_default() / 2);
        let resumed = self.run_with(word, json!({}), Once::Resumed, None, first);
        let is_qemus = match &resumed {
            Err(QmpError::Timeout { .. }) => true,
            Err(QmpError::Libvirt { cause, .. }) => {
                matches!(cause.code(), Some(OPERATION_INVALID | OPERATION_TIMEOUT))
            }
            _ => false,
        };
        if is_qemus {
            return self.run_with(cont, json!({}), Once::Sent, None, deadline).map(drop);
        }
        resumed.map(drop)
    }

    /// `getfd`: gives QEMU a copy of `fd` under `name`, which replaces one of that name. Taken back
    /// by [`Change::CloseFd`], and used up by [`Change::MigrateToFd`] and [`Change::DumpToFd`].
    ///
    /// # Errors
    /// As [`Qmp::execute`]. A QEMU that is not reached by a socket of its own, as through a proxy,
    /// says that no descriptor came.
    pub fn pass(
        &mut self,
        name: &str,
        fd: BorrowedFd<'_>,
        timeout: Duration,
    ) -> Result<(), QmpError> {
        let arguments = json!({ "fdname": name });
        let deadline = Deadline::new(timeout);
        self.run_with("getfd", arguments, Once::Sent, Some(fd), deadline).map(drop)
    }

    /// From here on commands are told to the transcript, or not: a question that is asked many times a
    /// second would bury the others.
    pub fn tell(&mut self, tell: bool) {
        self.quiet = !tell;
    }

    /// As [`Qmp::execute`], with the answer in the shape `T`.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; [`QmpError::Shape`] when the answer is no `T`.
    pub fn query<T: serde::de::DeserializeOwned>(
        &mut self,
        command: Command,
        arguments: Value,
        timeout: Duration,
    ) -> Result<T, QmpError> {
        let answer = self.execute(command, arguments, timeout)?;
        T::deserialize(answer)
            .map_err(|error| QmpError::Shape { command: command.word(), what: error.to_string() })
    }

    /// Sends a line to the human monitor; its text with `\r\n` turned into `\n`.
    ///
    /// The human monitor puts most errors into the text: read it for what you expect, not for
    /// errors.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub fn hmp(&mut self, line: Hmp, timeout: Duration) -> Result<String, QmpError> {
        let command = Command::HumanMonitorCommand;
        let arguments = json!({ "command-line": line.line() });
        match self.run(command.word(), arguments, Deadline::new(timeout))? {
            Value::String(text) => Ok(text.replace("\r\n", "\n")),
            _ => Err(QmpError::Shape { command: command.word(), what: "not a string".into() }),
        }
    }

    /// Takes the events read so far, in order.
    pub fn take_events(&mut self) -> Vec<Event> {
        self.events.take()
    }

    /// Reads events for as long as `wait`, or until the first one is there.
    ///
    /// # Errors
    /// The variants that end a conversation; that no event came is none.
    pub fn poll_events(&mut self, wait: Duration) -> Result<(), QmpError> {
        const DOING: &str = "waiting for events";
        if !self.usable {
            return Err(QmpError::Broken);
        }
        let deadline = Deadline::new(wait);
        let polled = match &mut self.wire {
            Wire::Socket(socket) => socket.poll_events(DOING, &mut self.events, deadline),
            Wire::Libvirt(passage) => passage.poll_events(DOING, &mut self.events, deadline),
        };
        self.poison(polled)
    }

    /// Sends, waits, tells the transcript.
    fn run(
        &mut self,
        command: &'static str,
        arguments: Value,
        deadline: Deadline,
    ) -> Result<Value, QmpError> {
        self.run_with(command, arguments, Once::Never, None, deadline)
    }

    /// As [`Qmp::run`]; `fd` goes with the command, and `once` says whether it may be sent again.
    fn run_with(
        &mut self,
        command: &'static str,
        arguments: Value,
        once: Once,
        fd: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<Value, QmpError> {
        let request = Request { word: command, arguments: &arguments, fd, once, deadline };
        let result = self.exchange(request);
        let finished = Instant::now();
        if let Some(transcript) = self.transcript.as_mut().filter(|_| !self.quiet) {
            transcript(&Exchange {
                command,
                arguments: &arguments,
                outcome: result.as_ref().map_or_else(QmpError::outcome, |_| Outcome::Answered),
                error: result.as_ref().err(),
                started: deadline.began,
                finished,
            });
        }
        result
    }

    fn exchange(&mut self, request: Request<'_>) -> Result<Value, QmpError> {
        let Request { word, deadline, .. } = request;
        if !self.usable {
            return Err(QmpError::Broken);
        }
        if deadline.left().is_none() {
            // Nothing was sent: the connection is as good as before.
            return Err(QmpError::Timeout { doing: word, waited: deadline.length });
        }
        let (answer, torn) = match &mut self.wire {
            Wire::Socket(socket) => {
                let answer = socket.exchange(request, &mut self.events);
                (answer, socket.torn)
            }
            Wire::Libvirt(passage) => (passage.exchange(request, &mut self.events), false),
        };
        match answer {
            // A late answer is waited for no more, and the next command may be tried.
            Err(error @ QmpError::Timeout { .. }) if !torn => Err(error),
            Ok(Ok(value)) => Ok(value),
            Ok(Err((class, desc))) => Err(QmpError::Refused { command: word, class, desc }),
            // So may it after a refusal.
            Err(error) if error.outcome() == Outcome::Refused => Err(error),
            Err(error) => self.poison(Err(error)),
        }
    }

    /// After any failure that passes through here the connection is not used again.
    fn poison<T>(&mut self, result: Result<T, QmpError>) -> Result<T, QmpError> {
        self.usable &= result.is_ok();
        result
    }
}

/// How often a command may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Once {
    /// It changes nothing: as often as need be.
    Never,
    /// It changes something: again only if it was surely not sent.
    Sent,
    /// The same, and it is libvirt's call for QEMU's `stop`.
    Suspended,
    /// The same, and it is libvirt's call for QEMU's `cont`.
    Resumed,
}

impl Passage {
    /// One command and its answer.
    fn exchange(
        &mut self,
        request: Request<'_>,
        events: &mut Queue<Event>,
    ) -> Result<Answer, QmpError> {
        let Request { word: doing, arguments, fd, once, deadline } = request;
        let line = json!({ "execute": doing, "arguments": arguments }).to_string();
        loop {
            let left = deadline.left().unwrap_or_default();
            let (libvirt, domain) = (&mut self.libvirt, &self.domain);
            let done =
                |done: Result<(), LibvirtError>| done.map(|()| r#"{"return":{}}"#.to_owned());
            let answer = match once {
                Once::Suspended => done(libvirt.suspend(domain, left)),
                Once::Resumed => done(libvirt.resume(domain, left)),
                Once::Never | Once::Sent => libvirt.monitor(domain, &line, fd, left),
            };
            self.hand_out(doing, events)?;
            match answer {
                Ok(text) => {
                    let breach = |what: String| QmpError::Protocol { doing, what };
                    let message = serde_json::from_str(&text)
                        .map_err(|error| breach(format!("not JSON: {error}")))?;
                    return parse_answer(&message)
                        .ok_or_else(|| breach(format!("no answer: {:?}", Excerpt::new(&text))));
                }
                Err(LibvirtError::Timeout { waited, .. }) => {
                    return Err(QmpError::Timeout { doing, waited });
                }
                Err(error) => {
                    if !error.is_lost() || (once != Once::Never && !error.is_unsent()) {
                        return Err(QmpError::Libvirt { doing, cause: error });
                    }
                    self.reconnect(doing, deadline)?;
                }
            }
        }
    }

    /// Connects anew to a libvirt that was lost, and finds the domain again: the same, running since.
    fn reconnect(&mut self, doing: &'static str, deadline: Deadline) -> Result<(), QmpError> {
        let (path, reach) = (self.libvirt.path().to_owned(), self.libvirt.reach().to_owned());
        loop {
            let left = deadline.left().unwrap_or_default();
            let found = Libvirt::connect_by(&path, &reach, &self.uri, left);
            let found = found.and_then(|mut libvirt| {
                let domain = libvirt.domain(self.domain.uuid, left)?;
                // Events are lost, and those to come are wanted.
                libvirt.listen(&domain, left).map(|_| (libvirt, domain))
            });
            match found {
                Ok((_, domain)) if domain.id != self.domain.id => {
                    let what = format!(
                        "domain {:?} was number {}, and is {}: it was started anew",
                        Excerpt::new(&domain.name),
                        self.domain.id,
                        domain.id
                    );
                    return Err(QmpError::Protocol { doing, what });
                }
                Ok((libvirt, _)) => {
                    self.libvirt = libvirt;
                    self.reconnects += 1;
                    return Ok(());
                }
                // It does not listen yet, or does not know its domains yet.
                Err(cause) if deadline.left().is_none() => {
                    return Err(QmpError::Libvirt { doing, cause });
                }
                Err(_) => std::thread::sleep(RECONNECT_PAUSE),
            }
        }
    }

    /// Hands on the events of the domain.
    fn hand_out(&mut self, doing: &'static str, events: &mut Queue<Event>) -> Result<(), QmpError> {
        for event in self.libvirt.take_events() {
            if event.domain.uuid != self.domain.uuid {
                continue;
            }
            let bytes = event.name.len() + event.data.as_ref().map_or(0, String::len);
            let data = event.data.as_deref().map_or(Ok(Value::Null), serde_json::from_str);
            let data = data.map_err(|error| QmpError::Protocol {
                doing,
                what: format!("the data of an event is not JSON: {error}"),
            })?;
            let event = Event {
                name: event.name,
                data,
                seconds: event.seconds,
                microseconds: event.microseconds.into(),
                received: event.received,
            };
            let full = |full: queue::Full| QmpError::Protocol { doing, what: full.to_string() };
            events.push(event, bytes).map_err(full)?;
        }
        Ok(())
    }

    fn poll_events(
        &mut self,
        doing: &'static str,
        events: &mut Queue<Event>,
        deadline: Deadline,
    ) -> Result<(), QmpError> {
        self.hand_out(doing, events)?;
        while events.is_empty() {
            let Some(left) = deadline.left() else { break };
            let polled = self.libvirt.poll_events(left);
            polled.map_err(|cause| QmpError::Libvirt { doing, cause })?;
            self.hand_out(doing, events)?;
        }
        Ok(())
    }
}

impl Socket {
    /// One command and its answer; its id is sent with it.
    fn exchange(
        &mut self,
        request: Request<'_>,
        events: &mut Queue<Event>,
    ) -> Result<Answer, QmpError> {
        let Request { word: doing, arguments, fd, deadline, .. } = request;
        let id = self.next_id;
        self.next_id += 1;
        let mut line =
            json!({ "execute": doing, "arguments": arguments, "id": id }).to_string().into_bytes();
        line.push(b'\n');
        self.torn = true;
        self.send(doing, &line, fd, deadline)?;
        self.torn = false;
        loop {
            let message = match self.receive(doing, deadline) {
                Err(error @ QmpError::Timeout { .. }) => {
                    self.given_up.insert(id);
                    return Err(error);
                }
                other => other?,
            };
            if let Some(answer) = self.sort_out(message, Some(id), events, doing)? {
                return Ok(answer);
            }
        }
    }

    fn poll_events(
        &mut self,
        doing: &'static str,
        events: &mut Queue<Event>,
        deadline: Deadline,
    ) -> Result<(), QmpError> {
        while events.is_empty() {
            let message = match self.receive(doing, deadline) {
                Err(QmpError::Timeout { .. }) => return Ok(()),
                other => other?,
            };
            self.sort_out(message, None, events, doing)?;
        }
        Ok(())
    }

    /// Keeps an event, drops a late answer, hands out the answer to `id`: its value, or the class
    /// and text of QEMU's refusal.
    fn sort_out(
        &mut self,
        (message, bytes): (Map<String, Value>, usize),
        id: Option<u64>,
        events: &mut Queue<Event>,
        doing: &'static str,
    ) -> Result<Option<Answer>, QmpError> {
        let breach = |what: String| QmpError::Protocol { doing, what };
        if message.contains_key("event") {
            let event = parse_event(&message)
                .ok_or_else(|| breach(format!("odd event {:?}", Excerpt::new(&show(&message)))))?;
            events.push(event, bytes).map_err(|full| breach(full.to_string()))?;
            return Ok(None);
        }
        let answer = parse_answer(&message).ok_or_else(|| {
            breach(format!("neither answer nor event: {:?}", Excerpt::new(&show(&message))))
        })?;
        match message.get("id").and_then(Value::as_u64) {
            Some(got) if Some(got) == id => Ok(Some(answer)),
            Some(late) if self.given_up.remove(&late) => Ok(None),
            _ => {
                let got = message.get("id").map_or("none".into(), Value::to_string);
                let sent = id.map_or("none".into(), |id| id.to_string());
                Err(breach(format!("the answer's id is {:?}, not {sent}", Excerpt::new(&got))))
            }
        }
    }

    fn send(
        &mut self,
        doing: &'static str,
        line: &[u8],
        mut fd: Option<BorrowedFd<'_>>,
        deadline: Deadline,
    ) -> Result<(), QmpError> {
        let mut rest = line;
        while !rest.is_empty() {
            let timeout = QmpError::Timeout { doing, waited: deadline.length };
            let Some(left) = deadline.left() else { return Err(timeout) };
            let io = |source| QmpError::Io { doing, source };
            self.stream.set_write_timeout(Some(left)).map_err(io)?;
            let sent = match fd {
                Some(fd) => send_with(&self.stream, rest, fd),
                None => self.stream.write(rest),
            };
            match sent {
                Ok(0) => return Err(QmpError::Closed { doing }),
                Ok(n) => (rest, fd) = (rest.get(n..).unwrap_or_default(), None),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {}
                    io::ErrorKind::BrokenPipe => return Err(QmpError::Closed { doing }),
                    _ => return Err(io(error)),
                },
            }
        }
        Ok(())
    }

    /// The next JSON object, and how long it was in bytes.
    fn receive(
        &mut self,
        doing: &'static str,
        deadline: Deadline,
    ) -> Result<(Map<String, Value>, usize), QmpError> {
        let breach = |what: String| QmpError::Protocol { doing, what };
        let mut chunk = [0; 64 << 10];
        loop {
            match self.framer.next(MAX_MESSAGE) {
                Ok(Some(message)) => {
                    let object = serde_json::from_slice(&message);
                    return object
                        .map(|object| (object, message.len()))
                        .map_err(|error| breach(format!("not JSON: {error}")));
                }
                Ok(None) => {}
                Err(FrameError::TooLong) => {
                    return Err(breach(format!("a message of more than {MAX_MESSAGE} bytes")));
                }
                Err(FrameError::Garbage(text)) => {
                    return Err(breach(format!("not JSON: {text:?}")));
                }
            }
            let timeout = QmpError::Timeout { doing, waited: deadline.length };
            let Some(left) = deadline.left() else { return Err(timeout) };
            let io = |source| QmpError::Io { doing, source };
            self.stream.set_read_timeout(Some(left)).map_err(io)?;
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(QmpError::Closed { doing }),
                Ok(n) => self.framer.push(chunk.get(..n).unwrap_or_default()),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => {}
                    io::ErrorKind::ConnectionReset => return Err(QmpError::Closed { doing }),
                    _ => return Err(io(error)),
                },
            }
        }
    }
}

/// Sends some of `bytes`, and `fd` with the first.
fn send_with(stream: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let pieces = [IoSlice::new(bytes)];
    Ok(rustix::net::sendmsg(stream, &pieces, &mut control, SendFlags::NOSIGNAL)?)
}

/// Who listens on the socket at `path`, without a word to them. A monitor that has no client takes
/// us for one until we are gone; a busy one does not notice.
///
/// # Errors
/// [`QmpError::Connect`], [`QmpError::Busy`] when the listen queue stays full for `deadline`,
/// [`QmpError::Io`].
pub fn peer_of(path: &Path, deadline: Duration) -> Result<PeerCred, QmpError> {
    peer(&connect_unix(path, Deadline::new(deadline))?)
}

fn peer(stream: &UnixStream) -> Result<PeerCred, QmpError> {
    unix::peer(stream).map_err(|source| QmpError::Io { doing: "SO_PEERCRED", source })
}

/// The value of an answer, or class and text of a refusal.
type Answer = Result<Value, (Excerpt, Excerpt)>;

fn parse_answer(message: &Map<String, Value>) -> Option<Answer> {
    if let Some(value) = message.get("return") {
        return Some(Ok(value.clone()));
    }
    let error = message.get("error")?;
    let text = |key: &str| Some(Excerpt::new(error.get(key)?.as_str()?));
    Some(Err((text("class")?, text("desc")?)))
}

fn parse_event(message: &Map<String, Value>) -> Option<Event> {
    let time = message.get("timestamp")?;
    Some(Event {
        name: message.get("event")?.as_str()?.into(),
        data: message.get("data").cloned().unwrap_or(Value::Null),
        seconds: time.get("seconds")?.as_i64()?,
        microseconds: time.get("microseconds")?.as_i64()?,
        received: Instant::now(),
    })
}

fn show(message: &Map<String, Value>) -> String {
    serde_json::to_string(message).unwrap_or_default()
}

fn connect_unix(path: &Path, deadline: Deadline) -> Result<UnixStream, QmpError> {
    unix::connect(path, deadline).map_err(|failed| match failed {
        Failed::Os(errno) => QmpError::Connect { path: path.into(), source: errno.into() },
        Failed::Full => QmpError::Busy { path: path.into(), waited: deadline.length },
    })
}
