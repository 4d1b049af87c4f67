//! One suite for all formats, golden headers, and hostile files.

use super::*;
use crate::map::tests::ram;
use crate::{Kind, Region};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::Cursor;

const TIB: u64 = 1 << 40;

/// A sparse file in memory: only what was written takes space.
#[derive(Default)]
struct Sparse {
    chunks: BTreeMap<u64, Vec<u8>>,
    len: u64,
    pos: u64,
}

impl Sparse {
    /// Writes without overlapping what was written before.
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset + count(bytes) <= self.len, "write behind the end");
        self.chunks.insert(offset, bytes.to_vec());
    }

    fn byte(&self, offset: u64) -> u8 {
        self.chunks
            .range(..=offset)
            .next_back()
            .and_then(|(at, bytes)| bytes.get(usize::try_from(offset - at).ok()?))
            .copied()
            .unwrap_or(0)
    }
}

impl Read for Sparse {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = buf.len().min(usize::try_from(self.len.saturating_sub(self.pos)).unwrap());
        for byte in &mut buf[..len] {
            *byte = self.byte(self.pos);
            self.pos += 1;
        }
        Ok(len)
    }
}

impl Seek for Sparse {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        match to {
            SeekFrom::Start(offset) => self.pos = offset,
            _ => unreachable!("decoders seek from the start"),
        }
        Ok(self.pos)
    }
}

