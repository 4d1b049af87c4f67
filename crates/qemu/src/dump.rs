//! The ELF core that `dump-guest-memory` writes into a pipe (`paging` false, no compression): what
//! QEMU holds for the guest's memory, the registers of its CPUs, then the memory.
//!
//! The stream is hostile input, as [`crate::stream`] is: nothing is allocated on the word of a
//! length, and what is not understood is an error that says at which byte and what should have
//! stood there. The format is that of `dump/dump.c` (7.2 and 10.0), and no other ELF:
//!
//! ```text
//! ELF header             ELF64 for x86-64 and aarch64; e_ehsize is 8
//! 2 section headers      an empty one, with the number of program headers if it is 65,535 or
//!                        more; the one of the sections' names. (Before 7.2: none)
//! program headers        PT_NOTE, then a PT_LOAD for each range of memory, ascending
//! notes                  x86: NT_PRSTATUS of each CPU, then "QEMU" of each
//!                        aarch64: NT_PRSTATUS, NT_PRFPREG, maybe NT_ARM_SVE, CPU by CPU
//!                        then the guest's own note, if it has a vmcoreinfo device
//! memory                 range after range, nothing between, aligned to nothing
//! "\0.shstrtab\0"        the sections' names: the end
//! ```
//!
//! **What machine it is.** x86 is `EM_X86_64` only if the first CPU is in long mode, else `EM_386`:
//! in an ELF32 when all memory ends below 4 GiB - 1, which no PC's does (the firmware is there).
//!
//! **What the guest can forge.** Its own note is copied as it is, so it may have any name, those of
//! QEMU's notes too. Notes are told apart by their order, so it is taken for what it is; but on
//! aarch64, where it could pass for the SVE registers of the last CPU, which are not taken apart here.
//!
//! **Without memory.** [`head`] alone is the header-only dump: who drops the [`Memory`] that it
//! returns closes the pipe, and QEMU's next write fails. What QEMU does then: `docs/dump.md`.

mod header;
mod input;
mod registers;
#[cfg(test)]
mod tests;

pub use registers::{Aarch64, Registers, SegmentRegister, X86};

use crate::text::Excerpt;
use evidence::layout::LayoutError;
use evidence::{GuestRange, PAGE, Segments};
use input::Input;
use std::io::{self, Read};

/// The guest's instruction set, by `e_machine`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Machine {
    /// x86 whose first CPU is not in long mode; others may be.
    I386,
    /// x86-64 whose first CPU is in long mode; others need not be.
    X86_64,
    /// 64-bit ARM, little-endian.
    Aarch64,
}

/// One CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// QEMU's `cpu_index`, as in `query-cpus-fast`.
    pub index: u32,
    /// Its registers when the guest was stopped.
    pub registers: Registers,
}

/// The note that the guest left with its vmcoreinfo device. All of it is what the guest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestNote {
    /// `n_namesz` bytes: `VMCOREINFO` and a NUL, if it is what it should be.
    pub name: Vec<u8>,
    /// `n_type`.
    pub kind: u32,
    /// Its content; QEMU takes 1 MiB at most.
    pub desc: Vec<u8>,
}

impl GuestNote {
    /// The content, if the note calls itself VMCOREINFO: `KEY=value` lines of Linux.
    pub fn vmcoreinfo(&self) -> Option<&[u8]> {
        (self.name == b"VMCOREINFO\0" && self.kind == 0).then_some(&self.desc)
    }
}

/// What stands before memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The guest's instruction set.
    pub machine: Machine,
    /// ELF64, not ELF32.
    pub is_elf64: bool,
    /// Memory, in the stream's order. Ranges that touch are others in QEMU's eyes (another
    /// MemoryRegion, or another place in the host's memory).
    pub segments: Segments,
    /// The CPUs, in QEMU's order: those that were plugged in stand behind the others, whatever their
    /// index.
    pub cpus: Vec<Vcpu>,
    /// The guest's own note.
    pub guest_note: Option<GuestNote>,
    /// Bytes of the whole stream, if it is not cut off.
    pub len: u64,
    /// The stream up to memory, byte for byte.
    pub bytes: Vec<u8>,
    notes_at: usize,
}

impl Head {
    /// The notes, byte for byte.
    pub fn notes(&self) -> &[u8] {
        self.bytes.get(self.notes_at..).unwrap_or_default()
    }

    /// Bytes of memory: `total` of `query-dump`.
    pub fn memory_len(&self) -> u64 {
        // Disjoint ranges of one file.
        self.segments.list().iter().map(|segment| segment.range.len()).sum()
    }
}

