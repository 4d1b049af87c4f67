//! ELF64 core files: the image's default format.
//!
//! ```text
//! 0x0       ELF header          64 bytes
//! 0x40      program headers     PT_NOTE, then PT_LOADs; room for 145 in all
//! 0x2000    notes               up to 2 MiB - 8 KiB; what they do not fill is zero
//! 0x200000  memory              from here on, each range at the next multiple of 4 KiB
//! ```
//!
//! The file is written to the strictest of its readers, rule by rule:
//! * crash (`netdump.c`): PT_NOTE first, `p_align` 0, so PT_NOTE is there even without notes;
//! * MemProcFS (LeechCore `device_file.c`): all program headers in the first 8 KiB, so at most 145
//!   of them, and never `PN_XNUM`;
//! * Volatility 3 (`layers/elf.py`): `p_filesz == p_memsz`, ascending addresses. A zero page is
//!   a file hole, never a short segment;
//! * drgn, gdb: `p_vaddr == p_paddr`;
//! * `p_flags` 0, as in QEMU's own dumps, which all of them read.
//!
//! **Ends that are not multiples of 4 KiB.** MemProcFS skips a PT_LOAD whose address or length is
//! no multiple of 4096. To round it up would claim bytes that the guest does not have; to round it
//! down would lose bytes. So such a range gets a PT_LOAD for its whole pages and one each for the
//! partial pages at its ends: all readers see all bytes, but MemProcFS, which sees the whole
//! pages. In the file the parts stay side by side, with `offset % 4096 == address % 4096`, so that
//! a guest's page is a file's page and the range is one [`Segment`]; only a partial page at a
//! range's start has an unaligned `p_offset`. QEMU's machines have no such ranges.

use super::{
    Decoded, Fields, FormatError, Layout, MAX_SEGMENTS, Piece, check_limit, count, joined, merged,
    read_at,
};
use crate::layout::LayoutError;
use crate::{GuestRange, MemoryMap, PAGE, Segment, Segments};
use std::io::{Read, Seek};

/// The first bytes of every ELF file.
pub const MAGIC: [u8; 4] = *b"\x7fELF";

/// PT_LOADs that [`encode`] writes at most: with PT_NOTE they fill the first 8 KiB.
pub const MAX_LOADS: usize = 144;

/// Where notes begin in a file of ours: behind room for 145 program headers.
pub const NOTES_OFFSET: u64 = 0x2000;

/// Where memory begins in a file of ours.
pub const MEMORY_OFFSET: u64 = 2 << 20;

/// Bytes of notes that [`decode`] reads at most: 16 MiB. QEMU writes about 820 for each CPU, and
/// at most 1 MiB of VMCOREINFO.
pub const MAX_NOTES_LEN: u64 = 16 << 20;

/// Notes that [`decode`] reads at most.
pub const MAX_NOTES: u64 = 65_536;

/// Section headers that [`decode`] reads at most. QEMU writes 2 or 3.
const MAX_SECTIONS: u16 = 64;

const EHDR_LEN: u16 = 64;
const PHDR_LEN: u16 = 56;
const SHDR_LEN: u16 = 64;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const EV_CURRENT: u8 = 1;
const ET_CORE: u16 = 4;
const PT_NULL: u32 = 0;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `e_phnum` of a file whose true count is in the first section header's `sh_info`.
const PN_XNUM: u16 = 0xffff;
/// QEMU 7.2 to 10.2 write the size of a pointer here (`dump.c`, `prepare_elf64_header`).
const QEMU_EHSIZE: u16 = 8;

/// The guest's instruction set, for `e_machine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    /// x86-64, in whatever mode its CPUs are. (QEMU's own dump says EM_386 outside long mode.)
    X86_64,
    /// 64-bit ARM.
    Aarch64,
}

impl Arch {
    /// `EM_X86_64` or `EM_AARCH64`.
    pub fn machine(self) -> u16 {
        match self {
            Arch::X86_64 => 62,
            Arch::Aarch64 => 183,
        }
    }
}

