//! What stands before the notes: ELF header, section headers, program headers.

use super::{DumpError, Machine, input::Input, malformed, unsupported};
use evidence::format::MAX_SEGMENTS;
use evidence::{GuestRange, Segment, Segments};
use std::io::Read;

const ELFCLASS32: u8 = 1;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const ELFDATA2MSB: u8 = 2;
const EV_CURRENT: u8 = 1;
const ET_CORE: u16 = 4;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const EM_AARCH64: u16 = 183;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const SHT_STRTAB: u32 = 3;
/// `e_phnum` of a file whose true count is in the first section header's `sh_info`.
const PN_XNUM: u16 = 0xffff;
/// `e_ehsize` as QEMU 7.2 to 10.2 write it: the size of a pointer (`prepare_elf64_header`).
const POINTER: u16 = 8;

/// The sections of a dump: one that is empty, and the one with the sections' names.
const SECTIONS: u16 = 2;

/// The content of the latter, which is the only one that stands behind memory.
pub(super) const NAMES: [u8; 11] = *b"\0.shstrtab\0";

/// Sizes of the three kinds of header.
struct Sizes {
    file: u16,
    segment: u16,
    section: u16,
}

const SIZES_32: Sizes = Sizes { file: 52, segment: 32, section: 40 };
const SIZES_64: Sizes = Sizes { file: 64, segment: 56, section: 64 };

/// Where everything is, by the headers.
pub(super) struct Headers {
    pub(super) machine: Machine,
    pub(super) wide: bool,
    /// In the stream's order, which is that of addresses; there is one at least.
    pub(super) segments: Segments,
    /// Bytes of the notes, which follow the headers.
    pub(super) notes_len: u64,
    /// Whether [`NAMES`] follow memory.
    pub(super) names: bool,
}

/// Reads up to the first note.
pub(super) fn read(input: &mut Input<impl Read>) -> Result<Headers, DumpError> {
    let file = FileHeader::read(input)?;
    let (count, names_at) = file.sections(input)?;
    let table_at = input.at();
    let (notes_len, list) = file.segments(input, count)?;
    let segments = Segments::new(list)
        .map_err(|source| DumpError::Layout { at: table_at, source: Box::new(source) })?;
    if let Some((at, offset)) = names_at
        && offset != segments.end()
    {
        let wanted = "the names of the sections at memory's end";
        return Err(malformed(at, wanted, &format!("{offset:#x}")));
    }
    let (machine, wide) = (file.machine, file.wide);
    Ok(Headers { machine, wide, segments, notes_len, names: names_at.is_some() })
}

struct FileHeader {
    machine: Machine,
    wide: bool,
    sizes: Sizes,
    /// Where `e_phnum` stands, and what it says.
    phnum: (u64, u16),
    /// Whether there are section headers.
    sections: bool,
}

