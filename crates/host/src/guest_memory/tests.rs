#![expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]
//! Real mappings of the test process in the role of a guest's RAM, and scripted readers.

use super::*;
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::mm::{Advice, MapFlags, MprotectFlags, ProtFlags};
use std::ffi::c_void;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

/// Memory of this test process in the role of a guest's RAM.
pub(crate) struct Area {
    start: *mut c_void,
    len: usize,
    file: Option<File>,
}

impl Area {
    fn map(pages: usize, flags: MapFlags, file: Option<File>) -> Self {
        let len = pages * 4096;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let nowhere = std::ptr::null_mut();
        let start = match &file {
            // SAFETY: a new mapping where the kernel wants it.
            Some(file) => unsafe { rustix::mm::mmap(nowhere, len, prot, flags, file, 0) },
            // SAFETY: the same.
            None => unsafe { rustix::mm::mmap_anonymous(nowhere, len, prot, flags) },
        };
        let start = start.unwrap();
        // Else a machine with transparent huge pages everywhere has no small holes.
        // SAFETY: our own mapping, and no byte changes.
        let _ = unsafe { rustix::mm::madvise(start, len, Advice::LinuxNoHugepage) };
        Self { start, len, file }
    }

    pub(crate) fn anonymous(pages: usize) -> Self {
        Self::map(pages, MapFlags::PRIVATE, None)
    }

    fn shared_anonymous(pages: usize) -> Self {
        Self::map(pages, MapFlags::SHARED, None)
    }

    fn memfd(pages: usize, flags: MapFlags) -> Self {
        let file = File::from(rustix::fs::memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages as u64 * 4096).unwrap();
        Self::map(pages, flags, Some(file))
    }

    /// A file on disk whose page n is filled with 100 + n.
    fn disk_file(pages: usize, flags: MapFlags) -> Self {
        let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        for page in 0..pages {
            file.write_all_at(&[100 + page as u8; 4096], page as u64 * 4096).unwrap();
        }
        Self::map(pages, flags, Some(file))
    }

    pub(crate) fn hva(&self) -> u64 {
        self.start.addr() as u64
    }

    fn pages(&self) -> usize {
        self.len / 4096
    }

    fn page(&self, page: usize) -> *mut c_void {
        assert!(page < self.pages());
        self.start.wrapping_byte_add(page * 4096)
    }

    /// Fills a page.
    pub(crate) fn write(&self, page: usize, byte: u8) {
        // SAFETY: the page is ours and mapped, and no reference leads to it.
        unsafe { std::ptr::write_bytes(self.page(page).cast::<u8>(), byte, 4096) }
    }

    /// Reads one byte of a page through the mapping: what the readers must not do.
    fn touch(&self, page: usize) -> u8 {
        // SAFETY: as in `write`.
        unsafe { self.page(page).cast::<u8>().read_volatile() }
    }

    fn unmap(&self, page: usize) {
        // SAFETY: the page is ours, and nothing uses it any more.
        unsafe { rustix::mm::munmap(self.page(page), 4096) }.unwrap();
    }

    fn forbid(&self, page: usize) {
        // SAFETY: as in `unmap`.
        unsafe { rustix::mm::mprotect(self.page(page), 4096, MprotectFlags::empty()) }.unwrap();
    }

    fn place(&self, gpa: u64) -> Place {
        Place { range: GuestRange::new(gpa, self.len as u64).unwrap(), hva: self.hva() }
    }

    /// What reading would change, if it were done wrongly: pages in the page table and
    /// blocks of the file.
    fn footprint(&self) -> (u64, u64) {
        let me = Process::open(std::process::id()).unwrap();
        let count = Pagemap::open(&me).unwrap().count(self.hva(), self.pages() as u64);
        let blocks = self.file.as_ref().map_or(0, |f| f.metadata().unwrap().blocks());
        (count.unwrap().present, blocks)
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: ours; pages that are unmapped already are passed over.
        let _ = unsafe { rustix::mm::munmap(self.start, self.len) };
    }
}

