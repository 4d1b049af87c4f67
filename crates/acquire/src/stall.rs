//! Whether QEMU waits for whoever reads its snapshot: a guest that writes to a page that is still
//! protected waits with it.
//!
//! Capture and guardian each look for themselves: one of them may hang. Both have the reader's end
//! of the socket and its *pulse*, a small file in which the reader counts what it read. Bytes that lie
//! in the socket while the count stands still are a stall.

use rustix::event::{PollFd, PollFlags};
use std::fs::File;
use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// One who looks.
#[derive(Debug)]
pub struct Watch {
    stream: UnixStream,
    pulse: File,
    count: u64,
    /// When QEMU's bytes began to lie there.
    since: Instant,
    looked: Instant,
    stalled: Duration,
    longest: Duration,
}

/// The most that one look adds to a stall: a machine that stood still as a whole between two looks,
/// as a virtual one may, has stalled nobody for our sake.
const STEP: Duration = Duration::from_millis(50);

impl Watch {
    /// Looks at the socket whose reader's end is `stream`, and at the reader's `pulse`.
    pub fn new(stream: OwnedFd, pulse: OwnedFd) -> Self {
        Self {
            stream: UnixStream::from(stream),
            pulse: File::from(pulse),
            count: 0,
            since: Instant::now(),
            looked: Instant::now(),
            stalled: Duration::ZERO,
            longest: Duration::ZERO,
        }
    }

    /// Looks: for how long QEMU's bytes have lain unread.
    ///
    /// # Errors
    /// The kernel's.
    pub fn look(&mut self) -> io::Result<Duration> {
        let count = read(&self.pulse)?;
        let waiting = rustix::io::ioctl_fionread(&self.stream)? > 0;
        let step = self.looked.elapsed().min(STEP);
        self.looked = Instant::now();
        let stands = waiting && count == self.count;
        (self.count, self.stalled) =
            (count, if stands { self.stalled + step } else { Duration::ZERO });
        if stands {
            self.longest = self.longest.max(self.since.elapsed());
        } else {
            self.since = Instant::now();
        }
        Ok(self.stalled)
    }

    /// How many bytes had been read at the last look.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// The longest that any look found, whoever was late.
    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// Whether QEMU has let go of the stream.
    pub fn is_hung_up(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let ready = rustix::event::poll(&mut polled, Some(&now));
        ready.is_ok_and(|ready| ready > 0)
    }

    /// Breaks the stream: QEMU's next write fails, and with it the snapshot; who waits goes on.
    pub fn cut(&self) {
        // One that is broken already is as well.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

/// Bytes of a pulse: a number.
pub const PULSE: usize = 8;

/// Writes how many bytes a reader has read into its pulse.
///
/// # Errors
/// The kernel's.
pub fn beat(pulse: &File, count: u64) -> io::Result<()> {
    pulse.write_all_at(&count.to_le_bytes(), 0)
}

fn read(pulse: &File) -> io::Result<u64> {
    let mut bytes = [0; PULSE];
    pulse.read_exact_at(&mut bytes, 0)?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn unread_bytes_are_a_stall_and_silence_is_none() {
        let (mut qemu, mut reader) = UnixStream::pair().unwrap();
        let pulse = tempfile::tempfile().unwrap();
        beat(&pulse, 0).unwrap();
        let pair = (reader.try_clone().unwrap().into(), pulse.try_clone().unwrap().into());
        let mut watch = Watch::new(pair.0, pair.1);
        let little = Duration::from_millis(20);
        std::thread::sleep(little);
        assert_eq!(watch.look().unwrap(), Duration::ZERO, "QEMU sends nothing");
        qemu.write_all(b"ab").unwrap();
        std::thread::sleep(little);
        assert!(watch.look().unwrap() >= little);
        // A look that comes late adds little.
        std::thread::sleep(STEP * 4);
        assert!(watch.look().unwrap() < STEP * 3);
        reader.read_exact(&mut [0]).unwrap();
        beat(&pulse, 1).unwrap();
        assert_eq!(watch.look().unwrap(), Duration::ZERO, "there is more, and it is being read");
        assert!(watch.longest() >= little && watch.count() == 1);
        assert!(!watch.is_hung_up());
        watch.cut();
        assert!(qemu.write_all(b"c").is_err());
    }
}
