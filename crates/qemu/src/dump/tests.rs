//! Dumps made here, whole and broken. Real ones are in `tests/dumps.rs`.

use super::*;
use proptest::prelude::*;

const LIMIT: usize = 64 << 10;

/// A dump as QEMU writes it; what a test wants to be wrong it changes.
#[derive(Clone)]
struct Dump {
    wide: bool,
    machine: u16,
    sections: bool,
    /// Whether the true number of program headers is in the first section header.
    xnum: bool,
    /// Address and bytes.
    memory: Vec<(u64, Vec<u8>)>,
    notes: Vec<u8>,
}

impl Dump {
    fn x86_64(cpus: &[u32]) -> Self {
        let statuses = cpus.iter().map(|&index| note(b"CORE\0", 1, &prstatus(index, true)));
        let states = cpus.iter().map(|_| note(b"QEMU\0", 0, &state()));
        Self {
            wide: true,
            machine: 62,
            sections: true,
            xnum: false,
            memory: vec![(0, vec![7; 0x2345]), (0x10_0800, vec![8; 0x900]), (1 << 32, vec![9; 1])],
            notes: statuses.chain(states).collect::<Vec<_>>().concat(),
        }
    }

    /// As of a guest in real mode whose memory all ends below 4 GiB.
    fn i386() -> Self {
        let notes =
            [note(b"CORE\0", 1, &prstatus(0, false)), note(b"QEMU\0", 0, &state())].concat();
        let memory = vec![(0, vec![7; 0x2345]), (0x10_0800, vec![8; 0x900])];
        Self { wide: false, machine: 3, memory, notes, ..Self::x86_64(&[]) }
    }

    fn with_note(mut self, note: &[u8]) -> Self {
        self.notes.extend(note);
        self
    }

    fn word(&self, value: u64) -> Vec<u8> {
        let bytes = value.to_le_bytes();
        bytes[..if self.wide { 8 } else { 4 }].to_vec()
    }

    fn program(&self, kind: u32, [offset, addr, len]: [u64; 3]) -> Vec<u8> {
        let words = [offset, addr, addr, len, len].map(|word| self.word(word)).concat();
        let (flags, align) = ([0; 4], self.word(0));
        match self.wide {
            true => [&kind.to_le_bytes(), flags.as_slice(), &words, &align].concat(),
            false => [&kind.to_le_bytes(), words.as_slice(), &flags, &align].concat(),
        }
    }

    fn section(&self, [name, kind, info]: [u32; 3], [offset, size]: [u64; 2]) -> Vec<u8> {
        let ints = |ints: &[u32]| ints.iter().flat_map(|i| i.to_le_bytes()).collect::<Vec<_>>();
        let words = |words: &[u64]| words.iter().flat_map(|&w| self.word(w)).collect::<Vec<_>>();
        [ints(&[name, kind]), words(&[0, 0, offset, size]), ints(&[0, info]), words(&[0, 0])]
            .concat()
    }

