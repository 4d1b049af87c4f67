//! `pmemsave`: QEMU's own copy of its guest's memory, in slices, each held against a read of ours just
//! before it.
//!
//! QEMU copies a slice with its big lock taken: whatever in the guest needs QEMU waits meanwhile, and a
//! guest that is translated stands. So slices are small, and one that took longer than the stall budget
//! makes the next ones smaller. Between two slices the guest runs: the image is smeared.
//!
//! Where libvirt has the monitor, its own pmemsave is used, DOMAIN_MEMORY_PEEK, on a connection of this
//! process: what it gives is guest memory, which the guardian never sees.
//!
//! What the host has no memory behind is not asked for: QEMU reads through its mapping, which would give
//! memory to it. Nor are pages that we could not read ourselves: QEMU would die of them.

use super::process::{PassError, Work, bit, differences, page_runs, page_spans, put_first};
use crate::copy::{Cell, Changed, Cut, PAGE_BYTES, Scratch};
use crate::find::LibvirtDomain;
use crate::guardian::{Guardian, GuardianError};
use crate::plan::PlannedSlices;
use crate::seal::is_zero;
use crate::told;
use evidence::block::index;
use evidence::manifest::{SliceWay, Slices};
use evidence::record::Span;
use evidence::state::{page_count, pages};
use evidence::{GuestRange, PAGE, PageState};
use host::Process;
use host::process::Fd;
use qemu::libvirt::{Domain, Libvirt, LibvirtError};
use rustix::fs::MemfdFlags;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Why memory could not be copied by QEMU.
#[derive(Debug, thiserror::Error)]
pub enum SliceError {
    /// There is no file to copy into.
    #[error("no file in memory could be made for QEMU to copy into")]
    Make(#[source] io::Error),
    /// QEMU did not.
    #[error("QEMU did not copy {at}")]
    Ask {
        /// What it was asked for.
        at: GuestRange,
        /// Why.
        #[source]
        cause: GuardianError,
    },
    /// libvirt did not.
    #[error("libvirt gave nothing of {at}")]
    Peek {
        /// What it was asked for.
        at: GuestRange,
        /// Why.
        #[source]
        cause: LibvirtError,
    },
    /// It gave zeros where there are none.
    #[error(
        "{at} came as zeros, and is read as something else before and after: a disk may be full"
    )]
    Zeros {
        /// The page.
        at: GuestRange,
    },
    /// libvirt does not show the domain to this process.
    #[error("{0}")]
    Domain(String),
    /// QEMU does not take the file.
    #[error("QEMU did not take the file that it shall copy into")]
    Pass(#[source] GuardianError),
    /// The file has another length than the slice.
    #[error("QEMU wrote {got} bytes for {at}")]
    Length {
        /// What it was asked for.
        at: GuestRange,
        /// What the file holds.
        got: u64,
    },
    /// What it wrote cannot be read.
    #[error("what QEMU wrote for {at} cannot be read")]
    Read {
        /// What it was asked for.
        at: GuestRange,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

impl From<SliceError> for PassError {
    fn from(error: SliceError) -> Self {
        PassError::Slices(error)
    }
}

/// What QEMU's copying gave.
#[derive(Debug)]
pub struct Sliced {
    /// For the record; absent when QEMU never had the file.
    pub slices: Option<Slices>,
    /// How the pass ended.
    pub end: Result<(), Cut<PassError>>,
    /// The file could not be taken back.
    pub doubt: Option<String>,
}

/// One pass over the running guest: each block is read from outside, then copied by QEMU, and the copy is
/// kept.
pub fn pmemsave(
    work: &Work<'_>,
    planned: &PlannedSlices,
    through: Option<&LibvirtDomain>,
    guardian: &mut Guardian,
    cells: &mut [Cell],
    passes: &mut Vec<super::process::Pass>,
) -> Sliced {
    let none = |error: SliceError| Sliced {
        slices: None,
        end: Err(Cut::Failed(error.into())),
        doubt: None,
    };
    if let Err(cut) = work.begin_pass() {
        return Sliced { slices: None, end: Err(cut), doubt: None };
    }
    let way = match (planned.by, through) {
        (SliceWay::MemoryPeek, Some(domain)) => libvirt(domain),
        _ if !work.source.is_seen() => shared_file(guardian),
        _ => file(work.source.process(), guardian),
    };
    let way = match way {
        Ok(way) => way,
        Err(error) => return none(error),
    };
    let figures = Slices {
        by: planned.by,
        slice_bytes: planned.slice_bytes,
        last_bytes: planned.slice_bytes,
        budget_ns: planned.at_most_ns,
        ..Slices::default()
    };
    let slicer = Mutex::new(Slicer { way, figures, quick: 0 });
    // One after the other, as QEMU copies them.
    let mut scratches = Scratch::for_workers(1);
    let end = work.pass(1, None, passes, cells, &mut scratches, |cell, scratch| {
        // Nobody else takes it, and a worker that panicked has taken the run with it.
        let mut slicer = slicer.lock().unwrap_or_else(PoisonError::into_inner);
        block(work, &mut slicer, cell, scratch)
    });
    let Slicer { way, figures, .. } = slicer.into_inner().unwrap_or_else(PoisonError::into_inner);
    let ended = match way {
        Way::File { guardian, .. } => guardian.end_slices(),
        Way::Libvirt { .. } => Ok(()),
    };
    let doubt = ended.err().map(|error| {
        format!("the file that QEMU copied into could not be taken back at once: {}", told(&error))
    });
    Sliced { slices: Some(figures), end, doubt }
}

/// Reads a block, has QEMU copy it, and keeps the copy.
fn block(
    work: &Work<'_>,
    slicer: &mut Slicer<'_>,
    cell: &mut Cell,
    scratch: &mut Scratch,
) -> Result<(), PassError> {
    let (ours, theirs, states) = scratch.parts(cell.block);
    if !work.source.is_seen() {
        return block_unseen(work, slicer, cell, theirs, states);
    }
    ours.fill(0);
    theirs.fill(0);
    let earlier = work.read(cell.block, ours, states)?;
    let t0_ns = work.now();
    let is_data = |page: usize| states.get(page) == Some(&PageState::Data);
    for run in page_runs(cell.block, is_data) {
        let start = cell.block.start() + run.start as u64;
        slicer.copy(start, &mut theirs[run])?;
    }
    let copied = Span { t0_ns, t1_ns: work.now() };
    if let Some((changed, first)) = differences(cell.block, theirs, ours, |_| true) {
        for (at, before) in became_zeros(cell.block, theirs, ours, &changed) {
            // A page can become zeros and what it was; not twice, just when QEMU looks.
            if is_still(work, at, before)? && slicer.gives_zeros(at)? && is_still(work, at, before)?
            {
                return Err(SliceError::Zeros { at }.into());
            }
        }
        cell.first = Some(Box::new(first));
        cell.changed = Some(Box::new(changed));
    }
    put_first(work.store, cell.block, theirs, ours, states)?;
    cell.states.copy_from_slice(states);
    // At what QEMU was not asked for there was one look.
    let asked = states.contains(&PageState::Data);
    cell.earlier = asked.then_some(earlier);
    cell.stored = if asked { copied } else { earlier };
    cell.pass = 1;
    Ok(())
}

/// Has QEMU copy a block that may not be looked at, and keeps the copy.
fn block_unseen(
    work: &Work<'_>,
    slicer: &mut Slicer<'_>,
    cell: &mut Cell,
    theirs: &mut [u8],
    states: &mut [PageState],
) -> Result<(), PassError> {
    let t0_ns = work.now();
    let len = index(cell.block.len()).min(theirs.len());
    let theirs = &mut theirs[..len];
    slicer.copy(cell.block.start(), theirs)?;
    cell.stored = Span { t0_ns, t1_ns: work.now() };
    for (state, span) in states.iter_mut().zip(page_spans(cell.block)) {
        let zero = theirs.get(span).is_some_and(is_zero);
        *state = if zero { PageState::Zero } else { PageState::Data };
    }
    put_first(work.store, cell.block, theirs, &mut [], states)?;
    cell.states.copy_from_slice(states);
    cell.pass = 1;
    Ok(())
}

/// The pages that differ and are nothing but zeros in QEMU's copy, each with what was read of it before.
///
/// Neither QEMU nor libvirt look whether all of a copy was written: on a full disk its end comes as zeros,
/// without an error.
fn became_zeros<'a>(
    block: GuestRange,
    theirs: &[u8],
    ours: &'a [u8],
    changed: &Changed,
) -> Vec<(GuestRange, &'a [u8])> {
    let is_zero = |span: Range<usize>| theirs.get(span).is_some_and(|b| b.iter().all(|b| *b == 0));
    pages(block)
        .zip(page_spans(block))
        .enumerate()
        .filter(|(page, (_, span))| bit(changed, *page) && is_zero(span.clone()))
        .filter_map(|(_, (at, span))| Some((at, ours.get(span)?)))
        .collect()
}

/// Whether a page is what it was `before` QEMU copied it.
fn is_still(work: &Work<'_>, at: GuestRange, before: &[u8]) -> Result<bool, PassError> {
    let (mut now, mut states) = ([0; PAGE_BYTES], [PageState::Hole; 2]);
    let states = &mut states[..index(page_count(at))];
    let now = &mut now[..index(at.len()).min(PAGE_BYTES)];
    work.read(at, now, states)?;
    Ok(now == before)
}

/// How a slice comes to us.
enum Way<'a> {
    /// In a file of ours that QEMU has too, and knows by the name `its`.
    File { guardian: &'a mut Guardian, file: File, its: PathBuf },
    /// From libvirt.
    Libvirt { libvirt: Box<Libvirt>, domain: Domain },
}

/// Gives QEMU a file in memory, and sees which of QEMU's descriptors it is.
fn file<'a>(process: &Process, guardian: &'a mut Guardian) -> Result<Way<'a>, SliceError> {
    let make = |cause: io::Error| SliceError::Make(cause);
    let file = rustix::fs::memfd_create("stillframe-slice", MemfdFlags::CLOEXEC);
    let file = file.map(File::from).map_err(|errno| make(errno.into()))?;
    let meta = file.metadata().map_err(make)?;
    guardian.begin_slices(file.as_fd()).map_err(SliceError::Pass)?;
    let fds = process.fds().map_err(|error| make(io::Error::other(told(&error))))?;
    let is_it = |fd: &&Fd| (fd.file.dev, fd.file.inode) == (meta.dev(), meta.ino());
    match fds.iter().find(is_it) {
        Some(fd) => {
            let its = PathBuf::from(format!("/proc/self/fd/{}", fd.number));
            Ok(Way::File { guardian, file, its })
        }
        None => {
            // Taken back at once; whatever comes of that, the guardian does so in the end.
            let _ = guardian.end_slices();
            Err(make(io::Error::other("QEMU does not show the descriptor that it was given")))
        }
    }
}

