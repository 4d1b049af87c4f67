//! What this host allows: a loop that reads a guest's memory and does next to nothing beside.
//!
//! It has no rate, no record, no way to go wrong, and knows the pages that are there before the
//! clock starts. Whoever reads the same memory can come near its times, not below them.

use std::fs::File;
use std::io::IoSliceMut;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use crate::error::{Doing, Result, failed};
use crate::guest::Guest;

const PAGE: usize = 4096;

/// Bytes read by one call at most: 1 MiB, with which the loop was quickest.
const PIECE: usize = 1 << 20;

/// A guest's memory, as far as the host has it, and as much memory of our own, faulted in.
pub struct Bare {
    pid: Pid,
    workers: usize,
    /// Host virtual addresses and lengths.
    pieces: Vec<(usize, usize)>,
    kept: Vec<u8>,
    /// Bytes of `kept` before its first whole page.
    skip: usize,
}

/// Seconds that each way of going through all of it took.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    /// Reading, over and over into one buffer a worker.
    pub read: f64,
    /// Reading into memory that holds all of it.
    pub keep: f64,
    /// Reading again, and comparing with what is kept.
    pub compare: f64,
}

impl Bare {
    /// Looks at which pages of an anonymous guest are present, and takes the memory.
    pub fn new(guest: &mut Guest) -> Result<Self> {
        let pagemap = File::open(format!("/proc/{}/pagemap", guest.pid()))?;
        let mut pieces = Vec::new();
        for range in guest.ram()? {
            let hva = usize::try_from(guest.hva(range.gpa)?)?;
            present(&pagemap, hva, usize::try_from(range.len)?, &mut pieces)?;
        }
        let len: usize = pieces.iter().map(|(_, len)| len).sum();
        let workers = thread::available_parallelism()?.get();
        let pid = Pid::from_raw(i32::try_from(guest.pid())?);
        // Written, and so faulted in. Page on page is copied quickest: it begins at one.
        let kept = vec![1; len + PAGE];
        let skip = kept.as_ptr().align_offset(PAGE);
        Ok(Self { pid, workers, pieces, kept, skip })
    }

    /// Bytes of the guest that are there.
    pub fn len_bytes(&self) -> usize {
        self.pieces.iter().map(|(_, len)| len).sum()
    }

    /// Goes through all of it in each way, with a worker on each CPU.
    pub fn times(&mut self) -> Result<Times> {
        let pid = self.pid;
        Ok(Times {
            read: self.pass(|at, kept, buf| read(pid, at, &mut buf[..kept.len()]))?,
            keep: self.pass(|at, kept, _| read(pid, at, kept))?,
            compare: self.pass(|at, kept, buf| {
                let buf = &mut buf[..kept.len()];
                read(pid, at, buf)?;
                // What changed meanwhile is kept, as a second pass has to.
                if buf != kept {
                    kept.copy_from_slice(buf);
                }
                Ok(())
            })?,
        })
    }

    fn pass(
        &mut self,
        work: impl Fn(usize, &mut [u8], &mut [u8]) -> Result<()> + Sync,
    ) -> Result<f64> {
        let mut rest = &mut self.kept[self.skip..];
        let mut parts = Vec::with_capacity(self.pieces.len());
        for &(hva, len) in &self.pieces {
            let (part, behind) = rest.split_at_mut(len);
            parts.push((hva, part));
            rest = behind;
        }
        let queue = Mutex::new(parts.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let one = || {
            let mut buf = vec![1; PIECE + PAGE];
            let skip = buf.as_ptr().align_offset(PAGE);
            while let Some((hva, part)) = next() {
                work(hva, part, &mut buf[skip..])?;
            }
            Ok(())
        };
        let begin = Instant::now();
        thread::scope(|scope| {
            let workers: Vec<_> = (0..self.workers).map(|_| scope.spawn(one)).collect();
            workers.into_iter().try_for_each(|w| w.join().unwrap_or(Err(failed("a panic"))))
        })?;
        Ok(begin.elapsed().as_secs_f64())
    }
}

fn read(pid: Pid, hva: usize, buf: &mut [u8]) -> Result<()> {
    let there = RemoteIoVec { base: hva, len: buf.len() };
    let len = buf.len();
    match process_vm_readv(pid, &mut [IoSliceMut::new(buf)], &[there])? {
        read if read == len => Ok(()),
        read => Err(failed(format_args!("{read} of {len} bytes at {hva:#x}"))),
    }
}

/// Adds the runs of present pages among `len` bytes from `hva` on, cut into pieces.
fn present(pagemap: &File, hva: usize, len: usize, pieces: &mut Vec<(usize, usize)>) -> Result<()> {
    let mut entries = vec![0; len / PAGE * 8];
    pagemap.read_exact_at(&mut entries, (hva / PAGE * 8) as u64).doing("reading pagemap")?;
    for (page, entry) in entries.as_chunks::<8>().0.iter().enumerate() {
        if u64::from_ne_bytes(*entry) >> 63 == 0 {
            continue;
        }
        let at = hva + page * PAGE;
        match pieces.last_mut() {
            Some((start, len)) if *start + *len == at && *len < PIECE => *len += PAGE,
            _ => pieces.push((at, PAGE)),
        }
    }
    Ok(())
}