    /// Everything before the notes.
    fn headers(&self) -> Vec<u8> {
        let [file, segment, section] = if self.wide { [64, 56, 64] } else { [52, 32, 40] };
        let count = self.memory.len() + 1;
        let table_at = file + if self.sections { 2 * section } else { 0 };
        let notes_at = u64::try_from(table_at + segment * count).unwrap();
        let mut at = notes_at + u64::try_from(self.notes.len()).unwrap();
        let len = |bytes: &[u8]| u64::try_from(bytes.len()).unwrap();
        let mut programs = self.program(4, [notes_at, 0, len(&self.notes)]);
        for (gpa, bytes) in &self.memory {
            programs.extend(self.program(1, [at, *gpa, len(bytes)]));
            at += len(bytes);
        }
        let count = u32::try_from(count).unwrap();
        let phnum = if self.xnum { 0xffff } else { u16::try_from(count).unwrap() };
        let short = |n: usize| u16::try_from(n).unwrap().to_le_bytes();
        let sections = if self.sections { 2 } else { 0 };
        let info = if self.xnum { count } else { 0 };
        let mut out = [
            b"\x7fELF".as_slice(),
            &[if self.wide { 2 } else { 1 }, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &4u16.to_le_bytes(),
            &self.machine.to_le_bytes(),
            &1u32.to_le_bytes(),
            &self.word(0),
            &self.word(u64::try_from(table_at).unwrap()),
            &self.word(if self.sections { u64::try_from(file).unwrap() } else { 0 }),
            &0u32.to_le_bytes(),
            &short(if self.sections { 8 } else { file }),
            &short(segment),
            &phnum.to_le_bytes(),
            &short(if self.sections { section } else { 0 }),
            &short(sections),
            &short(sections.saturating_sub(1)),
        ]
        .concat();
        if self.sections {
            out.extend(self.section([0, 0, info], [0, 0]));
            out.extend(self.section([1, 3, 0], [at, 11]));
        }
        [out, programs].concat()
    }

    fn bytes(&self) -> Vec<u8> {
        let memory = self.memory.iter().map(|(_, bytes)| bytes.as_slice());
        let names: &[u8] = if self.sections { b"\0.shstrtab\0" } else { b"" };
        let memory: Vec<_> = memory.collect();
        [self.headers().as_slice(), &self.notes, &memory.concat(), names].concat()
    }
}

fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_le_bytes();
    let padded = |bytes: &[u8]| {
        let mut bytes = bytes.to_vec();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    [&len(name), &len(desc), &kind.to_le_bytes(), padded(name).as_slice(), &padded(desc)].concat()
}

/// rax is 0x1_0000_0001, .. r15 0x1_0000_0010, rip 0x1_0000_0011, rflags 0x1_0000_0012.
fn general(number: u64) -> u64 {
    (1 << 32) + number
}

/// Selector 0x10 + its place, base 0x1000 * its place.
fn state() -> Vec<u8> {
    let mut out = [1u32, 440].map(u32::to_le_bytes).concat();
    out.extend((1..=18).flat_map(|n| general(n).to_le_bytes()));
    for place in 1..=10u32 {
        out.extend([0x10 + place, 0xffff, 0x9300, 0].map(u32::to_le_bytes).concat());
        out.extend((u64::from(place) << 12).to_le_bytes());
    }
    out.extend([0xc0u64, 0xc1, 0xc2, 0xc3, 0x1020, 0xabc].map(u64::to_le_bytes).concat());
    out
}

fn prstatus(index: u32, long_mode: bool) -> Vec<u8> {
    let pid = (index + 1).to_le_bytes();
    // By number of `state`: rax 1, rbx 2, rcx 3, rdx 4, rsi 5, rdi 6, rsp 7, rbp 8, r8 9 ..
    if long_mode {
        let mut words: Vec<u64> =
            [16, 15, 14, 13, 8, 2, 12, 11, 10, 9, 1, 3, 4, 5, 6].map(general).to_vec();
        words.extend([0, general(17), 0x11, general(18), general(7), 0x16]);
        words.extend([0x4000, 0x5000, 0x12, 0x13, 0x14, 0x15]);
        let words: Vec<_> = words.into_iter().flat_map(u64::to_le_bytes).collect();
        return [&[0; 32], pid.as_slice(), &[0; 76], &words, &[0; 8]].concat();
    }
    let words: [u32; 17] = [2, 3, 4, 5, 6, 8, 1, 0x12, 0x13, 0x14, 0x15, 0, 17, 0x11, 18, 7, 0x16];
    [&[0; 24], pid.as_slice(), &[0; 44], &words.map(u32::to_le_bytes).concat(), &[0; 4]].concat()
}

fn aarch64_cpu(index: u32) -> Vec<u8> {
    let words: Vec<_> = (0..34u64).flat_map(u64::to_le_bytes).collect();
    let pid = (index + 1).to_le_bytes();
    let status = [&[0; 32], pid.as_slice(), &[0; 76], &words, &[0; 8]].concat();
    let float: Vec<_> = (0..32u128).flat_map(|n| (n << 100 | n).to_le_bytes()).collect();
    let float = [float.as_slice(), &[5, 0, 0, 0, 6, 0, 0, 0], &[0; 8]].concat();
    [note(b"CORE\0", 1, &status), note(b"CORE\0", 2, &float)].concat()
}

fn aarch64(cpus: u32) -> Dump {
    let notes = (0..cpus).map(aarch64_cpu).collect::<Vec<_>>().concat();
    Dump { machine: 183, notes, ..Dump::x86_64(&[]) }
}

type Given = Vec<(u64, Vec<u8>)>;

/// Reads all of it; what was given, joined where it touches within a page.
fn read(bytes: &[u8]) -> Result<(Head, Given), DumpError> {
    let (head, memory) = head(bytes, LIMIT)?;
    let mut given: Given = Vec::new();
    memory.read(|gpa, bytes| {
        given.push((gpa, bytes.to_vec()));
        Ok(())
    })?;
    Ok((head, given))
}

#[track_caller]
fn refused(bytes: &[u8], text: &str) {
    let error = read(bytes).unwrap_err().to_string();
    assert!(error.contains(text), "{error}");
}

#[test]
fn memory_comes_in_order() {
    for dump in [Dump::x86_64(&[0, 1]), Dump::i386(), aarch64(2)] {
        let (head, given) = read(&dump.bytes()).unwrap();
        assert_eq!(given, dump.memory);
        let total: usize = dump.memory.iter().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(head.memory_len(), u64::try_from(total).unwrap());
        assert_eq!(head.len, u64::try_from(dump.bytes().len()).unwrap());
        assert_eq!(head.notes(), dump.notes);
    }
}

#[test]
fn registers_are_named() {
    for dump in [Dump::x86_64(&[0]), Dump::i386()] {
        let (head, _) = read(&dump.bytes()).unwrap();
        let Registers::X86(x86) = &head.cpus[0].registers else { panic!("not x86") };
        assert_eq!((x86.rax, x86.rbp, x86.r15), (general(1), general(8), general(16)));
        assert_eq!((x86.rip, x86.rflags), (general(17), general(18)));
        let idt = SegmentRegister { selector: 0x1a, limit: 0xffff, flags: 0x9300, base: 0xa000 };
        assert_eq!((x86.cs.selector, x86.idt), (0x11, idt));
        assert_eq!((x86.cr0, x86.cr2, x86.cr3, x86.cr4), (0xc0, 0xc2, 0xc3, 0x1020));
        assert_eq!((x86.la57(), x86.kernel_gs_base), (true, Some(0xabc)));
    }
    let (head, _) = read(&aarch64(2).bytes()).unwrap();
    assert_eq!(head.cpus.iter().map(|cpu| cpu.index).collect::<Vec<_>>(), [0, 1]);
    let Registers::Aarch64(arm) = &head.cpus[1].registers else { panic!("not ARM") };
    assert_eq!((arm.x[30], arm.sp, arm.pc, arm.pstate), (30, 31, 32, 33));
    assert_eq!((arm.v[31], arm.fpsr, arm.fpcr), (31 << 100 | 31, 5, 6));
}

#[test]
fn an_older_state_has_no_kernel_gs_base() {
    let mut old = state();
    old.truncate(432);
    old[4..8].copy_from_slice(&432u32.to_le_bytes());
    let mut dump = Dump::x86_64(&[]);
    dump.notes = [note(b"CORE\0", 1, &prstatus(0, true)), note(b"QEMU\0", 0, &old)].concat();
    let (head, _) = read(&dump.bytes()).unwrap();
    let Registers::X86(x86) = &head.cpus[0].registers else { panic!("not x86") };
    assert_eq!((x86.cr4, x86.kernel_gs_base), (0x1020, None));
    // The size has to be the note's.
    dump.notes =
        [note(b"CORE\0", 1, &prstatus(0, true)), note(b"QEMU\0", 0, &state()[..432])].concat();
    refused(&dump.bytes(), "version 1 of QEMU's own note");
}

#[test]
fn notes_of_different_cpus_are_not_mixed_up() {
    let mut status = prstatus(0, true);
    status[240] ^= 1;
    let mut dump = Dump::x86_64(&[]);
    dump.notes = [note(b"CORE\0", 1, &status), note(b"QEMU\0", 0, &state())].concat();
    refused(&dump.bytes(), "agrees with QEMU's own note");
    refused(&Dump::x86_64(&[3, 3]).bytes(), "CPU 3 twice");
    let mut none = Dump::x86_64(&[0]);
    none.notes[20 + 32..20 + 36].fill(0);
    refused(&none.bytes(), "a CPU's number in pr_pid");
}

#[test]
fn the_guest_forges_no_cpu() {
    let forged = [
        note(b"CORE\0", 1, &prstatus(7, true)),
        note(b"QEMU\0", 0, &state()),
        note(b"", 0, b""),
        note(b"no nul", 9, b"\xff"),
        note(b"VMCOREINFO\0", 0, b"OSRELEASE=1\n"),
    ];
    for note in forged {
        let (head, _) = read(&Dump::x86_64(&[0, 1]).with_note(&note).bytes()).unwrap();
        assert_eq!(head.cpus.len(), 2);
        let guest = head.guest_note.unwrap();
        let is_own = guest.name == b"VMCOREINFO\0";
        assert_eq!(guest.vmcoreinfo(), is_own.then_some(b"OSRELEASE=1\n".as_slice()));
    }
    let cpu = aarch64_cpu(7);
    let (status, float) = cpu.split_at(12 + 8 + 392);
    for note in [status, float] {
        let (head, _) = read(&aarch64(2).with_note(note).bytes()).unwrap();
        assert_eq!(
            (head.cpus.len(), head.guest_note.unwrap().kind),
            (2, if note == status { 1 } else { 2 })
        );
    }
    // One is all that a guest has.
    let two = [note(b"A\0", 0, b""), note(b"B\0", 0, b"")].concat();
    refused(&Dump::x86_64(&[0]).with_note(&two).bytes(), "no note behind the guest's own");
    let missing = note(b"CORE\0", 1, &prstatus(0, true));
    refused(&Dump { notes: missing, ..Dump::x86_64(&[]) }.bytes(), "QEMU's own note of a CPU");
    let cut = Dump::x86_64(&[0]).with_note(&[1; 11]).bytes();
    refused(&cut, "a whole note");
}

#[test]
fn sve_is_gone_past() {
    let sve = note(b"LINUX\0", 0x405, &[1; 16]);
    let notes = [aarch64_cpu(0), sve.clone(), aarch64_cpu(1), sve].concat();
    let (head, _) = read(&Dump { notes, ..aarch64(0) }.bytes()).unwrap();
    assert_eq!((head.cpus.len(), head.guest_note), (2, None));
}

#[test]
fn dumps_of_older_versions_have_no_sections() {
    let dump = Dump { sections: false, ..Dump::x86_64(&[0]) };
    let (head, given) = read(&dump.bytes()).unwrap();
    assert_eq!(
        (given, head.len),
        (dump.memory.clone(), u64::try_from(dump.bytes().len()).unwrap())
    );
    refused(&Dump { xnum: true, ..dump }.bytes(), "number of program headers in no section");
}

/// A machine with much virtio-mem.
#[test]
fn many_ranges_are_counted_by_a_section() {
    let memory: Vec<_> = (0..65_534).map(|n| (n << 13, vec![1; 1])).collect();
    let mut dump = Dump { xnum: true, memory, ..Dump::x86_64(&[0]) };
    let whole = |dump: &Dump| {
        let bytes = dump.bytes();
        let (head, memory) = head(bytes.as_slice(), 8 << 20)?;
        let mut count = 0;
        memory.read(|gpa, bytes| {
            assert_eq!((gpa, bytes), (count << 13, [1].as_slice()));
            count += 1;
            Ok(())
        })?;
        assert_eq!(head.segments.list().len(), dump.memory.len());
        Ok::<_, DumpError>(())
    };
    whole(&dump).unwrap();
    dump.memory.extend((65_534..65_536).map(|n| (n << 13, vec![1; 1])));
    whole(&dump).unwrap();
    dump.memory.push((65_536 << 13, vec![1; 1]));
    let error = whole(&dump).unwrap_err();
    assert!(matches!(error, DumpError::Limit { limit: 65_536, .. }), "{error}");
    // A number that is in both places differs, or is in the wrong one.
    let mut bytes = Dump::x86_64(&[0]).bytes();
    bytes[64 + 44] = 4;
    refused(&bytes, "an empty section");
    let few = Dump { xnum: true, ..Dump::x86_64(&[0]) };
    refused(&few.bytes(), "an empty section");
}

/// Changes `bytes` in a copy of a dump.
fn changed(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut dump = Dump::x86_64(&[0]).bytes();
    dump[at..at + bytes.len()].copy_from_slice(bytes);
    dump
}

#[test]
fn other_elf_is_refused() {
    /// Of the first PT_LOAD.
    const LOAD: usize = 64 + 128 + 56;
    let (small, max) = (8u64.to_le_bytes(), u64::MAX.to_le_bytes());
    let cases: [(usize, &[u8], &str); 24] = [
        (0, b"\x7fELG", "the magic"),
        (4, &[3], "class 1 or 2"),
        (5, &[2], "the dump of a big-endian guest is not supported"),
        (5, &[9], "a data encoding"),
        (7, &[3], "no ABI"),
        (16, &[2], "a core"),
        (18, &[8], "a machine of number 8 is not supported"),
        (20, &[2], "version 1"),
        (24, &[1], "no entry point"),
        (32, &[64], "program headers at 0x40"),
        (40, &[65], "section headers at 0x41"),
        (52, &[9], "the ELF header's size, or 8"),
        (54, &[64], "the size of a program header"),
        (56, &[1, 0], "program headers for notes and memory"),
        (60, &[3], "3 section headers of 64 bytes"),
        (64 + 64 + 24, &[0, 0], "the sections at memory's end"),
        (64 + 64 + 4, &[4], "the section of the sections' names"),
        (64 + 128 + 8, &[0], "PT_NOTE behind the headers"),
        (LOAD, &[6], "PT_LOAD"),
        (LOAD + 8, &[1], "memory behind the notes"),
        (LOAD + 16, &small, "paging=true"),
        (LOAD + 40, &max, "0x2345 of 0xffffffffffffffff bytes at 0x0 are kept"),
        (LOAD + 32, &[0; 16], "a range of addresses"),
        (LOAD + 32, &[max, max].concat(), "memory behind the notes, or behind the range before"),
    ];
    for (at, bytes, text) in cases {
        refused(&changed(at, bytes), text);
    }
}

#[test]
fn ranges_that_overlap_are_refused() {
    let mut dump = Dump::x86_64(&[0]);
    dump.memory = vec![(0x1000, vec![0; 0x1001]), (0x2000, vec![0; 1])];
    refused(&dump.bytes(), "make no layout");
    dump.memory = vec![(0x2000, vec![0; 1]), (0x1000, vec![0; 1])];
    refused(&dump.bytes(), "make no layout");
    // And one that no file could hold.
    dump.memory.truncate(1);
    let mut bytes = dump.bytes();
    let load = 64 + 128 + 56;
    bytes[load + 32..load + 48].copy_from_slice(&[(i64::MAX as u64).to_le_bytes(); 2].concat());
    refused(&bytes, "make no layout");
}

#[test]
fn a_length_is_not_taken_at_its_word() {
    // Notes of 2^56 bytes: refused for the limit, not for want of memory.
    let mut dump = Dump::x86_64(&[0]).bytes();
    dump[64 + 128 + 32 + 7] = 1;
    dump[64 + 128 + 40 + 7] = 1;
    let error = read(&dump).unwrap_err();
    assert!(matches!(error, DumpError::Limit { .. } | DumpError::Malformed { .. }), "{error}");
}

#[test]
fn cut_within_memory_says_what_came() {
    let dump = Dump::x86_64(&[0]);
    let start = dump.headers().len() + dump.notes.len();
    let bytes = dump.bytes();
    // Two whole pages and a part, the whole of the first range, a part of the second.
    for (cut, gpa) in [(0, 0), (0x1fff, 0x1000), (0x2000, 0x2000), (0x2344, 0x2000)] {
        let error = read(&bytes[..start + cut]).unwrap_err();
        let DumpError::MemoryCut { at, range, gpa: found } = error else { panic!("{error}") };
        assert_eq!((range.start(), found), (0, gpa), "cut at {cut:#x}");
        assert_eq!(at, u64::try_from(start + cut).unwrap());
    }
    let error = read(&bytes[..start + 0x2345 + 0x7ff]).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("before 0x100800"), "{text}");
}

