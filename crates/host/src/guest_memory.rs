//! Guest memory in the QEMU process, read without a footprint.
//!
//! How a place is read is decided by its mapping, never by its path, because each way of reading
//! leaves another trace (all measured; DESIGN.md §3):
//!
//! | mapping | way | because |
//! | --- | --- | --- |
//! | shared | `pread` of the file, holes by SEEK_DATA | reading holes through a mapping allocates them |
//! | shared hugetlbfs | `pread` of the file | the same; it has no SEEK_DATA, so zeros that the page table does not know are holes |
//! | private anonymous | `process_vm_readv`, pages by pagemap | fastest; absent pages are zero and never touched |
//! | the same, merged by KSM | `/proc/PID/mem` | `process_vm_readv` pins, and pinning un-merges |
//! | private over a file | pages that the process has as above, the others by `pread` | absent means the file's content |
//!
//! Between the look into the page table and the read, the guest may give a page back (balloon):
//! the read then shows zeros, and costs at most a page-table entry for the shared zero page.

use crate::fs::{is_hugetlbfs, open_reading};
use crate::maps::{self, Smap, Vma};
use crate::pagemap::{Entry, Pagemap};
use crate::process::{self, FileId, Process};
use crate::source::{Faults, Gone, Source, check_fit};
use crate::{HostError, kernel_text};
use evidence::map::Mapping;
use evidence::{GuestRange, PAGE, PageState};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// Pages looked up and read at a time: 2 MiB, so that QEMU's mmap lock is held shortly.
const WINDOW: usize = 512;

/// A range of guest memory and where the QEMU process has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Guest-physical addresses.
    pub range: GuestRange,
    /// Host virtual address of the first byte, in the QEMU process.
    pub hva: u64,
}

/// How a place is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reader {
    /// `process_vm_readv`.
    ProcessVm,
    /// `pread` on `/proc/PID/mem`: memory merged by KSM.
    ProcMem,
    /// `pread` on the file behind a shared mapping.
    File,
    /// `process_vm_readv` for the process's own pages, `pread` on the file for the others.
    ProcessVmAndFile,
    /// `/proc/PID/mem` for the process's own pages, `pread` on the file for the others.
    ProcMemAndFile,
}

impl Reader {
    /// The reader's word in the record.
    pub fn word(self) -> &'static str {
        match self {
            Reader::ProcessVm => "process_vm_readv",
            Reader::ProcMem => "proc-mem",
            Reader::File => "pread",
            Reader::ProcessVmAndFile => "process_vm_readv+pread",
            Reader::ProcMemAndFile => "proc-mem+pread",
        }
    }
}

/// The file behind a mapping, open for reading.
#[derive(Clone, Debug)]
struct Backing {
    file: Arc<File>,
    /// How it was reached: `fd/12` or `map_files/..`, under `/proc/PID`.
    route: Arc<str>,
    /// The mapping's device and inode, by which the file was found.
    key: ((u32, u32), u64),
}

/// A place, with what the host was found to have there.
#[derive(Debug)]
pub struct Held {
    place: Place,
    vma: Vma,
    mapping: Mapping,
    page_size: u64,
    backing: Option<Backing>,
    merged: AtomicBool,
    /// Where the file of shared memory had data when the pass began: ascending offsets.
    extents: RwLock<Vec<Range<u64>>>,
}

impl Held {
    /// The place.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The mapping that holds all of it, as first seen.
    pub fn vma(&self) -> &Vma {
        &self.vma
    }

    /// What kind of mapping that is.
    pub fn mapping(&self) -> Mapping {
        self.mapping
    }

    /// Page size of the mapping in bytes.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Under `/proc/PID`, the way by which the file behind it was opened; `None` without a file.
    pub fn route(&self) -> Option<&str> {
        self.backing.as_ref().map(|b| &*b.route)
    }

    /// How it is read in this pass.
    pub fn reader(&self) -> Reader {
        let merged = self.merged.load(Ordering::Relaxed);
        match (self.mapping, merged) {
            (Mapping::Shared | Mapping::SharedHugetlb, _) => Reader::File,
            (Mapping::Anonymous, false) => Reader::ProcessVm,
            (Mapping::Anonymous, true) => Reader::ProcMem,
            (Mapping::PrivateFile | Mapping::PrivateHugetlb, false) => Reader::ProcessVmAndFile,
            (Mapping::PrivateFile | Mapping::PrivateHugetlb, true) => Reader::ProcMemAndFile,
        }
    }

    /// Host virtual address of `gpa`, which lies in the place.
    fn hva(&self, gpa: u64) -> u64 {
        self.place.hva + (gpa - self.place.range.start())
    }

