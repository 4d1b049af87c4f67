//! The kernel's soft-dirty tracking: which pages a process has written since its bits were cleared
//! (kernel: Documentation/admin-guide/mm/soft-dirty.rst).
//!
//! Where it lies, it lies silently, so that it is tried out first ([`probe`]): a kernel without
//! CONFIG_MEM_SOFT_DIRTY takes the command to clear and then shows no page as written, ever.
//! What else it does not see is in docs/tracking.md, and kept away by the plan.

use crate::HostError;
use crate::kernel_text::open_for_commands;
use crate::own_memory::{OwnMemory, PAGE_BYTES};
use crate::pagemap::{Entry, Pagemap};
use crate::process::Process;
use rustix::io::Errno;
use std::fs::File;
use std::hint::black_box;
use std::io;
use std::time::{Duration, Instant};

/// The soft-dirty bits of one process.
#[derive(Debug)]
pub struct SoftDirty {
    clear_refs: File,
    process: Process,
}

impl SoftDirty {
    /// Opens the way to clear the bits of `process`. Changes nothing yet.
    ///
    /// # Errors
    /// The process is gone, or the kernel does not let us.
    pub fn open(process: &Process) -> Result<Self, HostError> {
        let clear_refs = open_for_commands(process.dir(), "clear_refs")
            .map_err(|e| process.error("clear_refs", e))?;
        let process = process.try_clone().map_err(|e| HostError::file("a pidfd", e))?;
        Ok(Self { clear_refs, process })
    }

    /// Clears the bits of all pages. A store that any thread makes after this has returned sets the
    /// bit of its page before it is seen; one that was made before has been made (the kernel
    /// flushes the TLBs and KVM's page tables before the write returns).
    ///
    /// Whoever of the process's threads needs the kernel's lock on its mappings waits meanwhile.
    ///
    /// # Errors
    /// The process is gone.
    pub fn clear(&self) -> Result<(), HostError> {
        loop {
            match rustix::io::pwrite(&self.clear_refs, b"4", 0) {
                Err(Errno::INTR) => {}
                Ok(1) => return Ok(()),
                Ok(_) => return Err(self.process.error("clear_refs", io::ErrorKind::WriteZero)),
                Err(error) => return Err(self.process.error("clear_refs", error)),
            }
        }
    }
}

/// What tracking costs on this host, tried out on memory of our own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// To clear the bits of 1 GiB of small pages.
    pub clear_a_gib: Duration,
    /// To look at the entries of 1 GiB, one thread.
    pub scan_a_gib: Duration,
}

/// Why soft-dirty cannot be used here.
#[derive(Debug, thiserror::Error)]
pub enum Unfit {
    /// The bits do not follow what is written.
    #[error("this kernel does not track written pages (CONFIG_MEM_SOFT_DIRTY): {0}")]
    NoTracking(&'static str),
    /// Frame numbers read as 0.
    #[error("page frame numbers are hidden from us (CAP_SYS_ADMIN)")]
    NoFrames,
    /// The test itself was not possible.
    #[error("soft-dirty could not be tried out")]
    Host(#[source] HostError),
}

/// Memory that is tried: 16 MiB, for some 20 ms in all.
const PAGES: usize = 4096;

/// How many times a GiB has it.
const A_GIB: u32 = 64;

/// Tries soft-dirty out on memory of our own: clears, stores, looks.
///
/// # Errors
/// [`Unfit`].
pub fn probe() -> Result<Probe, Unfit> {
    let me = Process::open(std::process::id()).map_err(Unfit::Host)?;
    let bits = SoftDirty::open(&me).map_err(Unfit::Host)?;
    let pagemap = Pagemap::open(&me).map_err(Unfit::Host)?;
    let no_memory = |error| Unfit::Host(HostError::file("16 MiB of memory", error));
    let mut own = OwnMemory::in_small_pages(PAGES * PAGE_BYTES).map_err(no_memory)?;
    let address = own.address();
    let look = || -> Result<Vec<Entry>, Unfit> {
        let mut entries = vec![Entry::default(); PAGES];
        let failed = |error| Unfit::Host(me.error("pagemap", error));
        pagemap.read(address, &mut entries).map_err(failed)?;
        Ok(entries)
    };
    let mut store = |page: usize| {
        own.bytes()[page * PAGE_BYTES] = 1;
        black_box(own.bytes());
    };
    (0..PAGES).for_each(&mut store);
    let began = Instant::now();
    bits.clear().map_err(Unfit::Host)?;
    let clear_a_gib = began.elapsed() * A_GIB;
    let began = Instant::now();
    let cleared = look()?;
    let scan_a_gib = began.elapsed() * A_GIB;
    if cleared.iter().any(|entry| entry.present() && entry.frame() == 0) {
        return Err(Unfit::NoFrames);
    }
    let written: Vec<usize> = (0..PAGES).step_by(97).collect();
    written.iter().copied().for_each(store);
    let stored = look()?;
    // A page that the host moved meanwhile may show as written; never the other way round.
    if !written.iter().all(|page| stored[*page].soft_dirty()) {
        return Err(Unfit::NoTracking("a page that was written is not shown"));
    }
    if stored.iter().all(|entry| entry.soft_dirty()) {
        return Err(Unfit::NoTracking("every page is shown as written"));
    }
    Ok(Probe { clear_a_gib, scan_a_gib })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_that_tracks_says_so_and_another_one_is_found_out() {
        match probe() {
            Ok(probe) => assert!(probe.clear_a_gib > Duration::ZERO, "{probe:?}"),
            Err(Unfit::NoTracking(why)) => println!("this kernel does not: {why}"),
            Err(Unfit::NoFrames) => assert!(!rustix::process::geteuid().is_root()),
            Err(error) => panic!("{error:?}"),
        }
    }
}
