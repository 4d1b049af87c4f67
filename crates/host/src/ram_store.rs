//! The store in memory: a mapped memfd, faulted in before the window opens.
//!
//! A memfd and not private memory, because the process that seals can be given it to read.
//! Measured (2 GiB, one thread): once faulted in, both are written at 9.5 GB/s, with small pages
//! and with huge ones; faulting in costs 2.9 GB/s for the memfd and 4.0 GB/s for private memory
//! with small pages, 0.7 GB/s with huge ones, which must be found and cleared. Writing to pages
//! that are not faulted in costs the window 0.4-1.4 GB/s: hence [`RamStore::reserve`].

use crate::memory::{self, HostMemory};
use crate::store::{Store, StoreError, length_of, offset_of};
use evidence::{GuestRange, Segments};
use rustix::fs::{MemfdFlags, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ffi::c_void;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock};

/// The unit of faulting in, of accounting and of locks: 1 MiB of the store.
const CELL: u64 = CELL_LEN as u64;
const CELL_LEN: usize = 1 << 20;

/// Cells faulted in between two looks at the host's memory: 32 MiB, some 10 ms.
const CELLS_A_STEP: usize = 32;

/// What we may need beside the store, left free in our control group: 64 MiB.
const BESIDE: u64 = 64 << 20;

/// All tasks of the host wait for memory for a tenth of the time: it thrashes.
const FULL_PRESSURE_PERCENT: f64 = 10.0;

/// What sets the limit of a RAM store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Half of MemAvailable.
    HalfOfAvailable,
    /// The control group.
    Cgroup(PathBuf),
    /// The user, by `--max-ram`.
    MaxRam,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::HalfOfAvailable => f.write_str("half of the host's available memory"),
            Bound::Cgroup(group) => write!(f, "limit of control group {}", group.display()),
            Bound::MaxRam => f.write_str("--max-ram"),
        }
    }
}

/// The most that a RAM store may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limit {
    /// In bytes.
    pub bytes: u64,
    /// What sets it.
    pub bound: Bound,
}

/// The mapping of a store's memfd.
#[derive(Debug)]
struct Mapped {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread; `Mapped` owns it and no reference
// into it outlives a call. Its accesses are `unsafe fn`s whose callers rule out races.
unsafe impl Send for Mapped {}
// SAFETY: as for `Send`: all that a shared `Mapped` can do without `unsafe` is to ask the kernel
// to fault pages in, which is no access in the sense of the language.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps the first `len` bytes of `memfd`, which must be that long.
    fn new(memfd: &OwnedFd, len: usize) -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses: no memory of ours changes.
        let start = unsafe {
            rustix::mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, memfd, 0)
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    /// The address of `range`, which must lie in the mapping.
    fn at(&self, range: &Range<usize>) -> *mut u8 {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {}", self.len);
        self.start.as_ptr().wrapping_add(range.start)
    }