/// Why a dump is not taken. `at` is counted in bytes from the stream's start.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The pipe failed, or its deadline passed.
    #[error("dump: reading failed at byte {at:#x}")]
    Read {
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The stream ends before memory, or behind it.
    #[error("dump: cut off at byte {at:#x}, before {wanted}")]
    Cut {
        /// Its length.
        at: u64,
        /// What should have come.
        wanted: &'static str,
    },
    /// The stream ends within memory: QEMU gave up, or ended.
    #[error("dump: cut off at byte {at:#x}, in the memory {range}, before {gpa:#x}")]
    MemoryCut {
        /// Its length.
        at: u64,
        /// The range that was not finished.
        range: GuestRange,
        /// The first address that was not given to anybody: that of the missing byte, or of the part
        /// of a page before it.
        gpa: u64,
    },
    /// The stream does not end where it should.
    #[error("dump: more bytes at byte {at:#x}, where it should end")]
    Trailing {
        /// Where.
        at: u64,
    },
    /// Not what QEMU writes at this place.
    #[error("dump: byte {at:#x}: {wanted} was expected, not {found}")]
    Malformed {
        /// Where.
        at: u64,
        /// What should have stood there.
        wanted: &'static str,
        /// What does.
        found: Excerpt,
    },
    /// A range of which the stream keeps a part (`p_filesz`, `p_memsz`). QEMU writes it with `paging`
    /// only: with `begin` and `length` the range itself is shorter.
    #[error("dump: byte {at:#x}: {kept:#x} of {len:#x} bytes at {gpa:#x} are kept")]
    Clipped {
        /// Where its program header stands.
        at: u64,
        /// Its first address.
        gpa: u64,
        /// Bytes that are kept.
        kept: u64,
        /// Bytes that it has.
        len: u64,
    },
    /// The ranges of memory are not ascending, or overlap.
    #[error("dump: the program headers at byte {at:#x} make no layout")]
    Layout {
        /// Where they begin.
        at: u64,
        /// Why.
        #[source]
        source: Box<LayoutError>,
    },
    /// QEMU writes it, but only in modes or for guests that this reader does not know or want.
    #[error("dump: byte {at:#x}: {what} is not supported")]
    Unsupported {
        /// Where.
        at: u64,
        /// What it is.
        what: Excerpt,
    },
    /// More than this reader takes.
    #[error("dump: byte {at:#x}: more than {limit} {what}")]
    Limit {
        /// Where.
        at: u64,
        /// The greatest number.
        limit: u64,
        /// Of what.
        what: &'static str,
    },
    /// Who was given the memory did not take it.
    #[error("dump: what stands at byte {at:#x} was not taken")]
    Refused {
        /// Where.
        at: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn unsupported(at: u64, what: &str) -> DumpError {
    DumpError::Unsupported { at, what: Excerpt::new(what) }
}

fn malformed(at: u64, wanted: &'static str, found: &str) -> DumpError {
    DumpError::Malformed { at, wanted, found: Excerpt::new(found) }
}

/// Reads a dump up to its memory, which the second part of the answer reads.
///
/// At most `limit` bytes are kept: 56 for each range of memory, 816 (aarch64: 960, and SVE) for each
/// CPU, 1 MiB for the guest's note. Beside them there are a buffer of 256 KiB, which may hold memory
/// already, and the lists in [`Head`]. Deadlines are those of `from`: a read that would block is an
/// error.
///
/// # Errors
/// [`DumpError`] at the first thing that is not as it should be.
pub fn head<R: Read>(from: R, limit: usize) -> Result<(Head, Memory<R>), DumpError> {
    let mut input = Input::new(from, limit);
    let headers = header::read(&mut input)?;
    let notes_at = input.at();
    input.check_room(headers.notes_len)?;
    input.keep_all(headers.notes_len, "the notes")?;
    let bytes = input.take_kept();
    let split = usize::try_from(notes_at).unwrap_or(usize::MAX);
    let notes = bytes.get(split..).unwrap_or_default();
    let (cpus, guest_note) = registers::parse(headers.machine, notes, notes_at)?;
    let names_len = if headers.names { header::NAMES.len() as u64 } else { 0 };
    let head = Head {
        machine: headers.machine,
        is_elf64: headers.wide,
        segments: headers.segments.clone(),
        cpus,
        guest_note,
        // A segment's end is a file's offset: this does not wrap.
        len: headers.segments.end() + names_len,
        bytes,
        notes_at: split,
    };
    Ok((head, Memory { input, segments: headers.segments, names: headers.names }))
}

/// A dump that was read up to its memory. Dropping it closes the pipe.
pub struct Memory<R> {
    input: Input<R>,
    segments: Segments,
    names: bool,
}

impl<R> std::fmt::Debug for Memory<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("segments", &self.segments).finish_non_exhaustive()
    }
}

impl<R: Read> Memory<R> {
    /// Reads the dump to its end and gives its memory to `take`, address and bytes, in the order of
    /// [`Head::segments`]. What is given at once lies in one segment, is 256 KiB at most, and ends at a
    /// multiple of [`PAGE`] or with its segment: no page comes in two parts.
    ///
    /// # Errors
    /// [`DumpError`]; what `take` was given until then is right as far as it goes.
    /// [`DumpError::Refused`] when `take` fails.
    pub fn read(
        mut self,
        mut take: impl FnMut(u64, &[u8]) -> io::Result<()>,
    ) -> Result<(), DumpError> {
        for segment in self.segments.list() {
            let (range, mut gpa) = (segment.range, segment.range.start());
            while gpa < range.end() {
                let given = whole_pages(gpa, range.end(), self.input.unread());
                if given.is_empty() {
                    if !self.input.more()? {
                        return Err(DumpError::MemoryCut { at: self.input.end(), range, gpa });
                    }
                    continue;
                }
                let at = self.input.at();
                take(gpa, given).map_err(|source| DumpError::Refused { at, source })?;
                let len = given.len();
                gpa += len as u64;
                self.input.skip(len);
            }
        }
        if self.names {
            self.input.expect(header::NAMES, "the sections' names")?;
        }
        match self.input.unread().is_empty() && !self.input.more()? {
            true => Ok(()),
            false => Err(DumpError::Trailing { at: self.input.at() }),
        }
    }
}

/// As many of the `unread` bytes, which lie at `gpa`, as belong to memory before `end` and end with a
/// page or there.
fn whole_pages(gpa: u64, end: u64, unread: &[u8]) -> &[u8] {
    let left = end - gpa;
    let have = unread.len() as u64;
    let len = match have >= left {
        true => left,
        // A part of the first page only: nothing yet.
        false => have.saturating_sub((gpa + have) % PAGE),
    };
    // It is at most `have`.
    usize::try_from(len).ok().and_then(|len| unread.get(..len)).unwrap_or_default()
}