const GPA: u64 = 0x1_0000_0000;

fn open(areas: &[(&Area, u64)]) -> Result<GuestMemory, HostError> {
    let places: Vec<_> = areas.iter().map(|(area, gpa)| area.place(*gpa)).collect();
    GuestMemory::open(&Process::open(std::process::id()).unwrap(), &places)
}

fn read(memory: &impl Source, start: u64, len: u64) -> (Vec<u8>, Vec<PageState>) {
    let at = GuestRange::new(start, len).unwrap();
    let mut buf = vec![0xee; at.len() as usize];
    let mut states = vec![PageState::Excluded; evidence::state::page_count(at) as usize];
    memory.read(at, &mut buf, &mut states).unwrap();
    (buf, states)
}

/// What one page must be: its state and the byte that fills it.
type Expect = Vec<(PageState, u8)>;

/// The contract of a source over real memory: pages as expected by one read and by reads of
/// odd ends and lengths, several workers at a time, and nothing left behind.
fn contract(memory: &GuestMemory, area: &Area, gpa: u64, expect: &Expect) {
    let before = area.footprint();
    let len = area.len as u64;
    check(memory, gpa, 0..len, expect);
    std::thread::scope(|scope| {
        for odd in [1u64, 4095, 0x1800, 5 * 4096 + 7] {
            scope.spawn(move || {
                let mut at = 0;
                while at < len {
                    let end = (at + odd * 3).min(len);
                    check(memory, gpa, at..end, expect);
                    at = if odd == 1 { at + 4096 - 1 } else { end };
                }
            });
        }
    });
    memory.begin_pass().unwrap();
    check(memory, gpa, 0..len, expect);
    assert_eq!(area.footprint(), before, "reading left a footprint");
}

fn check(memory: &GuestMemory, gpa: u64, part: Range<u64>, expect: &Expect) {
    let (buf, states) = read(memory, gpa + part.start, part.end - part.start);
    for (state, cell) in states.iter().zip(part.start / 4096..) {
        assert_eq!(*state, expect[cell as usize].0, "page {cell} of {part:?}");
    }
    for (byte, at) in buf.iter().zip(part.clone()) {
        assert_eq!(*byte, expect[(at / 4096) as usize].1, "byte {at:#x} of {part:?}");
    }
}

/// `base` with some pages replaced.
fn with(base: (PageState, u8), pages: usize, some: &[(usize, PageState, u8)]) -> Expect {
    let mut out = vec![base; pages];
    some.iter().for_each(|(page, state, byte)| out[*page] = (*state, *byte));
    out
}

use PageState::{Data, Hole, Unreadable};

#[test]
fn anonymous() {
    let area = Area::anonymous(700);
    let some =
        [(0, Data, 1), (5, Data, 2), (6, Data, 3), (510, Data, 4), (514, Data, 5), (699, Data, 6)];
    some.iter().for_each(|(page, _, byte)| area.write(*page, *byte));
    area.write(300, 0);
    let mut expect = with((Hole, 0), 700, &some);
    expect[300] = (Data, 0);
    let memory = open(&[(&area, GPA)]).unwrap();
    let held = &memory.places()[0];
    assert_eq!((held.mapping(), held.page_size(), held.route()), (Mapping::Anonymous, 4096, None));
    held.merged.store(false, Ordering::Relaxed);
    assert_eq!(held.reader(), Reader::ProcessVm);
    contract(&memory, &area, GPA, &expect);
    held.merged.store(true, Ordering::Relaxed);
    assert_eq!(held.reader(), Reader::ProcMem);
    contract(&memory, &area, GPA, &expect);
    assert_eq!(memory.usage().unwrap(), [Usage { resident: 7 * 4096, swapped: 0 }]);
    assert_eq!(memory.take_faults().count, 0);
}