/// An ELF note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Who defines its kind, such as `CORE`, `QEMU` or `VMCOREINFO`, without the closing NUL.
    pub name: String,
    /// `n_type`.
    pub kind: u32,
    /// Its content.
    pub desc: Vec<u8>,
}

/// The layout of `map`.
///
/// # Errors
/// As [`super::encode`].
pub fn encode(arch: Arch, map: &MemoryMap, notes: &[Note]) -> Result<Layout, FormatError> {
    let segments = place(&merged(map))?;
    let loads: Vec<Segment> = segments.list().iter().flat_map(loads).collect();
    if loads.is_empty() {
        return Err(FormatError::NoMemory);
    }
    if loads.len() > MAX_LOADS {
        return Err(FormatError::TooManyLoads { found: loads.len() });
    }
    let notes = note_bytes(notes)?;
    let table = table(&notes, &loads);
    let phnum = u16::try_from(table.len() / usize::from(PHDR_LEN))
        .map_err(|_| FormatError::TooManyLoads { found: loads.len() })?;
    let mut pieces = vec![
        Piece { offset: 0, bytes: file_header(arch, phnum), what: "ELF header" },
        Piece { offset: EHDR_LEN.into(), bytes: table, what: "program headers" },
    ];
    if !notes.is_empty() {
        pieces.push(Piece { offset: NOTES_OFFSET, bytes: notes, what: "notes" });
    }
    let len = segments.end();
    Layout::new(segments, pieces, len)
}

/// Puts the ranges behind each other from [`MEMORY_OFFSET`], each at an offset that is as far
/// behind a multiple of 4 KiB as its address is.
fn place(ranges: &[GuestRange]) -> Result<Segments, LayoutError> {
    let mut list = Vec::new();
    let mut at = MEMORY_OFFSET;
    for &range in ranges {
        let too_far = || LayoutError::Offset { range, offset: at };
        let offset = at.checked_add(range.start() % PAGE).ok_or_else(too_far)?;
        at = offset
            .checked_add(range.len())
            .and_then(|end| end.checked_next_multiple_of(PAGE))
            .ok_or_else(too_far)?;
        list.push(Segment { range, offset });
    }
    Segments::new(list)
}

/// The PT_LOADs of a segment: the partial page before its whole pages, these, the one behind.
fn loads(segment: &Segment) -> impl Iterator<Item = Segment> + use<> {
    let Segment { range, offset } = *segment;
    let whole = range.start().checked_next_multiple_of(PAGE).unwrap_or(u64::MAX).min(range.end());
    let tail = (range.end() - range.end() % PAGE).max(whole);
    [(range.start(), whole), (whole, tail), (tail, range.end())]
        .into_iter()
        .filter_map(|(start, end)| GuestRange::from_ends(start, end))
        .map(move |part| Segment { range: part, offset: offset + (part.start() - range.start()) })
}

/// The ELF header of a file with `phnum` program headers and no sections.
fn file_header(arch: Arch, phnum: u16) -> Vec<u8> {
    let mut bytes = Vec::from(MAGIC);
    bytes.extend([ELFCLASS64, ELFDATA2LSB, EV_CURRENT]);
    bytes.extend([0; 9]); // e_ident: OS ABI 0, its version 0, padding
    bytes.extend(ET_CORE.to_le_bytes());
    bytes.extend(arch.machine().to_le_bytes());
    bytes.extend(u32::from(EV_CURRENT).to_le_bytes());
    bytes.extend(0u64.to_le_bytes()); // e_entry
    bytes.extend(u64::from(EHDR_LEN).to_le_bytes()); // e_phoff
    bytes.extend(0u64.to_le_bytes()); // e_shoff
    bytes.extend(0u32.to_le_bytes()); // e_flags
    bytes.extend(EHDR_LEN.to_le_bytes());
    bytes.extend(PHDR_LEN.to_le_bytes());
    bytes.extend(phnum.to_le_bytes());
    bytes.extend([0; 6]); // e_shentsize, e_shnum, e_shstrndx
    bytes
}

