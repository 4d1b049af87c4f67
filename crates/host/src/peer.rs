//! Who is at the other end of a unix socket.

use nix::libc;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The process that a unix socket was connected to, or that began to listen on it, at that time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process id in our pid namespace; `None` when it is not in it.
    pub pid: Option<u32>,
    /// Its effective user id.
    pub uid: u32,
    /// Its effective group id.
    pub gid: u32,
}

/// The peer of the connected unix socket `fd`, by SO_PEERCRED.
///
/// # Errors
/// The kernel's, when `fd` is no unix socket.
pub fn peer(fd: impl AsFd) -> io::Result<Peer> {
    // rustix has this call too, but its process id cannot be 0, which the kernel gives for a
    // process outside our pid namespace.
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = 12;
    const _: () = assert!(size_of::<libc::ucred>() == 12);
    // SAFETY: `cred` is valid for writes of `len` bytes, its size, checked above at compile time,
    // and any bytes are a valid `ucred`; both outlive the call, and the borrow keeps `fd` open.
    let done = unsafe {
        libc::getsockopt(
            fd.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    let pid = u32::try_from(cred.pid).ok().filter(|pid| *pid != 0);
    Ok(Peer { pid, uid: cred.uid, gid: cred.gid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn our_own_pair_is_ours() {
        let (a, _b) = UnixStream::pair().unwrap();
        let peer = peer(&a).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
    }

    #[test]
    fn a_file_has_no_peer() {
        assert!(peer(std::fs::File::open("/proc/self/stat").unwrap()).is_err());
    }
}
