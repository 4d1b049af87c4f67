//! Messages and file descriptors between two processes of ours, each wait bounded.
//!
//! A message is a length of four bytes, little endian, and so many bytes. The other end is one of
//! our own processes, but it may be hostile by now (one of them parses what the guest wrote): so
//! lengths are checked before anything is allocated.
//!
//! Only `poll`, `read` and `write` are used once the descriptors went: a process without the right
//! to any other call on sockets can still talk.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

/// Greatest length of a message in bytes: QEMU's map texts, each of 16 MiB at most, fit.
pub const MAX_MESSAGE: usize = 64 << 20;

/// Descriptors that go in one message at most.
const MAX_FDS: usize = 8;

/// Why nothing was received or sent.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other process closed its end: it exited, most likely.
    #[error("the other process is gone")]
    Closed,
    /// No whole message came, or was taken, in time.
    #[error("the other process did not answer within {:.1} s", waited.as_secs_f64())]
    Timeout {
        /// How long we waited.
        waited: Duration,
    },
    /// It does not keep to the form.
    #[error("the other process sent {0}")]
    Form(String),
    /// The socket failed.
    #[error("the socket to the other process failed")]
    Os(#[source] io::Error),
}

/// One end.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// Both ends; the second is for the other process.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        Ok((Self { socket }, theirs))
    }

    /// The end that `fd` is: in the other process.
    pub fn of(fd: OwnedFd) -> Self {
        Self { socket: fd }
    }

    /// A second handle of the same end.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()? })
    }

    /// Sends one message.
    ///
    /// # Errors
    /// [`ChannelError`]; part of the message may have gone.
    pub fn send(&mut self, message: &[u8], within: Duration) -> Result<(), ChannelError> {
        let len = u32::try_from(message.len()).ok().filter(|_| message.len() <= MAX_MESSAGE);
        let len = len.ok_or_else(|| ChannelError::Form("too long a message".into()))?;
        let began = Instant::now();
        // In one piece: whoever is stopped between two leaves the other waiting.
        let whole = [&len.to_le_bytes()[..], message].concat();
        let mut rest = whole.as_slice();
        while !rest.is_empty() {
            self.ready(PollFlags::OUT, began, within)?;
            match rustix::io::write(&self.socket, rest) {
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(errno) => sort(errno)?,
            }
        }
        Ok(())
    }

    /// Receives one message.
    ///
    /// # Errors
    /// [`ChannelError`]; after a timeout the message may have begun, and the end is of no use.
    pub fn receive(&mut self, within: Duration) -> Result<Vec<u8>, ChannelError> {
        let began = Instant::now();
        let mut len = [0; 4];
        self.fill(&mut len, began, within)?;
        let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
        if len > MAX_MESSAGE {
            return Err(ChannelError::Form(format!("a message of {len} bytes")));
        }
        let mut message = vec![0; len];
        self.fill(&mut message, began, within)?;
        Ok(message)
    }

    fn fill(
        &mut self,
        buffer: &mut [u8],
        began: Instant,
        within: Duration,
    ) -> Result<(), ChannelError> {
        let mut done = 0;
        while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
            self.ready(PollFlags::IN, began, within)?;
            match rustix::io::read(&self.socket, rest) {
                Ok(0) => return Err(ChannelError::Closed),
                Ok(n) => done += n,
                Err(errno) => sort(errno)?,
            }
        }
        Ok(())
    }

    /// Waits until the socket can be read or written, or is closed.
    fn ready(&self, what: PollFlags, began: Instant, within: Duration) -> Result<(), ChannelError> {
        let left = within.checked_sub(began.elapsed()).filter(|left| !left.is_zero());
        let left = left.ok_or(ChannelError::Timeout { waited: within })?;
        let mut polled = [PollFd::new(&self.socket, what)];
        match poll(&mut polled, Some(&spec(left))) {
            Ok(0) => Err(ChannelError::Timeout { waited: within }),
            // Interrupted: the caller's read or write finds nothing and comes back.
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(ChannelError::Os(errno.into())),
        }
    }

    /// Gives the other process copies of `fds`, which [`Channel::receive_fds`] takes there.
    ///
    /// # Errors
    /// The kernel's.
    pub fn send_fds(&self, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if fds.len() > MAX_FDS || !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // A byte must go with them.
        let byte = [u8::try_from(fds.len()).unwrap_or(0)];
        rustix::net::sendmsg(
            &self.socket,
            &[IoSlice::new(&byte)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        Ok(())
    }

    /// Takes the descriptors that the other end sent.
    ///
    /// # Errors
    /// [`ChannelError::Form`] when they are not `count` many.
    pub fn receive_fds(
        &self,
        count: usize,
        within: Duration,
    ) -> Result<Vec<OwnedFd>, ChannelError> {
        let began = Instant::now();
        while wait(&[self.as_fd()], Some(Duration::ZERO)).map_err(ChannelError::Os)? != [true] {
            self.ready(PollFlags::IN, began, within)?;
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = rustix::net::recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            flags,
        )
        .map_err(|e| ChannelError::Os(e.into()))?;
        if got.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(list) = message {
                fds.extend(list);
            }
        }
        if fds.len() == count {
            return Ok(fds);
        }
        Err(ChannelError::Form(format!("{} descriptors instead of {count}", fds.len())))
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn spec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(time.subsec_nanos()),
    }
}