/// The program headers: PT_NOTE, then `loads`.
fn table(notes: &[u8], loads: &[Segment]) -> Vec<u8> {
    let mut bytes = program_header(PT_NOTE, NOTES_OFFSET, 0, count(notes));
    for load in loads {
        let (gpa, len) = (load.range.start(), load.range.len());
        bytes.extend(program_header(PT_LOAD, load.offset, gpa, len));
    }
    bytes
}

/// One program header with `p_flags` 0 and `p_align` 0.
fn program_header(kind: u32, offset: u64, addr: u64, len: u64) -> Vec<u8> {
    let mut bytes = Vec::from(kind.to_le_bytes());
    bytes.extend(0u32.to_le_bytes()); // p_flags
    for field in [offset, addr, addr, len, len, 0] {
        bytes.extend(field.to_le_bytes()); // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
    }
    bytes
}

/// The notes as they lie in the file: sizes, type, name with NUL, content, each padded to 4.
///
/// # Errors
/// [`FormatError::Note`] for a name that holds a NUL; [`FormatError::NoRoomForNotes`].
pub fn note_bytes(notes: &[Note]) -> Result<Vec<u8>, FormatError> {
    let room = MEMORY_OFFSET - NOTES_OFFSET;
    let mut bytes = Vec::new();
    for (index, note) in notes.iter().enumerate() {
        if note.name.is_empty() || note.name.contains('\0') {
            return Err(FormatError::Note { index, why: "has no name, or a NUL in it" });
        }
        let too_long = || FormatError::Note { index, why: "is longer than 4 GiB" };
        let namesz = u32::try_from(note.name.len() + 1).map_err(|_| too_long())?;
        let descsz = u32::try_from(note.desc.len()).map_err(|_| too_long())?;
        for field in [namesz, descsz, note.kind] {
            bytes.extend(field.to_le_bytes());
        }
        bytes.extend(note.name.as_bytes());
        bytes.push(0);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(&note.desc);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    let len = count(&bytes);
    if len > room {
        return Err(FormatError::NoRoomForNotes { len, room });
    }
    Ok(bytes)
}

/// A note as it lies in a file. Its name is for its reader to judge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawNote<'a> {
    /// `n_namesz` bytes: the name, with the closing NUL if it has one.
    pub name: &'a [u8],
    /// `n_type`.
    pub kind: u32,
    /// `n_descsz` bytes: its content.
    pub desc: &'a [u8],
}

/// The note that `bytes` begin with, and what lies behind its padding; `None` when it is cut short.
pub fn first_note(bytes: &[u8]) -> Option<(RawNote<'_>, &[u8])> {
    let mut fields = Fields(bytes);
    let (namesz, descsz, kind) = (fields.u32()?, fields.u32()?, fields.u32()?);
    let (name, desc) = (fields.padded(namesz)?, fields.padded(descsz)?);
    Some((RawNote { name, kind, desc }, fields.0))
}

/// Takes notes apart. The padding between them is not looked at.
///
/// # Errors
/// [`FormatError::Note`] names the first that is cut short or has no proper name;
/// [`FormatError::Limit`] when they are more than [`MAX_NOTES`].
pub fn parse_notes(bytes: &[u8]) -> Result<Vec<Note>, FormatError> {
    let mut rest = bytes;
    let mut notes = Vec::new();
    while !rest.is_empty() {
        let index = notes.len();
        check_limit("notes", count(&notes).saturating_add(1), MAX_NOTES)?;
        let cut_short = FormatError::Note { index, why: "is cut short" };
        let (RawNote { name, kind, desc }, behind) = first_note(rest).ok_or(cut_short)?;
        rest = behind;
        let name = name
            .split_last()
            .filter(|(nul, name)| **nul == 0 && !name.is_empty() && !name.contains(&0))
            .and_then(|(_, name)| str::from_utf8(name).ok())
            .ok_or(FormatError::Note {
                index,
                why: "has no name in UTF-8 that ends with one NUL",
            })?;
        notes.push(Note { name: name.into(), kind, desc: desc.into() });
    }
    Ok(notes)
}