#[test]
fn holes_can_be_left_alone() {
    for area in [Area::anonymous(700), Area::memfd(700, MapFlags::SHARED)] {
        [3, 4, 511, 600].iter().for_each(|page| area.write(*page, *page as u8));
        let memory = open(&[(&area, GPA)]).unwrap();
        let (at, odd) = (GPA + 0x2345, 0x25_0123);
        let (bytes, states) = read(&memory, at, odd);
        let into = |filler| {
            let (mut buf, mut states) = (vec![filler; bytes.len()], states.clone());
            states.fill(PageState::Excluded);
            let at = GuestRange::new(at, odd).unwrap();
            memory.read_but_holes(at, &mut buf, &mut states).unwrap();
            (buf, states)
        };
        assert!(into(0) == (bytes.clone(), states.clone()));
        // Page 2, from 0x345 on, is a hole.
        assert_eq!((states[0], into(9).0[..0xcbb].to_vec()), (Hole, vec![9; 0xcbb]));
    }
}

#[test]
fn shared_memfd() {
    let area = Area::memfd(700, MapFlags::SHARED);
    let some = [(0, Data, 1), (5, Data, 2), (511, Data, 3), (512, Data, 4), (698, Data, 5)];
    some.iter().for_each(|(page, _, byte)| area.write(*page, *byte));
    let memory = open(&[(&area, GPA)]).unwrap();
    let held = &memory.places()[0];
    assert_eq!((held.mapping(), held.reader()), (Mapping::Shared, Reader::File));
    assert!(held.route().unwrap().starts_with("fd/"), "{:?}", held.route());
    contract(&memory, &area, GPA, &with((Hole, 0), 700, &some));
    assert_eq!(memory.usage().unwrap(), [Usage { resident: 5 * 4096, swapped: 0 }]);
    // Put there by another process that has the file: not in our page table, and no hole.
    area.file.as_ref().unwrap().write_all_at(&[9; 4096], 7 * 4096).unwrap();
    assert_eq!(read(&memory, GPA + 7 * 4096, 4096), (vec![9; 4096], vec![Data]));
}

/// Where data ends is asked once a pass; what appears or goes meanwhile is read all the same.
#[test]
fn data_of_shared_memory_is_looked_for_once_a_pass() {
    let area = Area::memfd(700, MapFlags::SHARED);
    (0..600).for_each(|page| area.write(page, 1));
    let memory = open(&[(&area, GPA)]).unwrap();
    let block = |page: u64| GuestRange::new(GPA + page * 4096, 256 * 4096).unwrap();
    assert!(memory.is_wholly_present(block(344)).unwrap());
    assert!(!memory.is_wholly_present(block(345)).unwrap());
    let file = area.file.as_ref().unwrap();
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, punch, 3 * 4096, 4096).unwrap();
    [600, 601, 603].iter().for_each(|page| area.write(*page, 2));
    let before = area.footprint();
    let (bytes, states) = read(&memory, GPA, 700 * 4096);
    let expect = |at| match at {
        3 => 0,
        0..600 => 1,
        600 | 601 | 603 => 2,
        _ => 0,
    };
    for (at, page) in bytes.chunks(4096).enumerate() {
        assert_eq!((page[0], page[4095]), (expect(at), expect(at)), "page {at}");
    }
    assert_eq!([states[602], states[603], states[604]], [Hole, Data, Hole]);
    memory.begin_pass().unwrap();
    assert_eq!(read(&memory, GPA + 3 * 4096, 4096), (vec![0; 4096], vec![Hole]));
    assert_eq!(area.footprint(), before);
}

#[test]
fn shared_file_on_disk() {
    let area = Area::disk_file(40, MapFlags::SHARED);
    area.write(3, 7);
    let mut expect: Expect = (0..40).map(|page| (Data, 100 + page)).collect();
    expect[3].1 = 7;
    let memory = open(&[(&area, GPA)]).unwrap();
    assert_eq!(memory.places()[0].mapping(), Mapping::Shared);
    contract(&memory, &area, GPA, &expect);
}

