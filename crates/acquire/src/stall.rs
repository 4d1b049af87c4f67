//! Whether QEMU waits for whoever reads its snapshot: a guest that writes to a page that is still
//! protected waits with it.
//!
//! Capture and guardian each look for themselves: one of them may hang. Both have the reader's end
//! of the socket and its *pulse*, a small file in which the reader counts what it read. Bytes that lie
//! in the socket while the count stands still are a stall.
//!
//! Of memory on huge pages QEMU lets a page be written once all of it is sent, which is more than the
//! socket holds: there a reader that goes on by jerks, each short enough, makes the guest wait for their
//! sum. So a stall is only over once so much was read that whoever waited has been served, the *turn*.

use evidence::PAGE;
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
    /// The [`turn`].
    turn: u64,
    /// What had been read when the stall began.
    from: u64,
    /// When QEMU's bytes began to lie there.
    since: Instant,
    looked: Instant,
    stalled: Duration,
    longest: Duration,
}

/// Bytes of the stream within which a page comes that the guest waits for, of memory on pages of
/// `page_size` bytes: behind the page that QEMU is at. Two small pages are less than is read at a time.
pub fn turn(page_size: u64) -> u64 {
    if page_size > PAGE { 2 * page_size } else { 0 }
}

/// The most that one look adds to a stall: a machine that stood still as a whole between two looks,
/// as a virtual one may, has stalled nobody for our sake.
const STEP: Duration = Duration::from_millis(50);

impl Watch {
    /// Looks at the socket whose reader's end is `stream`, and at the reader's `pulse`; a stall is over
    /// once more than `turn` bytes were read.
    pub fn new(stream: OwnedFd, pulse: OwnedFd, turn: u64) -> Self {
        Self {
            stream: UnixStream::from(stream),
            pulse: File::from(pulse),
            count: 0,
            turn,
            from: 0,
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
        let count = read(&self.pulse, READ_AT)?;
        // A QEMU that has let go of the stream waits for nobody.
        let waiting = rustix::io::ioctl_fionread(&self.stream)? > 0 && !self.is_hung_up();
        let step = self.looked.elapsed().min(STEP);
        self.looked = Instant::now();
        let stands = waiting && count == self.count;
        if stands {
            self.stalled += step;
        } else if self.turn == 0 || count.saturating_sub(self.from) > self.turn {
            (self.stalled, self.from) = (Duration::ZERO, count);
        }
        self.count = count;
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

    /// How many bytes the reader has written to a disk.
    ///
    /// # Errors
    /// The kernel's.
    pub fn written(&self) -> io::Result<u64> {
        read(&self.pulse, WRITTEN_AT)
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

/// Bytes of a pulse: two numbers.
pub const PULSE: usize = 16;

/// Where they are.
const READ_AT: u64 = 0;
const WRITTEN_AT: u64 = 8;

/// Writes how many bytes a reader has read into its pulse.
///
/// # Errors
/// The kernel's.
pub fn beat(pulse: &File, count: u64) -> io::Result<()> {
    pulse.write_all_at(&count.to_le_bytes(), READ_AT)
}

/// Writes how many bytes it has written to a disk there.
///
/// # Errors
/// The kernel's.
pub fn beat_written(pulse: &File, count: u64) -> io::Result<()> {
    pulse.write_all_at(&count.to_le_bytes(), WRITTEN_AT)
}

fn read(pulse: &File, at: u64) -> io::Result<u64> {
    let mut bytes = [0; 8];
    pulse.read_exact_at(&mut bytes, at)?;
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
        let mut watch = Watch::new(pair.0, pair.1, turn(PAGE));
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

    #[test]
    fn what_a_qemu_left_that_has_ended_is_no_stall() {
        let (mut qemu, reader) = UnixStream::pair().unwrap();
        let pulse = tempfile::tempfile().unwrap();
        pulse.set_len(PULSE as u64).unwrap();
        let mut watch = Watch::new(reader.into(), pulse.into(), 0);
        qemu.write_all(b"the last bytes").unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(watch.look().unwrap() > Duration::ZERO);
        drop(qemu);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(watch.look().unwrap(), Duration::ZERO);
        assert!(watch.is_hung_up());
    }

    /// Reads little, stands for a while, and so on: how long a stall that makes.
    fn by_jerks(turn: u64) -> Duration {
        let (mut qemu, mut reader) = UnixStream::pair().unwrap();
        let pulse = tempfile::tempfile().unwrap();
        beat(&pulse, 0).unwrap();
        let pair = (reader.try_clone().unwrap().into(), pulse.try_clone().unwrap().into());
        let mut watch = Watch::new(pair.0, pair.1, turn);
        qemu.write_all(&[0; 100]).unwrap();
        let mut most = Duration::ZERO;
        for count in 1..=20 {
            std::thread::sleep(Duration::from_millis(10));
            most = most.max(watch.look().unwrap());
            reader.read_exact(&mut [0]).unwrap();
            beat(&pulse, count).unwrap();
            watch.look().unwrap();
        }
        most
    }

    #[test]
    fn jerks_add_up_until_whoever_waits_has_been_served() {
        let (one, all) = (Duration::from_millis(10), Duration::from_millis(200));
        // Whoever wanted a small page has it after each of them.
        assert!(by_jerks(0) < all);
        assert!(by_jerks(100) >= all);
        // After five bytes the guest goes on.
        let some = by_jerks(4);
        assert!(some >= 5 * one && some < all, "{some:?}");
        assert_eq!([turn(PAGE), turn(2 << 20)], [0, 4 << 20]);
    }
}
