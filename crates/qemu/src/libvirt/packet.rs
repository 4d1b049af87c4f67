//! Packets of libvirt's RPC (`virnetprotocol.x`): a length that counts itself, six numbers, a payload.
//!
//! Descriptors follow a packet one by one, each with a byte of its own (`virSocketSendFD`), and their
//! number stands before the payload.

use super::xdr::{Decoder, Encoder, XdrError};
use crate::deadline::Deadline;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

/// Greatest packet that is taken, in bytes: the longest string of the protocol, which also the memory of
/// DOMAIN_MEMORY_PEEK does not exceed, and the rest.
pub(super) const MAX_PACKET: usize = (4 << 20) + (64 << 10);

/// Length, and six numbers.
const HEAD: usize = 28;

/// Bytes that are read at a time.
const CHUNK: usize = 64 << 10;

/// What a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Call,
    Reply,
    /// Unasked.
    Message,
    CallWithFds,
}

/// How a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Error,
}

/// What stands before the payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) program: u32,
    pub(super) version: u32,
    pub(super) procedure: u32,
    pub(super) kind: Kind,
    pub(super) serial: u32,
    pub(super) status: Status,
}

/// Why there is no packet.
#[derive(Debug, thiserror::Error)]
pub(super) enum PacketError {
    #[error("no time is left")]
    Late,
    #[error("the connection was closed")]
    Closed,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("a packet of {0} bytes")]
    Length(u32),
    #[error("a packet of kind {kind} with status {status}")]
    Kind { kind: i32, status: i32 },
    #[error(transparent)]
    Xdr(#[from] XdrError),
}

impl Header {
    fn decode(bytes: &[u8]) -> Result<Self, PacketError> {
        let mut d = Decoder::new(bytes);
        let (program, version, procedure) = (d.u32()?, d.u32()?, d.u32()?);
        let (kind, serial, status) = (d.i32()?, d.u32()?, d.i32()?);
        let odd = || PacketError::Kind { kind, status };
        Ok(Self {
            program,
            version,
            procedure,
            kind: match kind {
                0 => Kind::Call,
                1 => Kind::Reply,
                2 => Kind::Message,
                4 => Kind::CallWithFds,
                _ => return Err(odd()),
            },
            serial,
            status: match status {
                0 => Status::Ok,
                1 => Status::Error,
                _ => return Err(odd()),
            },
        })
    }

    /// The whole packet.
    pub(super) fn encode(self, payload: &[u8], fds: usize) -> Vec<u8> {
        let with_fds = self.kind == Kind::CallWithFds;
        let len = HEAD + payload.len() + if with_fds { 4 } else { 0 };
        let mut e = Encoder::default();
        e.u32(u32::try_from(len).unwrap_or(u32::MAX));
        e.u32(self.program).u32(self.version).u32(self.procedure);
        let kind = match self.kind {
            Kind::Call => 0,
            Kind::Reply => 1,
            Kind::Message => 2,
            Kind::CallWithFds => 4,
        };
        e.i32(kind).u32(self.serial).i32(i32::from(self.status == Status::Error));
        if with_fds {
            e.u32(u32::try_from(fds).unwrap_or(u32::MAX));
        }
        e.fixed(payload).take()
    }
}

/// Bytes that came and make no whole packet yet.
#[derive(Debug, Default)]
pub(super) struct Inbox(Vec<u8>);

impl Inbox {
    /// The next packet: its header and its payload. What has come of one stays when time runs out.
    pub(super) fn receive(
        &mut self,
        stream: &mut UnixStream,
        deadline: Deadline,
    ) -> Result<(Header, Vec<u8>), PacketError> {
        let mut chunk = vec![0; CHUNK];
        loop {
            if let Some(packet) = self.next()? {
                return Ok(packet);
            }
            let left = deadline.left().ok_or(PacketError::Late)?;
            stream.set_read_timeout(Some(left))?;
            match stream.read(&mut chunk) {
                Ok(0) => return Err(PacketError::Closed),
                // Memory is taken for what came, never for what is only said.
                Ok(n) => self.0.extend_from_slice(chunk.get(..n).unwrap_or_default()),
                Err(error) => passing(error)?,
            }
        }
    }

