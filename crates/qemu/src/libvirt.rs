//! A client of libvirt's RPC over its local sockets, with a deadline on everything: libvirt's XDR by hand,
//! no C library (`remote_protocol.x`, `qemu_protocol.x`; the numbers never change).
//!
//! What can be sent are the members of [`Procedure`]: queries about domains, the passage of QMP commands
//! to a domain's monitor, `DOMAIN_MEMORY_PEEK`, libvirt's own core dump, and a domain's suspension and its
//! end. A passage marks the domain as tainted (`custom-monitor`) in libvirt's eyes and log; nothing else
//! here does.
//!
//! The peer is trusted as far as QMP's is: lengths are bounded, serials checked, and after a breach of
//! protocol the connection is not used again.

mod event;
mod packet;
mod procedure;
mod state;
mod xdr;

use crate::deadline::Deadline;
use crate::qmp::PeerCred;
use crate::queue::{self, Queue};
use crate::text::Excerpt;
use crate::unix::{self, Failed};
use packet::{Header, Inbox, Kind, PacketError, Status};
use procedure::{LIFECYCLE_EVENT, MONITOR_EVENT, QEMU, REMOTE, VERSION};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use xdr::{Decoder, Encoder};

pub use event::{Lifecycle, LifecycleEvent, MonitorEvent};
pub use procedure::Procedure;
pub use state::{ControlInfo, ControlState, Info, RunState, State};
pub use xdr::XdrError;

/// Ways to prove who one is (`remote_auth_type`).
const AUTH_NONE: i32 = 0;
const AUTH_SASL: i32 = 1;
const AUTH_POLKIT: i32 = 2;

/// Domains that a list may hold (`REMOTE_DOMAIN_LIST_MAX`).
const MAX_DOMAINS: usize = 16_384;

/// Events of each kind that may wait to be taken, by [`Libvirt::take_events`] and
/// [`Libvirt::take_lifecycle`]; and 16 MiB of them.
pub const MAX_EVENTS: usize = queue::MAX_EVENTS;

/// Most bytes that [`Libvirt::peek`] gives (`REMOTE_DOMAIN_MEMORY_PEEK_BUFFER_MAX`).
pub const MAX_PEEK: u32 = 4 << 20;

/// Kind of address that [`Libvirt::peek`] takes (`VIR_MEMORY_PHYSICAL`).
const PHYSICAL: u32 = 2;

/// A list of those that run (`VIR_CONNECT_LIST_DOMAINS_ACTIVE`).
const ACTIVE: u32 = 1;

/// A passage of JSON, not of a line of the human monitor: such lines go as JSON too, so that there is one
/// way.
const JSON: u32 = 0;

/// How long libvirt may take to see us off.
const GOODBYE: Duration = Duration::from_millis(250);

/// Events of domains' lives (`VIR_DOMAIN_EVENT_ID_LIFECYCLE`).
const LIFECYCLE: i32 = 0;

/// QEMU's dump-guest-memory, and no migration (`VIR_DUMP_MEMORY_ONLY`); what it writes does not stay in the
/// host's page cache (`VIR_DUMP_BYPASS_CACHE`). Never a domain that is reset, crashed or left running.
const MEMORY_ONLY: u32 = 16;
const BYPASS_CACHE: u32 = 4;

