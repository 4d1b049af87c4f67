//! Whether a ring's guest writes: its numbers are read through /proc, where neither QEMU nor its
//! write protection has a say.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use lab::metronome::Metronome;
use lab::{Doing, Guest, Result, Ring, failed};

/// The guest's CPU, known by what it wrote.
#[derive(Debug)]
pub(super) struct Writer {
    memory: File,
    hva: u64,
    ring: Ring,
}

impl Writer {
    pub(super) fn of(guest: &mut Guest, ring: &Ring) -> Result<Self> {
        let memory = File::open(format!("/proc/{}/mem", guest.pid())).doing("its memory")?;
        Ok(Self { memory, hva: guest.hva(ring.gpa(0))?, ring: ring.clone() })
    }

    /// What stands in the first word of a page.
    fn word(&self, page: u32) -> Result<u64> {
        let at = self.hva + (self.ring.gpa(page) - self.ring.gpa(0)) + 0x80;
        let mut bytes = [0; 8];
        self.memory.read_exact_at(&mut bytes, at).doing("reading the ring")?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The number that stands at the page where the writer is. Pages up to there hold numbers of
    /// this lap, all others those of the lap before.
    pub(super) fn at(&self) -> Result<u64> {
        let lap = self.word(0)?;
        let (mut written, mut old) = (0, self.ring.pages);
        while old - written > 1 {
            let middle = written + (old - written) / 2;
            if self.word(middle)? < lap {
                old = middle;
            } else {
                written = middle;
            }
        }
        Ok(lap + u64::from(written) * 3)
    }

    /// Waits until it writes; a failure when it does not in time.
    pub(super) fn goes_on(&self, within: Duration) -> Result<()> {
        let (start, before) = (Instant::now(), self.at()?);
        while self.at()? == before {
            if start.elapsed() > within {
                return Err(failed(format_args!("the guest does not write within {within:?}")));
            }
            sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// The opposite: nothing is written in so long a time.
    pub(super) fn stands(&self, time: Duration) -> Result<bool> {
        let before = self.at()?;
        sleep(time);
        Ok(self.at()? == before)
    }
}

/// What was seen of a guest's stalls.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stalls {
    /// The longest, from the first to the last look that found the same number: so it was at least
    /// so long, however late a look was.
    pub(super) longest: Duration,
    /// The longest time between two looks, and the longest that any CPU stood: so late may the machine have
    /// been for the tool and for QEMU too.
    pub(super) late: Duration,
}

/// Looks at a ring every millisecond on a thread of its own.
#[derive(Debug)]
pub(super) struct Pulse {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<Stalls>>>,
}

impl Pulse {
    /// Has looked once when it returns.
    pub(super) fn start(guest: &mut Guest, ring: &Ring) -> Result<Self> {
        let (writer, metronome) = (Writer::of(guest, ring)?, Metronome::start()?);
        let first = (writer.at()?, Instant::now());
        let over = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&over);
        let thread = spawn(move || {
            let mut stalls = watch(&writer, first, &ends)?;
            stalls.late += metronome.end();
            Ok(stalls)
        });
        Ok(Self { over, thread: Some(thread) })
    }

    pub(super) fn end(mut self) -> Result<Stalls> {
        self.over.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| failed("no watcher"))?;
        thread.join().map_err(|_| failed("the watcher panicked"))?.doing("watching the ring")
    }
}

impl Drop for Pulse {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
    }
}

/// Looks until it is `over`, and once more, from a `first` look on: what it found, and when.
fn watch(writer: &Writer, first: (u64, Instant), over: &AtomicBool) -> Result<Stalls> {
    let (mut stalls, (mut number, mut since)) = (Stalls::default(), first);
    let mut last = since;
    loop {
        let is_last = over.load(Ordering::Relaxed);
        let before = Instant::now();
        let now = writer.at()?;
        let after = Instant::now();
        if now == number {
            stalls.longest = stalls.longest.max(before.saturating_duration_since(since));
        } else {
            (number, since) = (now, after);
        }
        stalls.late = stalls.late.max(after - last);
        last = after;
        if is_last {
            return Ok(stalls);
        }
        sleep(Duration::from_millis(1));
    }
}
