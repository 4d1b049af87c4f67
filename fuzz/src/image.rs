//! Image formats and maps: what a decoder finds lies in the file, and what an encoder laid out is
//! found again.

use crate::take;
use evidence::format::elf::{Arch, Note, note_bytes, parse_notes};
use evidence::format::{
    self, Decoded, Format, Layout, Piece, elf as elf_format, lime as lime_format,
};
use evidence::map::MAX_REGIONS;
use evidence::{GuestRange, Kind, MemoryMap, Region, block};
use std::io::{self, Cursor, Read, Seek, SeekFrom};

/// An ELF file, whole and cut off behind its notes.
pub fn elf(data: &[u8]) {
    if let Ok(decoded) = elf_format::decode(&mut Cursor::new(data), data.len() as u64) {
        check_layout(&decoded.layout);
        check_pieces(&decoded.layout, data);
        check_notes(&decoded.notes);
    }
    // The length of a file that was cut off is given as the greatest.
    if let Ok(Decoded { layout, .. }) = elf_format::decode(&mut Cursor::new(data), i64::MAX as u64)
    {
        check_layout(&layout);
        check_pieces(&layout, data);
    }
}

/// A LiME file.
pub fn lime(data: &[u8]) {
    if let Ok(decoded) = lime_format::decode(&mut Cursor::new(data), data.len() as u64) {
        check_layout(&decoded.layout);
        check_pieces(&decoded.layout, data);
        assert!(decoded.layout.gaps().is_empty(), "a LiME file has no gaps");
    }
}

/// Notes alone.
pub fn notes(data: &[u8]) {
    if let Ok(notes) = parse_notes(data) {
        assert!(notes.len() <= data.len() / 12, "a note has a header of 12 bytes");
        check_notes(&notes);
    }
}

/// A map made of the input, and the image of it in each format.
pub fn map(data: &[u8]) {
    let mut rest = data;
    let [arch, kind, desc_len] = take(&mut rest);
    let desc = rest.get(..desc_len.into()).unwrap_or_default().to_vec();
    let notes = [Note { name: "N".repeat(usize::from(kind % 5) + 1), kind: kind.into(), desc }];
    let arch = if arch % 2 == 0 { Arch::X86_64 } else { Arch::Aarch64 };
    let map = map_of(rest);
    for format in Format::ALL {
        let Ok(layout) = format::encode(format, arch, &map, &notes) else { continue };
        check_layout(&layout);
        let decode =
            |len| format::decode(format, &map, &mut Sparse { layout: &layout, at: 0 }, len);
        let decoded = decode(layout.len).expect("what was encoded is decoded");
        assert_eq!(decoded.layout, layout);
        if format == Format::Elf {
            assert_eq!(decoded.notes, notes);
            assert_eq!(decoded.machine, Some(arch.machine()));
        }
        assert!(decode(layout.len - 1).is_err(), "a byte is missing");
        for (_, range) in map.imaged() {
            assert!(layout.segments.offset_of(range).is_some(), "{range} is in the image");
        }
    }
    check_blocks(&map);
}

/// Ascending regions: of each the gap before it, its length, and a byte for kind and magnitude.
fn map_of(mut data: &[u8]) -> MemoryMap {
    let kinds = [Kind::Ram, Kind::Rom, Kind::Romd, Kind::DeviceRam, Kind::Nvdimm, Kind::RamDevice];
    let (mut regions, mut at) = (Vec::new(), 0u64);
    while !data.is_empty() && regions.len() < MAX_REGIONS {
        let [what, gap_shift, len_shift] = take(&mut data);
        let gap = u64::from(u16::from_le_bytes(take(&mut data))) << (gap_shift % 48);
        let len = u64::from(u16::from_le_bytes(take(&mut data))) << (len_shift % 48);
        let range = at.checked_add(gap).and_then(|gpa| GuestRange::new(gpa, len));
        let Some(range) = range else { continue };
        at = range.end();
        regions.push(Region {
            gpa: range.start(),
            len,
            kind: kinds[usize::from(what) % kinds.len()],
            name: "r".into(),
            owner: None,
            block: None,
            block_offset: 0,
            mapping: None,
            page_size: None,
            readonly: false,
        });
    }
    MemoryMap::new(regions).expect("ascending regions are a map")
}

/// Blocks tile the imaged memory.
fn check_blocks(map: &MemoryMap) {
    // A list of 2^26 blocks is allowed and takes more memory than a fuzzer has.
    if map.imaged_len() > 1 << 33 || map.regions().len() > 4096 {
        return;
    }
    let blocks = block::cut(map).expect("8 GiB are not too much");
    assert_eq!(blocks.iter().map(|block| block.len()).sum::<u64>(), map.imaged_len());
    for pair in blocks.windows(2) {
        assert!(pair[0].end() <= pair[1].start());
    }
}

/// Memory, headers and gaps are apart and make up the whole file.
fn check_layout(layout: &Layout) {
    let segments = layout.segments.list().iter().map(|segment| segment.offset..segment.end());
    let pieces = layout.pieces.iter().map(|p| p.offset..p.offset + p.bytes.len() as u64);
    let mut parts: Vec<_> = segments.chain(pieces).chain(layout.gaps()).collect();
    parts.retain(|part| !part.is_empty());
    parts.sort_by_key(|part| part.start);
    let mut at = 0;
    for part in parts {
        assert_eq!(part.start, at, "parts follow each other");
        at = part.end;
    }
    assert_eq!(at, layout.len, "parts end where the file does");
}