/// Errors after which one tries again are none.
fn sort(errno: Errno) -> Result<(), ChannelError> {
    match errno {
        Errno::INTR | Errno::AGAIN => Ok(()),
        Errno::PIPE | Errno::CONNRESET => Err(ChannelError::Closed),
        errno => Err(ChannelError::Os(errno.into())),
    }
}

/// Waits until one of `fds` can be read or was closed at its other end: for each whether it was.
/// `None` waits for ever.
///
/// # Errors
/// The kernel's.
pub fn wait(fds: &[BorrowedFd<'_>], within: Option<Duration>) -> io::Result<Vec<bool>> {
    let until = within.map(|within| Instant::now() + within);
    let mut polled: Vec<_> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    loop {
        let spec = until.map(|until| spec(until.saturating_duration_since(Instant::now())));
        match poll(&mut polled, spec.as_ref()) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(polled.iter().map(|fd| !fd.revents().is_empty()).collect()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    fn pair() -> (Channel, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        (ours, Channel::of(theirs))
    }

    #[test]
    fn messages_arrive_whole_and_in_order() {
        let (mut a, mut b) = pair();
        let long = vec![7; 3 << 20];
        let sender = std::thread::spawn(move || {
            a.send(b"", SOON).unwrap();
            a.send(&long, SOON).unwrap();
        });
        assert_eq!(b.receive(SOON).unwrap(), b"");
        assert_eq!(b.receive(SOON).unwrap().len(), 3 << 20);
        sender.join().unwrap();
        assert!(matches!(b.receive(SOON), Err(ChannelError::Closed)));
        assert!(matches!(b.send(b"x", SOON), Err(ChannelError::Closed)));
    }

    #[test]
    fn waits_end() {
        let (mut a, mut b) = pair();
        let little = Duration::from_millis(20);
        assert!(matches!(a.receive(little), Err(ChannelError::Timeout { .. })));
        assert_eq!(wait(&[a.as_fd()], Some(little)).unwrap(), [false]);
        // Nobody takes it: the socket's buffer runs full.
        let some = Duration::from_secs(1);
        assert!(matches!(a.send(&vec![0; 8 << 20], some), Err(ChannelError::Timeout { .. })));
        assert_eq!(wait(&[b.as_fd()], Some(SOON)).unwrap(), [true]);
        assert!(matches!(b.receive(little), Err(ChannelError::Timeout { .. })));
    }

    #[test]
    fn a_length_is_checked_before_memory_is_taken() {
        let (a, mut b) = pair();
        rustix::io::write(&a.socket, &u32::MAX.to_le_bytes()).unwrap();
        assert!(matches!(b.receive(SOON), Err(ChannelError::Form(_))));
    }

    #[test]
    fn descriptors_arrive() {
        let (a, b) = pair();
        let (reader, mut writer) = std::io::pipe().unwrap();
        a.send_fds(&[reader.as_fd(), a.as_fd()]).unwrap();
        let mut fds = b.receive_fds(2, SOON).unwrap();
        fds.truncate(1);
        io::Write::write_all(&mut writer, b"through").unwrap();
        drop(writer);
        let mut text = String::new();
        io::Read::read_to_string(&mut std::fs::File::from(fds.remove(0)), &mut text).unwrap();
        assert_eq!(text, "through");
        a.send_fds(&[reader.as_fd()]).unwrap();
        assert!(matches!(b.receive_fds(2, SOON), Err(ChannelError::Form(_))));
    }
}