/// A file in memory that QEMU opens by its path: who may not look at QEMU cannot know its descriptors.
/// The path cannot be guessed, and nobody but us can read the file; the guardian removes it.
fn shared_file(guardian: &mut Guardian) -> Result<Way<'_>, SliceError> {
    let make = |cause: io::Error| SliceError::Make(cause);
    let dir = Path::new(SHARED).join(format!("stillframe-{}", host::random::uuid()));
    guardian.begin_slices_in(&dir).map_err(SliceError::Pass)?;
    // To be gone through, not to be listed.
    DirBuilder::new().mode(0o711).create(&dir).map_err(make)?;
    let its = dir.join(host::random::uuid());
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o622).open(&its);
    let file = file.map_err(make)?;
    // QEMU may be another user.
    file.set_permissions(Permissions::from_mode(0o622)).map_err(make)?;
    Ok(Way::File { guardian, file, its })
}

/// Memory of the host that every process sees, unless it has mounts of its own.
const SHARED: &str = "/dev/shm";

/// A connection of this process to libvirt, and the domain there: the one that the guardian asks.
fn libvirt(known: &LibvirtDomain) -> Result<Way<'static>, SliceError> {
    let connected = known.connect(Path::new(&known.socket), PEEK).map_err(SliceError::Domain)?;
    Ok(Way::Libvirt { libvirt: Box::new(connected.0), domain: connected.1 })
}