/// What went wrong between us and libvirt.
#[derive(Debug, thiserror::Error)]
pub enum LibvirtError {
    /// The socket cannot be reached.
    #[error("cannot connect to libvirt's socket {}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// libvirt wants to know more of us than the kernel tells it, or polkit.
    #[error("libvirt's socket {} asks for authentication ({methods}), which is not offered here", path.display())]
    Authentication {
        /// The socket.
        path: PathBuf,
        /// `SASL`, `polkit`.
        methods: String,
    },
    /// No answer in time. A late answer is dropped when it comes.
    #[error("libvirt did not answer {doing} within {:.1} s", waited.as_secs_f64())]
    Timeout {
        /// The procedure.
        doing: &'static str,
        /// How long we waited.
        waited: Duration,
    },
    /// libvirt closed the connection: it ended, or started anew.
    #[error("libvirt closed the connection during {doing}")]
    Closed {
        /// The procedure.
        doing: &'static str,
        /// The whole question had been sent: libvirt may have carried it out.
        sent: bool,
    },
    /// The socket failed.
    #[error("libvirt's socket failed during {doing}")]
    Io {
        /// The procedure.
        doing: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// libvirt does not keep to its protocol.
    #[error("libvirt broke the protocol during {doing}: {what}")]
    Protocol {
        /// The procedure.
        doing: &'static str,
        /// What it did.
        what: String,
    },
    /// libvirt refused.
    #[error("libvirt refused {doing} with error {code} (domain {domain}): {message}")]
    Refused {
        /// The procedure.
        doing: &'static str,
        /// libvirt's code (`virErrorNumber`).
        code: i32,
        /// libvirt's part that refused (`virErrorDomain`).
        domain: i32,
        /// libvirt's text.
        message: Excerpt,
    },
    /// The connection only reads.
    #[error("{doing} needs a connection to libvirt that does not only read, and {} was opened so", path.display())]
    ReadOnly {
        /// The procedure, which was not sent.
        doing: &'static str,
        /// The socket.
        path: PathBuf,
    },
    /// libvirt's daemon has another working directory than we.
    #[error("libvirt needs a whole path to write a dump to, not {}", path.display())]
    Relative {
        /// The path.
        path: PathBuf,
    },
    /// An earlier failure left the connection unusable.
    #[error("the connection to libvirt is no longer usable after an earlier failure")]
    Broken,
}

impl LibvirtError {
    /// Whether another connection may do better: this one is gone.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Connect { .. } | Self::Broken)
    }

    /// Whether libvirt surely never carried it out.
    pub fn is_unsent(&self) -> bool {
        matches!(
            self,
            Self::Closed { sent: false, .. }
                | Self::Connect { .. }
                | Self::Authentication { .. }
                | Self::ReadOnly { .. }
                | Self::Relative { .. }
                | Self::Broken
        )
    }

    /// libvirt's code (`virErrorNumber`) when it refused.
    pub fn code(&self) -> Option<i32> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            _ => None,
        }
    }
}

/// `VIR_ERR_NO_DOMAIN`: there is no such domain.
pub const NO_DOMAIN: i32 = 42;

/// `VIR_ERR_OPERATION_INVALID`: the domain is not in a state for it, such as one that runs for its
/// resumption.
pub const OPERATION_INVALID: i32 = 55;

/// `VIR_ERR_OPERATION_TIMEOUT`: another job kept the domain for 30 s.
pub const OPERATION_TIMEOUT: i32 = 68;

/// A domain, as libvirt names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: [u8; 16],
    /// Its number while it runs, else -1.
    pub id: i32,
}

impl Domain {
    fn encode(&self, e: &mut Encoder) {
        e.bytes(self.name.as_bytes()).fixed(&self.uuid).i32(self.id);
    }

    fn decode(d: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(Self { name: d.string()?, uuid: d.fixed()?, id: d.i32()? })
    }

    /// The UUID as it is written: `3f2ad7c0-....`.
    pub fn uuid_text(&self) -> String {
        let mut text = String::with_capacity(36);
        for (at, byte) in self.uuid.iter().enumerate() {
            if matches!(at, 4 | 6 | 8 | 10) {
                text.push('-');
            }
            text.push_str(&format!("{byte:02x}"));
        }
        text
    }
}

/// What a libvirt may be able to do (`virDrvFeature`). Whether it sends keepalives is not asked: asked, it
/// begins to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Feature {
    /// Descriptors may be sent (`VIR_DRV_FEATURE_FD_PASSING`).
    FdPassing,
    /// Events name their registration (`VIR_DRV_FEATURE_REMOTE_EVENT_CALLBACK`), which
    /// [`Libvirt::watch`] needs.
    EventCallback,
}

/// How a dump is written (`virDomainCoreDumpFormat`). Not QEMU's `win-dmp`, which writes guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DumpFormat {
    /// QEMU's ELF.
    Elf,
    /// kdump, compressed with zlib.
    KdumpZlib,
    /// kdump, compressed with lzo.
    KdumpLzo,
    /// kdump, compressed with snappy.
    KdumpSnappy,
}

