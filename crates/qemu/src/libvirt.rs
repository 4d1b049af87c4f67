//! A client of libvirt's RPC over its local sockets, with a deadline on everything: libvirt's XDR by hand,
//! no C library (`remote_protocol.x`, `qemu_protocol.x`; the numbers never change).
//!
//! What can be sent are the members of [`Procedure`]: queries about domains, the passage of QMP commands
//! to a domain's monitor, `DOMAIN_MEMORY_PEEK`, and a domain's suspension and its end. A passage marks
//! the domain as tainted (`custom-monitor`) in libvirt's eyes and log.
//!
//! The peer is trusted as far as QMP's is: lengths are bounded, serials checked, and after a breach of
//! protocol the connection is not used again.

mod packet;
mod xdr;

use crate::deadline::Deadline;
use crate::text::Excerpt;
use crate::unix::{self, Failed};
use packet::{Header, Inbox, Kind, PacketError, Status};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use xdr::{Decoder, Encoder};

pub use xdr::XdrError;

/// Domains that a list may hold (`REMOTE_DOMAIN_LIST_MAX`).
const MAX_DOMAINS: usize = 16_384;

/// Events that may wait to be taken by [`Libvirt::take_events`].
pub const MAX_EVENTS: usize = 16_384;

/// Most bytes that [`Libvirt::peek`] gives (`REMOTE_DOMAIN_MEMORY_PEEK_BUFFER_MAX`).
pub const MAX_PEEK: u32 = 4 << 20;

/// Kind of address that [`Libvirt::peek`] takes (`VIR_MEMORY_PHYSICAL`).
const PHYSICAL: u32 = 2;

/// A list of those that run (`VIR_CONNECT_LIST_DOMAINS_ACTIVE`).
const ACTIVE: u32 = 1;

/// The passage is of a line of the human monitor (`VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP`).
const HMP: u32 = 1;

/// libvirt's programs and what of them is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Procedure {
    /// `REMOTE_PROC_AUTH_LIST`
    AuthList,
    /// `REMOTE_PROC_CONNECT_OPEN`
    ConnectOpen,
    /// `REMOTE_PROC_CONNECT_GET_LIB_VERSION`
    LibVersion,
    /// `REMOTE_PROC_CONNECT_LIST_ALL_DOMAINS`
    ListAllDomains,
    /// `REMOTE_PROC_DOMAIN_LOOKUP_BY_UUID`
    LookupByUuid,
    /// `REMOTE_PROC_DOMAIN_GET_XML_DESC`
    XmlDesc,
    /// `REMOTE_PROC_DOMAIN_GET_STATE`
    State,
    /// `REMOTE_PROC_DOMAIN_MEMORY_PEEK`: QEMU's `pmemsave` into a file in libvirt's cache, which libvirt
    /// reads and removes.
    MemoryPeek,
    /// `QEMU_PROC_DOMAIN_MONITOR_COMMAND`
    Monitor,
    /// `QEMU_PROC_DOMAIN_MONITOR_COMMAND_WITH_FILES` (libvirt 8.2)
    MonitorWithFiles,
    /// `QEMU_PROC_CONNECT_DOMAIN_MONITOR_EVENT_REGISTER`
    MonitorEventRegister,
}

/// `REMOTE_PROGRAM` and `QEMU_PROGRAM`, both of version 1.
const REMOTE: u32 = 0x2000_8086;
const QEMU: u32 = 0x2000_8087;
const VERSION: u32 = 1;

/// `QEMU_PROC_DOMAIN_MONITOR_EVENT`, unasked.
const MONITOR_EVENT: u32 = 6;