#[test]
fn shared_anonymous_needs_map_files() {
    let area = Area::shared_anonymous(20);
    area.write(4, 9);
    match open(&[(&area, GPA)]) {
        Ok(memory) => {
            let held = &memory.places()[0];
            assert_eq!(held.mapping(), Mapping::Shared);
            assert!(held.route().unwrap().starts_with("map_files/"));
            contract(&memory, &area, GPA, &with((Hole, 0), 20, &[(4, Data, 9)]));
        }
        // Without privilege the kernel does not open it: refused, and the mapping named.
        Err(error) => {
            assert!(matches!(error, HostError::NoFile { .. }), "{error}");
            assert!(error.to_string().contains("/dev/zero"), "{error}");
        }
    }
}

#[test]
fn private_over_a_file_that_is_not_zero() {
    let area = Area::disk_file(40, MapFlags::PRIVATE);
    area.write(3, 7);
    area.write(4, 0);
    let mut expect: Expect = (0..40).map(|page| (Data, 100 + page)).collect();
    (expect[3].1, expect[4].1) = (7, 0);
    let memory = open(&[(&area, GPA)]).unwrap();
    let held = &memory.places()[0];
    assert_eq!(held.mapping(), Mapping::PrivateFile);
    held.merged.store(false, Ordering::Relaxed);
    assert_eq!(held.reader(), Reader::ProcessVmAndFile);
    contract(&memory, &area, GPA, &expect);
    held.merged.store(true, Ordering::Relaxed);
    assert_eq!(held.reader(), Reader::ProcMemAndFile);
    contract(&memory, &area, GPA, &expect);
    assert_eq!(memory.usage().unwrap(), [Usage { resident: 40 * 4096, swapped: 0 }]);
}

#[test]
fn private_over_a_memfd() {
    let area = Area::memfd(40, MapFlags::PRIVATE);
    area.file.as_ref().unwrap().write_all_at(&[5; 4096], 8 * 4096).unwrap();
    area.write(3, 7);
    let memory = open(&[(&area, GPA)]).unwrap();
    assert_eq!(memory.places()[0].mapping(), Mapping::PrivateFile);
    // Absent pages are the file's, holes in it too: read, not assumed.
    contract(&memory, &area, GPA, &with((Data, 0), 40, &[(3, Data, 7), (8, Data, 5)]));
}

/// The footprint check must be able to fail: this is what it would see of a reader that
/// goes through the mapping.
#[test]
fn touching_holes_is_seen_by_the_footprint() {
    for area in [Area::memfd(16, MapFlags::SHARED), Area::anonymous(16)] {
        let before = area.footprint();
        assert_eq!(area.touch(3), 0);
        assert_ne!(area.footprint(), before);
    }
    // And of one that reads holes of a memfd through the process.
    let area = Area::memfd(16, MapFlags::SHARED);
    let memory = open(&[(&area, GPA)]).unwrap();
    let before = area.footprint();
    memory.process_vm(area.hva(), &mut [1; 4096]).unwrap();
    assert_eq!(area.footprint().1, before.1 + 8);
}

#[test]
fn pages_that_fail_are_lost_alone() {
    for merged in [false, true] {
        let area = Area::anonymous(600);
        (0..600).for_each(|page| area.write(page, page as u8 | 1));
        let memory = open(&[(&area, GPA)]).unwrap();
        memory.places()[0].merged.store(merged, Ordering::Relaxed);
        if !merged {
            // /proc/PID/mem reads these too.
            area.forbid(7);
        }
        area.forbid(590);
        area.unmap(100);
        let mut expect: Expect = (0..600).map(|page| (Data, page as u8 | 1)).collect();
        expect[100] = (Hole, 0);
        if !merged {
            (expect[7], expect[590]) = ((Unreadable, 0), (Unreadable, 0));
        }
        check(&memory, GPA, 0..600 * 4096, &expect);
        let faults = memory.take_faults();
        let want: &[u64] = if merged { &[] } else { &[GPA + 7 * 4096, GPA + 590 * 4096] };
        let gpas: Vec<_> = faults.list.iter().map(|f| f.gpa).collect();
        assert_eq!((faults.count, &gpas[..]), (want.len() as u64, want));
        assert!(faults.list.iter().all(|f| f.errno == Errno::FAULT.raw_os_error()));
        // The next pass would not begin: the mapping is in pieces.
        let error = memory.begin_pass().unwrap_err();
        assert!(matches!(error, HostError::Changed { .. }), "{error}");
    }
}