/// Reads the structure of an ELF64 core file of `file_len` bytes: ours or QEMU's own.
///
/// QEMU's dumps put section headers first, memory at any offset, and have the flaws that the
/// constants of this file name; their section headers are a piece, the sections' content is not.
/// PT_LOADs that follow each other in the guest and in the file become one segment. The length of
/// a dump that was cut off behind its notes is given as `i64::MAX`: only headers and notes are read.
///
/// # Errors
/// [`FormatError`] names the field, count or part of the file that is wrong. A PT_LOAD of which
/// the file keeps only a part (`p_filesz < p_memsz`) is refused.
pub fn decode(reader: &mut (impl Read + Seek), file_len: u64) -> Result<Decoded, FormatError> {
    let header = read_at(reader, "ELF header", 0, EHDR_LEN.into(), file_len)?;
    let ehdr = Ehdr::parse(&header.bytes).ok_or_else(|| cut_short(&header, file_len))?.checked()?;
    let mut pieces = vec![header];
    pieces.extend(section_headers(reader, &ehdr, file_len)?);
    let phnum = ehdr.segment_count(pieces.get(1))?;
    let len = phnum * u64::from(PHDR_LEN);
    let table = read_at(reader, "program headers", ehdr.phoff, len, file_len)?;

    let mut list = Vec::new();
    let mut notes = Vec::new();
    let mut notes_len = 0u64;
    let mut offset = table.offset;
    for bytes in table.bytes.chunks_exact(PHDR_LEN.into()) {
        let phdr = Phdr::parse(bytes, offset).ok_or_else(|| cut_short(&table, file_len))?;
        match phdr.kind {
            PT_NULL => {}
            PT_LOAD => list.push(phdr.segment(file_len)?),
            PT_NOTE if phdr.filesz == 0 => {}
            PT_NOTE => {
                notes_len = notes_len.saturating_add(phdr.filesz);
                check_limit("bytes of notes", notes_len, MAX_NOTES_LEN)?;
                let piece = read_at(reader, "notes", phdr.offset, phdr.filesz, file_len)?;
                notes.extend(parse_notes(&piece.bytes)?);
                pieces.push(piece);
            }
            other => {
                return Err(FormatError::Field {
                    what: "p_type",
                    offset,
                    found: other.into(),
                    expected: "PT_NOTE or PT_LOAD",
                });
            }
        }
        offset = offset.saturating_add(PHDR_LEN.into());
    }
    pieces.push(table);
    let layout = Layout::new(Segments::new(joined(list))?, pieces, file_len)?;
    Ok(Decoded { layout, notes, machine: Some(ehdr.machine) })
}

/// A header has fewer bytes than its fields need.
fn cut_short(piece: &Piece, file_len: u64) -> FormatError {
    let Piece { offset, what, .. } = *piece;
    FormatError::Truncated { what, offset, len: count(&piece.bytes), file_len }
}

/// The fields of an ELF header that matter here.
struct Ehdr {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    phoff: u64,
    shoff: u64,
    ehsize: u16,
    phentsize: u16,
    phnum: u16,
    shentsize: u16,
    shnum: u16,
}