/// The byte that the tests' guest holds at `gpa`: never 0, so a hole is no match by chance.
fn guest_byte(gpa: u64) -> u8 {
    (gpa.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8 | 1
}

/// Addresses in and around both ends of `range`.
fn edges(range: GuestRange) -> Vec<GuestRange> {
    let ends = [range.start(), range.start() + 1, range.start() | 0xfff, range.end() & !0xfff];
    let ends = ends.into_iter().chain([range.end() & !0xfff | 1, range.last() ^ 1, range.last()]);
    ends.filter(|&gpa| range.contains(gpa)).filter_map(|gpa| GuestRange::new(gpa, 1)).collect()
}

/// Writes the image of `map`: headers, notes, and the guest's bytes at every region's edges.
fn write(map: &MemoryMap, layout: &Layout) -> Sparse {
    let mut file = Sparse { len: layout.len, ..Sparse::default() };
    for piece in &layout.pieces {
        file.put(piece.offset, &piece.bytes);
    }
    for gpa in map.imaged().flat_map(|(_, range)| edges(range)) {
        file.put(layout.segments.offset_of(gpa).unwrap(), &[guest_byte(gpa.start())]);
    }
    file
}

/// Segments, pieces and gaps tile the file: every byte is accounted for exactly once.
fn assert_tiles(layout: &Layout) {
    let segments = layout.segments.list().iter().map(|s| s.offset..s.end());
    let pieces = layout.pieces.iter().map(|p| p.offset..p.offset + count(&p.bytes));
    let mut all: Vec<Range<u64>> = segments.chain(pieces).chain(layout.gaps()).collect();
    all.sort_by_key(|part| part.start);
    let mut at = 0;
    for part in all {
        assert_eq!(part.start, at, "{layout:x?}");
        assert!(part.end > part.start, "{layout:x?}");
        at = part.end;
    }
    assert_eq!(at, layout.len);
}

/// The suite: what one map and one format must satisfy.
fn suite(format: Format, map: &MemoryMap, notes: &[Note]) {
    let layout = match encode(format, Arch::X86_64, map, notes) {
        Err(FormatError::NoMemory) if map.imaged_len() == 0 => return,
        layout => layout.unwrap(),
    };
    assert_eq!(layout.segments.list().iter().map(|s| s.range.len()).sum::<u64>(), map.imaged_len());
    assert_tiles(&layout);

    let mut file = write(map, &layout);
    let decoded = decode(format, map, &mut file, layout.len).unwrap();
    assert_eq!(decoded.layout, layout, "what is read is what was written");
    assert_eq!(decoded.notes, if format == Format::Elf { notes } else { &[] });
    for gpa in map.imaged().flat_map(|(_, range)| edges(range)) {
        let offset = decoded.layout.segments.offset_of(gpa).unwrap();
        assert_eq!(file.byte(offset), guest_byte(gpa.start()), "{format} {gpa}");
    }
    for region in map.regions() {
        let range = region.range().unwrap();
        let found = decoded.layout.segments.offset_of(range);
        assert_eq!(found.is_some(), region.kind.in_image(), "{format} {range}");
        if format == Format::Raw && region.kind.in_image() {
            assert_eq!(found, Some(range.start()));
        }
    }
    let bare = encode(format, Arch::Aarch64, map, &[]).unwrap();
    assert_eq!(bare.segments, layout.segments, "notes and arch move no segment");
}

fn any_kind() -> impl Strategy<Value = Kind> {
    prop_oneof![
        4 => Just(Kind::Ram),
        1 => Just(Kind::Rom),
        1 => Just(Kind::Romd),
        1 => Just(Kind::DeviceRam),
        1 => Just(Kind::Nvdimm),
        1 => Just(Kind::RamDevice),
    ]
}

/// Maps with neighbours of other kinds, gaps, holes of a TiB, ends inside pages.
fn any_map() -> impl Strategy<Value = MemoryMap> {
    let gap = prop_oneof![Just(0u64), Just(TIB), 1..0x3000u64, (1..8u64).prop_map(|n| n * 4096)];
    let len = prop_oneof![
        Just(1u64),
        1..0x3000u64,
        (1..8u64).prop_map(|n| n * 4096),
        Just(0x4000_0000u64),
        Just(TIB)
    ];
    proptest::collection::vec((gap, len, any_kind()), 0..30).prop_map(|list| {
        let mut gpa = 0;
        let mut regions = Vec::new();
        for (gap, len, kind) in list {
            gpa += gap;
            regions.push(Region { kind, ..ram(gpa, len) });
            gpa += len;
        }
        MemoryMap::new(regions).unwrap()
    })
}

fn any_notes() -> impl Strategy<Value = Vec<Note>> {
    let desc = proptest::collection::vec(any::<u8>(), 0..70);
    let note =
        ("[A-Z]{1,9}", any::<u32>(), desc).prop_map(|(name, kind, desc)| Note { name, kind, desc });
    proptest::collection::vec(note, 0..5)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_format_finds_every_byte(map in any_map(), notes in any_notes()) {
        for format in Format::ALL {
            suite(format, &map, &notes);
        }
    }

    /// Arbitrary bytes behind a right beginning: an answer or an error, never a panic.
    #[test]
    fn arbitrary_bytes_do_not_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 64..400),
        begin in prop_oneof![Just(0usize), Just(20), Just(64)],
        stated_len in prop_oneof![Just(None), any::<u64>().prop_map(Some)],
    ) {
        for (format, header) in [(Format::Elf, small(Format::Elf)), (Format::Lime, small(Format::Lime))] {
            let begin = begin.min(header.len());
            bytes[..begin].copy_from_slice(&header[..begin]);
            let len = stated_len.unwrap_or(count(&bytes));
            let _ = decode(format, &MemoryMap::default(), &mut Cursor::new(&bytes), len);
        }
        let _ = elf::parse_notes(&bytes);
    }
}

/// QEMU's pc with 16 MiB: RAM, the VGA hole, ROM next to RAM, VGA memory, the BIOS.
fn pc_map() -> MemoryMap {
    let kinds = [
        (0, 0xa_0000, Kind::Ram),
        (0xc_0000, 0x4_0000, Kind::Rom),
        (0x10_0000, 0xf0_0000, Kind::Ram),
        (0xfd00_0000, 0x100_0000, Kind::DeviceRam),
        (0xfffc_0000, 0x4_0000, Kind::Rom),
    ];
    let regions = kinds.map(|(gpa, len, kind)| Region { kind, ..ram(gpa, len) });
    MemoryMap::new(regions.to_vec()).unwrap()
}

fn vmcoreinfo() -> Note {
    Note { name: "VMCOREINFO".into(), kind: 0, desc: b"OSRELEASE=6\n1".to_vec() }
}