impl FileHeader {
    fn read(input: &mut Input<impl Read>) -> Result<Self, DumpError> {
        const WANTED: &str = "the ELF header";
        input.expect(evidence::format::elf::MAGIC, "the magic of an ELF file")?;
        let at = input.at();
        let [class, data] = input.array(WANTED)?;
        let (wide, sizes) = match class {
            ELFCLASS32 => (false, SIZES_32),
            ELFCLASS64 => (true, SIZES_64),
            other => return Err(malformed(at, "class 1 or 2", &other.to_string())),
        };
        match data {
            ELFDATA2LSB => {}
            ELFDATA2MSB => return Err(unsupported(at, "the dump of a big-endian guest")),
            other => return Err(malformed(at, "a data encoding of 1", &other.to_string())),
        }
        input.expect([EV_CURRENT, 0, 0, 0, 0, 0, 0, 0, 0, 0], "version 1, no ABI")?;
        input.expect(ET_CORE.to_le_bytes(), "type 4, a core")?;
        let machine = machine(input, wide)?;
        input.expect([EV_CURRENT, 0, 0, 0], "version 1")?;
        let at = input.at();
        let entry = input.word(wide, WANTED)?;
        let (phoff, shoff) = (input.word(wide, WANTED)?, input.word(wide, WANTED)?);
        let (flags, at_size) = (input.u32(WANTED)?, input.at());
        if (entry, flags) != (0, 0) {
            return Err(malformed(at, "no entry point, no flags", &format!("{entry:#x}, {flags}")));
        }
        let ehsize = input.u16(WANTED)?;
        if ehsize != sizes.file && ehsize != POINTER {
            return Err(malformed(at_size, "the ELF header's size, or 8", &ehsize.to_string()));
        }
        input.expect(sizes.segment.to_le_bytes(), "the size of a program header")?;
        let phnum = (input.at(), input.u16(WANTED)?);
        let at_sections = input.at();
        let (shentsize, shnum) = (input.u16(WANTED)?, input.u16(WANTED)?);
        let shstrndx = input.u16(WANTED)?;
        let sections = shnum != 0;
        if sections && (shentsize, shnum, shstrndx) != (sizes.section, SECTIONS, SECTIONS - 1) {
            let what = format!("{shnum} section headers of {shentsize} bytes");
            return Err(unsupported(at_sections, &what));
        }
        // Sections come first since 7.2. Before, the only one stood behind the program headers, and
        // only when those were 65,535 or more.
        let first = u64::from(sizes.file);
        let behind = first + u64::from(SECTIONS) * u64::from(sizes.section);
        let wanted = if sections { (behind, first) } else { (first, 0) };
        if (phoff, shoff) != wanted {
            let what = format!("program headers at {phoff:#x}, section headers at {shoff:#x},");
            return Err(unsupported(at, &what));
        }
        Ok(Self { machine, wide, sizes, phnum, sections })
    }

    /// Reads the section headers; returns the number of program headers, and of the sections' names
    /// where that stands and where they should.
    fn sections(
        &self,
        input: &mut Input<impl Read>,
    ) -> Result<(u64, Option<(u64, u64)>), DumpError> {
        let (at, phnum) = self.phnum;
        if !self.sections {
            if phnum == PN_XNUM {
                return Err(unsupported(at, "the number of program headers in no section"));
            }
            return Ok((phnum.into(), None));
        }
        let at_first = input.at();
        let first = Section::read(input, self.wide)?;
        let count = match phnum {
            PN_XNUM if first.info >= PN_XNUM.into() => first.info,
            _ => phnum.into(),
        };
        // But for the count, it is empty.
        let info = if phnum == PN_XNUM { count } else { 0 };
        if first != (Section { info, ..Section::default() }) {
            return Err(malformed(at_first, "an empty section", &format!("{first:x?}")));
        }
        let at_names = input.at();
        let names = Section::read(input, self.wide)?;
        let (name, size) = (1, NAMES.len() as u64);
        let wanted =
            Section { name, kind: SHT_STRTAB, offset: names.offset, size, ..Section::default() };
        if names != wanted {
            let found = format!("{names:x?}");
            return Err(malformed(at_names, "the section of the sections' names", &found));
        }
        Ok((count.into(), Some((at_names, names.offset))))
    }