impl Way<'_> {
    /// Fills `buf` with QEMU's copy of `at`; how long that took, in nanoseconds.
    fn slice(&mut self, at: GuestRange, buf: &mut [u8]) -> Result<u64, SliceError> {
        match self {
            Self::File { guardian, file, its } => {
                let took_ns = guardian
                    .slice(at.start(), at.len(), its)
                    .map_err(|cause| SliceError::Ask { at, cause })?;
                let read = |cause| SliceError::Read { at, cause };
                let got = file.metadata().map_err(read)?.len();
                if got != at.len() {
                    return Err(SliceError::Length { at, got });
                }
                file.read_exact_at(buf, 0).map_err(read)?;
                Ok(took_ns)
            }
            Self::Libvirt { libvirt, domain } => {
                let len = u32::try_from(at.len()).unwrap_or(u32::MAX);
                let began = Instant::now();
                let bytes = libvirt
                    .peek(domain, at.start(), len, PEEK)
                    .map_err(|cause| SliceError::Peek { at, cause })?;
                let took = began.elapsed();
                if bytes.len() != buf.len() {
                    return Err(SliceError::Length { at, got: bytes.len() as u64 });
                }
                buf.copy_from_slice(&bytes);
                Ok(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX))
            }
        }
    }
}

/// How long libvirt may take for an answer.
const PEEK: Duration = Duration::from_secs(10);

/// What is copied, and what that took.
struct Slicer<'a> {
    way: Way<'a>,
    figures: Slices,
    /// How many of the last ones were [`QUICK`].
    quick: u32,
}