/// The headers of a small image (two ranges, one note), as bytes from offset 0 on: all there is
/// before the memory of ELF, and the whole file of LiME.
fn small(format: Format) -> Vec<u8> {
    let map = MemoryMap::new(vec![ram(0, 0x40), ram(0x1000, 0x40)]).unwrap();
    let layout = encode(format, Arch::X86_64, &map, &[vmcoreinfo()]).unwrap();
    let mut bytes = Vec::new();
    for piece in &layout.pieces {
        bytes.resize(usize::try_from(piece.offset).unwrap(), 0);
        bytes.extend(&piece.bytes);
    }
    if format == Format::Lime {
        bytes.resize(usize::try_from(layout.len).unwrap(), 0);
    }
    bytes
}

fn decode_elf(bytes: &[u8]) -> Result<Decoded, FormatError> {
    elf::decode(&mut Cursor::new(bytes), i64::MAX.unsigned_abs())
}

fn decode_lime(bytes: &[u8]) -> Result<Decoded, FormatError> {
    lime::decode(&mut Cursor::new(bytes), count(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .chunks(16)
        .map(|row| row.iter().map(|b| format!("{b:02x}")).collect::<String>() + "\n")
        .collect()
}

#[test]
fn formats_have_one_name_each() {
    for format in Format::ALL {
        assert_eq!(format.to_string().parse(), Ok(format));
        assert_eq!(serde_json::to_string(&format).unwrap(), format!("\"{format}\""));
    }
    assert_eq!("LIME".parse::<Format>(), Err(UnknownFormat("LIME".into())));
}

#[test]
fn magic_numbers_are_told_apart() {
    assert_eq!(detect(&small(Format::Elf)), Some(Format::Elf));
    assert_eq!(detect(&small(Format::Lime)), Some(Format::Lime));
    assert_eq!(detect(b"\x7fEL"), None);
    assert_eq!(detect(b"AVML"), None);
}

#[test]
fn decoders_take_as_many_segments_as_a_map_has() {
    assert_eq!(usize::try_from(MAX_SEGMENTS).unwrap(), crate::map::MAX_REGIONS);
}

/// Written down by hand from the System V ABI (gABI, chapters 4 and 5).
#[test]
fn golden_elf_headers() {
    let map = MemoryMap::new(vec![ram(0, 0xa_0000), ram(0x10_0000, 0x1000)]).unwrap();
    let layout = encode(Format::Elf, Arch::X86_64, &map, &[vmcoreinfo()]).unwrap();
    let [header, table, notes] = layout.pieces.as_slice() else { panic!("{layout:?}") };
    assert_eq!((header.offset, table.offset, notes.offset), (0, 64, 0x2000));
    assert_eq!(
        hex(&header.bytes),
        "7f454c46020101000000000000000000\n\
         04003e00010000000000000000000000\n\
         40000000000000000000000000000000\n\
         00000000400038000300000000000000\n"
    );
    let phdr = |kind: u32, offset: u64, addr: u64, len: u64| {
        let fields = [u64::from(kind), offset, addr, addr, len, len, 0];
        fields.map(u64::to_le_bytes).concat()
    };
    let expected = [
        phdr(4, 0x2000, 0, 40),
        phdr(1, 0x20_0000, 0, 0xa_0000),
        phdr(1, 0x2a_0000, 0x10_0000, 0x1000),
    ];
    assert_eq!(table.bytes, expected.concat());
    assert_eq!(
        hex(&notes.bytes),
        "0b0000000d00000000000000564d434f\n\
         5245494e464f00004f5352454c454153\n\
         453d360a31000000\n"
    );
    assert_eq!(layout.len, 0x2a_1000);
    let arm = encode(Format::Elf, Arch::Aarch64, &map, &[]).unwrap();
    assert_eq!(arm.pieces[0].bytes[18..20], [0xb7, 0]);
    assert_eq!(arm.pieces[1].bytes[..56], phdr(4, 0x2000, 0, 0), "PT_NOTE without notes");
    assert_eq!(arm.pieces.len(), 2);
}

/// facts of LiME's `src/lime.h`: magic, version, first, last (included), reserved.
#[test]
fn golden_lime_header() {
    let map =
        MemoryMap::new(vec![ram(0x10_0000, 0x2000), ram(0x10_2000, 0x1000), ram(TIB, 0x1000)]);
    let layout = encode(Format::Lime, Arch::X86_64, &map.unwrap(), &[vmcoreinfo()]).unwrap();
    let [first, second] = layout.pieces.as_slice() else { panic!("{layout:?}") };
    assert_eq!(
        hex(&first.bytes),
        "454d694c010000000000100000000000\n\
         ff2f1000000000000000000000000000\n"
    );
    assert_eq!(second.offset, 0x20 + 0x3000);
    assert_eq!(
        hex(&second.bytes),
        "454d694c010000000000000000010000\n\
         ff0f0000000100000000000000000000\n"
    );
    assert_eq!(layout.len, 0x40 + 0x4000, "no trailer");
}

#[test]
fn raw_is_its_addresses() {
    let layout = encode(Format::Raw, Arch::X86_64, &pc_map(), &[]).unwrap();
    assert!(layout.segments.list().iter().all(|s| s.offset == s.range.start()));
    assert_eq!((layout.len, layout.pieces.len()), (1 << 32, 0));
    assert_eq!(
        layout.gaps(),
        [0xa_0000..0xc_0000, 0x100_0000..0xfd00_0000, 0xfe00_0000..0xfffc_0000]
    );
    let decoded = raw::decode(&pc_map(), (1 << 32) - 1);
    assert!(matches!(decoded, Err(FormatError::Length { .. })));
}

/// Only whole pages are in PT_LOADs that MemProcFS takes; other readers see every byte.
#[test]
fn elf_parts_an_unaligned_range_without_padding() {
    let map = MemoryMap::new(vec![ram(0x1800, 0x2000), ram(0x3800, 0x1010), ram(0x9010, 0x20)]);
    let layout = encode(Format::Elf, Arch::X86_64, &map.unwrap(), &[]).unwrap();
    let field = |phdr: usize, at: usize| {
        let at = phdr * 56 + at;
        u64::from_le_bytes(layout.pieces[1].bytes[at..at + 8].try_into().unwrap())
    };
    let loads: Vec<_> = (1..=4).map(|i| (field(i, 8), field(i, 24), field(i, 32))).collect();
    assert_eq!(
        loads,
        [
            (0x20_0800, 0x1800, 0x800),
            (0x20_1000, 0x2000, 0x2000),
            (0x20_3000, 0x4000, 0x810),
            (0x20_4010, 0x9010, 0x20),
        ]
    );
    assert_eq!(layout.pieces[1].bytes.len(), 5 * 56);
    assert_eq!(layout.segments.list().len(), 2, "the parts stay side by side");
}

#[test]
fn elf_holds_144_segments_and_names_the_others() {
    let map = |n| MemoryMap::new((0..n).map(|i| ram(i * 0x2000, 0x1000)).collect()).unwrap();
    let layout = encode(Format::Elf, Arch::X86_64, &map(144), &[]).unwrap();
    let table = &layout.pieces[1];
    assert!(table.offset + count(&table.bytes) <= 0x2000);
    let error = encode(Format::Elf, Arch::X86_64, &map(145), &[]).unwrap_err().to_string();
    assert!(error.contains("145") && error.contains("raw and lime"), "{error}");
    for format in [Format::Raw, Format::Lime] {
        assert!(encode(format, Arch::X86_64, &map(145), &[]).is_ok());
    }
}

#[test]
fn notes_fill_the_gap_and_no_more() {
    let room = usize::try_from(elf::MEMORY_OFFSET - elf::NOTES_OFFSET).unwrap();
    let note = |len| Note { name: "CORE".into(), kind: 1, desc: vec![7; len] };
    let layout = encode(Format::Elf, Arch::X86_64, &pc_map(), &[note(room - 20)]).unwrap();
    assert_eq!(layout.segments.list()[0].offset, 2 << 20);
    assert_eq!(layout.gaps()[0].end, 0x2000, "the gap is full");
    let error = encode(Format::Elf, Arch::X86_64, &pc_map(), &[note(room - 19)]).unwrap_err();
    assert!(matches!(error, FormatError::NoRoomForNotes { .. }));
    for name in ["", "A\0B"] {
        let bad = Note { name: name.into(), kind: 0, desc: vec![] };
        assert!(matches!(elf::note_bytes(&[bad]), Err(FormatError::Note { index: 0, .. })));
    }
}

#[test]
fn no_memory_and_no_file_offset_are_refused() {
    let rom = Region { kind: Kind::Romd, ..ram(0, 0x1000) };
    let none = MemoryMap::new(vec![rom]).unwrap();
    let far = MemoryMap::new(vec![ram(0, 1 << 62), ram(1 << 62, 1 << 62)]).unwrap();
    for format in Format::ALL {
        let error = encode(format, Arch::X86_64, &none, &[]).unwrap_err();
        assert!(matches!(error, FormatError::NoMemory), "{format} {error}");
        let error = encode(format, Arch::X86_64, &far, &[]).unwrap_err();
        assert!(matches!(error, FormatError::Layout(_)), "{format} {error}");
    }
}

/// What QEMU 7.2 writes for a pc with 16 MiB in its BIOS: section headers first, `e_ehsize` 8,
/// EM_386, memory at 0x448. Header bytes and addresses are those of a real dump; its notes are
/// replaced by one of the same length.
fn qemu_dump() -> Vec<u8> {
    let mut bytes = small(Format::Elf)[..64].to_vec();
    bytes[18] = 3; // e_machine
    bytes[32] = 0xc0; // e_phoff
    bytes[40] = 0x40; // e_shoff
    bytes[52] = 8; // e_ehsize
    bytes[56] = 5; // e_phnum
    bytes[58..64].copy_from_slice(&[64, 0, 2, 0, 1, 0]);
    bytes.resize(0xc0, 0);
    let loads = [
        (4u32, 0x1d8u64, 0u64, 0x270u64),
        (1, 0x448, 0, 0xa_0000),
        (1, 0xa_0448, 0xc_0000, 0xf4_0000),
        (1, 0xfe_0448, 0xfd00_0000, 0x100_0000),
        (1, 0x1fe_0448, 0xfffc_0000, 0x4_0000),
    ];
    for (kind, offset, addr, len) in loads {
        let fields = [u64::from(kind), offset, addr, addr, len, len, 0];
        bytes.extend(fields.map(u64::to_le_bytes).concat());
    }
    let desc = vec![1; 0x270 - 20];
    bytes.extend(elf::note_bytes(&[Note { name: "QEMU".into(), kind: 0, desc }]).unwrap());
    assert_eq!(bytes.len(), 0x448);
    bytes
}

#[test]
fn qemus_own_dump_is_read_with_its_flaws() {
    let decoded = decode_elf(&qemu_dump()).unwrap();
    assert_eq!(decoded.machine, Some(3));
    assert_eq!(decoded.notes.len(), 1);
    assert_eq!((decoded.notes[0].name.as_str(), decoded.notes[0].desc.len()), ("QEMU", 604));
    let ours = encode(Format::Elf, Arch::X86_64, &pc_map(), &[]).unwrap();
    let ranges =
        |layout: &Layout| layout.segments.list().iter().map(|s| s.range).collect::<Vec<_>>();
    assert_eq!(ranges(&decoded.layout), ranges(&ours), "the same memory as ours");
    assert_eq!(
        decoded.layout.segments.offset_of(GuestRange::new(0xc_0001, 1).unwrap()),
        Some(0xa_0449)
    );
    let words: Vec<_> = decoded.layout.pieces.iter().map(|p| (p.what, p.offset)).collect();
    let expected =
        [("ELF header", 0), ("section headers", 0x40), ("program headers", 0xc0), ("notes", 0x1d8)];
    assert_eq!(words, expected);
}

#[test]
fn neighbours_are_joined_only_when_they_are_neighbours_in_the_file() {
    let map = MemoryMap::new(vec![ram(0, 0x40), ram(0x1000, 0x40)]).unwrap();
    let split = encode(Format::Elf, Arch::X86_64, &map, &[]).unwrap();
    let table = split.pieces[1].offset + 2 * 56;
    let (p_offset, p_paddr) = (table + 8, table + 24);
    let count_with = |paddr: u64, offset: u64| {
        let mut bytes = small(Format::Elf);
        for (at, value) in [(p_offset, offset), (p_paddr, paddr)] {
            let at = usize::try_from(at).unwrap();
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        decode_elf(&bytes).unwrap().layout.segments.list().len()
    };
    assert_eq!(count_with(0x40, 0x20_0040), 1);
    assert_eq!(count_with(0x40, 0x20_1000), 2);
    assert_eq!(count_with(0x41, 0x20_0040), 2);
}

#[test]
fn the_true_count_behind_pn_xnum_is_used_and_bounded() {
    let mut bytes = qemu_dump();
    bytes[56..58].copy_from_slice(&[0xff, 0xff]);
    let sh_info = 0x40 + 44;
    bytes[sh_info] = 5;
    assert_eq!(decode_elf(&bytes).unwrap().layout.segments.list().len(), 4);
    bytes[sh_info..sh_info + 4].copy_from_slice(&65_537u32.to_le_bytes());
    assert!(matches!(decode_elf(&bytes), Err(FormatError::Limit { found: 65_537, .. })));
    bytes[60] = 0; // e_shnum: nowhere to look
    assert!(matches!(decode_elf(&bytes), Err(FormatError::Field { what: "e_phnum", .. })));
}

/// Each case: where 8 bytes are replaced, by what, and a word of the error.
#[track_caller]
fn check_refusals(
    good: &[u8],
    decode: fn(&[u8]) -> Result<Decoded, FormatError>,
    cases: &[(usize, u64, &str)],
) {
    decode(good).unwrap();
    for &(at, value, word) in cases {
        let mut bytes = good.to_vec();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let error = decode(&bytes).unwrap_err().to_string();
        assert!(error.contains(word), "{at:#x} = {value:#x}: {error}");
    }
}

#[test]
fn hostile_elf_is_refused() {
    let (load1, load2) = (64 + 56, 64 + 112);
    let max = i64::MAX.unsigned_abs();
    check_refusals(
        &small(Format::Elf),
        decode_elf,
        &[
            (0, 0x0001_0102_464c_457e, "ELF magic"),
            (0, 0x0001_0101_464c_457f, "ELF class"),
            (0, 0x0001_0202_464c_457f, "data encoding"),
            (16, 0x1_003e_0002, "e_type"),
            (16, 0x2_003e_0004, "e_version"),
            (32, u64::MAX, "program headers"),
            (32, 0x10, "p_type"),
            (48, 0x0038_0020_0000_0000, "e_ehsize"),
            (48, 0x0020_0040_0000_0000, "e_phentsize"),
            (56, 0x8000, "could not be read"),
            (56, 0, "no memory"),
            (56, 0x0041_0040_0003, "limit of 64"),
            (56, 0x0001_0020_0003, "e_shentsize"),
            (64, 7, "p_type"),
            (64 + 8, u64::MAX, "notes"),
            (64 + 8, 0x20, "note 0"),
            (64 + 32, 39, "cut short"),
            (64 + 32, u64::MAX, "limit"),
            (0x2000, 0xd_0000_000a, "ends with one NUL"),
            (0x2000, 0xffff_ffff_0000_000b, "cut short"),
            (load1 + 8, u64::MAX, "passes the file's end"),
            (load1 + 8, max, "passes the file's end"),
            (load1 + 8, 0x2020, "overlap"),
            (load1 + 32, 0x41, "p_filesz"),
            (load1 + 40, 0, "p_filesz"),
            (load2 + 8, 0x20_0000, "overlap"),
            (load2 + 24, 0x3f, "does not lie behind"),
            (load2 + 24, u64::MAX, "wrap"),
        ],
    );
}

#[test]
fn hostile_lime_is_refused() {
    let second = 0x60;
    check_refusals(
        &small(Format::Lime),
        decode_lime,
        &[
            (0, 0x1_4c69_4d44, "LiME magic"),
            (0, 0x2_4c69_4d45, "LiME version"),
            (8, 0x40, "wrap"),
            (16, 0x1040, "passes the file's end"),
            (16, u64::MAX, "wrap"),
            (16, u64::MAX - 1, "passes the file's end"),
            (24, 1, "reserved"),
            (second, 0, "LiME magic"),
            (second + 8, 0x3f, "passes the file's end"),
        ],
    );
    let mut bytes = small(Format::Lime);
    bytes[second + 8] = 0x20;
    bytes[second + 9] = 0;
    bytes[second + 16] = 0x5f;
    bytes[second + 17] = 0;
    assert!(matches!(decode_lime(&bytes), Err(FormatError::Layout(LayoutError::Order { .. }))));
}

#[test]
fn lime_ends_where_its_last_record_ends() {
    let good = small(Format::Lime);
    for len in 0..good.len() + 40 {
        let mut bytes = good.clone();
        bytes.resize(len, 0);
        // The first record alone is a whole file; all else is cut short or has a trailer.
        assert_eq!(decode_lime(&bytes).is_ok(), len == good.len() || len == 0x60, "{len:#x}");
    }
}

#[test]
fn a_million_records_are_refused_before_they_are_kept() {
    let mut bytes = Vec::new();
    for i in 0..=MAX_SEGMENTS {
        bytes.extend(lime::MAGIC);
        bytes.extend(1u32.to_le_bytes());
        bytes.extend([i, i, 0].map(u64::to_le_bytes).concat());
        bytes.push(0);
    }
    assert!(matches!(decode_lime(&bytes), Err(FormatError::Limit { limit: MAX_SEGMENTS, .. })));
    bytes.truncate(bytes.len() - 33);
    assert!(decode_lime(&bytes).is_ok());
}

#[test]
fn too_many_notes_are_refused() {
    let note = Note { name: "A".into(), kind: 0, desc: vec![] };
    let one = elf::note_bytes(&[note]).unwrap();
    let many = one.repeat(usize::try_from(elf::MAX_NOTES).unwrap());
    assert_eq!(count(&elf::parse_notes(&many).unwrap()), elf::MAX_NOTES);
    let more = [many, one].concat();
    assert!(matches!(elf::parse_notes(&more), Err(FormatError::Limit { .. })));
}

/// Any one byte of any header: the decoder refuses it, or reads something else. It never panics
/// and never takes the changed file for the original.
#[test]
fn no_changed_header_byte_goes_unseen() {
    type Decode = fn(&[u8]) -> Result<Decoded, FormatError>;
    let files: [(Vec<u8>, Decode); 3] = [
        (small(Format::Elf), decode_elf),
        (qemu_dump(), decode_elf),
        (small(Format::Lime), decode_lime),
    ];
    for (good, decode) in files {
        let before = decode(&good).unwrap();
        let pieces = before.layout.pieces.clone();
        for piece in pieces {
            let start = usize::try_from(piece.offset).unwrap();
            for at in start..start + piece.bytes.len() {
                for change in [1, 0x80, 0xff, good[at]] {
                    let mut bytes = good.clone();
                    bytes[at] ^= change;
                    if let Ok(after) = decode(&bytes) {
                        assert_eq!(after == before, bytes == good, "{at:#x} ^ {change:#x}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_file_cut_anywhere_in_its_headers_is_an_error() {
    let elf = small(Format::Elf);
    for len in 0..elf.len() {
        assert!(decode_elf(&elf[..len]).is_err(), "{len:#x}");
        let stated = elf::decode(&mut Cursor::new(&elf[..len]), count(&elf[..len]));
        assert!(matches!(stated, Err(FormatError::Truncated { .. })), "{len:#x}");
    }
}