#[test]
fn behind_the_end_of_the_file_is_a_loss() {
    for flags in [MapFlags::SHARED, MapFlags::PRIVATE] {
        let area = Area::memfd(600, flags);
        let file = area.file.as_ref().unwrap();
        file.write_all_at(&[3; 4096], 0).unwrap();
        file.set_len(530 * 4096 + 5).unwrap();
        let memory = open(&[(&area, GPA)]).unwrap();
        let base = if flags == MapFlags::SHARED { (Hole, 0) } else { (Data, 0) };
        let mut expect = with(base, 600, &[(0, Data, 3)]);
        expect[530..].fill((Unreadable, 0));
        check(&memory, GPA, 0..600 * 4096, &expect);
        let faults = memory.take_faults();
        assert_eq!((faults.count, faults.list[0].errno), (70, 0));
        assert!(faults.list[0].to_string().contains("ends before"), "{}", faults.list[0]);
    }
}

#[test]
fn places_are_found_by_address() {
    let (low, high) = (Area::anonymous(4), Area::memfd(4, MapFlags::SHARED));
    low.write(1, 1);
    high.write(2, 2);
    let memory = open(&[(&high, GPA), (&low, 0x1000)]).unwrap();
    assert_eq!(read(&memory, 0x2000, 4096), (vec![1; 4096], vec![Data]));
    assert_eq!(read(&memory, GPA + 0x2000, 4096), (vec![2; 4096], vec![Data]));
    let try_read = |start, len| {
        let at = GuestRange::new(start, len).unwrap();
        memory.read(at, &mut vec![0; len as usize], &mut [Data])
    };
    for (start, len) in [(0xfff, 2), (0x4fff, 2), (0x5000, 1), (0, 1), (GPA + 0x4000, 1)] {
        let error = match try_read(start, len) {
            Err(Gone::Misfit { .. }) => {
                let at = GuestRange::new(start, len).unwrap();
                memory.read(at, &mut vec![0; len as usize], &mut [Data; 2])
            }
            result => result,
        };
        assert!(matches!(error, Err(Gone::NoPlace { .. })), "{start:#x} {error:?}");
    }
    let at = GuestRange::new(0x1000, 2).unwrap();
    assert!(matches!(memory.read(at, &mut [0; 3], &mut [Data]), Err(Gone::Misfit { .. })));
    assert!(matches!(memory.read(at, &mut [0; 2], &mut []), Err(Gone::Misfit { .. })));
}

#[test]
fn places_that_do_not_fit_are_refused_by_name() {
    let area = Area::memfd(4, MapFlags::SHARED);
    let me = Process::open(std::process::id()).unwrap();
    let try_open = |gpa, len, hva| {
        let range = GuestRange::new(gpa, len).unwrap();
        GuestMemory::open(&me, &[Place { range, hva }]).unwrap_err()
    };
    let error = try_open(GPA, 0x6000, area.hva());
    assert!(matches!(error, HostError::NotOneMapping { .. }), "{error}");
    assert!(error.to_string().contains("memfd:ram"), "{error}");
    let error = try_open(GPA, 0x1000, 0x1000);
    assert!(error.to_string().contains("nothing"), "{error}");
    let error = try_open(GPA, 0x1000, !0xfff);
    assert!(matches!(error, HostError::NotOneMapping { .. }), "{error}");
    assert!(matches!(try_open(GPA + 1, 0x1000, area.hva()), HostError::Skewed { .. }));
    let twice = open(&[(&area, GPA), (&area, GPA + 0x3000)]);
    assert!(matches!(twice, Err(HostError::Overlap { .. })));
    area.forbid(0);
    let error = try_open(GPA, 0x1000, area.hva());
    assert!(matches!(error, HostError::NotMemory { .. }), "{error}");
}