/// Gives as many bytes at a time as it is told to.
struct Pieces<'a>(&'a [u8], usize);

impl Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.1.min(into.len());
        self.0.read(&mut into[..len])
    }
}

#[test]
fn no_page_comes_in_two_parts() {
    let mut dump = Dump::x86_64(&[0]);
    let long = (0..700_123u32).map(|n| n.to_le_bytes()[1]).collect();
    dump.memory = vec![(0x1_0800, long), (1 << 32, vec![1; 0x1000])];
    let bytes = dump.bytes();
    for piece in [1, 13, 4096, 65_536, usize::MAX] {
        let (_, memory) = head(Pieces(&bytes, piece), LIMIT).unwrap();
        let mut next = Vec::new();
        let mut gathered: Given = dump.memory.iter().map(|(gpa, _)| (*gpa, Vec::new())).collect();
        memory
            .read(|gpa, bytes| {
                let (start, held) =
                    gathered.iter_mut().rev().find(|(start, _)| *start <= gpa).unwrap();
                assert_eq!(gpa, *start + u64::try_from(held.len()).unwrap());
                held.extend(bytes);
                next.push(gpa + u64::try_from(bytes.len()).unwrap());
                assert!(!bytes.is_empty() && bytes.len() <= 256 << 10);
                Ok(())
            })
            .unwrap();
        assert_eq!(gathered, dump.memory);
        let end = 0x1_0800 + 700_123;
        assert!(next.iter().all(|&next| next % 4096 == 0 || next == end));
    }
}