impl Ehdr {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let mut fields = Fields(bytes);
        let (ident, kind, machine) = (fields.take()?, fields.u16()?, fields.u16()?);
        let (version, _entry) = (fields.u32()?, fields.u64()?);
        let (phoff, shoff, _flags) = (fields.u64()?, fields.u64()?, fields.u32()?);
        let (ehsize, phentsize, phnum) = (fields.u16()?, fields.u16()?, fields.u16()?);
        let (shentsize, shnum) = (fields.u16()?, fields.u16()?);
        Some(Self {
            ident,
            kind,
            machine,
            version,
            phoff,
            shoff,
            ehsize,
            phentsize,
            phnum,
            shentsize,
            shnum,
        })
    }

    /// The header, when it is that of a little-endian ELF64 core.
    fn checked(self) -> Result<Self, FormatError> {
        let [m0, m1, m2, m3, class, data, ident_version, ..] = self.ident;
        let magic = u32::from_le_bytes([m0, m1, m2, m3]);
        let sizes_fit = self.ehsize == EHDR_LEN || self.ehsize == QEMU_EHSIZE;
        let shentsize_fits = self.shnum == 0 || self.shentsize == SHDR_LEN;
        let rules: [(bool, &'static str, u64, &'static str); 9] = [
            (magic == u32::from_le_bytes(MAGIC), "ELF magic", magic.into(), "0x464c457f"),
            (class == ELFCLASS64, "ELF class", class.into(), "2 (64-bit)"),
            (data == ELFDATA2LSB, "ELF data encoding", data.into(), "1 (little-endian)"),
            (ident_version == EV_CURRENT, "EI_VERSION", ident_version.into(), "1"),
            (self.kind == ET_CORE, "e_type", self.kind.into(), "4 (core)"),
            (self.version == u32::from(EV_CURRENT), "e_version", self.version.into(), "1"),
            (sizes_fit, "e_ehsize", self.ehsize.into(), "64, or 8 as QEMU writes"),
            (self.phentsize == PHDR_LEN, "e_phentsize", self.phentsize.into(), "56"),
            (shentsize_fits, "e_shentsize", self.shentsize.into(), "64"),
        ];
        match rules.into_iter().find(|(fits, ..)| !fits) {
            Some((_, what, found, expected)) => {
                Err(FormatError::Field { what, offset: 0, found, expected })
            }
            None => Ok(self),
        }
    }

    /// How many program headers there are, by `e_phnum` or by the first section header.
    fn segment_count(&self, sections: Option<&Piece>) -> Result<u64, FormatError> {
        let count = if self.phnum == PN_XNUM {
            let info = sections.and_then(|s| s.bytes.get(44..48)?.try_into().ok());
            u64::from(info.map(u32::from_le_bytes).ok_or(FormatError::Field {
                what: "e_phnum",
                offset: 0,
                found: self.phnum.into(),
                expected: "a section header that holds the true count",
            })?)
        } else {
            u64::from(self.phnum)
        };
        check_limit("program headers", count, MAX_SEGMENTS)?;
        Ok(count)
    }
}

/// The section headers, when there are any.
fn section_headers(
    reader: &mut (impl Read + Seek),
    ehdr: &Ehdr,
    file_len: u64,
) -> Result<Option<Piece>, FormatError> {
    if ehdr.shnum == 0 {
        return Ok(None);
    }
    check_limit("section headers", ehdr.shnum.into(), MAX_SECTIONS.into())?;
    let len = u64::from(ehdr.shnum) * u64::from(SHDR_LEN);
    read_at(reader, "section headers", ehdr.shoff, len, file_len).map(Some)
}

/// The fields of a program header that matter here.
struct Phdr {
    /// Where the program header itself lies in the file.
    at: u64,
    kind: u32,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

impl Phdr {
    fn parse(bytes: &[u8], at: u64) -> Option<Self> {
        let mut fields = Fields(bytes);
        let (kind, _flags) = (fields.u32()?, fields.u32()?);
        let (offset, _vaddr, paddr) = (fields.u64()?, fields.u64()?, fields.u64()?);
        let (filesz, memsz) = (fields.u64()?, fields.u64()?);
        Some(Self { at, kind, offset, paddr, filesz, memsz })
    }

    /// The segment that a PT_LOAD names.
    fn segment(&self, file_len: u64) -> Result<Segment, FormatError> {
        let (offset, len) = (self.offset, self.filesz);
        if len != self.memsz {
            return Err(FormatError::Field {
                what: "p_filesz",
                offset: self.at,
                found: len,
                expected: "the same as p_memsz",
            });
        }
        if offset.checked_add(len).is_none_or(|end| end > file_len) {
            return Err(FormatError::Truncated { what: "memory", offset, len, file_len });
        }
        let range = GuestRange::new(self.paddr, len).ok_or(FormatError::Range {
            offset: self.at,
            gpa: self.paddr,
            len,
        })?;
        Ok(Segment { range, offset })
    }
}