#[test]
fn another_mapping_at_the_place_is_noticed() {
    let area = Area::memfd(8, MapFlags::SHARED);
    let memory = open(&[(&area, GPA)]).unwrap();
    memory.begin_pass().unwrap();
    let other = File::from(rustix::fs::memfd_create("other", MemfdFlags::CLOEXEC).unwrap());
    other.set_len(8 * 4096).unwrap();
    let (prot, flags) = (ProtFlags::READ, MapFlags::SHARED | MapFlags::FIXED);
    // SAFETY: over our own mapping, to which no reference leads.
    unsafe { rustix::mm::mmap(area.start, area.len, prot, flags, &other, 0) }.unwrap();
    let error = memory.begin_pass().unwrap_err().to_string();
    assert!(error.contains("memfd:ram") && error.contains("memfd:other"), "{error}");
}

#[test]
fn a_neighbour_may_come_and_go() {
    let area = Area::anonymous(16);
    let part = Place { range: GuestRange::new(GPA, 0x4000).unwrap(), hva: area.hva() + 0x4000 };
    let me = Process::open(std::process::id()).unwrap();
    let memory = GuestMemory::open(&me, &[part]).unwrap();
    area.unmap(3);
    area.forbid(8);
    memory.begin_pass().unwrap();
}

#[test]
fn a_process_that_exits_is_gone() {
    let mut child =
        Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let process = Process::open(child.id()).unwrap();
    // Its stack, as soon as it has become `cat`.
    let stack = loop {
        let exe = process.exe().unwrap();
        let maps = process.maps().unwrap();
        match maps.into_iter().find(|v| v.path == b"[stack]") {
            Some(stack) if exe.ends_with(b"cat") || exe.ends_with(b"coreutils") => break stack,
            _ => std::thread::yield_now(),
        }
    };
    let range = GuestRange::new(GPA, 4096).unwrap();
    let place = Place { range, hva: stack.end - 4096 };
    let memory = GuestMemory::open(&process, &[place]).unwrap();
    let (buf, states) = read(&memory, GPA, 4096);
    assert!(states == [Data] && buf.iter().any(|b| *b != 0));
    child.kill().unwrap();
    child.wait().unwrap();
    for merged in [false, true] {
        memory.places()[0].merged.store(merged, Ordering::Relaxed);
        let gone = memory.read(range, &mut [0; 4096], &mut [Data]).unwrap_err();
        assert!(matches!(gone, Gone::Exited { .. }), "{gone}");
    }
    assert!(matches!(memory.begin_pass(), Err(HostError::Exited { .. })));
    assert!(matches!(memory.usage(), Err(HostError::Exited { .. })), "{:?}", memory.usage());
}

#[test]
fn merging_is_assumed_when_in_doubt() {
    let ksm = |run, merging| Ksm { run, merging }.merged_anywhere();
    assert_eq!(ksm(None, None), Some(false));
    assert_eq!(ksm(Some(0), Some(0)), Some(false));
    assert_eq!(ksm(Some(2), Some(0)), Some(false));
    assert_eq!(ksm(Some(0), Some(1)), Some(true), "what was merged stays merged");
    assert_eq!(ksm(Some(1), Some(0)), None);
    assert_eq!(ksm(Some(0), None), None);
}

/// Result, bytes, states, and pages lost.
type Copied = (Result<(), Errno>, Vec<u8>, Vec<PageState>, Vec<(u64, Option<Errno>)>);

/// Runs `copy` over a scripted reader: `(offset, length asked) -> result`.
fn copied(at: GuestRange, mut reader: impl FnMut(u64, usize) -> Result<usize, Errno>) -> Copied {
    let mut buf = vec![0xee; at.len() as usize];
    let mut states = vec![Hole; evidence::state::page_count(at) as usize];
    let mut lost = Vec::new();
    let read_at = |done: u64, buf: &mut [u8]| {
        let n = reader(done, buf.len())?;
        buf[..n].fill(1);
        Ok(n)
    };
    let done = copy(at, &mut buf, &mut states, read_at, |gpa, e| lost.push((gpa, e)));
    (done, buf, states, lost)
}