    /// Notes where the file of shared memory has data now. To ask where data *ends* (SEEK_HOLE) looks
    /// at every page up to there, 40 ns each on the measuring host: asked for each block, a guest of
    /// 64 GiB would take hours. So it is asked once a pass, and before the guest is held.
    fn look_for_extents(&self) {
        let (Mapping::Shared, Some(backing)) = (self.mapping, &self.backing) else { return };
        let mut pos = self.file_off(self.place.range.start());
        let end = pos + self.place.range.len();
        let mut extents = Vec::new();
        while let Some(data) = next_extent(&backing.file, pos, end) {
            pos = data.end;
            extents.push(data);
        }
        *self.extents.write().unwrap_or_else(PoisonError::into_inner) = extents;
    }

    /// Where the data ends that the file had at offset `pos`; `pos` when it had none there.
    fn data_until(&self, pos: u64) -> u64 {
        let extents = self.extents.read().unwrap_or_else(PoisonError::into_inner);
        let after = extents.partition_point(|data| data.start <= pos);
        let before = after.checked_sub(1).and_then(|at| extents.get(at));
        before.map_or(pos, |data| data.end.max(pos))
    }

    /// Offset in the file of `gpa`, which lies in the place; cannot wrap, `choose` checks it.
    fn file_off(&self, gpa: u64) -> u64 {
        self.vma.offset + (self.hva(gpa) - self.vma.start)
    }
}

/// What reading a place will find, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Not holes: in memory, in swap, or in the file. An estimate, the guest runs on.
    pub resident: u64,
    /// Of these, swapped out: reading brings them back into memory.
    pub swapped: u64,
}

/// The memory of one guest, in its QEMU process.
#[derive(Debug)]
pub struct GuestMemory {
    process: Process,
    /// The way into it; absent of a process that this user may not look at.
    way: Option<(Pagemap, File)>,
    /// Memory of such a process: nothing is known of it.
    unseen: Vec<GuestRange>,
    /// Ascending in guest-physical space, disjoint.
    held: Vec<Held>,
    /// Pages in the host's swap are not read.
    leaves_swapped: bool,
    faults: Mutex<Faults>,
}

impl GuestMemory {
    /// Looks at what `process` has at `places` and opens the way to read each.
    ///
    /// Each place must lie in one mapping. Opens only for reading; touches no guest page.
    ///
    /// # Errors
    /// [`HostError::Refused`] when the kernel does not let us read the process;
    /// [`HostError::NotOneMapping`] and its neighbours when `places` and mappings do not agree.
    pub fn open(process: &Process, places: &[Place]) -> Result<Self, HostError> {
        let process = process.try_clone().map_err(|e| HostError::file("a pidfd", e))?;
        // Opening this file is the kernel's check for both readers of process memory
        // (PTRACE_MODE_ATTACH): what is refused here would be refused in the window.
        let mem =
            kernel_text::open_under(process.dir(), "mem").map_err(|e| process.error("mem", e))?;
        let pagemap = Pagemap::open(&process)?;
        let places = in_order(places)?;
        let mut files = Vec::new();
        let held = look(&process, &places)?
            .into_iter()
            .map(|(place, smap)| choose(&process, place, smap, &mut files))
            .collect::<Result<_, _>>()?;
        let way = Some((pagemap, mem));
        let (unseen, faults) = (Vec::new(), Mutex::default());
        let memory = Self { process, way, unseen, held, leaves_swapped: false, faults };
        memory.begin_pass()?;
        Ok(memory)
    }

