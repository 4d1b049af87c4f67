//! Connecting to UNIX sockets: never for longer than is left, whatever the length of the path; and who
//! listens there.

use crate::deadline::Deadline;
use crate::qmp::PeerCred;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Pause between two tries while the listen queue is full.
const PAUSE: Duration = Duration::from_millis(20);

/// Why there is no connection.
pub(crate) enum Failed {
    /// The system says no.
    Os(Errno),
    /// The listen queue was full until the time was over.
    Full,
}

/// Connects without ever blocking: a listen queue that is full makes a blocking connect wait for
/// as long as the other clients like. The stream that comes of it blocks.
pub(crate) fn connect(path: &Path, deadline: Deadline) -> Result<UnixStream, Failed> {
    // A socket's address holds 107 bytes of path: a longer one is gone to by its directory.
    let (_directory, address) = match SocketAddrUnix::new(path) {
        Err(Errno::NAMETOOLONG) => {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
                return Err(Failed::Os(Errno::NAMETOOLONG));
            };
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(parent, flags, Mode::empty()).map_err(Failed::Os)?;
            let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string());
            let address = SocketAddrUnix::new(short.join(name)).map_err(Failed::Os)?;
            (Some(directory), address)
        }
        other => (None, other.map_err(Failed::Os)?),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(Failed::Os)?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(Failed::Os(errno)),
        }
        match deadline.left() {
            Some(left) => std::thread::sleep(left.min(PAUSE)),
            None => return Err(Failed::Full),
        }
    }
    rustix::io::ioctl_fionbio(&socket, false).map_err(Failed::Os)?;
    Ok(UnixStream::from(socket))
}

/// Who called `listen` on the socket at the other end.
pub(crate) fn peer(stream: &UnixStream) -> io::Result<PeerCred> {
    let cred = nix::sys::socket::getsockopt(stream, nix::sys::socket::sockopt::PeerCredentials)?;
    let pid = u32::try_from(cred.pid()).ok().filter(|&pid| pid != 0);
    Ok(PeerCred { pid, uid: cred.uid() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn long_paths_are_gone_to_by_their_directory() {
        let top = tempfile::tempdir().unwrap();
        let deep = top.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let _listener = {
            // As QEMU in a container does, to which the path is short.
            let link = top.path().join("l");
            std::os::unix::fs::symlink(&deep, &link).unwrap();
            UnixListener::bind(link.join("s")).unwrap()
        };
        let soon = Deadline::new(Duration::from_secs(5));
        assert!(connect(&deep.join("s"), soon).is_ok());
        assert!(matches!(connect(&deep.join("t"), soon), Err(Failed::Os(Errno::NOENT))));
    }
}