#[test]
fn short_reads_go_on_where_they_ended() {
    let at = GuestRange::new(0xff0, 0x3020).unwrap();
    let (done, buf, states, lost) = copied(at, |_, len| Ok(len.min(1000)));
    assert!(done.is_ok() && lost.is_empty());
    assert!(buf.iter().all(|b| *b == 1) && states == [Data; 5]);
}

#[test]
fn a_page_that_fails_half_way_is_lost_whole() {
    let at = GuestRange::new(0xff0, 0x3020).unwrap();
    // Byte 0x2800 of guest memory cannot be read.
    let bad = 0x2800 - 0xff0;
    let (done, buf, states, lost) = copied(at, |from, len| match bad - from.min(bad) {
        0 if from == bad => Err(Errno::IO),
        0 => Ok(len),
        before => Ok(len.min(before as usize)),
    });
    assert!(done.is_ok());
    assert_eq!(states, [Data, Data, Unreadable, Data, Data]);
    assert_eq!(lost, [(0x2000, Some(Errno::IO))]);
    let zeros: Vec<_> = (0..buf.len()).filter(|i| buf[*i] == 0).collect();
    assert_eq!((zeros[0], zeros.len()), (0x2000 - 0xff0, 4096));
}

#[test]
fn interrupted_reads_are_repeated_and_a_gone_source_is_an_error() {
    let at = GuestRange::new(0, 0x2000).unwrap();
    let mut calls = 0;
    let (done, _, states, _) = copied(at, |_, len| {
        calls += 1;
        if calls % 2 == 1 { Err(Errno::INTR) } else { Ok(len) }
    });
    assert!(done.is_ok() && states == [Data; 2]);
    for gone in [Errno::SRCH, Errno::PERM, Errno::ACCESS] {
        let (done, ..) = copied(at, |from, _| if from == 0 { Ok(5) } else { Err(gone) });
        assert_eq!(done, Err(gone));
    }
}

#[test]
fn a_large_read_that_fails_is_tried_by_page() {
    let at = GuestRange::new(0, 0x4000).unwrap();
    let one_by_one = |_, len| if len > 4096 { Err(Errno::NOMEM) } else { Ok(len) };
    let (done, buf, states, lost) = copied(at, one_by_one);
    assert!(done.is_ok() && lost.is_empty() && states == [Data; 4]);
    assert!(buf.iter().all(|b| *b == 1));
}

const HUGE: u64 = 2 << 20;

/// A mapping of `count` huge pages of a memfd; the kernel must have them.
fn huge(count: usize, flags: MapFlags) -> Area {
    let create = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(rustix::fs::memfd_create("huge", create).unwrap());
    file.set_len(count as u64 * HUGE).unwrap();
    Area::map(count * 512, flags, Some(file))
}

#[test]
#[ignore = "needs 8 free huge pages: echo 8 > /proc/sys/vm/nr_hugepages"]
fn shared_hugetlbfs() {
    let area = huge(4, MapFlags::SHARED);
    (512..1024).for_each(|page| area.write(page, if page == 700 { 0 } else { 6 }));
    let mut expect = with((Hole, 0), 4 * 512, &[]);
    expect[512..1024].fill((Data, 6));
    expect[700] = (Data, 0);
    let memory = open(&[(&area, GPA)]).unwrap();
    let held = &memory.places()[0];
    assert_eq!((held.mapping(), held.page_size()), (Mapping::SharedHugetlb, HUGE));
    contract(&memory, &area, GPA, &expect);
    assert_eq!(memory.usage().unwrap(), [Usage { resident: HUGE, swapped: 0 }]);
}