#[test]
fn who_takes_memory_may_stop() {
    let bytes = Dump::x86_64(&[0]).bytes();
    let (_, memory) = head(bytes.as_slice(), LIMIT).unwrap();
    let error = memory.read(|_, _| Err(io::Error::other("full"))).unwrap_err();
    assert!(matches!(error, DumpError::Refused { .. }), "{error}");
}

/// A pipe whose writer stands still after the notes.
struct Blocks<'a>(&'a [u8]);

impl Read for Blocks<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.0.read(into)? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            len => Ok(len),
        }
    }
}

#[test]
fn the_head_needs_no_byte_of_memory() {
    let dump = Dump::x86_64(&[0]);
    let bytes = [dump.headers(), dump.notes.clone()].concat();
    let (head, memory) = head(Blocks(&bytes), LIMIT).unwrap();
    assert_eq!(head.bytes, bytes);
    let error = memory.read(|_, _| Ok(())).unwrap_err();
    assert!(matches!(error, DumpError::Read { .. }), "{error}");
}

proptest! {
    #[test]
    fn any_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        prop_assert!(read(&bytes).is_err());
    }

    #[test]
    fn changed_dumps_do_no_harm(
        which in 0usize..3,
        changes in prop::collection::vec((0usize..2000, any::<u8>()), 1..5),
        cut in 0usize..20_000,
    ) {
        let dump = [Dump::x86_64(&[0, 1]), Dump::i386(), aarch64(2)][which].clone();
        let mut bytes = dump.bytes();
        for (at, byte) in changes {
            if let Some(found) = bytes.get_mut(at) {
                *found = byte;
            }
        }
        bytes.truncate(cut);
        let _ = read(&bytes);
    }

    #[test]
    fn what_was_written_is_read(
        sizes in prop::collection::vec((0u64..3, 1usize..20_000), 1..6),
        piece in 1usize..10_000,
    ) {
        let mut dump = Dump::x86_64(&[0, 1, 2]);
        let mut gpa = 0x123;
        dump.memory.clear();
        for (gap, len) in sizes {
            gpa += gap * 0x777;
            dump.memory.push((gpa, vec![u8::try_from(len % 256).unwrap(); len]));
            gpa += u64::try_from(len).unwrap();
        }
        let bytes = dump.bytes();
        let (head, memory) = head(Pieces(&bytes, piece), LIMIT).unwrap();
        let mut all: Vec<u8> = Vec::new();
        memory.read(|_, bytes| { all.extend(bytes); Ok(()) }).unwrap();
        let wanted: Vec<_> = dump.memory.iter().map(|(_, bytes)| bytes.as_slice()).collect();
        prop_assert_eq!(all, wanted.concat());
        prop_assert_eq!(head.len, u64::try_from(bytes.len()).unwrap());
    }
}