    /// Faults `range` in; gives an error where a plain write would be killed by SIGBUS.
    fn populate(&self, range: Range<usize>) -> io::Result<()> {
        let address = self.at(&range).cast::<c_void>();
        loop {
            // SAFETY: `at` checked that the range lies in our mapping. Populating changes no
            // byte: pages that exist stay, others appear as zeros, which they already read as.
            match unsafe { rustix::mm::madvise(address, range.len(), Advice::LinuxPopulateWrite) } {
                Err(Errno::INTR | Errno::AGAIN) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Keeps all that is faulted in from being swapped out.
    fn lock(&self) -> io::Result<()> {
        let address = self.start.as_ptr().cast::<c_void>();
        let flags = rustix::mm::MlockFlags::ONFAULT;
        // SAFETY: exactly our own mapping; locking changes no byte.
        Ok(unsafe { rustix::mm::mlock_with(address, self.len, flags) }?)
    }

    /// Copies `bytes` to `offset`.
    ///
    /// # Safety
    /// Nothing else may access these bytes meanwhile.
    unsafe fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(&(offset..offset + bytes.len()));
        // SAFETY: `at` checked that the target lies in our mapping, which lives as long as
        // `self`; the file cannot shrink under it (F_SEAL_SHRINK). The caller rules out races,
        // and `bytes` cannot overlap memory that no reference leads to.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Lends the bytes of `range` to `work`.
    ///
    /// # Safety
    /// Nothing else may access these bytes meanwhile.
    unsafe fn lend(&self, range: Range<usize>, work: &mut dyn FnMut(&mut [u8])) {
        // SAFETY: as in `copy_in`; the mapping holds initialised bytes throughout, for the kernel
        // gives zeros. The reference ends with the call, and the caller rules out others.
        work(unsafe { std::slice::from_raw_parts_mut(self.at(&range), range.len()) });
    }

    /// Copies what is at `offset` into `buf`.
    ///
    /// # Safety
    /// Nothing may write these bytes meanwhile.
    unsafe fn copy_out(&self, offset: usize, buf: &mut [u8]) {
        let from = self.at(&(offset..offset + buf.len()));
        // SAFETY: as in `copy_in`, with the directions exchanged; the mapping holds initialised
        // bytes throughout, for the kernel gives zeros.
        unsafe { std::ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and the last that uses it goes with `self`. It cannot
        // fail for a mapping that was made with this address and length.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// The store in memory.
#[derive(Debug)]
pub struct RamStore {
    segments: Segments,
    memfd: OwnedFd,
    mapped: Mapped,
    /// One for each cell: held while the cell is copied, so that safe code cannot race whatever
    /// ranges it puts and gets; says whether the cell is faulted in.
    cells: Box<[RwLock<bool>]>,
    /// Bytes that may still be faulted in by `put`.
    spare: AtomicU64,
    /// Another process may write it: nothing is put, got or lent here.
    open: bool,
}

impl RamStore {
    /// The most that a RAM store may take now: the least of half of MemAvailable, what the
    /// control groups leave (without 64 MiB for the rest of us), and `max_ram` bytes.
    ///
    /// # Errors
    /// `/proc/meminfo` cannot be read.
    pub fn limit(max_ram: Option<u64>) -> Result<Limit, StoreError> {
        let half = memory::host_memory()?.available / 2;
        let mut limit = Limit { bytes: half, bound: Bound::HalfOfAvailable };
        if let Some(headroom) = memory::cgroup_headroom() {
            let bytes = headroom.bytes.saturating_sub(BESIDE);
            if bytes < limit.bytes {
                limit = Limit { bytes, bound: Bound::Cgroup(headroom.group) };
            }
        }
        if let Some(bytes) = max_ram.filter(|max| *max < limit.bytes) {
            limit = Limit { bytes, bound: Bound::MaxRam };
        }
        Ok(limit)
    }

    /// Makes the store and faults in what `needed` touches, in steps; between them looks at the
    /// host's memory, and gives all back when it became scarce.
    ///
    /// What is put outside `needed` is faulted in then, as far as `limit` goes: it costs the
    /// window time. `progress` is told bytes done and bytes in all after each step.
    ///
    /// # Errors
    /// [`StoreError::OverLimit`] before anything is taken, [`StoreError::Pressure`],
    /// [`StoreError::Cancelled`] once `cancelled` says so.
    pub fn reserve(
        segments: Segments,
        needed: &[GuestRange],
        limit: &Limit,
        progress: impl FnMut(u64, u64),
        cancelled: impl Fn() -> bool,
    ) -> Result<Self, StoreError> {
        let mut store = Self::reserve_for_another(segments, needed, limit, progress, cancelled)?;
        store.close(&[])?;
        Ok(store)
    }

    /// The same, for a process that writes it: [`RamStore::share_writable`]. Until
    /// [`RamStore::close`] nothing can be put, got or lent here.
    ///
    /// # Errors
    /// As [`RamStore::reserve`].
    pub fn reserve_for_another(
        segments: Segments,
        needed: &[GuestRange],
        limit: &Limit,
        mut progress: impl FnMut(u64, u64),
        cancelled: impl Fn() -> bool,
    ) -> Result<Self, StoreError> {
        let wanted = wanted_cells(&segments, needed)?;
        let total = wanted.iter().map(|run| cell_bytes(run.len())).sum::<u64>();
        let Some(spare) = limit.bytes.checked_sub(total) else {
            let bound = limit.bound.to_string();
            return Err(StoreError::OverLimit { needed: total, limit: limit.bytes, bound });
        };
        let store = Self::empty(segments, spare)?;
        let mut done = 0;
        for run in wanted {
            for first in run.clone().step_by(CELLS_A_STEP) {
                let step = first..run.end.min(first + CELLS_A_STEP);
                if cancelled() {
                    return Err(StoreError::Cancelled { done, needed: total });
                }
                if let Some(why) = scarce(done, total)? {
                    return Err(StoreError::Pressure { done, needed: total, why });
                }
                store.fault_in(step.clone()).map_err(StoreError::os("faulting the store in"))?;
                done += cell_bytes(step.len());
                progress(done, total);
            }
        }
        Ok(store)
    }

    /// A store that has nothing faulted in and may take `spare` bytes.
    fn empty(segments: Segments, spare: u64) -> Result<Self, StoreError> {
        let cells = cell_count(&segments)?;
        let len = cell_bytes(cells);
        let index = usize::try_from(len).ok().filter(|len| isize::try_from(*len).is_ok());
        let too_long = || StoreError::os("mapping the store")(io::ErrorKind::OutOfMemory);
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memfd = rustix::fs::memfd_create("stillframe-store", flags)
            .map_err(StoreError::os("memfd_create"))?;
        rustix::fs::ftruncate(&memfd, len).map_err(StoreError::os("sizing the store"))?;
        let mapped = Mapped::new(&memfd, index.ok_or_else(too_long)?)
            .map_err(StoreError::os("mapping the store"))?;
        // From here on the file keeps its length, so that no access can fault.
        let seals = SealFlags::SHRINK | SealFlags::GROW;
        rustix::fs::fcntl_add_seals(&memfd, seals).map_err(StoreError::os("sealing the store"))?;
        let cells = (0..cells).map(|_| RwLock::new(false)).collect();
        Ok(Self { segments, memfd, mapped, cells, spare: AtomicU64::new(spare), open: true })
    }

    /// From here on only our mapping can write the file, so that it may be handed to others for
    /// reading. Whoever wrote it until now must have ended: a mapping of theirs could write on.
    /// `written` is what they may have put outside of what was reserved.
    ///
    /// # Errors
    /// The kernel's; what `written` says lies outside the store.
    pub fn close(&mut self, written: &[GuestRange]) -> Result<(), StoreError> {
        if self.open {
            let seals = SealFlags::FUTURE_WRITE | SealFlags::SEAL;
            rustix::fs::fcntl_add_seals(&self.memfd, seals)
                .map_err(StoreError::os("sealing the store"))?;
        }
        self.open = false;
        for run in wanted_cells(&self.segments, written)? {
            self.fault_in(run).map_err(StoreError::os("faulting the store in"))?;
        }
        Ok(())
    }

    /// The store's file for the process that writes it, by position: offsets are those of the
    /// segments.
    ///
    /// # Errors
    /// The store is closed; no file descriptors left.
    pub fn share_writable(&self) -> io::Result<OwnedFd> {
        if !self.open {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        self.memfd.try_clone()
    }

    /// Bytes that may still be taken beside what was reserved.
    pub fn spare(&self) -> u64 {
        self.spare.load(Ordering::Relaxed)
    }

    /// Faults cells in that are not counted against `spare`.
    fn fault_in(&self, cells: Range<usize>) -> io::Result<()> {
        self.mapped.populate(span(&cells))?;
        for cell in &self.cells[cells] {
            *cell.write().unwrap_or_else(PoisonError::into_inner) = true;
        }
        Ok(())
    }

    /// Where guest memory lies in the store.
    pub fn segments(&self) -> &Segments {
        &self.segments
    }

    /// Faults in what `needed` touches and is not there yet, as far as the limit goes: the guest
    /// has touched more since [`RamStore::reserve`].
    ///
    /// # Errors
    /// [`StoreError::Os`] when the limit is used up or there is no memory.
    pub fn extend(&self, needed: &[GuestRange]) -> Result<(), StoreError> {
        for run in wanted_cells(&self.segments, needed)? {
            for (number, cell) in run.clone().zip(&self.cells[run]) {
                let mut faulted_in = cell.write().unwrap_or_else(PoisonError::into_inner);
                if !*faulted_in {
                    self.take_cell(number).map_err(StoreError::os("faulting the store in"))?;
                    *faulted_in = true;
                }
            }
        }
        Ok(())
    }

    /// Keeps the store's memory, also what is faulted in later, from being swapped out.
    ///
    /// # Errors
    /// RLIMIT_MEMLOCK without CAP_IPC_LOCK.
    pub fn lock(&self) -> io::Result<()> {
        self.mapped.lock()
    }

    /// The store's file for another process, which can read it and nothing else: offsets are
    /// those of the segments, and what was never put is a hole.
    ///
    /// # Errors
    /// No file descriptors left, or no `/proc`.
    pub fn share(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.memfd.as_fd().as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?)
    }

    /// Bytes of memory that the store has taken.
    pub fn taken(&self) -> u64 {
        let is_in = |c: &&RwLock<bool>| *c.read().unwrap_or_else(PoisonError::into_inner);
        cell_bytes(self.cells.iter().filter(is_in).count())
    }

    /// Faults one cell in on behalf of `put`.
    fn take_cell(&self, cell: usize) -> io::Result<()> {
        let take = |spare: u64| spare.checked_sub(CELL);
        if self.spare.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            let text = "the RAM store's limit is used up";
            return Err(io::Error::new(io::ErrorKind::OutOfMemory, text));
        }
        self.mapped.populate(span(&(cell..cell + 1)))
    }

    fn position(&self, at: GuestRange, len: usize) -> io::Result<usize> {
        if self.open {
            let text = "another process writes the store";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        let offset = offset_of(&self.segments, at, len)?;
        usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
    }
}

impl Store for RamStore {
    fn put(&self, at: GuestRange, bytes: &[u8]) -> io::Result<()> {
        for piece in pieces(self.position(at, bytes.len())?, bytes.len()) {
            let lock = &self.cells[piece.cell];
            let mut faulted_in = lock.write().unwrap_or_else(PoisonError::into_inner);
            if !*faulted_in {
                self.take_cell(piece.cell)?;
                *faulted_in = true;
            }
            // SAFETY: every access to this cell holds its lock, for which we have the write
            // side; other processes cannot write the file
            // (F_SEAL_FUTURE_WRITE, seen to by `position`).
            unsafe { self.mapped.copy_in(piece.offset, &bytes[piece.buffer]) }
        }
        Ok(())
    }

    fn get(&self, at: GuestRange, buf: &mut [u8]) -> io::Result<()> {
        for piece in pieces(self.position(at, buf.len())?, buf.len()) {
            let faulted_in = self.cells[piece.cell].read().unwrap_or_else(PoisonError::into_inner);
            let buf = &mut buf[piece.buffer];
            if *faulted_in {
                // SAFETY: writers hold the write side of this cell's lock, of which we have the
                // read side; other processes cannot write the file
                // (F_SEAL_FUTURE_WRITE, seen to by `position`).
                unsafe { self.mapped.copy_out(piece.offset, buf) }
            } else {
                // Reading it through the mapping would take memory.
                buf.fill(0);
            }
        }
        Ok(())
    }

    /// Whatever lies in one cell that is faulted in. A range over two cells would make workers
    /// on neighbouring ranges wait for each other: they are quicker with buffers of their own.
    fn lend(&self, at: GuestRange, work: &mut dyn FnMut(&mut [u8])) -> io::Result<bool> {
        let len = length_of(at)?;
        let offset = self.position(at, len)?;
        let cell = offset / CELL_LEN;
        if (offset + len - 1) / CELL_LEN != cell {
            return Ok(false);
        }
        let faulted_in = self.cells[cell].write().unwrap_or_else(PoisonError::into_inner);
        if *faulted_in {
            // SAFETY: as in `put`: the write side of this cell's lock is ours.
            unsafe { self.mapped.lend(offset..offset + len, work) }
        }
        Ok(*faulted_in)
    }
}

/// A part of a range of the store that lies in one cell.
struct Piece {
    cell: usize,
    /// Where in the store.
    offset: usize,
    /// Which bytes of the caller's buffer.
    buffer: Range<usize>,
}

/// The pieces of `len` bytes at `offset`.
fn pieces(offset: usize, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        if done == len {
            return None;
        }
        let at = offset + done;
        let step = (CELL_LEN - at % CELL_LEN).min(len - done);
        let piece = Piece { cell: at / CELL_LEN, offset: at, buffer: done..done + step };
        done += step;
        Some(piece)
    })
}

/// The bytes of `cells` in the store.
fn span(cells: &Range<usize>) -> Range<usize> {
    // The store is mapped whole, so its offsets are `usize`s.
    cells.start * CELL_LEN..cells.end * CELL_LEN
}

fn cell_bytes(cells: usize) -> u64 {
    (cells as u64).saturating_mul(CELL)
}

/// Cells of a store for `segments`; at least one, for an empty mapping cannot be made.
fn cell_count(segments: &Segments) -> Result<usize, StoreError> {
    let cells = segments.end().div_ceil(CELL).max(1);
    // The kernel's address space for a process is 2^47 bytes.
    let fits = usize::try_from(cells).ok().filter(|_| cells <= (1 << 47) / CELL);
    fits.ok_or_else(|| StoreError::os("mapping the store")(io::ErrorKind::OutOfMemory))
}

/// The cells that `needed` touches, as ascending runs with gaps between them.
fn wanted_cells(
    segments: &Segments,
    needed: &[GuestRange],
) -> Result<Vec<Range<usize>>, StoreError> {
    let count = cell_count(segments)?;
    let mut runs = Vec::with_capacity(needed.len());
    for at in needed {
        let cells = segments.offset_of(*at).and_then(|offset| {
            let last = usize::try_from((offset + (at.len() - 1)) / CELL).ok()?;
            Some(usize::try_from(offset / CELL).ok()?..last.min(count - 1) + 1)
        });
        let outside = || {
            let text = format!("{at} lies in no segment of the store");
            StoreError::os("reserving the store")(io::Error::other(text))
        };
        runs.push(cells.ok_or_else(outside)?);
    }
    runs.sort_unstable_by_key(|run| run.start);
    runs.dedup_by(|next, run| {
        let joined = next.start <= run.end;
        if joined {
            run.end = run.end.max(next.end);
        }
        joined
    });
    Ok(runs)
}

/// Why memory is too scarce to go on, when `done` of `total` bytes are faulted in.
fn scarce(done: u64, total: u64) -> Result<Option<String>, StoreError> {
    let HostMemory { available, .. } = memory::host_memory()?;
    if let Some(why) = host_scarce(available, done, total) {
        return Ok(Some(why));
    }
    let left = total - done;
    if let Some(room) = memory::cgroup_headroom()
        && room.bytes < left.saturating_add(BESIDE)
    {
        return Ok(Some(room.to_string()));
    }
    Ok(memory::pressure()
        .filter(|p| p.full_avg10 > FULL_PRESSURE_PERCENT)
        .map(|p| format!("all tasks of the host wait for memory {} % of the time", p.full_avg10)))
}

/// The limit was half of what was available. Others take and give meanwhile: it is scarce when
/// we would come to take more than five eighths of what would be available without us.
fn host_scarce(available: u64, done: u64, total: u64) -> Option<String> {
    let without_us = available.saturating_add(done);
    let scarce = u128::from(total) * 8 > u128::from(without_us) * 5;
    scarce.then(|| format!("only {available} bytes of the host's memory are still available"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::tests::{segments, suite};

    fn limit(bytes: u64) -> Limit {
        Limit { bytes, bound: Bound::MaxRam }
    }

    fn range(start: u64, len: u64) -> GuestRange {
        GuestRange::new(start, len).unwrap()
    }

    fn reserve(needed: &[GuestRange], bytes: u64) -> Result<RamStore, StoreError> {
        RamStore::reserve(segments(), needed, &limit(bytes), |_, _| (), || false)
    }

    #[test]
    fn does_what_every_store_does() {
        let all: Vec<_> = segments().list().iter().map(|s| s.range).collect();
        suite(&reserve(&all, 16 << 20).unwrap());
        // The same when nothing was faulted in before.
        suite(&reserve(&[], 16 << 20).unwrap());
    }

    #[test]
    fn what_is_needed_is_faulted_in_and_told() {
        let mut told = Vec::new();
        let needed = [range(0x1_0000_0000, 0x10_0000), range(0x0, 0x1000)];
        let tell = |done, total| told.push((done, total));
        let store =
            RamStore::reserve(segments(), &needed, &limit(2 << 20), tell, || false).unwrap();
        assert_eq!(store.taken(), 2 << 20);
        assert_eq!(told, [(1 << 20, 2 << 20), (2 << 20, 2 << 20)]);
        let blocks = rustix::fs::fstat(&store.memfd).unwrap().st_blocks;
        assert_eq!(blocks * 512, 2 << 20);
    }

    #[test]
    fn the_limit_holds_before_and_during() {
        let needed = [range(0, 0xa_0000), range(0x1_0000_0000, 0x10_0000)];
        let error = reserve(&needed, (2 << 20) - 1).unwrap_err();
        assert!(matches!(error, StoreError::OverLimit { needed: 0x20_0000, .. }), "{error}");
        assert!(error.to_string().contains("--max-ram"), "{error}");
        let store = reserve(&needed[1..], 2 << 20).unwrap();
        // Put into a cell that was not needed: once there is room for it, not twice.
        store.put(range(0, 0x1000), &[1; 0x1000]).unwrap();
        store.put(range(0x1000, 0x1000), &[1; 0x1000]).unwrap();
        let full = store.put(range(0x20_0000, 1), &[1]).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::OutOfMemory);
        assert_eq!(store.taken(), 2 << 20);
    }

    #[test]
    fn what_is_faulted_in_is_lent_and_nothing_else_is() {
        // Segment 0xc0000 lies at 0x301000: cells end at 0x1bf000 and 0x2bf000 of the guest.
        let store = reserve(&[range(0xc_0000, 0xf_f000), range(0x2b_f000, 1)], 3 << 20).unwrap();
        let lent = |at| {
            let mut found = None;
            assert_eq!(store.lend(at, &mut |b| found = Some(b.len())).unwrap(), found.is_some());
            found
        };
        assert_eq!(lent(range(0xc_0000, 0xf_f000)), Some(0xf_f000));
        assert_eq!(lent(range(0x2b_f000, 0x1000)), Some(0x1000));
        // Not faulted in: lending takes nothing of what is spare, putting does.
        let between = range(0x1b_f000, 0x10_0000);
        assert_eq!((lent(between), store.taken()), (None, 2 << 20));
        store.put(range(0x1b_f000, 1), &[1]).unwrap();
        assert_eq!((lent(between), store.taken()), (Some(0x10_0000), 3 << 20));
        // Nothing is spare any more, and what there is, is lent as before.
        assert!(store.put(range(0, 1), &[1]).is_err());
        assert_eq!((lent(range(0, 1)), lent(between)), (None, Some(0x10_0000)));
        // Over two cells, both faulted in.
        assert_eq!(lent(range(0x1b_efff, 2)), None);
    }

    #[test]
    fn lent_bytes_are_nobody_elses() {
        let store = reserve(&[range(0x1_0000_0000, 0x10_0000)], 1 << 20).unwrap();
        let at = range(0x1_0000_0000, 8);
        let add = |bytes: &mut [u8]| {
            let number = u64::from_ne_bytes(bytes.try_into().unwrap());
            std::thread::yield_now();
            bytes.copy_from_slice(&(number + 1).to_ne_bytes());
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    (0..1000).for_each(|_| assert!(store.lend(at, &mut { add }).unwrap()))
                });
            }
        });
        let mut sum = [0; 8];
        store.get(at, &mut sum).unwrap();
        assert_eq!(u64::from_ne_bytes(sum), 4000);
    }

    #[test]
    fn getting_takes_no_memory() {
        let store = reserve(&[], 8 << 20).unwrap();
        store.get(range(0xc_0000, 0x20_0000), &mut vec![1; 0x20_0000]).unwrap();
        assert_eq!(rustix::fs::fstat(&store.memfd).unwrap().st_blocks, 0);
    }

    #[test]
    fn a_cancelled_reservation_ends_at_once() {
        let all = [range(0, 0xa_0000)];
        let done = RamStore::reserve(segments(), &all, &limit(8 << 20), |_, _| (), || true);
        assert!(matches!(done, Err(StoreError::Cancelled { done: 0, needed: 0x10_0000 })));
    }

    #[test]
    fn scarcity_is_measured_as_if_we_were_not_there() {
        let gib = 1u64 << 30;
        // Half of 20 GiB: fine at the start and with 8 GiB taken by us.
        assert_eq!(host_scarce(20 * gib, 0, 10 * gib), None);
        assert_eq!(host_scarce(12 * gib, 8 * gib, 10 * gib), None);
        // Others took 5 GiB.
        assert!(host_scarce(7 * gib, 8 * gib, 10 * gib).is_some());
    }

    #[test]
    fn others_can_read_it_and_not_write_it() {
        let store = reserve(&[], 8 << 20).unwrap();
        let at = range(0x1_0000_0000, 5);
        store.put(at, b"bytes").unwrap();
        let shared = store.share().unwrap();
        let mut buf = [0; 5];
        rustix::io::pread(&shared, &mut buf[..], 0).unwrap();
        assert_eq!(&buf, b"bytes");
        assert!(rustix::io::pwrite(&shared, b"x", 0).is_err());
        // Nor through a descriptor opened anew for writing, nor by us.
        let path = format!("/proc/self/fd/{}", shared.as_raw_fd());
        let writer = std::fs::OpenOptions::new().write(true).open(path).unwrap();
        assert_eq!(rustix::io::pwrite(&writer, b"x", 0), Err(Errno::PERM));
        assert!(writer.set_len(0).is_err());
    }

    #[test]
    fn limits_are_the_least_of_all() {
        let free = RamStore::limit(None).unwrap();
        assert!(free.bytes > 0 && free.bound != Bound::MaxRam);
        assert_eq!(RamStore::limit(Some(4096)).unwrap(), limit(4096));
    }

    #[test]
    fn what_lies_outside_is_refused() {
        assert!(reserve(&[range(0xb_0000, 1)], 8 << 20).is_err());
    }
}