#[test]
#[ignore = "needs 8 free huge pages: echo 8 > /proc/sys/vm/nr_hugepages"]
fn private_hugetlbfs() {
    let area = huge(3, MapFlags::PRIVATE);
    {
        // The file has a page of its own, which the private mapping shows until written to.
        let shared = Area::map(512, MapFlags::SHARED, area.file.as_ref().unwrap().try_clone().ok());
        (0..512).for_each(|page| shared.write(page, 4));
    }
    (512..1024).for_each(|page| area.write(page, 6));
    let mut expect = with((Hole, 0), 3 * 512, &[]);
    expect[..512].fill((Data, 4));
    expect[512..1024].fill((Data, 6));
    let memory = open(&[(&area, GPA)]).unwrap();
    let held = &memory.places()[0];
    assert_eq!((held.mapping(), held.page_size()), (Mapping::PrivateHugetlb, HUGE));
    for merged in [false, true] {
        held.merged.store(merged, Ordering::Relaxed);
        check(&memory, GPA, 0..3 * HUGE, &expect);
    }
    memory.begin_pass().unwrap();
    contract(&memory, &area, GPA, &expect);
}

#[test]
#[ignore = "needs KSM running: echo 1 > /sys/kernel/mm/ksm/run; pages_to_scan 10000"]
fn merged_pages_stay_merged() {
    let area = Area::anonymous(512);
    (0..512).for_each(|page| area.write(page, 5));
    // SAFETY: our own mapping, and no byte changes.
    unsafe { rustix::mm::madvise(area.start, area.len, Advice::LinuxMergeable) }.unwrap();
    let memory = open(&[(&area, GPA)]).unwrap();
    assert_eq!(memory.places()[0].reader(), Reader::ProcMem, "mg and ksmd running");
    // Bit 56 of a page's entry: no other page-table entry leads to it. The kernel's own counter
    // of merged pages is brought up to date only by the next scan.
    let alone = || {
        let mut entries = [Entry::default(); 512];
        memory.pagemap().unwrap().read(area.hva(), &mut entries).unwrap();
        entries.iter().filter(|e| e.0 >> 56 & 1 == 1).count()
    };
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while alone() > 10 {
        assert!(std::time::Instant::now() < deadline, "{} pages not merged", alone());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    memory.begin_pass().unwrap();
    check(&memory, GPA, 0..512 * 4096, &with((Data, 5), 512, &[]));
    assert!(alone() <= 10, "reading un-merged {} pages", alone());
    // The check has teeth: the other reader does un-merge, and ksmd is not always back before the look.
    memory.places()[0].merged.store(false, Ordering::Relaxed);
    let torn = (0..100).any(|_| {
        read(&memory, GPA, 512 * 4096);
        alone() > 100
    });
    assert!(torn, "process_vm_readv left all merged");
}

#[test]
fn who_else_writes_shared_memory_is_found() {
    let (area, private) = (Area::memfd(4, MapFlags::SHARED), Area::memfd(4, MapFlags::PRIVATE));
    let me = Process::open(std::process::id()).unwrap();
    let maps = me.maps().unwrap();
    let file = |area: &Area| {
        let vma = maps.iter().find(|vma| vma.covers(area.hva(), 4096)).unwrap();
        [(vma.dev, vma.inode)]
    };
    let pids = |area: &Area, but| crate::process::sharers(&file(area), but).unwrap();
    finds(&[me.pid()], || pids(&area, 1));
    finds(&[], || pids(&area, me.pid()));
    // What it writes is its own.
    finds(&[], || pids(&private, 1));
    let memory = GuestMemory::open(&me, &[area.place(0)]).unwrap();
    // The VM itself.
    finds(&[], || memory.sharers().unwrap());
}

/// Waits until just these are found: what another test starts beside has our mappings until it has become
/// its program.
#[track_caller]
fn finds(expected: &[u32], look: impl Fn() -> Vec<Process>) {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let pids: Vec<u32> = look().iter().map(Process::pid).collect();
        if pids == expected {
            return;
        }
        assert!(std::time::Instant::now() < until, "{pids:?}, not {expected:?}");
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
}