/// So many slices in a row that each took less than this part of the budget make the next ones twice as
/// long. A small one costs nearly as much as a great one: on a host that was busy for a moment, a copy of
/// 160 MiB that only went down to pages took minutes.
const QUICK: (u32, u64) = (8, 4);

/// Notes a slice that took so long, of which `quick` before it in a row were so, and says how long the
/// next may be.
fn note(figures: &mut Slices, quick: &mut u32, bytes: u64, took_ns: u64) {
    let (in_a_row, part) = QUICK;
    figures.count += 1;
    figures.bytes += bytes;
    figures.total_ns = figures.total_ns.saturating_add(took_ns);
    figures.longest_ns = figures.longest_ns.max(took_ns);
    // A short one, at the end of a run of pages, says nothing of longer ones.
    let whole = bytes == figures.last_bytes;
    if took_ns > figures.budget_ns {
        *quick = 0;
        figures.over_budget += 1;
        figures.last_bytes = (figures.last_bytes / 2 / PAGE * PAGE).max(PAGE);
    } else if took_ns >= figures.budget_ns / part {
        *quick = 0;
    } else if whole {
        *quick += 1;
        if *quick >= in_a_row {
            *quick = 0;
            figures.last_bytes = (figures.last_bytes.saturating_mul(2)).min(figures.slice_bytes);
        }
    }
}

impl Slicer<'_> {
    /// Fills `buf` with what QEMU copies from `gpa` on.
    fn copy(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), SliceError> {
        let mut done = 0;
        while done < buf.len() {
            let end = buf.len().min(done.saturating_add(index(self.figures.last_bytes)));
            let Some(at) = GuestRange::from_ends(gpa + done as u64, gpa + end as u64) else {
                break;
            };
            self.slice(at, &mut buf[done..end])?;
            done = end;
        }
        Ok(())
    }

    /// Whether QEMU's copy of a page is zeros.
    fn gives_zeros(&mut self, at: GuestRange) -> Result<bool, SliceError> {
        let mut page = [1; PAGE_BYTES];
        let page = &mut page[..index(at.len()).min(PAGE_BYTES)];
        self.copy(at.start(), page)?;
        Ok(page.iter().all(|byte| *byte == 0))
    }

    fn slice(&mut self, at: GuestRange, buf: &mut [u8]) -> Result<(), SliceError> {
        let took_ns = self.way.slice(at, buf)?;
        note(&mut self.figures, &mut self.quick, at.len(), took_ns);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_become_smaller_and_greater_again() {
        let mut figures = Slices {
            slice_bytes: 5 * PAGE,
            last_bytes: 5 * PAGE,
            budget_ns: 100,
            ..Slices::default()
        };
        let mut quick = 0;
        let mut next = |bytes, took_ns| {
            note(&mut figures, &mut quick, bytes, took_ns);
            figures.last_bytes / PAGE
        };
        let long = [(5, 101), (2, 101), (1, 101)];
        assert_eq!(long.map(|(pages, took)| next(pages * PAGE, took)), [2, 1, 1]);
        // Neither those that took more, nor those that were cut short; one that took more begins anew.
        assert_eq!([(); 20].map(|()| next(PAGE, 25)), [1; 20]);
        assert_eq!([(); 7].map(|()| next(PAGE, 24)), [1; 7]);
        assert_eq!([25, 24, 24, 24, 24, 24, 24, 24, 24].map(|took| next(PAGE, took))[7..], [1, 2]);
        assert_eq!([(); 20].map(|()| next(PAGE, 1)), [2; 20]);
        assert_eq!([(); 8].map(|()| next(2 * PAGE, 1))[7], 4);
        assert_eq!([(); 8].map(|()| next(4 * PAGE, 1))[7], 5);
        assert_eq!([(); 8].map(|()| next(5 * PAGE, 1))[7], 5);
        assert_eq!((figures.count, figures.over_budget, figures.longest_ns), (83, 3, 101));
    }

    #[test]
    fn pages_that_came_as_zeros_are_looked_at_again() {
        let block = GuestRange::new(1 << 20, 4 * PAGE).unwrap();
        let mut ours = vec![7; 4 * PAGE_BYTES];
        let mut theirs = ours.clone();
        // Page 1 changed, 2 and 3 came as zeros, of which 3 was zeros before.
        theirs[PAGE_BYTES] = 8;
        theirs[2 * PAGE_BYTES..].fill(0);
        ours[3 * PAGE_BYTES..].fill(0);
        let (changed, _) = differences(block, &theirs, &ours, |_| true).unwrap();
        let found = became_zeros(block, &theirs, &ours, &changed);
        let page = GuestRange::new((1 << 20) + 2 * PAGE, PAGE).unwrap();
        assert_eq!(found, [(page, &[7; PAGE_BYTES][..])]);
    }
}