impl Procedure {
    /// Its name, for people.
    pub fn word(self) -> &'static str {
        match self {
            Self::AuthList => "AUTH_LIST",
            Self::ConnectOpen => "CONNECT_OPEN",
            Self::LibVersion => "CONNECT_GET_LIB_VERSION",
            Self::ListAllDomains => "CONNECT_LIST_ALL_DOMAINS",
            Self::LookupByUuid => "DOMAIN_LOOKUP_BY_UUID",
            Self::XmlDesc => "DOMAIN_GET_XML_DESC",
            Self::State => "DOMAIN_GET_STATE",
            Self::MemoryPeek => "DOMAIN_MEMORY_PEEK",
            Self::Monitor => "DOMAIN_MONITOR_COMMAND",
            Self::MonitorWithFiles => "DOMAIN_MONITOR_COMMAND_WITH_FILES",
            Self::MonitorEventRegister => "CONNECT_DOMAIN_MONITOR_EVENT_REGISTER",
        }
    }

    /// Its program and number.
    fn number(self) -> (u32, u32) {
        match self {
            Self::AuthList => (REMOTE, 66),
            Self::ConnectOpen => (REMOTE, 1),
            Self::LibVersion => (REMOTE, 157),
            Self::ListAllDomains => (REMOTE, 273),
            Self::LookupByUuid => (REMOTE, 24),
            Self::XmlDesc => (REMOTE, 14),
            Self::State => (REMOTE, 212),
            Self::MemoryPeek => (REMOTE, 104),
            Self::Monitor => (QEMU, 1),
            Self::MonitorWithFiles => (QEMU, 7),
            Self::MonitorEventRegister => (QEMU, 4),
        }
    }
}

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
    /// libvirt wants to know more of us than the kernel tells it.
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
    /// An earlier failure left the connection unusable.
    #[error("the connection to libvirt is no longer usable after an earlier failure")]
    Broken,
}

impl LibvirtError {
    /// Whether another connection may do better: this one is gone.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Closed { .. } | Self::Connect { .. } | Self::Broken)
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

/// An event of a domain's QEMU, as libvirt passes it on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MonitorEvent {
    /// Whose.
    pub domain: Domain,
    /// Its name, such as `STOP`.
    pub name: String,
    /// QEMU's clock: seconds since 1970 UTC.
    pub seconds: i64,
    /// QEMU's clock: microseconds in the second.
    pub microseconds: u32,
    /// Its data: JSON.
    pub data: Option<String>,
    /// When it was read from the socket.
    pub received: Instant,
}