    /// The first packet, if it is whole.
    fn next(&mut self) -> Result<Option<(Header, Vec<u8>)>, PacketError> {
        let Some(len) = self.0.first_chunk().copied().map(u32::from_be_bytes) else {
            return Ok(None);
        };
        let whole = usize::try_from(len).ok().filter(|len| (HEAD..=MAX_PACKET).contains(len));
        let whole = whole.ok_or(PacketError::Length(len))?;
        if self.0.len() < whole {
            return Ok(None);
        }
        let rest = self.0.split_off(whole);
        let packet = std::mem::replace(&mut self.0, rest);
        let header = Header::decode(packet.get(4..HEAD).unwrap_or_default())?;
        Ok(Some((header, packet.get(HEAD..).unwrap_or_default().to_vec())))
    }
}

/// Reading and writing may be interrupted, and time is looked at elsewhere.
fn passing(error: io::Error) -> Result<(), PacketError> {
    match error.kind() {
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Ok(()),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Err(PacketError::Closed),
        _ => Err(error.into()),
    }
}

/// Sends a whole packet, and `fd` behind it.
pub(super) fn send(
    stream: &mut UnixStream,
    packet: &[u8],
    fd: Option<BorrowedFd<'_>>,
    deadline: Deadline,
) -> Result<(), PacketError> {
    let mut rest = packet;
    while !rest.is_empty() {
        stream.set_write_timeout(Some(deadline.left().ok_or(PacketError::Late)?))?;
        match stream.write(rest) {
            Ok(0) => return Err(PacketError::Closed),
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(error) => passing(error)?,
        }
    }
    let Some(fd) = fd else { return Ok(()) };
    loop {
        stream.set_write_timeout(Some(deadline.left().ok_or(PacketError::Late)?))?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [fd];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
        }
        let sent = rustix::net::sendmsg(
            &*stream,
            &[IoSlice::new(&[0])],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        match sent {
            Ok(0) => return Err(PacketError::Closed),
            Ok(_) => return Ok(()),
            Err(errno) => passing(errno.into())?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const CALL: Header = Header {
        program: 0x2000_8086,
        version: 1,
        procedure: 66,
        kind: Kind::Call,
        serial: 1,
        status: Status::Ok,
    };

    fn soon() -> Deadline {
        Deadline::new(Duration::from_secs(5))
    }

    #[test]
    fn a_packet_is_what_libvirt_writes() {
        // AUTH_LIST as libvirt's own client sends it.
        let bytes = b"\0\0\0\x1c\x20\0\x80\x86\0\0\0\x01\0\0\0\x42\0\0\0\0\0\0\0\x01\0\0\0\0";
        assert_eq!(CALL.encode(b"", 0), bytes);
        let with = Header { kind: Kind::CallWithFds, ..CALL }.encode(b"abcd", 1);
        assert_eq!((with.len(), &with[28..]), (36, &b"\0\0\0\x01abcd"[..]));
    }

    #[test]
    fn packets_come_in_any_pieces() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let reply = Header { kind: Kind::Reply, status: Status::Error, ..CALL };
        let bytes = [reply.encode(b"abcd", 0), CALL.encode(b"", 0)].concat();
        let sender = std::thread::spawn(move || {
            for byte in bytes {
                theirs.write_all(&[byte]).unwrap();
            }
        });
        let mut inbox = Inbox::default();
        assert_eq!(inbox.receive(&mut ours, soon()).unwrap(), (reply, b"abcd".to_vec()));
        assert_eq!(inbox.receive(&mut ours, soon()).unwrap(), (CALL, Vec::new()));
        sender.join().unwrap();
        assert!(matches!(inbox.receive(&mut ours, soon()), Err(PacketError::Closed)));
    }

    #[test]
    fn odd_packets_are_refused_before_they_are_read() {
        for len in [0, 27, u32::MAX, 1 << 25] {
            let (mut ours, mut theirs) = UnixStream::pair().unwrap();
            theirs.write_all(&u32::to_be_bytes(len)).unwrap();
            let error = Inbox::default().receive(&mut ours, soon()).unwrap_err();
            assert!(matches!(error, PacketError::Length(said) if said == len), "{len}: {error}");
        }
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        let mut packet = CALL.encode(b"", 0);
        packet[19] = 9;
        theirs.write_all(&packet).unwrap();
        let error = Inbox::default().receive(&mut ours, soon()).unwrap_err();
        assert!(matches!(error, PacketError::Kind { kind: 9, .. }), "{error}");
        let (mut ours, _theirs) = UnixStream::pair().unwrap();
        let late = Deadline::new(Duration::from_millis(20));
        let error = Inbox::default().receive(&mut ours, late).unwrap_err();
        assert!(matches!(error, PacketError::Late), "{error}");
    }
}