/// The headers that a decoder shows are those of the file.
fn check_pieces(layout: &Layout, data: &[u8]) {
    for Piece { offset, bytes, what } in &layout.pieces {
        let start = usize::try_from(*offset).expect("a header lies in the file");
        assert_eq!(data.get(start..start + bytes.len()), Some(bytes.as_slice()), "{what}");
    }
}

/// Notes can be written and read again, when they are not too many for our own files.
fn check_notes(notes: &[Note]) {
    if let Ok(bytes) = note_bytes(notes) {
        assert_eq!(parse_notes(&bytes).expect("what was written is read"), notes);
    }
}

/// An image without its memory: headers where they belong, zeros elsewhere.
struct Sparse<'a> {
    layout: &'a Layout,
    at: u64,
}

impl Read for Sparse<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        buf.fill(0);
        let pieces = &self.layout.pieces;
        let first = pieces.partition_point(|p| p.offset + (p.bytes.len() as u64) <= self.at);
        for piece in &pieces[first..] {
            let Some(skip) = piece.offset.checked_sub(self.at) else {
                let inside = usize::try_from(self.at - piece.offset).map_err(io::Error::other)?;
                let rest = &piece.bytes[inside..];
                buf.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
                continue;
            };
            let place = usize::try_from(skip).ok().and_then(|skip| buf.get_mut(skip..));
            let Some(place) = place else { break };
            place.iter_mut().zip(&piece.bytes).for_each(|(to, from)| *to = *from);
        }
        let left = usize::try_from(self.layout.len.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let len = buf.len().min(left);
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Sparse<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let SeekFrom::Start(at) = to else { return Err(io::ErrorKind::Unsupported.into()) };
        self.at = at;
        Ok(at)
    }
}

/// Three regions, one of them odd.
const REGIONS: [u8; 21] = [0, 0, 12, 0, 0, 3, 0, 1, 4, 0, 1, 0, 5, 1, 3, 0, 0, 0, 16, 2, 0];

/// A map with a note, and one of many regions.
pub fn map_seeds() -> Vec<Vec<u8>> {
    vec![
        [&[0, 2, 7], REGIONS.as_slice()].concat(),
        [&[1, 0, 0], REGIONS.repeat(60).as_slice()].concat(),
        [&[1, 0, 0], [0, 0, 30, 0, 0, 3, 0].as_slice()].concat(),
    ]
}

/// The map of [`REGIONS`] in `format`, moved together: a file of ours, but small.
fn small_image(format: Format) -> Vec<u8> {
    let map = map_of(&REGIONS);
    let layout = format::encode(format, Arch::X86_64, &map, &[]).expect("three regions fit");
    let len = usize::try_from(layout.len).expect("a small file").min(1 << 16);
    let mut bytes = vec![0; len];
    Sparse { layout: &layout, at: 0 }.read_exact(&mut bytes).expect("its own bytes");
    bytes
}

fn some_notes() -> Vec<u8> {
    let note = |name: &str, kind, desc: &[u8]| Note { name: name.into(), kind, desc: desc.into() };
    let notes =
        [note("CORE", 1, &[7; 40]), note("VMCOREINFO", 0, b"OSRELEASE=6.1\n"), note("Q", 9, &[])];
    note_bytes(&notes).expect("short notes")
}

/// Notes.
pub fn notes_seeds() -> Vec<Vec<u8>> {
    vec![some_notes()]
}

/// A LiME file.
pub fn lime_seeds() -> Vec<Vec<u8>> {
    vec![small_image(Format::Lime)]
}

/// An ELF file as QEMU writes it: section headers first, notes, then memory, all close together;
/// and the front of one of ours.
pub fn elf_seeds() -> Vec<Vec<u8>> {
    let notes = some_notes();
    let notes_at = 64 + 64 + 2 * 56;
    let memory_at = notes_at + notes.len() as u64;
    let mut file = small_image(Format::Elf);
    file.truncate(64);
    file[32..40].copy_from_slice(&128u64.to_le_bytes()); // e_phoff
    file[40..48].copy_from_slice(&64u64.to_le_bytes()); // e_shoff
    file[52] = 8; // e_ehsize
    file[56..58].copy_from_slice(&[0xff, 0xff]); // e_phnum
    file[58] = 64; // e_shentsize
    file[60] = 1; // e_shnum
    let mut section = [0; 64];
    section[44] = 2; // sh_info
    file.extend(section);
    let parts = [(4u64, notes_at, 0, notes.len() as u64), (1, memory_at, 0x1000, 0x20)];
    for (kind, offset, addr, len) in parts {
        for field in [kind, offset, addr, addr, len, len, 0] {
            file.extend(field.to_le_bytes());
        }
    }
    file.extend(notes);
    file.extend([7; 0x20]);
    let mut plain = file.clone();
    plain[56..58].copy_from_slice(&[2, 0]);
    plain[60] = 0;
    vec![file, plain, small_image(Format::Elf)[..512].to_vec()]
}