/// Where libvirt listens on this host, the place that knows QEMU's domains first: on modular hosts
/// `libvirt-sock` is a proxy. `runtime` is the directory of a user's session, if there is one.
///
/// Each with the URI that belongs to it. Read-only sockets list and describe domains, and do no more.
pub fn sockets(runtime: Option<&Path>, read_only: bool) -> Vec<(PathBuf, &'static str)> {
    let mut sockets = Vec::new();
    for name in ["virtqemud-sock", "libvirt-sock"] {
        let ro = if read_only { "-ro" } else { "" };
        sockets.push((PathBuf::from(format!("/run/libvirt/{name}{ro}")), SYSTEM));
    }
    // A session has no socket that only reads.
    for name in ["virtqemud-sock", "libvirt-sock"] {
        sockets.extend(runtime.map(|dir| (dir.join("libvirt").join(name), SESSION)));
    }
    sockets
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
    inbox: Inbox,
    serial: u32,
    /// Serials of calls that timed out: their late answers are dropped.
    given_up: BTreeSet<u32>,
    events: Vec<MonitorEvent>,
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
        let libvirt = Self::open(stream, path, uri, read_only, deadline)?;
        Ok(Self { reach: reach.to_owned(), ..libvirt })
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
            inbox: Inbox::default(),
            serial: 0,
            given_up: BTreeSet::new(),
            events: Vec::new(),
            usable: true,
        };
        let methods =
            libvirt.call(Procedure::AuthList, |_| {}, |d| d.array(20, Decoder::i32), deadline)?;
        // Root is asked for nothing (`remoteDispatchAuthList`).
        if !methods.contains(&0) {
            let word = |method: &i32| match method {
                1 => "SASL".to_owned(),
                2 => "polkit".to_owned(),
                other => other.to_string(),
            };
            let methods = methods.iter().map(word).collect::<Vec<_>>().join(", ");
            return Err(LibvirtError::Authentication { path: path.to_owned(), methods });
        }
        let open = |e: &mut Encoder| {
            e.optional(Some(uri), |e, uri| {
                e.bytes(uri.as_bytes());
            });
            e.u32(u32::from(read_only));
        };
        libvirt.call(Procedure::ConnectOpen, open, |_| Ok(()), deadline)?;
        Ok(libvirt)
    }

    /// The socket's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where it is reached from here.
    pub fn reach(&self) -> &Path {
        &self.reach
    }

    /// libvirt's version: major, minor, release.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn version(&mut self, timeout: Duration) -> Result<(u64, u64, u64), LibvirtError> {
        let n = self.ask(Procedure::LibVersion, |_| {}, |d| d.u64(), timeout)?;
        Ok((n / 1_000_000, n / 1000 % 1000, n % 1000))
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

    /// The domain's XML, without secrets.
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

    /// Whether the domain runs: its state (`virDomainState`: 1 running, 3 paused, 5 shut off ..) and why.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub fn state(
        &mut self,
        domain: &Domain,
        timeout: Duration,
    ) -> Result<(i32, i32), LibvirtError> {
        let ask = |e: &mut Encoder| {
            domain.encode(e);
            e.u32(0);
        };
        self.ask(Procedure::State, ask, |d| Ok((d.i32()?, d.i32()?)), timeout)
    }

    /// Passes a command to the domain's monitor: JSON, or a line of the human monitor; what QEMU answers.
    /// `fd` goes with it to QEMU. Marks the domain as tainted.
    ///
    /// # Errors
    /// [`LibvirtError`]; a refusal by QEMU of JSON is in the answer.
    pub(crate) fn monitor(
        &mut self,
        domain: &Domain,
        command: &str,
        is_hmp: bool,
        fd: Option<BorrowedFd<'_>>,
        timeout: Duration,
    ) -> Result<String, LibvirtError> {
        let procedure = if fd.is_some() { Procedure::MonitorWithFiles } else { Procedure::Monitor };
        let ask = |e: &mut Encoder| {
            domain.encode(e);
            e.bytes(command.as_bytes()).u32(if is_hmp { HMP } else { 0 });
        };
        self.call_with(procedure, ask, fd, |d| d.string(), Deadline::new(timeout))
    }

    /// From here on the domain's events come too. Only where its monitor may be used.
    ///
    /// # Errors
    /// [`LibvirtError`].
    pub(crate) fn listen(
        &mut self,
        domain: &Domain,
        timeout: Duration,
    ) -> Result<(), LibvirtError> {
        let ask = |e: &mut Encoder| {
            e.optional(Some(domain), |e, domain| domain.encode(e));
            e.optional(None::<()>, |_, ()| {}).u32(0);
        };
        self.ask(Procedure::MonitorEventRegister, ask, |d| d.i32(), timeout).map(drop)
    }

    /// Guest-physical memory by QEMU's `pmemsave`, at most [`MAX_PEEK`] bytes. libvirt lets QEMU write it
    /// into a file on the host's disk, reads that, and removes it.
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
        std::mem::take(&mut self.events)
    }

    /// Reads events for as long as `wait`, or until the first one is there.
    ///
    /// # Errors
    /// The variants that end a connection; that no event came is none.
    pub fn poll_events(&mut self, wait: Duration) -> Result<(), LibvirtError> {
        const DOING: &str = "waiting for events";
        if !self.usable {
            return Err(LibvirtError::Broken);
        }
        let deadline = Deadline::new(wait);
        while self.events.is_empty() {
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
        match header.kind {
            Kind::Message if (header.program, header.procedure) == (QEMU, MONITOR_EVENT) => {
                if self.events.len() >= MAX_EVENTS {
                    return Err(breach(format!("more than {MAX_EVENTS} events that nobody took")));
                }
                let event =
                    event(&payload).map_err(|error| breach(format!("an event: {error}")))?;
                self.events.push(event);
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

fn failed(error: PacketError, doing: &'static str, sent: bool, deadline: Deadline) -> LibvirtError {
    match error {
        PacketError::Late => LibvirtError::Timeout { doing, waited: deadline.length },
        PacketError::Closed => LibvirtError::Closed { doing, sent },
        PacketError::Io(cause) => LibvirtError::Io { doing, cause },
        odd => LibvirtError::Protocol { doing, what: odd.to_string() },
    }
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

/// `qemu_domain_monitor_event_msg`
fn event(payload: &[u8]) -> Result<MonitorEvent, XdrError> {
    let mut d = Decoder::new(payload);
    d.i32()?;
    let event = MonitorEvent {
        domain: Domain::decode(&mut d)?,
        name: d.string()?,
        seconds: d.i64()?,
        microseconds: d.u32()?,
        data: d.optional(Decoder::string)?,
        received: Instant::now(),
    };
    d.end()?;
    Ok(event)
}

fn connect(path: &Path, deadline: Deadline) -> Result<UnixStream, LibvirtError> {
    unix::connect(path, deadline).map_err(|failed| match failed {
        Failed::Os(errno) => LibvirtError::Connect { path: path.to_owned(), cause: errno.into() },
        Failed::Full => LibvirtError::Timeout { doing: "connect", waited: deadline.length },
    })
}