    /// Reads the program headers; returns the bytes of notes, and memory.
    fn segments(
        &self,
        input: &mut Input<impl Read>,
        count: u64,
    ) -> Result<(u64, Vec<Segment>), DumpError> {
        let (at, _) = self.phnum;
        let loads = count.checked_sub(1).filter(|&loads| loads > 0);
        let loads = loads.ok_or_else(|| {
            malformed(at, "program headers for notes and memory", &count.to_string())
        })?;
        if loads > MAX_SEGMENTS {
            return Err(DumpError::Limit { at, limit: MAX_SEGMENTS, what: "ranges of memory" });
        }
        let notes_at = input.at() + count * u64::from(self.sizes.segment);
        let at = input.at();
        let notes = Program::read(input, self.wide)?;
        let len = notes.filesz;
        let own = Program { kind: PT_NOTE, offset: notes_at, filesz: len, memsz: len, ..notes };
        if notes != own || (notes.vaddr, notes.paddr) != (0, 0) {
            return Err(malformed(at, "PT_NOTE behind the headers", &format!("{notes:x?}")));
        }
        let mut list = Vec::new();
        let mut offset = notes_at.checked_add(len);
        for _ in 0..loads {
            let at = input.at();
            let load = Program::read(input, self.wide)?;
            let segment = load.segment(at, offset)?;
            // Not reserved on the word of a number: the headers have to be there.
            list.push(segment);
            offset = segment.offset.checked_add(segment.range.len());
        }
        Ok((len, list))
    }
}

fn machine(input: &mut Input<impl Read>, wide: bool) -> Result<Machine, DumpError> {
    let at = input.at();
    match (input.u16("the machine")?, wide) {
        (EM_386, _) => Ok(Machine::I386),
        (EM_X86_64, true) => Ok(Machine::X86_64),
        (EM_AARCH64, true) => Ok(Machine::Aarch64),
        (other, _) => Err(unsupported(at, &format!("the dump of a machine of number {other}"))),
    }
}

/// The fields of a section header.
#[derive(Debug, Default, PartialEq, Eq)]
struct Section {
    name: u32,
    kind: u32,
    flags: u64,
    addr: u64,
    offset: u64,
    size: u64,
    link: u32,
    info: u32,
    align: u64,
    entry_size: u64,
}

impl Section {
    fn read(input: &mut Input<impl Read>, wide: bool) -> Result<Self, DumpError> {
        const WANTED: &str = "a section header";
        Ok(Self {
            name: input.u32(WANTED)?,
            kind: input.u32(WANTED)?,
            flags: input.word(wide, WANTED)?,
            addr: input.word(wide, WANTED)?,
            offset: input.word(wide, WANTED)?,
            size: input.word(wide, WANTED)?,
            link: input.u32(WANTED)?,
            info: input.u32(WANTED)?,
            align: input.word(wide, WANTED)?,
            entry_size: input.word(wide, WANTED)?,
        })
    }
}

/// The fields of a program header that matter.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

impl Program {
    fn read(input: &mut Input<impl Read>, wide: bool) -> Result<Self, DumpError> {
        const WANTED: &str = "a program header";
        let kind = input.u32(WANTED)?;
        // p_flags stands here in an ELF64, and before p_align in an ELF32. QEMU leaves both 0.
        if wide {
            input.u32(WANTED)?;
        }
        let mut word = || input.word(wide, WANTED);
        let (offset, vaddr, paddr, filesz, memsz) = (word()?, word()?, word()?, word()?, word()?);
        word()?;
        if !wide {
            input.u32(WANTED)?;
        }
        Ok(Self { kind, offset, vaddr, paddr, filesz, memsz })
    }

    /// The memory that a PT_LOAD at `at` names, which lies at `offset`.
    fn segment(&self, at: u64, offset: Option<u64>) -> Result<Segment, DumpError> {
        if self.kind != PT_LOAD {
            return Err(malformed(at, "PT_LOAD", &format!("{self:x?}")));
        }
        if self.vaddr != self.paddr {
            return Err(unsupported(at, "memory by virtual addresses (paging=true)"));
        }
        let (gpa, kept, len) = (self.paddr, self.filesz, self.memsz);
        if kept != len {
            return Err(DumpError::Clipped { at, gpa, kept, len });
        }
        let range = GuestRange::new(gpa, len)
            .ok_or_else(|| malformed(at, "a range of addresses", &format!("{self:x?}")))?;
        if Some(self.offset) != offset {
            let wanted = "memory behind the notes, or behind the range before";
            return Err(malformed(at, wanted, &format!("{self:x?}")));
        }
        Ok(Segment { range, offset: self.offset })
    }
}