    /// The memory `ranges` of a process that the kernel does not let this user look at. There is no
    /// place to read from; what could be there counts as resident.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn unseen(process: &Process, ranges: Vec<GuestRange>) -> Result<Self, HostError> {
        let process = process.try_clone().map_err(|e| HostError::file("a pidfd", e))?;
        let (held, faults) = (Vec::new(), Mutex::default());
        Ok(Self { process, way: None, unseen: ranges, held, leaves_swapped: false, faults })
    }

    /// From now on pages that are in the host's swap are not read, which would bring them back: they are
    /// [`PageState::Excluded`]. Of shared memory the kernel does not tell which pages those are, and all are read.
    pub fn leave_swapped(&mut self) {
        self.leaves_swapped = true;
    }

    /// Whether the process may be looked at.
    pub fn is_seen(&self) -> bool {
        self.way.is_some()
    }

    fn pagemap(&self) -> io::Result<&Pagemap> {
        self.way.as_ref().map(|(pagemap, _)| pagemap).ok_or_else(|| Errno::ACCESS.into())
    }

    /// The places in guest-physical order, each with its mapping and reader.
    pub fn places(&self) -> &[Held] {
        &self.held
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// To be called before each pass over the memory: checks that each place still lies in the
    /// mapping seen first, and looks anew at what KSM may have merged and what files have.
    ///
    /// A mapping may grow or be cut at other ends (`madvise` on a neighbour does that); its file,
    /// position in the file, and rights may not change.
    ///
    /// # Errors
    /// [`HostError::Changed`] names both mappings.
    pub fn begin_pass(&self) -> Result<(), HostError> {
        self.check_mappings()?;
        self.held.iter().for_each(Held::look_for_extents);
        self.decide_merged()
    }

    /// Checks that each place still lies in the mapping seen first; to be called behind the last
    /// pass too: memory that was unmapped meanwhile looks like a hole to the readers.
    ///
    /// # Errors
    /// [`HostError::Changed`] names both mappings.
    pub fn check_mappings(&self) -> Result<(), HostError> {
        if !self.is_seen() {
            return Ok(());
        }
        let now = self.process.maps()?;
        for held in &self.held {
            let Place { range, hva } = held.place;
            let found = maps::covering(&now, hva, range.len());
            if !found.is_some_and(|vma| same_memory(&held.vma, vma, hva)) {
                let after = maps::touching(&now, hva, range.len());
                return Err(HostError::Changed { range, before: held.vma.to_string(), after });
            }
        }
        Ok(())
    }

    /// Sets `merged` of every private place.
    fn decide_merged(&self) -> Result<(), HostError> {
        if !self.is_seen() {
            return Ok(());
        }
        let ksm = Ksm::look(&self.process)?;
        let by_flag = match ksm.merged_anywhere() {
            Some(all) => {
                self.held.iter().for_each(|h| h.merged.store(all, Ordering::Relaxed));
                return Ok(());
            }
            None => self.process.smaps(|vma| self.held.iter().any(|h| h.is_in(vma)))?,
        };
        for held in &self.held {
            let smap = by_flag.iter().find(|s| held.is_in(&s.vma));
            // A mapping that changed since it was checked a moment ago: the careful way.
            let merged = smap.is_none_or(|s| s.has("mg"));
            held.merged.store(merged, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What reading each place will find; looks into page tables and files, touches nothing.
    ///
    /// Swapped pages of shared memory are known only for whole mappings: they are counted with
    /// the first places in the mapping.
    ///
    /// # Errors
    /// The process is gone.
    pub fn usage(&self) -> Result<Vec<Usage>, HostError> {
        let is_shared = |h: &Held| h.mapping == Mapping::Shared;
        let mut shared = if self.held.iter().any(is_shared) {
            self.process.smaps(|vma| self.held.iter().any(|h| is_shared(h) && h.is_in(vma)))?
        } else {
            Vec::new()
        };
        let unseen =
            self.unseen.iter().map(|range| Ok(Usage { resident: range.len(), swapped: 0 }));
        let held = self.held.iter().map(|held| self.usage_of(held, &mut shared));
        held.chain(unseen).collect()
    }

    fn usage_of(&self, held: &Held, shared: &mut [Smap]) -> Result<Usage, HostError> {
        let Place { range, hva } = held.place;
        let size = || match &held.backing {
            Some(b) => b.file.metadata().map(|m| m.size()).map_err(|e| self.file_error(held, e)),
            None => Ok(0),
        };
        let start = held.file_off(range.start());
        if held.mapping == Mapping::Shared {
            let resident = self.data_bytes(held, start)?;
            let mut swapped = 0;
            if let Some(smap) = shared.iter_mut().find(|s| held.is_in(&s.vma)) {
                swapped = smap.swap.min(range.len());
                smap.swap -= swapped;
            }
            return Ok(Usage { resident, swapped: swapped.min(resident) });
        }
        let count = self
            .pagemap()
            .and_then(|pagemap| pagemap.count(hva, evidence::state::page_count(range)))
            .map_err(|e| self.process.error("pagemap", e))?;
        let swapped = (count.swapped * PAGE).min(range.len());
        let resident = match held.mapping {
            Mapping::PrivateFile => size()?.saturating_sub(start).min(range.len()),
            _ => ((count.present + count.swapped) * PAGE).min(range.len()),
        };
        Ok(Usage { resident, swapped })
    }

    /// Reads the page table's entries of `block`, one for each 4 KiB cell that it touches. Touches
    /// nothing.
    ///
    /// # Errors
    /// [`Gone`].
    pub fn entries(&self, block: GuestRange, entries: &mut [Entry]) -> Result<(), Gone> {
        let held = self.place_of(block).ok_or(Gone::NoPlace { at: block })?;
        let read = |pagemap: &Pagemap| pagemap.read(held.hva(block.start()), entries);
        self.pagemap().and_then(read).map_err(|e| self.gone(block, e))
    }

    /// The first place whose pages the kernel does not track for us, and why.
    pub fn untracked(&self) -> Option<(GuestRange, &'static str)> {
        let why = |held: &Held| match (held.mapping, held.page_size) {
            (Mapping::Anonymous, PAGE) => None,
            (Mapping::Anonymous | Mapping::PrivateHugetlb | Mapping::SharedHugetlb, _) => {
                Some("huge pages lose the mark when the marks are cleared")
            }
            (Mapping::Shared, _) => Some("shared memory: others write it past QEMU's page table"),
            (Mapping::PrivateFile, _) => Some("it lies over a file, of which nothing is tracked"),
        };
        self.held.iter().find_map(|held| why(held).map(|why| (held.place.range, why)))
    }

    /// Processes beside the VM's own that map its memory and may write there: vhost-user backends,
    /// whether they were there when the VM began or came later.
    ///
    /// # Errors
    /// `/proc` cannot be listed.
    pub fn sharers(&self) -> Result<Vec<Process>, HostError> {
        let shared = self.held.iter().filter(|held| held.vma.shared());
        let mut files: Vec<_> = shared.map(|held| (held.vma.dev, held.vma.inode)).collect();
        files.dedup();
        match files.is_empty() {
            true => Ok(Vec::new()),
            false => process::sharers(&files, self.process.pid()),
        }
    }

    /// Pages of the process that KSM has merged; `None` when the kernel does not say.
    pub fn merged_pages(&self) -> Option<u64> {
        Ksm::look(&self.process).ok()?.merging
    }

    /// Whether any place is read the way that keeps pages merged by KSM.
    pub fn reads_around_ksm(&self) -> bool {
        self.held.iter().any(|h| matches!(h.reader(), Reader::ProcMem | Reader::ProcMemAndFile))
    }

    /// Those of `blocks` that the host has memory for now: reading another one finds nothing but
    /// holes. Looks into page tables and files, touches nothing.
    ///
    /// # Errors
    /// [`HostError::NoPlace`] for a block that lies in no place; the process is gone.
    pub fn resident(&self, blocks: &[GuestRange]) -> Result<Vec<GuestRange>, HostError> {
        let mut kept = Vec::new();
        if !self.is_seen() {
            return Ok(blocks.to_vec());
        }
        for &block in blocks {
            if self.is_resident(block)? {
                kept.push(block);
            }
        }
        Ok(kept)
    }

    /// Whether every page of `block` is in memory, as of the beginning of the pass: reading it waits for no disk and brings nothing
    /// back from swap. `false` where that cannot be told without asking for all of a mapping.
    ///
    /// # Errors
    /// As [`GuestMemory::resident`].
    pub fn is_wholly_present(&self, block: GuestRange) -> Result<bool, HostError> {
        let held = self.place_of(block).ok_or(HostError::NoPlace { range: block })?;
        if held.mapping == Mapping::Shared {
            // Pages that the process has not touched itself are not in its page table.
            let start = held.file_off(block.start());
            return Ok(held.data_until(start) >= start + block.len());
        }
        let pages = evidence::state::page_count(block);
        let count = self
            .pagemap()
            .and_then(|pagemap| pagemap.count(held.hva(block.start()), pages))
            .map_err(|e| self.process.error("pagemap", e))?;
        Ok(count.present == pages)
    }

    fn is_resident(&self, block: GuestRange) -> Result<bool, HostError> {
        let held = self.place_of(block).ok_or(HostError::NoPlace { range: block })?;
        match (held.mapping, &held.backing) {
            (Mapping::Shared, Some(backing)) => {
                let start = held.file_off(block.start());
                Ok(next_data(&backing.file, start, start + block.len()).is_some())
            }
            // An absent page is the file's, and the file is read.
            (Mapping::PrivateFile, _) => Ok(true),
            _ => {
                let pages = evidence::state::page_count(block);
                let count = self
                    .pagemap()
                    .and_then(|pagemap| pagemap.count(held.hva(block.start()), pages))
                    .map_err(|e| self.process.error("pagemap", e))?;
                Ok(count.present + count.swapped > 0)
            }
        }
    }

    fn file_error(&self, held: &Held, source: impl Into<io::Error>) -> HostError {
        self.process.error(held.route().unwrap_or("maps"), source)
    }

    /// Bytes of the place that the file has data for.
    fn data_bytes(&self, held: &Held, start: u64) -> Result<u64, HostError> {
        let Some(backing) = &held.backing else { return Ok(0) };
        let end = start + held.place.range.len();
        let mut sum = 0;
        let mut pos = start;
        while let Some(data) = next_extent(&backing.file, pos, end) {
            sum += data.end - data.start;
            pos = data.end;
        }
        Ok(sum)
    }

    /// The pages that could not be read since the last call, and forgets them.
    pub fn take_faults(&self) -> Faults {
        std::mem::take(&mut *self.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn place_of(&self, at: GuestRange) -> Option<&Held> {
        let after = self.held.partition_point(|h| h.place.range.start() <= at.start());
        let held = self.held.get(after.checked_sub(1)?)?;
        held.place.range.covers(at).then_some(held)
    }

    /// Reads one window: at most [`WINDOW`] cells. Leaves the bytes of holes alone.
    fn window(
        &self,
        held: &Held,
        at: GuestRange,
        buf: &mut [u8],
        states: &mut [PageState],
    ) -> Result<(), Gone> {
        let mut entries = [Entry::default(); WINDOW];
        let mut ways = [Way::Hole; WINDOW];
        let (entries, ways) = (&mut entries[..states.len()], &mut ways[..states.len()]);
        if held.mapping != Mapping::Shared {
            let read = |pagemap: &Pagemap| pagemap.read(held.hva(at.start()), entries);
            self.pagemap().and_then(read).map_err(|e| self.gone(at, e))?;
        }
        for (way, entry) in ways.iter_mut().zip(&*entries) {
            *way = match held.mapping {
                Mapping::SharedHugetlb => Way::File,
                _ if self.leaves_swapped && entry.in_swap_area() => Way::Left,
                _ if entry.kept() => Way::Process,
                Mapping::PrivateFile | Mapping::PrivateHugetlb => Way::File,
                Mapping::Anonymous | Mapping::Shared => Way::Hole,
            };
        }
        if let (Mapping::Shared, Some(backing)) = (held.mapping, &held.backing) {
            ways_by_extents(held, &backing.file, at, ways);
        }
        let cells = Cells(at);
        for run in runs(ways) {
            let part = cells.range(&run);
            let (buf, states) = (&mut buf[cells.span(&run)], &mut states[run.clone()]);
            self.run(held, ways[run.start], part, buf, states)?;
        }
        if matches!(held.mapping, Mapping::SharedHugetlb | Mapping::PrivateHugetlb) {
            hugetlb_holes(cells, entries, ways, buf, states);
        }
        Ok(())
    }

    /// Reads cells that are all read the same way; leaves the bytes of holes alone.
    fn run(
        &self,
        held: &Held,
        way: Way,
        at: GuestRange,
        buf: &mut [u8],
        states: &mut [PageState],
    ) -> Result<(), Gone> {
        let (hva, file_off) = (held.hva(at.start()), held.file_off(at.start()));
        let merged = held.merged.load(Ordering::Relaxed);
        let read = match (way, &held.backing) {
            (Way::Hole, _) => {
                states.fill(PageState::Hole);
                Ok(())
            }
            (Way::Left, _) => {
                states.fill(PageState::Excluded);
                buf.fill(0);
                Ok(())
            }
            (Way::Process, _) if merged => self.copy(at, buf, states, |done, buf| {
                let (_, mem) = self.way.as_ref().ok_or(Errno::ACCESS)?;
                match rustix::io::pread(mem, buf, hva + done) {
                    // So the kernel says that the process has no memory any more.
                    Ok(0) => Err(Errno::SRCH),
                    result => result,
                }
            }),
            (Way::Process, _) => {
                self.copy(at, buf, states, |done, buf| self.process_vm(hva + done, buf))
            }
            (Way::File, Some(backing)) => self.copy(at, buf, states, |done, buf| {
                // A file's refusal is a loss of these pages, not of the source.
                match rustix::io::pread(&*backing.file, buf, file_off + done) {
                    Err(Errno::PERM | Errno::ACCESS | Errno::SRCH) => Err(Errno::IO),
                    result => result,
                }
            }),
            (Way::Beyond, _) | (Way::File, None) => self.copy(at, buf, states, |_, _| Ok(0)),
        };
        read.map_err(|e| self.gone(at, e.into()))
    }

    fn process_vm(&self, hva: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let (Ok(base), Ok(pid)) = (usize::try_from(hva), i32::try_from(self.process.pid())) else {
            return Err(Errno::FAULT);
        };
        let remote = [RemoteIoVec { base, len: buf.len() }];
        let pid = nix::unistd::Pid::from_raw(pid);
        process_vm_readv(pid, &mut [IoSliceMut::new(buf)], &remote)
            .map_err(|e| Errno::from_raw_os_error(e as i32))
    }

    fn copy(
        &self,
        at: GuestRange,
        buf: &mut [u8],
        states: &mut [PageState],
        read_at: impl FnMut(u64, &mut [u8]) -> Result<usize, Errno>,
    ) -> Result<(), Errno> {
        copy(at, buf, states, read_at, |gpa, errno| {
            self.faults.lock().unwrap_or_else(PoisonError::into_inner).add(gpa, errno);
        })
    }

    /// Why nothing more can be read.
    fn gone(&self, at: GuestRange, source: io::Error) -> Gone {
        let pid = self.process.pid();
        let refused = source.kind() == io::ErrorKind::PermissionDenied;
        if refused && self.process.alive() {
            Gone::Refused { pid, at, source }
        } else {
            Gone::Exited { pid, at }
        }
    }
}

impl Source for GuestMemory {
    fn read(&self, at: GuestRange, buf: &mut [u8], states: &mut [PageState]) -> Result<(), Gone> {
        self.read_but_holes(at, buf, states)?;
        let cells = Cells(at);
        for run in runs(states).filter(|run| states[run.start] == PageState::Hole) {
            buf[cells.span(&run)].fill(0);
        }
        Ok(())
    }

    fn read_but_holes(
        &self,
        at: GuestRange,
        buf: &mut [u8],
        states: &mut [PageState],
    ) -> Result<(), Gone> {
        check_fit(at, buf, states)?;
        let held = self.place_of(at).ok_or(Gone::NoPlace { at })?;
        let cells = Cells(at);
        for first in (0..states.len()).step_by(WINDOW) {
            let run = first..states.len().min(first + WINDOW);
            let (buf, states) = (&mut buf[cells.span(&run)], &mut states[run.clone()]);
            self.window(held, cells.range(&run), buf, states)?;
        }
        // Asked last: all that was read before was this process's, and not that of another
        // which got its number.
        if self.process.alive() {
            Ok(())
        } else {
            Err(Gone::Exited { pid: self.process.pid(), at })
        }
    }
}

/// The 4 KiB cells of a range, by number.
#[derive(Clone, Copy)]
struct Cells(GuestRange);

impl Cells {
    /// Offset in the range at which cell `number` begins; its length for the one behind the last.
    fn offset(self, number: usize) -> u64 {
        let skew = self.0.start() % PAGE;
        (number as u64 * PAGE).saturating_sub(skew).min(self.0.len())
    }

    /// The bytes of cells `run` in a buffer of the range.
    fn span(self, run: &Range<usize>) -> Range<usize> {
        // The range has a buffer, so offsets in it are `usize`s.
        let index = |cell| usize::try_from(self.offset(cell)).unwrap_or(usize::MAX);
        index(run.start)..index(run.end)
    }

    /// The addresses of cells `run`, which is not empty and lies in the range.
    fn range(self, run: &Range<usize>) -> GuestRange {
        let start = self.0.start() + self.offset(run.start);
        let end = self.0.start() + self.offset(run.end);
        GuestRange::from_ends(start, end).unwrap_or(self.0)
    }

    /// The cell that holds the byte at `offset` of the range.
    fn of(self, offset: u64) -> usize {
        let cell = (self.0.start() % PAGE + offset) / PAGE;
        usize::try_from(cell).unwrap_or(usize::MAX)
    }
}

/// How one page is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Not at all: nothing is there.
    Hole,
    /// From the process.
    Process,
    /// From the file.
    File,
    /// Not at all: the file ends before it.
    Beyond,
    /// Not at all: it is in swap, and is left there.
    Left,
}

/// The runs of equal neighbours.
fn runs<T: PartialEq>(list: &[T]) -> impl Iterator<Item = Range<usize>> {
    let mut next = 0;
    list.chunk_by(|a, b| a == b).map(move |chunk| {
        let run = next..next + chunk.len();
        next = run.end;
        run
    })
}

/// Copies `at` by calls of `read_at(offset in the range, buffer)`, each of which may read less
/// than asked. A page that cannot be read alone either is `Unreadable` and given to `lost`.
///
/// # Errors
/// ESRCH, EPERM, EACCES from `read_at`: the whole source is gone.
fn copy(
    at: GuestRange,
    buf: &mut [u8],
    states: &mut [PageState],
    mut read_at: impl FnMut(u64, &mut [u8]) -> Result<usize, Errno>,
    mut lost: impl FnMut(u64, Option<Errno>),
) -> Result<(), Errno> {
    let cells = Cells(at);
    states.fill(PageState::Data);
    let mut done = 0;
    // The first try is for all that is left, the second for the rest of one page.
    let mut alone = false;
    while done < buf.len() {
        let cell = cells.of(done as u64);
        let page = cells.span(&(cell..cell + 1));
        let end = if alone { page.end } else { buf.len() };
        match read_at(done as u64, &mut buf[done..end]) {
            Ok(n) if n > 0 => {
                done += n.min(end - done);
                alone = false;
            }
            Err(Errno::INTR) => {}
            Err(gone @ (Errno::SRCH | Errno::PERM | Errno::ACCESS)) => return Err(gone),
            _ if !alone => alone = true,
            result => {
                // Bytes that came before the fault go too: a page is known whole or not.
                buf[page.clone()].fill(0);
                states[cell] = PageState::Unreadable;
                lost(cells.range(&(cell..cell + 1)).start(), result.err());
                done = page.end;
                alone = false;
            }
        }
    }
    Ok(())
}

/// The next bytes of `start..end` for which `file` has data; `None` when the rest is a hole or
/// lies behind the file. A file system that cannot tell has data everywhere.
fn next_extent(file: &File, start: u64, end: u64) -> Option<Range<u64>> {
    let data = next_data(file, start, end)?;
    match rustix::fs::seek(file, SeekFrom::Hole(data)) {
        Ok(hole) if hole > data => Some(data..hole.min(end)),
        // The file shrank or changed between the calls: reading will tell.
        _ => Some(data..end),
    }
}

/// Where data of `start..end` begins; `None` when all of it is a hole or lies behind the file.
fn next_data(file: &File, start: u64, end: u64) -> Option<u64> {
    if start >= end {
        return None;
    }
    match rustix::fs::seek(file, SeekFrom::Data(start)) {
        Ok(data) if data < end => Some(data),
        Ok(_) | Err(Errno::NXIO) => None,
        Err(_) => Some(start),
    }
}

/// Sets the ways of the cells of `at`. What had data when the pass began is read: if it has none any
/// more, zeros are, and nothing is allocated for them. What had none is looked at again.
fn ways_by_extents(held: &Held, file: &File, at: GuestRange, ways: &mut [Way]) {
    let cells = Cells(at);
    let start = held.file_off(at.start());
    let end = start + at.len();
    let mut pos = start;
    while pos < end {
        let known = held.data_until(pos).min(end);
        let (first, last) = if known > pos {
            (cells.of(pos - start), cells.of(known - 1 - start))
        } else {
            let Some(data) = next_data(file, pos, end) else { break };
            (cells.of(data - start), cells.of(data - start))
        };
        ways[first..=last].fill(Way::File);
        pos = start + cells.offset(last + 1);
    }
    if ways.contains(&Way::Hole) {
        // An unknown size makes no hole a loss: the extents were read a moment ago.
        let size = file.metadata().map_or(u64::MAX, |m| m.size());
        for (cell, way) in ways.iter_mut().enumerate() {
            if *way == Way::Hole && start + cells.offset(cell + 1) > size {
                *way = Way::Beyond;
            }
        }
    }
}

/// hugetlbfs cannot tell its holes: zeros from a page that the process does not have are one.
fn hugetlb_holes(
    cells: Cells,
    entries: &[Entry],
    ways: &[Way],
    buf: &[u8],
    states: &mut [PageState],
) {
    for (cell, state) in states.iter_mut().enumerate() {
        let from_file = ways[cell] == Way::File && *state == PageState::Data;
        let bytes = &buf[cells.span(&(cell..cell + 1))];
        if from_file && !entries[cell].kept() && bytes.iter().all(|b| *b == 0) {
            *state = PageState::Hole;
        }
    }
}

/// The places, ascending; checked for overlap and alignment.
fn in_order(places: &[Place]) -> Result<Vec<Place>, HostError> {
    let mut places = places.to_vec();
    places.sort_by_key(|p| p.range.start());
    for pair in places.windows(2) {
        if let [a, b] = pair
            && b.range.start() < a.range.end()
        {
            return Err(HostError::Overlap { first: a.range, second: b.range });
        }
    }
    match places.iter().find(|p| p.hva % PAGE != p.range.start() % PAGE) {
        Some(Place { range, hva }) => Err(HostError::Skewed { range: *range, hva: *hva }),
        None => Ok(places),
    }
}

/// The mapping of each place, from one reading of `smaps`.
fn look(process: &Process, places: &[Place]) -> Result<Vec<(Place, Smap)>, HostError> {
    let len = |p: &Place| p.range.len();
    let smaps = process.smaps(|vma| places.iter().any(|p| vma.covers(p.hva, len(p))))?;
    let mut out = Vec::new();
    for place in places {
        match smaps.iter().find(|s| s.vma.covers(place.hva, len(place))) {
            Some(smap) => out.push((*place, smap.clone())),
            None => {
                let there = maps::touching(&process.maps()?, place.hva, len(place));
                let Place { range, hva } = *place;
                return Err(HostError::NotOneMapping { range, hva, there });
            }
        }
    }
    Ok(out)
}

/// Decides how a place is read, and opens its file.
fn choose(
    process: &Process,
    place: Place,
    smap: Smap,
    files: &mut Vec<Backing>,
) -> Result<Held, HostError> {
    let Smap { vma, page_size, .. } = &smap;
    let refuse = |why: &str| {
        let (range, why) = (place.range, why.to_owned());
        Err(HostError::NotMemory { range, vma: vma.to_string(), why })
    };
    if let Some(flag) = ["io", "pf", "mm"].into_iter().find(|f| smap.has(f)) {
        return refuse(&format!("VmFlags has {flag}: memory of a device"));
    }
    if !vma.readable() {
        return refuse("the process itself may not read it");
    }
    let wraps = vma.offset.checked_add(vma.end - vma.start).is_none_or(|e| e > i64::MAX as u64);
    if wraps {
        return refuse("its end is no file offset");
    }
    let (mapping, backing) = if vma.anonymous() {
        if vma.shared() {
            return refuse("shared without a file");
        }
        (Mapping::Anonymous, None)
    } else {
        let backing = find_file(process, vma, files)?;
        let meta = backing.file.metadata().map_err(|e| process.error(&backing.route, e))?;
        if !meta.is_file() {
            return refuse("its file is not a regular file");
        }
        let huge = is_hugetlbfs(&backing.file).map_err(|e| process.error(&backing.route, e))?;
        let mapping = match (vma.shared(), huge) {
            (true, false) => Mapping::Shared,
            (true, true) => Mapping::SharedHugetlb,
            (false, false) => Mapping::PrivateFile,
            (false, true) => Mapping::PrivateHugetlb,
        };
        (mapping, Some(backing))
    };
    let page_size = *page_size;
    // Until the pass begins, the careful way.
    let (merged, extents) = (AtomicBool::new(true), RwLock::default());
    Ok(Held { place, vma: smap.vma, mapping, page_size, backing, merged, extents })
}

/// Opens the file behind `vma`: through a descriptor of the process that is the same file, else
/// through `map_files`, which needs CAP_SYS_ADMIN or CAP_CHECKPOINT_RESTORE.
fn find_file(process: &Process, vma: &Vma, files: &mut Vec<Backing>) -> Result<Backing, HostError> {
    let key = (vma.dev, vma.inode);
    if let Some(known) = files.iter().find(|f| f.key == key) {
        return Ok(known.clone());
    }
    let dev = rustix::fs::makedev(vma.dev.0, vma.dev.1);
    let id = FileId { dev, inode: vma.inode };
    let fds = process.fds()?;
    let by_fd = fds.iter().filter(|fd| fd.file == id).find_map(|fd| {
        let route = format!("fd/{}", fd.number);
        // A descriptor may be another file by now: the opened one is what counts.
        let file = open_reading(process.dir(), &route).ok()?;
        let meta = file.metadata().ok()?;
        (meta.dev() == id.dev && meta.ino() == id.inode).then_some((file, route))
    });
    let backing =
        |(file, route): (File, String)| Backing { file: Arc::new(file), route: route.into(), key };
    let Some(found) = by_fd else {
        // Not kept for other mappings: on btrfs another file may have the same key.
        return Ok(backing(by_map_files(process, vma)?));
    };
    let found = backing(found);
    files.push(found.clone());
    Ok(found)
}

/// The file of exactly this mapping. The kernel resolves the name by the mapping itself; only
/// the inode is compared, because file systems with several devices in one (btrfs, overlayfs)
/// show another device in `maps` than in `stat`.
fn by_map_files(process: &Process, vma: &Vma) -> Result<(File, String), HostError> {
    let route = format!("map_files/{:x}-{:x}", vma.start, vma.end);
    let opened = open_reading(process.dir(), &route).and_then(|file| {
        let inode = file.metadata()?.ino();
        let same = inode == vma.inode;
        let other = || io::Error::other(format!("inode {inode} instead of {}", vma.inode));
        if same { Ok(file) } else { Err(other()) }
    });
    match opened {
        Ok(file) => Ok((file, route)),
        Err(source) => Err(HostError::NoFile { pid: process.pid(), vma: vma.to_string(), source }),
    }
}

impl Held {
    fn is_in(&self, vma: &Vma) -> bool {
        vma.covers(self.place.hva, self.place.range.len())
    }
}

/// Whether `hva` is the same memory in both mappings.
fn same_memory(before: &Vma, now: &Vma, hva: u64) -> bool {
    let same_kind = (before.perms, before.dev, before.inode, before.anonymous())
        == (now.perms, now.dev, now.inode, now.anonymous());
    same_kind && (before.anonymous() || before.file_off(hva) == now.file_off(hva))
}

/// What is known of kernel same-page merging.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ksm {
    /// `/sys/kernel/mm/ksm/run`: 0 stopped (what is merged stays merged), 1 merging, 2 stopped
    /// and un-merged. `None`: the kernel has no KSM.
    run: Option<u64>,
    /// Merged pages of the process; `None` when the kernel does not say (before 5.19).
    merging: Option<u64>,
}

impl Ksm {
    fn look(process: &Process) -> Result<Self, HostError> {
        let number = |text: String| text.trim().parse::<u64>().ok();
        let run = match kernel_text::read_text("/sys/kernel/mm/ksm/run", 64) {
            Ok(text) => Some(number(text).unwrap_or(1)),
            Err(HostError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            // Not allowed to look: take it as running.
            Err(_) => Some(1),
        };
        let merging = match process.small_text("ksm_merging_pages") {
            Ok(text) => number(text),
            Err(gone @ HostError::Exited { .. }) => return Err(gone),
            Err(_) => None,
        };
        Ok(Self { run, merging })
    }

    /// Whether pages may be merged: everywhere, nowhere, or (`None`) where a mapping's flags
    /// have `mg`.
    fn merged_anywhere(self) -> Option<bool> {
        match (self.run, self.merging) {
            (None, _) => Some(false),
            (_, Some(1..)) => Some(true),
            (Some(1), _) | (_, None) => None,
            (Some(_), Some(0)) => Some(false),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