/// A registration for events, ended by [`Libvirt::unwatch`] or with the connection.
#[derive(Debug, PartialEq, Eq)]
pub struct Watch {
    id: i32,
    end: Procedure,
}

/// The host's domains.
pub const SYSTEM: &str = "qemu:///system";

/// A user's domains.
pub const SESSION: &str = "qemu:///session";

/// A connection.
#[derive(Debug)]
pub struct Libvirt {
    stream: UnixStream,
    path: PathBuf,
    reach: PathBuf,
    read_only: bool,
    inbox: Inbox,
    serial: u32,
    /// Serials of calls that timed out: their late answers are dropped.
    given_up: BTreeSet<u32>,
    events: Queue<MonitorEvent>,
    lifecycle: Queue<LifecycleEvent>,
    usable: bool,
}

impl Libvirt {
    /// Connects to the socket at `path` and opens `uri` there, [`SYSTEM`] or [`SESSION`], all within
    /// `timeout`. A socket that only reads is opened so.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn connect(path: &Path, uri: &str, timeout: Duration) -> Result<Self, LibvirtError> {
        Self::connect_by(path, path, uri, timeout)
    }

    /// As [`Libvirt::connect`]; the socket is reached at `reach`, as where it lies is seen otherwise from
    /// here.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn connect_by(
        path: &Path,
        reach: &Path,
        uri: &str,
        timeout: Duration,
    ) -> Result<Self, LibvirtError> {
        let deadline = Deadline::new(timeout);
        let stream = connect(reach, deadline)?;
        let read_only = path.to_string_lossy().ends_with("-ro");
        let mut libvirt = Self::open(stream, path, uri, read_only, deadline)?;
        reach.clone_into(&mut libvirt.reach);
        Ok(libvirt)
    }

    /// As [`Libvirt::connect`], only to look: nothing that changes a domain can be sent, nor anything to
    /// its monitor.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn connect_to_look(
        path: &Path,
        uri: &str,
        timeout: Duration,
    ) -> Result<Self, LibvirtError> {
        let deadline = Deadline::new(timeout);
        let stream = connect(path, deadline)?;
        Self::open(stream, path, uri, true, deadline)
    }

    /// Speaks over a connected stream; `path` is what errors call it.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn over(
        stream: UnixStream,
        path: &Path,
        uri: &str,
        timeout: Duration,
    ) -> Result<Self, LibvirtError> {
        Self::open(stream, path, uri, false, Deadline::new(timeout))
    }

    fn open(
        stream: UnixStream,
        path: &Path,
        uri: &str,
        read_only: bool,
        deadline: Deadline,
    ) -> Result<Self, LibvirtError> {
        let mut libvirt = Self {
            stream,
            path: path.to_owned(),
            reach: path.to_owned(),
            read_only,
            inbox: Inbox::default(),
            serial: 0,
            given_up: BTreeSet::new(),
            events: Queue::default(),
            lifecycle: Queue::default(),
            usable: true,
        };
        let authenticated = libvirt.authenticate(deadline);
        libvirt.poison(authenticated)?;
        let open = |e: &mut Encoder| {
            e.optional(Some(uri), |e, uri| {
                e.bytes(uri.as_bytes());
            });
            e.u32(u32::from(read_only));
        };
        libvirt.call(Procedure::ConnectOpen, open, |_| Ok(()), deadline)?;
        Ok(libvirt)
    }

    /// Root is asked for nothing (`remoteDispatchAuthList`). Of other users libvirt asks polkit: stock
    /// hosts let all of them look, and those of the group `libvirt` do everything.
    fn authenticate(&mut self, deadline: Deadline) -> Result<(), LibvirtError> {
        let methods =
            self.call(Procedure::AuthList, |_| {}, |d| d.array(20, Decoder::i32), deadline)?;
        if methods.contains(&AUTH_NONE) {
            return Ok(());
        }
        if methods.contains(&AUTH_POLKIT) {
            let complete = self.call(Procedure::AuthPolkit, |_| {}, |d| d.i32(), deadline)?;
            if complete == 1 {
                return Ok(());
            }
        }
        let word = |method: &i32| match *method {
            AUTH_SASL => "SASL".to_owned(),
            AUTH_POLKIT => "polkit".to_owned(),
            other => other.to_string(),
        };
        let methods = methods.iter().map(word).collect::<Vec<_>>().join(", ");
        Err(LibvirtError::Authentication { path: self.path.clone(), methods })
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is reached from here.
    pub fn reach(&self) -> &Path {
        &self.reach
    }

    /// Whether the connection only reads.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Who listens on the socket: libvirt, or what started it when it is first spoken to. A
    /// [`SYSTEM`] libvirt's is root outside of containers; whoever else serves one tells of domains
    /// what they like.
    ///
    /// # Errors
    /// [`LibvirtError::Io`].
    pub fn peer(&self) -> Result<PeerCred, LibvirtError> {
        unix::peer(&self.stream).map_err(|cause| LibvirtError::Io { doing: "SO_PEERCRED", cause })
    }

    /// libvirt's version: major, minor, release.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn version(&mut self, timeout: Duration) -> Result<(u64, u64, u64), LibvirtError> {
        self.ask(Procedure::LibVersion, |_| {}, |d| d.u64(), timeout).map(parts)
    }

    /// The version of the QEMU that libvirt starts domains with, unless they name another: major, minor,
    /// release. Of a domain's own, its monitor tells.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn hypervisor_version(
        &mut self,
        timeout: Duration,
    ) -> Result<(u64, u64, u64), LibvirtError> {
        self.ask(Procedure::HypervisorVersion, |_| {}, |d| d.u64(), timeout).map(parts)
    }

    /// Whether this libvirt can do it.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn supports(&mut self, feature: Feature, timeout: Duration) -> Result<bool, LibvirtError> {
        let number = match feature {
            Feature::FdPassing => 8,
            Feature::EventCallback => 14,
        };
        let ask = |e: &mut Encoder| {
            e.i32(number);
        };
        self.ask(Procedure::SupportsFeature, ask, |d| d.i32(), timeout).map(|yes| yes != 0)
    }

    /// The domains that run.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn domains(&mut self, timeout: Duration) -> Result<Vec<Domain>, LibvirtError> {
        self.ask(
            Procedure::ListAllDomains,
            |e| {
                e.i32(1).u32(ACTIVE);
            },
            |d| {
                let domains = d.array(MAX_DOMAINS, Domain::decode)?;
                d.u32()?;
                Ok(domains)
            },
            timeout,
        )
    }

    /// The domain with this UUID.
    ///
    /// # Errors
    /// [`LibvirtError::Refused`] with [`NO_DOMAIN`] when there is none.
    pub fn domain(&mut self, uuid: [u8; 16], timeout: Duration) -> Result<Domain, LibvirtError> {
        let ask = |e: &mut Encoder| {
            e.fixed(&uuid);
        };
        self.ask(Procedure::LookupByUuid, ask, Domain::decode, timeout)
    }

    /// The domain of this name.
    ///
    /// # Errors
    /// [`LibvirtError::Refused`] with [`NO_DOMAIN`] when there is none.
    pub fn domain_named(&mut self, name: &str, timeout: Duration) -> Result<Domain, LibvirtError> {
        let ask = |e: &mut Encoder| {
            e.bytes(name.as_bytes());
        };
        self.ask(Procedure::LookupByName, ask, Domain::decode, timeout)
    }

    /// The running domain with this number.
    ///
    /// # Errors
    /// [`LibvirtError::Refused`] with [`NO_DOMAIN`] when there is none.
    pub fn domain_numbered(&mut self, id: i32, timeout: Duration) -> Result<Domain, LibvirtError> {
        let ask = |e: &mut Encoder| {
            e.i32(id);
        };
        self.ask(Procedure::LookupById, ask, Domain::decode, timeout)
    }

    /// The domain's XML, without secrets. QEMU's process is not named in it.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn xml(&mut self, domain: &Domain, timeout: Duration) -> Result<String, LibvirtError> {
        let ask = |e: &mut Encoder| {
            domain.encode(e);
            e.u32(0);
        };
        self.ask(Procedure::XmlDesc, ask, |d| d.string(), timeout)
    }

    /// Whether the domain runs, as libvirt knows: QEMU is not asked.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn state(&mut self, domain: &Domain, timeout: Duration) -> Result<State, LibvirtError> {
        let ask = |e: &mut Encoder| {
            domain.encode(e);
            e.u32(0);
        };
        self.ask(Procedure::State, ask, State::decode, timeout)
    }

    /// The domain's size, and what it used.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn info(&mut self, domain: &Domain, timeout: Duration) -> Result<Info, LibvirtError> {
        self.ask(Procedure::Info, |e| domain.encode(e), Info::decode, timeout)
    }

    /// Whether libvirt is free to speak with the domain's QEMU. What is asked while it is not waits, 30 s at
    /// most, and is refused then.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn control(
        &mut self,
        domain: &Domain,
        timeout: Duration,
    ) -> Result<ControlInfo, LibvirtError> {
        let ask = |e: &mut Encoder| {
            domain.encode(e);
            e.u32(0);
        };
        self.ask(Procedure::ControlInfo, ask, ControlInfo::decode, timeout)
    }

    /// Stops the domain's CPUs, and libvirt knows why: by a user. One that stands already stays as it is.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn suspend(&mut self, domain: &Domain, timeout: Duration) -> Result<(), LibvirtError> {
        self.ask(Procedure::Suspend, |e| domain.encode(e), |_| Ok(()), timeout)
    }

    /// Lets the CPUs of a domain run on that stand: only ever of one that [`Libvirt::suspend`] stopped.
    /// Unlike QMP's `cont`, this takes back the leases of the domain's disks, which libvirt gives up
    /// whenever the CPUs stop (`virDomainLockProcessResume`).
    ///
    /// # Errors
    /// [`LibvirtError::Refused`] with [`OPERATION_INVALID`] when it runs already.
    pub fn resume(&mut self, domain: &Domain, timeout: Duration) -> Result<(), LibvirtError> {
        self.ask(Procedure::Resume, |e| domain.encode(e), |_| Ok(()), timeout)
    }

    /// libvirt's own dump of the domain's memory: it stops the domain, has QEMU write to what it opens at
    /// `to` on the daemon's side (truncated; made if need be, by and for root or QEMU's user), and lets the
    /// domain run on if it ran. `bypass_cache` opens a file with O_DIRECT.
    ///
    /// `to` may be a FIFO whose other end is held here: then nothing of the guest is written to a disk (seen
    /// with libvirt 9.0.0). A reader that leaves ends the dump, and the domain runs on; one that hangs keeps
    /// the domain stopped.
    ///
    /// After a [`LibvirtError::Timeout`] it goes on: [`Libvirt::abort_job`] on another connection ends it.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn core_dump(
        &mut self,
        domain: &Domain,
        to: &Path,
        format: DumpFormat,
        bypass_cache: bool,
        timeout: Duration,
    ) -> Result<(), LibvirtError> {
        if !to.is_absolute() {
            return Err(LibvirtError::Relative { path: to.to_owned() });
        }
        let format = match format {
            DumpFormat::Elf => 0,
            DumpFormat::KdumpZlib => 1,
            DumpFormat::KdumpLzo => 2,
            DumpFormat::KdumpSnappy => 3,
        };
        let ask = |e: &mut Encoder| {
            domain.encode(e);
            e.bytes(to.as_os_str().as_bytes()).u32(format);
            e.u32(MEMORY_ONLY | if bypass_cache { BYPASS_CACHE } else { 0 });
        };
        self.ask(Procedure::CoreDump, ask, |_| Ok(()), timeout)
    }

    /// Ends the job that is under way on the domain: only ever one that [`Libvirt::core_dump`] began.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn abort_job(&mut self, domain: &Domain, timeout: Duration) -> Result<(), LibvirtError> {
        self.ask(Procedure::AbortJob, |e| domain.encode(e), |_| Ok(()), timeout)
    }

    /// Passes a QMP command to the domain's monitor; what QEMU answers. `fd` goes with it to QEMU. Marks the
    /// domain as tainted.
    ///
    /// # Errors
    /// [`LibvirtError`]; a refusal by QEMU is in the answer.
    pub(crate) fn monitor(
        &mut self,
        domain: &Domain,
        command: &str,
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<String, LibvirtError> {
        let procedure = if fd.is_some() { Procedure::MonitorWithFiles } else { Procedure::Monitor };
        let ask = |e: &mut Encoder| {
            domain.encode(e);
            e.bytes(command.as_bytes()).u32(JSON);
        };
        self.call_with(procedure, ask, fd, |d| d.string(), Deadline::new(timeout))
    }

    /// From here on the events of the domain's QEMU come too, for [`Libvirt::take_events`]. libvirt hears them
    /// anyway: this taints nothing.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn listen(&mut self, domain: &Domain, timeout: Duration) -> Result<Watch, LibvirtError> {
        let ask = |e: &mut Encoder| {
            e.optional(Some(domain), |e, domain| domain.encode(e));
            e.optional(None::<()>, |_, ()| {}).u32(0);
        };
        let id = self.ask(Procedure::MonitorEventRegister, ask, |d| d.i32(), timeout)?;
        Ok(Watch { id, end: Procedure::MonitorEventDeregister })
    }

    /// From here on what becomes of the domain, or of all, comes too, for [`Libvirt::take_lifecycle`].
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn watch(
        &mut self,
        domain: Option<&Domain>,
        timeout: Duration,
    ) -> Result<Watch, LibvirtError> {
        let ask = |e: &mut Encoder| {
            e.i32(LIFECYCLE).optional(domain, |e, domain| domain.encode(e));
        };
        let id = self.ask(Procedure::EventRegister, ask, |d| d.i32(), timeout)?;
        Ok(Watch { id, end: Procedure::EventDeregister })
    }

    /// From here on those events come no more.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn unwatch(&mut self, watch: &Watch, timeout: Duration) -> Result<(), LibvirtError> {
        let ask = |e: &mut Encoder| {
            e.i32(watch.id);
        };
        self.ask(watch.end, ask, |_| Ok(()), timeout)
    }

    /// Guest-physical memory by QEMU's `pmemsave`, at most [`MAX_PEEK`] bytes. libvirt lets QEMU write it
    /// into a file on the host's disk (`qemu.mem.` and six letters, 0600, in the domain's directory below
    /// `/var/lib/libvirt/qemu`; of older ones in libvirt's cache), reads that, and removes it.
    ///
    /// As many bytes come as were asked for, whatever the file held: libvirt (9.0.0, `qemuDomainMemoryPeek`)
    /// takes a short file for a whole one, and what is missing comes as zeros. So what it gives is to be
    /// held against another reading.
    ///
    /// # Errors
    /// [`LibvirtError`]; `Protocol` when another number of bytes comes than was asked for.
    pub fn peek(
        &mut self,
        domain: &Domain,
        gpa: u64,
        len: u32,
        timeout: Duration,
    ) -> Result<Vec<u8>, LibvirtError> {
        let ask = |e: &mut Encoder| {
            domain.encode(e);
            e.u64(gpa).u32(len).u32(PHYSICAL);
        };
        let most = usize::try_from(MAX_PEEK).unwrap_or(0);
        let take = |d: &mut Decoder<'_>| d.bytes(most).map(<[u8]>::to_vec);
        let bytes = self.ask(Procedure::MemoryPeek, ask, take, timeout)?;
        match u32::try_from(bytes.len()) == Ok(len) {
            true => Ok(bytes),
            false => Err(LibvirtError::Protocol {
                doing: Procedure::MemoryPeek.word(),
                what: format!("{len} bytes were asked for, {} came", bytes.len()),
            }),
        }
    }

    /// Takes the events read so far, in order.
    pub fn take_events(&mut self) -> Vec<MonitorEvent> {
        self.events.take()
    }

    /// Takes the events of domains' lives read so far, in order.
    pub fn take_lifecycle(&mut self) -> Vec<LifecycleEvent> {
        self.lifecycle.take()
    }

    /// Reads events for as long as `wait`, or until the first one of either kind is there.
    ///
    /// # Errors
    /// The variants that end a connection; that no event came is none.
    pub fn poll_events(&mut self, wait: Duration) -> Result<(), LibvirtError> {
        const DOING: &str = "waiting for events";
        if !self.usable {
            return Err(LibvirtError::Broken);
        }
        let deadline = Deadline::new(wait);
        while self.events.is_empty() && self.lifecycle.is_empty() {
            match self.receive(DOING, deadline) {
                Err(LibvirtError::Timeout { .. }) => return Ok(()),
                packet => {
                    let sorted = packet.and_then(|packet| self.sort_out(packet, None, DOING));
                    self.poison(sorted)?;
                }
            }
        }
        Ok(())
    }

    fn ask<T>(
        &mut self,
        procedure: Procedure,
        encode: impl FnOnce(&mut Encoder),
        decode: impl FnOnce(&mut Decoder<'_>) -> Result<T, XdrError>,
        timeout: Duration,
    ) -> Result<T, LibvirtError> {
        self.call(procedure, encode, decode, Deadline::new(timeout))
    }

    fn call<T>(
        &mut self,
        procedure: Procedure,
        encode: impl FnOnce(&mut Encoder),
        decode: impl FnOnce(&mut Decoder<'_>) -> Result<T, XdrError>,
        deadline: Deadline,
    ) -> Result<T, LibvirtError> {
        self.call_with(procedure, encode, None, decode, deadline)
    }

    /// Sends, waits, decodes.
    fn call_with<T>(
        &mut self,
        procedure: Procedure,
        encode: impl FnOnce(&mut Encoder),
        fd: Option<BorrowedFd<'_>>,
        decode: impl FnOnce(&mut Decoder<'_>) -> Result<T, XdrError>,
        deadline: Deadline,
    ) -> Result<T, LibvirtError> {
        let doing = procedure.word();
        if !self.usable {
            return Err(LibvirtError::Broken);
        }
        if self.read_only && !procedure.only_reads() {
            return Err(LibvirtError::ReadOnly { doing, path: self.path.clone() });
        }
        if deadline.left().is_none() {
            // Nothing was sent: the connection is as good as before.
            return Err(LibvirtError::Timeout { doing, waited: deadline.length });
        }
        self.serial = self.serial.wrapping_add(1);
        let (program, number) = procedure.number();
        let header = Header {
            program,
            version: VERSION,
            procedure: number,
            kind: if fd.is_some() { Kind::CallWithFds } else { Kind::Call },
            serial: self.serial,
            status: Status::Ok,
        };
        let mut payload = Encoder::default();
        encode(&mut payload);
        let packet = header.encode(&payload.take(), usize::from(fd.is_some()));
        let sent = packet::send(&mut self.stream, &packet, fd, deadline)
            .map_err(|error| failed(error, doing, false, deadline));
        self.poison(sent)?;
        loop {
            let packet = match self.receive(doing, deadline) {
                Err(error @ LibvirtError::Timeout { .. }) => {
                    self.given_up.insert(header.serial);
                    return Err(error);
                }
                other => self.poison(other)?,
            };
            let answer = self.sort_out(packet, Some(header), doing);
            let Some((status, payload)) = self.poison(answer)? else { continue };
            let breach =
                |error: XdrError| LibvirtError::Protocol { doing, what: error.to_string() };
            let mut d = Decoder::new(&payload);
            if status == Status::Error {
                let refusal = refusal(&mut d, doing).map_err(breach);
                return Err(self.poison(refusal)?);
            }
            let value = decode(&mut d).and_then(|value| d.end().map(|()| value)).map_err(breach);
            return self.poison(value);
        }
    }

    fn receive(
        &mut self,
        doing: &'static str,
        deadline: Deadline,
    ) -> Result<(Header, Vec<u8>), LibvirtError> {
        let received = self.inbox.receive(&mut self.stream, deadline);
        received.map_err(|error| failed(error, doing, true, deadline))
    }

    /// After any failure that passes through here the connection is not used again.
    fn poison<T>(&mut self, result: Result<T, LibvirtError>) -> Result<T, LibvirtError> {
        self.usable &= result.is_ok();
        result
    }

    /// Keeps an event, drops a late answer, hands out the answer to `call`.
    fn sort_out(
        &mut self,
        (header, payload): (Header, Vec<u8>),
        call: Option<Header>,
        doing: &'static str,
    ) -> Result<Option<(Status, Vec<u8>)>, LibvirtError> {
        let breach = |what: String| LibvirtError::Protocol { doing, what };
        let odd = |error: XdrError| breach(format!("an event: {error}"));
        let full = |full: queue::Full| breach(full.to_string());
        match header.kind {
            Kind::Message if (header.program, header.procedure) == (QEMU, MONITOR_EVENT) => {
                let event = MonitorEvent::decode(&payload).map_err(odd)?;
                self.events.push(event, payload.len()).map_err(full)?;
                Ok(None)
            }
            Kind::Message if (header.program, header.procedure) == (REMOTE, LIFECYCLE_EVENT) => {
                let event = LifecycleEvent::decode(&payload).map_err(odd)?;
                self.lifecycle.push(event, payload.len()).map_err(full)?;
                Ok(None)
            }
            // Others that nobody here asked for.
            Kind::Message => Ok(None),
            Kind::Reply => {
                let of = |header: Header| (header.program, header.procedure, header.serial);
                if call.is_some_and(|call| of(call) == of(header)) {
                    return Ok(Some((header.status, payload)));
                }
                match self.given_up.remove(&header.serial) {
                    true => Ok(None),
                    false => Err(breach(format!("an answer to call {}", header.serial))),
                }
            }
            Kind::Call | Kind::CallWithFds => Err(breach("libvirt calls us".to_owned())),
        }
    }
}

/// libvirt writes an error into its log for each client that leaves first.
impl Drop for Libvirt {
    fn drop(&mut self) {
        const DOING: &str = "leaving";
        let deadline = Deadline::new(GOODBYE);
        let mut seen_off = self.call(Procedure::ConnectClose, |_| {}, |_| Ok(()), deadline);
        // It is libvirt that closes then, once it has said the last that it had to say.
        while seen_off.is_ok() {
            seen_off = self.receive(DOING, deadline).map(drop);
        }
    }
}

fn failed(error: PacketError, doing: &'static str, sent: bool, deadline: Deadline) -> LibvirtError {
    match error {
        PacketError::Late => LibvirtError::Timeout { doing, waited: deadline.length },
        PacketError::Closed => LibvirtError::Closed { doing, sent },
        PacketError::Io(cause) => LibvirtError::Io { doing, cause },
        odd => LibvirtError::Protocol { doing, what: odd.to_string() },
    }
}

/// libvirt's versions are one number: major * 1,000,000 + minor * 1,000 + release.
fn parts(number: u64) -> (u64, u64, u64) {
    (number / 1_000_000, number / 1000 % 1000, number % 1000)
}

/// `remote_error`: of it code, part and text.
fn refusal(d: &mut Decoder<'_>, doing: &'static str) -> Result<LibvirtError, XdrError> {
    let (code, domain) = (d.i32()?, d.i32()?);
    let message = d.optional(Decoder::string)?.unwrap_or_default();
    d.i32()?;
    d.optional(Domain::decode)?;
    for _ in 0..3 {
        d.optional(Decoder::string)?;
    }
    // Two numbers and a network, which no call here is about.
    d.i32()?;
    d.i32()?;
    let message = Excerpt::new(&message);
    Ok(LibvirtError::Refused { doing, code, domain, message })
}

fn connect(path: &Path, deadline: Deadline) -> Result<UnixStream, LibvirtError> {
    unix::connect(path, deadline).map_err(|failed| match failed {
        Failed::Os(errno) => LibvirtError::Connect { path: path.to_owned(), cause: errno.into() },
        Failed::Full => LibvirtError::Timeout { doing: "connect", waited: deadline.length },
    })
}
