//! How long each CPU of this machine kept a thread waiting that wanted to run.
//!
//! A watcher sits on one CPU at a time: a hypervisor that takes another one away makes the tool late
//! and leaves the watcher punctual. So a thread beats on each of them.

use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use rustix::process::getpid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::error::{Doing, Result};
use crate::guest::Accel;

/// Beats on each CPU that this process may use, from [`Metronome::start`] until it is ended or
/// dropped. A gap is the time from one beat of a CPU to its next: a millisecond at the least, and ten
/// in the outer guest, whose translated CPUs beats cost ten times as much.
#[derive(Debug)]
pub struct Metronome {
    beats: Arc<Beats>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Beats {
    start: Instant,
    pause: Duration,
    over: AtomicBool,
    /// The longest gap that is over, in nanoseconds, of any CPU.
    longest: AtomicU64,
    /// When each CPU beat last, in nanoseconds since the start.
    last: Vec<AtomicU64>,
}

impl Metronome {
    /// Beats on all CPUs when it returns.
    pub fn start() -> Result<Self> {
        let mask = sched_getaffinity(Some(getpid())).doing("asking for this process's CPUs")?;
        let cpus: Vec<_> = (0..CpuSet::MAX_CPU).filter(|cpu| mask.is_set(*cpu)).collect();
        let beats = Arc::new(Beats {
            start: Instant::now(),
            pause: Duration::from_millis(if Accel::from_env() == Accel::Kvm { 10 } else { 1 }),
            over: AtomicBool::new(false),
            longest: AtomicU64::new(0),
            last: cpus.iter().map(|_| AtomicU64::new(0)).collect(),
        });
        let mut metronome = Self { beats, threads: Vec::new() };
        let (tells, told) = channel();
        for (index, &cpu) in cpus.iter().enumerate() {
            let (beats, tells) = (Arc::clone(&metronome.beats), tells.clone());
            metronome.threads.push(spawn(move || {
                let pinned = pin(cpu);
                // From here on it is late, not just begun.
                beats.last[index].store(beats.now(), Ordering::Relaxed);
                let _ = tells.send(pinned);
                beats.beat(index);
            }));
        }
        drop(tells);
        for _ in cpus {
            told.recv().doing("waiting for a CPU's first beat")??;
        }
        Ok(metronome)
    }

    /// The longest gap of any CPU so far, or since the last [`Metronome::take`]. A gap that is not
    /// over yet counts as long as it is.
    pub fn longest(&self) -> Duration {
        self.beats.pending().max(nanos(self.beats.longest.load(Ordering::Relaxed)))
    }

    /// The same, and from now on only later gaps count. One that is not over yet counts again, and
    /// in full: it is a later one too.
    pub fn take(&self) -> Duration {
        self.beats.pending().max(nanos(self.beats.longest.swap(0, Ordering::Relaxed)))
    }

    /// Ends it. The longest gap of any CPU, as [`Metronome::longest`] counts.
    pub fn end(mut self) -> Duration {
        let longest = self.longest();
        self.beats.over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that is gone would have looked like a CPU that is late for ever.
            thread.join().unwrap_or_else(|panic| resume_unwind(panic));
        }
        longest
    }
}

impl Drop for Metronome {
    fn drop(&mut self) {
        self.beats.over.store(true, Ordering::Relaxed);
    }
}

impl Beats {
    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn beat(&self, index: usize) {
        while !self.over.load(Ordering::Relaxed) {
            sleep(self.pause);
            let now = self.now();
            let gap = now - self.last[index].load(Ordering::Relaxed);
            // In this order nobody misses it: at worst it is seen twice.
            self.longest.fetch_max(gap, Ordering::Release);
            self.last[index].store(now, Ordering::Release);
        }
    }

    /// The longest time since a CPU's last beat.
    fn pending(&self) -> Duration {
        let oldest = self.last.iter().map(|last| last.load(Ordering::Acquire)).min();
        nanos(self.now().saturating_sub(oldest.unwrap_or(u64::MAX)))
    }
}

/// Keeps the thread that asks on one CPU.
fn pin(cpu: usize) -> Result<()> {
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).doing(format_args!("staying on CPU {cpu}"))
}

fn nanos(nanos: u64) -> Duration {
    Duration::from_nanos(nanos)
}

#[cfg(test)]
mod tests {
    use super::{Duration, Metronome, sleep};

    #[test]
    fn a_gap_that_is_not_over_counts() {
        let metronome = Metronome::start().unwrap();
        // However late any thread is: each CPU has beaten since, or has kept its thread waiting.
        sleep(Duration::from_millis(20));
        assert!(metronome.take() >= Duration::from_millis(1));
        sleep(Duration::from_millis(20));
        assert!(metronome.end() >= Duration::from_millis(1));
    }
}
